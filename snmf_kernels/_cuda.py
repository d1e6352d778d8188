"""Launchers of the CUDA kernels in ``_C``, on torch's current stream of the tensors' device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import snmf_kernels._C as _C

from ._checks import dtype_name


@cache
def ridge_max_k(device: int, dtype: torch.dtype) -> int:
    """Largest system that fits the shared memory of one block on this device."""
    return int(_C.cuda_ridge_max_k(device, dtype.itemsize))


def ridge_solve(G: Tensor, B: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    G, B = G.contiguous(), B.contiguous()
    batch, k, m = B.shape
    X, info = torch.empty_like(B), torch.empty(batch, dtype=torch.int32, device=B.device)
    device = B.get_device()
    _C.cuda_ridge_solve(
        dtype_name(G.dtype), G.data_ptr(), B.data_ptr(), X.data_ptr(), info.data_ptr(),
        batch, k, m, ridge, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return X, info
