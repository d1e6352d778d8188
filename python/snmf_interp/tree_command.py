"""``snmf tree``: a hierarchy of a run's features, made or read, shown and exported."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from . import terminal
from .arguments import MovedModelOption, OneLayerOption, one_layer

# Of a layer that is not factorised.
_K = 100


def tree(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder, made by snmf collect.")],
    layers: OneLayerOption = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Features of each level, finest first, such as 100,50,25.",
            show_default="the layer's own, their half and their quarter; else 100,50,25",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Fraction of neurons that a feature keeps.",
            show_default="as the layer was factorised, else 0.01",
        ),
    ] = None,
    neuron_scale: Annotated[
        str | None,
        typer.Option(
            help="rms divides each neuron by its RMS first; or none.",
            show_default="as the layer was factorised, else rms",
        ),
    ] = None,
    joint: Annotated[
        str,
        typer.Option(
            help="Fine-tuning: all (the losses of all levels count), top (the coarsest level's alone, as in the "
            "paper) or none."
        ),
    ] = "all",
    seed: Annotated[int, typer.Option(help="Of the fits.")] = 0,
    threshold: Annotated[
        float, typer.Option(help="Show links above this share of a child's strongest link.")
    ] = 0.15,
    children: Annotated[int, typer.Option(help="Children of a feature, at most.")] = 4,
    top: Annotated[int, typer.Option(help="Features of the coarsest level to show, by energy; 0: all.")] = 10,
    describe: Annotated[
        bool, typer.Option("--describe/--bare", help="Say what features stand for (needs the model).")
    ] = True,
    export: Annotated[
        list[Path] | None,
        typer.Option(help="Write the whole graph to a .json, .graphml or .dot file; may be given again."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a hierarchy made with other options.")
    ] = False,
    run_model: MovedModelOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where the model runs.", show_default="cuda when there is one, else cpu"),
    ] = None,
) -> None:
    """Group a layer's features into a hierarchy and show it as a tree.

    The finest level is the layer's factorisation where snmf fit has made one of that size and these options, else a
    fit of its own. The hierarchy is kept in DIR/layer_N/tree; the same command shows it again, and goes on with one
    that was cut short. A feature may have several parents: it is shown in full under the first.
    """
    from .features import mean_active
    from .runs import Run
    from .trees import build_tree, export_format

    if joint not in ("all", "top", "none"):
        raise ValueError(f"--joint: wanted all, top or none, got {joint!r}")
    if neuron_scale not in (None, "rms", "none"):
        raise ValueError(f"--neuron-scale: wanted rms or none, got {neuron_scale!r}")
    # Before anything is fitted: a name that cannot be written to, and levels that cannot be read.
    for path in export or []:
        export_format(path)
    sizes = None if levels is None else _sizes(levels)
    opened = Run.open(run)
    layer = one_layer(opened, layers)
    # As the solver had them, whatever it was given.
    own = opened.record(layer)["solver_options"] if opened.is_fitted(layer) else {}
    sizes = sizes or _halved(own.get("k", _K))
    keep = own.get("keep", 0.01) if keep is None else keep
    scale = own.get("neuron_scale", "rms") if neuron_scale is None else neuron_scale
    screen = terminal.console()
    with terminal.waiting(f"fitting levels {', '.join(map(str, sizes))}"):
        hierarchy, record = opened.hierarchy(
            layer,
            sizes,
            keep=keep,
            neuron_scale=None if scale == "none" else scale,
            joint=None if joint == "none" else joint,
            seed=seed,
            overwrite=overwrite,
        )
    source = " on the features of snmf fit" if record["base"] else ""
    what = f"layer {layer}: levels of {', '.join(map(str, sizes))} features{source}"
    terminal.done(screen, what, None if record["reused"] else record["seconds"])
    for number, level in enumerate(hierarchy.levels):
        active = mean_active(hierarchy.factorization(number))
        line = f"  level {number}: {level.k} features, relative error {level.relative_error:.3f}, L0 {active:.0f}"
        screen.print(Text(line, style="dim"))
    descriptions = None
    if describe:
        kept = (opened.path / f"layer_{layer}" / "tree" / "hierarchy.safetensors").is_file()
        load = terminal.loader(opened, device, model=run_model)
        descriptions = opened.descriptions(layer, load, None if kept else hierarchy)
    graph = build_tree(hierarchy, threshold=threshold, most=children, descriptions=descriptions)
    coarsest = [place for place in graph.roots if place[0] == len(sizes) - 1]
    shown = coarsest[: top or None]
    screen.print(graph.to_text(shown))
    legend = "%: a child's weight as a share of the weights of all that are shown beside it. ↑: its children are above."
    if descriptions and any(description.concept for description in descriptions.values()):
        legend += (
            " A name is followed by the concept, if there is one, that the feature tells better than chance, and its "
            "average precision."
        )
    screen.print(Text(f"\n{legend}", style="dim"))
    rest = [f"{len(coarsest) - len(shown)} more of level {len(sizes) - 1} (--top 0 shows all)"] * (
        len(shown) < len(coarsest)
    )
    orphans = len(graph.roots) - len(coarsest)
    rest += [f"{orphans} feature{'s'[: orphans != 1]} without a parent"] * (orphans > 0)
    if rest:
        screen.print(Text(f"not shown: {'; '.join(rest)}", style="dim"))
    for path in export or []:
        graph.write(path)
        screen.print(Text(f"written: {path}", style="dim"), soft_wrap=True)


def _halved(k: int) -> list[int]:
    """``[k, k / 2, k / 4]``, as far as there are two features to put together.

    Raises:
        ValueError: there is one feature.
    """
    if k < 2:
        raise ValueError(
            "--levels: one feature has nothing to be grouped with; factorise the layer into more"
        )
    return [size for size in (k, k // 2, k // 4) if size]


def _sizes(levels: str) -> list[int]:
    sizes = [int(part) for part in levels.split(",") if part.strip().isdecimal()]
    falling = all(coarser < finer for finer, coarser in itertools.pairwise(sizes))
    if len(sizes) != levels.count(",") + 1 or len(sizes) < 2 or not falling or not sizes[-1]:
        raise ValueError(f"--levels: wanted falling numbers such as 100,50,25, got {levels!r}")
    return sizes
