"""Tables of a comparison for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from .detecting import DetectionSummary, Interval
    from .rivals import Trial
    from .steering_protocol import SteeringRecord
    from .trial_report import ImmediateSummary, SteeringSummary


def show_detection(screen: Console, trial: Trial, layer: int, rows: Sequence[DetectionSummary]) -> None:
    from .detecting import detected_note, interval_note

    seeds = [trial.plan.seed + number for number in range(len(rows[0].repetitions))]
    counts = sorted({_held_out(trial.repetition(number)) for number in range(len(seeds))})
    held_out = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    equal = trial.run.store().corpus.n_equal
    together = f" ({equal} of all texts equal one before and are on its side)" if equal else ""
    screen.print(Text(f"\nDetection at layer {layer}\n", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("method, choices", no_wrap=True)
    for name in ("AUROC", "hard AUROC", "probe", "S_CD > 0*", f"{rows[0].method} is ahead"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.method}, {row.size:,}",
            _interval(row.auroc),
            _interval(row.hard_auroc),
            _interval(row.probe_accuracy),
            Text(f"{row.detected.value:.0%}", style="dim"),
            _lead(row.lead),
        )
    screen.print(table)
    moves = f"; {_moves(rows[0])}" if len(seeds) > 1 else ""
    screen.print(
        Text(
            f"{interval_note(seeds)}{moves}. {held_out} held-out texts{together}. AUROC: how often a text of the "
            "concept scores above one of another; chance is 0.5. Hard AUROC: the other texts are those that share most "
            "words with the concept's. They are longer, so that chance is not 0.5, but what permuted labels have. "
            "Probe: the balanced accuracy of a threshold; chance is 0.5. Choices: from so many directions each concept "
            f"takes the one that is best on the training texts. * {detected_note(rows)}",
            style="dim",
        )
    )


def _held_out(trial: Trial) -> int:
    return sum(
        label is not None and not chosen
        for label, chosen in zip(trial.labels, trial.train.tolist(), strict=True)
    )


def _moves(row: DetectionSummary) -> str:
    """By how much a mean over concepts differs between repetitions."""
    return f"the mean AUROC of {row.method} has a standard deviation of {stdev(row.repetitions):.3f} between them"


def show_steering(screen: Console, title: str, records: Sequence[SteeringRecord], scorer: str) -> None:
    """A table for each layer, and one for all of them together; ``{}`` in the title stands for which."""
    from .trial_report import summarise_steering

    layers = sorted({record.layer for record in records})
    for layer in layers:
        rows = summarise_steering([record for record in records if record.layer == layer], scorer)
        _show_steering(screen, title.replace("{}", f"layer {layer}"), rows)
    if len(layers) > 1:
        together = f"layers {', '.join(map(str, layers))} together"
        _show_steering(screen, title.replace("{}", together), summarise_steering(records, scorer))


def _show_steering(screen: Console, title: str, rows: Sequence[SteeringSummary]) -> None:
    screen.print(Text(f"\n{title}\n", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("method")
    for name in (
        "score above unsteered",
        "other concepts",
        "concept",
        "fluency",
        "KL",
        f"{rows[0].method} is ahead by",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            _interval(row.gain),
            _signed(row.permuted.value),
            f"{row.concept:.2f}",
            f"{row.fluency:.2f}",
            f"{row.kl:.2f}",
            _lead(row.lead),
        )
    screen.print(table)
    missing = max(row.missing for row in rows)
    line = (
        f"Means over {rows[0].n} pairs of concept and layer, with 95 % intervals over concepts; scores are 0 to 2. "
        "Other concepts: the score of the same texts for the concepts that were not steered to. random: random groups "
        "of as many neurons, chosen for each concept by the same rule; this is the level of chance."
    )
    if rows[0].dropped:
        line += f" {rows[0].dropped} pairs are left out: a method lacks them, or could not be scored on them."
    if missing:
        line += f" Up to {missing:.0%} of a method's texts have no score."
    screen.print(Text(line, style="dim"))


def show_immediate(screen: Console, title: str, rows: Sequence[ImmediateSummary], lead_at: float) -> None:
    """A method a line, a divergence a column; grey where the interval holds 0.

    Args:
        screen: where.
        title: above the table.
        rows: of :func:`snmf_interp.trial_report.summarise_immediate`.
        lead_at: the divergence at which the first method's lead over each is shown; of those measured the nearest.
    """
    screen.print(Text(f"\n{title}\n", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("method, at KL of", no_wrap=True)
    targets = sorted({row.target for row in rows})
    lead_at = min(targets, key=lambda target: abs(target - lead_at))
    for target in targets:
        table.add_column(f"{target:g}", justify="right", no_wrap=True)
    table.add_column("others", justify="right", no_wrap=True)
    table.add_column(f"{rows[0].method} is ahead by, at {lead_at:g}", justify="right")
    at = {(row.method, row.target): row for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        own = [at[method, target] for target in targets]
        cells = [
            Text(
                _signed(row.shift.value) + "*" * (row.reached < 1),
                "" if row.shift.low > 0 or row.shift.high < 0 else "dim",
            )
            for row in own
        ]
        table.add_row(method, *cells, _signed(own[-1].others.value), _lead(at[method, lead_at].lead))
    screen.print(table)
    least = min(rows, key=lambda row: row.reached)
    unreached = (
        f" *: not all pairs reached this divergence; {least.method} reached {least.target:g} nats for "
        f"{least.reached:.0%}."
        if least.reached < 1
        else ""
    )
    screen.print(
        Text(
            f"Values: by how much the logits of the concept's words rise above those of words that were as likely "
            f"before. They are means over {rows[0].n} pairs of concept and layer, on prompts on which nothing was "
            "chosen; grey where the 95 % interval over concepts holds 0. Others: the rise of the other concepts' words "
            f"at {targets[-1]:g} nats. random: random groups of neurons, chosen for each concept by the same rule; "
            f"this is the level of chance.{unreached}",
            style="dim",
        )
    )


def show_sentences(screen: Console, layer: int, row: Mapping[str, Any]) -> None:
    """The paper's test with written sentences: what came of all that was asked."""
    which = (
        f"the clearest {row['asked']} of {row['of']} features" if row["asked"] < row["of"] else "all features"
    )
    low, high = row["interval"]
    if row["features"]:
        found = (
            f"S_CD is above 0 for {row['share_above_zero']:.0%} (95 % interval {low:.0%} to {high:.0%}; random groups "
            f"of as many neurons, in place of the features: {row['random_above_zero']:.0%}), which is uninformative: "
            "it says how many are above 0, not by how much, and random groups are for most labelled concepts too"
        )
    else:
        found = "S_CD could not be measured for any"
    left_out = (
        (row["no_label"], "without an answer to the question for a label"),
        (row["no_concept"], "without a clear concept"),
        (row["no_sentences"], "without usable sentences"),
    )
    others = "".join(f"; {count} {why}" for count, why in left_out if count)
    screen.print(
        Text(
            f"\nLayer {layer}, sentences by {row['by']} for {which}: of the {row['features']} that it labelled and "
            f"wrote sentences for, {found}{others}"
        ),
        soft_wrap=True,
    )


def _interval(value: Interval) -> Text:
    """The mean, and its interval in grey: ``0.77 .73–.81``; with signs where one is negative."""
    if value.value != value.value:
        return Text("–")
    text = Text(f"{value.value:.2f}".replace("-", "−"))
    if value.low == value.low:
        low, high = _short(value.low), _short(value.high)
        text.append(f" {low}–{high}" if value.low >= 0 else f" {low} to {high}", style="dim")
    return text


def _signed(number: float) -> str:
    return "–" if number != number else f"{number:+.2f}".replace("-", "−")


def _short(number: float) -> str:
    return f"{number:.2f}".replace("0.", ".", 1).replace("-", "−")


def _lead(value: Interval | None) -> Text:
    """In colour where the interval excludes 0."""
    if value is None or value.value != value.value:
        return Text("")
    text = Text(_interval(value).plain)
    text.stylize("green" if value.low > 0 else "red" if value.high < 0 else "")
    return text
