"""What came of a comparison: means with intervals, as rows, JSON values and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from . import files
from .detecting import DetectionSummary, Interval

if TYPE_CHECKING:
    from .immediate import ImmediateEffect
    from .steering_protocol import Outcome, SteeringRecord

T = TypeVar("T")

# The largest score of a text; gains over unsteered texts lie between it and its negative.
_BEST = 2
# Colours that people with any colour vision tell apart (Okabe & Ito), SNMF's first.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")


@dataclass(frozen=True)
class SteeringSummary:
    """One method's row; means over the concepts that all methods were tried on, each the mean over its layers.

    Attributes:
        method: its name.
        n: pairs of concept and layer.
        dropped: pairs that were tried and are not among them, because some method lacks them or could not be scored.
        gain: the score (0 to 2) above that of unsteered text, on the reporting prompts.
        permuted: the same texts as texts on the other concepts: the control, near 0.
        concept, fluency: the two parts of the score, 0 to 2.
        kl: divergence at the chosen strengths on the reporting prompts, in nats.
        lead: by how much the first method's gain is above this one's, paired by concept; None for the first.
        missing: the share of this method's texts without a score, over all pairs that were tried.
    """

    method: str
    n: int
    dropped: int
    gain: Interval
    permuted: Interval
    concept: float
    fluency: float
    kl: float
    lead: Interval | None
    missing: float


@dataclass(frozen=True)
class ImmediateSummary:
    """One method at one divergence; means over concepts as in :class:`SteeringSummary`.

    Attributes:
        method: its name.
        target: the divergence aimed at, in nats.
        n: pairs of concept and layer.
        reached: the share of them for which the divergence was reached.
        shift, others, log_probability, kl: see :class:`snmf_interp.ImmediateEffect`.
        lead: by how much the first method's shift is above this one's, paired by concept; None for the first.
    """

    method: str
    target: float
    n: int
    reached: float
    shift: Interval
    others: Interval
    log_probability: Interval
    kl: float
    lead: Interval | None


def summarise_steering(
    records: Sequence[SteeringRecord], scorer: str = "words", *, confidence: float = 0.95
) -> list[SteeringSummary]:
    """A row for each method, in the order in which they come, with bootstrap intervals over concepts.

    Args:
        records: of one layer or several, all with + or all with the choice of signs. Pairs of layer and concept that
            some method lacks, or that could not be scored, are left out, so that all rows are about the same.
        scorer: whose scores.
        confidence: of the intervals.
    """
    shared = _shared(records, [_scored(record, scorer) for record in records])
    methods = list(dict.fromkeys(record.method for record in records))

    def by_concept(method: str, name: str) -> torch.Tensor:
        return _by_concept(shared, method, attrgetter(name))

    rows = []
    for method in methods:
        gain = by_concept(method, "gain")
        rows.append(
            SteeringSummary(
                method,
                len(shared),
                len({(record.layer, record.concept) for record in records}) - len(shared),
                Interval.of(gain, (-_BEST, _BEST), confidence=confidence),
                Interval.of(by_concept(method, "permuted"), (-_BEST, _BEST), confidence=confidence),
                float(by_concept(method, "concept").nanmean()),
                float(by_concept(method, "fluency").nanmean()),
                float(by_concept(method, "kl").nanmean()),
                None
                if method == methods[0]
                else Interval.of(
                    by_concept(methods[0], "gain") - gain, (-2 * _BEST, 2 * _BEST), confidence=confidence
                ),
                _missing([record for record in records if record.method == method], scorer),
            )
        )
    return rows


def summarise_immediate(
    records: Sequence[SteeringRecord],
    effects: Sequence[Sequence[ImmediateEffect]],
    *,
    confidence: float = 0.95,
) -> list[ImmediateSummary]:
    """A row for each method and divergence, with bootstrap intervals over concepts.

    Args:
        records: of one layer or several, all with + or all with the choice of signs.
        effects: of each record in its place, see :meth:`snmf_interp.Trial.immediate`. Pairs of layer and concept
            that some method lacks are left out.
        confidence: of the intervals.
    """
    methods = list(dict.fromkeys(record.method for record in records))
    rows = []
    for target in sorted({one.target for own in effects for one in own}):
        shared = _shared(records, [next((e for e in own if e.target == target), None) for own in effects])
        first = _by_concept(shared, methods[0], attrgetter("shift"))
        for method in methods:
            reached, shift, others, log_probability, kl = (
                _by_concept(shared, method, attrgetter(name))
                for name in ("reached", "shift", "others", "log_probability", "kl")
            )
            lead = None if method == methods[0] else Interval.of(first - shift, confidence=confidence)
            row = ImmediateSummary(
                method,
                target,
                len(shared),
                float(reached.mean()),
                Interval.of(shift, confidence=confidence),
                Interval.of(others, confidence=confidence),
                Interval.of(log_probability, confidence=confidence),
                float(kl.nanmean()),
                lead,
            )
            rows.append(row)
    return rows


def _scored(record: SteeringRecord, scorer: str) -> Outcome | None:
    """What a scorer says of a record, where it could score both the texts and the unsteered ones."""
    outcome = record.results.get(scorer)
    return None if outcome is None or outcome.gain is None else outcome


def _shared(
    records: Sequence[SteeringRecord], values: Sequence[T | None]
) -> dict[tuple[int, str], dict[str, T]]:
    """The records' values by layer and concept and then method, where every method has one."""
    found: dict[tuple[int, str], dict[str, T]] = {}
    for record, value in zip(records, values, strict=True):
        if value is not None:
            found.setdefault((record.layer, record.concept), {})[record.method] = value
    methods = len({record.method for record in records})
    return {pair: own for pair, own in found.items() if len(own) == methods}


def _by_concept(
    shared: Mapping[tuple[int, str], Mapping[str, T]], method: str, read: Callable[[T], float | None]
) -> torch.Tensor:
    """A method's number for each concept, the mean over its layers, ``[concepts]`` float64; NaN where it has none."""
    means = []
    for concept in sorted({concept for _, concept in shared}):
        values = [
            value
            for (_, other), own in shared.items()
            if other == concept and (value := read(own[method])) is not None
        ]
        means.append(sum(values) / len(values) if values else float("nan"))
    return torch.tensor(means, dtype=torch.float64)


def _missing(records: Sequence[SteeringRecord], scorer: str) -> float:
    found = [record.results[scorer].missing if scorer in record.results else 1.0 for record in records]
    return sum(found) / len(found)


def curves(records: Sequence[SteeringRecord], scorer: str = "words") -> dict[str, dict[float, float]]:
    """For each method the mean score of the choosing half's texts by target, at the sign that was chosen.

    Over the pairs of layer and concept of :func:`summarise_steering`, each concept the mean over its layers.
    """
    cells = [
        {cell.target: cell for cell in record.cells if cell.sign == outcome.sign}
        if (outcome := _scored(record, scorer)) is not None
        else None
        for record in records
    ]
    shared = _shared(records, cells)
    found: dict[str, dict[float, float]] = {}
    for method in dict.fromkeys(record.method for record in records):
        for target in sorted({target for own in cells for target in own or ()}):
            means = _by_concept(shared, method, lambda own, target=target: own[target].scores[scorer])  # type: ignore[misc]
            found.setdefault(method, {})[target] = float(means.nanmean())
    return found


def of_layer(
    records: Sequence[SteeringRecord], effects: Sequence[Sequence[ImmediateEffect]], layer: int
) -> tuple[list[SteeringRecord], list[Sequence[ImmediateEffect]]]:
    """One layer's records and their effects."""
    return _those(records, effects, lambda record: record.layer == layer)


def of_signs(
    records: Sequence[SteeringRecord], effects: Sequence[Sequence[ImmediateEffect]], both_signs: bool
) -> tuple[list[SteeringRecord], list[Sequence[ImmediateEffect]]]:
    """The records that steered by + alone, or those that had both signs to choose from, and their effects."""
    return _those(records, effects, lambda record: record.both_signs == both_signs)


def _those(
    records: Sequence[SteeringRecord],
    effects: Sequence[Sequence[ImmediateEffect]],
    choose: Callable[[SteeringRecord], bool],
) -> tuple[list[SteeringRecord], list[Sequence[ImmediateEffect]]]:
    chosen = [i for i, record in enumerate(records) if choose(record)]
    return [records[i] for i in chosen], [effects[i] for i in chosen]


def as_json(
    detection: Mapping[int, Sequence[DetectionSummary]],
    records: Sequence[SteeringRecord],
    effects: Sequence[Sequence[ImmediateEffect]],
    scorers: Sequence[str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but the texts, as JSON values; NaN is None.

    Args:
        detection: rows by layer.
        records: of all layers.
        effects: of each record in its place, on the next token.
        scorers: the scorers' names.
        facts: what else the file should say: the plan, the model, versions.

    Returns:
        ``facts``, ``detection``, ``steering`` and ``immediate`` of directions as they are, under ``both_signs`` the
        same where both were tried, and ``pairs``: every attempt.
    """
    pairs = [
        {
            "layer": record.layer,
            "method": record.method,
            "concept": record.concept,
            "direction": record.chosen,
            "sign": record.sign,
            "both_signs": record.both_signs,
            "candidates": [asdict(one) for one in record.candidates],
            "made_by": record.made_by,
            "results": {
                name: {key: value for key, value in asdict(outcome).items() if key != "texts"}
                | {"gain": outcome.gain}
                for name, outcome in record.results.items()
            },
            "curve": [
                {"target": c.target, "sign": c.sign, "kl": c.kl, "reached": c.reached, "scores": c.scores}
                for c in record.cells
            ],
            "immediate": [asdict(effect) for effect in own],
        }
        for record, own in zip(records, effects, strict=True)
    ]
    content = {
        **facts,
        "detection": {str(layer): [asdict(row) for row in rows] for layer, rows in detection.items()},
        **_summaries(*of_signs(records, effects, False), scorers),
        "pairs": pairs,
    }
    if any(record.both_signs for record in records):
        content["both_signs"] = _summaries(*of_signs(records, effects, True), scorers)
    finite: dict[str, Any] = files.finite(content)
    return finite


def _summaries(
    records: Sequence[SteeringRecord],
    effects: Sequence[Sequence[ImmediateEffect]],
    scorers: Sequence[str],
) -> dict[str, Any]:
    """The rows of both tables, by layer and together."""
    layers = sorted({record.layer for record in records})
    steering = {
        scorer: {
            "layers": {
                str(layer): [
                    asdict(row)
                    for row in summarise_steering([r for r in records if r.layer == layer], scorer)
                ]
                for layer in layers
            },
            "all": [asdict(row) for row in summarise_steering(records, scorer)],
        }
        for scorer in scorers
        if records
    }
    immediate = {
        "layers": {
            str(layer): [asdict(row) for row in summarise_immediate(*of_layer(records, effects, layer))]
            for layer in layers
        },
        "all": [asdict(row) for row in summarise_immediate(records, effects)],
    }
    return {"steering": steering, "immediate": immediate}


def draw(
    path: Path,
    detection: Mapping[int, Sequence[DetectionSummary]],
    records: Sequence[SteeringRecord],
    effects: Sequence[Sequence[ImmediateEffect]],
    scorer: str | None,
    title: str,
) -> None:
    """A PNG: detection and steering of each method with intervals, layer by layer; scores and the words' rise by KL.

    Of directions as they are; attempts that had both signs to choose from are not drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, effects = of_signs(records, effects, False)
    layers = sorted({*detection, *(record.layer for record in records)})
    shown = [*(row.method for rows in detection.values() for row in rows), *(r.method for r in records)]
    methods = list(dict.fromkeys(shown))
    colour = {method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(methods)}
    shifts: dict[str, dict[float, float]] = {}
    for row in summarise_immediate(records, effects):
        shifts.setdefault(row.method, {})[row.target] = row.shift.value
    scored = bool(records) and scorer is not None
    panels = bool(detection) + 2 * scored + bool(shifts)
    figure, grid = pyplot.subplots(
        1,
        panels,
        figsize=(4.6 * panels, 0.5 + 0.42 * len(methods) + 1.2),
        squeeze=False,
        layout="constrained",
    )
    axes = iter(grid[0])
    shapes = "osD^v<>P"

    def intervals(axis: Any, rows: Mapping[int, Sequence[Any]], field: str, label: str, zero: float) -> None:
        for at, layer in enumerate(layers):
            for row in rows.get(layer, ()):
                value: Interval = getattr(row, field)
                height = methods.index(row.method) + 0.22 * (at - (len(layers) - 1) / 2)
                axis.plot([value.low, value.high], [height, height], color=colour[row.method], linewidth=1.6)
                axis.plot(
                    value.value, height, shapes[at % len(shapes)], color=colour[row.method], markersize=5
                )
            axis.plot([], [], shapes[at % len(shapes)], color="0.4", label=f"layer {layer}")
        axis.axvline(zero, color="0.6", linewidth=0.8)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)

    def lines(axis: Any, points: Mapping[str, Mapping[float, float]], label: str) -> None:
        for method, own in points.items():
            axis.plot(list(own), list(own.values()), "o-", color=colour[method], markersize=3.5, label=method)
        axis.set_xlabel("divergence aimed at (nats)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)

    if detection:
        intervals(next(axes), detection, "auroc", "detection: held-out AUROC", 0.5)
    if records and scorer is not None:
        by_layer = {
            layer: summarise_steering([r for r in records if r.layer == layer], scorer) for layer in layers
        }
        intervals(next(axes), by_layer, "gain", f"steering: score above unsteered ({scorer})", 0)
        axis = next(axes)
        lines(axis, curves(records, scorer), "mean score, choosing half")
        axis.legend(fontsize=7)
    if shifts:
        lines(next(axes), shifts, "next token: logit of the concept's words\nabove words as likely")
    grid[0, 0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=10)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
