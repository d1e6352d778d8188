"""Checks of scalar arguments that several public functions share, and the names that their messages use."""

from __future__ import annotations

import math
import numbers
import os
import sys
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


class FitWarning(UserWarning):
    """A fit is possible, but its data or options look like a mistake."""


def caller_level() -> int:
    """The ``stacklevel`` at which a warning, raised where this is called, names the line that called the package."""
    level, frame = 1, sys._getframe(1)
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "snmf_kernels"
    ):
        level, frame = level + 1, frame.f_back
    return level


def device(name: str, value: torch.device | str) -> torch.device:
    """A device that this torch can compute on."""
    try:
        wanted = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: wanted a device such as 'cpu' or 'cuda:0', got {value!r}") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: wanted {wanted}, but torch finds no CUDA or ROCm device; use {name}='cpu'")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name}: wanted {wanted}, but torch finds {torch.cuda.device_count()} such devices")
    try:
        usable = bool(torch.ones(1, device=wanted) == 1)
    except (RuntimeError, AssertionError, NotImplementedError):  # "meta", or what this build of torch lacks
        usable = False
    if not usable:
        raise ValueError(
            f"{name}: wanted a device that this torch computes on, got {wanted}; use {name}='cpu'"
        )
    return wanted


def available_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device; infinite where nobody knows."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        return float(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf
