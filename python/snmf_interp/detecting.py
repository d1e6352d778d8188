"""Rivals as detectors of labelled concepts: matched on training texts, scored on the others, with intervals.

hard = hard_negatives(texts, labels, train)
rows = [detect_concepts(rival, A, text_of, labels, train, hard) for rival in rivals]
for row in summarise(rows):
    print(row.method, row.auroc.value, row.auroc.low, row.auroc.high)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit, logit
from scipy.stats import binomtest
from scipy.stats import t as student_t
from torch import Tensor

from .evaluation import Detection, auroc, concept_detection_score, detection, halves
from .intervals import bootstrap_mean
from .words import count_words, is_function_word

if TYPE_CHECKING:
    from .dictionaries import Dictionary

# Hard negatives of a concept for each of its held-out texts.
_HARD_PER_TEXT = 2
# Values from which a percentile bootstrap keeps its promise.
_BOOTSTRAP_FROM = 20


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
            cut, ``[n_concepts]`` float64; see :func:`snmf_interp.evaluation.concept_detection_score`.
    """

    method: str
    size: int
    detection: Detection
    hard_auroc: Tensor
    s_cd: Tensor

    def by_concept(self) -> list[dict[str, Any]]:
        """A row of plain values for each concept: the direction that was chosen, and its scores."""
        found = self.detection
        columns = {
            "direction": found.feature, "train_auroc": found.train_auroc, "auroc": found.auroc,
            "hard_auroc": self.hard_auroc, "probe_accuracy": found.probe_accuracy, "s_cd": self.s_cd,
        }  # fmt: skip
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"concept": name} | dict(zip(columns, row, strict=True))
            for name, row in zip(found.names, values, strict=True)
        ]


@dataclass(frozen=True)
class Interval:
    """A mean over concepts with its interval, NaN for fewer than two concepts.

    A percentile bootstrap; for fewer than 20 values, where that is too narrow (with 8 it excludes the true mean 11
    times in a hundred instead of 5), Student's t. The t interval of a bounded quantity is one of the mean's logit,
    whose standard error is that of the mean times the logit's slope there: it lies within the bounds, and covers
    better. Of AUROCs around 0.95 (Beta(20, 1), 8 values) it excludes the true mean 7 times in a hundred, that of the
    mean itself 10.
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
        """Of ``values [m]``, NaN left out.

        Args:
            values: one for each concept.
            bounds: the smallest and the largest value that there can be; None for what has none.
            confidence: of the interval.
            seed: of the bootstrap.
        """
        known = values[~values.isnan()].double()
        if not len(known):
            return cls(float("nan"), float("nan"), float("nan"))
        mean = float(known.mean())
        if len(known) >= _BOOTSTRAP_FROM:
            return cls(mean, *bootstrap_mean(known, confidence=confidence, seed=seed))
        if len(known) == 1:
            return cls(mean, float("nan"), float("nan"))
        half = float(student_t.ppf((1 + confidence) / 2, len(known) - 1) * known.std() / len(known) ** 0.5)
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
        """Of the share of ``hits [m]`` bool, m at least 1: Wilson's, which has some width at 0 and 1 too."""
        count = int(hits.sum())
        found = binomtest(count, len(hits)).proportion_ci(confidence, method="wilson")
        return cls(count / len(hits), float(found.low), float(found.high))


@dataclass(frozen=True)
class DetectionSummary:
    """One method's row of a table; all means are over the same concepts.

    Attributes:
        method, size: as in :class:`ConceptDetection`.
        auroc, hard_auroc, probe_accuracy: means over concepts.
        detected: the share of concepts with S_CD above 0.
        lead: by how much the first method's AUROC is above this one's, paired by concept; None for the first.
    """

    method: str
    size: int
    auroc: Interval
    hard_auroc: Interval
    probe_accuracy: Interval
    detected: Interval
    lead: Interval | None


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


def summarise(rows: Sequence[ConceptDetection], *, confidence: float = 0.95) -> list[DetectionSummary]:
    """Means over concepts with intervals; the first method is compared with the rest.

    Raises:
        ValueError: the rows are not about the same concepts.
    """
    if len({row.detection.names for row in rows}) > 1:
        raise ValueError("rows: wanted all about the same concepts")
    return [
        DetectionSummary(
            row.method,
            row.size,
            Interval.of(row.detection.auroc, (0, 1), confidence=confidence),
            Interval.of(row.hard_auroc, (0, 1), confidence=confidence),
            Interval.of(row.detection.probe_accuracy, (0, 1), confidence=confidence),
            Interval.of_share(row.s_cd > 0, confidence=confidence),
            None
            if i == 0
            else Interval.of(rows[0].detection.auroc - row.detection.auroc, (-1, 1), confidence=confidence),
        )
        for i, row in enumerate(rows)
    ]


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
