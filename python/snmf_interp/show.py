"""Features in a terminal, or in a file that its output is sent to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import median_high
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .effects import AGREES, KL, PROMPTS
from .features import STRONG, by_clarity, visible

if TYPE_CHECKING:
    from .features import Feature, TokenInContext
    from .labels import Label


def clearest(features: Iterable[Feature], count: int) -> list[Feature]:
    """The ``count`` clearest features, at most one per concept, ties by lower index."""
    chosen: list[Feature] = []
    concepts: set[str] = set()
    for feature in sorted(features, key=by_clarity):
        if len(chosen) == count:
            break
        if feature.tokens and (feature.concept is None or feature.concept not in concepts):
            concepts.add(feature.concept or "")
            chosen.append(feature)
    return chosen


def feature_table(features: Sequence[Feature], width: int, *, marks: bool, contexts: int = 3) -> Table:
    """One row per feature: its name, then its words, contexts and the words that it makes likelier.

    Args:
        features: what to show.
        width: of the whole table in characters.
        marks: put ‹ › around the peak token, for output without bold type.
        contexts: how many.
    """
    left = 24
    room = width - left - 3
    table = Table(box=box.SIMPLE_HEAD, width=width, show_edge=False, pad_edge=False, header_style="bold")
    # Both widths are fixed, for Rich would squeeze the first column in favour of long lines in the second.
    table.add_column("feature", width=left)
    table.add_column(
        f"where it fires{_arrow_legend(features)}", width=room, no_wrap=True, overflow="ellipsis"
    )
    for feature in features:
        head = Text.assemble((f"{feature.layer}/{feature.index}", "bold"), f"  {visible(feature.name)}\n")
        if feature.concept:
            head.append(f"{visible(feature.concept).replace('_', ' ')}", style="bold cyan")
            head.append(f"\nAP {feature.concept_precision:.2f} in sample\n", style="dim")
        head.append(
            f"on {feature.firing_share:.0%} of tokens,\nstrong on {feature.strong_share:.1%}\n", style="dim"
        )
        lines = [Text(counted_words(feature), style="green", no_wrap=True, overflow="ellipsis")]
        lines += [context_line(token, room, marks=marks) for token in feature.tokens[:contexts]]
        lines += likelier_lines(feature)
        table.add_row(head, Group(*lines, Text("")))
    return table


def table_notes(features: Sequence[Feature], mean_active: float, model: str) -> Text:
    """What the numbers of :func:`feature_table` are, in a few sentences.

    Args:
        features: all that the table is of.
        mean_active: L0 of the layer.
        model: what they are features of, see :attr:`snmf_interp.runs.Run.model_facts`.
    """
    notes = [
        f"Model: {model}.",
        f"L0: a token has {mean_active:.0f} of the layer's features on average. on: the share of tokens with a "
        f"coefficient above 0; strong on: above {STRONG:.0%} of the feature's largest.",
    ]
    chance = features[0].chance_precision if features else 0.0
    if any(feature.concept for feature in features):
        notes.append(
            "AP: average precision of the label of the texts that the feature ranks best, on the texts that the fit "
            f"saw; with shuffled labels the best feature of the layer has {chance:.2f}, below which no label is shown."
        )
    elif chance:
        notes.append(
            f"No label of the texts is ranked better than by chance (average precision {chance:.2f})."
        )
    measured = [feature.effects for feature in features if feature.effects is not None]
    agreement = features[0].lens_agreement if features else None
    if measured:
        repeats = median_high(one.repeatability for one in measured)
        notes.append(
            f"→: measured, with the feature added at a divergence of {KL:g} nats, behind {len(PROMPTS)} prompts; words "
            "that rise above what random groups of neurons raise. Behind one half of the prompts and behind the other "
            f"the changes agree by a rank correlation of {repeats:.2f} (median)."
        )
    if len(measured) < len(features) and agreement is not None:
        verdict = "tells" if agreement >= AGREES else "does not tell"
        notes.append(
            f"The logit lens {verdict} what features do in this layer: its rank correlation with measured effects is "
            f"{agreement:.2f}{'' if agreement >= AGREES else ', so it is not shown; --effects measures all features'}."
        )
    elif len(measured) < len(features):
        notes.append("lens →: words by the logit lens, which in early and middle layers is mostly wrong.")
    return Text(" ".join(notes), style="dim")


def _arrow_legend(features: Sequence[Feature]) -> str:
    if any(feature.effects is not None for feature in features):
        return ", and → what it makes likelier"
    return ", and what the logit lens says" if any(map(_lens_shown, features)) else ""


def _lens_shown(feature: Feature) -> bool:
    return feature.effects is None and feature.lens_holds and bool(feature.distinctive)


def likelier_lines(feature: Feature) -> list[Text]:
    """What it makes likelier, on a line: measured, else by the logit lens where that holds, else nothing."""
    if feature.effects is not None:
        return [_words_line("→ ", feature.effects.raised)] if feature.effects.raised else []
    return [_words_line("lens → ", feature.distinctive)] if _lens_shown(feature) else []


def feature_page(feature: Feature, width: int, *, marks: bool, contexts: int = 15) -> Group:
    """Everything about one feature."""
    facts = Text(
        f"fires on {feature.n_firing:,} tokens ({feature.firing_share:.1%}), strong on {feature.n_strong:,} "
        f"({feature.strong_share:.1%}: above {STRONG:.0%} of its largest) · {feature.energy:.1%} of the energy · "
        f"{feature.n_neurons} neurons · {feature.distinct_tokens:.0%} distinct words",
        style="dim",
    )
    neurons = ", ".join(f"{neuron} ({weight:+.2f})" for neuron, weight in feature.neurons[:12])
    lines = [context_line(token, width - 16, marks=marks) for token in feature.tokens[:contexts]]
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(justify="right", style="dim", width=5)
    table.add_column(justify="right", style="dim", width=5)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for token, line in zip(feature.tokens[:contexts], lines, strict=True):
        table.add_row(f"{token.strength:.3g}", f"{token.share:.0%}", line)
    return Group(
        _title(feature),
        facts,
        Text(),
        Text("strongest tokens (strength, share of the token's features)", style="bold"),
        table,
        Text(),
        *_effects(feature),
        Text(),
        Text("neurons (weight relative to ‖z‖)", style="bold"),
        Text(neurons),
    )


def _effects(feature: Feature) -> list[Text]:
    """Measured effects where there are some, and the logit lens with how far it is to be believed."""
    lines: list[Text] = []
    if (effects := feature.effects) is not None:
        at = (
            f"at {effects.kl:.2g} nats, strength {effects.strength:.3g}, repeats {effects.repeatability:.2f}"
            + ("" if effects.reached else ", the most there is")
        )
        lines += [
            Text.assemble(("what it does to the next word", "bold"), (f"  measured {at}", "dim")),
            _words_line("raises         ", effects.raised),
            _words_line("lowers         ", effects.lowered),
            Text(),
        ]
        trust = f"rank correlation with what was measured: {effects.lens_correlation:.2f}"
    elif feature.lens_agreement is not None:
        trust = f"rank correlation with measured effects in this layer: {feature.lens_agreement:.2f}"
    else:
        trust = "not compared with measured effects in this layer"
    lines.append(Text.assemble(("logit lens", "bold"), (f"  {trust}", "dim")))
    if effects is not None or feature.lens_holds:
        lines += [
            _words_line("promotes       ", feature.promoted),
            _words_line("suppresses     ", feature.suppressed),
            _words_line("unlike others  ", feature.distinctive),
        ]
    return lines


def feature_head(feature: Feature) -> Group:
    """Its name, the words it fires on and those it makes likelier, on a line each."""
    return Group(
        _title(feature),
        Text(counted_words(feature), style="green", no_wrap=True, overflow="ellipsis"),
        *likelier_lines(feature),
    )


def label_table(features: Sequence[Feature], labels: Iterable[Label], width: int, *, marks: bool) -> Table:
    """One row per feature: its place and the corpus's best label, and its labels from either side.

    Args:
        features: what to show.
        labels: of these and perhaps others; only sides that occur have a column.
        width: of the whole table in characters.
        marks: put ? in front of labels that are not clear, for output without colours.
    """
    found = {(label.layer, label.index, label.side): label for label in labels}
    sides = [side for side in ("input", "output") if any(key[2] == side for key in found)]
    table = Table(box=box.SIMPLE_HEAD, width=width, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("feature", width=22)
    heads = {"input": "fires on", "output": "makes likelier"}
    for side in sides:
        table.add_column(heads[side], ratio=1)
    for feature in features:
        name = Text.assemble((f"{feature.layer}/{feature.index}", "bold"))
        if feature.concept:
            name.append(f"\n{visible(feature.concept).replace('_', ' ')}", style="cyan")
            name.append(f" {feature.concept_precision:.2f}", style="dim")
        cells = [found.get((feature.layer, feature.index, side)) for side in sides]
        table.add_row(name, *(_label_text(cell, feature, marks=marks) for cell in cells))
    return table


def label_notes(features: Sequence[Feature], labels: Iterable[Label], *, marks: bool) -> Text:
    """What the signs in :func:`label_table` say; empty where there are none."""
    shown = {(feature.layer, feature.index): feature for feature in features}
    here = [label for label in labels if (label.layer, label.index) in shown and label.text is not None]
    lists = [shown[label.layer, label.index] for label in here if label.is_list]
    notes = []
    if any(not (label.clear or label.is_list) for label in here):
        sign = "?" if marks else "grey"
        notes.append(
            f"{sign}: words that stand out from the texts no more than those of random tokens may; with more texts "
            "more names are clear."
        )
    if any(feature.effects is not None for feature in lists):
        notes.append(
            "→: a list of words whose rise was measured; words alone do not say what they have in common."
        )
    lens = [feature for feature in lists if feature.effects is None]
    if lens:
        agreement = lens[0].lens_agreement
        trust = (
            "mostly wrong in early and middle layers; `snmf features --effects` measures them"
            if agreement is None
            else f"whose rank correlation with measured effects in this layer is {agreement:.2f}"
        )
        notes.append(f"lens →: a list of words by the logit lens, {trust}.")
    return Text(" ".join(notes), style="dim")


def _label_text(label: Label | None, feature: Feature, *, marks: bool) -> Text:
    """Dim where it is not clear, red where it is missing."""
    if label is None:
        return Text()
    if label.is_list:
        arrow = "→ " if feature.effects is not None else "lens → "
        return Text.assemble((arrow, "magenta"), visible(label.text)) if label.text is not None else Text("–")
    if label.is_missing:
        return Text(f"missing: {visible(label.reason or '')}", style="red")
    if label.text is None:
        return Text("no clear concept", style="dim italic")
    if label.clear:
        return Text(visible(label.text))
    return Text(f"{'? ' if marks else ''}{visible(label.text)}", style="dim")


def counted_words(feature: Feature) -> str:
    """``Monday ×4, Friday ×2, …``: the words around the strongest tokens, strongest first."""
    words = [(visible(word) or "␣", count) for word, count in feature.words]
    return ", ".join(word if count == 1 else f"{word} ×{count}" for word, count in words)


def context_line(token: TokenInContext, width: int, *, marks: bool) -> Text:
    """A token in its context on one line of so many cells, cut at words so that the token stays in view."""
    before, peak, after = visible(token.before), visible(token.token), visible(token.after)
    # A leading space belongs to the token, but not to its emphasis.
    bare = peak.lstrip(" ")
    before += peak[: len(peak) - len(bare)]
    shown = (f"‹{bare}›" if marks else bare) if bare else "␣"
    room = width - cell_len(shown)
    # What the text after the token does not need, the text before it may have; at least a third of the line.
    left = max(room - cell_len(after) - 1, room // 3)
    if token.cut_before or cell_len(before) > left:
        # Up to the first space that lets it fit, so that no half word stands at the edge.
        fits = _within(before[::-1], left - 1)[::-1]
        before = "…" + fits[fits.find(" ") :] if " " in fits.rstrip(" ") else "…" + fits
    right = max(room - cell_len(before), 1)
    if token.cut_after or cell_len(after) > right:
        fits = _within(after, right - 1)
        after = (fits[: fits.rfind(" ")] if " " in fits else fits) + "…"
    return Text.assemble(before, (shown, "bold yellow"), after, no_wrap=True, overflow="ellipsis")


def _within(text: str, cells: int) -> str:
    """The beginning of a text that takes no more cells; letters of some scripts take two."""
    ends = itertools.accumulate(map(cell_len, text))
    return text[: sum(1 for _ in itertools.takewhile(lambda end: end <= cells, ends))]


def _title(feature: Feature) -> Text:
    title = Text.assemble(
        (f"layer {feature.layer}, feature {feature.index}", "bold"), f"   {visible(feature.name)}"
    )
    if feature.concept:
        title.append(f"   {visible(feature.concept).replace('_', ' ')}", style="bold cyan")
        title.append(f"  (average precision {feature.concept_precision:.2f} in sample)", style="dim")
    return title


def _words_line(head: str, words: Sequence[tuple[str, float]]) -> Text:
    text = Text(head, style="magenta", no_wrap=True, overflow="ellipsis")
    text.append("  ".join(visible(word.strip(" ")) or "␣" for word, _ in words))
    return text


# Over a column of :func:`feature_words`.
FEATURE_WORDS = "name, concept (AP) · words"


def feature_words(feature: Feature) -> Text:
    """One line on what a feature stands for: its name, its concept, if it has one, and the words that it fires on."""
    if not feature.tokens:
        return Text("fires nowhere", style="dim", no_wrap=True, overflow="ellipsis")
    text = Text(visible(feature.name), style="green", no_wrap=True, overflow="ellipsis")
    if feature.concept:
        text.append(f"  {visible(feature.concept).replace('_', ' ')}", style="bold cyan")
        text.append(f" {feature.concept_precision:.2f}", style="dim")
    return text.append(f"  · {counted_words(feature)}", style="dim")
