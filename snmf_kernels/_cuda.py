"""Launchers of the CUDA kernels in ``_C``, on torch's current stream of the tensors' device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import snmf_kernels._C as _C

from . import reference
from ._checks import dtype_name
from .sparse import Supports


@cache
def ridge_max_k(device: int, dtype: torch.dtype) -> int:
    """Largest system that fits the shared memory of one block on this device."""
    return int(_C.cuda_ridge_max_k(device, dtype.itemsize))


def support_solve(
    G: Tensor,
    supports: Supports,
    B: Tensor,
    ridge: float = 1e-6,
    escalations: int = 0,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    G, B = G.contiguous(), B.contiguous()
    k, d, device = G.shape[0], supports.d, B.get_device()
    X, info = torch.empty_like(B), torch.empty(d, dtype=torch.int32, device=B.device)
    # Freed for the same stream only, so after its use there.
    size = _C.cuda_support_workspace(k, d, len(B), device, B.itemsize)
    workspace = torch.empty(size, dtype=torch.uint8, device=B.device)
    _C.cuda_support_solve(
        dtype_name(G.dtype), G.data_ptr(), supports.offsets.data_ptr(), supports.members.data_ptr(), B.data_ptr(),
        X.data_ptr(), info.data_ptr(), k, d, len(B), ridge, escalations, floor, workspace.data_ptr(),
        device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return X, info


def ridge_solve(
    G: Tensor, B: Tensor, ridge: float = 1e-6, escalations: int = 0, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    device = B.get_device()
    batch, k, m = B.shape
    if k > ridge_max_k(device, B.dtype):
        # The reference asks a GPU nothing, and most of its work is done by torch.linalg.
        return reference.ridge_solve(G, B, ridge, escalations, floor)
    G, B = G.contiguous(), B.contiguous()
    X, info = torch.empty_like(B), torch.empty(batch, dtype=torch.int32, device=B.device)
    _C.cuda_ridge_solve(
        dtype_name(G.dtype), G.data_ptr(), B.data_ptr(), X.data_ptr(), info.data_ptr(),
        batch, k, m, ridge, escalations, floor, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return X, info
