"""The operations of the solver for users: checked arguments, choice of a backend, and a torch custom op of each.

The equations are in :mod:`snmf_kernels.reference`, whose functions have the same names. The custom ops
(``torch.ops.snmf_kernels.*``) make the operations opaque to ``torch.compile``; ``fit`` calls the kernels
underneath directly.
"""

import torch
from torch import Tensor

from . import _backends, _scope
from ._checks import dtype_name
from .sparse import PassResult, SparseColumns, Supports

__all__ = [
    "coefficient_pass",
    "column_descent",
    "coordinate_descent",
    "multiplicative_update",
    "ridge_solve",
    "sparse_product",
    "support_solve",
    "winner_take_all",
]

_WORKING = (torch.float32, torch.float64)
_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def multiplicative_update(
    Y: Tensor, ZtA: Tensor, ZtZ: Tensor, *, eps: float = 1e-6, sweeps: int = 1, backend: str = "auto"
) -> Tensor:
    """Multiplicative sweeps over the coefficients for fixed features (Ding, Li & Jordan 2010).

    Equivalent to ``sweeps`` times ``Y = Y * (above / below).sqrt()`` with
    ``above = ZtA.clamp(min=0) + (-ZtZ).clamp(min=0) @ Y`` and
    ``below = (-ZtA).clamp(min=0) + ZtZ.clamp(min=0) @ Y + eps``. On the CPU, what would be a subnormal number becomes
    zero: products with such numbers take several times as long.

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
    Arguments and result as in :func:`multiplicative_update`.
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
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"torch"``.
    """
    _check_features(Z)
    _check_activations(A, Z)
    return _sparse_product(Z.indices, Z.values, A, backend)


def coefficient_pass(
    Y: Tensor,
    Z: SparseColumns,
    A: Tensor,
    ZtZ: Tensor,
    *,
    sweeps: int = 1,
    multiplicative: bool = False,
    eps: float = 1e-6,
    tol: float = 0.0,
    shift: Tensor | None = None,
    max_active: int = 0,
    token_weights: Tensor | None = None,
    products: str | None = None,
    measure: bool = False,
    residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, PassResult]:
    """Sweeps over the coefficients for fixed features in one pass over the activations: the step for Y of ``fit``.

    Minimises ``‖A − Z Y‖² + 2 Σ_it shift_i y_it`` over ``Y >= 0``. Equivalent to
    ``coordinate_descent(Y, sparse_product(Z, A) - shift[:, None], ZtZ, sweeps=sweeps)``, but neither ZtA ``[k, n]``
    nor a second Y exists as a whole on the way, and whatever else needs A is done while a tile of it is in cache.

    Args:
        Y: coefficients ``[k, n]``, non-negative, float32 or float64.
        Z: features, as :func:`winner_take_all` gives them, in the dtype of Y.
        A: activations ``[d, n]``, any strides, float16, bfloat16, float32 or float64.
        ZtZ: ``ZᵀZ [k, k]``; its diagonal times ``1 + l2`` for a penalty ``l2 Σ (‖z_i‖ y_it)²``.
        sweeps: number of sweeps; 0 only measures.
        multiplicative: sweep as :func:`multiplicative_update` does, with this ``eps``.
        tol: coordinate descent leaves a block of tokens alone once a sweep changes it by less than ``tol ‖Y‖``.
        shift: ``[k]``, non-negative: half of a linear penalty on the rows of Y.
        max_active: keep of each token the so many features of largest ``‖z_i‖ y_it``, of equal ones the lower
            features, and sweep again over those. 0: any number.
        token_weights: ``[n]``: the weights of the tokens in the sums of the result. They do not change Y, since
            each token's optimum is its own.
        products: what is wanted as ``AYt``: ``"kept"`` for the entries of ``(A diag(token_weights) Yᵀ)ᵀ`` where Z keeps
            some, ``"all"`` for the whole ``[k, d]``, or None.
        measure: whether ``violation``, the distance from the optimality conditions, is wanted.
        residual: whether ``residual`` and ``data``, ``‖A − Z Y‖²`` and ``‖A‖²``, are wanted.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` (up to 1,024 features, no ``max_active``) or ``"torch"``.

    Returns:
        The new coefficients ``[k, n]``, the arguments being left as they are, and a
        :class:`~snmf_kernels.sparse.PassResult`.
    """
    _check_features(Z)
    _check_activations(A, Z)
    _check_matrix("Y", Y, _WORKING)
    k, n = Z.k, A.shape[1]
    _check_partner("Y", Y, (k, n), Z.values, "Z and A")
    _check_partner("ZtZ", ZtZ, (k, k), Y, "Y")
    if shift is not None:
        _check_partner("shift", shift, (k,), Y, "Y")
        # The compiled kernels take unused lanes, whose coefficients are zero, along.
        if not bool((shift >= 0).all()):
            raise ValueError(f"shift: wanted numbers >= 0, got {float(shift.min())}")
    if token_weights is not None:
        _check_partner("token_weights", token_weights, (n,), Y, "Y")
    for name, value in (("eps", eps), ("tol", tol), ("sweeps", sweeps), ("max_active", max_active)):
        if not value >= 0:
            raise ValueError(f"{name}: wanted a number >= 0, got {value}")
    if measure and multiplicative:
        raise ValueError("measure: wanted False with multiplicative sweeps; measure with a pass of 0 sweeps")
    if products not in (None, "kept", "all"):
        raise ValueError(f"products: wanted None, 'kept' or 'all', got {products!r}")
    out, AYt, sums = _coefficient_pass(
        Y, Z.indices, Z.values, A, ZtZ, sweeps, multiplicative, eps, tol, shift, max_active, token_weights,
        products, measure, residual, backend,
    )  # fmt: skip
    return out, PassResult.of_sums(AYt if products else None, sums)


def column_descent(
    Z: SparseColumns, AYt: Tensor, YYt: Tensor, *, sweeps: int = 1, backend: str = "auto"
) -> SparseColumns:
    """Sweeps over the columns of sparse features for fixed coefficients, support and values; never raises the loss.

    Each column in turn becomes the exact minimiser of ``‖A − Z Y‖²`` over all columns with as many entries.
    Equivalent to, for each feature i in turn with ``YYt[i, i] > 0``,
    ``Z[:, i] = winner_take_all(Z[:, i] + (AYt[i] - Z @ YYt[i]) / YYt[i, i], count)``.

    Args:
        Z: features, as :func:`winner_take_all` gives them, float32 or float64.
        AYt: ``(A Yᵀ)ᵀ [k, d]`` in the dtype of Z.
        YYt: ``Y Yᵀ [k, k]``.
        sweeps: number of sweeps.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"torch"``.

    Returns:
        The new features; the arguments are left as they are.
    """
    _check_features(Z)
    if not 1 <= Z.indices.shape[1] <= Z.d:
        raise ValueError(f"Z: wanted 1 to d = {Z.d} kept entries in each column, got {Z.indices.shape[1]}")
    _check_partner("AYt", AYt, (Z.k, Z.d), Z.values, "Z")
    _check_partner("YYt", YYt, (Z.k, Z.k), Z.values, "Z")
    _check_sweeps(sweeps)
    indices, values = _column_descent(Z.indices, Z.values, Z.d, AYt, YYt, sweeps, backend)
    return SparseColumns(indices, values, Z.d)


def support_solve(
    G: Tensor,
    supports: Supports,
    B: Tensor,
    *,
    ridge: float = 1e-6,
    escalations: int = 0,
    floor: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Solves ``(G[S, S] + ridge I) x = b`` for each neuron on its support S: least squares for fixed supports.

    With ``supports, order = Z.supports()``, ``G = Y Yᵀ`` and ``B = Z.gather(AYt).flatten()[order]`` the result are the
    best values of the kept entries of Z, in that order. Equivalent to, for each neuron r with
    ``r_th = slice(offsets[r], offsets[r + 1])`` and ``S = members[r_th]``,
    ``X[r_th] = torch.linalg.solve(G[S][:, S] + ridge * torch.eye(len(S)), B[r_th])``.

    Args:
        G: ``[k, k]``, symmetric, float32 or float64.
        supports: the features of each of d neurons, as ``SparseColumns.supports`` gives them.
        B: right-hand sides in the order of ``supports.members``, in the dtype of G.
        ridge, escalations, floor: of each system, as in :func:`ridge_solve`.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"torch"``.

    Returns:
        X in the order of ``supports.members`` and ``info [d]`` (int32), as of :func:`ridge_solve`: where a neuron's
        info is positive, its system is not positive definite in this precision, and its part of X is NaN.
    """
    _check_matrix("G", G, _WORKING)
    k = G.shape[1]
    if len(G) != k:
        raise ValueError(f"G: wanted a square matrix, got shape {tuple(G.shape)}")
    offsets, members = supports.offsets, supports.members
    for name, tensor, shape in (("offsets", offsets, (supports.d + 1,)), ("members", members, B.shape[:1])):
        if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != G.device:
            raise ValueError(
                f"supports.{name}: wanted shape {tuple(shape)} in torch.int64 on {G.device}, "
                f"got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    _check_partner("B", B, (len(members),), G, "G and supports")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(members) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"supports.offsets: wanted ascending numbers from 0 to {len(members)}")
    if len(members) and not 0 <= int(members.min()) <= int(members.max()) < k:
        raise ValueError(
            f"supports.members: wanted features from 0 to {k - 1}, got {int(members.min())} to {int(members.max())}"
        )
    _check_ladder(ridge, escalations, floor)
    return _support_solve(G, offsets, members, B, ridge, escalations, floor, backend)


def ridge_solve(
    G: Tensor,
    B: Tensor,
    *,
    ridge: float = 1e-6,
    escalations: int = 0,
    floor: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Solves ``(G_b + ridge I) X_b = B_b`` for a batch of symmetric positive definite systems.

    Equivalent to ``torch.linalg.solve(G + ridge * torch.eye(k), B)``. Only the lower triangles of G are read.

    Args:
        G: ``[batch, k, k]``, float32 or float64.
        B: ``[batch, k, m]``, same dtype and device.
        ridge: added to the diagonal.
        escalations: how many larger ridges to try for a system that is not positive definite in this precision:
            ``max(10 * ridge, floor * largest diagonal entry)``, and tenfold from there.
        floor: see ``escalations``; below the precision of the dtype it counts as that.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"torch"``.

    Returns:
        ``X [batch, k, m]`` and ``info [batch]`` (int32). ``info`` is 0 where a system was solved as asked, ``-e`` where
        it took ``e`` larger ridges, and the 1-based pivot that was not positive where the last one did not do
        either: its X is NaN.
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
    _check_ladder(ridge, escalations, floor)
    return _ridge_solve(G, B, ridge, escalations, floor, backend)


def _check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _scope.one_thread_after_fork()
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: wanted a torch tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.dtype not in dtypes:
        wanted = " or ".join(map(dtype_name, dtypes))
        raise ValueError(
            f"{name}: wanted a {wanted} matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_coefficients(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int) -> None:
    _check_matrix("Y", Y, _WORKING)
    k, n = Y.shape
    _check_partner("ZtA", ZtA, (k, n), Y, "Y")
    _check_partner("ZtZ", ZtZ, (k, k), Y, "Y")
    _check_sweeps(sweeps)


def _check_partner(name: str, tensor: Tensor, shape: tuple[int, ...], other: Tensor, whose: str) -> None:
    """Raises unless ``tensor`` has this shape, and dtype and device of the ``other``."""
    if tensor.shape != shape or tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name}: wanted shape {shape} in {other.dtype} on {other.device} to go with {whose}, "
            f"got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
        )


def _check_sweeps(sweeps: int) -> None:
    if sweeps < 1:
        raise ValueError(f"sweeps: wanted at least 1, got {sweeps}")


def _check_ladder(ridge: float, escalations: int, floor: float) -> None:
    for name, value in (("ridge", ridge), ("escalations", escalations), ("floor", floor)):
        if not value >= 0:
            raise ValueError(f"{name}: wanted a number >= 0, got {value}")


def _check_features(Z: SparseColumns) -> None:
    _check_matrix("Z.values", Z.values, _WORKING)
    if Z.indices.numel():
        lowest, highest = int(Z.indices.min()), int(Z.indices.max())
        if lowest < 0 or highest >= Z.d:
            raise ValueError(f"Z.indices: wanted rows from 0 to {Z.d - 1}, got {lowest} to {highest}")


def _check_activations(A: Tensor, Z: SparseColumns) -> None:
    _check_matrix("A", A, _READABLE)
    if A.shape[0] != Z.d:
        raise ValueError(f"A: wanted {Z.d} rows (neurons), as Z has, got shape {tuple(A.shape)}")
    if A.device != Z.values.device:
        raise ValueError(f"A: wanted a tensor on {Z.values.device}, where Z is, got {A.device}")


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


@torch.library.custom_op("snmf_kernels::coefficient_pass", mutates_args=())
def _coefficient_pass(
    Y: Tensor,
    indices: Tensor,
    values: Tensor,
    A: Tensor,
    ZtZ: Tensor,
    sweeps: int,
    multiplicative: bool,
    eps: float,
    tol: float,
    shift: Tensor | None,
    max_active: int,
    token_weights: Tensor | None,
    products: str | None,
    measure: bool,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    function = _backends.choose(
        "coefficient_pass", Y.device, Y.dtype, backend, k=Y.shape[0], max_active=max_active
    ).function
    out = torch.empty(Y.shape, dtype=Y.dtype, device=Y.device)
    AYt, *sums = function(
        Y,
        SparseColumns(indices, values, A.shape[0]),
        A,
        ZtZ,
        sweeps,
        out=out,
        multiplicative=multiplicative,
        eps=eps,
        tol=tol,
        shift=shift,
        feature_norms=torch.diagonal(ZtZ).clamp(min=0).sqrt(),
        max_active=max_active,
        token_weights=token_weights,
        residual_values=values if residual else None,
        products=products,
        measure=measure,
    )
    return (
        out,
        values.new_zeros(0, 0) if AYt is None else AYt,
        torch.stack([number.double() for number in sums]),
    )


@torch.library.custom_op("snmf_kernels::column_descent", mutates_args=())
def _column_descent(
    indices: Tensor, values: Tensor, d: int, AYt: Tensor, YYt: Tensor, sweeps: int, backend: str
) -> tuple[Tensor, Tensor]:
    function = _backends.choose("column_descent", values.device, values.dtype, backend).function
    Z = function(SparseColumns(indices, values, d), AYt, YYt, sweeps)
    return Z.indices, Z.values


@torch.library.custom_op("snmf_kernels::support_solve", mutates_args=())
def _support_solve(
    G: Tensor,
    offsets: Tensor,
    members: Tensor,
    B: Tensor,
    ridge: float,
    escalations: int,
    floor: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = _backends.choose("support_solve", B.device, B.dtype, backend).function
    supports = Supports(offsets.contiguous(), members.contiguous(), len(offsets) - 1)
    return function(G, supports, B, ridge, escalations, floor)


@torch.library.custom_op("snmf_kernels::ridge_solve", mutates_args=())
def _ridge_solve(
    G: Tensor, B: Tensor, ridge: float, escalations: int, floor: float, backend: str
) -> tuple[Tensor, Tensor]:
    function = _backends.choose("ridge_solve", B.device, B.dtype, backend, k=B.shape[1]).function
    return function(G, B, ridge, escalations, floor)


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


@_coefficient_pass.register_fake
def _(
    Y: Tensor,
    indices: Tensor,
    values: Tensor,
    A: Tensor,
    ZtZ: Tensor,
    sweeps: int,
    multiplicative: bool,
    eps: float,
    tol: float,
    shift: Tensor | None,
    max_active: int,
    token_weights: Tensor | None,
    products: str | None,
    measure: bool,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = {None: (0, 0), "kept": values.shape, "all": (values.shape[0], A.shape[0])}[products]
    return Y.new_empty(Y.shape), values.new_empty(shape), Y.new_empty(6, dtype=torch.float64)


@_column_descent.register_fake
def _(
    indices: Tensor, values: Tensor, d: int, AYt: Tensor, YYt: Tensor, sweeps: int, backend: str
) -> tuple[Tensor, Tensor]:
    return indices.new_empty(indices.shape), values.new_empty(values.shape)


@_support_solve.register_fake
def _(
    G: Tensor,
    offsets: Tensor,
    members: Tensor,
    B: Tensor,
    ridge: float,
    escalations: int,
    floor: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return B.new_empty(B.shape), B.new_empty((offsets.shape[0] - 1,), dtype=torch.int32)


@_ridge_solve.register_fake
def _(
    G: Tensor, B: Tensor, ridge: float, escalations: int, floor: float, backend: str
) -> tuple[Tensor, Tensor]:
    return B.new_empty(B.shape), B.new_empty((B.shape[0],), dtype=torch.int32)
