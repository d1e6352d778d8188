"""Features in a terminal, or in a file that its output is sent to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .features import visible

if TYPE_CHECKING:
    from .features import Feature, TokenInContext
    from .labels import Label


def clearest(features: Iterable[Feature], count: int) -> list[Feature]:
    """The ``count`` features of highest clarity, at most one per concept, ties by lower index."""
    chosen: list[Feature] = []
    concepts: set[str] = set()
    for feature in sorted(features, key=lambda f: (-f.clarity, f.index)):
        if len(chosen) == count:
            break
        if feature.tokens and (feature.concept is None or feature.concept not in concepts):
            concepts.add(feature.concept or "")
            chosen.append(feature)
    return chosen


def feature_table(features: Sequence[Feature], width: int, *, marks: bool, contexts: int = 3) -> Table:
    """One row per feature: its name, then its words, contexts and logit-lens words.

    Args:
        features: what to show.
        width: of the whole table in characters.
        marks: put ‹ › around the peak token, for output without bold type.
        contexts: how many.
    """
    left = 22
    room = width - left - 3
    table = Table(box=box.SIMPLE_HEAD, width=width, show_edge=False, pad_edge=False, header_style="bold")
    # Both widths are fixed, for Rich would squeeze the first column in favour of long lines in the second.
    table.add_column("feature", width=left)
    table.add_column(
        "where it fires, and → what it makes likelier", width=room, no_wrap=True, overflow="ellipsis"
    )
    for feature in features:
        name = Text.assemble((f"{feature.layer}/{feature.index}", "bold"))
        if feature.concept:
            name.append(f"\n{visible(feature.concept).replace('_', ' ')}", style="bold cyan")
            name.append(f"\nAP {feature.concept_precision:.2f}", style="dim")
        name.append(f"\n{feature.active_share:.1%} of tokens", style="dim")
        lines = [Text(counted_words(feature), style="green", no_wrap=True, overflow="ellipsis")]
        lines += [context_line(token, room, marks=marks) for token in feature.tokens[:contexts]]
        lines.append(_words_line("→ ", feature.distinctive))
        table.add_row(name, Group(*lines, Text("")))
    return table


def feature_page(feature: Feature, width: int, *, marks: bool, contexts: int = 15) -> Group:
    """Everything about one feature."""
    facts = Text(
        f"active on {feature.n_active:,} tokens ({feature.active_share:.1%}) · "
        f"{feature.energy:.1%} of the energy · {feature.n_neurons} neurons · "
        f"{feature.distinct_tokens:.0%} distinct words",
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
        Text("logit lens", style="bold"),
        _words_line("stands out in  ", feature.distinctive),
        _words_line("promotes       ", feature.promoted),
        _words_line("suppresses     ", feature.suppressed),
        Text(),
        Text("neurons (weight relative to ‖z‖)", style="bold"),
        Text(neurons),
    )


def feature_head(feature: Feature) -> Group:
    """Its name, the words it fires on and those it makes likelier, on a line each."""
    return Group(
        _title(feature),
        Text(counted_words(feature), style="green", no_wrap=True, overflow="ellipsis"),
        _words_line("→ ", feature.distinctive),
    )


def label_table(features: Sequence[Feature], labels: Iterable[Label], width: int) -> Table:
    """One row per feature: its place and the corpus's best label, and its labels from either side.

    Args:
        features: what to show.
        labels: of these and perhaps others; only sides that occur have a column.
        width: of the whole table in characters.
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
        table.add_row(name, *map(_label_text, cells))
    return table


def _label_text(label: Label | None) -> Text:
    """Dim where it is not clear, red where it is missing."""
    if label is None:
        return Text()
    if label.is_missing:
        return Text(f"missing: {visible(label.reason or '')}", style="red")
    if label.text is None:
        return Text("no clear concept", style="dim italic")
    return Text(visible(label.text), style="" if label.clear else "dim")


def counted_words(feature: Feature) -> str:
    """``Monday ×4, Friday ×2, …``: the words around the strongest tokens, strongest first."""
    words = [(visible(word) or "␣", count) for word, count in feature.words]
    return ", ".join(word if count == 1 else f"{word} ×{count}" for word, count in words)


def context_line(token: TokenInContext, width: int, *, marks: bool) -> Text:
    """A token in its context on one line, cut at words so that the token stays in view."""
    before, peak, after = visible(token.before), visible(token.token), visible(token.after)
    # A leading space belongs to the token, but not to its emphasis.
    bare = peak.lstrip(" ")
    before += peak[: len(peak) - len(bare)]
    shown = (f"‹{bare}›" if marks else bare) if bare else "␣"
    room = width - len(shown)
    # What the text after the token does not need, the text before it may have; at least a third of the line.
    left = max(room - len(after) - 1, room // 3)
    if token.cut_before or len(before) > left:
        # Up to the first space that lets it fit, so that no half word stands at the edge.
        fits = before[max(len(before) - left + 1, 0) :]
        before = "…" + fits[fits.find(" ") :] if " " in fits.rstrip(" ") else "…" + fits
    right = max(room - len(before), 1)
    if token.cut_after or len(after) > right:
        fits = after[: right - 1]
        after = (fits[: fits.rfind(" ")] if " " in fits else fits) + "…"
    return Text.assemble(before, (shown, "bold yellow"), after, no_wrap=True, overflow="ellipsis")


def _title(feature: Feature) -> Text:
    title = Text.assemble((f"layer {feature.layer}, feature {feature.index}", "bold"))
    if feature.concept:
        title.append(f"   {visible(feature.concept).replace('_', ' ')}", style="bold cyan")
        title.append(f"  (average precision {feature.concept_precision:.2f})", style="dim")
    return title


def _words_line(head: str, words: Sequence[tuple[str, float]]) -> Text:
    text = Text(head, style="magenta", no_wrap=True, overflow="ellipsis")
    text.append("  ".join(visible(word.strip(" ")) or "␣" for word, _ in words))
    return text


def feature_words(feature: Feature) -> Text:
    """One line on what a feature stands for: its concept, if it has one, and the words that it fires on."""
    text = Text(no_wrap=True, overflow="ellipsis")
    if feature.concept:
        name = visible(feature.concept).replace("_", " ")
        text.append(f"{name} {feature.concept_precision:.2f}  ", style="bold cyan")
    return text.append(counted_words(feature) or "nowhere", style="green" if feature.tokens else "dim")
