"""Which entries of a column of Z are kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import product_precision
from ..sparse import SparseColumns
from .configs import COLUMNS, SELECT, SelectConfig
from .launch import OPTIONS, device_of

# Features whose residuals of one neuron lie together in memory: 64 bytes of float32.
GROUP = 16


@triton.jit
def keys_of(z, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # blocks
    """Magnitudes of floats order like their bits without the sign; -1 outside."""
    key_type: tl.constexpr = tl.int32 if BITS == 31 else tl.int64
    sign_mask: tl.constexpr = 0x7FFFFFFF if BITS == 31 else 0x7FFFFFFFFFFFFFFF
    return tl.where(inside, z.to(key_type, bitcast=True) & sign_mask, -1)


@triton.jit
def keys_from(z_ptr, first, d, row_stride, BITS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Those of SIZE rows of a column."""
    rows = first + tl.arange(0, SIZE)
    z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
    return keys_of(z, rows < d, BITS)


@triton.jit
def how_many_reach(  # type: ignore[no-untyped-def]  # typed at the launch
    threshold, keys, z_ptr, d, row_stride, BITS: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The number of keys of a column from ``threshold`` on."""
    if WHOLE:
        number = tl.sum((keys >= threshold).to(tl.int32))
    else:
        some = tl.zeros((SIZE,), tl.int32)
        for start in range(0, d, SIZE):
            some += (keys_from(z_ptr, start, d, row_stride, BITS, SIZE) >= threshold).to(tl.int32)
        number = tl.sum(some)
    return number


@triton.jit
def find_threshold(  # type: ignore[no-untyped-def]  # likewise
    keys, z_ptr, d, count, row_stride, hint, BITS: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr,
    HINTED: tl.constexpr,
):  # fmt: skip
    """The ``count``-th largest key of a column, or any that exactly so many reach; and how many equal ones to keep.

    That is as many as there may be where exactly ``count`` reach it. By bisection, which ends half way or so where no
    two keys are alike. With HINTED it begins with a sixteenth of an octave on both sides of ``hint``. With WHOLE the
    column is in registers, as ``keys``; else it is read for each step, from cache.
    """
    key_type: tl.constexpr = tl.int32 if BITS == 31 else tl.int64
    near: tl.constexpr = 1 << (19 if BITS == 31 else 48)
    # As many as wanted reach `low`, fewer reach `high`: none but a NaN of all bits, which only leaves more above.
    low = tl.full((), 0, key_type)
    high = tl.full((), 0x7FFFFFFF if BITS == 31 else 0x7FFFFFFFFFFFFFFF, key_type)
    reached = tl.full((), 0, tl.int32)
    step = tl.full((), 0, tl.int32)
    while (high - low > 1) & (reached != count):
        middle = low + (high - low) // 2
        if HINTED:
            middle = tl.where(step == 0, hint - near, middle)
            middle = tl.where((step == 1) & (low > 0), hint + near, middle)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reached = how_many_reach(middle, keys, z_ptr, d, row_stride, BITS, WHOLE, SIZE)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached >= count, high, middle)
        step += 1
    ties = tl.full((), 0x7FFFFFFF, tl.int32)
    if reached != count:
        ties = count - how_many_reach(low + 1, keys, z_ptr, d, row_stride, BITS, WHOLE, SIZE)
    return low, ties


@triton.jit
def kept_of(keys, threshold, ties, ties_seen, taken, count):  # type: ignore[no-untyped-def]  # blocks and numbers
    """Which of some rows are kept, of equal ones the first ``ties``, and how many equal ones have been seen then.

    Not more than ``count`` with the ``taken`` ones: NaNs of all bits may be more.
    """
    keep = keys >= threshold
    if ties < 0x7FFFFFFF:
        tied = (keys == threshold).to(tl.int32)
        keep = (keys > threshold) | ((tied != 0) & (ties_seen + tl.cumsum(tied, 0) <= ties))
        keep = keep & (taken + tl.cumsum(keep.to(tl.int32), 0) <= count)
        ties_seen += tl.sum(tied)
    return keep, ties_seen


@triton.jit
def winner_take_all_kernel(  # type: ignore[no-untyped-def]  # likewise
    z_ptr, index_ptr, value_ptr, d, count, row_stride, column_stride,
    BITS: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One column to a program: its ``count`` largest magnitudes, of equal ones the lower rows, by row."""
    column = tl.program_id(0).to(tl.int64)
    z_ptr += column * column_stride
    keys = keys_from(z_ptr, 0, d, row_stride, BITS, SIZE) if WHOLE else 0
    threshold, ties = find_threshold(keys, z_ptr, d, count, row_stride, 0, BITS, WHOLE, SIZE, False)
    ties_seen = tl.full((), 0, tl.int32)
    taken = tl.full((), 0, tl.int32)
    for start in range(0, d, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + rows.to(tl.int64) * row_stride, mask=rows < d, other=0.0)
        keep, ties_seen = kept_of(keys_of(z, rows < d, BITS), threshold, ties, ties_seen, taken, count)
        place = column * count + taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + place, rows.to(tl.int64), mask=keep)
        tl.store(value_ptr + place, z, mask=keep)
        taken += tl.sum(keep.to(tl.int32))


@triton.jit
def column_descent_kernel(  # type: ignore[no-untyped-def]  # likewise
    index_ptr, value_ptr, dense_ptr, q_ptr, residual_ptr, hint_ptr, column_ptr, row_ptr, change_ptr,
    d, k, count, sweeps,
    BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All sweeps by one program, which walks the columns one after another, each of which needs the one before.

    ``residual``, for each feature what is left of A Yᵀ beside all others, is kept up to date: the change of a column
    touches a few rows of it. Of a group of features each row lies together, [groups, d, GROUP], so that an update
    touches few lines and a column is read in not too many. ``dense [k, d]`` is Z, ``hint [k]`` about the least
    magnitude that is kept of each column of the residual. ``column [d]`` holds one column of it, ``row`` and
    ``change`` list the rows of Z that have changed in it, at most 2 count.
    """
    for _ in range(sweeps):
        for i in range(k):
            diagonal = tl.load(q_ptr + tl.full((), i, tl.int64) * (k + 1))
            if diagonal > 0:
                left_ptr = residual_ptr + tl.full((), i // GROUP, tl.int64) * d * GROUP + i % GROUP
                keys = 0
                if WHOLE:
                    all_rows = tl.arange(0, SIZE)
                    whole = tl.load(left_ptr + all_rows.to(tl.int64) * GROUP, mask=all_rows < d, other=0.0)
                    keys = keys_of(whole, all_rows < d, BITS)
                    tl.store(column_ptr + all_rows, whole, mask=all_rows < d)
                else:
                    for start in range(0, d, BLOCK):
                        rows = start + tl.arange(0, BLOCK)
                        left = tl.load(left_ptr + rows.to(tl.int64) * GROUP, mask=rows < d)
                        tl.store(column_ptr + rows, left, mask=rows < d)
                hint = keys_of(tl.load(hint_ptr + i), True, BITS)
                tl.debug_barrier()
                threshold, ties = find_threshold(keys, column_ptr, d, count, 1, hint, BITS, WHOLE, SIZE, True)
                tl.store(hint_ptr + i, threshold.to(hint_ptr.dtype.element_ty, bitcast=True))
                ties_seen = tl.full((), 0, tl.int32)
                taken = tl.full((), 0, tl.int32)
                changed = tl.full((), 0, tl.int32)
                first_entry = tl.full((), i, tl.int64) * count
                for start in range(0, d, BLOCK):
                    rows = start + tl.arange(0, BLOCK)
                    left = tl.load(column_ptr + rows, mask=rows < d, other=0.0)
                    z_ptr = dense_ptr + tl.full((), i, tl.int64) * d + rows
                    before = tl.load(z_ptr, mask=rows < d, other=0.0)
                    keep, ties_seen = kept_of(
                        keys_of(left, rows < d, BITS), threshold, ties, ties_seen, taken, count
                    )
                    change = tl.where(keep, left / diagonal, 0.0) - before
                    moves = change != 0
                    # Both are counted at once, in half a number each.
                    both = keep.to(tl.int32) + (moves.to(tl.int32) << 16)
                    places = tl.cumsum(both, 0)
                    kept_place = first_entry + taken + (places & 0xFFFF) - 1
                    moved_place = changed + (places >> 16) - 1
                    # Of a short column several threads hold an entry, and all must have read it before one writes.
                    tl.debug_barrier()
                    tl.store(index_ptr + kept_place, rows.to(tl.int64), mask=keep)
                    tl.store(value_ptr + kept_place, left / diagonal, mask=keep)
                    tl.store(z_ptr, tl.where(keep, left / diagonal, 0.0), mask=moves)
                    tl.store(row_ptr + moved_place, rows, mask=moves)
                    tl.store(change_ptr + moved_place, change, mask=moves)
                    total = tl.sum(both)
                    taken += total & 0xFFFF
                    changed += total >> 16
                # Every thread has read the column and written its part of the lists.
                tl.debug_barrier()
                for start in range(0, changed, BLOCK_C):
                    entries = start + tl.arange(0, BLOCK_C)
                    rows = tl.load(row_ptr + entries, mask=entries < changed, other=0).to(tl.int64)
                    change = tl.load(change_ptr + entries, mask=entries < changed, other=0.0)
                    for first in range(0, k, BLOCK_K):
                        others = first + tl.arange(0, BLOCK_K)
                        taking = (others < k) & (others != i)
                        q = tl.load(q_ptr + others.to(tl.int64) * k + i, mask=taking, other=0.0)
                        group = (others // GROUP).to(tl.int64) * d * GROUP + others % GROUP
                        places = residual_ptr + rows[:, None] * GROUP + group[None, :]
                        mask = (entries < changed)[:, None] & taking[None, :]
                        residual = tl.load(places, mask=mask, other=0.0)
                        tl.store(places, residual - change[:, None] * q[None, :], mask=mask)
                tl.debug_barrier()


def search_of(config: SelectConfig, d: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """How columns of d are searched: in registers as a whole if they fit the configuration, else block by block."""
    size = triton.next_power_of_2(d)
    whole = size <= config.whole
    return {
        "BITS": 63 if dtype == torch.float64 else 31,
        "WHOLE": whole,
        "SIZE": size if whole else config.block,
        "BLOCK": min(config.block, size),
    }


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    d, k = Z.shape
    indices = torch.empty(k, count, dtype=torch.int64, device=Z.device)
    values = torch.empty(k, count, dtype=Z.dtype, device=Z.device)
    if k and count:
        config = SELECT[Z.dtype]
        with device_of(Z):
            winner_take_all_kernel[(k,)](
                Z, indices, values, d, count, Z.stride(0), Z.stride(1),
                **search_of(config, d, Z.dtype), num_warps=config.num_warps, **OPTIONS,
            )  # fmt: skip
    return SparseColumns(indices, values, d)


def column_descent(Z: SparseColumns, AYt: Tensor, YYt: Tensor, sweeps: int = 1) -> SparseColumns:
    indices = Z.indices.clone(memory_format=torch.contiguous_format)
    values = Z.values.clone(memory_format=torch.contiguous_format)
    YYt = YYt.contiguous()
    (k, d), count = AYt.shape, indices.shape[1]
    if k and count:
        config = COLUMNS[values.dtype]
        dense = Z.to_dense().T
        hint = torch.diagonal(YYt) * values.abs().amin(1)
        column, change = values.new_empty(d), values.new_empty(2 * count)
        rows = torch.empty(2 * count, dtype=torch.int32, device=values.device)
        with device_of(values):
            column_descent_kernel[(1,)](
                indices, values, dense, YYt, _grouped_residual(dense, AYt, YYt), hint, column, rows, change,
                d, k, count, sweeps, GROUP=GROUP, **search_of(config, d, values.dtype),
                BLOCK_C=config.block_c, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
            )  # fmt: skip
    return SparseColumns(indices, values, d)


def _grouped_residual(dense: Tensor, AYt: Tensor, YYt: Tensor) -> Tensor:
    """``AYt − Y Yᵀ Z`` without a feature's own part, as ``[groups, d, GROUP]``, for Z as ``dense [k, d]``."""
    k, d = AYt.shape
    # What columns are chosen by is float32, whatever is allowed for products with A.
    with product_precision(AYt.device):
        residual = torch.addmm(AYt, YYt - torch.diag(torch.diagonal(YYt)), dense, alpha=-1)
    groups = triton.cdiv(k, GROUP)
    padded = torch.nn.functional.pad(residual, (0, 0, 0, groups * GROUP - k))
    return padded.view(groups, GROUP, d).transpose(1, 2).contiguous()
