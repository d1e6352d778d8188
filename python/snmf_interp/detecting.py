"""Rivals as detectors of labelled concepts: matched on training texts, scored on the others, with intervals.

hard = hard_negatives(texts, labels, train)
rows = [detect_concepts(rival, A, text_of, labels, train, hard) for rival in rivals]
for row in summarise(rows):                # or of several divisions of the texts: summarise(rows, others, ...)
    print(row.method, row.auroc.value, row.auroc.low, row.auroc.high)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit, logit
from scipy.stats import binomtest
from scipy.stats import t as student_t
from torch import Tensor

from .evaluation import Detection, auroc, concept_detection_score, detection, halves
from .intervals import bootstrap_mean, mean_error
from .words import count_words, is_function_word

if TYPE_CHECKING:
    from .dictionaries import Dictionary

# Hard negatives of a concept for each of its held-out texts.
_HARD_PER_TEXT = 2
# Values from which a percentile bootstrap keeps its promise.
_BOOTSTRAP_FROM = 20
# Of the random rival, over layers of both bundled models.
_MEASURED_CHANCE = "58 to 85 % of the bundled concepts in the layers where it was measured"


@dataclass(frozen=True, eq=False)
class ConceptDetection:
    """How well the directions of one method detect concepts.

    Attributes:
        method: its name.
        size: how many directions a concept could choose among.
        detection: the choice and its scores against the texts of all other concepts.
        hard_auroc: AUROC on held-out texts against hard negatives alone, ``[n_concepts]`` float64; NaN for a
            concept without any.
        s_cd: the paper's score ``log((mean own + ε) / (mean other + ε))`` on held-out texts, scores below 0
            cut, ``[n_concepts]`` float64; see :func:`snmf_interp.evaluation.concept_detection_score`. That it is
            above 0 is uninformative: for most concepts that of random groups is too.
    """

    method: str
    size: int
    detection: Detection
    hard_auroc: Tensor
    s_cd: Tensor

    def by_concept(self) -> list[dict[str, Any]]:
        """A row of plain values for each concept: the direction that was chosen, and its scores.

        NaN and infinite values are None.
        """
        found = self.detection
        columns = {
            "direction": found.feature, "train_auroc": found.train_auroc, "auroc": found.auroc,
            "hard_auroc": self.hard_auroc, "probe_direction": found.probe_feature,
            "probe_threshold": found.probe_threshold, "probe_train_accuracy": found.probe_train_accuracy,
            "probe_accuracy": found.probe_accuracy, "s_cd": self.s_cd,
        }  # fmt: skip
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"concept": name}
            | {key: value if isfinite(value) else None for key, value in zip(columns, row, strict=True)}
            for name, row in zip(found.names, values, strict=True)
        ]

    @classmethod
    def from_concepts(cls, method: str, size: int, rows: Sequence[Mapping[str, Any]]) -> ConceptDetection:
        """What :meth:`by_concept` gave the rows of."""

        def column(name: str, missing: float = float("nan")) -> Tensor:
            return torch.tensor(
                [missing if row[name] is None else row[name] for row in rows], dtype=torch.float64
            )

        found = Detection(
            names=tuple(row["concept"] for row in rows),
            feature=column("direction").long(),
            train_auroc=column("train_auroc"),
            auroc=column("auroc"),
            probe_feature=column("probe_direction").long(),
            probe_threshold=column("probe_threshold", float("inf")),
            probe_train_accuracy=column("probe_train_accuracy"),
            probe_accuracy=column("probe_accuracy"),
        )
        return cls(method, size, found, column("hard_auroc"), column("s_cd"))


@dataclass(frozen=True)
class Interval:
    """A mean over concepts with its interval, NaN for fewer than two concepts.

    Over concepts and repetitions, where each concept has a value of several: Student's t with the standard error of
    :func:`snmf_interp.intervals.mean_error`, which samples both. With 72 concepts and 5 repetitions, whose effects
    have a standard deviation of 0.024, it excludes the true mean 5 times in a hundred, and one that takes the
    repetitions' means as exact 8 times; of one repetition the interval over concepts excludes it 17 times.

    Over concepts alone a percentile bootstrap; for fewer than 20 values, where that is too narrow (with 8 it excludes
    the true mean 11 times in a hundred instead of 5), Student's t.

    The t interval of a bounded quantity is one of the mean's logit, whose standard error is that of the mean times the
    logit's slope there: it lies within the bounds, and covers better. Of AUROCs around 0.95 (Beta(20, 1), 8 values) it
    excludes the true mean 7 times in a hundred, that of the mean itself 10.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(
        cls,
        values: Tensor,
        bounds: tuple[float, float] | None = None,
        *,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Interval:
        """Of ``values [m]`` or ``[m, r]``; concepts with a NaN are left out.

        Args:
            values: one for each concept, or for each concept and repetition.
            bounds: the smallest and the largest value that there can be; None for what has none.
            confidence: of the interval.
            seed: of the bootstrap.
        """
        table = (values[:, None] if values.ndim == 1 else values).double()
        table = table[~table.isnan().any(1)]
        if not len(table):
            return cls(float("nan"), float("nan"), float("nan"))
        mean = float(table.mean())
        if len(table) == 1:
            return cls(mean, float("nan"), float("nan"))
        if table.shape[1] == 1 and len(table) >= _BOOTSTRAP_FROM:
            return cls(mean, *bootstrap_mean(table[:, 0], confidence=confidence, seed=seed))
        error, freedom = mean_error(table)
        half = float(student_t.ppf((1 + confidence) / 2, freedom)) * error
        if bounds is None:
            return cls(mean, mean - half, mean + half)
        least, most = bounds
        share = (mean - least) / (most - least)
        # 1 over the slope of the logit; 0 where all values are at a bound.
        flat = share * (1 - share)
        if not half or not flat:
            return cls(mean, mean, mean)
        reach = half / (most - least) / flat
        low, high = expit(logit(share) + np.array([-reach, reach]))
        return cls(mean, float(least + (most - least) * low), float(least + (most - least) * high))

    @classmethod
    def of_share(cls, hits: Tensor, *, confidence: float = 0.95) -> Interval:
        """Of the share of ``hits [m]`` or ``[m, r]`` bool, m at least 1.

        Wilson's, which has some width at 0 and 1 too. Over repetitions of as many independent hits as would have the
        standard error of :func:`snmf_interp.intervals.mean_error` (the effective sample size of surveys: Kish 1965),
        with the quantile of Student's t.
        """
        share = float(hits.double().mean())
        if hits.ndim == 1 or hits.shape[1] == 1 or len(hits) == 1:
            # The repetitions of a single concept are one hit or none.
            found = binomtest(round(share * len(hits)), len(hits)).proportion_ci(confidence, method="wilson")
            return cls(share, float(found.low), float(found.high))
        error, freedom = mean_error(hits)
        n = min(share * (1 - share) / error**2, hits.numel()) if error else len(hits)
        t = float(student_t.ppf((1 + confidence) / 2, freedom))
        middle = (share + t**2 / (2 * n)) / (1 + t**2 / n)
        reach = t / (1 + t**2 / n) * (share * (1 - share) / n + t**2 / (4 * n**2)) ** 0.5
        return cls(share, max(middle - reach, 0.0), min(middle + reach, 1.0))


@dataclass(frozen=True)
class DetectionSummary:
    """One method's row of a table; all means are over the same concepts and repetitions.

    Attributes:
        method, size: as in :class:`ConceptDetection`.
        auroc, hard_auroc, probe_accuracy: means over concepts and repetitions.
        detected: the share of concepts with S_CD above 0; see :func:`detected_note`.
        lead: by how much the first method's AUROC is above this one's, paired by concept and repetition; None for the
            first.
        repetitions: the mean AUROC over concepts of each repetition.
        concepts: for each concept the means over repetitions, NaN where some repetition has no value.
    """

    method: str
    size: int
    auroc: Interval
    hard_auroc: Interval
    probe_accuracy: Interval
    detected: Interval
    lead: Interval | None
    repetitions: tuple[float, ...]
    concepts: Mapping[str, Mapping[str, float]]


def hard_negatives(
    texts: Sequence[str], labels: Sequence[str | None], train: Tensor, *, per_text: int = _HARD_PER_TEXT
) -> dict[str, Tensor]:
    """For each concept the held-out texts of other concepts that share most words with its own.

    A shared word counts by its rarity, the logarithm of the number of texts over those that have it. Function
    words do not count.

    Args:
        texts: all texts.
        labels: the label of each; texts without one are left out.
        train: which are training texts, ``[n_texts]`` bool.
        per_text: hard negatives for each held-out text of the concept.

    Returns:
        For each label with held-out texts ``[n_texts]`` bool; all False where no other text shares a word.

    Raises:
        ValueError: ``per_text`` is below 1, or there are not as many texts as labels.
    """
    if per_text < 1:
        raise ValueError(f"per_text: wanted at least 1, got {per_text}")
    if len(texts) != len(labels):
        raise ValueError(f"texts: wanted one for each of {len(labels)} labels, got {len(texts)}")
    words = [{word for word in count_words([text]) if not is_function_word(word)} for text in texts]
    spread = Counter(word for found in words for word in found)
    held_out = [i for i in (~train).nonzero().squeeze(1).tolist() if labels[i] is not None]
    result = {}
    for name in sorted({str(labels[i]) for i in held_out}):
        own = set().union(*(words[i] for i, label in enumerate(labels) if label == name))
        weight = {
            i: sum(np.log(len(texts) / spread[word]) for word in words[i] & own)
            for i in held_out
            if labels[i] != name and words[i] & own
        }
        count = per_text * sum(labels[i] == name for i in held_out)
        chosen = sorted(weight, key=lambda i: (-weight[i], i))[:count]
        result[name] = torch.zeros(len(texts), dtype=torch.bool)
        result[name][chosen] = True
    return result


def detect_concepts(
    dictionary: Dictionary,
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
    hard: Mapping[str, Tensor],
    *,
    scores: Tensor | None = None,
) -> ConceptDetection:
    """Match a method's directions to concepts on training texts, and score them on held-out texts.

    A method with a direction for each concept has no choice: each concept is scored by its own.

    Args:
        dictionary: the method.
        activations: of all texts, ``[n, d]``, tokens × neurons.
        text_of: which text each token belongs to, ``[n]`` int64.
        labels: the label of each text.
        train: which texts are training texts, ``[n_texts]`` bool.
        hard: from :func:`hard_negatives`.
        scores: ``dictionary.scores(...)`` of all texts, where they are known already.

    Raises:
        ValueError: as :func:`snmf_interp.evaluation.detection`.
    """
    if scores is None:
        scores = dictionary.scores(activations, text_of, len(labels))
    found = (
        halves(scores, labels, train)
        if dictionary.concepts is None
        else _own(scores, dictionary.concepts, labels, train)
    )
    hard_auroc, s_cd = [], []
    for i, name in enumerate(found.names):
        row = scores[int(found.feature[i])].double()
        own = torch.tensor([label == name for label in labels]) & ~train
        others = torch.tensor([label not in (name, None) for label in labels]) & ~train
        s_cd.append(float(concept_detection_score(row[own].clamp_min(0), row[others].clamp_min(0))))
        rivals = hard[name]
        if not rivals.any():
            hard_auroc.append(float("nan"))
            continue
        both = torch.cat([row[own], row[rivals]])[None]
        sides = [name] * int(own.sum()) + [""] * int(rivals.sum())
        hard_auroc.append(float(auroc(both, sides)[1][0, 1]))
    return ConceptDetection(
        dictionary.name,
        dictionary.size if dictionary.concepts is None else 1,
        found,
        torch.tensor(hard_auroc, dtype=torch.float64),
        torch.tensor(s_cd, dtype=torch.float64),
    )


def summarise(*repetitions: Sequence[ConceptDetection], confidence: float = 0.95) -> list[DetectionSummary]:
    """Means with intervals over concepts and repetitions; the first method is compared with the rest.

    Intervals of several repetitions contain both: other concepts, and other divisions of these texts with other starts.
    Those of one are over concepts alone.

    Args:
        repetitions: of each the rows of the same methods, in the same order. Concepts that a repetition lacks, which
            few texts may cause, are left out of all.
        confidence: of the intervals.

    Raises:
        ValueError: there is no repetition or no method, they are of different methods, or the rows of one are not
            about the same concepts.
    """
    if not repetitions or not repetitions[0]:
        raise ValueError("repetitions: wanted at least one, of at least one method")
    methods = [row.method for row in repetitions[0]]
    for rows in repetitions:
        if [row.method for row in rows] != methods:
            raise ValueError("repetitions: wanted all of the same methods, in one order")
        if len({row.detection.names for row in rows}) > 1:
            raise ValueError("rows: wanted all about the same concepts")
    names = sorted(set.intersection(*({*rows[0].detection.names} for rows in repetitions)))
    tables = [_tables([rows[i] for rows in repetitions], names) for i in range(len(methods))]
    first = tables[0]["auroc"]
    found = []
    for i, (row, own) in enumerate(zip(repetitions[0], tables, strict=True)):
        lead = first - own["auroc"]
        means = own | ({"lead": lead} if i else {})
        found.append(
            DetectionSummary(
                row.method,
                row.size,
                Interval.of(own["auroc"], (0, 1), confidence=confidence),
                Interval.of(own["hard_auroc"], (0, 1), confidence=confidence),
                Interval.of(own["probe_accuracy"], (0, 1), confidence=confidence),
                Interval.of_share(own["detected"] > 0, confidence=confidence),
                Interval.of(lead, (-1, 1), confidence=confidence) if i else None,
                tuple(own["auroc"].mean(0).tolist()),
                {
                    name: {key: float(values[at].mean()) for key, values in means.items()}
                    for at, name in enumerate(names)
                },
            )
        )
    return found


def detected_note(rows: Sequence[DetectionSummary]) -> str:
    """What must be said wherever the share of concepts with S_CD above 0 is shown."""
    chance = next((row.detected.value for row in rows if row.method == "random"), None)
    passed = _MEASURED_CHANCE if chance is None else f"{chance:.0%} of the concepts here"
    return f"S_CD > 0, the paper's measure, is uninformative: random groups of neurons pass it for {passed}"


def interval_note(seeds: Sequence[int]) -> str:
    """What intervals of repetitions with these seeds contain."""
    if len(seeds) == 1:
        return (
            f"means over concepts; 95 % intervals are over concepts alone, of one division of the texts and one start "
            f"of each fit (seed {seeds[0]}): others give other means"
        )
    return (
        f"means over concepts and {len(seeds)} divisions of the texts with their own starts of the fits (seeds "
        f"{seeds[0]} to {seeds[-1]}); 95 % intervals are over both"
    )


def _tables(rows: Sequence[ConceptDetection], names: Sequence[str]) -> dict[str, Tensor]:
    """A method's scores in all repetitions, each ``[n_concepts, n_repetitions]`` float64."""
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        order = [row.detection.names.index(name) for name in names]
        for key, values in {
            "auroc": row.detection.auroc, "hard_auroc": row.hard_auroc,
            "probe_accuracy": row.detection.probe_accuracy, "detected": row.s_cd > 0,
        }.items():  # fmt: skip
            columns.setdefault(key, []).append(values[order].double())
    return {key: torch.stack(values, 1) for key, values in columns.items()}


def _own(scores: Tensor, concepts: Sequence[str], labels: Sequence[str | None], train: Tensor) -> Detection:
    """Each concept by the direction that was made for it."""
    chosen = train.tolist()
    ours = [label for label, inside in zip(labels, chosen, strict=True) if inside]
    theirs = [label for label, inside in zip(labels, chosen, strict=True) if not inside]
    entries: list[tuple[int, Detection, int]] = []
    for index, name in enumerate(concepts):
        if name in theirs:
            row = scores[[index]]
            found = detection(row[:, train], ours, row[:, ~train], theirs)
            entries.append((index, found, found.names.index(name)))
    columns = {
        field.name: torch.stack([getattr(found, field.name)[at] for _, found, at in entries])
        for field in fields(Detection)
        if field.name != "names"
    }
    index_of = torch.tensor([index for index, _, _ in entries])
    names = tuple(found.names[at] for _, found, at in entries)
    return Detection(names=names, **columns | {"feature": index_of, "probe_feature": index_of})
