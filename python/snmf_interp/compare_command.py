"""``snmf compare``: a run's features in another checkpoint."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import terminal
from .arguments import (
    DeviceOption,
    LayersOption,
    ModelArgument,
    RevisionOption,
    RunArgument,
    RunModelOption,
    TrustOption,
    fitted_layers,
)

if TYPE_CHECKING:
    from .compare import Difference, FeatureChange
    from .features import Feature
    from .models import LanguageModel
    from .runs import Run

logger = logging.getLogger(__name__)
# Standard deviations from which a change counts: a small effect by Cohen (1988).
_MIN_CHANGE = 0.2


def compare(
    run: RunArgument,
    model: ModelArgument,
    layers: LayersOption = None,
    top: Annotated[int, typer.Option(help="Features to show per layer.")] = 10,
    contexts: Annotated[int, typer.Option(help="Contexts per feature.")] = 2,
    min_change: Annotated[
        float,
        typer.Option(
            help="A feature counts as changed from so many standard deviations of its use over tokens on; Cohen calls "
            "0.2 small."
        ),
    ] = _MIN_CHANGE,
    texts: Annotated[
        str | None,
        typer.Option(help="Where the run's texts are now.", show_default="where snmf collect read them"),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="As it was given to snmf collect.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a layer instead of a table.")
    ] = False,
    run_model: RunModelOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Read the run's texts with another checkpoint, MODEL, and rank the run's features by how their use changed.

    Both checkpoints must make the same tokens. The other's activations are kept in DIR/compare; the same command
    resumes. A residual that rises says that MODEL does something that no feature of this run stands for.

    The size of a change is that of the mean over texts, in standard deviations of the feature's use over tokens. With
    many texts a change of no consequence is significant too: what is counted first is at least --min-change.
    """
    from . import files
    from .compare import compare_stores
    from .runs import Run

    if not min_change >= 0:
        raise ValueError(f"--min-change: wanted 0 or more standard deviations, got {min_change}")
    opened = Run.open(run)
    chosen = fitted_layers(opened, layers)
    factors = {number: opened.factors(number) for number in chosen}
    screen = terminal.console()
    with terminal.waiting(f"loading {model}"):
        other = _load(opened, model, device, revision, trust_remote_code)
    second = _collected(opened, other, texts, chunk)
    first = opened.store()
    results: dict[int, Difference] = {}
    for number in chosen:
        with terminal.waiting(f"comparing layer {number}"):
            results[number] = compare_stores(
                factors[number], first, second, other, number, described=top, n_tokens=contexts
            )
        result = _as_dict(results[number], opened, other, min_change)
        if second.path is not None:
            with files.keeping("comparisons", opened.path):
                files.write_json(second.path.parent / f"layer_{number}.json", result)
        if as_json:
            typer.echo(json.dumps(result, ensure_ascii=False))
            continue
        described = opened.features(number, terminal.loader(opened, device, model=run_model))
        screen.print(
            _page(
                results[number],
                described,
                opened,
                other,
                top,
                min_change,
                screen.width,
                not screen.is_terminal,
            )
        )


def _load(
    run: Run, name: str, device: str | None, revision: str | None, trust_remote_code: bool
) -> LanguageModel:
    import torch

    from .models import load_model

    collected = run.config["collect"]
    return load_model(
        name,
        device=device,
        dtype=getattr(torch, collected["model_dtype"]),
        revision=revision,
        trust_remote_code=trust_remote_code,
        start_token=collected["start_token"],
    )


def _collected(run: Run, model: LanguageModel, texts: str | None, chunk: int | None) -> Any:
    """The other checkpoint's activations of the run's texts, collected as the run was."""
    from . import files
    from .activations import collect
    from .compare import check_tokens
    from .store import MANIFEST
    from .texts import digest, read_texts

    source = texts or run.config["texts"]["source"]
    samples = read_texts(source, chunk=chunk)
    if digest(samples) != run.config["texts"]["digest"]:
        raise ValueError(
            f"the texts in {source!r} are not those that {run.path} was collected from; give these by --texts, and "
            "--chunk if they were cut"
        )
    corpus, collected = run.store().corpus, run.config["collect"]
    for number, sample in enumerate(samples):
        ids = model.encode(sample.text, max_tokens=collected["max_tokens"])
        check_tokens(
            sample.id, corpus.tokens_of(number), ids, (run.config["model"]["name"], model.name), model
        )
    folder = run.path / "compare" / model.fingerprint() / "activations"
    if not (kept := files.is_writable(folder)):
        logger.warning(
            "%s may not be written to: the other activations are held in memory and not kept", run.path
        )
    return collect(
        model,
        samples,
        run.layers,
        out=folder if kept or (folder / MANIFEST).is_file() else None,
        **{
            name: collected[name]
            for name in (
                "batch_size",
                "max_tokens",
                "dtype",
                "sink_threshold",
                "padding_side",
                "shard_tokens",
            )
        },
    )


def _page(
    difference: Difference,
    features: Sequence[Feature],
    run: Run,
    model: LanguageModel,
    top: int,
    min_change: float,
    width: int,
    marks: bool,
) -> Group:
    from .features import visible

    residual = difference.residual_change
    covered = (
        f"{residual.value:.2%} more of the energy is unexplained"
        if residual.low > 0
        else f"{-residual.value:.2%} less of the energy is unexplained"
        if residual.high < 0
        else "no clear change"
    )
    left_out = f", {difference.n_left_out} more are a sink in one" if difference.n_left_out else ""
    equal = f" (and {difference.n_equal} equal ones, counted with these)" if difference.n_equal else ""
    head = Text.assemble(
        (
            f"\nLayer {difference.layer}: {visible(run.config['model']['name'])} → {visible(model.name)}\n\n",
            "bold",
        ),
        *_headline(difference, min_change),
        f"{difference.n_tokens:,} tokens of {difference.n_texts} texts{equal} that both keep{left_out}\n"
        f"residual on the basis {difference.first_residual:.4f} → {difference.second_residual:.4f}: {covered}\n"
        f"  change {residual.value:+.4f}, 95 % interval {residual.low:+.4f} to {residual.high:+.4f}\n",
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", width=width)
    left = 24
    table.add_column("feature", width=left)
    table.add_column(
        "where it fires, and where its use changed most",
        no_wrap=True,
        overflow="ellipsis",
        width=width - left - 3,
    )
    shown = [change for change in difference.changes if change.first != change.second][:top]
    for change in shown:
        table.add_row(_change(change), _contexts(change, features[change.feature], width - left - 3, marks))
    if not shown:
        return Group(head, Text("no feature is used differently on any token"))
    return Group(head, table, _legend())


def _headline(difference: Difference, min_change: float) -> list[tuple[str, str]]:
    """How much has changed, then how surely."""
    changes = difference.changes
    changed = difference.changed(min_change)
    largest = abs(changes[0].standardised)
    moved = [change for change in changes if change.correlation == change.correlation]
    lines = [
        (f"{len(changed)} of {len(changes)} features changed by {min_change:g} sd or more\n", "bold"),
        (
            f"  size: median {difference.median_size:.2g} sd, largest {largest:.2g} sd\n"
            f"  significant, of any size: {len(difference.significant())}\n",
            "",
        ),
    ]
    if moved:
        least = min(moved, key=lambda change: change.correlation)
        middle = statistics.median(change.correlation for change in moved)
        line = f"  r: median {middle:.2f}, lowest {least.correlation:.2f} (feature {least.feature})\n"
        lines.append((line, ""))
    return lines


def _legend() -> Text:
    return Text(
        "sd: the change of the mean use, in standard deviations of the use over tokens. q: of a paired test over "
        "texts, corrected for the number of features; below 0.05 is significant. r: correlation of the use in the two "
        "over tokens; where it is low, the feature has moved to other tokens.",
        style="dim",
    )


def _change(change: FeatureChange) -> Text:
    text = Text.assemble((f"{change.feature}", "bold"), (f"  {change.standardised:+.2f} sd", "bold yellow"))
    mark = f"q = {change.q_value:.1g}" if change.q_value >= 1e-4 else "q < 0.0001"
    text.append(f"\n{change.first:.3g} → {change.second:.3g}")
    text.append(f"\n{mark}, r = {change.correlation:.2f}", style="dim" if change.q_value < 0.05 else "red")
    return text


def _contexts(change: FeatureChange, feature: Feature, width: int, marks: bool) -> Group:
    from . import show

    lines = [show.feature_words(feature)]
    for row in change.tokens:
        value = f"{row.first:6.3g} → {row.second:<6.3g} "
        context = show.context_line(row.token, width - len(value), marks=marks)
        lines.append(Text.assemble((value, "dim"), context, no_wrap=True, overflow="ellipsis"))
    return Group(*lines, Text(""))


def _as_dict(difference: Difference, run: Run, model: LanguageModel, min_change: float) -> dict[str, Any]:
    from . import files

    counts = {
        "min_change": min_change,
        "n_changed": len(difference.changed(min_change)),
        "n_significant": len(difference.significant()),
        "median_size": difference.median_size,
    }
    names = {
        "first": run.config["model"]["name"],
        "second": model.name,
        "second_weights": model.fingerprint(),
    }
    return names | counts | files.finite(asdict(difference))
