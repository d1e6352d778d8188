"""The progress bar of ``fit`` and ``fit_many``."""

from __future__ import annotations

from typing import Any

from ._monitor import Callback, IterationState


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
