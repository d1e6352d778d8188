"""The operations of the solver for users: checked arguments, choice of a backend, and a torch custom op of each.

The equations are in :mod:`snmf_kernels.reference`, whose functions have the same names. The custom ops
(``torch.ops.snmf_kernels.*``) make the operations opaque to ``torch.compile``; ``fit`` calls the kernels
underneath directly.
"""

import torch
from torch import Tensor

from . import _backends
from .sparse import SparseColumns

__all__ = ["coordinate_descent", "multiplicative_update", "ridge_solve", "sparse_product", "winner_take_all"]

_WORKING = (torch.float32, torch.float64)
_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def multiplicative_update(
    Y: Tensor, ZtA: Tensor, ZtZ: Tensor, *, eps: float = 1e-6, sweeps: int = 1, backend: str = "auto"
) -> Tensor:
    """Multiplicative sweeps over the coefficients for fixed features (Ding, Li & Jordan 2010).

    Equivalent to ``sweeps`` times ``Y = Y * (above / below).sqrt()`` with
    ``above = ZtA.clamp(min=0) + (-ZtZ).clamp(min=0) @ Y`` and
    ``below = (-ZtA).clamp(min=0) + ZtZ.clamp(min=0) @ Y + eps``.

    Args:
        Y: coefficients ``[k, n]``, non-negative, float32 or float64.
        ZtA: ``ZᵀA [k, n]``.
        ZtZ: ``ZᵀZ [k, k]``.
        eps: added to the denominator.
        sweeps: number of updates.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"torch"``.

    Returns:
        The new coefficients ``[k, n]``; the arguments are left as they are.
    """
    _check_coefficients(Y, ZtA, ZtZ, sweeps)
    if not eps >= 0:
        raise ValueError(f"eps: wanted a number >= 0, got {eps}")
    return _multiplicative_update(Y, ZtA, ZtZ, eps, sweeps, backend)


def coordinate_descent(
    Y: Tensor, ZtA: Tensor, ZtZ: Tensor, *, sweeps: int = 1, backend: str = "auto"
) -> Tensor:
    """Sweeps of cyclic coordinate descent over the coefficients for fixed features; gives exact zeros.

    Equivalent to, for each feature i in turn,
    ``Y[i] = (Y[i] + (ZtA[i] - ZtZ[i] @ Y) / ZtZ[i, i]).clamp(min=0)``.
    Arguments and result as in :func:`multiplicative_update`; backends ``"cpp"`` and ``"torch"``.
    """
    _check_coefficients(Y, ZtA, ZtZ, sweeps)
    return _coordinate_descent(Y, ZtA, ZtZ, sweeps, backend)


def winner_take_all(Z: Tensor, count: int, *, backend: str = "auto") -> SparseColumns:
    """Keeps the ``count`` entries of largest magnitude in each column; of equal magnitudes the lower rows win.

    Args:
        Z: ``[d, k]``, any strides, float32 or float64.
        count: how many to keep, from 1 to d.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"torch"``.

    Returns:
        The kept entries as :class:`SparseColumns`; ``.to_dense()`` gives the matrix.
    """
    _check_matrix("Z", Z, _WORKING)
    if not 1 <= count <= Z.shape[0]:
        raise ValueError(f"count: wanted 1 to d = {Z.shape[0]}, got {count}")
    indices, values = _winner_take_all(Z, count, backend)
    return SparseColumns(indices, values, Z.shape[0])


def sparse_product(Z: SparseColumns, A: Tensor, *, backend: str = "auto") -> Tensor:
    """``ZᵀA`` for sparse features, ``[k, n]``, in the dtype of Z. Equivalent to ``Z.to_dense().T @ A``.

    Args:
        Z: features, as :func:`winner_take_all` gives them.
        A: activations ``[d, n]``, any strides, float16, bfloat16, float32 or float64.
        backend: ``"auto"``, ``"cpp"`` or ``"torch"``.
    """
    _check_matrix("A", A, _READABLE)
    _check_matrix("Z.values", Z.values, _WORKING)
    if A.shape[0] != Z.d:
        raise ValueError(f"A: wanted {Z.d} rows (neurons), as Z has, got shape {tuple(A.shape)}")
    if A.device != Z.values.device:
        raise ValueError(f"A: wanted a tensor on {Z.values.device}, where Z is, got {A.device}")
    if Z.indices.numel():
        lowest, highest = int(Z.indices.min()), int(Z.indices.max())
        if lowest < 0 or highest >= Z.d:
            raise ValueError(f"Z.indices: wanted rows from 0 to {Z.d - 1}, got {lowest} to {highest}")
    return _sparse_product(Z.indices, Z.values, A, backend)


def ridge_solve(G: Tensor, B: Tensor, *, ridge: float = 1e-6, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Solves ``(G_b + ridge I) X_b = B_b`` for a batch of symmetric positive definite systems.

    Equivalent to ``torch.linalg.solve(G + ridge * torch.eye(k), B)``. Only the lower triangles of G are read.

    Args:
        G: ``[batch, k, k]``, float32 or float64.
        B: ``[batch, k, m]``, same dtype and device.
        ridge: added to the diagonal.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"torch"``.

    Returns:
        ``X [batch, k, m]`` and ``info [batch]`` (int32). ``info`` is 0, or the 1-based pivot that was not
        positive: that system is not positive definite in this precision, and its X is NaN.
    """
    for name, tensor in (("G", G), ("B", B)):
        if tensor.ndim != 3 or tensor.dtype not in _WORKING:
            raise ValueError(
                f"{name}: wanted a float32 or float64 tensor of three dimensions, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    if G.shape != (B.shape[0], B.shape[1], B.shape[1]) or G.dtype != B.dtype or G.device != B.device:
        raise ValueError(
            f"G: wanted shape {(B.shape[0], B.shape[1], B.shape[1])} in {B.dtype} on {B.device} to go with B, "
            f"got {tuple(G.shape)} in {G.dtype} on {G.device}"
        )
    if not ridge >= 0:
        raise ValueError(f"ridge: wanted a number >= 0, got {ridge}")
    return _ridge_solve(G, B, ridge, backend)


def _check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: wanted a torch tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: wanted a {wanted} matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_coefficients(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int) -> None:
    _check_matrix("Y", Y, _WORKING)
    k, n = Y.shape
    for name, tensor, shape in (("ZtA", ZtA, (k, n)), ("ZtZ", ZtZ, (k, k))):
        if tensor.shape != shape or tensor.dtype != Y.dtype or tensor.device != Y.device:
            raise ValueError(
                f"{name}: wanted shape {shape} in {Y.dtype} on {Y.device} to go with Y, "
                f"got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    if sweeps < 1:
        raise ValueError(f"sweeps: wanted at least 1, got {sweeps}")


@torch.library.custom_op("snmf_kernels::multiplicative_update", mutates_args=())
def _multiplicative_update(
    Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float, sweeps: int, backend: str
) -> Tensor:
    function = _backends.choose("multiplicative_update", Y.device, Y.dtype, backend).function
    return function(Y, ZtA, ZtZ, eps, sweeps)


@torch.library.custom_op("snmf_kernels::coordinate_descent", mutates_args=())
def _coordinate_descent(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int, backend: str) -> Tensor:
    function = _backends.choose("coordinate_descent", Y.device, Y.dtype, backend).function
    return function(Y, ZtA, ZtZ, sweeps)


@torch.library.custom_op("snmf_kernels::winner_take_all", mutates_args=())
def _winner_take_all(Z: Tensor, count: int, backend: str) -> tuple[Tensor, Tensor]:
    kept = _backends.choose("winner_take_all", Z.device, Z.dtype, backend).function(Z, count)
    return kept.indices, kept.values


@torch.library.custom_op("snmf_kernels::sparse_product", mutates_args=())
def _sparse_product(indices: Tensor, values: Tensor, A: Tensor, backend: str) -> Tensor:
    function = _backends.choose("sparse_product", A.device, values.dtype, backend).function
    return function(SparseColumns(indices, values, A.shape[0]), A)


@torch.library.custom_op("snmf_kernels::ridge_solve", mutates_args=())
def _ridge_solve(G: Tensor, B: Tensor, ridge: float, backend: str) -> tuple[Tensor, Tensor]:
    function = _backends.choose("ridge_solve", B.device, B.dtype, backend, k=B.shape[1]).function
    return function(G, B, ridge)


@_multiplicative_update.register_fake
def _(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float, sweeps: int, backend: str) -> Tensor:
    return Y.new_empty(Y.shape)


@_coordinate_descent.register_fake
def _(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int, backend: str) -> Tensor:
    return Y.new_empty(Y.shape)


@_winner_take_all.register_fake
def _(Z: Tensor, count: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (Z.shape[1], count)
    return Z.new_empty(shape, dtype=torch.int64), Z.new_empty(shape)


@_sparse_product.register_fake
def _(indices: Tensor, values: Tensor, A: Tensor, backend: str) -> Tensor:
    return values.new_empty((values.shape[0], A.shape[1]))


@_ridge_solve.register_fake
def _(G: Tensor, B: Tensor, ridge: float, backend: str) -> tuple[Tensor, Tensor]:
    return B.new_empty(B.shape), B.new_empty((B.shape[0],), dtype=torch.int32)
