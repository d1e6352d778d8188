"""``snmf label``: names for the features of a run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import llm_options, terminal
from .arguments import DeviceOption, LayersOption, RunArgument, RunModelOption, fitted_layers
from .llm_options import (
    BaseUrlOption,
    ConcurrencyOption,
    LlmOption,
    LocalOption,
    ParameterOption,
    TimeoutOption,
)

if TYPE_CHECKING:
    from .features import Feature
    from .labels import Label
    from .llm import LocalModel, OpenAIModel

# Features of a layer in the table, where it is not said how many.
_SHOWN = 20


def label(
    run: RunArgument,
    layers: LayersOption = None,
    model: LlmOption = None,
    base_url: BaseUrlOption = None,
    local: LocalOption = None,
    side: Annotated[
        str, typer.Option(help="input (what it fires on), output (what it makes likelier), or both.")
    ] = "both",
    top: Annotated[
        int | None,
        typer.Option(
            help="Label and show only so many features of a layer, clearest first.",
            show_default=f"label all, show {_SHOWN}",
        ),
    ] = None,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 600.0,
    parameter: ParameterOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for every label, instead of a table.")
    ] = False,
    run_model: RunModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Name the features of a factorised run.

    Without --model, --base-url and --local by their distinctive words: what they fire on more than the texts would
    have it, near … for words around it. Words alone cannot name what a feature makes likelier: that side is a list of
    words, measured where snmf features --effects did so. With one of the three options by that model, which reads each
    feature's strongest tokens in context. Labels are kept in DIR/layer_N/labels, and a model's answers in DIR/llm: the
    same command asks only for what is missing.
    """
    from . import files
    from .features import by_clarity
    from .labels import SIDES, label_features, made_by, write_labels
    from .runs import Run

    if side not in (*SIDES, "both"):
        raise ValueError(f"--side: wanted input, output or both, got {side!r}")
    if top is not None and top < 1:
        raise ValueError(f"--top: wanted at least 1, got {top}")
    sides = SIDES if side == "both" else (side,)
    opened = Run.open(run)
    chosen = fitted_layers(opened, layers)
    llm = llm_options.chosen(opened.answers, model, base_url, local, concurrency, timeout, parameter, device)
    screen = terminal.console()
    load = terminal.loader(opened, device, model=run_model)
    reasons: Counter[str] = Counter()
    asked = 0
    for number in chosen:
        started = time.perf_counter()
        features = sorted(opened.features(number, load), key=by_clarity)[:top]
        corpus = opened.words(load) if llm is None else None
        # Features that could not be kept have said so, and labels are kept beside theirs alone.
        described = opened.features_path(number)
        record = made_by(llm, described) if described.is_file() else None
        labels = label_features(features, llm, sides=sides, corpus=corpus)
        if record is not None:
            with files.keeping("labels", opened.path):
                write_labels(opened.labels_folder(number), labels, record)
        asked += len(labels)
        reasons.update(label.reason for label in labels if label.reason is not None)
        if as_json:
            for row in labels:
                typer.echo(json.dumps(asdict(row), ensure_ascii=False))
            continue
        from . import show

        shown, marks = features[: top or _SHOWN], not screen.is_terminal
        screen.print(show.label_table(shown, labels, screen.width, marks=marks))
        screen.print(show.label_notes(shown, labels, marks=marks))
        _summary(screen, number, features, labels, time.perf_counter() - started)
    if llm is not None and not as_json:
        screen.print(Text(_costs(llm), style="dim"), soft_wrap=True)
    if reasons:
        reason, _ = reasons.most_common(1)[0]
        missing = f"{sum(reasons.values())} of {asked} answers are missing, most often: {reason}"
        if sum(reasons.values()) == asked:
            raise RuntimeError(missing)
        terminal.errors().print(
            Text(
                f"{missing}. The same command asks again where none came; "
                f"those that could not be used are kept in {opened.answers}."
            ),
            soft_wrap=True,
        )


def _summary(
    screen: Any, layer: int, features: Sequence[Feature], labels: Sequence[Label], seconds: float
) -> None:
    from .features import WORDS
    from .labels import count_labels

    source = labels[0].source
    parts = []
    for side, of in (("input", "what they fire on"), ("output", "what they make likelier")):
        own = [label for label in labels if label.side == side]
        if not own:
            continue
        n = f"{len(own)} feature{'s'[: len(own) != 1]}"
        has = "has" if len(own) == 1 else "have"
        if own[0].is_list:
            lists = [feature for feature, label in zip(features, own, strict=True) if label.text is not None]
            measured = sum(feature.effects is not None for feature in lists)
            parts.append(
                f"{len(lists)} of {n} {has} a list of words for {of} ({measured} measured, {len(lists) - measured} "
                "by the logit lens)"
            )
            continue
        count = count_labels(own)
        kind = "a clear name" if source == WORDS else "a name"
        missing = f", {count['missing']} missing" if count["missing"] else ""
        parts.append(f"{count['clear']} of {n} {has} {kind} by {source} for {of}{missing}")
    terminal.done(screen, f"layer {layer}: {'; '.join(parts)}", seconds)


def _costs(llm: OpenAIModel | LocalModel) -> str:
    usage = llm.usage
    return (
        f"  {usage.sent:,} questions asked, {usage.failed:,} of them without answer, {usage.cached:,} answers kept "
        f"from before; {usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"
    )
