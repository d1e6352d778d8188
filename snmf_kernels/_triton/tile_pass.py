"""The step for Y in one pass over the activations, a tile of tokens after another, as ``schedule`` plans it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse import PassResult, SparseColumns
from .coefficients import descend, updated_tile
from .configs import ACCUMULATE, GATHER, PASS, PRODUCT, PROGRAMS, RESIDUAL
from .launch import OPTIONS, device_of
from .products import (
    accumulate_kept_kernel,
    accumulate_kernel,
    dense_config,
    dot_of,
    gathers,
    launch_dense,
    launch_gather,
)
from .schedule import Launch, Plan, plan_pass

# Sums of a program of `sweep_kernel`: dot, violation, squared norm, sweeps.
_SUMS = 4


# Offsets and numbers of sweeps change from launch to launch, and no address hangs on them.
@triton.jit(do_not_specialize=["sums_ptr", "splits", "sums_stride", "sweeps"])
def sweep_kernel(  # type: ignore[no-untyped-def]  # typed at the launch
    y_ptr, out_ptr, spare_ptr, parts_ptr, q_ptr, scale_ptr, shift_ptr, weight_ptr, sums_ptr,
    k, n, y_stride, out_stride, width, splits, sums_stride, sweeps, tol,
    MULTIPLICATIVE: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr, MEASURE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything between the two products with a tile of A, for BLOCK_N tokens of it.

    Adds up the parts of ZᵀA (into the first), subtracts the shift, scales y, sweeps over it in ``out``, and sums.
    ``spare`` is the other buffer of multiplicative sweeps, [k, width] as each of the parts.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = columns < n
    for first in range(0, k, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        wide_rows = rows.to(tl.int64)
        inside = (rows < k)[:, None] & column_inside[None, :]
        places = wide_rows[:, None] * width + columns[None, :]
        p = tl.load(parts_ptr + places, mask=inside, other=0.0)
        for part in range(1, splits):
            p += tl.load(parts_ptr + tl.full((), part, tl.int64) * k * width + places, mask=inside, other=0.0)
        if SHIFTED:
            p -= tl.load(shift_ptr + rows, mask=rows < k, other=0.0)[:, None]
        tl.store(parts_ptr + places, p, mask=inside)
        y = tl.load(y_ptr + wide_rows[:, None] * y_stride + columns[None, :], mask=inside, other=0.0)
        if SCALED:
            y *= tl.load(scale_ptr + rows, mask=rows < k, other=0.0)[:, None]
        tl.store(out_ptr + wide_rows[:, None] * out_stride + columns[None, :], y, mask=inside)
    # What is read from here on, other threads have written.
    tl.debug_barrier()
    swept = tl.full((), 0, tl.int32)
    if MULTIPLICATIVE:
        for _ in range(sweeps):
            for first in range(0, k, BLOCK_K):
                rows = first + tl.arange(0, BLOCK_K)
                new = updated_tile(
                    out_ptr, parts_ptr, q_ptr, rows, columns, k, n, out_stride, width, EPS,
                    BLOCK_K, BLOCK_J, BLOCK_N, PRECISION,
                )  # fmt: skip
                inside = (rows < k)[:, None] & column_inside[None, :]
                tl.store(spare_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], new, mask=inside)
            tl.debug_barrier()
            for first in range(0, k, BLOCK_K):
                rows = first + tl.arange(0, BLOCK_K)
                wide_rows = rows[:, None].to(tl.int64)
                inside = (rows < k)[:, None] & column_inside[None, :]
                new = tl.load(spare_ptr + wide_rows * width + columns[None, :], mask=inside)
                tl.store(out_ptr + wide_rows * out_stride + columns[None, :], new, mask=inside)
            tl.debug_barrier()
            swept += 1
    else:
        moving = swept < sweeps
        while moving:
            change, size = descend(
                out_ptr, parts_ptr, q_ptr, columns, k, n, out_stride, width, BLOCK_K, BLOCK_J, BLOCK_N, PRECISION
            )  # fmt: skip
            swept += 1
            bound = tl.cast(tol, tl.float64)
            # Not `change > bound`, which NaN would end.
            done = (bound > 0) & (change <= bound * bound * size)
            moving = (swept < sweeps) & (done == 0)
    dot = tl.full((), 0, tl.float64)
    violation = tl.full((), 0, tl.float64)
    squared_norm = tl.full((), 0, tl.float64)
    for first in range(0, k, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        wide_rows = rows.to(tl.int64)
        inside = (rows < k)[:, None] & column_inside[None, :]
        p = tl.load(parts_ptr + wide_rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
        y = tl.load(out_ptr + wide_rows[:, None] * out_stride + columns[None, :], mask=inside, other=0.0)
        squared_norm += tl.sum(y.to(tl.float64) * y.to(tl.float64))
        weighted = y
        if WEIGHTED:
            weighted = y * tl.load(weight_ptr + columns, mask=column_inside, other=0.0)[None, :]
        dot += tl.sum(p.to(tl.float64) * weighted.to(tl.float64))
        if MEASURE:
            gradient = tl.zeros((BLOCK_K, BLOCK_N), dtype=y.dtype)
            for start in range(0, k, BLOCK_J):
                others = start + tl.arange(0, BLOCK_J)
                q = tl.load(
                    q_ptr + wide_rows[:, None] * k + others[None, :],
                    mask=(rows < k)[:, None] & (others < k)[None, :],
                    other=0.0,
                )
                other_y = tl.load(
                    out_ptr + others[:, None].to(tl.int64) * out_stride + columns[None, :],
                    mask=(others < k)[:, None] & column_inside[None, :],
                    other=0.0,
                )
                gradient = tl.dot(q, other_y, gradient, input_precision=PRECISION, out_dtype=gradient.dtype)
            diagonal = tl.load(q_ptr + wide_rows * k + rows, mask=rows < k, other=0.0)
            alive = diagonal > 0
            step = (gradient - p) / tl.where(alive, diagonal, 1.0)[:, None]
            # Not tl.minimum, which drops NaN.
            least = tl.where(y < step, y, step).to(tl.float64)
            violation += tl.sum(tl.where(alive[:, None], least * least, 0.0))
    program = sums_ptr + tl.program_id(0)
    tl.store(program, dot)
    tl.store(program + sums_stride, violation)
    tl.store(program + 2 * sums_stride, squared_norm)
    tl.store(program + 3 * sums_stride, swept.to(tl.float64))


@triton.jit(do_not_specialize=["sums_ptr", "sums_stride"])
def residual_kernel(  # type: ignore[no-untyped-def]  # likewise
    z_ptr, y_ptr, a_ptr, weight_ptr, sums_ptr, d, k, n, y_stride, a_row, a_column, sums_stride,
    WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ w (a − zᵀ y)² and Σ w a² of a [BLOCK_D, BLOCK_N] tile of A, for z [k, d]."""
    tiles = tl.cdiv(d, BLOCK_D)
    neurons = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    fit = tl.zeros((BLOCK_D, BLOCK_N), dtype=y_ptr.dtype.element_ty)
    for start in range(0, k, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)
        wide_features = features.to(tl.int64)
        z = tl.load(
            z_ptr + wide_features[None, :] * d + neurons[:, None],
            mask=(features < k)[None, :] & (neurons < d)[:, None],
            other=0.0,
        )
        y = tl.load(
            y_ptr + wide_features[:, None] * y_stride + columns[None, :],
            mask=(features < k)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        fit = tl.dot(z, y, fit, input_precision="ieee", out_dtype=fit.dtype)
    a = tl.load(
        a_ptr + neurons[:, None].to(tl.int64) * a_row + columns[None, :].to(tl.int64) * a_column,
        mask=(neurons < d)[:, None] & (columns < n)[None, :],
        other=0.0,
    ).to(fit.dtype)
    left = (a - fit).to(tl.float64)
    a = a.to(tl.float64)
    left_sums, data_sums = tl.sum(left * left, 0), tl.sum(a * a, 0)
    if WEIGHTED:
        weights = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float64)
        left_sums, data_sums = left_sums * weights, data_sums * weights
    tl.store(sums_ptr + tl.program_id(0), tl.sum(left_sums))
    tl.store(sums_ptr + sums_stride + tl.program_id(0), tl.sum(data_sums))


def refusal(k: int, max_active: int = 0) -> str | None:
    """Why ``coefficient_pass`` cannot do this; None if it can."""
    if not 1 <= k <= PASS.max_k:
        return f"its pass takes 1 to {PASS.max_k} features, not {k}"
    if 0 < max_active < k:
        return f"its pass keeps any number of features to a token, not max_active = {max_active}"
    return None


def coefficient_pass(
    Y: Tensor,
    Z: SparseColumns,
    A: Tensor,
    ZtZ: Tensor,
    sweeps: int = 1,
    *,
    out: Tensor,
    multiplicative: bool = False,
    eps: float = 1e-6,
    tol: float = 0.0,
    row_scale: Tensor | None = None,
    shift: Tensor | None = None,
    feature_norms: Tensor | None = None,
    max_active: int = 0,
    token_weights: Tensor | None = None,
    residual_values: Tensor | None = None,
    products: str | None = None,
    measure: bool = False,
) -> PassResult:
    refused = refusal(Z.k, max_active)
    assert refused is None, refused
    Y, ZtZ = _row_contiguous(Y), ZtZ.contiguous()
    target = out if _rows_together(out) else torch.empty_like(Y, memory_format=torch.contiguous_format)
    Z = SparseColumns(Z.indices.contiguous(), Z.values.contiguous(), Z.d)
    optional = {"scale": row_scale, "shift": shift, "weight": token_weights}
    steps = _Steps(
        Y, Z, A, ZtZ, target,
        # A kernel reads no argument that its flags say is not there.
        {name: target if value is None else value.contiguous() for name, value in optional.items()},
        {name for name, value in optional.items() if value is not None},
        residual_values, products,
    )  # fmt: skip
    with device_of(Y):
        steps.run(sweeps, tol, multiplicative, eps if multiplicative else 0.0, measure)
    if target is not out:
        out.copy_(target)
    return steps.result(sweeps, products)


class _Steps:
    """The buffers of one pass, and its launches."""

    def __init__(
        self,
        Y: Tensor,
        Z: SparseColumns,
        A: Tensor,
        ZtZ: Tensor,
        target: Tensor,
        optional: dict[str, Tensor],
        given: set[str],
        residual_values: Tensor | None,
        products: str | None,
    ) -> None:
        self.Y, self.Z, self.A, self.ZtZ, self.target = Y, Z, A, ZtZ, target
        self.optional, self.given = optional, given
        dtype, device = Y.dtype, Y.device
        (d, n), k, count = A.shape, Z.k, Z.indices.shape[1]
        self.gather = gathers(Z, A)
        self.plan: Plan = plan_pass(
            d, n, k, a_bytes=A.element_size(), y_bytes=Y.element_size(), kept=count, gather=self.gather,
            products=products, residual=residual_values is not None, product=dense_config(PRODUCT, dtype, A),
            sweep=PASS.sweeps[dtype, False], programs=PROGRAMS, tile_bytes=PASS.tile_bytes,
            busy_programs=PASS.busy_programs,
        )  # fmt: skip
        width = self.plan.width
        self.parts = torch.empty(self.plan.splits, k, width, dtype=dtype, device=device)
        self.dense = None if self.gather else Z.to_dense().T.contiguous()
        self.dense_out = None
        if residual_values is not None:
            self.dense_out = SparseColumns(Z.indices, residual_values, d).to_dense().T.contiguous()
        whole = products is not None and not (products == "kept" and self.gather)
        self.AYt = None if products is None else Y.new_zeros(k, d if whole else count)
        self.whole = whole
        self.sums: Tensor | None = None
        self.residual_sums: Tensor | None = None

    def run(self, sweeps: int, tol: float, multiplicative: bool, eps: float, measure: bool) -> None:
        """Launches everything."""
        config = PASS.sweeps[self.Y.dtype, multiplicative]
        spare = torch.empty_like(self.parts[0]) if multiplicative else self.parts
        self.sums = self._sums_of("sweep", _SUMS, config.block_n, 1)
        residual = RESIDUAL[self.Y.dtype]
        self.residual_sums = self._sums_of(
            "residual", 2, residual.block_n, triton.cdiv(self.Z.d, residual.block_d)
        )
        programs = residual_programs = 0
        k = self.Z.k
        for launch in self.plan.launches:
            y, new, a, weight = self._slices(launch)
            n = a.shape[1]
            parts = self.parts[:, :, :n]
            common: dict[str, Any] = {"WEIGHTED": "weight" in self.given}
            if launch.kernel == "product":
                if self.dense is None:
                    launch_gather(self.Z, a, parts[0])
                else:
                    launch_dense(self.dense, a, parts, self.plan.chunk)
            elif launch.kernel == "sweep":
                grid = triton.cdiv(n, config.block_n)
                sweep_kernel[(grid,)](
                    y, new, spare, self.parts, self.ZtZ, self.optional["scale"], self.optional["shift"], weight,
                    self.sums[:, programs:], k, n, y.stride(0), new.stride(0), self.plan.width, self.plan.splits,
                    self.sums.stride(0), sweeps, tol,
                    MULTIPLICATIVE=multiplicative, EPS=eps, SCALED="scale" in self.given,
                    SHIFTED="shift" in self.given, MEASURE=measure, **common,
                    BLOCK_K=config.block_k, BLOCK_J=config.block_j, BLOCK_N=config.block_n,
                    PRECISION=config.precision, num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
                )  # fmt: skip
                programs += grid
            elif launch.kernel == "residual":
                grid = triton.cdiv(self.Z.d, residual.block_d) * triton.cdiv(n, residual.block_n)
                residual_kernel[(grid,)](
                    self.dense_out, new, a, weight, self.residual_sums[:, residual_programs:], self.Z.d, k, n,
                    new.stride(0), *a.stride(), self.residual_sums.stride(0), **common,
                    BLOCK_K=residual.block_k, BLOCK_D=residual.block_d, BLOCK_N=residual.block_n,
                    num_warps=residual.num_warps, num_stages=residual.num_stages, **OPTIONS,
                )  # fmt: skip
                residual_programs += grid
            elif launch.kernel == "accumulate":
                dense = dense_config(ACCUMULATE, self.Y.dtype, a)
                accumulate_kernel[(triton.cdiv(k, dense.block_k) * triton.cdiv(self.Z.d, dense.block_d),)](
                    new, a, weight, self.AYt, self.Z.d, k, n, new.stride(0), *a.stride(), **common,
                    BLOCK_K=dense.block_k, BLOCK_D=dense.block_d, BLOCK_N=dense.block_n, **dot_of(dense),
                    num_warps=dense.num_warps, num_stages=dense.num_stages, **OPTIONS,
                )  # fmt: skip
            else:
                kept, count = GATHER[self.Y.dtype], self.Z.indices.shape[1]
                accumulate_kept_kernel[(k * triton.cdiv(count, kept.block_c),)](
                    self.Z.indices, new, a, weight, self.AYt, k, count, n, new.stride(0), *a.stride(), **common,
                    BLOCK_C=kept.block_c, BLOCK_N=kept.block_n, num_warps=kept.num_warps, **OPTIONS,
                )  # fmt: skip

    def result(self, sweeps: int, products: str | None) -> PassResult:
        """What the pass has summed up."""
        assert self.sums is not None
        assert self.residual_sums is not None
        dot, violation, squared_norm, _ = self.sums.sum(1)
        residual, data = self.residual_sums.sum(1)
        # Without a tile there is no maximum.
        most = self.sums[3].amax() if self.sums.shape[1] else self.sums.new_tensor(float(sweeps))
        AYt = self.AYt
        if AYt is not None and products == "kept" and self.whole:
            AYt = self.Z.gather(AYt)
        return PassResult(AYt, dot, violation, squared_norm, residual, data, most.to(torch.int64))

    def _slices(self, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, weight = launch.tokens, self.optional["weight"]
        return (
            self.Y[:, tokens],
            self.target[:, tokens],
            self.A[:, tokens],
            weight[tokens] if "weight" in self.given else weight,
        )

    def _sums_of(self, kernel: str, number: int, block_n: int, rows: int) -> Tensor:
        """Room for the sums of every program of a kernel."""
        sizes = [
            launch.tokens.stop - launch.tokens.start
            for launch in self.plan.launches
            if launch.kernel == kernel
        ]
        programs = rows * sum(triton.cdiv(size, block_n) for size in sizes)
        return torch.empty(number, programs, dtype=torch.float64, device=self.Y.device)


def _rows_together(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def _row_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows lie together (any distance apart), else a copy."""
    return matrix if _rows_together(matrix) else matrix.contiguous()
