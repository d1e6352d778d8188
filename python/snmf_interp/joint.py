"""Fine-tuning all levels of a hierarchy together, on Gram matrices: see :func:`finetune`.

Notation: levels ``l = 0 … L``, features ``Z_l [d, k_l]``, coefficients ``Y_0 [k_0, n]`` and ``Y_l [k_l, k_{l−1}]``;
``T_ml = Y_l ⋯ Y_{m+1} [k_l, k_m]`` takes coefficients of level m to level l, ``C_l = T_0l Y_0 [k_l, n]``. All in scaled
units: A stands for ``diag(1/s) A``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from snmf_kernels import SparseColumns, StopReason, ops

# Tokens handled at a time: what is made on the way is at most [k_0, this].
_TOKENS = 8192
# Of an iteration: rounds over the blocks that cost nothing in n, sweeps within each, and over Y_0.
_ROUNDS, _COLUMN_SWEEPS, _ROW_SWEEPS, _TOKEN_SWEEPS = 3, 10, 2, 2
# A round that gains less than this share of the loss is the iteration's last.
_ROUND_GAIN = 1e-4
# Rows of a Y_l solved at a time: as many as the compiled descent takes in one vector.
_ROWS = 16
# Sweeps that fit the features of a level to given coefficients, once.
_OWN_SWEEPS = 50


@dataclass(frozen=True)
class JointOptions:
    """How the levels are fine-tuned together.

    Attributes:
        levels: whose losses count. ``"top"``: the last level's alone, ``‖A − Z_L Y_L ⋯ Y_0‖²``, which is the paper's
            objective. ``"all"``: the sum over the levels, ``Σ_l ‖A − Z_l Y_l ⋯ Y_0‖²``. See
            :func:`snmf_interp.fit_hierarchy` for what either does to the lower levels.
        max_iter: bound on the iterations.
        tol, patience: stop when the loss has not fallen by the relative amount ``tol`` for ``patience`` iterations.
    """

    levels: str = "all"
    max_iter: int = 100
    tol: float = 1e-3
    patience: int = 3

    def __post_init__(self) -> None:
        if self.levels not in ("top", "all"):
            raise ValueError(f"levels: wanted 'top' or 'all', got {self.levels!r}")
        for name, least in (("max_iter", 1), ("patience", 1), ("tol", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise ValueError(f"{name}: wanted a number >= {least}, got {value!r}")

    def counted(self, n_levels: int) -> tuple[int, ...]:
        """The levels whose losses count."""
        return (n_levels - 1,) if self.levels == "top" else tuple(range(n_levels))


class Levels(NamedTuple):
    """All factors, in scaled units.

    Attributes:
        Z: features of each level, float64.
        Y: ``Y_0 [k_0, n]`` in the working dtype, and ``Y_l [k_l, k_{l−1}]`` in float64.
    """

    Z: tuple[SparseColumns, ...]
    Y: tuple[Tensor, ...]

    def path(self, below: int, above: int) -> Tensor:
        """``T [k_above, k_below] = Y_above ⋯ Y_{below+1}``; the identity where both are the same."""
        if below == above:
            return torch.eye(self.Z[below].k, dtype=torch.float64, device=self.Z[below].values.device)
        product = self.Y[below + 1]
        for Y in self.Y[below + 2 : above + 1]:
            product = Y @ product
        return product

    def with_features(self, level: int, Z: SparseColumns) -> Levels:
        """The same with other features at a level."""
        return Levels((*self.Z[:level], Z, *self.Z[level + 1 :]), self.Y)

    def with_coefficients(self, level: int, Y: Tensor) -> Levels:
        """The same with other coefficients at a level."""
        return Levels(self.Z, (*self.Y[:level], Y, *self.Y[level + 1 :]))


class Products(NamedTuple):
    """What every block but Y_0 needs to know of the tokens, in float64.

    Attributes:
        AYt: ``(A Y_0ᵀ)ᵀ [k_0, d]``.
        YYt: ``Y_0 Y_0ᵀ [k_0, k_0]``.
    """

    AYt: Tensor
    YYt: Tensor

    def at(self, path: Tensor) -> Products:
        """The same of ``C = path Y_0``."""
        return Products(path @ self.AYt, path @ self.YYt @ path.T)


class Tokens:
    """Activations ``A [d, n]`` of any dtype and strides, neurons divided by ``scale``, seen through products."""

    def __init__(self, A: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
        self.A, self.dtype = A, dtype
        energies = torch.zeros(A.shape[0], dtype=torch.float64, device=A.device)
        for tokens in self.blocks():
            energies += A[:, tokens].to(torch.float64).square().sum(1)
        self.energies = energies
        self.scale = None if scale is None else scale.to(A.device, torch.float64)
        self.squared_norm = float(
            energies.sum() if self.scale is None else (energies / self.scale.square()).sum()
        )

    def blocks(self) -> list[slice]:
        """The tokens in blocks."""
        return [slice(start, start + _TOKENS) for start in range(0, self.A.shape[1], _TOKENS)]

    def products(self, Y: Tensor) -> Products:
        """With ``Y [k, n]``, summed in float64 over blocks of tokens."""
        k, d = Y.shape[0], self.A.shape[0]
        AYt = torch.zeros(k, d, dtype=torch.float64, device=Y.device)
        YYt = torch.zeros(k, k, dtype=torch.float64, device=Y.device)
        for tokens in self.blocks():
            AYt += Y[:, tokens] @ self.A[:, tokens].to(self.dtype).T
            YYt += Y[:, tokens] @ Y[:, tokens].T
        return Products(AYt if self.scale is None else AYt / self.scale, YYt)

    def features_product(self, Z: SparseColumns, tokens: slice) -> Tensor:
        """``ZᵀA [k, …]`` of a block of tokens, in the working dtype, for Z in scaled units."""
        scaled = Z if self.scale is None else Z.scaled_rows(1 / self.scale)
        narrow = SparseColumns(scaled.indices, scaled.values.to(self.dtype), Z.d)
        return ops.sparse_product(narrow, self.A[:, tokens])


@dataclass(frozen=True)
class JointIteration:
    """What a callback is told after each iteration, and what a checkpoint holds.

    Attributes:
        levels: the factors, in scaled units.
        losses: the joint loss at the start and after each iteration.
        rejected: steps that were taken back, since they would have raised the loss.
    """

    levels: Levels
    losses: tuple[float, ...]
    rejected: int


def finetune(
    tokens: Tokens,
    start: JointIteration | Levels,
    counts: Sequence[int],
    options: JointOptions,
    callback: Callable[[JointIteration], object] | None = None,
) -> tuple[JointIteration, Products, StopReason]:
    """Minimises ``Σ_l ‖A − Z_l Y_l ⋯ Y_0‖²`` over the counted levels l, all Y >= 0, Z_l sparse by column.

    Block-coordinate descent. With all other blocks fixed the loss is a quadratic function of each, whose coefficients
    are small products (expand the norm; l runs over the counted levels that are not below the block):

    * ``Z_l``: ``‖A − Z_l C_l‖²`` needs ``A C_lᵀ = (A Y_0ᵀ) T_0lᵀ`` and ``C_l C_lᵀ = T_0l (Y_0 Y_0ᵀ) T_0lᵀ``. Column
      after column is replaced by the best one of as many entries, support and values
      (:func:`snmf_kernels.ops.column_descent`).
    * ``Y_m``, m >= 1: with ``G_l = Z_lᵀZ_l`` it is ``⟨P Y_m S, Y_m⟩ − 2⟨R, Y_m⟩``, where ``P = Σ_l T_mlᵀ G_l T_ml``,
      ``S = C_{m−1} C_{m−1}ᵀ`` and ``R = Σ_l T_mlᵀ (Z_lᵀ A Y_0ᵀ) T_{0,m−1}ᵀ``. A row by itself is a non-negative least
      squares problem of Gram matrix ``P_ii S``, solved by coordinate descent. So many rows as a vector holds are solved
      at once, and then the exact minimiser on the segment towards the result is taken: the direction lowers the loss,
      for each row's move lowers its own, and the segment is feasible, for the set is convex.
    * ``Y_0``: each token is a non-negative least squares problem of Gram matrix ``P = Σ_l T_0lᵀ G_l T_0l`` and
      right-hand side ``Σ_l T_0lᵀ (Z_lᵀ a)``; sweeps of coordinate descent, block of tokens by block.

    So A is read in the last step only (and by ``A Y_0ᵀ`` after it), and the residual is never formed: the loss is
    ``‖A‖² − 2⟨Z_l, A C_lᵀ⟩ + ⟨G_l, C_l C_lᵀ⟩``, in float64. No step can raise it but by rounding; one that does is
    taken back.

    Args:
        tokens: the activations.
        start: where to begin, or an iteration to go on from.
        counts: how many entries a column of each Z_l keeps.
        options: see there.
        callback: called after each iteration with the state so far; returning True stops.

    Returns:
        The last iteration, whose levels that do not count have had their Z fitted to their coefficients; the
        products with its Y_0; and why it stopped.
    """
    state = start if isinstance(start, JointIteration) else None
    levels = state.levels if state is not None else start
    assert isinstance(levels, Levels)
    counted = options.counted(len(counts))
    products = tokens.products(levels.Y[0])
    if state is None:
        levels = fit_features(levels, products, counts, counted)
        state = JointIteration(levels, (joint_loss(levels, products, counted, tokens.squared_norm),), 0)
    rounding = 8 * torch.finfo(tokens.dtype).eps * tokens.squared_norm * len(counted)
    while (stop_reason := _stop(state, options, rounding)) is None:
        loss, rejected = state.losses[-1], state.rejected
        for _ in range(_ROUNDS):
            candidate = _round(state.levels, products, counted)
            reached = joint_loss(candidate, products, counted, tokens.squared_norm)
            if not reached <= loss:
                rejected += 1
                break
            gain, loss = loss - reached, reached
            state = JointIteration(candidate, state.losses, rejected)
            if gain <= _ROUND_GAIN * loss:
                break
        candidate = state.levels.with_coefficients(0, _descend_tokens(tokens, state.levels, counted))
        new_products = tokens.products(candidate.Y[0])
        reached = joint_loss(candidate, new_products, counted, tokens.squared_norm)
        if reached <= loss:
            levels, products, loss = candidate, new_products, reached
        else:
            levels, rejected = state.levels, rejected + 1
        state = JointIteration(levels, (*state.losses, loss), rejected)
        if callback is not None and callback(state):
            stop_reason = StopReason.CALLBACK
            break
    rest = [level for level in range(len(counts)) if level not in counted]
    levels = fit_features(state.levels, products, counts, rest)
    return JointIteration(levels, state.losses, state.rejected), products, stop_reason


def joint_loss(
    levels: Levels,
    products: Products,
    counted: Sequence[int],
    squared_norm: float,
    scale: Tensor | None = None,
) -> float:
    """``Σ_l ‖A − Z_l C_l‖²`` over the counted levels; with a scale ``[d]``, in the units that it multiplies into."""
    total = 0.0
    for level in counted:
        Z, (AYt, YYt) = levels.Z[level], products.at(levels.path(0, level))
        if scale is not None:
            Z, AYt = Z.scaled_rows(scale), AYt * scale
        total += squared_norm + _features_loss(Z, AYt, YYt)
    return max(total, 0.0)


def fit_features(levels: Levels, products: Products, counts: Sequence[int], which: Sequence[int]) -> Levels:
    """Fits Z of the levels in ``which`` to their coefficients.

    Column descent from the features that are there and from winner-take-all of the least-squares solution; the better.
    """
    for level in which:
        AYt, YYt = products.at(levels.path(0, level))
        norms = torch.diagonal(YYt).sqrt()
        norms = torch.where(norms > 0, norms, 1)
        solved, info = ops.ridge_solve((YYt / norms / norms[:, None])[None], (AYt / norms[:, None])[None])
        starts = [levels.Z[level]]
        if not int(info[0]):
            starts.append(ops.winner_take_all((solved[0] / norms[:, None]).T, counts[level]))
        fitted = [ops.column_descent(Z, AYt, YYt, sweeps=_OWN_SWEEPS) for Z in starts]
        levels = levels.with_features(level, min(fitted, key=lambda Z: _features_loss(Z, AYt, YYt)))
    return levels


def _features_loss(Z: SparseColumns, AYt: Tensor, YYt: Tensor) -> float:
    """``‖A − Z Y‖² − ‖A‖²``."""
    return float((_gram(Z) * YYt).sum() - 2 * (Z.gather(AYt) * Z.values).sum())


def _gram(Z: SparseColumns) -> Tensor:
    return ops.sparse_product(Z, Z.to_dense())


def _stop(state: JointIteration, options: JointOptions, rounding: float) -> StopReason | None:
    n_iter = len(state.losses) - 1
    if state.losses[-1] <= rounding:
        return StopReason.EXACT
    # The last iteration that took the loss below what counted before it.
    reference, last = state.losses[0], 0
    for i, loss in enumerate(state.losses):
        if loss <= reference * (1 - options.tol) and loss < reference:
            reference, last = loss, i
    if n_iter - last >= options.patience:
        return StopReason.CONVERGED
    return StopReason.MAX_ITER if n_iter >= options.max_iter else None


def _round(levels: Levels, products: Products, counted: Sequence[int]) -> Levels:
    """Every block but Y_0 once, from the top."""
    for level in reversed(range(len(levels.Z))):
        if level in counted:
            AYt, YYt = products.at(levels.path(0, level))
            Z = ops.column_descent(levels.Z[level], AYt, YYt, sweeps=_COLUMN_SWEEPS)
            levels = levels.with_features(level, Z)
        if level:
            levels = levels.with_coefficients(level, _descend_rows(levels, level, products, counted))
    return levels


def _descend_rows(levels: Levels, level: int, products: Products, counted: Sequence[int]) -> Tensor:
    """The step for ``Y_level``, level >= 1."""
    below = levels.path(0, level - 1)
    S = below @ products.YYt @ below.T
    P, R = torch.zeros_like(levels.Y[level] @ levels.Y[level].T), torch.zeros_like(levels.Y[level])
    AYt = products.AYt.T
    for above in counted:
        if above >= level:
            path = levels.path(level, above)
            P += path.T @ _gram(levels.Z[above]) @ path
            R += path.T @ ops.sparse_product(levels.Z[above], AYt) @ below.T
    Y = levels.Y[level].clone()
    diagonal = torch.diagonal(P)
    for start in range(0, len(Y), _ROWS):
        rows = slice(start, start + _ROWS)
        used = (diagonal[rows] > 0)[:, None]
        downhill = R[rows] - P[rows] @ Y @ S
        towards = downhill / torch.where(used, diagonal[rows, None], 1) + Y[rows] @ S
        solved = ops.coordinate_descent(Y[rows].T, towards.T, S, sweeps=_ROW_SWEEPS).T
        step = torch.where(used, solved - Y[rows], 0)
        curvature = float((P[rows, rows] * (step @ S @ step.T)).sum())
        gain = float((downhill * step).sum())
        if gain > 0:
            Y[rows] += step * min(1.0, gain / curvature if curvature > 0 else 1.0)
    return Y.clamp_(min=0)


def _descend_tokens(tokens: Tokens, levels: Levels, counted: Sequence[int]) -> Tensor:
    """The step for ``Y_0``."""
    paths = {level: levels.path(0, level) for level in counted}
    P = torch.stack([path.T @ _gram(levels.Z[level]) @ path for level, path in paths.items()]).sum(0)
    P = P.to(tokens.dtype)
    Y = torch.empty_like(levels.Y[0])
    for block in tokens.blocks():
        R = torch.zeros_like(Y[:, block])
        for level, path in paths.items():
            R += path.T.to(tokens.dtype) @ tokens.features_product(levels.Z[level], block)
        Y[:, block] = ops.coordinate_descent(levels.Y[0][:, block], R, P, sweeps=_TOKEN_SWEEPS)
    return Y
