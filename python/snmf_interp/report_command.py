"""``snmf report``: a run as one HTML file."""

from __future__ import annotations

import functools
import json
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import terminal
from .arguments import DeviceOption, MovedModelOption, RunArgument

if TYPE_CHECKING:
    from .models import LanguageModel


def report(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML file; one of that name is replaced.")
    ] = Path("report.html"),
    layers: Annotated[
        str | None, typer.Option(help="Such as 8,23.", show_default="all that are factorised")
    ] = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER=FILE",
            help="A hierarchy of a layer, as snmf tree --export wrote it to a .json file, instead of the one that "
            "snmf tree keeps in the run.",
        ),
    ] = None,
    steering: Annotated[
        list[Path] | None,
        typer.Option(
            help="Texts of a feature, as snmf steer --json printed them; may be given several times."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Write a run as one HTML page to explore: features in context, neurons, overlaps, and the run's facts.

    The page needs no network and no server: open it from disk, or send it to someone. With labels (snmf label) it
    shows their names, with a hierarchy (snmf tree) the tree. Features that are not described yet are described first,
    which needs the model.
    """
    from .report import write_report
    from .runs import Run

    opened = Run.open(run)
    name = opened.config["model"]["name"]
    started = time.perf_counter()
    with terminal.waiting("reading the run") as say:

        @functools.cache
        def load() -> LanguageModel:
            say(f"loading {name}")
            loaded = terminal.load_model_of(opened, device, model=run_model)
            say("describing features")
            return loaded

        written = write_report(
            opened,
            output,
            layers=None if layers is None else opened.parse_layers(layers),
            model=load,
            hierarchy=_trees(tree),
            steering=[record for path in steering or [] for record in _records(path)],
            before_layer=lambda layer: say(f"layer {layer}: reading features"),
        )
    screen = terminal.console()
    what = f"{written.features} features in {written.path}, {written.size / 1e6:.1f} MB"
    terminal.done(screen, what, time.perf_counter() - started)
    for note in written.cut:
        screen.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    if show and not webbrowser.open(written.path.resolve().as_uri()):
        terminal.errors().print(Text(f"no browser was found; open {written.path} by hand"), soft_wrap=True)


def _trees(given: list[str] | None) -> dict[int, dict[str, Any]]:
    from . import files

    trees = {}
    for part in given or []:
        layer, equals, path = part.partition("=")
        if not equals or not layer.isdigit():
            raise ValueError(f"--tree: wanted LAYER=FILE, such as 8=tree.json, got {part!r}")
        trees[int(layer)] = files.read_json(Path(path))
    return trees


def _records(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--steering: {path} is not what `snmf steer --json` prints, one object a line ({error})"
        ) from error
