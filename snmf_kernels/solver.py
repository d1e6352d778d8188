"""``fit``: its options, the start, the result. The iterations are in ``_loop``."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _backends, _checks
from ._checkpoint import Checkpoint
from ._checks import FitWarning
from ._data import DataMatrix, as_matrix, as_weights, precise_dtype, relative
from ._loop import FastIterations, Iterations, PaperIterations, Start
from ._monitor import Callback, Monitor
from ._outliers import scale_and_clip
from ._precision import product_precision
from ._problem import Problem, kept_count
from ._progress import Progress
from ._scope import computing
from ._start import fixed_features, start_of
from ._steps import Steps, lag_on
from .factorization import Factorization
from .sparse import PassResult, SparseColumns

logger = logging.getLogger(__name__)

# What an option is where it is not given, by solver; decided by benchmarks/defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "auto": {
        "init": "kmeans",
        "neuron_scale": "rms",
        "token_weights": "clip",
        "refit": "late",
        "sweeps": 10,
        "max_iter": 200,
        "tol": 1e-3,
        "patience": 4,
    },
    # The paper's, but for its 200,000 iterations and its patience of 1,500 with an absolute tolerance.
    "mu": {
        "init": "random",
        "neuron_scale": None,
        "token_weights": None,
        "refit": False,
        "sweeps": 1,
        "max_iter": 1000,
        "tol": 1e-4,
        "patience": 50,
    },
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of one ``fit``; see there."""

    k: int
    keep: float
    solver: str
    refit: bool | str
    sweeps: int
    init: str
    neuron_scale: str | None
    l1: float
    l2: float
    max_active: int | None
    n_fixed: int
    weighted: bool
    clip: bool
    ridge: float
    max_iter: int
    tol: float
    patience: int
    seed: int
    dtype: str
    allow_tf32: bool
    backend: str

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep: wanted a fraction in (0, 1] (0.01 keeps 1 % of the neurons), got {self.keep}"
            )
        if not isinstance(self.refit, bool) and self.refit != "late":
            raise ValueError(f"refit: wanted True, False or 'late', got {self.refit!r}")
        if not isinstance(self.allow_tf32, bool):
            raise TypeError(f"allow_tf32: wanted True or False, got {self.allow_tf32!r}")
        if self.neuron_scale not in (None, "rms"):
            raise ValueError(f"neuron_scale: wanted None or 'rms', got {self.neuron_scale!r}")
        if self.n_fixed >= self.k:
            raise ValueError(
                f"fixed: wanted fewer than k = {self.k} columns, got {self.n_fixed}; for coefficients on given "
                "features alone use Factorization.encode"
            )
        if self.solver == "mu":
            self._only_the_paper()

    def _only_the_paper(self) -> None:
        extra = {
            "refit": self.refit,
            "l1": self.l1,
            "l2": self.l2,
            "max_active": self.max_active,
            "fixed": self.n_fixed,
            "token_weights": self.weighted or self.clip,
        }
        given = [name for name, value in extra.items() if value]
        if given:
            raise ValueError(
                f"{given[0]}: solver='mu' is the paper's iteration, which has no such thing; use solver='auto'"
            )


def fit(
    A: Tensor | np.ndarray,
    k: int,
    *,
    keep: float = 0.01,
    solver: str = "auto",
    refit: bool | str | None = None,
    sweeps: int | None = None,
    init: str | Factorization | tuple[Any, Any] = "auto",
    neuron_scale: str | None = "auto",
    l1: float = 0.0,
    l2: float = 0.0,
    max_active: int | None = None,
    fixed: Tensor | np.ndarray | None = None,
    token_weights: Tensor | np.ndarray | str | None = "auto",
    ridge: float = 1e-6,
    max_iter: int | None = None,
    tol: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
) -> Factorization:
    """Factorises activations into sparse signed features and non-negative coefficients, ``A ≈ Z Y``.

    Minimises ``‖A − Z Y‖²_F`` over ``Y >= 0`` and Z with at most ``ceil(keep·d)`` non-zeros in each column: the
    problem of "Constructing Interpretable Features from Compositional Neuron Groups" (Shafran, Geiger & Geva, ACL
    2026). ``solver="mu"`` is that paper's iteration, step for step:

    1. ``Z ← A Yᵀ (Y Yᵀ + ridge·I)⁻¹``
    2. winner-take-all: in each column of Z keep the entries of largest magnitude
    3. rows of Y to unit Euclidean norm, the factor into Z
    4. ``Y ← Y ∘ sqrt((P⁺ + Q⁻Y) / (P⁻ + Q⁺Y + 1e-6))`` with ``P = ZᵀA``, ``Q = ZᵀZ``, ``sweeps`` times
    5. the loss; the best pair is remembered

    ``solver="auto"`` reaches that iteration's loss a hundred to several hundred times sooner (README). It starts from
    clusters of tokens, lets several sweeps of coordinate descent over Y follow each pass over A, and after steps 1 and
    2 have found their supports it chooses each column anew, exactly, given the others, and solves each neuron's least
    squares on its support. Its last Y is swept on its Z until that changes a token by less than 1e-3 of itself
    (``Factorization.encode`` goes on to a KKT residual).

    Two settings to know: the default makes the better detectors of concepts; for the smallest loss, ``refit=True,
    neuron_scale=None``. README and ``benchmarks/defaults`` have the figures.

    Args:
        A: activations ``[d, n]``, neurons × tokens: a torch tensor, numpy array or memmap; float16, bfloat16,
            float32 or float64; any strides, so token-major activations go in as ``acts.T`` without a copy.
            Never written to.
        k: number of features.
        keep: fraction of neurons that a feature keeps.
        solver: ``"auto"`` or ``"mu"``. The latter's 1e-6 in step 4 is absolute, so entries of A should not be much
            below 0.01 (or use ``neuron_scale``).
        refit: ``"auto"`` only. ``"late"`` (default): as above, supports chosen anew after exploring (at most 6 times
            from clusters, else 12) until the loss is 2.5 % below what exploring reached or stops falling: often once;
            refits on them go on while they gain.
            True: again and again, from the second iteration on: a smaller loss, but features that follow loud neurons.
            False: steps 1 and 2 throughout, at a loss like the paper's; its features detect concepts a little better
            still. Where these steps end more than 1 % above the best loss (as on data of low rank), steps that never
            raise it go on from there.
        sweeps: over Y in an iteration. Default: ``d / k``, at least 2 and at most 10, and 1 for ``"mu"``.
        init: ``"kmeans"`` (default: spherical k-means of a sample of the tokens), ``"random"`` (the paper's, and the
            default for ``"mu"``) or ``"svd"``. Or factors to go on from: a :class:`Factorization`, or a pair
            ``(Z0 [d, k], Y0 [k, n])``, in the units of A. ``"auto"`` continues them: its first loss is not above
            theirs (but for ``l1`` and ``max_active``, which the steps for Z do not see), their supports stay until a
            step improves on them, and the result is no worse than they are. Of a pair one may be None: without Y0 (or
            where a Factorization is of other tokens) the start is the non-negative least squares solution on Z0;
            without Z0, Z is computed from Y0. ``"mu"`` computes Z from Y0 in any case. Of a Z0 with more than
            ``ceil(keep·d)`` non-zeros in a column the largest are taken.
        neuron_scale: ``"rms"`` (default; not for ``"mu"``) divides each neuron by its root mean square before
            factorising, so that a few loud neurons do not decide everything; at least by a twentieth of the median
            one, and by more where a neuron fires on fewer than ten tokens (and 1 % of them), so that neurons that say
            next to nothing do not count like others. Z and ``relative_error`` are in the original units all the same.
            None: as it is.
        l1: penalty ``2 l1 ν Σ ‖z_i‖ y_it`` with ν the root mean square norm of a token: a feature is used on a token
            only as far as the token's projection on it exceeds the share ``l1`` of a typical token. For sparser Y,
            try 0.01 to 0.1. It decides Y; Z is chosen without it. Not for ``"mu"``, like the next four.
        l2: penalty ``l2 Σ (‖z_i‖ y_it)²``.
        max_active: at most so many features on a token: those of largest ``‖z_i‖ y_it``. None: any number. The
            sweeps that make the last Y the optimum are left out then, since they would choose anew.
        fixed: features ``[d, f]``, ``f < k``, that stay as they are, in the units of A: they become the first
            columns of Z, and the other ``k - f`` explain the rest.
        token_weights: the weight of each token's squared residual, ``[n]``, non-negative; 0 leaves a token out. Or
            ``"clip"`` (default with ``neuron_scale="rms"``; not for ``"mu"``): a token whose norm, of scaled neurons,
            is over three times a typical one (the root mean square over the 90 % of smallest norm) counts as one of
            three times that, and beyond five times the less the larger it is, so that a few loud tokens (attention
            sinks) do not decide. None: all the same. An
            :class:`OutlierWarning` says so where 1 % of the tokens hold more than 30 % of the energy.
        ridge: λ of step 1 and of the least squares on supports (``"auto"`` takes it for rows of Y at unit norm).
        max_iter: bound on the iterations. Default: 200, and 1000 for ``"mu"``.
        tol, patience: stop when the best loss has not fallen by the relative amount ``tol`` for ``patience``
            iterations. Default: 1e-3 and 4, and 1e-4 and 50 for ``"mu"``. ``tol=0`` with a large
            patience runs to ``max_iter``.
        seed: of the start. The same seed gives the same start on every device, and the same bits on
            the same machine and number of threads; no global generator is touched.
        device: where to compute. Default: where A is.
        dtype: torch.float32 or torch.float64 to compute in. Default: float64 for float64 A, else float32.
        allow_tf32: on CUDA in float32, whether dense products with A and of Y with itself may round both factors to 11
            bits (TF32) to run on tensor cores. The error of an entry is then up to ``2⁻⁹ Σ |a| |b|`` over its terms,
            beside the float32 rounding that there is without it (default). Not used for a bfloat16 A, whose products
            are exact on tensor cores, in sweeps over Y, which are float32 multiply-adds, nor by ``encode`` and
            ``certificate``. No effect elsewhere. A process-wide setting of torch is put aside during the fit.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"torch"``; a named backend runs or raises.
        callback: called with an :class:`IterationState` after each iteration; returning True stops. Its ``Z`` and ``Y``
            are the factors then.
        progress: show a progress bar on stderr (needs tqdm).
        checkpoint: a file that the fit is kept in every ``checkpoint_every`` iterations. If it is there already, it is
            read and the fit goes on from it, to the bits that an uninterrupted one has with this ``checkpoint_every``,
            machine and number of threads; if it is of other data or options, it is refused. Only ``max_iter``, ``tol``
            and ``patience`` may differ. A finished fit removes it.
        checkpoint_every: see ``checkpoint``.

    Returns:
        A :class:`Factorization`, of the iteration with the smallest loss. Z and Y are numpy arrays where A is
        one, else tensors on the device of the computation.

    Raises:
        TypeError, ValueError: an argument is not as described, or the problem does not fit in memory; the text names
            it.
        BackendError: the named backend cannot run here; the text says why.
    """
    with Progress(progress, "snmf_kernels.fit") as bar, computing():
        bar.phase("start")
        task = prepare(
            A, k, keep=keep, solver=solver, refit=refit, sweeps=sweeps, init=init, neuron_scale=neuron_scale,
            l1=l1, l2=l2, max_active=max_active, fixed=fixed, token_weights=token_weights, ridge=ridge,
            max_iter=max_iter, tol=tol, patience=patience, seed=seed, device=device, dtype=dtype,
            allow_tf32=allow_tf32, backend=backend, callback=callback, more_callbacks=bar.callbacks,
        )  # fmt: skip
        if checkpoint is not None:
            task.keep_in(checkpoint, _checks.integer("checkpoint_every", checkpoint_every, 1))
        bar.phase("pass")
        while task.wants_more:
            task.advance()
        bar.phase("last sweeps")
        return task.result()


class Task:
    """A fit that goes on iteration by iteration, so that several may take turns."""

    def __init__(
        self,
        problem: Problem,
        start: Start,
        monitor: Monitor,
        options: Options,
        far_out: Tensor | None,
        *,
        as_numpy: bool,
    ) -> None:
        self._problem, self._options, self._as_numpy = problem, options, as_numpy
        self._far_out = far_out
        self._checkpoint: Checkpoint | None = None
        self._checkpoint_every = 0
        data = problem.data
        steps = Steps(data.device, recordable=data.kernels.recordable and not problem.max_active)
        if data.device.type != "cpu":
            start = Start(_with_aligned_rows(start.Y), start.Z)
        self._start_sign = start.Y.sum(1)
        self._iterations: Iterations
        if options.solver == "mu":
            self._iterations = PaperIterations(problem, start, monitor, options.sweeps, steps)
        else:
            self._iterations = FastIterations(
                problem, start, monitor, options.sweeps, options.refit, steps, init=options.init
            )
        monitor.factors = self._features_now, self._coefficients_now

    def keep_in(self, path: str | os.PathLike[str], every: int) -> None:
        """Goes on from the fit kept in this file, if it is there, and keeps this one in it from now on."""
        data, fixed = self._problem.data, self._problem.fixed
        options = dataclasses.asdict(self._options) | {"checkpoint_every": every, "d": data.d, "n": data.n}
        signs = {"A": data.row_statistics()[0]}
        if fixed is not None:
            signs["fixed"] = fixed.values.square().sum(1, dtype=precise_dtype(data.device))
        if self._options.init == "given":
            signs["init"] = self._start_sign
        checkpoint = Checkpoint(path, options, signs)
        kept = checkpoint.read()
        if kept is not None:
            tensors, numbers = kept
            on_device = {name: tensor.to(self._problem.data.device) for name, tensor in tensors.items()}
            self._iterations.restore(on_device, numbers["iterations"])
            self._iterations.monitor.restore(numbers["monitor"])
            logger.info("checkpoint: goes on after iteration %d", self._iterations.monitor.n_iter)
        self._checkpoint, self._checkpoint_every = checkpoint, every

    @property
    def wants_more(self) -> bool:
        """Whether to call :meth:`advance` again."""
        return self._iterations.monitor.wants_more

    def advance(self) -> None:
        """One iteration; raises FloatingPointError where sums have left the range of the dtype."""
        with product_precision(self._problem.data.device, self._options.allow_tf32):
            self._iterations.advance()
            monitor = self._iterations.monitor
            if self._checkpoint is None or monitor.started % self._checkpoint_every:
                return
            # What a GPU has under way is read first: a fit that goes on from here decides by the same losses.
            monitor.finish()
            if self.wants_more:
                tensors, numbers = self._iterations.state()
                self._checkpoint.write(tensors, {"iterations": numbers, "monitor": monitor.state()})

    def result(self) -> Factorization:
        """The factors, after the last iteration."""
        with product_precision(self._problem.data.device, self._options.allow_tf32):
            features, Y, measured = self._iterations.finish()
            result = self._result(features, Y, measured)
        if self._checkpoint is not None:
            self._checkpoint.remove()
        return result

    def _result(self, features: SparseColumns, Y: Tensor, measured: PassResult) -> Factorization:
        problem, monitor = self._problem, self._iterations.monitor
        data = problem.data
        logger.debug("fit stopped after %d iterations: %s", monitor.n_iter, monitor.stop_reason)
        given = data.token_weights if self._options.weighted else None
        error = relative(float(measured.residual), float(measured.data))
        if self._options.clip and data.token_weights is not None:
            error = problem.error(features, Y, given)
        clipped_error = error
        if self._far_out is not None:
            clipped_error = problem.error(
                features, Y, self._far_out if given is None else self._far_out * given
            )
        dead = ((features.values == 0).all(1) | (Y.amax(1) <= 0)).nonzero()[:, 0]
        if len(dead):
            logger.info(
                "%d of %d features are dead (a zero column of Z or a zero row of Y)",
                len(dead), self._options.k,
            )  # fmt: skip
        assert monitor.stop_reason is not None
        return Factorization(
            Z=self._give(data.unscaled(features).to_dense()),
            Y=self._give(Y.contiguous()),
            relative_error=error,
            loss_history=tuple(monitor.losses),
            n_iter=monitor.n_iter,
            stop_reason=monitor.stop_reason,
            backend=data.kernels.backend,
            dead_features=self._give(dead),
            neuron_scale=None if data.neuron_scale is None else self._give(data.neuron_scale),
            options=dataclasses.asdict(self._options)
            | {"l1_threshold": problem.threshold, "unit": data.unit},
            clipped_error=clipped_error,
            token_weights=None if data.token_weights is None else self._give(data.token_weights),
        )

    def _features_now(self) -> Tensor | np.ndarray:
        features, _ = self._iterations.factors()
        return self._give(self._problem.data.unscaled(features).to_dense())

    def _coefficients_now(self) -> Tensor | np.ndarray:
        _, Y = self._iterations.factors()
        return self._give(Y.clone(memory_format=torch.contiguous_format))

    def _give(self, tensor: Tensor) -> Tensor | np.ndarray:
        return tensor.cpu().numpy() if self._as_numpy else tensor


def _with_aligned_rows(Y: Tensor) -> Tensor:
    """Y at rows that begin on multiples of 16 elements, as wide loads of a GPU need them."""
    k, n = Y.shape
    width = -(-n // 16) * 16
    if width == n:
        return Y
    return Y.new_empty(k, width)[:, :n].copy_(Y)


def prepare(
    A: Tensor | np.ndarray,
    k: int,
    *,
    keep: float,
    solver: str,
    refit: bool | str | None,
    sweeps: int | None,
    init: str | Factorization | tuple[Any, Any],
    neuron_scale: str | None,
    l1: float,
    l2: float,
    max_active: int | None,
    fixed: Tensor | np.ndarray | None,
    token_weights: Tensor | np.ndarray | str | None,
    ridge: float,
    max_iter: int | None,
    tol: float | None,
    patience: int | None,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    allow_tf32: bool,
    backend: str,
    callback: Callback | None,
    more_callbacks: Iterable[Callback] = (),
) -> Task:
    """Checks the arguments of :func:`fit`, and computes the start."""
    matrix = as_matrix("A", A)
    working = _working_dtype(dtype, matrix.dtype)
    if not isinstance(solver, str) or solver not in DEFAULTS:
        raise ValueError(f"solver: wanted one of {', '.join(DEFAULTS)}, got {solver!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: wanted a function of an IterationState, got {callback!r}")
    default = DEFAULTS[solver]
    if isinstance(init, str) and init == "auto":
        init = default["init"]
    if isinstance(neuron_scale, str) and neuron_scale == "auto":
        neuron_scale = default["neuron_scale"]
    if isinstance(token_weights, str) and token_weights == "auto":
        token_weights = default["token_weights"] if neuron_scale == "rms" else None
    clip = isinstance(token_weights, str) and token_weights == "clip"
    fixed_matrix = None if fixed is None else as_matrix("fixed", fixed)
    options = Options(
        k=_checks.integer("k", k, 1),
        keep=_checks.number("keep", keep),
        solver=solver,
        refit=default["refit"] if refit is None else _plain(refit),
        sweeps=_default_sweeps(default["sweeps"], matrix.shape[0], k)
        if sweeps is None
        else _checks.integer("sweeps", sweeps, 1),
        init=init if isinstance(init, str) else "given",
        neuron_scale=neuron_scale,
        l1=_checks.number("l1", l1),
        l2=_checks.number("l2", l2),
        max_active=None if max_active is None else _checks.integer("max_active", max_active, 1),
        n_fixed=0 if fixed_matrix is None else fixed_matrix.shape[1],
        weighted=token_weights is not None and not clip,
        clip=clip,
        ridge=_checks.number("ridge", ridge),
        max_iter=default["max_iter"] if max_iter is None else _checks.integer("max_iter", max_iter, 1),
        tol=default["tol"] if tol is None else _checks.number("tol", tol),
        patience=default["patience"] if patience is None else _checks.integer("patience", patience, 1),
        seed=_checks.integer("seed", seed, 0),
        dtype=_checks.dtype_name(working),
        allow_tf32=_plain(allow_tf32),
        backend=backend,
    )
    matrix = matrix.to(matrix.device if device is None else _checks.device("device", device))
    kernels = _backends.choose_all(matrix.device, working, backend, options.k)
    _doubts(matrix, options)
    with product_precision(matrix.device, options.allow_tf32):
        weights = None if clip else as_weights(token_weights, matrix, working)
        data = DataMatrix(matrix, working, kernels, weights)
        data.row_statistics()  # refuses what is not finite, or out of range
        if options.neuron_scale is None and data.magnitude != 1:
            data.divide(data.magnitude)
        far_out = scale_and_clip(data, scale=options.neuron_scale == "rms", clip=clip)
        squared_norm = float(data.squared_norm())
        problem = Problem(
            data,
            kept_count(options.keep, data.d),
            options.ridge,
            threshold=options.l1 * math.sqrt(squared_norm / data.total_weight),
            l2=options.l2,
            max_active=options.max_active or 0,
            fixed=None if fixed_matrix is None else fixed_features(fixed_matrix, data),
        )
        start = start_of(
            problem, init, k=options.k, sweeps=options.sweeps, seed=options.seed, floored=solver == "mu"
        )
        monitor = Monitor(
            squared_norm * data.unit**2,
            working,
            options.max_iter,
            options.tol,
            options.patience,
            (*more_callbacks, *([callback] if callback is not None else ())),
            lag=lag_on(data.device),
        )
        return Task(problem, start, monitor, options, far_out, as_numpy=isinstance(A, np.ndarray))


def _doubts(A: Tensor, options: Options) -> None:
    """Says before any work is done what cannot work, or looks like a mistake.

    Raises:
        ValueError: Y alone does not fit in memory.
    """
    (d, n), k = A.shape, options.k
    needed = k * n * (8 if options.dtype == "float64" else 4)
    free = _checks.available_memory(A.device)
    if needed > free:
        raise ValueError(
            f"k: Y [k, n] = [{k}, {n}] would take {needed / 1e9:,.1f} GB in {options.dtype}, and "
            f"{free / 1e9:,.1f} GB are free on {A.device}; use a smaller k or fewer tokens"
        )
    count = kept_count(options.keep, d)
    if count < min(3, d):
        warnings.warn(
            f"keep: a feature would keep {count} of {d} neurons (keep = {options.keep:g}), which is hardly a group; "
            f"use keep={min(1.0, math.ceil(300 / d) / 100):g} or more",
            FitWarning,
            stacklevel=_checks.caller_level(),
        )
    if k > n:
        warnings.warn(
            f"k: {k} features for {n} tokens: each token could have one of its own; use fewer features or more tokens",
            FitWarning,
            stacklevel=_checks.caller_level(),
        )
    # The width of an MLP is a multiple of 64; a number of tokens is one by chance.
    if d > n and n % 64 == 0 and d % 64 != 0:
        logger.warning(
            "A has %d rows and %d columns, and rows are neurons: if yours are tokens, pass A.T", d, n
        )


def _default_sweeps(most: int, d: int, k: int) -> int:
    """No more sweeps than cost about as much as the pass over A (Gillis & Glineur 2012), but two if more than one."""
    return int(min(most, max(2, d // k)))


def _plain(value: Any) -> Any:
    """numpy's booleans as Python's."""
    return bool(value) if isinstance(value, np.bool_) else value


def _working_dtype(dtype: torch.dtype | None, of_data: torch.dtype) -> torch.dtype:
    if dtype is None:
        return torch.float64 if of_data == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: wanted torch.float32 or torch.float64 to compute in, got {dtype}")
    return dtype
