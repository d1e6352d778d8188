"""Which entries of a column of Z are kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse import SparseColumns
from .configs import COLUMNS, SELECT
from .launch import device_of


@triton.jit
def select_column(  # type: ignore[no-untyped-def]  # typed at the launch
    z_ptr, index_ptr, value_ptr, d, count, row_stride, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keeps the ``count`` largest magnitudes of one column, of equal ones the lower rows, and writes them by row.

    Magnitudes of floats order like their bits without the sign, so the ``count``-th largest is found bit by
    bit from the top: the largest threshold that at least ``count`` entries reach, or any that exactly so many do,
    which is found after half of the bits or so. The column stays in cache between the passes.
    """
    key_type: tl.constexpr = tl.int32 if BITS == 31 else tl.int64
    sign_mask: tl.constexpr = 0x7FFFFFFF if BITS == 31 else 0x7FFFFFFFFFFFFFFF
    one = tl.full((), 1, key_type)
    threshold = tl.full((), 0, key_type)
    step = tl.full((), BITS, tl.int32)
    while step > 0:
        step -= 1
        candidate = threshold | (one << step)
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, d, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
            key = z.to(key_type, bitcast=True) & sign_mask
            reached += ((key >= candidate) & (rows < d)).to(tl.int32)
        enough = tl.sum(reached)
        threshold = tl.where(enough >= count, candidate, threshold)
        step = tl.where(enough == count, 0, step)
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


@triton.jit
def winner_take_all_kernel(  # type: ignore[no-untyped-def]  # likewise
    z_ptr, index_ptr, value_ptr, d, count, row_stride, column_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One column to a program."""
    column = tl.program_id(0).to(tl.int64)
    select_column(
        z_ptr + column * column_stride, index_ptr + column * count, value_ptr + column * count,
        d, count, row_stride, BITS, BLOCK,
    )  # fmt: skip


@triton.jit
def note_column(  # type: ignore[no-untyped-def]  # likewise
    index_ptr, value_ptr, noted_ptr, change_ptr, count, factor, BLOCK_C: tl.constexpr
):
    """change[r] = factor value[r] for the rows of a column, which are noted.

    Not those of zeros, noted as -1: a row that only fills a column up may be listed twice.
    """
    for start in range(0, count, BLOCK_C):
        entries = start + tl.arange(0, BLOCK_C)
        inside = entries < count
        rows = tl.load(index_ptr + entries, mask=inside, other=0)
        values = tl.load(value_ptr + entries, mask=inside, other=0.0)
        tl.store(noted_ptr + entries, tl.where(values != 0, rows, -1), mask=inside)
        tl.store(change_ptr + rows, factor * values, mask=inside & (values != 0))
    tl.debug_barrier()


@triton.jit
def subtract_change(  # type: ignore[no-untyped-def]  # likewise
    residual_ptr, change_ptr, index_ptr, q_ptr, i, k, count, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """residual[r, j] −= change[r] q[j, i] for the rows r that ``index`` lists (-1: none) and j ≠ i; clears change."""
    for start in range(0, count, BLOCK_C):
        entries = start + tl.arange(0, BLOCK_C)
        rows = tl.load(index_ptr + entries, mask=entries < count, other=-1)
        change = tl.load(change_ptr + rows, mask=rows >= 0, other=0.0)
        for first in range(0, k, BLOCK_K):
            others = first + tl.arange(0, BLOCK_K)
            taking = (others < k) & (others != i)
            q = tl.load(q_ptr + others.to(tl.int64) * k + i, mask=taking, other=0.0)
            places = residual_ptr + rows[:, None] * k + others[None, :]
            mask = (change != 0)[:, None] & taking[None, :]
            residual = tl.load(places, mask=mask, other=0.0)
            tl.store(places, residual - change[:, None] * q[None, :], mask=mask)
        # Every thread has read the change that is cleared here.
        tl.debug_barrier()
        tl.store(change_ptr + rows, tl.zeros_like(change), mask=rows >= 0)
    tl.debug_barrier()


@triton.jit
def column_descent_kernel(  # type: ignore[no-untyped-def]  # likewise
    index_ptr, value_ptr, noted_ptr, products_ptr, q_ptr, residual_ptr, column_ptr, change_ptr,
    d, k, count, sweeps,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All sweeps by one program, which walks the columns one after another, each of which needs the one before.

    What is left of A Yᵀ beside all other features, for all features, is kept as residual [d, k]: the change of a
    column touches a few rows of it, each of them together. ``column [d]`` holds one feature's part of it, ``change
    [d]`` is zero but for the column's change, ``noted [count]`` its former rows.
    """
    for start in range(0, d, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        tl.store(change_ptr + rows, tl.zeros((BLOCK,), change_ptr.dtype.element_ty), mask=rows < d)
        for j in range(k):
            products = tl.load(products_ptr + tl.full((), j, tl.int64) * d + rows, mask=rows < d)
            tl.store(residual_ptr + rows.to(tl.int64) * k + j, products, mask=rows < d)
    tl.debug_barrier()
    for i in range(k):
        kept = tl.full((), i, tl.int64) * count
        note_column(index_ptr + kept, value_ptr + kept, noted_ptr, change_ptr, count, 1.0, BLOCK_C)
        subtract_change(residual_ptr, change_ptr, noted_ptr, q_ptr, i, k, count, BLOCK_C, BLOCK_K)
    for _ in range(sweeps):
        for i in range(k):
            diagonal = tl.load(q_ptr + tl.full((), i, tl.int64) * k + i)
            if diagonal > 0:
                kept = tl.full((), i, tl.int64) * count
                for start in range(0, d, BLOCK):
                    rows = start + tl.arange(0, BLOCK)
                    left = tl.load(residual_ptr + rows.to(tl.int64) * k + i, mask=rows < d)
                    tl.store(column_ptr + rows, left, mask=rows < d)
                note_column(index_ptr + kept, value_ptr + kept, noted_ptr, change_ptr, count, -1.0, BLOCK_C)
                select_column(column_ptr, index_ptr + kept, value_ptr + kept, d, count, 1, BITS, BLOCK)
                tl.debug_barrier()
                for start in range(0, count, BLOCK_C):
                    entries = start + tl.arange(0, BLOCK_C)
                    inside = entries < count
                    rows = tl.load(index_ptr + kept + entries, mask=inside, other=0)
                    values = tl.load(value_ptr + kept + entries, mask=inside, other=0.0) / diagonal
                    tl.store(value_ptr + kept + entries, values, mask=inside)
                    change = tl.load(change_ptr + rows, mask=inside, other=0.0)
                    tl.store(change_ptr + rows, change + values, mask=inside)
                tl.debug_barrier()
                subtract_change(residual_ptr, change_ptr, noted_ptr, q_ptr, i, k, count, BLOCK_C, BLOCK_K)
                subtract_change(
                    residual_ptr, change_ptr, index_ptr + kept, q_ptr, i, k, count, BLOCK_C, BLOCK_K
                )  # fmt: skip


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    d, k = Z.shape
    indices = torch.empty(k, count, dtype=torch.int64, device=Z.device)
    values = torch.empty(k, count, dtype=Z.dtype, device=Z.device)
    if k and count:
        with device_of(Z):
            winner_take_all_kernel[(k,)](
                Z, indices, values, d, count, Z.stride(0), Z.stride(1),
                BITS=63 if Z.dtype == torch.float64 else 31,
                BLOCK=min(SELECT.block, triton.next_power_of_2(d)),
                num_warps=SELECT.num_warps,
            )  # fmt: skip
    return SparseColumns(indices, values, d)


def column_descent(Z: SparseColumns, AYt: Tensor, YYt: Tensor, sweeps: int = 1) -> SparseColumns:
    indices = Z.indices.clone(memory_format=torch.contiguous_format)
    values = Z.values.clone(memory_format=torch.contiguous_format)
    AYt, YYt = AYt.contiguous(), YYt.contiguous()
    (k, d), count = AYt.shape, indices.shape[1]
    if k and count:
        residual, column, change = (values.new_empty(size) for size in (k * d, d, d))
        noted = indices.new_empty(count)
        with device_of(values):
            column_descent_kernel[(1,)](
                indices, values, noted, AYt, YYt, residual, column, change, d, k, count, sweeps,
                BITS=63 if values.dtype == torch.float64 else 31,
                BLOCK=min(COLUMNS.block_d, triton.next_power_of_2(d)),
                BLOCK_C=COLUMNS.block_c, BLOCK_K=COLUMNS.block_k, num_warps=COLUMNS.num_warps,
            )  # fmt: skip
    return SparseColumns(indices, values, d)
