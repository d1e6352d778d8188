"""How many features to ask for, decided by which number of them several starts agree on.

choice = suggest_k(activations.T, [25, 50, 100, 200], groups=store.corpus.groups[text_of])
choice.k, choice.reason, choice.evidence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import snmf_kernels

from .stability import DUPLICATE, THRESHOLD, check_seeds, stability_of

# The largest k of the default grid: the paper's largest is 400.
_LARGEST = 400


@dataclass(frozen=True)
class KEvidence:
    """What several fits with one k say about it.

    Attributes:
        k: number of features.
        relative_error: of the held-out tokens, encoded on the features; mean over the fits.
        train_error: of the tokens that were fitted; mean over the fits.
        recurrence, standard_error: :attr:`Stability.mean_recurrence` and its error over starts.
        chance: the share that recurs when features are taken apart, :attr:`Chance.features`.
        dead: dead features, mean over the fits.
        duplicates: pairs of one fit that point the same way, mean over the fits.
    """

    k: int
    relative_error: float
    train_error: float
    recurrence: float
    standard_error: float
    chance: float
    dead: float
    duplicates: float

    @property
    def beyond_chance(self) -> float:
        """``(recurrence − chance) / (1 − chance)``: 0 when no more recurs than by chance, 1 when everything does."""
        return (self.recurrence - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0

    @property
    def n_recurring(self) -> float:
        """How many features recur beyond chance: ``k`` times ``beyond_chance``."""
        return self.k * self.beyond_chance

    @property
    def beyond_chance_error(self) -> float:
        """Its standard error over starts."""
        return self.standard_error / (1 - self.chance) if self.chance < 1 else 0.0


@dataclass(frozen=True)
class KChoice:
    """A number of features with the evidence for it; see :func:`suggest_k`.

    Attributes:
        k: what was chosen.
        reason: why, in a sentence.
        evidence: for each candidate, by rising k.
        seeds, held_out, threshold: as they were given.
    """

    k: int
    reason: str
    evidence: tuple[KEvidence, ...]
    seeds: tuple[int, ...]
    held_out: float
    threshold: float


def suggest_k(
    A: Tensor | np.ndarray,
    ks: Sequence[int] | None = None,
    *,
    groups: Tensor | None = None,
    held_out: float = 0.2,
    seeds: int | Sequence[int] = 5,
    threshold: float = THRESHOLD,
    duplicate_threshold: float = DUPLICATE,
    known: Sequence[KEvidence] = (),
    after: Callable[[KEvidence], None] | None = None,
    before: Callable[[int], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> KChoice:
    """Choose the number of features by how far fits from different starts agree.

    Each candidate is fitted from every start on the training tokens. The choice is the largest k whose recurrence
    beyond chance (:attr:`KEvidence.beyond_chance`) is within one standard error of the best candidate's: more
    features as long as they are found again as surely as fewer would be.

    With fewer features than there are, starts merge different ones; with more, they split them differently or fit
    noise. On planted factors, recurrence has its peak at their number. On language models the peak is low and
    flat: on SmolLM2, layers 8, 10 and 23, a fifth of the features recur beyond chance (0.12 to 0.27) at every k from
    25 to 400, and the choice (200, 25 and 200) may be another with other starts. The held-out error, which only falls
    with k there, and the number that recurs (:attr:`KEvidence.n_recurring`), which only rises, decide nothing; look
    at them.

    Args:
        A: activations ``[d, n]``, as for :func:`snmf_kernels.fit`.
        ks: candidates; by default :func:`candidates` of the training tokens.
        groups: ``[n]`` int64, the text of each token: whole texts are held out, those of one number (as equal ones must
            have) together. None: single tokens are.
        held_out: the share of texts (tokens) held out.
        seeds: how many starts (seeds 0, 1, …), or the seeds; at least three, all different.
        threshold, duplicate_threshold: see :func:`snmf_interp.stability.stability_of`.
        known: evidence that is there already from a call with the same arguments; its k are not fitted again.
        after: called with the evidence for each k when it is there, to keep it.
        before: called with each k that is going to be fitted.
        progress: show a bar over the fits of each k.
        options: whatever else :func:`snmf_kernels.fit` takes.

    Raises:
        TypeError, ValueError: an argument is not as described.
        snmf_kernels.FitManyError: a fit failed.
    """
    starts = check_seeds(seeds, 3)
    columns = A.shape[1]
    test = _held_out(columns, groups, held_out)
    n_train = int((~test).sum())
    wanted = candidates(int(A.shape[0]), n_train) if ks is None else sorted(set(ks))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"ks: wanted at least one number of features, each at least 1, got {ks}")
    there = {row.k: row for row in known if row.k in wanted}
    if len(there) < len(wanted):
        train_part, test_part = _columns(A, ~test), _columns(A, test)
    for k in wanted:
        if k in there:
            continue
        if before:
            before(k)
        fits = snmf_kernels.fit_many(train_part, k, seed=list(starts), progress=progress, **options)
        report = stability_of(fits, threshold=threshold, duplicate_threshold=duplicate_threshold)
        there[k] = KEvidence(
            k=k,
            relative_error=_mean([fit.encode(test_part).relative_error for fit in fits]),
            train_error=_mean([fit.relative_error for fit in fits]),
            recurrence=report.mean_recurrence,
            standard_error=report.standard_error,
            chance=report.chance.features,
            dead=_mean(report.dead),
            duplicates=_mean(report.n_duplicates),
        )
        if after:
            after(there[k])
    evidence = tuple(there[k] for k in wanted)
    k, reason = _choose(evidence)
    return KChoice(k, reason, evidence, starts, held_out, threshold)


def candidates(d: int, n: int) -> list[int]:
    """The default grid, doubling five times up to 400, or to the neurons or a tenth of the tokens if that is less."""
    largest = max(1, min(_LARGEST, d, n // 10))
    return sorted({max(1, largest >> i) for i in range(5)})


def _choose(evidence: Sequence[KEvidence]) -> tuple[int, str]:
    best = max(evidence, key=lambda row: (row.beyond_chance, -row.k))
    least = best.beyond_chance - best.beyond_chance_error
    chosen = max((row for row in evidence if row.beyond_chance >= least), key=lambda row: row.k)
    peak = f"{best.beyond_chance:.2f} ± {best.beyond_chance_error:.2f} at k = {best.k}"
    if best.beyond_chance <= 2 * best.beyond_chance_error:
        note = "; no candidate's features recur clearly more than by chance, so that this says little"
    elif chosen is evidence[-1] and len(evidence) > 1:
        note = "; it is the largest candidate, so that larger ones may do as well"
    else:
        note = ""
    if chosen is best:
        return chosen.k, f"recurrence beyond chance is highest here, {peak}, and lower at larger k{note}"
    return chosen.k, (
        f"the largest k whose recurrence beyond chance, {chosen.beyond_chance:.2f}, is within one standard error of "
        f"the highest, {peak}{note}"
    )


def _held_out(n: int, groups: Tensor | None, share: float) -> Tensor:
    """Which tokens are held out, ``[n]`` bool; the same on every call."""
    if not 0 < share < 1:
        raise ValueError(f"held_out: wanted a share between 0 and 1, got {share}")
    if groups is not None and groups.shape != (n,):
        raise ValueError(f"groups: wanted one number for each of the {n} tokens, got {list(groups.shape)}")
    group_of = torch.arange(n) if groups is None else groups
    names = group_of.unique()
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise ValueError(
            f"held_out: a share of {share} of {len(names)} {'tokens' if groups is None else 'texts'} leaves none on "
            "one side; give more texts or another share"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return torch.isin(group_of, names[order[:count]])


def _columns(A: Tensor | np.ndarray, wanted: Tensor) -> Tensor | np.ndarray:
    """A copy of some columns, laid out as A is: token-major activations come as a transposed view."""
    if isinstance(A, Tensor):
        return A.T[wanted.to(A.device)].T
    part: np.ndarray = A.T[wanted.numpy()].T
    return part


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
