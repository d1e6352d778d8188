"""Matching features to labelled texts: which concept does a feature rank first, and how surely?"""

from __future__ import annotations

from collections.abc import Sequence

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
    scores = torch.zeros(Y.shape[0], n_texts, dtype=Y.dtype)
    return scores.scatter_reduce_(1, text_of.expand(Y.shape[0], -1), Y, "amax")


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
    known = torch.tensor([label is not None for label in labels])
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


def chance_precision(scores: Tensor, labels: Sequence[str | None], *, seed: int = 0) -> Tensor:
    """The control: each feature's best average precision, ``[k]``, under shuffled labels."""
    known = [i for i, label in enumerate(labels) if label is not None]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled: list[str | None] = [None] * len(labels)
    for place, other in zip(known, order, strict=True):
        shuffled[place] = labels[known[other]]
    return average_precision(scores, shuffled)[1].amax(1)
