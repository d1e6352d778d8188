"""``fit``: its options, the start, the result. The iterations are in ``_loop``."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _backends, _checks
from ._data import DataMatrix, as_matrix, as_weights, relative
from ._loop import FastIterations, Iterations, PaperIterations
from ._monitor import Callback, IterationState, Monitor
from ._precision import product_precision
from ._problem import Problem, kept_count
from ._steps import Steps, lag_on
from .factorization import Factorization, sparse_features
from .init import FLOOR, INITS, kmeans_centroids
from .sparse import PassResult, SparseColumns

logger = logging.getLogger(__name__)

# What an option is where it is not given, by solver; decided by benchmarks/defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "auto": {
        "init": "kmeans",
        "neuron_scale": "rms",
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
            "token_weights": self.weighted,
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
    init: str | tuple[Any, Any] = "auto",
    neuron_scale: str | None = "auto",
    l1: float = 0.0,
    l2: float = 0.0,
    max_active: int | None = None,
    fixed: Tensor | np.ndarray | None = None,
    token_weights: Tensor | np.ndarray | None = None,
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
            from clusters, else 12) until the loss is 2.5 % below what exploring reached or stops falling: often once.
            True: again and again, from the second iteration on: a smaller loss, but features that follow loud neurons.
            False: steps 1 and 2 throughout, at a loss like the paper's; its features detect concepts a little better
            still.
        sweeps: over Y in an iteration. Default: ``d / k``, at least 2 and at most 10, and 1 for ``"mu"``.
        init: ``"kmeans"`` (default: spherical k-means of a sample of the tokens), ``"random"`` (the paper's, and the
            default for ``"mu"``), ``"svd"``, or a pair ``(Z0 [d, k], Y0 [k, n])``. Of
            the pair one may be None: without Y0 the start is the non-negative least squares solution on Z0;
            Z0 is not used where Y0 is given, since step 1 computes Z from Y.
        neuron_scale: ``"rms"`` (default; not for ``"mu"``) divides each neuron by its root mean square before
            factorising, so that a few loud neurons do not decide everything; Z and ``relative_error`` are in the
            original units all the same. None: as it is.
        l1: penalty ``2 l1 ν Σ ‖z_i‖ y_it`` with ν the root mean square norm of a token: a feature is used on a token
            only as far as the token's projection on it exceeds the share ``l1`` of a typical token. For sparser Y,
            try 0.01 to 0.1. It decides Y; Z is chosen without it. Not for ``"mu"``, like the next four.
        l2: penalty ``l2 Σ (‖z_i‖ y_it)²``.
        max_active: at most so many features on a token: those of largest ``‖z_i‖ y_it``. None: any number. The
            sweeps that make the last Y the optimum are left out then, since they would choose anew.
        fixed: features ``[d, f]``, ``f < k``, that stay as they are, in the units of A: they become the first
            columns of Z, and the other ``k - f`` explain the rest.
        token_weights: ``[n]``, non-negative: the weight of each token's squared residual. 0 leaves a token out.
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
        callback: called with an :class:`IterationState` after each iteration; returning True stops.
        progress: show a progress bar on stderr (needs tqdm).

    Returns:
        A :class:`Factorization`, of the iteration with the smallest loss. Z and Y are numpy arrays where A is
        one, else tensors on the device of the computation.

    Raises:
        TypeError, ValueError: an argument is not as described; the text names it.
        BackendError: the named backend cannot run here; the text says why.
    """
    with Progress(progress, "snmf_kernels.fit") as bar:
        task = prepare(
            A, k, keep=keep, solver=solver, refit=refit, sweeps=sweeps, init=init, neuron_scale=neuron_scale,
            l1=l1, l2=l2, max_active=max_active, fixed=fixed, token_weights=token_weights, ridge=ridge,
            max_iter=max_iter, tol=tol, patience=patience, seed=seed, device=device, dtype=dtype,
            allow_tf32=allow_tf32, backend=backend,
            callbacks=(*bar.callbacks, *([callback] if callback else ())),
        )  # fmt: skip
        while task.wants_more:
            task.advance()
        return task.result()


class Task:
    """A fit that goes on iteration by iteration, so that several may take turns."""

    def __init__(
        self, problem: Problem, Y: Tensor, monitor: Monitor, options: Options, *, as_numpy: bool
    ) -> None:
        self._problem, self._options, self._as_numpy = problem, options, as_numpy
        data = problem.data
        steps = Steps(data.device, recordable=data.kernels.recordable and not problem.max_active)
        if data.device.type != "cpu":
            Y = _with_aligned_rows(Y)
        self._iterations: Iterations
        if options.solver == "mu":
            self._iterations = PaperIterations(problem, Y, monitor, options.sweeps, steps)
        else:
            self._iterations = FastIterations(
                problem, Y, monitor, options.sweeps, options.refit, steps, init=options.init
            )

    @property
    def wants_more(self) -> bool:
        """Whether to call :meth:`advance` again."""
        return self._iterations.monitor.wants_more

    def advance(self) -> None:
        """One iteration; raises FloatingPointError where sums have left the range of the dtype."""
        with product_precision(self._problem.data.device, self._options.allow_tf32):
            self._iterations.advance()

    def result(self) -> Factorization:
        """The factors, after the last iteration."""
        with product_precision(self._problem.data.device, self._options.allow_tf32):
            Z, Y, measured = self._iterations.finish()
            monitor = self._iterations.monitor
            logger.debug("fit stopped after %d iterations: %s", monitor.n_iter, monitor.stop_reason)
            return _result(self._problem, Z, Y, measured, monitor, self._options, as_numpy=self._as_numpy)


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
    init: str | tuple[Any, Any],
    neuron_scale: str | None,
    l1: float,
    l2: float,
    max_active: int | None,
    fixed: Tensor | np.ndarray | None,
    token_weights: Tensor | np.ndarray | None,
    ridge: float,
    max_iter: int | None,
    tol: float | None,
    patience: int | None,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    allow_tf32: bool,
    backend: str,
    callbacks: Iterable[Callback],
) -> Task:
    """Checks the arguments of :func:`fit`, and computes the start."""
    matrix = as_matrix("A", A)
    working = _working_dtype(dtype, matrix.dtype)
    if solver not in DEFAULTS:
        raise ValueError(f"solver: wanted one of {', '.join(DEFAULTS)}, got {solver!r}")
    default = DEFAULTS[solver]
    if isinstance(init, str) and init == "auto":
        init = default["init"]
    fixed_features = None if fixed is None else as_matrix("fixed", fixed)
    options = Options(
        k=_checks.integer("k", k, 1),
        keep=_checks.number("keep", keep),
        solver=solver,
        refit=default["refit"] if refit is None else _plain(refit),
        sweeps=_default_sweeps(default["sweeps"], matrix.shape[0], k)
        if sweeps is None
        else _checks.integer("sweeps", sweeps, 1),
        init=init if isinstance(init, str) else "given",
        neuron_scale=default["neuron_scale"] if neuron_scale == "auto" else neuron_scale,
        l1=_checks.number("l1", l1),
        l2=_checks.number("l2", l2),
        max_active=None if max_active is None else _checks.integer("max_active", max_active, 1),
        n_fixed=0 if fixed_features is None else fixed_features.shape[1],
        weighted=token_weights is not None,
        ridge=_checks.number("ridge", ridge),
        max_iter=default["max_iter"] if max_iter is None else _checks.integer("max_iter", max_iter, 1),
        tol=default["tol"] if tol is None else _checks.number("tol", tol),
        patience=default["patience"] if patience is None else _checks.integer("patience", patience, 1),
        seed=_checks.integer("seed", seed, 0),
        dtype=_checks.dtype_name(working),
        allow_tf32=_plain(allow_tf32),
        backend=backend,
    )
    matrix = matrix.to(_device(device, matrix.device))
    kernels = _backends.choose_all(matrix.device, working, backend, options.k)
    with product_precision(matrix.device, options.allow_tf32):
        data = DataMatrix(matrix, working, kernels, as_weights(token_weights, matrix, working))
        if options.neuron_scale == "rms":
            data.scale_neurons()
        squared_norm = float(data.squared_norm())
        if 0 < squared_norm / matrix.numel() < torch.finfo(working).tiny:
            raise ValueError(
                f"A: its values are too small for {options.dtype}, in which their products vanish (root mean square "
                f"{math.sqrt(squared_norm / matrix.numel()):.2g}); multiply A by a constant, or use "
                "neuron_scale='rms' or dtype=torch.float64"
            )
        problem = Problem(
            data,
            kept_count(options.keep, data.d),
            options.ridge,
            threshold=options.l1 * math.sqrt(squared_norm / data.total_weight),
            l2=options.l2,
            max_active=options.max_active or 0,
            fixed=None if fixed_features is None else _fixed(fixed_features, data),
        )
        Y = _start(problem, init, options)
        monitor = Monitor(
            squared_norm,
            working,
            options.max_iter,
            options.tol,
            options.patience,
            callbacks,
            lag=lag_on(data.device),
        )
        return Task(problem, Y, monitor, options, as_numpy=isinstance(A, np.ndarray))


def _default_sweeps(most: int, d: int, k: int) -> int:
    """No more sweeps than cost about as much as the pass over A (Gillis & Glineur 2012), but two if more than one."""
    return int(min(most, max(2, d // k)))


def _plain(value: Any) -> Any:
    """numpy's booleans as Python's."""
    return bool(value) if isinstance(value, np.bool_) else value


def _fixed(features: Tensor, data: DataMatrix) -> SparseColumns:
    if features.shape[0] != data.d:
        raise ValueError(
            f"fixed: wanted {data.d} rows (neurons), as A has, got shape {tuple(features.shape)}"
        )
    given = _given("fixed", features, data)
    assert given is not None
    return sparse_features(data.scaled(given))


def _start(problem: Problem, init: str | tuple[Any, Any], options: Options) -> Tensor:
    """Y0 ``[k, n]`` in the working dtype. Floored for multiplicative updates: a zero would stay zero for ever."""
    data = problem.data
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init: wanted one of {', '.join(INITS)} or a pair (Z0, Y0), got {init!r}")
        return _drawn_start(problem, init, options)
    if not isinstance(init, tuple) or len(init) != 2:
        raise TypeError(
            f"init: wanted one of {', '.join(INITS)} or a pair (Z0, Y0), got {type(init).__name__}"
        )
    Z0, Y0 = (_given(f"init[{i}]", value, data) for i, value in enumerate(init))
    for i, (value, shape) in enumerate(((Z0, (data.d, options.k)), (Y0, (options.k, data.n)))):
        if value is not None and value.shape != shape:
            raise ValueError(f"init[{i}]: wanted shape {shape}, got {tuple(value.shape)}")
    if Y0 is not None:
        if bool((Y0 < 0).any()):
            raise ValueError(f"init[1]: wanted Y0 >= 0, got {int((Y0 < 0).sum())} negative entries")
        return _floored(Y0) if options.solver == "mu" else Y0.clone()
    if Z0 is None:
        raise ValueError(
            "init: wanted Z0, Y0 or both, got (None, None); use init='random' for a random start"
        )
    Z0 = data.scaled(Z0)
    start = sparse_features(Z0)
    Y, *_ = problem.solve_coefficients(start, tol=1e-3, max_sweeps=100)
    return _floored(Y) if options.solver == "mu" else Y


def _drawn_start(problem: Problem, init: str, options: Options) -> Tensor:
    data, free = problem.data, options.k - problem.n_fixed
    generator = torch.Generator().manual_seed(options.seed)
    centroids = (
        kmeans_centroids(data, free, generator) if init == "kmeans" and options.solver != "mu" else None
    )
    if centroids is not None and centroids.shape[1] == free:
        # Winner-take-all of the centroids and their coefficients take one sparse pass, and are nearer than memberships.
        Z = problem.all_features(data.kernels.winner_take_all(centroids, problem.count))
        Y = torch.zeros(options.k, data.n, dtype=data.dtype, device=data.device)
        problem.update_coefficients(Z, problem.gram(Z), Y, options.sweeps, out=Y)
        return Y
    Y = INITS[init](data, free, generator)
    if problem.fixed is None:
        return Y
    # What fixed features explain is not left for the others to start from.
    of_fixed, *_ = problem.solve_coefficients(problem.fixed, tol=1e-3, max_sweeps=100)
    return torch.cat([of_fixed, Y])


def _floored(Y: Tensor) -> Tensor:
    """Y without zeros: at least 1e-6 of each row's largest entry, whatever its scale (1e-6 where a row is zero)."""
    largest = Y.amax(1, keepdim=True)
    return torch.maximum(Y, FLOOR * torch.where(largest > 0, largest, 1))


def _given(name: str, value: Any, data: DataMatrix) -> Tensor | None:
    if value is None:
        return None
    matrix = as_matrix(name, value).to(data.device, data.dtype)
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{name}: wanted finite values, got {int((~matrix.isfinite()).sum())} NaN or infinite"
        )
    return matrix


def _result(
    problem: Problem,
    features: SparseColumns,
    Y: Tensor,
    measured: PassResult,
    monitor: Monitor,
    options: Options,
    *,
    as_numpy: bool,
) -> Factorization:
    data = problem.data
    Z = data.unscaled(features).to_dense()
    dead = ((features.values == 0).all(1) | (Y.amax(1) <= 0)).nonzero()[:, 0]
    if len(dead):
        logger.info(
            "%d of %d features are dead (a zero column of Z or a zero row of Y)", len(dead), options.k
        )
    assert monitor.stop_reason is not None

    def give(tensor: Tensor) -> Tensor | np.ndarray:
        return tensor.cpu().numpy() if as_numpy else tensor

    return Factorization(
        Z=give(Z),
        Y=give(Y.contiguous()),
        relative_error=relative(float(measured.residual), float(measured.data)),
        loss_history=tuple(monitor.losses),
        n_iter=monitor.n_iter,
        stop_reason=monitor.stop_reason,
        backend=data.kernels.backend,
        dead_features=give(dead),
        neuron_scale=None if data.scale is None else give(data.scale),
        options=dataclasses.asdict(options) | {"l1_threshold": problem.threshold},
    )


class Progress:
    """A tqdm bar, or nothing."""

    def __init__(self, wanted: bool, name: str, unit: str = "it", total: int | None = None) -> None:
        self._bar: Any = None
        if wanted:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from error
            # Asked for by an argument, so the environment's TQDM_DISABLE does not apply.
            self._bar = tqdm(total=total, desc=name, unit=unit, disable=False)

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """For a bar over the iterations of one fit."""
        return (self._show,) if self._bar is not None else ()

    def advance(self) -> None:
        """One more of ``total``."""
        if self._bar is not None:
            self._bar.update()

    def _show(self, state: IterationState) -> None:
        self._bar.total = state.max_iter
        self._bar.set_postfix(relative_error=f"{state.best_relative_error:.5f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _working_dtype(dtype: torch.dtype | None, of_data: torch.dtype) -> torch.dtype:
    if dtype is None:
        return torch.float64 if of_data == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: wanted torch.float32 or torch.float64 to compute in, got {dtype}")
    return dtype


def _device(device: torch.device | str | None, of_data: torch.device) -> torch.device:
    if device is None:
        return of_data
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted {wanted}, but torch finds no CUDA or ROCm device; use device='cpu'")
    return wanted
