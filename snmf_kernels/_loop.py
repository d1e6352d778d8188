"""The iterations of ``fit``: the paper's, and the fast ones. Both see the data through products with it only."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._checks import dtype_name
from ._data import precise_dtype, relative
from ._problem import Problem
from .factorization import StopReason
from .sparse import PassResult, SparseColumns

logger = logging.getLogger(__name__)

EPS = 1e-6  # the paper's constant in the denominator of the multiplicative update

# The fast iterations, decided by benchmarks/defaults: the paper's step for Z explores until an iteration gains less
# than this share of the loss, at most so often.
EXPLORE_GAIN, EXPLORE_MOST = 2e-3, 12
# Sweeps of column descent for each fresh A Yᵀ: they cost nothing in n.
COLUMN_SWEEPS = 10
# With refit="late", columns are chosen anew only until the loss is this share below what exploring reached: enough to
# be below the paper's solver, whose optimum exploring comes near, and no more, since every choice drifts towards loud
# neurons.
LATE_GAIN = 0.025
# Iterations on a frozen support for each one that may change it.
FROZEN = 2
# Coordinate descent leaves tokens alone once a sweep changes them by less than this share.
SWEEP_TOL = 1e-3
# The last Y is the optimum on the last Z to this KKT residual, in at most so many sweeps.
FINAL_TOL, FINAL_SWEEPS = 1e-3, 100
# Entries of the float64 right-hand sides that are solved at a time: at least so many, or this share of those of A, so
# that they are small beside it.
_SOLVE_ELEMENTS, _SOLVE_SHARE = 1 << 17, 0.01


@dataclasses.dataclass(frozen=True)
class IterationState:
    """What a callback of ``fit`` is told after each iteration.

    Attributes:
        n_iter: iterations done, from 1.
        max_iter: the bound on them.
        loss: the objective, as in ``Factorization.loss_history``.
        relative_error: the same divided by the squared norm of the (scaled) data.
        best_relative_error: the smallest so far.
    """

    n_iter: int
    max_iter: int
    loss: float
    relative_error: float
    best_relative_error: float


Callback = Callable[[IterationState], Any]


class Monitor:
    """The losses so far, the best one, and whether to stop."""

    def __init__(
        self,
        squared_norm: float,
        dtype: torch.dtype,
        max_iter: int,
        tol: float,
        patience: int,
        callbacks: Iterable[Callback],
    ) -> None:
        self.losses: list[float] = []
        self.n_iter = 0
        self.best = math.inf
        self.stop_reason: StopReason | None = None
        self._squared_norm, self._dtype = squared_norm, dtype
        self._max_iter, self._tol, self._patience = max_iter, tol, patience
        self._callbacks = tuple(callbacks)
        # The loss is a difference of sums of this size, which are float64 sums of entries in the working dtype.
        self._rounding = 8 * torch.finfo(dtype).eps * squared_norm
        self._reference, self._stale = math.inf, 0

    @property
    def gain(self) -> float:
        """By which share the last iteration lowered the loss (0 if it did not)."""
        if len(self.losses) < 2:
            return math.inf
        before, now = self.losses[-2:]
        return max(0.0, (before - now) / before) if before > 0 else 0.0

    def add(self, loss: float) -> bool:
        """Takes note of an iteration's loss; whether it is the best so far. Sets ``stop_reason`` when it is time."""
        if not math.isfinite(loss):
            raise too_large(self._dtype)
        loss = max(loss, 0.0)
        self.losses.append(loss)
        best = loss < self.best
        self.best = min(self.best, loss)
        if loss <= self._reference * (1 - self._tol) and loss < self._reference:
            self._reference, self._stale = loss, 0
        else:
            self._stale += 1
        self.n_iter += 1
        state = IterationState(
            self.n_iter,
            self._max_iter,
            loss,
            relative(loss, self._squared_norm),
            relative(self.best, self._squared_norm),
        )
        # Every callback is told, also after one has asked to stop.
        asked = [bool(callback(state)) for callback in self._callbacks]
        if any(asked):
            self.stop_reason = StopReason.CALLBACK
        elif self.best <= self._rounding:
            self.stop_reason = StopReason.EXACT
        elif self._stale >= self._patience:
            self.stop_reason = StopReason.CONVERGED
        elif self.n_iter >= self._max_iter:
            self.stop_reason = StopReason.MAX_ITER
        return best

    def add_final(self, loss: float) -> None:
        """Takes note of the loss after the last sweeps over Y, which no iteration belongs to."""
        self.losses.append(max(loss, 0.0))

    def restart_patience(self) -> None:
        """Another phase begins: what the last one failed to gain does not count."""
        self._stale = 0


def paper_iterations(
    problem: Problem, Y: Tensor, monitor: Monitor, sweeps: int
) -> tuple[SparseColumns, Tensor, PassResult]:
    """The paper's five steps (see ``fit``), the loss from Gram matrices; the best pair, and a pass that measures it."""
    data, kernels = problem.data, problem.data.kernels
    best: tuple[SparseColumns, Tensor] | None = None
    spare: Tensor | None = None
    YYt = data.gram_of_coefficients(Y)
    while monitor.stop_reason is None:
        AYt = data.times_coefficients(Y)
        norms = row_norms(YYt)
        dense = least_squares_(AYt, YYt, problem)
        Z = kernels.winner_take_all(dense.T, problem.count)
        del AYt, dense
        Z = Z.scaled_columns(norms)
        ZtZ = problem.gram(Z)
        # The best Y must survive; any other buffer may be written over.
        target = Y if best is None or best[1] is not Y else spare
        target = torch.empty_like(Y) if target is None else target
        result = data.coefficient_pass(
            Z, ZtZ, Y, sweeps, out=target, row_scale=1 / norms, multiplicative=True, eps=EPS
        )
        spare, Y = (Y if target is not Y else spare), target
        YYt = data.gram_of_coefficients(Y)
        if monitor.add(problem.objective(result, ZtZ, YYt)):
            if best is not None and best[1] is not Y:
                spare = best[1]
            best = (Z, Y)
    assert best is not None  # the first loss is finite, so below infinity
    Z, Y = best
    return Z, Y, data.coefficient_pass(Z, problem.gram(Z), Y, 0, out=Y, residual=True)


def fast_iterations(
    problem: Problem, Y: Tensor, monitor: Monitor, sweeps: int, refit: bool | str
) -> tuple[SparseColumns, Tensor, PassResult]:
    """Coordinate descent over Y, in place, and three kinds of steps for Z; the last pass, on the best Z.

    *explore*: the paper's least squares and winner-take-all. It finds supports, but may raise the loss. *choose*:
    column descent, which never does, then least squares of each neuron on its support. *frozen*: the latter only, from
    those entries of A Yᵀ that the pass before gave, so that there is no dense product with A.

    Rows of Y are taken at unit norm throughout the steps for Z, so that a ridge means the same for each of them.
    """
    data, kernels, fixed = problem.data, problem.data.kernels, problem.n_fixed
    steps = _Schedule(refit, monitor)
    Z: SparseColumns | None = None  # free features
    best_Z: SparseColumns | None = None
    best_Y: Tensor | None = None
    kept: Tensor | None = None
    YYt = data.gram_of_coefficients(Y)
    while monitor.stop_reason is None:
        norms = row_norms(YYt)
        norms[:fixed] = 1
        G = YYt / (norms[:, None] * norms)
        step = steps.next(may_freeze=kept is not None)
        if step == "frozen":
            assert Z is not None
            assert kept is not None
            B = (kept / norms[:, None])[fixed:, : problem.count]
            if problem.fixed is not None:
                B = B - Z.gather(_fixed_part(problem.fixed, G))
            Z = refit_on_support(Z.scaled_columns(norms[fixed:]), B, G[fixed:, fixed:], problem)
        else:
            AYt = data.times_coefficients(Y).div_(norms[:, None])[fixed:]
            if problem.fixed is not None:
                AYt -= _fixed_part(problem.fixed, G)
            if step == "explore":
                dense = least_squares_(AYt, G[fixed:, fixed:], problem)
                Z = kernels.winner_take_all(dense.T, problem.count)
                del dense
            else:
                assert Z is not None
                Z = kernels.column_descent(
                    Z.scaled_columns(norms[fixed:]), AYt, G[fixed:, fixed:], COLUMN_SWEEPS
                )
                Z = refit_on_support(Z, Z.gather(AYt), G[fixed:, fixed:], problem)
            del AYt
        features = problem.all_features(Z)
        ZtZ = problem.gram(features)
        result = problem.update_coefficients(
            features,
            ZtZ,
            Y,
            sweeps,
            out=Y,
            row_scale=1 / norms,
            tol=SWEEP_TOL,
            kept_products=steps.may_freeze,
        )
        kept = result.AYt
        YYt = data.gram_of_coefficients(Y)
        if monitor.add(problem.objective(result, ZtZ, YYt)):
            best_Z = Z
            if 0 < problem.max_active < len(Y):
                # Which features a token uses cannot be found again from Z, as the optimum over all of them can.
                best_Y = Y.clone() if best_Y is None else best_Y.copy_(Y)
    assert best_Z is not None
    features = problem.all_features(best_Z)
    ZtZ = problem.gram(features)
    Y, final_sweeps = (Y, FINAL_SWEEPS) if best_Y is None else (best_Y, 0)
    result = problem.update_coefficients(
        features, ZtZ, Y, final_sweeps, out=Y, tol=FINAL_TOL, measure=True, residual=True
    )
    monitor.add_final(problem.objective(result, ZtZ, data.gram_of_coefficients(Y)))
    return features, Y, result


class _Schedule:
    """Which step for Z comes next."""

    def __init__(self, refit: bool | str, monitor: Monitor) -> None:
        self._refit, self._monitor = refit, monitor
        self._explored = self._frozen = 0
        # The loss below which the support stays as it is, once exploring is over.
        self._target: float | None = None

    def next(self, may_freeze: bool) -> str:
        """``"explore"``, ``"choose"`` or ``"frozen"``."""
        if self._explores():
            self._explored += 1
            return "explore"
        if self._target is None:
            self._monitor.restart_patience()
            self._target = self._monitor.best * (1 - LATE_GAIN) if self._refit == "late" else -math.inf
        elif may_freeze and (self._frozen < FROZEN or self._monitor.best <= self._target):
            self._frozen += 1
            return "frozen"
        self._frozen = 0
        return "choose"

    @property
    def may_freeze(self) -> bool:
        """Whether the step after the coming pass may be a frozen one."""
        return self._target is not None and (self._frozen < FROZEN or self._refit == "late")

    def _explores(self) -> bool:
        if self._refit is False or not self._explored:
            return True
        if self._refit is True or self._target is not None:
            return False
        return self._explored < EXPLORE_MOST and self._monitor.gain >= EXPLORE_GAIN


def refit_on_support(Z: SparseColumns, AYt_kept: Tensor, YYt: Tensor, problem: Problem) -> SparseColumns:
    """The least-squares values of each neuron on the features that keep it; ``AYt_kept [k, count]`` as Z.values.

    In float64 where there is one. A neuron whose system is singular to working precision keeps its values.
    """
    precise = precise_dtype(YYt.device)
    supports, order = Z.supports()
    solved, info = problem.data.kernels.support_solve(
        YYt.to(precise), supports, AYt_kept.flatten()[order].to(precise), problem.ridge
    )
    failed = (info != 0).repeat_interleave(supports.offsets.diff())
    values = torch.empty_like(Z.values).flatten()
    values[order] = torch.where(failed, Z.values.flatten()[order], solved.to(values.dtype))
    return SparseColumns(Z.indices, values.view_as(Z.values), Z.d)


def least_squares_(AYt: Tensor, YYt: Tensor, problem: Problem) -> Tensor:
    """``(Y Yᵀ + ridge·I)⁻¹ (A Yᵀ)ᵀ`` as ``[k, d]`` in place of ``AYt``, solved in float64 where there is one.

    Where rounding has left ``Y Yᵀ + ridge·I`` without a Cholesky factor (two features with the same
    coefficients, say), the ridge is raised tenfold until it has one.
    """
    G = YYt.to(precise_dtype(YYt.device))[None]
    info = torch.finfo(YYt.dtype)
    floor = float(info.eps * torch.diagonal(YYt).max().clamp(min=info.tiny))
    if not math.isfinite(floor):
        raise too_large(YYt.dtype)
    ridge = problem.ridge
    k, d = AYt.shape
    # As wide as the system at least, so that factorising it in each block is the lesser part.
    width = max(k, max(_SOLVE_ELEMENTS, int(_SOLVE_SHARE * d * problem.data.n)) // k + 1)
    start = 0
    while start < d:
        neurons = slice(start, start + width)
        X, failed = problem.data.kernels.ridge_solve(G, AYt[:, neurons].to(G.dtype)[None], ridge)
        if int(failed[0]) == 0:
            AYt[:, neurons] = X[0]
            start += width
        else:
            # All blocks fail alike, so this is the first one.
            ridge = max(10 * ridge, floor)
            logger.debug("Y Yᵀ is singular to working precision; ridge raised to %.3g", ridge)
    return AYt


def _fixed_part(fixed: SparseColumns, G: Tensor) -> Tensor:
    """What fixed features take of ``A Yᵀ``: ``(Z_fixed G[fixed, free])ᵀ``, ``[k - n_fixed, d]``."""
    return G[fixed.k :, : fixed.k] @ fixed.to_dense().T


def row_norms(YYt: Tensor) -> Tensor:
    """Norms of the rows of Y; 1 for a row of zeros."""
    norms = torch.diagonal(YYt).sqrt()
    return torch.where(norms > 0, norms, 1)


def too_large(dtype: torch.dtype) -> FloatingPointError:
    """The error for sums that overflow."""
    return FloatingPointError(
        f"the solver's sums are not finite in {dtype_name(dtype)}: the values of A, or of a given "
        "start, are too large; divide them by their largest magnitude, or pass dtype=torch.float64"
    )
