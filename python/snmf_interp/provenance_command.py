"""``snmf neuron``, ``snmf overlap`` and ``snmf nearest``: where features come from and what they are near."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from . import terminal
from .arguments import DeviceOption, MovedModelOption, OneLayerOption, RunArgument, one_layer

if TYPE_CHECKING:
    from .features import Feature
    from .provenance import FeatureNeurons, Neighbour, PairOverlap, Use

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")]
DirectionOption = Annotated[
    bool, typer.Option("--direction", help="Also what is written to the residual stream; loads the model.")
]


def neuron(
    run: RunArgument,
    number: Annotated[
        int | None, typer.Argument(metavar="[NEURON]", help="Show the features that use this neuron.")
    ] = None,
    layers: OneLayerOption = None,
    feature: Annotated[
        int | None, typer.Option(help="Instead of NEURON: show all neurons of this feature.")
    ] = None,
    direction: DirectionOption = False,
    top: Annotated[int, typer.Option(help="Rows to show.")] = 25,
    as_json: JsonOption = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Show which features use a neuron, or which neurons make up a feature.

    Weights are relative to the length of the feature's column of Z; the squares of all add up to 1. Explained
    is the share of what all features together give to the neuron over the texts. With --feature and
    --direction, each neuron's share of the direction that the feature adds to the residual stream is there too.
    """
    from . import show
    from .provenance import NeuronIndex, feature_neurons
    from .runs import Run

    if (number is None) == (feature is None):
        raise ValueError("give a NEURON or --feature, to say what to show, and not both")
    opened = Run.open(run)
    layer = one_layer(opened, layers)
    factors = opened.factors(layer)
    index = NeuronIndex.of({layer: factors})
    load = terminal.loader(opened, device, model=run_model)
    screen = terminal.console()
    if feature is not None:
        weight = load().output_weight(layer) if direction else None
        parts = feature_neurons(factors, feature, output_weight=weight)
        counts = index.counts(layer)
        if as_json:
            for part in parts.neurons[:top]:
                typer.echo(json.dumps(asdict(part) | {"features": int(counts[part.neuron])}))
            return
        described = opened.features(layer, load)[feature]
        title = Text.assemble(
            (f"\nLayer {layer}, feature {feature}  ", "bold"), show.feature_words(described), "\n"
        )
        screen.print(title, no_wrap=True, overflow="ellipsis")
        screen.print(_neuron_table(parts, counts.tolist(), top))
        screen.print(Text(_concentration(parts, top), style="dim"))
        return
    assert number is not None
    uses = index.uses(layer, number)
    if as_json:
        for use in uses[:top]:
            typer.echo(json.dumps(asdict(use)))
        return
    usual = index.counts(layer).double()
    title = Text(f"\nLayer {layer}, neuron {number}: in {len(uses)} of {factors.k} features", style="bold")
    screen.print(title)
    screen.print(
        Text(
            f"a neuron of this layer is in {float(usual.mean()):.1f} features on average, and in {int(usual.max())} at "
            "most\n",
            style="dim",
        )
    )
    if uses:
        screen.print(_use_table(uses[:top], opened.features(layer, load), screen.width))


def overlap(
    run: RunArgument,
    first: Annotated[int, typer.Argument(metavar="FEATURE", help="A feature.")],
    second: Annotated[int, typer.Argument(metavar="FEATURE", help="Another of the same layer.")],
    layers: OneLayerOption = None,
    direction: DirectionOption = False,
    as_json: JsonOption = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Show what two features of a layer have in common.

    The neurons that both use, how many random groups of their sizes would share, and how alike the two are: in
    their weights, on which tokens they are used, and with --direction in what they write.
    """
    from . import show
    from .provenance import pair_overlap
    from .runs import Run

    opened = Run.open(run)
    layer = one_layer(opened, layers)
    factors = opened.factors(layer)
    load = terminal.loader(opened, device, model=run_model)
    weight = load().output_weight(layer) if direction else None
    pair = pair_overlap(factors, first, second, output_weight=weight)
    if as_json:
        typer.echo(json.dumps(asdict(pair)))
        return
    screen = terminal.console()
    features = opened.features(layer, load)
    screen.print(Text(f"\nLayer {layer}", style="bold"))
    for number in (first, second):
        line = Text.assemble((f"{number:>5}  ", "bold"), show.feature_words(features[number]))
        screen.print(line, no_wrap=True, overflow="ellipsis")
    screen.print(_pair(pair))
    if pair.shared:
        screen.print(_shared_table(pair))


def nearest(
    run: RunArgument,
    feature: Annotated[int, typer.Argument(metavar="FEATURE", help="A feature.")],
    layers: OneLayerOption = None,
    by: Annotated[
        str,
        typer.Option(
            help="tokens: used on the same tokens; direction: what it adds to the residual stream (loads the model); "
            "neurons: the same weights, within the layer."
        ),
    ] = "tokens",
    other: Annotated[
        Path | None,
        typer.Option(help="Search another run's folder: of the same texts, or (neurons) of the same model."),
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(help="Layers to search, such as 4-6,12.", show_default="all that are factorised"),
    ] = None,
    top: Annotated[int, typer.Option(help="Features to show.")] = 10,
    as_json: JsonOption = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Find the features nearest to one: in its layer, in other layers, or in another run.

    Neurons of different layers have nothing in common, so that across layers features are compared by the tokens
    that they are used on (correlation of coefficients) or by the direction that they write (cosine).
    """
    from . import show
    from .provenance import nearest_by_coefficients, nearest_by_direction, nearest_by_neurons
    from .runs import Run

    if by not in ("tokens", "direction", "neurons"):
        raise ValueError(f"--by: wanted tokens, direction or neurons, got {by!r}")
    opened = Run.open(run)
    layer = one_layer(opened, layers)
    searched = opened if other is None else Run.open(other)
    same = searched.config["model"]["weights"] == opened.config["model"]["weights"]
    if by != "tokens" and not same:
        raise ValueError(f"--other: {other} is of another model; features of the two compare by tokens only")
    numbers = [n for n in searched.parse_layers(among, name="among") if searched.is_fitted(n)]
    if by == "neurons":
        numbers = [n for n in numbers if n == layer]
    if not numbers:
        raise ValueError(
            f"{searched.path} has no factorised layer to search; see `snmf fit {shlex.quote(str(searched.path))}`"
        )
    own = opened.factors(layer)
    pool = {n: own if other is None and n == layer else searched.factors(n) for n in numbers}
    load = terminal.loader(opened, device, model=run_model)
    if by == "neurons":
        found = nearest_by_neurons(own, feature, pool, layer=layer, count=top)
    elif by == "tokens":
        store = opened.store()
        there = store if other is None else searched.store()
        found = nearest_by_coefficients(
            {layer: own}, store, layer, feature, others=pool, other_store=there, count=top
        )
    else:
        weights = {n: load().output_weight(n) for n in {layer, *numbers}}
        found = nearest_by_direction({layer: own}, weights, layer, feature, others=pool, count=top)
    if as_json:
        for row in found:
            typer.echo(json.dumps(asdict(row)))
        return
    screen = terminal.console()
    load_other = load if same else terminal.loader(searched, device)
    described = {n: searched.features(n, load_other) for n in {row.layer for row in found}}
    kind, column = {
        "tokens": ("correlation over tokens", "correlation"),
        "direction": ("cosine of the directions in the residual stream", "cosine"),
        "neurons": ("cosine of Z", "cosine"),
    }[by]
    here = opened.features(layer, load)[feature]
    place = "" if other is None else f" in {other}"
    title = Text.assemble((f"\n{layer}/{feature}  ", "bold"), show.feature_words(here))
    screen.print(title, no_wrap=True, overflow="ellipsis")
    screen.print(Text(f"\nnearest{place} by {kind}\n", style="bold"))
    screen.print(_neighbour_table(found, described, column, screen.width))


def _neuron_table(parts: FeatureNeurons, counts: Sequence[int], top: int) -> Table:
    written = any(part.written is not None for part in parts.neurons)
    table = _plain_table(
        "neuron", "weight", "of ‖z‖²", *(["of what it writes"] if written else []), "features that use it"
    )
    for part in parts.neurons[:top]:
        cells = [f"{part.neuron}", f"{part.weight:+.3f}", f"{part.share:.1%}"]
        if written:
            cells.append("–" if part.written is None else f"{part.written:.1%}")
        table.add_row(*map(Text, cells), Text(f"{counts[part.neuron]}"))
    return table


def _concentration(parts: FeatureNeurons, top: int) -> str:
    left = len(parts.neurons) - top
    return (
        f"\n{len(parts.neurons)} neurons{f', {left} not shown' if left > 0 else ''}. The weights are as concentrated "
        f"as those of {parts.effective_neurons:.1f} neurons of equal weight. ‖z‖ = {parts.norm:.3g}"
    )


def _use_table(uses: Sequence[Use], features: Sequence[Feature], width: int) -> Table:
    from . import show

    table = _plain_table("feature", "weight", "of ‖z‖²", "rank", "explained", width=width)
    table.add_column(show.FEATURE_WORDS, no_wrap=True, overflow="ellipsis", ratio=1)
    for use in uses:
        described = features[use.feature]
        table.add_row(
            Text(f"{use.feature}"),
            Text(f"{use.weight:+.3f}"),
            Text(f"{use.share:.1%}"),
            Text(f"{use.rank} of {described.n_neurons}"),
            Text(f"{use.explained:.0%}"),
            show.feature_words(described),
        )
    return table


def _pair(pair: PairOverlap) -> Text:
    text = Text.assemble(
        f"\nshared neurons           {len(pair.shared)} of {pair.sizes[0]} and {pair.sizes[1]} (Jaccard "
        f"{pair.jaccard:.2f})\n"
        f"  by chance              {pair.expected:.2g} on average; so many or more with probability "
        f"{pair.p_value:.2g}\n"
        f"cosine of Z              {pair.cosine:+.2f}\n"
    )
    if pair.direction_cosine is not None:
        text.append(f"  of what they write     {pair.direction_cosine:+.2f}\n")
    return text.append(f"correlation over tokens  {pair.correlation:+.2f}\n")


def _shared_table(pair: PairOverlap) -> Table:
    table = _plain_table("neuron", f"weight in {pair.first}", f"weight in {pair.second}")
    for row in pair.shared:
        table.add_row(
            Text(f"{row.neuron}"), Text(f"{row.first_weight:+.3f}"), Text(f"{row.second_weight:+.3f}")
        )
    return table


def _neighbour_table(
    found: Sequence[Neighbour], described: dict[int, list[Feature]], column: str, width: int
) -> Table:
    from . import show

    table = _plain_table("feature", column, width=width)
    table.add_column(show.FEATURE_WORDS, no_wrap=True, overflow="ellipsis", ratio=1)
    for row in found:
        table.add_row(
            Text(f"{row.layer}/{row.feature}"),
            Text(f"{row.similarity:+.2f}"),
            show.feature_words(described[row.layer][row.feature]),
        )
    return table


def _plain_table(*columns: str, width: int | None = None) -> Table:
    options: dict[str, Any] = {} if width is None else {"width": width}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", **options)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table
