"""``fit``: options, the loop, stopping."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _backends, _checks
from ._data import DataMatrix, as_matrix, full_precision, relative
from .factorization import Factorization, StopReason, solve_coefficients
from .init import FLOOR, INITS
from .sparse import SparseColumns

logger = logging.getLogger(__name__)

SOLVERS = ("auto", "mu")
EPS = 1e-6  # the paper's constant in the denominator of the multiplicative update


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


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of one ``fit``; see there."""

    k: int
    keep: float
    solver: str
    sweeps: int
    init: str
    neuron_scale: str | None
    ridge: float
    max_iter: int
    tol: float
    patience: int
    seed: int
    dtype: str
    backend: str

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep: wanted a fraction in (0, 1] (0.01 keeps 1 % of the neurons), got {self.keep}"
            )
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: wanted one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.neuron_scale not in (None, "rms"):
            raise ValueError(f"neuron_scale: wanted None or 'rms', got {self.neuron_scale!r}")


def fit(
    A: Tensor | np.ndarray,
    k: int,
    *,
    keep: float = 0.01,
    solver: str = "auto",
    sweeps: int | None = None,
    init: str | tuple[Any, Any] = "random",
    neuron_scale: str | None = None,
    ridge: float = 1e-6,
    max_iter: int | None = None,
    tol: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    callback: Callback | None = None,
    progress: bool = False,
) -> Factorization:
    """Factorises activations into sparse signed features and non-negative coefficients, ``A ≈ Z Y``.

    Minimises ``‖A − Z Y‖²_F`` over ``Y >= 0`` and Z with at most ``ceil(keep·d)`` non-zeros in each column,
    by the iteration of "Constructing Interpretable Features from Compositional Neuron Groups" (Shafran,
    Geiger & Geva, ACL 2026):

    1. ``Z ← A Yᵀ (Y Yᵀ + ridge·I)⁻¹``
    2. winner-take-all: in each column of Z keep the entries of largest magnitude
    3. rows of Y to unit Euclidean norm, the factor into Z
    4. ``Y ← Y ∘ sqrt((P⁺ + Q⁻Y) / (P⁻ + Q⁺Y + 1e-6))`` with ``P = ZᵀA``, ``Q = ZᵀZ``, ``sweeps`` times
    5. the loss; the best pair is remembered

    Args:
        A: activations ``[d, n]``, neurons × tokens: a torch tensor, numpy array or memmap; float16, bfloat16,
            float32 or float64; any strides, so token-major activations go in as ``acts.T`` without a copy.
            Never written to.
        k: number of features.
        keep: fraction of neurons that a feature keeps.
        solver: ``"mu"`` is the paper's iteration, step for step; its 1e-6 in step 4 is absolute, so entries of A
            should not be much below 0.01 (or use ``neuron_scale``). ``"auto"`` is the same iteration with
            several sweeps of step 4 to each pass over A, which reaches the same loss in a fraction of the
            passes; its 1e-6 is relative to the mean square of A, so that the scale of A does not matter.
        sweeps: how often step 4 is repeated in an iteration. Default: 1 for ``"mu"``, 10 for ``"auto"``.
        init: ``"random"`` (the paper's), ``"svd"``, ``"kmeans"``, or a pair ``(Z0 [d, k], Y0 [k, n])``. Of
            the pair one may be None: without Y0 the start is the non-negative least squares solution on Z0;
            Z0 is not used where Y0 is given, since step 1 computes Z from Y.
        neuron_scale: ``"rms"`` divides each neuron by its root mean square before factorising, so that a few
            loud neurons do not decide everything; Z and ``relative_error`` are in the original units all the
            same. None: as it is.
        ridge: λ of step 1.
        max_iter: bound on the iterations. Default: 1000 for ``"mu"``, 200 for ``"auto"``.
        tol, patience: stop when the best loss has not fallen by the relative amount ``tol`` for ``patience``
            iterations. Default: 1e-4, and a patience of 50 for ``"mu"``, 10 for ``"auto"``. ``tol=0`` with a large
            patience runs to ``max_iter``.
        seed: of the random start. The same seed gives the same start on every device, and the same bits on
            the same machine and number of threads; no global generator is touched.
        device: where to compute. Default: where A is.
        dtype: torch.float32 or torch.float64 to compute in. Default: float64 for float64 A, else float32.
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
    matrix = as_matrix("A", A)
    working = _working_dtype(dtype, matrix.dtype)
    fast = solver != "mu"
    options = Options(
        k=_checks.integer("k", k, 1),
        keep=_checks.number("keep", keep),
        solver=solver,
        sweeps=(10 if fast else 1) if sweeps is None else _checks.integer("sweeps", sweeps, 1),
        init=init if isinstance(init, str) else "given",
        neuron_scale=neuron_scale,
        ridge=_checks.number("ridge", ridge),
        max_iter=(200 if fast else 1000) if max_iter is None else _checks.integer("max_iter", max_iter, 1),
        tol=1e-4 if tol is None else _checks.number("tol", tol),
        patience=(10 if fast else 50) if patience is None else _checks.integer("patience", patience, 1),
        seed=_checks.integer("seed", seed, 0),
        dtype=str(working).removeprefix("torch."),
        backend=backend,
    )
    matrix = matrix.to(_device(device, matrix.device))
    kernels = _backends.choose_all(matrix.device, working, backend, options.k)
    with full_precision(matrix.device), _Progress(progress, options.max_iter) as bar:
        data = DataMatrix(matrix, working, kernels)
        if neuron_scale == "rms":
            data.scale_neurons()
        Y = _start(data, init, options)
        found = _iterate(data, Y, options, (*bar.callbacks, *([callback] if callback else [])))
        return _result(data, found, options, as_numpy=isinstance(A, np.ndarray))


@dataclasses.dataclass
class _Found:
    """What the loop ends with: the best pair, in the scaled units of the data."""

    Z: SparseColumns
    Y: Tensor
    losses: list[float]
    stop_reason: StopReason


def _iterate(data: DataMatrix, Y: Tensor, options: Options, callbacks: Iterable[Callback]) -> _Found:
    kernels = data.kernels
    count = kept_count(options.keep, data.d)
    squared_norm = data.squared_norm()
    eps = EPS
    if options.solver != "mu":
        # The paper's constant suits entries of order one; taken relative to them, the scale of A does not matter.
        eps *= relative(squared_norm, data.d * data.n) or 1.0
    # The loss is a difference of sums of this size, which are float64 sums of entries in the working dtype.
    rounding = 8 * torch.finfo(data.dtype).eps * squared_norm
    losses: list[float] = []
    best_loss = reference_loss = math.inf
    best: tuple[SparseColumns, Tensor] | None = None
    stale = 0
    stop_reason = StopReason.MAX_ITER

    AYt, YYt = data.times(Y.T), Y @ Y.T
    for n_iter in range(1, options.max_iter + 1):
        Z = kernels.winner_take_all(_least_squares(AYt, YYt, options.ridge, kernels).T, count)
        norms = torch.diagonal(YYt).sqrt()
        norms = torch.where(norms > 0, norms, 1)
        Z = Z.scaled_columns(norms)
        ZtA = data.sparse_transposed_times(Z)
        ZtZ = kernels.sparse_product(Z, Z.to_dense())
        Y = kernels.multiplicative_update(Y / norms[:, None], ZtA, ZtZ, eps, options.sweeps)
        del ZtA
        # These serve the next iteration and give this one's loss: ‖A‖² − 2⟨A Yᵀ, Z⟩ + ⟨ZᵀZ, Y Yᵀ⟩.
        AYt, YYt = data.times(Y.T), Y @ Y.T
        loss = squared_norm + float(_dot(ZtZ, YYt) - 2 * _dot(Z.gather(AYt), Z.values))
        if not math.isfinite(loss):
            raise _too_large(options.dtype)
        loss = max(loss, 0.0)
        losses.append(loss)
        if loss < best_loss:
            best_loss, best = loss, (Z, Y)
        if loss <= reference_loss * (1 - options.tol) and loss < reference_loss:
            reference_loss, stale = loss, 0
        else:
            stale += 1
        state = IterationState(
            n_iter, options.max_iter, loss, relative(loss, squared_norm), relative(best_loss, squared_norm)
        )
        # Every callback is told, also after one has asked to stop.
        asked = [bool(callback(state)) for callback in callbacks]
        if any(asked):
            stop_reason = StopReason.CALLBACK
        elif best_loss <= rounding:
            stop_reason = StopReason.EXACT
        elif stale >= options.patience:
            stop_reason = StopReason.CONVERGED
        else:
            continue
        break
    assert best is not None  # the first loss is finite, so below infinity
    logger.debug("fit stopped after %d iterations: %s", len(losses), stop_reason.value)
    return _Found(*best, losses, stop_reason)


def _least_squares(AYt: Tensor, YYt: Tensor, ridge: float, kernels: _backends.Kernels) -> Tensor:
    """``(Y Yᵀ + ridge·I)⁻¹ (A Yᵀ)ᵀ`` as ``[k, d]``, solved in float64 where there is one.

    Where rounding has left ``Y Yᵀ + ridge·I`` without a Cholesky factor (two features with the same
    coefficients, say), the ridge is raised tenfold until it has one.
    """
    precise = YYt.dtype if YYt.device.type == "mps" else torch.float64
    G, B = YYt.to(precise)[None], AYt.to(precise)[None]
    floor = float(
        torch.finfo(YYt.dtype).eps * torch.diagonal(YYt).max().clamp(min=torch.finfo(YYt.dtype).tiny)
    )
    if not math.isfinite(floor):
        raise _too_large(str(YYt.dtype).removeprefix("torch."))
    while True:
        X, info = kernels.ridge_solve(G, B, ridge)
        if int(info[0]) == 0:
            return X[0].to(AYt.dtype)
        ridge = max(10 * ridge, floor)
        logger.debug("Y Yᵀ is singular to working precision; ridge raised to %.3g", ridge)


def kept_count(keep: float, d: int) -> int:
    """``ceil(keep·d)`` of the decimal fraction that was written: 0.07 of 100 neurons is 7, not 8."""
    return math.ceil(Fraction(repr(keep)) * d)


def _too_large(dtype: str) -> FloatingPointError:
    return FloatingPointError(
        f"the solver's sums are not finite in {dtype}: the values of A, or of a given start, are too large; "
        "divide them by their largest magnitude, or pass dtype=torch.float64"
    )


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products in float64 (float32 where the device has no more)."""
    precise = left.dtype if left.device.type == "mps" else torch.float64
    return (left.to(precise) * right.to(precise)).sum()


def _start(data: DataMatrix, init: str | tuple[Any, Any], options: Options) -> Tensor:
    """Y0 ``[k, n]`` in the working dtype, floored: a zero would stay zero for ever."""
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init: wanted one of {', '.join(INITS)} or a pair (Z0, Y0), got {init!r}")
        generator = torch.Generator().manual_seed(options.seed)
        return INITS[init](data, options.k, generator)[1]
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
        return _floored(Y0)
    if Z0 is None:
        raise ValueError(
            "init: wanted Z0, Y0 or both, got (None, None); use init='random' for a random start"
        )
    if data.scale is not None:
        Z0 = Z0 / data.scale[:, None]
    every_row = torch.arange(data.d, device=data.device).expand(options.k, -1)
    Y, _ = solve_coefficients(
        data, SparseColumns(every_row, Z0.T.contiguous(), data.d), tol=1e-3, max_sweeps=100
    )
    return _floored(Y)


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


def _result(data: DataMatrix, found: _Found, options: Options, *, as_numpy: bool) -> Factorization:
    sparse = found.Z if data.scale is None else found.Z.scaled_rows(data.scale)
    Z, Y = sparse.to_dense(), found.Y
    error = float(data.unscaled_residual_row_squares(Z, Y).sum())
    dead = ((sparse.values == 0).all(1) | (Y == 0).all(1)).nonzero()[:, 0]
    if len(dead):
        logger.info(
            "%d of %d features are dead (a zero column of Z or a zero row of Y)", len(dead), options.k
        )

    def give(tensor: Tensor) -> Tensor | np.ndarray:
        return tensor.cpu().numpy() if as_numpy else tensor

    return Factorization(
        Z=give(Z),
        Y=give(Y),
        relative_error=relative(error, float(data.row_squares.sum())),
        loss_history=tuple(found.losses),
        n_iter=len(found.losses),
        stop_reason=found.stop_reason,
        backend=data.kernels.backend,
        dead_features=give(dead),
        neuron_scale=None if data.scale is None else give(data.scale),
        options=dataclasses.asdict(options),
    )


class _Progress:
    """A tqdm bar over the iterations, or nothing."""

    def __init__(self, wanted: bool, total: int) -> None:
        self._bar: Any = None
        if wanted:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from error
            # Asked for by an argument, so the environment's TQDM_DISABLE does not apply.
            self._bar = tqdm(total=total, desc="snmf_kernels.fit", unit="it", disable=False)

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        return (self._show,) if self._bar is not None else ()

    def _show(self, state: IterationState) -> None:
        self._bar.set_postfix(relative_error=f"{state.best_relative_error:.5f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> _Progress:
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
