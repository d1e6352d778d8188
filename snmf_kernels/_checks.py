"""Checks of scalar arguments that several public functions share, and the names that their messages use."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch


def integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; numpy integers are welcome, booleans and floats are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: wanted an integer >= {least}, got {value!r} ({type(value).__name__})")
    converted = int(value)
    if converted < least:
        raise ValueError(f"{name}: wanted an integer >= {least}, got {value}")
    if converted >= 2**31:
        raise ValueError(f"{name}: wanted an integer below 2**31, got {value}")
    return converted


def number(name: str, value: Any) -> float:
    """``value`` as a finite float >= 0; numpy and 0-d torch scalars are welcome."""
    try:
        converted = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, RuntimeError):
        converted = None
    if converted is None:
        raise TypeError(f"{name}: wanted a number, got {value!r} ({type(value).__name__})")
    if not 0 <= converted < math.inf:
        raise ValueError(f"{name}: wanted a finite number >= 0, got {value}")
    return converted


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
