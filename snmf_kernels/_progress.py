"""The progress bar of ``fit`` and ``fit_many``."""

from __future__ import annotations

import contextvars
from typing import Any

from ._monitor import Callback, IterationState
from ._scope import pass_listener


class Progress:
    """A tqdm bar, or nothing."""

    def __init__(self, wanted: bool, name: str, unit: str = "it", total: int | None = None) -> None:
        self._bar: Any = None
        self._phase, self._error = "", ""
        self._token: contextvars.Token[Any] | None = None
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

    def phase(self, name: str) -> None:
        """What begins now: long passes of it are shown with their share that is done."""
        self._phase = name
        if self._bar is not None and name != "pass":
            self._bar.set_postfix_str(", ".join(filter(None, (self._error, name))))

    def _show(self, state: IterationState) -> None:
        self._bar.total = state.max_iter
        self._error = f"relative_error={state.best_relative_error:.5f}"
        self._bar.set_postfix_str(self._error, refresh=False)
        self._bar.update()

    def _show_pass(self, share: float) -> None:
        parts = (self._error, f"{self._phase} {share:.0%}")
        self._bar.set_postfix_str(", ".join(filter(None, parts)))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._token = pass_listener.set(self._show_pass)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            pass_listener.reset(self._token)
        if self._bar is not None:
            # A fit that has converged is finished, however many iterations it might have had.
            self._bar.total = self._bar.n
            self._bar.set_postfix_str(self._error)
            self._bar.close()
