"""``fit_many``: several fits together, each with the result that it has by itself."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._monitor import IterationState
from ._progress import Progress
from ._scope import computing
from .factorization import Factorization
from .solver import Task, fit, prepare

# Members under way at once on a GPU: enough that one's small launches hide behind another's products, and as many
# as have a hardware queue each (CUDA_DEVICE_MAX_CONNECTIONS), for others would wait for each other. Larger launches
# for several members at once would gain little: a product has programs enough for a whole GPU (472 for the 132
# multiprocessors of an H100 at d = 14,336, n = 7,500, k = 100) and is bound by arithmetic, of which grouping saves
# none; sweeps over Y (235 programs of one warp there) and column descent (one program) run beside other members'
# products.
_AT_ONCE_ON_GPU = 8
# What fit_many has of its own, or decides for each member.
_OWN = ("A", "k", "seed", "callback", "progress", "checkpoint", "checkpoint_every")

ManyCallback = Callable[[int, IterationState], Any]


class FitManyError(RuntimeError):
    """Some members of a ``fit_many`` failed; the others are finished and in ``results``.

    Attributes:
        results: for each member its :class:`Factorization` or the exception that it raised.
    """

    def __init__(self, results: list[Factorization | Exception]) -> None:
        self.results = results
        failed = [(i, error) for i, error in enumerate(results) if isinstance(error, Exception)]
        first, error = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        super().__init__(
            f"{len(failed)} of {len(results)} members failed; member {first}: {type(error).__name__}: {error}{others}; "
            "the others are in .results"
        )


class FitManyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a ``fit_many``: what was finished is in ``results``.

    Attributes:
        results: for each member its :class:`Factorization`, the exception that it raised, or None if it had not ended.
    """

    def __init__(self, results: list[Factorization | Exception | None]) -> None:
        self.results = results
        finished = sum(isinstance(result, Factorization) for result in results)
        super().__init__(f"{finished} of {len(results)} members had finished; they are in .results")


def fit_many(
    A: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
    k: int | Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    at_once: int | None = None,
    callback: ManyCallback | None = None,
    on_result: Callable[[int, Factorization], Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Factorization]:
    """Fits several matrices, or one matrix with several k or seeds, each as :func:`fit` does by itself.

    Of ``A``, ``k`` and ``seed`` each may be one for all members, or a sequence (a list, a range, for k and seed also an
    array) with one for each; sequences must be of one length.

    On a GPU up to ``at_once`` members take turns, each on a stream of its own, so that small steps of one run beside
    large ones of another and no member waits for the host. On a CPU they run one after another, each on all threads:
    a fit's products fill them, and its bits depend on their number.

    Args:
        A: activations ``[d, n]``, or a list or tuple of such, of any shapes.
        k: number of features.
        seed: of the start.
        at_once: how many members may be under way on a GPU, whose memory must hold their data together. Default: 8.
        callback: called with the number of a member and its :class:`IterationState` after each of its iterations;
            returning True stops that member.
        on_result: called with the number of a member and its result as soon as it has finished: to save it, say.
        progress: show a bar over the members on stderr (needs tqdm).
        options: whatever else :func:`fit` takes, the same for all members, but ``checkpoint``, which is of one fit.

    Returns:
        A :class:`Factorization` for each member, in order.

    Raises:
        TypeError, ValueError: the sequences do not match, or ``fit`` has no such option.
        FitManyError: a member failed, as all do where an option's value is not as described. The others were finished
            first and are in its ``results``.
        FitManyInterrupted: on Ctrl-C, a KeyboardInterrupt whose ``results`` has the members that were finished.
    """
    settings = _settings(options)
    waiting = _members(A, k, seed, callback, settings)
    at_once = _AT_ONCE_ON_GPU if at_once is None else _checks.integer("at_once", at_once, 1)
    outcomes: dict[int, Factorization | Exception] = {}
    under_way: list[_Member] = []
    count = len(waiting)
    try:
        with Progress(progress, "snmf_kernels.fit_many", unit="fit", total=count) as bar, computing():
            while waiting or under_way:
                while waiting and len(under_way) < (at_once if waiting[0].on_gpu else 1):
                    under_way.append(waiting.popleft())
                for member in list(under_way):
                    outcome = member.advance()
                    if outcome is None:
                        continue
                    outcomes[member.number] = outcome
                    under_way.remove(member)
                    bar.advance()
                    if on_result is not None and isinstance(outcome, Factorization):
                        on_result(member.number, outcome)
    except KeyboardInterrupt as interrupt:
        raise FitManyInterrupted([outcomes.get(number) for number in range(count)]) from interrupt
    results = [outcomes[number] for number in range(len(outcomes))]
    finished = [result for result in results if isinstance(result, Factorization)]
    if len(finished) < len(results):
        raise FitManyError(results)
    return finished


class _Member:
    """One of several fits, on a stream of its own where it is on a GPU."""

    def __init__(
        self, number: int, A: Any, k: int, seed: int, callback: ManyCallback | None, settings: dict[str, Any]
    ) -> None:
        self.number = number
        self._arguments, self._settings = (A, k), settings | {"seed": seed}
        self._callback = None if callback is None else lambda state: callback(number, state)
        self._task: Task | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it will be, or is, computed on a CUDA or ROCm device."""
        return self._device is not None and self._device.type == "cuda"

    @property
    def _device(self) -> torch.device | None:
        A, wanted = self._arguments[0], self._settings["device"]
        if wanted is not None:
            return torch.device(wanted)
        return A.device if isinstance(A, Tensor) else None

    def advance(self) -> Factorization | Exception | None:
        """Starts, or iterates once; the result, or what went wrong, if that ends it."""
        try:
            with self._on_its_stream():
                if self._task is None:
                    self._task = prepare(*self._arguments, **self._settings, callback=self._callback)
                elif self._task.wants_more:
                    self._task.advance()
                if self._task.wants_more:
                    return None
                result = self._task.result()
            self._hand_over(result)
            return result
        except Exception as error:  # reported by FitManyError, when the others have finished
            self._wait_for_it()
            return error

    def _wait_for_it(self) -> None:
        """What the caller does next comes after all that is under way on this member's stream, which reads A."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _hand_over(self, result: Factorization) -> None:
        """The caller's stream may use the result at once, and its memory has no other use before that is done."""
        if self._stream is None:
            return
        self._wait_for_it()
        callers = torch.cuda.current_stream(self._device)
        for tensor in (result.Z, result.Y, result.dead_features, result.neuron_scale, result.token_weights):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(callers)

    def _on_its_stream(self) -> AbstractContextManager[Any]:
        if not self.on_gpu:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            # What made A may still be under way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def _members(
    A: Any, k: Any, seed: Any, callback: ManyCallback | None, settings: dict[str, Any]
) -> deque[_Member]:
    given = {"A": A, "k": k, "seed": seed}
    lists = {name: listed for name, value in given.items() if (listed := _listed(name, value)) is not None}
    lengths = {name: len(value) for name, value in lists.items()}
    if not lengths:
        raise TypeError("A, k, seed: wanted a sequence of at least one of them; for one fit use fit")
    count = next(iter(lengths.values()))
    if set(lengths.values()) != {count} or count == 0:
        found = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ValueError(f"A, k, seed: wanted sequences of one length, at least 1, got {found}")
    columns = [lists.get(name, [value] * count) for name, value in given.items()]
    return deque(
        _Member(number, matrix, features, start, callback, settings)
        for number, (matrix, features, start) in enumerate(zip(*columns, strict=True))
    )


def _listed(name: str, value: Any) -> list[Any] | None:
    """One for each member, or None for one for all."""
    if name != "A" and isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
        return list(value.tolist())
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """All options of ``fit`` but those that members have for themselves, defaults filled in."""
    defaults = {name: p.default for name, p in inspect.signature(fit).parameters.items() if name not in _OWN}
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise TypeError(f"{unknown[0]}: fit has no such option; it has {', '.join(defaults)}")
    return defaults | options
