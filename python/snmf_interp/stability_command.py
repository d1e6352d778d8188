"""``snmf stability``, and the table of ``snmf fit --k auto``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import terminal
from .arguments import DeviceOption, LayersOption, MovedModelOption, RunArgument, fitted_layers

if TYPE_CHECKING:
    from .choosing import KChoice
    from .features import Feature
    from .runs import Run
    from .stability import Stability


def stability(
    run: RunArgument,
    layers: LayersOption = None,
    seeds: Annotated[int, typer.Option(help="Starts in all, the layer's own fit among them.")] = 5,
    threshold: Annotated[
        float, typer.Option(help="Cosine from which a matched feature counts as the same.")
    ] = 0.7,
    top: Annotated[int, typer.Option(help="Features to list at either end.")] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a layer instead of tables.")
    ] = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Say which features of a layer are found again from other starts.

    Each layer is fitted again with other seeds and otherwise the same options (the fits are kept in
    DIR/layer_N/starts). Features are matched one to one by the cosine of their columns of Z. The words of the
    features come from DIR/layer_N/features.jsonl; the first call needs the model.
    """
    from .refits import layer_stability
    from .runs import Run

    opened = Run.open(run)
    screen = terminal.console()
    load = terminal.loader(opened, device, model=run_model)
    for layer in fitted_layers(opened, layers):
        report = layer_stability(opened, layer, seeds, threshold=threshold, progress=sys.stderr.isatty())
        if as_json:
            typer.echo(json.dumps(_as_dict(report, layer), ensure_ascii=False))
        else:
            _show(screen, report, opened.features(layer, load), layer, top)


def _show(screen: Console, report: Stability, features: Sequence[Feature], layer: int, top: int) -> None:
    screen.print(_summary(report, features, layer))
    recurrence = report.recurrence
    order = sorted(
        range(report.k), key=lambda i: (-float(recurrence[i]), -float(report.similarity[i].mean()), i)
    )
    screen.print(Text("found again most surely\n", style="bold"))
    screen.print(_table(report, features, order[:top], screen.width))
    if len(order) > top:
        rest = order[max(top, len(order) - top) :][::-1]
        screen.print(Text("\nfound again least\n", style="bold"))
        screen.print(_table(report, features, rest, screen.width))


@dataclass(frozen=True)
class Sizes:
    """What ``--k`` and ``--k-candidates`` say: ``k``, or None for one that is chosen among ``candidates``."""

    k: int | None
    candidates: tuple[int, ...] | None

    @classmethod
    def of(cls, k: str, candidates: str | None) -> Sizes:
        """From the options.

        Raises:
            ValueError: one that cannot be read, or candidates where there is nothing to choose.
        """
        if k != "auto":
            if candidates is not None:
                raise ValueError("--k-candidates: there is nothing to choose; use it with --k auto")
            if not k.isdigit() or not int(k):
                raise ValueError(f"--k: wanted a number of features, at least 1, or auto, got {k!r}")
            return cls(int(k), None)
        parts = [part.strip() for part in (candidates or "").split(",") if part.strip()]
        if candidates is not None and not (parts and all(part.isdigit() and int(part) for part in parts)):
            raise ValueError(
                f"--k-candidates: wanted numbers of features such as 25,50,100, got {candidates!r}"
            )
        return cls(None, tuple(map(int, parts)) or None)


def fit_chosen(
    screen: Console, run: Run, layer: int, sizes: Sizes, options: dict[str, Any], *, overwrite: bool
) -> None:
    """Choose a layer's number of features, print the evidence, fit, and note the evidence in the layer's record.

    Raises:
        ValueError: the layer was factorised with a k that was given or with other options, and ``overwrite`` is not
            set.
    """
    from .refits import K_CHOICE, choose_k

    if run.is_fitted(layer) and not overwrite:
        record = run.record(layer)
        k = record["options"]["k"]
        if K_CHOICE not in record:
            raise ValueError(
                f"layer {layer} of {run.path} was factorised with k = {k}, which was given; use --overwrite to have k "
                "chosen, or another folder"
            )
        # Other options are refused now, not when the candidates have been fitted.
        next(run.fit([layer], k, **options))
    screen.print(Text(f"layer {layer}: how many features?\n", style="bold"))

    def announce(k: int) -> None:
        if sys.stderr.isatty():
            terminal.errors().print(Text(f"fitting {k} features from several starts", style="dim"))

    choice = choose_k(run, layer, sizes.candidates, options, before=announce, progress=sys.stderr.isatty())
    screen.print(evidence_table(choice))
    for _, fitted in run.fit([layer], choice.k, overwrite=overwrite, progress=sys.stderr.isatty(), **options):
        terminal.fitted(screen, layer, fitted)
    run.note(layer, K_CHOICE, asdict(choice))


def evidence_table(choice: KChoice) -> Group:
    """What spoke for a number of features."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name in (
        "k",
        "held-out error",
        "found again",
        "by chance",
        "beyond chance",
        "dead",
        "duplicates",
        "",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for row in choice.evidence:
        chosen = row.k == choice.k
        cells = (
            f"{row.k}",
            f"{row.relative_error:.3f}",
            f"{row.recurrence:.2f} ± {row.standard_error:.2f}",
            f"{row.chance:.2f}",
            f"{row.beyond_chance:.2f} ± {row.beyond_chance_error:.2f}",
            f"{row.n_recurring:.0f}",
            f"{row.dead:.1f}",
            f"{row.duplicates:.1f}",
            "← chosen" if chosen else "",
        )
        table.add_row(*(Text(cell) for cell in cells), style="bold" if chosen else "")
    explained = (
        f"\nk = {choice.k}: {choice.reason}. Found again: the share of features that a fit from another start has too "
        f"(cosine of Z at least {choice.threshold}, {len(choice.seeds)} starts); {choice.held_out:.0%} of the texts "
        "are held out, equal ones together."
    )
    return Group(table, Text(explained, style="dim"))


def _summary(report: Stability, features: Sequence[Feature], layer: int) -> Text:
    others = len(report.seeds) - 1
    often = report.recurrence >= 0.5
    error = "" if math.isnan(report.standard_error) else f" ± {report.standard_error:.2f}"
    found = report.recurrence
    # L0: what the shares of tokens that the features fire on add up to.
    active = sum(feature.firing_share for feature in features)
    text = Text.assemble(
        (
            f"\nLayer {layer}, {report.k} features from {len(report.seeds)} starts, L0 {active:.0f}\n\n",
            "bold",
        ),
        f"found by another start    {report.mean_recurrence:.2f}{error} of the features (cosine of Z at least "
        f"{report.threshold:g})\n",
        f"  by chance               {report.chance.features:.2f} where each neuron's weights are shuffled\n",
        f"                          {report.chance.neurons:.2f} where each feature's weights are shuffled\n",
        f"of this fit's features    {int((found == 1).sum())} are in all {others} other fits, "
        f"{int((found == 0).sum())} in none\n",
        f"dead features             {_counts(report.dead)}\n",
        f"duplicates                {_counts(report.n_duplicates)} (pairs with a cosine of at least "
        f"{report.duplicate_threshold:g})\n",
    )
    for pair in report.duplicates[:5]:
        text.append(f"                          {pair.first} and {pair.second}, cosine {pair.cosine:.2f}\n")
    if bool(often.any()) and not bool(often.all()):
        groups = [[f for f in features if bool(often[f.index]) is group] for group in (True, False)]
        if any(f.concept for f in features):
            what = "concept above chance"
            high, low = (f"{sum(f.concept is not None for f in group) / len(group):.0%}" for group in groups)
        else:
            what = "mean clarity"
            high, low = (f"{sum(f.clarity for f in group) / len(group):.2f}" for group in groups)
        text.append(
            f"{what:<25} {high} of the {len(groups[0])} features found by half of the other fits\n"
            f"{'':<25} {low} of the rest\n"
        )
    return text


def _table(report: Stability, features: Sequence[Feature], order: Sequence[int], width: int) -> Table:
    from . import show

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", width=width)
    for name in ("feature", "found in", "cosine", "on tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(show.FEATURE_WORDS, no_wrap=True, overflow="ellipsis", ratio=1)
    others = len(report.seeds) - 1
    for i in order:
        found = round(float(report.recurrence[i]) * others)
        table.add_row(
            f"{i}",
            f"{found} of {others}",
            f"{float(report.similarity[i].mean()):.2f}",
            f"{float(report.correlation[i].nanmean()):.2f}",
            show.feature_words(features[i]),
        )
    return table


def _counts(values: Sequence[int]) -> str:
    return "none" if not any(values) else f"{', '.join(map(str, values))} by start"


def _as_dict(report: Stability, layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "k": report.k,
        "seeds": list(report.seeds),
        "threshold": report.threshold,
        "mean_recurrence": report.mean_recurrence,
        "standard_error": None if math.isnan(report.standard_error) else report.standard_error,
        "chance": asdict(report.chance),
        "agreement": report.agreement.tolist(),
        "recurrence": report.recurrence.tolist(),
        "matched": report.matched.tolist(),
        "similarity": report.similarity.tolist(),
        "correlation": [[None if math.isnan(v) else v for v in row] for row in report.correlation.tolist()],
        "dead": list(report.dead),
        "n_duplicates": list(report.n_duplicates),
        "duplicates": [asdict(pair) for pair in report.duplicates],
    }
