"""Core and exclusive neurons: what the features of a group of words share, and what each has for itself.

    found = assign_features(text_scores(Y, text_of, n_texts), labels, ["Monday", "Tuesday", …])
    sets = neuron_sets(factors.Z, found.members(at_least=0.5))
    sets.core, sets.exclusive["Monday"]

:mod:`snmf_interp.group_effects` measures what steering with these sets does to the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concepts import average_precision

CORE = "core"


@dataclass(frozen=True)
class Assignment:
    """One feature for each word; no feature for two.

    Attributes:
        words: the words.
        features: the feature of each.
        precision: its average precision as a detector of the word's texts, on the texts that it was chosen on: as the
            largest of many it is too high.
    """

    words: tuple[str, ...]
    features: tuple[int, ...]
    precision: tuple[float, ...]

    def members(self, at_least: float = 0.0) -> dict[str, int]:
        """``{word: feature}`` of the words whose precision is ``at_least`` this."""
        rows = zip(self.words, self.features, self.precision, strict=True)
        return {word: feature for word, feature, precision in rows if precision >= at_least}


def assign_features(scores: Tensor, labels: Sequence[str | None], words: Sequence[str]) -> Assignment:
    """Give each word a feature of its own so that the sum of average precisions is largest (Kuhn 1955).

    Args:
        scores: ``[k, n_texts]``, for instance of :func:`snmf_interp.concepts.text_scores`.
        labels: the label of each text: one of ``words``, or another that the features must tell them from, or None.
        words: the words; each labels at least one text.

    Raises:
        ValueError: a word labels no text, is named twice, or there are fewer features than words.
    """
    from scipy.optimize import linear_sum_assignment

    if len(set(words)) != len(words) or not words:
        raise ValueError(f"words: wanted at least one word and each once, got {list(words)}")
    if len(scores) < len(words):
        raise ValueError(
            f"scores: wanted at least as many features as words ({len(words)}), got {len(scores)}; raise k"
        )
    names, precision = average_precision(scores, labels)
    if missing := [word for word in words if word not in names]:
        raise ValueError(f"words: {missing[0]!r} labels no text; wanted any of {', '.join(names[:20])}")
    table = precision[:, [names.index(word) for word in words]].numpy()
    features, columns = linear_sum_assignment(table, maximize=True)
    feature_of = dict(zip(columns.tolist(), features.tolist(), strict=True))
    chosen = [feature_of[i] for i in range(len(words))]
    return Assignment(
        tuple(words), tuple(chosen), tuple(float(table[feature, i]) for i, feature in enumerate(chosen))
    )


@dataclass(frozen=True)
class NeuronSets:
    """The neurons that a group of features shares, and those of one alone.

    Attributes:
        members: ``{word: feature}``.
        m: how many supports make a neuron core.
        core: the neurons in at least ``m`` supports, ascending.
        exclusive: of each word the neurons in its support and in no other of the group, ascending.
        expected_core: how many neurons would be core on average if supports of these sizes were drawn at random.
    """

    members: dict[str, int]
    m: int
    core: tuple[int, ...]
    exclusive: dict[str, tuple[int, ...]]
    expected_core: float


def neuron_sets(Z: Tensor, members: Mapping[str, int], m: int | None = None) -> NeuronSets:
    """Core and exclusive neurons of some columns of ``Z [d, k]``; entries that are not zero count.

    Args:
        Z: features, of ``Factorization.Z`` for instance.
        members: a feature for each word, at least two.
        m: by default the smallest, from 2 on, for which random supports of these sizes would give less than one core
            neuron: 3 for seven supports of 1 %, where 2 would already give three to five by chance.

    Raises:
        ValueError: fewer than two members, a feature that is not there or named twice, or ``m`` out of range.
    """
    if Z.ndim != 2:
        raise ValueError(f"Z: wanted a matrix [d, k], got shape {tuple(Z.shape)}")
    features = list(members.values())
    if len(features) < 2 or len(set(features)) != len(features):
        raise ValueError(
            f"members: wanted at least two words with a feature of their own, got {dict(members)}"
        )
    if out := [feature for feature in features if not 0 <= feature < Z.shape[1]]:
        raise ValueError(f"members: there are features 0-{Z.shape[1] - 1}, got {out[0]}")
    support = (Z[:, features] != 0).cpu()
    expected = [_expected(support.double().mean(0).tolist(), i) * len(Z) for i in range(len(features) + 1)]
    if m is None:
        m = next((i for i in range(2, len(features)) if expected[i] < 1), len(features))
    if not 2 <= m <= len(features):
        raise ValueError(f"m: wanted 2 to {len(features)}, the number of members, got {m}")
    count = support.sum(1)
    alone = support & (count == 1)[:, None]
    return NeuronSets(
        members=dict(members),
        m=m,
        core=_indices(count >= m),
        exclusive={word: _indices(alone[:, i]) for i, word in enumerate(members)},
        expected_core=expected[m],
    )


def set_directions(Z: Tensor, sets: NeuronSets) -> dict[str, Tensor]:
    """The direction ``[d]``, float32 and of unit length, that steers by each set that is not empty.

    ``"core"``: the mean of the members' columns, each scaled to unit length first, on the core neurons. A word: its
    column on its exclusive neurons. Weights keep their signs; a core on which the columns cancel has no direction.
    """
    columns = Z[:, list(sets.members.values())].cpu().float()
    columns = columns / columns.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    chosen = {CORE: (columns.mean(1), sets.core)}
    chosen |= {word: (columns[:, i], sets.exclusive[word]) for i, word in enumerate(sets.members)}
    found = {}
    for name, (column, neurons) in chosen.items():
        mask = torch.zeros(len(column)).index_fill(0, torch.tensor(neurons, dtype=torch.long), 1.0)
        if float((column * mask).norm()) > 0:
            found[name] = column * mask / (column * mask).norm()
    return found


def random_sets(direction: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The control for a set: its weights, in random order, on as many random neurons.

    Args:
        direction: ``[d]``; entries that are not zero are the weights.
        count: how many.
        generator: of the choice; no global one is touched.

    Returns:
        ``[count, d]``. The direction itself is one of the equally likely draws, so that the permutation test of
        :func:`permutation_p` is exact for a statistic that treats all alike. Where strengths are searched for, the
        observed one lies up to 2 % above the divergence aimed at, in its favour by less than 1 % of its effect.
    """
    # A row of the argsort is a permutation of all neurons.
    order = torch.rand(count, len(direction), generator=generator).argsort(1)
    return direction.cpu()[order]


def permutation_p(observed: float, random: Sequence[float]) -> float:
    """The one-sided permutation p-value ``(1 + #{random >= observed}) / (1 + N)`` (Phipson & Smyth 2010)."""
    return (1 + sum(value >= observed for value in random)) / (1 + len(random))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false one below a is at most a."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().squeeze(1).tolist())


def _expected(shares: Sequence[float], m: int) -> float:
    """The chance that at least ``m`` of independent events with these probabilities happen."""
    of = [1.0] + [0.0] * len(shares)
    for share in shares:
        of = [of[i] * (1 - share) + (of[i - 1] * share if i else 0.0) for i in range(len(of))]
    return sum(of[m:])
