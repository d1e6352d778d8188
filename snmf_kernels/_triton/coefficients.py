"""Sweeps over the coefficients Y."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import DESCENT, UPDATE
from .launch import OPTIONS, device_of


@triton.jit
def updated_tile(  # type: ignore[no-untyped-def]  # typed at the launch
    y_ptr, p_ptr, q_ptr, rows, columns, k, n, y_stride, p_stride, EPS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y * sqrt((p⁺ + q⁻ y) / (p⁻ + q⁺ y + EPS)) for a [BLOCK_K, BLOCK_N] tile; reads all rows of y."""
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
    below = tl.where(p > 0, 0.0, -p) + positive + EPS
    # Lanes that are not stored would be 0 / 0 without EPS.
    return y * tl.sqrt(above / tl.where(inside, below, 1.0))


@triton.jit
def multiplicative_update_kernel(  # type: ignore[no-untyped-def]  # likewise
    y_ptr, p_ptr, q_ptr, out_ptr, k, n, y_stride, p_stride, out_stride, EPS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the new Y to a program. Each program reads all rows of y, so that out must be another buffer."""
    # One axis, since the others end at 65,535; tiles of the same tokens are neighbours, for the cache.
    tiles = tl.cdiv(k, BLOCK_K)
    rows = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    new = updated_tile(
        y_ptr, p_ptr, q_ptr, rows, columns, k, n, y_stride, p_stride, EPS, BLOCK_K, BLOCK_J, BLOCK_N, PRECISION
    )  # fmt: skip
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :],
        new,
        mask=(rows < k)[:, None] & (columns < n)[None, :],
    )


@triton.jit
def descend(  # type: ignore[no-untyped-def]  # likewise
    y_ptr, p_ptr, q_ptr, columns, k, n, y_stride, p_stride,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sweep of coordinate descent over some tokens, in place; the squared norms of the change and of the new y.

    A block of features at a time: what all features outside the block, and the later ones in it, take of p is a
    matrix product; what the earlier ones in the block take follows feature by feature, in registers. The tokens'
    y are in memory, which for a few tokens is first-level cache, and belong to this program alone.
    """
    column_inside = columns < n
    change = tl.full((), 0, tl.float64)
    size = tl.full((), 0, tl.float64)
    for first in range(0, k, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        wide_rows = rows.to(tl.int64)
        row_inside = rows < k
        taken = tl.zeros((BLOCK_K, BLOCK_N), dtype=y_ptr.dtype.element_ty)
        for start in range(0, k, BLOCK_J):
            others = start + tl.arange(0, BLOCK_J)
            other_inside = others < k
            q = tl.load(
                q_ptr + wide_rows[:, None] * k + others[None, :],
                mask=row_inside[:, None] & other_inside[None, :],
                other=0.0,
            )
            q = tl.where((others[None, :] < first) | (others[None, :] > rows[:, None]), q, 0.0)
            y = tl.load(
                y_ptr + others[:, None].to(tl.int64) * y_stride + columns[None, :],
                mask=other_inside[:, None] & column_inside[None, :],
                other=0.0,
            )
            taken = tl.dot(q, y, taken, input_precision=PRECISION, out_dtype=taken.dtype)
        inside = row_inside[:, None] & column_inside[None, :]
        places = wide_rows[:, None] * y_stride + columns[None, :]
        p = tl.load(p_ptr + wide_rows[:, None] * p_stride + columns[None, :], mask=inside, other=0.0)
        before = tl.load(y_ptr + places, mask=inside, other=0.0)
        left = p - taken
        now = tl.zeros((BLOCK_K, BLOCK_N), dtype=y_ptr.dtype.element_ty)
        for i in range(tl.minimum(BLOCK_K, k - first)):
            this = tl.arange(0, BLOCK_K) == i
            later = tl.load(
                q_ptr + wide_rows * k + (first + i), mask=row_inside & (rows > first + i), other=0.0
            )
            pivot = tl.load(q_ptr + tl.full((), first + i, tl.int64) * (k + 1))
            alive = pivot > 0
            best = tl.sum(tl.where(this[:, None], left, 0.0), 0) / tl.where(alive, pivot, 1.0)
            best = tl.where(alive, tl.where(best < 0, 0.0, best), 0.0)
            now = tl.where(this[:, None], best[None, :], now)
            left -= later[:, None] * best[None, :]
        difference = (now - before).to(tl.float64)
        change += tl.sum(difference * difference)
        size += tl.sum(now.to(tl.float64) * now.to(tl.float64))
        # Another thread may still be reading what is overwritten, and will read what is written.
        tl.debug_barrier()
        tl.store(y_ptr + places, now, mask=inside)
        tl.debug_barrier()
    return change, size


@triton.jit
def coordinate_descent_kernel(  # type: ignore[no-untyped-def]  # likewise
    y_ptr, p_ptr, q_ptr, k, n, y_stride, p_stride, sweeps,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All sweeps over BLOCK_N tokens, in place."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for _ in range(sweeps):
        descend(y_ptr, p_ptr, q_ptr, columns, k, n, y_stride, p_stride, BLOCK_K, BLOCK_J, BLOCK_N, PRECISION)


def multiplicative_update(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float = 1e-6, sweeps: int = 1) -> Tensor:
    Y, ZtA, ZtZ = Y.contiguous(), ZtA.contiguous(), ZtZ.contiguous()
    k, n = Y.shape
    if k == 0 or n == 0:
        return Y.clone()
    config = UPDATE[Y.dtype, k > UPDATE[Y.dtype, False].block_k]
    grid = (triton.cdiv(k, config.block_k) * triton.cdiv(n, config.block_n),)
    source, spare = Y, torch.empty_like(Y)
    with device_of(Y):
        for sweep in range(sweeps):
            multiplicative_update_kernel[grid](
                source, ZtA, ZtZ, spare, k, n, n, n, n, EPS=eps,
                BLOCK_K=config.block_k, BLOCK_J=config.block_j, BLOCK_N=config.block_n, PRECISION=config.precision,
                num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
            )  # fmt: skip
            # The caller's Y is only read: the second sweep needs a buffer of its own, later ones swap.
            source, spare = spare, torch.empty_like(Y) if sweep == 0 and sweeps > 1 else source
    return source


def coordinate_descent(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int = 1) -> Tensor:
    out, ZtA, ZtZ = Y.clone(memory_format=torch.contiguous_format), ZtA.contiguous(), ZtZ.contiguous()
    k, n = out.shape
    if k and n:
        config = DESCENT[out.dtype]
        with device_of(out):
            coordinate_descent_kernel[(triton.cdiv(n, config.block_n),)](
                out, ZtA, ZtZ, k, n, n, n, sweeps,
                BLOCK_K=config.block_k, BLOCK_J=config.block_j, BLOCK_N=config.block_n, PRECISION=config.precision,
                num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
            )  # fmt: skip
    return out
