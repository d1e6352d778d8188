"""The iterations of ``fit``: the paper's, and the fast ones. Both see the data through products with it only.

No iteration waits for its device: what it computes stays there, and a :class:`Monitor` reads the losses. On a CPU that
is at once; on a GPU some iterations late, while later ones are running.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ._backends import Kernels
from ._data import precise_dtype
from ._monitor import Monitor
from ._problem import Problem
from ._scope import interruptible
from ._steps import Steps
from .reference import cholesky_by_ladder, escalated_ridge, short_parts
from .sparse import PassResult, SparseColumns

EPS = 1e-6  # the paper's constant in the denominator of the multiplicative update

# The fast iterations, decided by benchmarks/defaults: the paper's step for Z explores until an iteration gains less
# than this share of the loss, at most so often: by the start, since one that says little of the features gains for
# longer, and the columns that it leads to are worse for every iteration less.
EXPLORE_GAIN = 2e-3
EXPLORE_MOST = {"kmeans": 6, "svd": 12, "random": 12, "given": 12}
# Sweeps of column descent for each fresh A Yᵀ: they cost nothing in n. Of a GPU one multiprocessor does them, and five
# gain 93 to 100 % of what ten do (four layers of two models, k = 100). Fits of six layers then end 0.9 % below to 0.4 %
# above (k = 100; of five of them, k = 400).
COLUMN_SWEEPS, GPU_COLUMN_SWEEPS = 10, 5
# With refit="late", columns are chosen anew until the loss is this share below what exploring reached: enough to be
# below the paper's solver, whose optimum exploring comes near, and no more, since every choice drifts towards loud
# neurons. It is a limit for choosing, not a place to stop: one choice alone often lowers the loss by more (by 2 % at
# k = 100, 8 % at 400, 30 % at 1,000), and refits on the supports that it found go on until they gain nothing.
LATE_GAIN = 0.025
# Iterations on a frozen support for each one that may change it.
FROZEN = 2
# Coordinate descent leaves tokens alone once a sweep changes them by less than this share.
SWEEP_TOL = 1e-3
# At the end Y is swept on the best Z until a sweep changes tokens by less than this share, at most so many times: from
# the best Y itself, where keeping a copy costs no more than so many entries (1 MB in float32).
FINAL_TOL, FINAL_SWEEPS = 1e-3, 100
SMALL_Y = 1 << 18
# Where the last Y belongs to another Z, a loss above the best one shows that it is not swept enough: again, to a
# smaller change, at most so often.
FINAL_ROUNDS = 8
# With refit=False, losses that end this share above the best one do not converge: they go on from there by steps that
# never raise the loss. (On six layers of two models they end within 0.1 %.)
DIVERGED = 0.01
# So many larger ridges are tried where rounding has left Y Yᵀ without a Cholesky factor. Rounding takes a few times
# k eps off its eigenvalues, and the largest ridge is 1e7 eps.
RIDGE_ESCALATIONS = 8
# Entries of the right-hand sides that are solved at a time: at least so many, or this share of those of A, so
# that they are small beside it.
_SOLVE_ELEMENTS, _SOLVE_SHARE = 1 << 17, 0.01
# A row of Y of which the others leave less than this share of its square depends on them too nearly for a factor
# rounded to float32.
_NEARLY_DEPENDENT = 1e-2
# Rows of a triangular matrix that are multiplied at a time, up to its diagonal.
_FACTOR_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a fit begins.

    Attributes:
        Y: coefficients ``[k, n]``.
        Z: the free features that Y belongs to, in scaled units, ``count`` entries each. None: a first step makes them.
    """

    Y: Tensor
    Z: SparseColumns | None = None


class Iterations(Protocol):
    """The state of a fit between its iterations."""

    monitor: Monitor

    def factors(self) -> tuple[SparseColumns, Tensor]:
        """All features and the coefficients now, in scaled units."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which ``restore`` goes on to the same bits."""

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Goes on from a ``state``."""

    def advance(self) -> None:
        """One iteration more."""

    def finish(self) -> tuple[SparseColumns, Tensor, PassResult]:
        """The best Z and Y, and a pass that measured them; after the last iteration."""


class PaperIterations:
    """The paper's five steps (see ``fit``), the loss from Gram matrices."""

    def __init__(self, problem: Problem, start: Start, monitor: Monitor, sweeps: int, steps: Steps) -> None:
        self.monitor = monitor
        self._problem, self._sweeps, self._steps = problem, sweeps, steps
        Y = start.Y
        self._state = steps.state(Y=Y, YYt=problem.data.gram_of_coefficients(Y))
        self._best = _Best(Y, problem.data.kernels)
        self._spare: Tensor | None = None
        if start.Z is not None:
            _, loss = problem.measure(start.Z, Y)
            self._best.copy(self._best.improves(loss), start.Z, Y)
            monitor.start_from(float(loss))

    def advance(self) -> None:
        """One iteration."""
        self._steps.run("mu", self._iterate)
        self.monitor.add(self._state.loss)

    def _iterate(self) -> None:
        problem, state = self._problem, self._state
        data, kernels = problem.data, problem.data.kernels
        AYt = data.times_coefficients(state.Y) if state.AYt is None else state.AYt.clone()
        norms = row_norms(state.YYt)
        dense = least_squares_(AYt, state.YYt, problem, deferred=self._steps.deferred)
        Z = kernels.winner_take_all(dense.T, problem.count)
        del AYt, dense
        Z = Z.scaled_columns(norms)
        ZtZ = problem.gram(Z)
        Y = self._target()
        result = data.coefficient_pass(
            Z, ZtZ, state.Y, self._sweeps, out=Y, row_scale=1 / norms, multiplicative=True, eps=EPS,
            products="all" if self._steps.deferred else None,
        )  # fmt: skip
        YYt = data.gram_of_coefficients(Y)
        loss = problem.loss(result, ZtZ, YYt)
        better = self._best.improves(loss)
        if self._steps.deferred:
            self._best.copy(better, Z, Y)
        elif bool(better):
            self._spare = self._best.Y
            self._best.Z, self._best.Y = Z, Y
        state.update(Y=Y, YYt=YYt, AYt=result.AYt, Z=Z, loss=loss)

    def factors(self) -> tuple[SparseColumns, Tensor]:
        """All features and the coefficients now, in scaled units."""
        return self._state.features(), self._state.Y

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which ``restore`` goes on to the same bits."""
        # Copies, for a file keeps no tensor twice, and the best features may be the last ones.
        tensors = self._state.tensors()
        best = {
            name: value if name == "best_Y" else value.clone() for name, value in self._best.tensors().items()
        }
        shared = not self._steps.deferred and self._best.Y is self._state.Y
        if shared:
            del best["best_Y"]
        return tensors | best, {"shared": shared}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Goes on from a ``state``."""
        self._state.restore(tensors, self._problem.data.d)
        self._best.restore(tensors, self._problem.data.d)
        if numbers["shared"]:
            self._best.Y = self._state.Y

    def _target(self) -> Tensor:
        """Where the next Y may be written. The best one must survive; it is not copied where that can be helped."""
        Y = self._state.Y
        if self._steps.deferred or self._best.Y is not Y:
            return Y
        spare, self._spare = self._spare, None
        return torch.empty_like(Y) if spare is None else spare

    def finish(self) -> tuple[SparseColumns, Tensor, PassResult]:
        """The best pair, and a pass that measures it."""
        self.monitor.finish()
        Z, Y = self._best.Z, self._best.Y
        assert Z is not None  # the first loss is finite, so below infinity
        assert Y is not None
        data = self._problem.data
        return Z, Y, data.coefficient_pass(Z, self._problem.gram(Z), Y, 0, out=Y, residual=True)


class FastIterations:
    """Coordinate descent over Y, in place, and three kinds of steps for Z.

    *explore*: the paper's least squares and winner-take-all. It finds supports, but may raise the loss. *choose*:
    column descent, which never does, then least squares of each neuron on its support. *frozen*: the latter only, from
    those entries of A Yᵀ that the pass before gave, so that a CPU needs no dense product with A.

    Rows of Y are taken at unit norm throughout the steps for Z, so that a ridge means the same for each of them. These
    steps see the residual and the penalty l2, but not l1, whose minimiser would shrink whole columns; a fit with l1 may
    therefore rise a little between its best iterations.
    """

    def __init__(
        self,
        problem: Problem,
        start: Start,
        monitor: Monitor,
        sweeps: int,
        refit: bool | str,
        steps: Steps,
        *,
        init: str,
    ) -> None:
        self.monitor = monitor
        self._problem, self._sweeps, self._steps = problem, sweeps, steps
        Y = start.Y
        self._state = steps.state(Y=Y, YYt=problem.data.gram_of_coefficients(Y))
        self._best = _Best(Y, problem.data.kernels)
        # Which features a token uses cannot be found again from Z, as the optimum over all of them can.
        self._selects = 0 < problem.max_active < len(Y)
        self._keeps_Y = self._selects or Y.numel() <= SMALL_Y
        # Whether losses are taken from residuals, which cost a product with A.
        self._from_residuals = False
        if start.Z is not None:
            result, loss = problem.measure(
                problem.all_features(start.Z), Y, products="all" if steps.deferred else "kept"
            )
            self._best.copy(self._best.improves(loss), start.Z, Y if self._keeps_Y else None)
            self._state.update(AYt=result.AYt, Z=start.Z, loss=loss)
            monitor.start_from(float(loss))
        self._schedule = _Schedule(refit, EXPLORE_MOST[init], monitor, continues=start.Z is not None)

    def advance(self) -> None:
        """One iteration."""
        step = self._schedule.next(may_freeze=self._state.AYt is not None)
        products = "all" if self._steps.deferred else "kept" if self._schedule.may_freeze else None
        self._steps.run(f"{step} {self._from_residuals}", lambda: self._iterate(step, products))
        self.monitor.add(self._state.loss)
        self._from_residuals = self._from_residuals or self.monitor.unresolved()

    def _iterate(self, step: str, products: str | None) -> None:
        problem, state = self._problem, self._state
        if step in ("return", "sweep"):
            Z = state.features()
            if step == "return":
                assert self._best.Z is not None
                Z = self._best.Z.copied()
                if self._best.Y is None:
                    state.Y.zero_()  # the last one belongs to other features
                else:
                    state.Y.copy_(self._best.Y)
            self._update_coefficients(Z, torch.ones_like(state.YYt[0]), products)
            return
        norms = row_norms(state.YYt)
        norms[: problem.n_fixed] = 1
        free = norms[problem.n_fixed :]
        G = problem.penalised(state.YYt / (norms[:, None] * norms))
        G_free = G[problem.n_fixed :, problem.n_fixed :]
        if step == "frozen":
            Z = state.features().scaled_columns(free)
            Z = refit_on_support(Z, self._kept_products(Z, G, norms), G_free, problem)
        else:
            AYt = self._free_products(G, norms)
            if step == "explore":
                dense = least_squares_(AYt, G_free, problem, deferred=self._steps.deferred)
                Z = problem.data.kernels.winner_take_all(dense.T, problem.count)
                del dense
            else:
                Z = state.features().scaled_columns(free)
                sweeps = GPU_COLUMN_SWEEPS if AYt.is_cuda else COLUMN_SWEEPS
                Z = problem.data.kernels.column_descent(Z, AYt, G_free, sweeps)
                Z = refit_on_support(Z, Z.gather(AYt), G_free, problem)
            del AYt
        self._update_coefficients(Z, norms, products)

    def _update_coefficients(self, Z: SparseColumns, norms: Tensor, products: str | None) -> None:
        problem, Y = self._problem, self._state.Y
        features = problem.all_features(Z)
        ZtZ = problem.gram(features)
        result = problem.update_coefficients(
            features, ZtZ, Y, self._sweeps, out=Y, row_scale=1 / norms, tol=SWEEP_TOL, products=products
        )
        YYt = problem.data.gram_of_coefficients(Y)
        loss = self._loss(result, features, ZtZ, Y, YYt)
        self._best.copy(self._best.improves(loss), Z, Y if self._keeps_Y else None)
        self._state.update(YYt=YYt, AYt=result.AYt, Z=Z, loss=loss)

    def _loss(
        self, result: PassResult, features: SparseColumns, ZtZ: Tensor, Y: Tensor, YYt: Tensor
    ) -> Tensor:
        if self._from_residuals:
            return self._problem.loss_of_residual(features, ZtZ, Y, YYt)
        return self._problem.loss(result, ZtZ, YYt)

    def factors(self) -> tuple[SparseColumns, Tensor]:
        """All features and the coefficients now, in scaled units."""
        return self._problem.all_features(self._state.features()), self._state.Y

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which ``restore`` goes on to the same bits."""
        numbers = {"from_residuals": self._from_residuals, "schedule": self._schedule.state()}
        return self._state.tensors() | self._best.tensors(), numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Goes on from a ``state``."""
        self._state.restore(tensors, self._problem.data.d)
        self._best.restore(tensors, self._problem.data.d)
        self._from_residuals = numbers["from_residuals"]
        self._schedule.restore(numbers["schedule"])

    def _free_products(self, G: Tensor, norms: Tensor) -> Tensor:
        """``(A Yᵀ)ᵀ`` of the free features, for rows of Y at unit norm, less what fixed features take of it."""
        state, fixed = self._state, self._problem.fixed
        if self._steps.deferred and state.AYt is not None:
            AYt = state.AYt / norms[:, None]
        else:
            AYt = self._problem.data.times_coefficients(state.Y).div_(norms[:, None])
        AYt = AYt[self._problem.n_fixed :]
        if fixed is not None:
            AYt -= _fixed_part(fixed, G)
        return AYt

    def _kept_products(self, Z: SparseColumns, G: Tensor, norms: Tensor) -> Tensor:
        """The entries of :meth:`_free_products` that Z keeps, from the pass before."""
        if self._steps.deferred:
            return Z.gather(self._free_products(G, norms))
        assert self._state.AYt is not None
        kept = (self._state.AYt / norms[:, None])[self._problem.n_fixed :, : self._problem.count]
        fixed = self._problem.fixed
        return kept if fixed is None else kept - Z.gather(_fixed_part(fixed, G))

    def finish(self) -> tuple[SparseColumns, Tensor, PassResult]:
        """The best Z, the optimal Y on it, and the pass that measured them."""
        self.monitor.finish()
        problem, best = self._problem, self._best
        assert best.Z is not None
        features = problem.all_features(best.Z)
        ZtZ = problem.gram(features)
        # Coordinate descent never raises the loss: from the best Y, the result is no worse than the best iterate.
        Y, tol = (self._state.Y if best.Y is None else best.Y), FINAL_TOL
        for _ in range(FINAL_ROUNDS):
            result = problem.update_coefficients(
                features, ZtZ, Y, 0 if self._selects else FINAL_SWEEPS, out=Y, tol=tol, residual=True
            )
            loss = self._loss(result, features, ZtZ, Y, problem.data.gram_of_coefficients(Y))
            if best.Y is not None or not bool(loss > best.loss * (1 + 1e-6)):
                break
            tol /= 8
        self.monitor.add_final(loss)
        return features, Y, result


class _Best:
    """The smallest loss so far, and the factors that have it."""

    def __init__(self, Y: Tensor, kernels: Kernels) -> None:
        self._copy_if = kernels.copy_if
        self.Z: SparseColumns | None = None
        self.Y: Tensor | None = None
        self.loss = torch.full((), math.inf, dtype=precise_dtype(Y.device), device=Y.device)

    def improves(self, loss: Tensor) -> Tensor:
        """Whether a loss is the smallest so far, which it is from now on: a bool without dimensions."""
        better = loss < self.loss
        self.loss.copy_(torch.minimum(self.loss, loss))
        return better

    def copy(self, better: Tensor, Z: SparseColumns, Y: Tensor | None) -> None:
        """Keeps copies of these factors if ``better``."""
        if self.Z is None:
            self.Z = Z.copied()
            self.Y = None if Y is None else Y.clone()
            return
        self._copy_if(better, Z.indices, self.Z.indices)
        self._copy_if(better, Z.values, self.Z.values)
        if Y is not None and self.Y is not None:
            self._copy_if(better, Y, self.Y)

    def tensors(self) -> dict[str, Tensor]:
        """What ``restore`` needs."""
        tensors = {"best_loss": self.loss}
        if self.Z is not None:
            tensors |= {"best_indices": self.Z.indices, "best_values": self.Z.values}
        if self.Y is not None:
            tensors["best_Y"] = self.Y
        return tensors

    def restore(self, tensors: dict[str, Tensor], d: int) -> None:
        """Goes on from ``tensors``."""
        self.loss.copy_(tensors["best_loss"])
        self.Z = SparseColumns(tensors["best_indices"], tensors["best_values"], d)
        self.Y = tensors.get("best_Y")


class _Schedule:
    """Which step for Z comes next.

    Args:
        refit, explore_most: as for ``FastIterations``.
        monitor: knows the losses.
        continues: whether the fit begins at given features, which no step shall make worse.
    """

    _KEPT = ("_refit", "_explored", "_frozen", "_target", "_special", "_refits_first")

    def __init__(self, refit: bool | str, explore_most: int, monitor: Monitor, *, continues: bool) -> None:
        self._refit, self._explore_most, self._monitor = refit, explore_most, monitor
        self._explored = self._frozen = 0
        # The loss below which the support stays as it is, once exploring is over.
        self._target: float | None = None
        # A step that comes before all others.
        self._special: str | None = None
        if continues and refit is False:
            self._special = "sweep"
        elif continues:
            # The values of given features are solved anew before any column is chosen anew.
            self._target = -math.inf
        self._refits_first = continues
        monitor.on_stall = self._leave_exploring

    def next(self, may_freeze: bool) -> str:
        """``"explore"``, ``"choose"``, ``"frozen"``; for Y alone ``"sweep"``, or ``"return"`` to the best Z."""
        if self._special is not None:
            step, self._special = self._special, None
            return step
        if self._explores():
            self._explored += 1
            return "explore"
        if self._target is None:
            self._monitor.restart_patience()
            self._begin_choosing()
        elif may_freeze and (self._frozen < FROZEN or self._monitor.best <= self._target):
            self._frozen += 1
            return "frozen"
        if self._refits_first:
            self._refits_first = False
            self._begin_choosing()
        self._frozen = 0
        return "choose"

    @property
    def may_freeze(self) -> bool:
        """Whether the step after the coming pass may be a frozen one."""
        return self._target is not None and (self._frozen < FROZEN or self._refit == "late")

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on."""
        return {name: getattr(self, name) for name in self._KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a ``state``."""
        for name in self._KEPT:
            setattr(self, name, state[name])

    def _begin_choosing(self) -> None:
        self._target = self._monitor.best * (1 - LATE_GAIN) if self._refit == "late" else -math.inf

    def _leave_exploring(self) -> bool:
        """Where exploring has ended far above its best: from now on steps that never raise the loss, from there."""
        losses, best = self._monitor.losses, self._monitor.best
        if self._refit is not False or not losses[-1] > (1 + DIVERGED) * best:
            return False
        self._refit, self._special = True, "return"
        self._monitor.restart_patience()
        return True

    def _explores(self) -> bool:
        if self._refit is False or (not self._explored and self._target is None):
            return True
        if self._refit is True or self._target is not None:
            return False
        return self._explored < self._explore_most and self._monitor.gain >= EXPLORE_GAIN


def refit_on_support(Z: SparseColumns, AYt_kept: Tensor, YYt: Tensor, problem: Problem) -> SparseColumns:
    """The least-squares values of each neuron on the features that keep it; ``AYt_kept [k, count]`` as Z.values.

    In float64 where there is one. A neuron whose system is singular to working precision keeps its values.
    """
    precise = precise_dtype(YYt.device)
    supports, order = Z.supports()
    solved, info = problem.data.kernels.support_solve(
        YYt.to(precise), supports, AYt_kept.flatten()[order].to(precise), problem.ridge
    )
    # Told how many there are, a GPU need not be asked.
    failed = (info > 0).repeat_interleave(supports.offsets.diff(), output_size=len(order))
    values = torch.empty_like(Z.values).flatten()
    values[order] = torch.where(failed, Z.values.flatten()[order], solved.to(values.dtype))
    return SparseColumns(Z.indices, values.view_as(Z.values), Z.d)


def least_squares_(AYt: Tensor, YYt: Tensor, problem: Problem, *, deferred: bool) -> Tensor:
    """``(Y Yᵀ + ridge·I)⁻¹ (A Yᵀ)ᵀ`` as ``[k, d]`` in place of ``AYt``, by factors in float64 where there is one.

    Where rounding has left ``Y Yᵀ + ridge·I`` without a Cholesky factor (two features with the same
    coefficients, say), the ridge is raised tenfold until it has one. What is not finite stays so, as NaN.
    Where steps are ``deferred``, nothing is asked of the device.
    """
    G = YYt.to(precise_dtype(YYt.device))[None]
    ladder = problem.ridge, RIDGE_ESCALATIONS, torch.finfo(YYt.dtype).eps
    k, d = AYt.shape
    # As wide as the system at least, so that what is done once for each block is the lesser part.
    width = max(k, max(_SOLVE_ELEMENTS, int(_SOLVE_SHARE * d * problem.data.n)) // k + 1)
    blocks = [AYt[:, start : start + width] for start in range(0, d, width)]
    if deferred:
        _solve_without_waiting_(blocks, G, problem.data.kernels, *ladder)
    else:
        _solve_by_inverse_factor_(blocks, G, *ladder)
    return AYt


def _solve_by_inverse_factor_(
    blocks: list[Tensor], G: Tensor, ridge: float, escalations: int, floor: float
) -> None:
    """``G⁻¹ = WᵀW`` with the inverse W of the Cholesky factor, rounded to the blocks' dtype: two products.

    They are faster than solves in float64. Rounding W changes X by about eps over the least share of a row of Y that
    those before it leave; where that is next to nothing, the solves are in float64 after all.
    """
    factor, info = cholesky_by_ladder(G, ridge, escalations, floor)
    if int(info) > 0:
        for block in blocks:
            block.fill_(torch.nan)
        return
    # Squares of what is left of each row of Y beside those before it, and of the rows.
    left, whole = torch.diagonal(factor[0]).square(), torch.diagonal(G[0])
    if bool((left < _NEARLY_DEPENDENT * whole).any()):
        k = G.shape[-1]
        for block in blocks:
            for columns in short_parts(block.shape[1], k * k, G.device):
                part = block[:, columns]
                part.copy_(torch.cholesky_solve(part.to(G.dtype), factor[0]))
        return
    inverse = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    interruptible(
        len(inverse), lambda: torch.linalg.solve_triangular(factor[0], inverse, upper=False, out=inverse)
    )
    # Finite in any dtype: where Y is zero, G is next to nothing and the products are zero.
    largest = torch.finfo(blocks[0].dtype).max
    inverse = inverse.clamp_(-largest, largest).to(blocks[0].dtype)
    starts = range(0, len(inverse), _FACTOR_BLOCK)
    for block in blocks:
        middle = torch.empty_like(block)
        for start in starts:
            rows, end = slice(start, start + _FACTOR_BLOCK), start + _FACTOR_BLOCK
            torch.mm(inverse[rows, :end], block[:end], out=middle[rows])
        for start in starts:
            rows = slice(start, start + _FACTOR_BLOCK)
            torch.mm(inverse[start:, rows].T, middle[start:], out=block[rows])


def _solve_without_waiting_(
    blocks: list[Tensor], G: Tensor, kernels: Kernels, ridge: float, escalations: int, floor: float
) -> None:
    """``ridge_solve`` of each block, which asks a GPU for nothing."""
    ladder = ridge, escalations, floor
    for block in blocks:
        X, info = kernels.ridge_solve(G, block.to(G.dtype)[None], *ladder)
        block.copy_(X[0])
        if block is blocks[0] and len(blocks) > 1:
            # All blocks fail alike: the others begin with the ridge that served the first.
            served = escalated_ridge(G, ridge, floor, (-info).clamp(min=0))
            G = G + served[:, None, None] * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
            ladder = 0.0, 0, 0.0


def _fixed_part(fixed: SparseColumns, G: Tensor) -> Tensor:
    """What fixed features take of ``A Yᵀ``: ``(Z_fixed G[fixed, free])ᵀ``, ``[k - n_fixed, d]``."""
    return G[fixed.k :, : fixed.k] @ fixed.to_dense().T


def row_norms(YYt: Tensor) -> Tensor:
    """Norms of the rows of Y; 1 for a row of zeros."""
    norms = torch.diagonal(YYt).sqrt()
    return torch.where(norms > 0, norms, 1)
