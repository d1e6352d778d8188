"""Cosines of features and correlations of their coefficients, tensors or arrays. One that is zero is like none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cosines(first: Any, second: Any) -> Tensor:
    """Cosine of each column of ``first [d, k]`` with each of ``second [d, m]``: ``[k, m]`` float64.

    Signed: coefficients are not negative, so ``-z`` is another feature than z.
    """
    return _unit(as_double(first).T) @ _unit(as_double(second).T).T


def correlations(first: Any, second: Any) -> Tensor:
    """Pearson correlation of each row of ``first [k, n]`` with each of ``second [m, n]``: ``[k, m]`` float64.

    Rows are centred, for those without negative entries have a cosine well above 0 even where they have nothing to
    do with each other.
    """
    return _unit(_centred(as_double(first))) @ _unit(_centred(as_double(second))).T


def as_double(array: Any) -> Tensor:
    """A tensor or numpy array as a float64 tensor on the CPU."""
    return torch.as_tensor(array).detach().cpu().double()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
