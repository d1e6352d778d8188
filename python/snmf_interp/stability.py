"""Which features a fit finds again from other starts.

    report = stability(activations.T, 100, seeds=5)
    report.recurrence, report.mean_recurrence, report.chance

The cosines are those of columns of Z in the units of the activations: loud neurons count as much as they do in the
model, and two features that share one are alike. That is what :attr:`Chance.features` allows for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import snmf_kernels

from .similarity import as_double, correlations, cosines

# Two features of one fit above this cosine say the same thing twice.
DUPLICATE = 0.9
# Features taken apart for each other fit, at least, so that chance levels of small fits are not left to few draws.
_CHANCE_FEATURES = 500
# A feature counts as found again when its match has at least this cosine.
THRESHOLD = 0.7


@dataclass(frozen=True, eq=False)
class Matching:
    """Each feature of one factorisation with the one of another that it is paired with.

    Attributes:
        other: ``[k]`` int64, no feature twice; -1 where the other has fewer and none is left.
        similarity: cosine of the two columns of Z, ``[k]`` float64; 0 where there is no pair.
        correlation: of the two rows of Y, ``[k]`` float64; NaN where the two are not of the same tokens (their
            number differs) or there is no pair.
    """

    other: Tensor
    similarity: Tensor
    correlation: Tensor


@dataclass(frozen=True)
class Chance:
    """The share of features that would be found again if nothing were; see :func:`stability_of`.

    Attributes:
        neurons: when each feature of the other fit has its weights at neurons drawn at random.
        features: when each neuron of the other fit has its weights in features drawn at random: neurons stay as
            common and as loud as they are, only the groups are broken. The harder of the two to beat.
    """

    neurons: float
    features: float


@dataclass(frozen=True)
class Duplicate:
    """Two features of one fit that point the same way: their numbers and the cosine of their columns of Z."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True, eq=False)
class Stability:
    """What several fits of the same activations have in common.

    Attributes:
        k: features of each fit.
        seeds: of the fits; features are those of the first.
        threshold: the cosine from which a match counts as the same feature.
        matched: ``[k, s - 1]`` int64: for each feature of the first fit its match in each of the others.
        similarity, correlation: ``[k, s - 1]`` of these matches, as in :class:`Matching`.
        agreement: ``[s, s]`` float64, symmetric: the share of features that two fits have in common.
        chance: what ``agreement`` would be by chance.
        dead: features of each fit with a zero column of Z or row of Y.
        duplicates: pairs of the first fit whose cosine is at least ``duplicate_threshold``, most alike first.
        n_duplicates: the number of such pairs in each fit.
        duplicate_threshold: see there.
    """

    k: int
    seeds: tuple[int, ...]
    threshold: float
    matched: Tensor
    similarity: Tensor
    correlation: Tensor
    agreement: Tensor
    chance: Chance
    dead: tuple[int, ...]
    duplicates: tuple[Duplicate, ...]
    n_duplicates: tuple[int, ...]
    duplicate_threshold: float

    @property
    def recurrence(self) -> Tensor:
        """For each feature of the first fit the share of the other fits that have it, ``[k]`` float64."""
        return (self.similarity >= self.threshold).double().mean(1)

    @property
    def mean_recurrence(self) -> float:
        """The share of features that another fit has too, mean over all pairs of fits."""
        return _mean_of_pairs(self.agreement)

    @property
    def standard_error(self) -> float:
        """Of ``mean_recurrence``, over starts: a jackknife over the fits. NaN with fewer than three."""
        count = len(self.seeds)
        if count < 3:
            return math.nan
        without = [[j for j in range(count) if j != i] for i in range(count)]
        left = torch.tensor([_mean_of_pairs(self.agreement[rest][:, rest]) for rest in without])
        return float(((count - 1) / count * (left - left.mean()).square().sum()).sqrt())

    def share_recurring(self, least: float = 0.5) -> float:
        """The share of features of the first fit whose recurrence is at least ``least``."""
        return float((self.recurrence >= least).double().mean())


def stability(
    A: Tensor | np.ndarray,
    k: int,
    *,
    seeds: int | Sequence[int] = 5,
    threshold: float = THRESHOLD,
    duplicate_threshold: float = DUPLICATE,
    progress: bool = False,
    **options: Any,
) -> Stability:
    """Fit the same activations from several starts and report which features recur.

    Args:
        A: activations ``[d, n]``, as for :func:`snmf_kernels.fit`.
        k: number of features.
        seeds: how many starts (seeds 0, 1, …), or the seeds; at least two, all different.
        threshold, duplicate_threshold: see :func:`stability_of`.
        progress: show a bar over the fits.
        options: whatever else :func:`snmf_kernels.fit` takes.

    Raises:
        TypeError, ValueError: an argument is not as described.
        snmf_kernels.FitManyError: a fit failed.
    """
    starts = check_seeds(seeds, 2)
    _check_thresholds(threshold, duplicate_threshold)
    fits = snmf_kernels.fit_many(A, k, seed=list(starts), progress=progress, **options)
    return stability_of(fits, threshold=threshold, duplicate_threshold=duplicate_threshold)


def stability_of(
    fits: Sequence[snmf_kernels.Factorization],
    *,
    threshold: float = THRESHOLD,
    duplicate_threshold: float = DUPLICATE,
) -> Stability:
    """The same for fits that are there already.

    Features of two fits are matched one to one so that the summed cosine of their columns of Z is largest
    (Hungarian algorithm), and count as the same from a cosine of ``threshold`` on.

    The chance levels match the first fit with the others after taking their features apart, at least 500 features
    of each; the draws are the same on every call.

    Args:
        fits: of the same activations with the same k, at least two.
        threshold: a cosine in (0, 1].
        duplicate_threshold: a cosine in (0, 1].

    Raises:
        ValueError: fewer than two fits, fits of different shapes, or a threshold outside its range.
    """
    _check_thresholds(threshold, duplicate_threshold)
    if len(fits) < 2:
        raise ValueError(f"fits: wanted at least 2, got {len(fits)}")
    shapes = {tuple(fit.Z.shape) for fit in fits}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)))
        raise ValueError(f"fits: wanted Z of one shape [d, k], got {found}; fit with the same k")
    first, count = fits[0], len(fits)
    matches = [match_features(first, other) for other in fits[1:]]
    similarity = torch.stack([match.similarity for match in matches], 1)
    agreement = torch.eye(count, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1, count):
            found_again = matches[j - 1].similarity if i == 0 else _paired(fits[i].Z, fits[j].Z)[1]
            agreement[i, j] = agreement[j, i] = _share(found_again, threshold)
    doubles = [_duplicates(fit.Z, duplicate_threshold) for fit in fits]
    return Stability(
        k=int(first.Z.shape[1]),
        seeds=tuple(int(fit.options.get("seed", number)) for number, fit in enumerate(fits)),
        threshold=threshold,
        matched=torch.stack([match.other for match in matches], 1),
        similarity=similarity,
        correlation=torch.stack([match.correlation for match in matches], 1),
        agreement=agreement,
        chance=_chance(fits, threshold),
        dead=tuple(len(fit.dead_features) for fit in fits),
        duplicates=doubles[0],
        n_duplicates=tuple(map(len, doubles)),
        duplicate_threshold=duplicate_threshold,
    )


def match_features(first: snmf_kernels.Factorization, other: snmf_kernels.Factorization) -> Matching:
    """Pair features of two factorisations of the same neurons one to one.

    The pairs are those with the largest sum of cosines of columns of Z (``scipy.optimize.linear_sum_assignment``).

    Raises:
        ValueError: they have different numbers of neurons.
    """
    if first.Z.shape[0] != other.Z.shape[0]:
        raise ValueError(
            f"other: wanted features of the same {first.Z.shape[0]} neurons, got {other.Z.shape[0]}; features of "
            "different layers have no neurons in common: compare them by direction or coefficients"
        )
    partner, similarity = _paired(first.Z, other.Z)
    correlation = torch.full_like(similarity, math.nan)
    there = partner >= 0
    if first.Y.shape[1] == other.Y.shape[1]:
        table = correlations(first.Y, other.Y)
        correlation[there] = table[there.nonzero().squeeze(1), partner[there]]
    return Matching(partner, similarity, correlation)


def check_seeds(seeds: int | Sequence[int], least: int) -> tuple[int, ...]:
    """A number of seeds as 0, 1, …; or the seeds themselves, at least ``least`` and all different, else ValueError."""
    starts = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(starts)) != len(starts) or len(starts) < least:
        raise ValueError(f"seeds: wanted at least {least}, all different, got {seeds}")
    return starts


def _paired(first: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Partners ``[k]``, -1 for none, and their cosines."""
    table = cosines(first, other)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(table.numpy(), maximize=True))
    partner = torch.full((len(table),), -1, dtype=torch.int64)
    similarity = torch.zeros(len(table), dtype=torch.float64)
    partner[rows], similarity[rows] = columns, table[rows, columns]
    return partner, similarity


def _chance(fits: Sequence[snmf_kernels.Factorization], threshold: float) -> Chance:
    generator = torch.Generator().manual_seed(0)
    shares: dict[int, list[float]] = {0: [], 1: []}
    for other in fits[1:]:
        Z = as_double(other.Z)
        for _ in range(math.ceil(_CHANCE_FEATURES / Z.shape[1])):
            for axis, found in shares.items():
                order = torch.rand(Z.shape, generator=generator).argsort(axis)
                found.append(_share(_paired(fits[0].Z, Z.gather(axis, order))[1], threshold))
    return Chance(neurons=_mean(shares[0]), features=_mean(shares[1]))


def _duplicates(Z: Any, threshold: float) -> tuple[Duplicate, ...]:
    table = cosines(Z, Z).triu(1)
    pairs = (table >= threshold).nonzero().tolist()
    found = [Duplicate(i, j, float(table[i, j])) for i, j in pairs]
    return tuple(sorted(found, key=lambda pair: -pair.cosine))


def _share(similarity: Tensor, threshold: float) -> float:
    return float((similarity >= threshold).double().mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_pairs(table: Tensor) -> float:
    rows, columns = torch.triu_indices(len(table), len(table), 1)
    return float(table[rows, columns].mean())


def _check_thresholds(threshold: float, duplicate_threshold: float) -> None:
    for name, value in (("threshold", threshold), ("duplicate_threshold", duplicate_threshold)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: wanted a cosine above 0 and at most 1, got {value}")
