"""Lines that the commands have in common. Imports no torch."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from .features import Feature
    from .models import LanguageModel
    from .runs import Run

# Where a file is written instead of a screen.
_FILE_WIDTH = 100
# Tables need that many columns; a terminal that has fewer breaks their lines.
_LEAST_WIDTH = 48
# 128 and the number of SIGPIPE: what a shell has for a command whose reader has gone.
_READER_GONE = 141
# The folder that this command works in, where its arguments do not name it.
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@functools.cache
def errors() -> Console:
    """The console on stderr; one, so that log lines and a moving status line do not cross."""
    return Console(stderr=True, highlight=False)


def console() -> Console:
    """A console on stdout, as wide as the terminal (but at least 48 columns), or 100 columns when there is none."""
    made = Console(highlight=False)
    if made.is_terminal and made.width >= _LEAST_WIDTH:
        return made
    return Console(highlight=False, width=_LEAST_WIDTH if made.is_terminal else _FILE_WIDTH)


class Pipe:
    """A standard stream that ends the command, without a message, where the reader of its pipe has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        with self._ending():
            return self._stream.write(text)

    def flush(self) -> None:
        """As of the stream."""
        with self._ending():
            self._stream.flush()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still to be written goes nowhere, for Python would try once more at the end, and complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            raise SystemExit(_READER_GONE) from None


def command() -> str:
    """What to type to run this command again: ``snmf`` where the shell finds it, else the path to it."""
    running = Path(sys.argv[0])
    on_path = shutil.which("snmf")
    if running.name != "snmf" or (on_path and Path(on_path).resolve() == running.resolve()):
        return "snmf"
    return shlex.quote(os.path.relpath(running))


def work_in(folder: Path | None) -> None:
    """Take note of the folder that this command writes to, for the line that says what an interrupted one has kept."""
    _folder.set(folder)


def working_folder() -> Path | None:
    """What :func:`work_in` was told last."""
    return _folder.get()


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """A moving line on a terminal, nothing elsewhere. Yields what changes its text."""
    if not errors().is_terminal:
        yield lambda _: None
        return
    with errors().status(what) as status:
        yield status.update


def load_model_of(
    run: Run, device: str | None, trusted: bool = False, model: str | None = None
) -> LanguageModel:
    """The model of a run, from where ``model`` says it is now.

    Its own code is run only where ``trusted`` or SNMF_TRUST_REMOTE_CODE says so now.
    """
    trusted = trusted or os.environ.get("SNMF_TRUST_REMOTE_CODE", "").lower() in ("1", "true", "yes", "on")
    return run.load_model(device=device, trust_remote_code=trusted, model=model)


def loader(
    run: Run, device: str | None, trusted: bool = False, model: str | None = None
) -> Callable[[], LanguageModel]:
    """What loads the model of a run when it is first called, with a moving line meanwhile."""

    @functools.cache
    def load() -> LanguageModel:
        name = model or run.config["model"]["name"]
        return loading(name, lambda: load_model_of(run, device, trusted, model))

    return load


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    start_token: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The model that the command line names, with a moving line meanwhile; see :func:`snmf_interp.load_model`.

    Raises:
        ValueError: ``dtype`` is none that a model runs in.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--model-dtype: wanted {', '.join(dtypes)}, got {dtype!r}")

    def load() -> LanguageModel:
        from . import models

        return models.load_model(
            name,
            device=device,
            dtype=dtypes[dtype],
            revision=revision,
            trust_remote_code=trust_remote_code,
            start_token=None if start_token == "none" else start_token,
        )

    return loading(name, load)


def loading(name: str, load: Callable[[], LanguageModel]) -> LanguageModel:
    """What ``load`` gives, with a moving line meanwhile."""
    with waiting(f"loading {name}"):
        return load()


def done(screen: Console, what: str, seconds: float | None) -> None:
    """A finished step and the time it took; None when an earlier run had done it."""
    taken = "kept from before" if seconds is None else f"{seconds:.1f} s"
    screen.print(Text.assemble(("✓ ", "bold green"), what, (f"  {taken}", "dim")))


def counts(screen: Console, run: Run) -> None:
    """What model a run is of, and how many tokens it kept and left out."""
    config, numbers = run.config, run.config["counts"]
    screen.print(Text(f"  of {run.model_facts}", style="dim"))
    kept = numbers["kept"].values()
    total = f"{max(kept):,}" if len(set(kept)) == 1 else f"{min(kept):,} to {max(kept):,}"
    sinks = ", ".join(f"{n:,} at layer {layer}" for layer, n in numbers["sinks"].items() if n)
    left_out = (
        f"{numbers['first_position']:,} at the first position",
        f"{numbers['special']:,} special",
        f"sinks {sinks}" if sinks else "no sinks",
    )
    line = f"  {total} tokens of {numbers['samples']:,} texts; left out: {'; '.join(left_out)}"
    screen.print(Text(line, style="dim"))
    # Runs of earlier versions did not count them.
    if equal := numbers.get("samples_equal"):
        line = f"  {equal:,} texts equal one before, but for case and spaces; they are on its side of every split"
        screen.print(Text(line, style="dim"))
    if numbers["samples_cut"]:
        line = f"  {numbers['samples_cut']:,} texts were cut to {config['collect']['max_tokens']} tokens"
        screen.print(Text(line, style="dim"))


def fitted(screen: Console, layer: int, record: dict[str, Any]) -> None:
    """One factorised layer, from its record."""
    dead = len(record["dead_features"])
    # Runs of earlier versions do not say it.
    active = f"; L0 {record['mean_active']:.0f}" if "mean_active" in record else ""
    what = (
        f"layer {layer}: {record['options']['k']} features, relative error {record['relative_error']:.3f} "
        f"({record['relative_error']:.0%} of the energy unexplained) after {record['n_iter']} iterations"
        f"{active}{f', {dead} dead' if dead else ''}"
    )
    done(screen, what, None if record["reused"] else record["seconds"])


def with_effects_of(
    run: Run,
    layer: int,
    load: Callable[[], LanguageModel],
    choose: Callable[[list[Feature]], list[Feature]],
) -> list[Feature]:
    """All features of a layer, of which those that are chosen have measured effects; with a moving line meanwhile.

    Args:
        run: with the factorised layer.
        layer: which.
        load: loads the run's model; called only where something is missing.
        choose: of the described features, those whose effects are wanted.
    """
    with waiting(f"describing the features of layer {layer}"):
        features = run.features(layer, load)
    wanted = [feature.index for feature in choose(features) if feature.tokens and feature.effects is None]
    if not wanted:
        return features
    what = f"layer {layer}: measuring what features do to the next word"
    with waiting(what) as say:
        effects = run.effects(
            layer, load, wanted, progress=lambda done, total: say(f"{what}, {done} of {total}")
        )
    # Not by way of the run: it may not be written to.
    from .features import with_effects

    named = {feature.index: feature.effects for feature in features if feature.effects is not None}
    named |= {index: effects.words(load(), index) for index in wanted if index in effects.index.tolist()}
    return with_effects(features, named)
