"""What two checkpoints do differently with the same features: same texts, one basis, features ranked by change.

    difference = compare(factors, base, tuned, read_texts("concepts"), layer=8)
    difference.changes[0].feature, difference.changes[0].standardised
    difference.changed(by=0.2), difference.median_size, difference.residual_change

Both are encoded on the features of one of them. A feature that the other checkpoint alone has cannot show up among
the changes; it shows in the residual, which then rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .activations import collect
from .features import TokenInContext, token_in_context
from .provenance import common_tokens
from .similarity import as_double

if TYPE_CHECKING:
    import snmf_kernels

    from .models import LanguageModel
    from .store import ActivationStore, Corpus
    from .texts import Sample

# Tighter than encode's default, so that what is left of the descent is small beside a change.
_TOLERANCE = 1e-6
# Tokens whose residual is computed at once.
_TOKENS = 4096
# Resampled means of [features, resamples, texts] held at once.
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval over texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TokenChange:
    """A token on which a feature's use changed.

    ``token.strength`` and ``token.share`` are those of the checkpoint in which the feature is stronger here.
    ``first`` and ``second`` are its contributions ``‖z‖ y`` in the two.
    """

    token: TokenInContext
    first: float
    second: float


@dataclass(frozen=True)
class FeatureChange:
    """How the use of one feature changed from the first checkpoint to the second.

    Attributes:
        feature: column of Z.
        first, second: its mean contribution ``‖z‖ y`` in each, over texts of the mean over a text's tokens.
        difference: ``second − first`` with its interval.
        standardised: the difference in standard deviations of the contribution over tokens (the root of the mean of
            both variances). 0 where neither varies.
        p_value: of a paired t-test over texts, equal ones being one. It is small also for a tiny change that is the
            same in all texts: how large a change is, ``standardised`` says.
        q_value: the same corrected for the number of features (Benjamini & Hochberg 1995): among features with
            ``q_value < 0.05``, about 5 % at most have not changed.
        correlation: of the contributions in the two over tokens: low where the feature has moved to other tokens,
            though its mean may be the same. NaN where one does not vary.
        tokens: where it changed most, largest change first, at most one a text; empty for features further down than
            those that were to be described.
    """

    feature: int
    first: float
    second: float
    difference: Interval
    standardised: float
    p_value: float
    q_value: float
    correlation: float
    tokens: tuple[TokenChange, ...]


@dataclass(frozen=True)
class Difference:
    """Two checkpoints on one basis.

    Attributes:
        layer: which.
        n_tokens: tokens that both have.
        n_left_out: tokens that one of them leaves out as attention sinks.
        n_texts: texts with such tokens; equal ones are one.
        n_equal: texts with such tokens that equal one before them.
        first_residual, second_residual: ``‖A − Z Y‖² / ‖A‖²`` of each, both encoded anew.
        residual_change: ``second − first`` with its interval over texts. Above 0: the basis covers the second
            checkpoint less well, which then does something that no feature here stands for. Where the features were
            fitted to these very texts in the first checkpoint, its residual is a little too low, as that of training
            tokens is against held-out ones (0.01 on SmolLM2, k = 100): a rise must exceed that to mean something.
        changes: all features, by falling ``|standardised|``.
    """

    layer: int
    n_tokens: int
    n_left_out: int
    n_texts: int
    n_equal: int
    first_residual: float
    second_residual: float
    residual_change: Interval
    changes: tuple[FeatureChange, ...]

    def significant(self, level: float = 0.05) -> list[FeatureChange]:
        """The changes whose ``q_value`` is below ``level``, however small they are."""
        return [change for change in self.changes if change.q_value < level]

    def changed(self, by: float, level: float = 0.05) -> list[FeatureChange]:
        """The significant changes of at least ``by`` standard deviations, up or down.

        Raises:
            ValueError: ``by`` is below 0 or no number.
        """
        if not by >= 0:
            raise ValueError(f"by: wanted 0 or more standard deviations, got {by}")
        return [change for change in self.significant(level) if abs(change.standardised) >= by]

    @property
    def median_size(self) -> float:
        """The median of ``|standardised|`` over all features."""
        return median(abs(change.standardised) for change in self.changes)


def compare(
    factors: snmf_kernels.Factorization,
    first: LanguageModel,
    second: LanguageModel,
    samples: Sequence[Sample],
    layer: int,
    *,
    described: int = 25,
    n_tokens: int = 5,
    confidence: float = 0.95,
    resamples: int = 1000,
    **options: Any,
) -> Difference:
    """Read the same texts with two checkpoints, and rank the features of one basis by how much their use changed.

    Args:
        factors: features of ``layer``, of activations of either checkpoint.
        first, second: the checkpoints; they must make the same tokens of the texts.
        samples: the texts.
        layer: the layer.
        described, n_tokens, confidence, resamples: see :func:`compare_stores`.
        options: of :func:`snmf_interp.collect`.

    Raises:
        ValueError: the tokens differ (the message names the first text), or the layers' widths.
    """
    for sample in samples:
        ids = first.encode(sample.text), second.encode(sample.text)
        check_tokens(sample.id, *ids, (first.name, second.name), second)
    one, two = (collect(model, samples, [layer], **options) for model in (first, second))
    return compare_stores(
        factors,
        one,
        two,
        second,
        layer,
        described=described,
        n_tokens=n_tokens,
        confidence=confidence,
        resamples=resamples,
    )


def compare_stores(
    factors: snmf_kernels.Factorization,
    first: ActivationStore,
    second: ActivationStore,
    model: LanguageModel,
    layer: int,
    *,
    described: int = 25,
    n_tokens: int = 5,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Difference:
    """The same for activations that are there already.

    Args:
        factors: features of ``layer``.
        first, second: activations of the same texts in the two checkpoints.
        model: either of them, to spell tokens.
        layer: the layer.
        described: how many of the most changed features are given tokens in context.
        n_tokens: how many tokens each.
        confidence: of the intervals.
        resamples: of the texts, for the intervals.

    Raises:
        ValueError: the stores are not of the same tokens, the widths differ, or there are fewer than two texts that
            are not equal.
    """
    _check_same_tokens(first.corpus, second.corpus)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: wanted a share between 0 and 1, got {confidence}")
    here, there = common_tokens(first.places(layer), second.places(layer))
    places = first.places(layer)[here]
    samples = first.samples(layer)[here]
    # Equal texts change alike: counted one by one they would pass for so much more evidence.
    text_of = first.corpus.groups[samples]
    texts, row_of = text_of.unique(return_inverse=True)
    if len(texts) < 2:
        raise ValueError(
            f"samples: wanted at least two texts that are not equal, with tokens that both keep, got {len(texts)}"
        )
    Z = as_double(factors.Z)
    norms = Z.norm(dim=0)
    sides = []
    for store, rows in ((first, here), (second, there)):
        activations = store.layer(layer)
        if activations.shape[1] != len(Z):
            raise ValueError(
                f"factors: wanted Z with {activations.shape[1]} rows for layer {layer}, got {len(Z)}"
            )
        sides.append(_Side.of(factors, activations[rows], row_of, len(texts)))
    contributions = [side.Y.double() * norms[:, None] for side in sides]
    means = [_text_means(values, row_of, len(texts)) for values in contributions]
    paired = (means[1] - means[0]).numpy()
    low, high = _bootstrap_mean(paired, confidence, resamples)
    p_values = _paired_test(paired)
    q_values = stats.false_discovery_control(p_values)
    spread = ((contributions[0].var(1) + contributions[1].var(1)) / 2).sqrt()
    difference = torch.from_numpy(paired.mean(1))
    standardised = torch.where(spread > 0, difference / spread.clamp_min(1e-300), 0.0)
    residual = _residual_change(sides, confidence, resamples)
    order = sorted(range(len(norms)), key=lambda i: (-abs(float(standardised[i])), i))
    changes = [
        FeatureChange(
            feature=i,
            first=float(means[0][i].mean()),
            second=float(means[1][i].mean()),
            difference=Interval(float(difference[i]), float(low[i]), float(high[i])),
            standardised=float(standardised[i]),
            p_value=float(p_values[i]),
            q_value=float(q_values[i]),
            correlation=_correlation(contributions[0][i], contributions[1][i]),
            tokens=_largest(
                contributions, i, places, text_of, first, model, n_tokens if rank < described else 0
            ),
        )
        for rank, i in enumerate(order)
    ]
    return Difference(
        layer=layer,
        n_tokens=len(places),
        n_left_out=len(first.places(layer)) + len(second.places(layer)) - 2 * len(places),
        n_texts=len(texts),
        n_equal=len(samples.unique()) - len(texts),
        first_residual=sides[0].relative_error,
        second_residual=sides[1].relative_error,
        residual_change=residual,
        changes=tuple(changes),
    )


def check_tokens(
    sample: str, first: Sequence[int], second: Sequence[int], names: tuple[str, str], model: LanguageModel
) -> None:
    """Raise ValueError where two checkpoints make different tokens of a text; ``model`` is the second."""
    if list(first) == list(second):
        return
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None:
        what = f"{len(first)} tokens in {names[0]!r} and {len(second)} in {names[1]!r}"
    else:
        what = f"token {place} is {first[place]} in {names[0]!r} and {second[place]} in {names[1]!r}"
        what += f" ({model.token_text(second[place])!r})"
    raise ValueError(
        f"the checkpoints make different tokens of text {sample!r}: {what}; only models with the same tokenizer and "
        "start token can be compared token by token"
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """One checkpoint on the basis: coefficients, and by text the squared norms of residual and activations."""

    Y: Tensor
    residual: Tensor
    total: Tensor

    @classmethod
    def of(
        cls, factors: snmf_kernels.Factorization, activations: Tensor, row_of: Tensor, n_texts: int
    ) -> _Side:
        Y = torch.as_tensor(factors.encode(activations.T, tol=_TOLERANCE).Y).cpu()
        Z = torch.as_tensor(factors.Z).cpu().to(Y.dtype)
        sums = torch.zeros(2, n_texts, dtype=torch.float64)
        for part, coefficients, rows in zip(
            activations.split(_TOKENS), Y.T.split(_TOKENS), row_of.split(_TOKENS), strict=True
        ):
            values = part.to(Y.dtype)
            for row, matrix in enumerate((values - coefficients @ Z.T, values)):
                sums[row].index_add_(0, rows, matrix.square().sum(1).double())
        return cls(Y, sums[0], sums[1])

    @property
    def relative_error(self) -> float:
        return float(self.residual.sum() / self.total.sum().clamp_min(torch.finfo(torch.float64).tiny))


def _check_same_tokens(first: Corpus, second: Corpus) -> None:
    if first.sample_ids != second.sample_ids:
        raise ValueError("second: wanted the texts of first, got others")
    for i, name in enumerate(first.sample_ids):
        if first.tokens_of(i) != second.tokens_of(i):
            raise ValueError(
                f"second: wanted the tokens of first, got others in text {name!r}; only models with the same "
                "tokenizer and start token can be compared token by token"
            )


def _text_means(values: Tensor, row_of: Tensor, n_texts: int) -> Tensor:
    """Mean over the tokens of each text, ``[k, n_texts]``, of ``[k, n]``."""
    sums = torch.zeros(len(values), n_texts, dtype=values.dtype).index_add_(1, row_of, values)
    return sums / torch.bincount(row_of, minlength=n_texts)


def _paired_test(paired: np.ndarray) -> np.ndarray:
    """p-values ``[k]`` of the means of ``[k, n_texts]`` against 0; 1 where nothing differs."""
    changed = paired.any(1)
    p_values = np.ones(len(paired))
    # The same difference in every text has no spread, and scipy warns of the division; its p-value, 0, is right.
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values[changed] = stats.ttest_1samp(paired[changed], 0, axis=1).pvalue
    return p_values


def _bootstrap_mean(paired: np.ndarray, confidence: float, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    interval = stats.bootstrap(
        (paired,),
        np.mean,
        axis=1,
        vectorized=True,
        n_resamples=resamples,
        batch=_RESAMPLES_AT_ONCE,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high


def _residual_change(sides: Sequence[_Side], confidence: float, resamples: int) -> Interval:
    def change(a: Any, b: Any, c: Any, d: Any, axis: int = -1) -> Any:
        return c.sum(axis) / d.sum(axis) - a.sum(axis) / b.sum(axis)

    sums = tuple(array.numpy() for side in sides for array in (side.residual, side.total))
    value = sides[1].relative_error - sides[0].relative_error
    interval = stats.bootstrap(
        sums,
        change,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high))


def _correlation(first: Tensor, second: Tensor) -> float:
    table = torch.stack([first, second])
    return float(torch.corrcoef(table)[0, 1]) if bool((table.var(1) > 0).all()) else float("nan")


def _largest(
    contributions: Sequence[Tensor],
    feature: int,
    places: Tensor,
    text_of: Tensor,
    store: ActivationStore,
    model: LanguageModel,
    count: int,
) -> tuple[TokenChange, ...]:
    """The tokens of largest change, at most one a text; none where nothing changed."""
    first, second = contributions[0][feature], contributions[1][feature]
    found: list[TokenChange] = []
    seen: set[int] = set()
    change = (second - first).abs()
    for column in change.argsort(descending=True, stable=True).tolist():
        if len(found) == count or not change[column]:
            break
        text = int(text_of[column])
        if text in seen:
            continue
        seen.add(text)
        stronger = contributions[int(second[column] > first[column])]
        strength = float(stronger[feature, column])
        share = strength / float(stronger[:, column].sum())
        token = token_in_context(model, store, int(places[column]), strength=strength, share=share)
        found.append(TokenChange(token, float(first[column]), float(second[column])))
    return tuple(found)
