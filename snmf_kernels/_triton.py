"""Triton kernels and their launchers: the names and signatures of ``reference``.

One program of ``multiplicative_update`` computes a tile of the new Y; one program of ``winner_take_all``
finds the threshold of one column and writes what it keeps. With ``TRITON_INTERPRET=1`` in the environment
before the first import they run on CPU tensors, for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse import SparseColumns


@dataclass(frozen=True)
class UpdateConfig:
    """Tile of ``multiplicative_update``: features of a program, features of one step of its sums, tokens.

    ``precision`` is Triton's ``input_precision`` of the products: ``"ieee"`` means float32 multiply-adds,
    without tensor cores.
    """

    block_k: int
    block_j: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str


# By dtype, and by whether k needs more than one row of tiles. Chosen for what compilation shows (no spills on
# sm_80, sm_90 and gfx942; tests/test_aot.py), not yet tuned on a device: benchmarks/gpu_report.py, stage
# "tune", does that.
UPDATE_CONFIGS: dict[tuple[torch.dtype, bool], UpdateConfig] = {
    (torch.float32, False): UpdateConfig(32, 16, 64, 4, 2, "ieee"),
    (torch.float32, True): UpdateConfig(64, 16, 128, 8, 3, "ieee"),
    (torch.float64, False): UpdateConfig(32, 16, 32, 4, 2, "ieee"),
    (torch.float64, True): UpdateConfig(32, 16, 32, 4, 2, "ieee"),
}
SELECT_BLOCK = 4096
SELECT_WARPS = 8


@triton.jit
def multiplicative_update_kernel(  # type: ignore[no-untyped-def]  # typed at the launch
    y_ptr, p_ptr, q_ptr, out_ptr, k, n, y_stride, p_stride, out_stride, eps,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = y * sqrt((p⁺ + q⁻ y) / (p⁻ + q⁺ y + eps)) for a [BLOCK_K, BLOCK_N] tile.

    Each program reads all rows of y, so that out must be another buffer.
    """
    # One axis, since the others end at 65,535; tiles of the same tokens are neighbours, for the cache.
    tiles = tl.cdiv(k, BLOCK_K)
    rows = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = rows < k, columns < n
    positive = tl.zeros((BLOCK_K, BLOCK_N), dtype=y_ptr.dtype.element_ty)
    negative = tl.zeros((BLOCK_K, BLOCK_N), dtype=y_ptr.dtype.element_ty)
    for start in range(0, k, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        other_inside = others < k
        q = tl.load(
            q_ptr + rows[:, None].to(tl.int64) * k + others[None, :],
            mask=row_inside[:, None] & other_inside[None, :],
            other=0.0,
        )
        y = tl.load(
            y_ptr + others[:, None].to(tl.int64) * y_stride + columns[None, :],
            mask=other_inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        positive = tl.dot(
            tl.where(q < 0, 0.0, q), y, positive, input_precision=PRECISION, out_dtype=positive.dtype
        )
        negative = tl.dot(
            tl.where(q > 0, 0.0, -q), y, negative, input_precision=PRECISION, out_dtype=negative.dtype
        )
    inside = row_inside[:, None] & column_inside[None, :]
    wide_rows = rows[:, None].to(tl.int64)
    p = tl.load(p_ptr + wide_rows * p_stride + columns[None, :], mask=inside, other=0.0)
    y = tl.load(y_ptr + wide_rows * y_stride + columns[None, :], mask=inside, other=0.0)
    # Not tl.maximum, which drops NaN.
    above = tl.where(p < 0, 0.0, p) + negative
    below = tl.where(p > 0, 0.0, -p) + positive + eps
    tl.store(out_ptr + wide_rows * out_stride + columns[None, :], y * tl.sqrt(above / below), mask=inside)


@triton.jit
def winner_take_all_kernel(  # type: ignore[no-untyped-def]  # likewise
    z_ptr, index_ptr, value_ptr, d, count, row_stride, column_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keeps the ``count`` largest magnitudes of one column, of equal ones the lower rows, and writes them by row.

    Magnitudes of floats order like their bits without the sign, so the ``count``-th largest is found bit by
    bit from the top: the largest threshold that at least ``count`` entries reach. The column stays in cache
    between the passes.
    """
    column = tl.program_id(0).to(tl.int64)
    z_ptr += column * column_stride
    index_ptr += column * count
    value_ptr += column * count
    key_type: tl.constexpr = tl.int32 if BITS == 31 else tl.int64
    sign_mask: tl.constexpr = 0x7FFFFFFF if BITS == 31 else 0x7FFFFFFFFFFFFFFF
    one = tl.full((), 1, key_type)
    threshold = tl.full((), 0, key_type)
    for step in range(BITS):
        candidate = threshold | (one << (BITS - 1 - step))
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, d, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
            key = z.to(key_type, bitcast=True) & sign_mask
            reached += ((key >= candidate) & (rows < d)).to(tl.int32)
        threshold = tl.where(tl.sum(reached) >= count, candidate, threshold)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, d, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
        key = z.to(key_type, bitcast=True) & sign_mask
        above += ((key > threshold) & (rows < d)).to(tl.int32)
    ties = count - tl.sum(above)
    ties_seen = tl.full((), 0, tl.int32)
    taken = tl.full((), 0, tl.int32)
    for start in range(0, d, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
        key = z.to(key_type, bitcast=True) & sign_mask
        tied = ((key == threshold) & (rows < d)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tied, 0)
        keep = ((key > threshold) & (rows < d)) | ((tied != 0) & (tie_rank <= ties))
        kept = keep.to(tl.int32)
        place = taken + tl.cumsum(kept, 0) - 1
        tl.store(index_ptr + place, rows.to(tl.int64), mask=keep)
        tl.store(value_ptr + place, z, mask=keep)
        ties_seen += tl.sum(tied)
        taken += tl.sum(kept)


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiplicative_update(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float = 1e-6, sweeps: int = 1) -> Tensor:
    Y, ZtA, ZtZ = Y.contiguous(), ZtA.contiguous(), ZtZ.contiguous()
    k, n = Y.shape
    if k == 0 or n == 0:
        return Y.clone()
    config = UPDATE_CONFIGS[Y.dtype, k > UPDATE_CONFIGS[Y.dtype, False].block_k]
    grid = (triton.cdiv(k, config.block_k) * triton.cdiv(n, config.block_n),)
    source, spare = Y, torch.empty_like(Y)
    with _device_of(Y):
        for sweep in range(sweeps):
            multiplicative_update_kernel[grid](
                source, ZtA, ZtZ, spare, k, n, n, n, n, eps,
                BLOCK_K=config.block_k, BLOCK_J=config.block_j, BLOCK_N=config.block_n, PRECISION=config.precision,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            # The caller's Y is only read: the second sweep needs a buffer of its own, later ones swap.
            source, spare = spare, torch.empty_like(Y) if sweep == 0 and sweeps > 1 else source
    return source


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    d, k = Z.shape
    indices = torch.empty(k, count, dtype=torch.int64, device=Z.device)
    values = torch.empty(k, count, dtype=Z.dtype, device=Z.device)
    if k and count:
        with _device_of(Z):
            winner_take_all_kernel[(k,)](
                Z, indices, values, d, count, Z.stride(0), Z.stride(1),
                BITS=63 if Z.dtype == torch.float64 else 31,
                BLOCK=min(SELECT_BLOCK, triton.next_power_of_2(d)),
                num_warps=SELECT_WARPS,
            )  # fmt: skip
    return SparseColumns(indices, values, d)
