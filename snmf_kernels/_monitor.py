"""Following a fit: the losses of its iterations, what callbacks are told, and when it is time to stop."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import dtype_name
from ._data import relative, rounding
from .factorization import Array, StopReason


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
    _factors: Factors = dataclasses.field(default_factory=lambda: Factors(), repr=False, compare=False)

    @property
    def Z(self) -> Array:
        """The features now, ``[d, k]`` in the units of A: a copy, computed when asked for.

        Only while the callback runs. On a GPU, whose losses are read up to two iterations late, these are the factors
        of the latest iteration.
        """
        return self._factors.of(0)

    @property
    def Y(self) -> Array:
        """The coefficients now, ``[k, n]``, that belong to ``Z``: a copy, see there."""
        return self._factors.of(1)


class Factors:
    """What gives Z and Y, for as long as a callback may ask: a state that is kept keeps no fit alive."""

    def __init__(self, *givers: Callable[[], Array]) -> None:
        self._givers = givers

    def of(self, number: int) -> Array:
        """Z for 0, Y for 1."""
        if not self._givers:
            raise ValueError("the factors of an iteration can be read by a callback of fit, while it runs")
        return self._givers[number]()

    def end(self) -> None:
        """The callbacks have returned."""
        self._givers = ()


Callback = Callable[[IterationState], Any]


# Numbers that say how far a fit has come.
_KEPT = ("losses", "n_iter", "best", "_reference", "_stale")
# A loss is known to some digits from Gram matrices if it is so many times the rounding error of their sums.
_RESOLVED = 1e3


class _Reading:
    """A number that is on its way from a GPU to the host, or there already."""

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            self._host = torch.empty(number.shape, dtype=number.dtype, device="cpu", pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            # Not the current device's stream: A may lie on another.
            self._event.record(torch.cuda.current_stream(number.device))
        else:
            self._host = number.clone()

    def value(self) -> float:
        """The number; waits for it only, not for what was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)


class Monitor:
    """The losses so far, the best one, and whether to stop.

    Args:
        squared_norm: ``‖A‖²``.
        dtype: the working dtype.
        max_iter, tol, patience: as for ``fit``.
        callbacks: told of every iteration, in order.
        lag: how many iterations may be under way before the oldest one's loss is read.
    """

    def __init__(
        self,
        squared_norm: float,
        dtype: torch.dtype,
        max_iter: int,
        tol: float,
        patience: int,
        callbacks: Iterable[Callback],
        lag: int = 0,
    ) -> None:
        self.losses: list[float] = []
        self.n_iter = 0
        self.best = math.inf
        self.stop_reason: StopReason | None = None
        self._squared_norm, self._dtype = squared_norm, dtype
        self._max_iter, self._tol, self._patience = max_iter, tol, patience
        self._callbacks = tuple(callbacks)
        # The loss is a difference of sums of this size (where they are larger, ``Problem.loss`` sees to it).
        self._rounding = rounding(dtype) * squared_norm
        self._reference, self._stale = math.inf, 0
        self._lag = lag
        self._under_way: deque[_Reading] = deque()
        # What callbacks may ask for, and whether a fit that has stalled has something else to try.
        self.factors: tuple[Callable[[], Array], ...] = ()
        self.on_stall: Callable[[], bool] = lambda: False

    @property
    def wants_more(self) -> bool:
        """Whether another iteration should start."""
        return self.stop_reason is None and self.started < self._max_iter

    @property
    def started(self) -> int:
        """How many iterations have started."""
        return self.n_iter + len(self._under_way)

    @property
    def gain(self) -> float:
        """By which share the last iteration that was read lowered the loss (0 if it did not)."""
        if len(self.losses) < 2:
            return math.inf
        before, now = self.losses[-2:]
        return max(0.0, (before - now) / before) if before > 0 else 0.0

    def add(self, loss: Tensor) -> None:
        """Takes note of an iteration's loss, and reads those that it is time for; see ``stop_reason``."""
        self._under_way.append(_Reading(loss))
        while len(self._under_way) > self._lag:
            self._read(self._under_way.popleft().value())

    def finish(self) -> None:
        """Reads the losses of all iterations that are under way."""
        while self._under_way:
            self._read(self._under_way.popleft().value())

    def add_final(self, loss: Tensor) -> None:
        """Takes note of the loss after the last sweeps over Y, which no iteration belongs to."""
        self.losses.append(float(loss))

    def start_from(self, loss: float) -> None:
        """A given start has this loss: what does not fall below it is no progress."""
        self.best = self._reference = loss

    def unresolved(self) -> bool:
        """Whether the best loss is so small that sums of Gram matrices hold few digits of it."""
        return self.best <= _RESOLVED * self._rounding

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on, once nothing is under way."""
        return {name: getattr(self, name) for name in _KEPT}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state``."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.losses = list(self.losses)

    def restart_patience(self) -> None:
        """Another phase begins: what the last one failed to gain does not count."""
        self._stale = 0

    def _read(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise too_large(self._dtype)
        self.losses.append(loss)
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
            Factors(*self.factors),
        )
        # Every callback is told, also after one has asked to stop.
        asked = [bool(callback(state)) for callback in self._callbacks]
        state._factors.end()
        if self.stop_reason is not None:
            return  # by an iteration before; this one was under way already
        if any(asked):
            self.stop_reason = StopReason.CALLBACK
        elif self.best <= self._rounding:
            self.stop_reason = StopReason.EXACT
        elif self._stale >= self._patience and not self.on_stall():
            self.stop_reason = StopReason.CONVERGED
        elif self.n_iter >= self._max_iter:
            self.stop_reason = StopReason.MAX_ITER


def too_large(dtype: torch.dtype) -> FloatingPointError:
    """The error for sums that overflow."""
    return FloatingPointError(
        f"the solver's sums are not finite in {dtype_name(dtype)}: the values of A, or of a given "
        "start, are too large; divide them by their largest magnitude, or pass dtype=torch.float64"
    )
