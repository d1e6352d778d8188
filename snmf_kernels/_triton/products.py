"""Products with A: of the kept rows alone, or dense, on tensor cores where that costs no accuracy."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import tf32_allowed
from ..sparse import SparseColumns
from .configs import DENSE_FROM, GATHER, PRODUCT, PROGRAMS, DenseConfig
from .launch import INTERPRETING, OPTIONS, device_of
from .schedule import split

# What the parts of a float32 are multiplied as: numpy, which interprets, has no bfloat16.
PART = tl.float32 if INTERPRETING else tl.bfloat16


@triton.jit
def leading_bits(x):  # type: ignore[no-untyped-def]  # a float32 block
    """x without the last 16 bits of its significand: a bfloat16, still as float32. A quiet NaN stays one."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def precise_dot(x, a, total, PART: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # blocks
    """total + x @ a for x in the working dtype and a as it was loaded.

    With PART, a is bfloat16 and x float32: the three parts of x have its 24 bits, and their products with a are exact.
    Tensor cores round their sums towards zero, which would add up over a long sum: they add up this block alone, the
    small parts first, and ``total`` is added to it as float32s are. PRECISION is how the product is made otherwise.
    """
    if PART is None:
        total = tl.dot(x, a.to(x.dtype), total, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        high = leading_bits(x)
        rest = x - high
        middle = leading_bits(rest)
        a = a.to(PART)
        block = tl.dot((rest - middle).to(PART), a, input_precision="ieee")
        block = tl.dot(middle.to(PART), a, block, input_precision="ieee")
        block = tl.dot(high.to(PART), a, block, input_precision="ieee")
        total += block
    return total


@triton.jit
def gather_product_kernel(  # type: ignore[no-untyped-def]  # typed at the launch
    index_ptr, value_ptr, a_ptr, out_ptr, k, count, n, a_row, a_column, out_stride,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_c value[i, c] a[index[i, c]] of one feature for BLOCK_N tokens."""
    # Features of the same tokens are neighbours, for the cache.
    feature = (tl.program_id(0) % k).to(tl.int64)
    columns = (tl.program_id(0) // k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_C, BLOCK_N), dtype=out_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK_C):
        entries = start + tl.arange(0, BLOCK_C)
        rows = tl.load(index_ptr + feature * count + entries, mask=entries < count, other=0)
        values = tl.load(value_ptr + feature * count + entries, mask=entries < count, other=0.0)
        a = tl.load(
            a_ptr + rows[:, None] * a_row + columns[None, :] * a_column,
            mask=(entries < count)[:, None] & (columns < n)[None, :],
            other=0.0,
        ).to(total.dtype)
        total += values[:, None] * a
    tl.store(out_ptr + feature * out_stride + columns, tl.sum(total, 0), mask=columns < n)


@triton.jit
def dense_product_kernel(  # type: ignore[no-untyped-def]  # likewise
    z_ptr, a_ptr, out_ptr, d, k, n, a_row, a_column, chunk, out_stride,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s] = z[:, s-th chunk] a[s-th chunk] for z [k, d]: a tile of the product over a part of the neurons.

    Parts are added up afterwards, in their order.
    """
    tiles = tl.cdiv(k, BLOCK_K)
    rows = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    wide_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=out_ptr.dtype.element_ty)
    end = tl.minimum(d, (split + 1) * chunk)
    for start in range(split * chunk, end, BLOCK_D):
        neurons = start + tl.arange(0, BLOCK_D)
        z = tl.load(
            z_ptr + wide_rows[:, None] * d + neurons[None, :],
            mask=(rows < k)[:, None] & (neurons < end)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + neurons[:, None].to(tl.int64) * a_row + columns[None, :] * a_column,
            mask=(neurons < end)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        total = precise_dot(z, a, total, PART, PRECISION)
    tl.store(
        out_ptr + (split.to(tl.int64) * k + wide_rows[:, None]) * out_stride + columns[None, :],
        total,
        mask=(rows < k)[:, None] & (columns < n)[None, :],
    )


@triton.jit
def accumulate_kernel(  # type: ignore[no-untyped-def]  # likewise
    y_ptr, a_ptr, weight_ptr, out_ptr, d, k, n, y_stride, a_row, a_column,
    WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out += y diag(weight) aᵀ, a [BLOCK_K, BLOCK_D] tile of it to a program, over all n tokens."""
    tiles = tl.cdiv(k, BLOCK_K)
    rows = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    neurons = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=out_ptr.dtype.element_ty)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        y = tl.load(
            y_ptr + wide_rows[:, None] * y_stride + columns[None, :],
            mask=(rows < k)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        if WEIGHTED:
            y *= tl.load(weight_ptr + columns, mask=columns < n, other=0.0)[None, :]
        a = tl.load(
            a_ptr + neurons[None, :] * a_row + columns[:, None].to(tl.int64) * a_column,
            mask=(neurons < d)[None, :] & (columns < n)[:, None],
            other=0.0,
        )
        total = precise_dot(y, a, total, PART, PRECISION)
    places = out_ptr + wide_rows[:, None] * d + neurons[None, :]
    inside = (rows < k)[:, None] & (neurons < d)[None, :]
    tl.store(places, tl.load(places, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def accumulate_kept_kernel(  # type: ignore[no-untyped-def]  # likewise
    index_ptr, y_ptr, a_ptr, weight_ptr, out_ptr, k, count, n, y_stride, a_row, a_column,
    WEIGHTED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[i, c] += Σ_t a[index[i, c], t] weight[t] y[i, t], BLOCK_C entries of one feature to a program."""
    feature = (tl.program_id(0) % k).to(tl.int64)
    entries = tl.program_id(0) // k * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.load(index_ptr + feature * count + entries, mask=entries < count, other=0)
    total = tl.zeros((BLOCK_C, BLOCK_N), dtype=out_ptr.dtype.element_ty)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        y = tl.load(y_ptr + feature * y_stride + columns, mask=columns < n, other=0.0)
        if WEIGHTED:
            y *= tl.load(weight_ptr + columns, mask=columns < n, other=0.0)
        a = tl.load(
            a_ptr + rows[:, None] * a_row + columns[None, :].to(tl.int64) * a_column,
            mask=(entries < count)[:, None] & (columns < n)[None, :],
            other=0.0,
        ).to(total.dtype)
        total += a * y[None, :]
    places = out_ptr + feature * count + entries
    inside = entries < count
    tl.store(places, tl.load(places, mask=inside, other=0.0) + tl.sum(total, 1), mask=inside)


def gathers(Z: SparseColumns, A: Tensor) -> bool:
    """Whether gathering the kept rows of A takes less time than a dense product with it.

    It does where few rows are kept and a row's tokens lie together. Gathered from a matrix that is stored token by
    token, every value costs a whole 32-byte sector.
    """
    bfloat16 = A.dtype == torch.bfloat16
    return A.stride(1) == 1 and Z.indices.shape[1] < DENSE_FROM[bfloat16] * Z.d


def dense_config(
    table: dict[tuple[torch.dtype, str], DenseConfig], working: torch.dtype, A: Tensor
) -> DenseConfig:
    """The entry for this working dtype and this A."""
    if working != torch.float32:
        return table[working, "exact"]
    if A.dtype == torch.bfloat16:
        return table[working, "bf16"]
    return table[working, "tf32" if tf32_allowed() else "exact"]


def dot_of(config: DenseConfig) -> dict[str, Any]:
    """The arguments of ``precise_dot``."""
    in_parts = config.how == "parts"
    return {"PART": PART if in_parts else None, "PRECISION": "ieee" if in_parts else config.how}


def launch_gather(Z: SparseColumns, A: Tensor, out: Tensor) -> None:
    """``out = ZᵀA`` from the kept rows of A; indices and values contiguous, the rows of out too."""
    config, n = GATHER[out.dtype], A.shape[1]
    gather_product_kernel[(Z.k * triton.cdiv(n, config.block_n),)](
        Z.indices, Z.values, A, out, Z.k, Z.indices.shape[1], n, *A.stride(), out.stride(0),
        BLOCK_C=config.block_c, BLOCK_N=config.block_n, num_warps=config.num_warps, **OPTIONS,
    )  # fmt: skip


def launch_dense(dense: Tensor, A: Tensor, out: Tensor, chunk: int) -> None:
    """``out [splits, k, n] = dense [k, d] A``, a part of it for each chunk of neurons."""
    config = dense_config(PRODUCT, out.dtype, A)
    (k, d), n = dense.shape, A.shape[1]
    dense_product_kernel[(triton.cdiv(k, config.block_k) * triton.cdiv(n, config.block_n), out.shape[0])](
        dense, A, out, d, k, n, *A.stride(), chunk, out.stride(1),
        BLOCK_K=config.block_k, BLOCK_D=config.block_d, BLOCK_N=config.block_n, **dot_of(config),
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def sparse_product(Z: SparseColumns, A: Tensor) -> Tensor:
    k, (d, n), values = Z.k, A.shape, Z.values
    if k == 0 or n == 0 or d == 0:
        return values.new_zeros(k, n)
    with device_of(values):
        if gathers(Z, A):
            out = torch.empty(k, n, dtype=values.dtype, device=values.device)
            launch_gather(SparseColumns(Z.indices.contiguous(), values.contiguous(), d), A, out)
            return out
        config = dense_config(PRODUCT, values.dtype, A)
        tiles = triton.cdiv(k, config.block_k) * triton.cdiv(n, config.block_n)
        splits, chunk = split(d, tiles, config.block_d, PROGRAMS)
        parts = torch.empty(splits, k, n, dtype=values.dtype, device=values.device)
        launch_dense(Z.to_dense().T, A, parts, chunk)
        return parts[0] if splits == 1 else parts.sum(0)
