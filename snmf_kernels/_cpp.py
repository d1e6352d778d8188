"""Launchers of the compiled CPU kernels: the names and signatures of ``reference``, addresses passed to ``_C``.

Arguments are taken as checked (``ops`` does so for users): CPU tensors, float32 or float64, consistent shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import snmf_kernels._C as _C

from ._checks import dtype_name
from ._scope import pass_listener, threads
from .reference import dense_product
from .reference import ridge_solve as reference_ridge_solve
from .sparse import PassResult, SparseColumns, Supports

# Members of a neuron from which on LAPACK's blocked factors are faster than the kernel's.
_LARGE_SUPPORT = 512


def _name(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)


def _row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows lie together (any distance apart), else a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _row_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def _sweep(kernel: Callable[..., None], Y: Tensor, ZtA: Tensor, ZtZ: Tensor, *options: float) -> Tensor:
    Y, ZtA, ZtZ = _row_contiguous(Y), _row_contiguous(ZtA), ZtZ.contiguous()
    k, n = Y.shape
    out = torch.empty(k, n, dtype=Y.dtype, device="cpu")
    kernel(
        _name(Y), Y.data_ptr(), _row_stride(Y), ZtA.data_ptr(), _row_stride(ZtA), ZtZ.data_ptr(),
        out.data_ptr(), n, k, n, *options, threads(),
    )  # fmt: skip
    return out


def multiplicative_update(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float = 1e-6, sweeps: int = 1) -> Tensor:
    return _sweep(_C.multiplicative_update, Y, ZtA, ZtZ, eps, sweeps)


def coordinate_descent(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int = 1) -> Tensor:
    return _sweep(_C.coordinate_descent, Y, ZtA, ZtZ, sweeps)


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    d, k = Z.shape
    indices = torch.empty(k, count, dtype=torch.int64, device="cpu")
    values = torch.empty(k, count, dtype=Z.dtype, device="cpu")
    _C.winner_take_all(
        _name(Z), Z.data_ptr(), Z.stride(0), Z.stride(1), d, k, count,
        indices.data_ptr(), values.data_ptr(), threads(),
    )  # fmt: skip
    return SparseColumns(indices, values, d)


def sparse_product(Z: SparseColumns, A: Tensor) -> Tensor:
    indices, values = Z.indices.contiguous(), Z.values.contiguous()
    d, n = A.shape
    out = torch.empty(Z.k, n, dtype=values.dtype, device="cpu")
    _C.sparse_product(
        _name(values), _name(A), A.data_ptr(), A.stride(0), A.stride(1), d, n,
        indices.data_ptr(), values.data_ptr(), Z.k, indices.shape[1], _address(Z.starts), out.data_ptr(), threads(),
    )  # fmt: skip
    return out


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
    Y = _row_contiguous(Y)
    target = out if out.stride(1) == 1 or out.shape[1] <= 1 else torch.empty_like(Y)
    indices, values, ZtZ = Z.indices.contiguous(), Z.values.contiguous(), ZtZ.contiguous()
    row_scale, shift, feature_norms, token_weights, residual_values = (
        None if optional is None else optional.contiguous()
        for optional in (row_scale, shift, feature_norms, token_weights, residual_values)
    )
    AYt = None
    if products == "kept":
        # Of a column with fewer entries the rest is not written.
        AYt = torch.empty_like(values) if Z.starts is None else torch.zeros_like(values)
    d, n = A.shape
    sums = _C.coefficient_pass(
        _name(Y), _name(A), A.data_ptr(), A.stride(0), A.stride(1), d, n, indices.data_ptr(), values.data_ptr(),
        Z.k, indices.shape[1], _address(Z.starts), ZtZ.data_ptr(),
        Y.data_ptr(), _row_stride(Y), target.data_ptr(), _row_stride(target), _address(row_scale),
        _address(shift), _address(token_weights), _address(AYt), _address(feature_norms), max_active,
        _address(residual_values), multiplicative, sweeps, eps, tol, measure, threads(), pass_listener.get(),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)
    if products == "all":
        AYt = dense_product(out, A, token_weights)
    return PassResult.of_sums(AYt, torch.tensor(sums, dtype=torch.float64, device="cpu"))


def _address(optional: Tensor | None) -> int:
    return 0 if optional is None else optional.data_ptr()


def column_descent(Z: SparseColumns, AYt: Tensor, YYt: Tensor, sweeps: int = 1) -> SparseColumns:
    AYt, YYt = AYt.contiguous(), YYt.contiguous()
    indices = Z.indices.clone(memory_format=torch.contiguous_format)
    values = Z.values.clone(memory_format=torch.contiguous_format)
    _C.column_descent(
        _name(values), YYt.data_ptr(), AYt.data_ptr(), indices.data_ptr(), values.data_ptr(),
        Z.d, Z.k, indices.shape[1], sweeps,
    )  # fmt: skip
    return SparseColumns(indices, values, Z.d)


def support_solve(
    G: Tensor,
    supports: Supports,
    B: Tensor,
    ridge: float = 1e-6,
    escalations: int = 0,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    G, B = G.contiguous(), B.contiguous()
    sizes = supports.offsets.diff()
    if sizes.numpy().max(initial=0) > _LARGE_SUPPORT:
        return _support_solve_by_lapack(G, supports, sizes, B, ridge, escalations, floor)
    X, info = torch.empty_like(B), torch.empty(supports.d, dtype=torch.int32, device="cpu")
    _C.support_solve(
        _name(G), G.data_ptr(), supports.offsets.data_ptr(), supports.members.data_ptr(), B.data_ptr(),
        X.data_ptr(), info.data_ptr(), G.shape[0], supports.d, ridge, escalations, floor,
        threads(),
    )  # fmt: skip
    return X, info


def _support_solve_by_lapack(
    G: Tensor, supports: Supports, sizes: Tensor, B: Tensor, *ladder: Any
) -> tuple[Tensor, Tensor]:
    """:func:`support_solve` where LAPACK solves the large systems, each on all threads."""
    small = sizes <= _LARGE_SUPPORT
    of_small = small.repeat_interleave(sizes)
    offsets = torch.zeros_like(supports.offsets)
    torch.cumsum(torch.where(small, sizes, 0), 0, out=offsets[1:])
    X = torch.empty_like(B)
    X[of_small], info = support_solve(
        G, Supports(offsets, supports.members[of_small], supports.d), B[of_small], *ladder
    )
    for neuron in (~small).nonzero()[:, 0].tolist():
        own = slice(int(supports.offsets[neuron]), int(supports.offsets[neuron + 1]))
        members = supports.members[own]
        solved, info[neuron] = reference_ridge_solve(
            G[members[:, None], members][None], B[own][None, :, None], *ladder
        )
        X[own] = solved[0, :, 0]
    return X, info


def ridge_solve(
    G: Tensor, B: Tensor, ridge: float = 1e-6, escalations: int = 0, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    G, B = G.contiguous(), B.contiguous()
    batch, k, m = B.shape
    X, info = torch.empty_like(B), torch.empty(batch, dtype=torch.int32, device="cpu")
    _C.ridge_solve(
        _name(G), G.data_ptr(), B.data_ptr(), X.data_ptr(), info.data_ptr(), batch, k, m, ridge,
        escalations, floor, threads(),
    )  # fmt: skip
    return X, info
