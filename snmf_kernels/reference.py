"""Every operation of the solver in plain torch: the mathematical documentation, and the oracle of the tests.

Each function has the name and the signature of the fast ones in ``_cpp``, ``_triton`` and ``_cuda``. They run wherever
torch runs, in any floating dtype, and are also the ``torch`` backend.

Notation: activations ``A [d, n]``, features ``Z [d, k]``, coefficients ``Y [k, n] >= 0``, ``ZtA = ZᵀA [k, n]``,
``ZtZ = ZᵀZ [k, k]``; ``x⁺ = max(x, 0)``, ``x⁻ = max(−x, 0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._scope import interruptible
from .sparse import PassResult, SparseColumns, Supports

# Elements of A that a pass handles at a time: on a GPU as many as stay in its cache between the products of a pass. But
# of wide matrices these are few tokens, whose sweeps leave most of a GPU idle: tokens for some 1,000 programs of 32, if
# their part of ZᵀA has no more entries than this (256 MB in float32). Not measured on a GPU yet.
_PASS_ELEMENTS = {"cpu": 1 << 20}
_GPU_PASS_ELEMENTS, _GPU_PASS_TOKENS, _GPU_PASS_ENTRIES = 1 << 23, 1 << 15, 1 << 26
# Elements of A that are converted at a time: on a CPU these temporaries should stay in cache, and small beside A; on a
# GPU each block costs a few launches.
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_GPU_BLOCK_ELEMENTS = 1 << 22
# Tokens of a block of a product at least.
_LEAST_TOKENS = 64
# Multiply-adds of a product on a CPU that may go on without a look at Ctrl-C: half a second of a slow core.
_PRODUCT_WORK = 1 << 34
# Sweeps after which a GPU is asked whether every token is done: asking waits for it.
_ASK_EVERY = 16


def multiplicative_update(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float = 1e-6, sweeps: int = 1) -> Tensor:
    """Multiplicative sweeps over Y for fixed Z (Ding, Li & Jordan 2010, equation 7).

    ``Y ← Y ∘ sqrt( (ZtA⁺ + ZtZ⁻ Y) / (ZtA⁻ + ZtZ⁺ Y + eps) )``, all entries from the old Y, ``sweeps`` times. It keeps
    Y non-negative, and for ``eps = 0`` no sweep raises ``‖A − Z Y‖²``.
    """
    positive, negative = ZtZ.clamp(min=0), (-ZtZ).clamp(min=0)
    above, below = ZtA.clamp(min=0), (-ZtA).clamp(min=0)
    for _ in range(sweeps):
        Y = Y * torch.sqrt((above + negative @ Y) / (below + positive @ Y + eps))
    return Y


def coordinate_descent(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int = 1) -> Tensor:
    """Sweeps of cyclic coordinate descent over Y for fixed Z (hierarchical alternating least squares).

    Feature after feature, ``y_i ← max(0, (ZtA_i − Σ_{j≠i} ZtZ_ij y_j) / ZtZ_ii)``: the exact minimiser over
    row i, so that no step raises ``‖A − Z Y‖²``. Rows of a zero feature (``ZtZ_ii = 0``) become zero.
    """
    Y = Y.clone()
    diagonal = torch.diagonal(ZtZ)
    off_diagonal = ZtZ - torch.diag(diagonal)
    for _ in range(sweeps):
        for i in range(Y.shape[0]):
            best = (ZtA[i] - off_diagonal[i] @ Y) / diagonal[i]
            Y[i] = torch.where(diagonal[i] > 0, best.clamp(min=0), 0)
    return Y


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    """Keeps the ``count`` entries of largest magnitude in each column of ``Z [d, k]``; of equal ones the lower rows."""
    columns = Z.T
    # A stable descending sort leaves equal magnitudes in the order of their rows.
    order = columns.abs().sort(dim=1, descending=True, stable=True).indices
    indices = order[:, :count].sort(dim=1).values
    return SparseColumns(indices, columns.gather(1, indices), Z.shape[0])


def sparse_product(Z: SparseColumns, A: Tensor) -> Tensor:
    """``ZᵀA [k, n]`` for a sparse Z and ``A [d, n]`` of any floating dtype, in the dtype of Z."""
    return Z.to_dense().T @ A.to(Z.values.dtype)


def dense_product(
    Y: Tensor, A: Tensor, token_weights: Tensor | None = None, *, flush: bool = False
) -> Tensor:
    """``(A diag(token_weights) Yᵀ)ᵀ [k, d]`` for ``Y [k, n]``, in the dtype of Y, and ``A [d, n]`` of any.

    As ``[k, d]``, so that a feature's neurons lie together. A is converted block by block, where that is needed, also
    where neither neurons nor tokens lie together: a product would copy all of it. With ``flush``, subnormal numbers in
    A count as zeros.
    """
    if A.dtype == Y.dtype and token_weights is None and 1 in A.stride() and not flush:
        parts = short_parts(A.shape[1], len(Y) * len(A), A.device)
        if len(parts) == 1:
            return Y @ A.T
    else:
        # No narrower than makes the product worth its update of all of [k, d].
        parts = list(token_blocks(A, least=_LEAST_TOKENS))
    product = Y.new_zeros(len(Y), len(A))
    for tokens in parts:
        weighted = Y[:, tokens] if token_weights is None else Y[:, tokens] * token_weights[tokens]
        block = A[:, tokens].to(Y.dtype)
        product.addmm_(weighted, (without_subnormals(block) if flush else block).T)
    return product


def without_subnormals(values: Tensor) -> Tensor:
    """A copy with zeros in place of subnormal numbers, of which products take a hundred times as long on many CPUs."""
    limits = torch.finfo(values.dtype)
    return torch.nn.functional.hardshrink(values, limits.tiny * (1 - limits.eps))


def short_parts(length: int, work: int, device: torch.device) -> list[slice]:
    """Ranges that add up to ``length``, each of bounded work on a CPU, for elements of ``work`` multiply-adds.

    Between two operations of torch Python hears Ctrl-C, during one it does not.
    """
    width = length if device.type != "cpu" else max(1, _PRODUCT_WORK // max(1, work))
    return [slice(start, min(start + width, length)) for start in range(0, length, max(1, width))]


def token_blocks(A: Tensor, elements: dict[str, int] | None = None, least: int = 1) -> Iterator[slice]:
    """Ranges of tokens whose part of A has about so many elements, by device; not given: as suits a conversion."""
    most = (elements or _BLOCK_ELEMENTS).get(A.device.type, _GPU_BLOCK_ELEMENTS)
    width = max(least, most // max(1, A.shape[0]))
    for start in range(0, A.shape[1], width):
        yield slice(start, min(start + width, A.shape[1]))


def composed_pass(
    update: Callable[..., Tensor], descend: Callable[..., Tensor], product: Callable[..., Tensor]
) -> Callable[..., PassResult]:
    """:func:`coefficient_pass` made of a multiplicative_update, a coordinate_descent and a sparse_product."""

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
        """One pass over ``A [d, n]`` for fixed Z: ``sweeps`` sweeps over ``Y [k, n]``, written to ``out``.

        Per block of tokens: ``Y ← diag(row_scale) Y``, ``ZtA = ZᵀA − shift``, then :func:`coordinate_descent` (or
        :func:`multiplicative_update`). Neither ZtA nor a second Y exists as a whole.

        Args:
            Y: ``[k, n]``.
            out: ``[k, n]``, where the new Y goes; may be Y itself.
            Z, ZtZ: features and ``ZᵀZ [k, k]`` (with what a squared penalty adds to its diagonal).
            A: of any floating dtype and strides.
            tol: coordinate descent: tokens are left alone once a sweep changes them by less than ``tol ‖y‖``.
            row_scale: ``[k]``, multiplies the rows of Y first.
            shift: ``[k]``, subtracted from the rows of ZtA: half of a linear penalty on Y.
            feature_norms, max_active: after the sweeps keep of each token the ``max_active`` features of largest
                ``feature_norms[i] * Y[i, t]`` that are positive, of equal ones the lower features, and sweep again over
                those. 0: all.
            token_weights: ``[n]``, weights of the tokens in ``AYt`` and ``dot``.
            residual_values: ``[k, count]``, the kept entries of Z in the units of A (where Z and A are scaled apart):
                the residual is measured with them.
            products: what of ``(A diag(token_weights) Yᵀ)ᵀ`` is wanted: ``"kept"`` for its entries at the kept places,
                ``"all"`` for ``[k, d]``, or None.
            measure: whether the violation of the optimality conditions is wanted.
        """
        precise = torch.float32 if Y.device.type == "mps" else torch.float64
        dot, violation, squared_norm, residual, data = torch.zeros(5, dtype=precise, device=Y.device).unbind()
        most_sweeps = torch.zeros((), dtype=torch.int64, device=Y.device)
        AYt = None
        if products:
            AYt = torch.zeros_like(Z.values) if products == "kept" else Z.values.new_zeros(Z.k, Z.d)
        Z_out = None if residual_values is None else SparseColumns(Z.indices, residual_values, Z.d).to_dense()
        rounds = 2 if 0 < max_active < Y.shape[0] else 1
        width = _pass_width(A, Z.k)
        for start in range(0, A.shape[1], width):
            tokens = slice(start, start + width)
            block, y = A[:, tokens], Y[:, tokens]
            p = product(Z, block)
            if row_scale is not None:
                y = y * row_scale[:, None]
            if shift is not None:
                p = p - shift[:, None]
            for round_ in range(rounds):
                if round_:
                    assert feature_norms is not None
                    contributions = feature_norms[:, None] * y
                    order = contributions.sort(dim=0, descending=True, stable=True).indices
                    y = y.scatter(0, order[max_active:], 0)
                    # NaN counts as used, so that it stays to be seen.
                    used = ~((y <= 0) | (contributions <= 0))
                    # Below whatever ZtA would make a coefficient positive, and yet no infinity.
                    y, p = torch.where(used, y, 0), torch.where(used, p, -torch.finfo(p.dtype).max / 4)
                if multiplicative:
                    y = update(y, p, ZtZ, eps, sweeps)
                    continue
                if tol <= 0:
                    y = descend(y, p, ZtZ, sweeps)
                    continue
                y, taken = _sweeps_until_settled(descend, y, p, ZtZ, sweeps, tol)
                most_sweeps = torch.maximum(most_sweeps, round_ * sweeps + taken)
            out[:, tokens] = y
            weighted = y if token_weights is None else y * token_weights[tokens]
            dot = dot + (p.to(precise) * weighted.to(precise)).sum()
            squared_norm = squared_norm + y.to(precise).square().sum()
            if measure:
                diagonal = torch.diagonal(ZtZ)[:, None]
                step = (ZtZ @ y - p) / diagonal
                distance = torch.where(diagonal > 0, torch.minimum(y, step), 0)
                violation = violation + distance.to(precise).square().sum()
            if Z_out is not None:
                weights = 1.0 if token_weights is None else token_weights[tokens].to(precise)
                converted = block.to(y.dtype)
                data = data + (converted.to(precise).square() * weights).sum()
                residual = residual + ((converted - Z_out @ y).to(precise).square() * weights).sum()
            if AYt is not None:
                product_of_block = weighted @ block.to(y.dtype).T
                AYt += Z.gather(product_of_block) if products == "kept" else product_of_block
        if multiplicative or tol <= 0:
            most_sweeps = most_sweeps + rounds * sweeps
        return PassResult(AYt, dot, violation, squared_norm, residual, data, most_sweeps)

    return coefficient_pass


def _pass_width(A: Tensor, k: int) -> int:
    """Tokens that a composed pass handles at a time."""
    if A.device.type in _PASS_ELEMENTS:
        return max(1, _PASS_ELEMENTS[A.device.type] // A.shape[0])
    busy = min(_GPU_PASS_TOKENS, _GPU_PASS_ENTRIES // max(1, k))
    return max(1, _GPU_PASS_ELEMENTS // A.shape[0], busy)


def _sweeps_until_settled(
    descend: Callable[..., Tensor], y: Tensor, p: Tensor, ZtZ: Tensor, sweeps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """y after sweeps until one changes it by no more than ``tol ‖y‖``, and how many that were."""
    settled = torch.zeros((), dtype=torch.bool, device=y.device)
    taken = torch.zeros((), dtype=torch.int64, device=y.device)
    every = 1 if y.device.type == "cpu" else _ASK_EVERY
    for sweep in range(sweeps):
        if sweep and sweep % every == 0 and bool(settled):
            break
        swept = descend(y, p, ZtZ, 1)
        taken = taken + ~settled
        settled_now = (swept - y).norm() <= tol * swept.norm()
        y = torch.where(settled, y, swept)
        settled = settled | settled_now
    return y, taken


coefficient_pass = composed_pass(multiplicative_update, coordinate_descent, sparse_product)


def column_descent(Z: SparseColumns, AYt: Tensor, YYt: Tensor, sweeps: int = 1) -> SparseColumns:
    """Sweeps of block coordinate descent over the columns of a sparse Z for fixed Y.

    Column after column, the exact minimiser of ``‖A − Z Y‖²`` over all columns with ``count``
    non-zeros, support and values: the winner-take-all of ``R_i / YYt_ii`` with
    ``R_i = AYt_i − Σ_{j≠i} YYt_ij z_j``, since a neuron contributes ``R² / YYt_ii`` to what is gained. No step
    raises the loss. Columns of unused features (``YYt_ii = 0``) stay.

    Args:
        Z: kept entries, ``[k, count]``.
        AYt: ``(A Yᵀ)ᵀ [k, d]``.
        YYt: ``[k, k]``.
        sweeps: how often.
    """
    count = Z.indices.shape[1]
    indices, values = Z.indices.clone(), Z.values.clone()
    dense = Z.to_dense().T.clone()  # [k, d]
    diagonal = torch.diagonal(YYt).clone()
    weights = YYt - torch.diag(diagonal)
    for _ in range(sweeps):
        for i in range(Z.k):
            if not diagonal[i] > 0:
                continue
            chosen = winner_take_all((AYt[i] - weights[i] @ dense)[:, None], count)
            indices[i], values[i] = chosen.indices[0], chosen.values[0] / diagonal[i]
            dense[i] = 0
            dense[i, indices[i]] = values[i]
    return SparseColumns(indices, values, Z.d)


def support_solve(
    G: Tensor,
    supports: Supports,
    B: Tensor,
    ridge: float = 1e-6,
    escalations: int = 0,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Of each neuron r with support S the solution of ``(G[S, S] + ridge I) x = b``: systems of ragged sizes.

    Args:
        G: ``[k, k]``, symmetric.
        supports: which features each neuron belongs to.
        B: right-hand sides in the order of ``supports.members``.
        ridge, escalations, floor: of each system, as in :func:`ridge_solve`.

    Returns:
        X in that order, and ``info [d]`` (int32) as of :func:`ridge_solve`.
    """
    X = torch.empty_like(B)
    info = torch.zeros(supports.d, dtype=torch.int32, device=B.device)
    sizes = supports.offsets.diff()
    for size in sizes.unique().tolist():
        if size == 0:
            continue
        neurons = (sizes == size).nonzero()[:, 0]
        places = supports.offsets[neurons][:, None] + torch.arange(size, device=B.device)
        members = supports.members[places]
        solved, info[neurons] = ridge_solve(
            G[members[:, :, None], members[:, None, :]], B[places][:, :, None], ridge, escalations, floor
        )
        X[places] = solved[:, :, 0]
    return X, info


def ridge_solve(
    G: Tensor, B: Tensor, ridge: float = 1e-6, escalations: int = 0, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Solves ``(G_b + ridge I) X_b = B_b`` for a batch of symmetric positive definite systems by Cholesky factors.

    Args:
        G: ``[batch, k, k]``, of which the lower triangles are read.
        B: ``[batch, k, m]``.
        ridge, escalations, floor: a system without a factor is tried with larger ridges, at most ``escalations`` of
            them, see :func:`escalated_ridge`.

    Returns:
        ``X [batch, k, m]`` and ``info [batch]`` (int32): 0; or ``−e`` if it took e larger ridges; or the 1-based index
        of the pivot that was not positive at the last try, and that system's X is NaN then.
    """
    # On a GPU the question whether one has failed would wait for the device.
    factorised = cholesky_by_ladder if G.device.type == "cpu" else _all_rungs
    factor, info = factorised(G, ridge, escalations, floor)
    X = torch.cholesky_solve(B, factor)
    return torch.where((info <= 0)[:, None, None], X, torch.nan), info.to(torch.int32)


def cholesky_by_ladder(G: Tensor, ridge: float, escalations: int, floor: float) -> tuple[Tensor, Tensor]:
    """Lower factors ``[batch, k, k]`` and ``info [batch]`` as of ``ridge_solve``; larger ridges where one failed."""
    (factor,), (info,) = _factors(G, ridge, floor, range(1))
    for step in range(1, escalations + 1):
        failed = info > 0
        if not bool(failed.any()):
            break
        (again,), (info_again,) = _factors(G, ridge, floor, range(step, step + 1))
        factor = torch.where(failed[:, None, None], again, factor)
        info = torch.where(failed, torch.where(info_again > 0, info_again, -step), info)
    return factor, info


def _all_rungs(G: Tensor, ridge: float, escalations: int, floor: float) -> tuple[Tensor, Tensor]:
    """The same with all ridges tried, side by side."""
    factors, infos = _factors(G, ridge, floor, range(escalations + 1))
    taken = (infos > 0).to(torch.int64).cumprod(0).sum(0).clamp(max=escalations)
    of = torch.arange(len(G), device=G.device)
    info = infos[taken, of]
    return factors[taken, of], torch.where(info > 0, info, -taken)


def _factors(G: Tensor, ridge: float, floor: float, steps: range) -> tuple[Tensor, Tensor]:
    """Cholesky factors ``[steps, batch, k, k]`` after so many escalations, and their first bad pivots."""
    ridges = [
        escalated_ridge(G, ridge, floor, torch.full((len(G),), step, device=G.device)) for step in steps
    ]
    systems = G.tril().repeat(len(steps), 1, 1, 1)
    torch.diagonal(systems, dim1=-2, dim2=-1).add_(torch.stack(ridges)[..., None])
    factors, info = interruptible(systems.shape[-1], lambda: torch.linalg.cholesky_ex(systems))
    # Not every library says that it met NaN.
    bad = ~(torch.diagonal(factors, dim1=-2, dim2=-1) > 0)
    if bad.shape[-1]:
        info = torch.where((info == 0) & bad.any(-1), 1 + bad.to(info.dtype).argmax(-1), info)
    return factors, info


def escalated_ridge(G: Tensor, ridge: float, floor: float, steps: Tensor) -> Tensor:
    """The ridges of systems ``G [batch, k, k]`` after ``steps [batch]`` escalations, ``[batch]``.

    ``ridge`` itself, then ``max(10 ridge, floor · max_i G_ii)``, and tenfold from there. A ``floor`` below the
    precision of the dtype counts as that. With ``steps = (−info).clamp(min=0)`` it is what :func:`ridge_solve` used.
    """
    limits = torch.finfo(G.dtype)
    # A zero beside the diagonal, for systems without a positive entry or without any; NaN is left out.
    diagonal = torch.nn.functional.pad(torch.diagonal(G, dim1=1, dim2=2), (0, 1))
    largest = torch.where(diagonal > 0, diagonal, 0).amax(1)
    first = (max(floor, limits.eps) * largest).clamp(min=max(limits.tiny, 10 * ridge))
    return torch.where(steps > 0, first * 10.0 ** (steps - 1).to(G.dtype), ridge)


def copy_if(flag: Tensor, source: Tensor, target: Tensor) -> None:
    """``target ← source`` (matrices of one shape) where the ``flag`` without dimensions is not zero; nothing waits."""
    target.copy_(torch.where(flag != 0, source, target))
