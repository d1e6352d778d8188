"""The state of torch and of the process that computations of this package need, whatever the caller's is."""

from __future__ import annotations

import contextvars
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# Called now and then during a pass over A on a CPU, with the share of it that is done.
pass_listener: contextvars.ContextVar[Callable[[float], object] | None] = contextvars.ContextVar(
    "pass_listener", default=None
)
_forked = False


def _mark_as_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_as_forked)


def threads() -> int:
    """How many threads a compiled kernel may use: torch's number, but one in a forked child.

    A forked child inherits the state of OpenMP, but not its threads, and would wait for them for ever.
    """
    return 1 if _forked else torch.get_num_threads()


def one_thread_after_fork() -> None:
    """In a forked child, torch works on one thread from here on: its parallel regions would hang like the kernels'."""
    if _forked and torch.get_num_threads() > 1:
        logger.warning(
            "this process was forked, and OpenMP's threads were not: torch works on one thread here from now on; "
            "start workers with the 'spawn' or 'forkserver' method for more"
        )
        torch.set_num_threads(1)


@contextmanager
def computing() -> Iterator[None]:
    """Inside the block no gradients are recorded, and tensors that are made can meet autograd later."""
    one_thread_after_fork()
    with torch.inference_mode(False), torch.no_grad():
        yield


# Rows of a matrix whose factorisation takes a fraction of a second.
_SHORT = 2048


def interruptible(size: int, function: Callable[[], Result]) -> Result:
    """``function()``, which factorises a matrix of so many rows; Ctrl-C is heard on the way.

    A call into LAPACK cannot be cut into parts. A long one runs on a thread of its own, for which Python waits and
    hears signals; after Ctrl-C it ends in the background, and nobody sees its result.
    """
    if size <= _SHORT or threading.current_thread() is not threading.main_thread():
        return function()
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                outcome.append(function())
        except BaseException as error:
            failure.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join()
    if failure:
        raise failure[0]
    return outcome[0]
