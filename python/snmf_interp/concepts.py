"""Matching features to labelled texts: which concept does a feature rank first, and how surely?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Labels handled at once: bounds the table of [texts, labels] for large corpora.
_CHUNK = 64


def text_scores(Y: Tensor, text_of: Tensor, n_texts: int) -> Tensor:
    """Each text's largest coefficient per feature.

    Args:
        Y: coefficients ``[k, n]``, non-negative.
        text_of: which text each of the n tokens belongs to, ``[n]`` int64.
        n_texts: how many texts there are; one without tokens scores 0.

    Returns:
        ``[k, n_texts]`` in Y's dtype.
    """
    return text_maxima((Y,), text_of, n_texts)


def text_maxima(parts: Iterable[Tensor], text_of: Tensor, n_texts: int) -> Tensor:
    """Each text's largest value, of values that come for some tokens after others.

    Args:
        parts: at least one ``[m, tokens]``, of the tokens in turn; only one is held at a time.
        text_of: which text each token of all parts belongs to, ``[n]`` int64.
        n_texts: how many texts there are; one without tokens has 0.

    Returns:
        ``[m, n_texts]`` in the parts' dtype.
    """
    maxima: Tensor | None = None
    first = 0
    for part in parts:
        if maxima is None:
            maxima = part.new_full((len(part), n_texts), -math.inf)
        last = first + part.shape[1]
        maxima.scatter_reduce_(1, text_of[first:last].expand(len(part), -1), part, "amax")
        first = last
    assert maxima is not None
    return maxima.masked_fill_(maxima.isneginf(), 0)


def average_precision(scores: Tensor, labels: Sequence[str | None]) -> tuple[list[str], Tensor]:
    """Average precision of each feature as a detector of each label.

    Texts are ranked by score; the average precision is the mean, over a label's texts, of the share of that
    label among all texts ranked as high or higher. Texts of equal score count as one step, so the order of
    the corpus cannot matter. 1 means that all of the label's texts come first; a score without information
    gives about the label's share of the corpus.

    Args:
        scores: ``[k, n_texts]``.
        labels: the label of each text; texts without one are left out.

    Returns:
        The labels in alphabetical order, and ``[k, n_labels]`` float64.
    """
    known = torch.tensor([label is not None for label in labels], dtype=torch.bool)
    names = sorted({label for label in labels if label is not None})
    number = {name: i for i, name in enumerate(names)}
    label_of = torch.tensor([number[label] for label in labels if label is not None], dtype=torch.long)
    result = torch.zeros(len(scores), len(names), dtype=torch.float64)
    for feature, row in enumerate(scores[:, known]):
        ranked, order = row.sort(descending=True, stable=True)
        # The last text of each run of equal scores closes a step.
        ends = torch.cat([(ranked.diff() != 0).nonzero().squeeze(1), torch.tensor([len(ranked) - 1])])
        for first in range(0, len(names), _CHUNK):
            chunk = torch.arange(first, min(first + _CHUNK, len(names)))
            hits = (label_of[order][:, None] == chunk).double().cumsum(0)[ends]
            precision = hits / (ends + 1).double()[:, None]
            gained = hits.diff(dim=0, prepend=torch.zeros(1, len(chunk), dtype=torch.float64))
            result[feature, chunk] = (gained * precision).sum(0) / hits[-1]
    return names, result


def chance_precision(
    scores: Tensor, labels: Sequence[str | None], *, shuffles: int = 20, seed: int = 0
) -> float:
    """The average precision that chance reaches: of the best feature and label, under shuffled labels.

    The 95 % quantile over shuffles of the largest average precision of all features and labels. A feature above it has
    a concept; of features that have none, one in twenty such sets holds one above it. Of labels that all texts share,
    or that each text has for itself, it is 1: nothing can be above it.

    Args:
        scores: ``[k, n_texts]``.
        labels: the label of each text; texts without one are left out.
        shuffles: how often the labels are dealt out anew.
        seed: of the shuffles.
    """
    known = [i for i, label in enumerate(labels) if label is not None]
    generator = torch.Generator().manual_seed(seed)
    best = []
    for _ in range(shuffles):
        order = torch.randperm(len(known), generator=generator).tolist()
        shuffled: list[str | None] = [None] * len(labels)
        for place, other in zip(known, order, strict=True):
            shuffled[place] = labels[known[other]]
        best.append(float(average_precision(scores, shuffled)[1].max()))
    return float(torch.tensor(best, dtype=torch.float64).quantile(0.95))
