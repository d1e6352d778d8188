"""What features are worth as detectors of labelled concepts, on texts that they were not fitted on.

    train = split_texts(labels, groups=store.corpus.groups)
    factors = snmf_kernels.fit(activations[train[text_of]].T, k=100, neuron_scale="rms")
    evaluate_features(factors, activations, text_of, labels, train).mean_auroc

A concept is matched to its best feature on the training texts and scored on the others, so that the choice
among many features is paid for. The number means something beside what the same choice finds elsewhere:
:func:`permuted_labels`, :func:`random_directions` and :func:`best_neurons` return the same :class:`Detection`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import rankdata
from torch import Tensor

from .concepts import text_scores
from .dictionaries import NeuronDictionary, random_groups

if TYPE_CHECKING:
    import snmf_kernels

# Neurons scored at once: bounds the copy of [tokens, neurons] and the ranks of [2 · neurons, texts].
_NEURONS = 256
# The ε of S_CD.
EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Detection:
    """How well concepts are detected: for each concept the feature that the training texts single out.

    All tensors are ``[n_concepts]``, in the order of ``names``.

    Attributes:
        names: the concepts that have texts in both halves, in alphabetical order.
        feature: the feature of highest AUROC on the training texts, the lowest index among equals.
        train_auroc: its AUROC there; as the largest of many it is too high, even without any signal.
        auroc: its AUROC on the held-out texts.
        probe_feature, probe_threshold: the one-sparse probe, "the score is above the threshold", of highest
            balanced accuracy on the training texts. A threshold lies halfway between neighbouring training
            scores; among equals the lowest feature, then the highest threshold. Infinite, so that nothing is
            detected, where no feature and threshold do better than 0.5.
        probe_train_accuracy: its balanced accuracy there, too high like ``train_auroc``.
        probe_accuracy: its balanced accuracy on the held-out texts: the mean of the shares of the concept's
            texts above the threshold and of other texts not above it.
    """

    names: tuple[str, ...]
    feature: Tensor
    train_auroc: Tensor
    auroc: Tensor
    probe_feature: Tensor
    probe_threshold: Tensor
    probe_train_accuracy: Tensor
    probe_accuracy: Tensor

    @property
    def mean_auroc(self) -> float:
        """Mean over concepts of the held-out AUROC; 0.5 without information."""
        return float(self.auroc.mean())

    @property
    def mean_probe_accuracy(self) -> float:
        """Mean over concepts of the held-out balanced accuracy; 0.5 without information."""
        return float(self.probe_accuracy.mean())

    def share_above(self, threshold: float = 0.95) -> float:
        """The share of concepts whose held-out AUROC exceeds ``threshold``."""
        return float((self.auroc > threshold).double().mean())


def split_texts(
    labels: Sequence[str | None],
    *,
    groups: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    fraction: float = 0.5,
) -> Tensor:
    """Divide texts into a training and a held-out part, label by label.

    Args:
        labels: the label of each text; those without one are divided like those of a label.
        groups: a number for each text, ``[n_texts]``; texts of one number stay on one side, as equal ones must:
            ``store.corpus.groups``, or :func:`snmf_interp.text_groups` of the texts. None: all are different.
        seed: of the division; no global generator is touched.
        fraction: the share of training texts. Of a label's m different texts ``fraction · m`` are training texts,
            rounded up or down at random, but with two or more at least one is on each side. A text that has several
            labels goes where the first of them has it, which may leave the others less choice.

    Returns:
        ``[n_texts]`` bool, True for training texts.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there are not as many groups as labels.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: wanted a number between 0 and 1, got {fraction}")
    group_of = list(range(len(labels))) if groups is None else torch.as_tensor(groups).tolist()
    if len(group_of) != len(labels):
        raise ValueError(f"groups: wanted a number for each of {len(labels)} texts, got {len(group_of)}")
    groups_of: dict[str | None, dict[int, None]] = {}
    for group, label in zip(group_of, labels, strict=True):
        groups_of.setdefault(label, {})[group] = None
    generator = torch.Generator().manual_seed(seed)
    side: dict[int, bool] = {}
    for own in map(list, groups_of.values()):
        # Rounding always to the same side would favour one half in every label of odd size.
        count = math.floor(fraction * len(own) + float(torch.rand((), generator=generator)))
        if len(own) > 1:
            count = min(max(count, 1), len(own) - 1)
        # Those that another label has put on a side already count there.
        free = [group for group in own if group not in side]
        count -= sum(side.get(group, False) for group in own)
        order = torch.randperm(len(free), generator=generator).tolist()
        side |= {free[place]: rank < count for rank, place in enumerate(order)}
    return torch.tensor([side[group] for group in group_of], dtype=torch.bool)


def auroc(scores: Tensor, labels: Sequence[str | None]) -> tuple[list[str], Tensor]:
    """Area under the ROC curve of each feature as a detector of each label.

    The probability that a text of the label scores higher than a labelled text of another, ties counting half
    (the Mann-Whitney statistic from midranks). 1 is perfect, 0.5 says nothing.

    Args:
        scores: ``[k, n_texts]``.
        labels: the label of each text; texts without one are left out.

    Returns:
        The labels in alphabetical order, and ``[k, n_labels]`` float64.

    Raises:
        ValueError: fewer than two labels, scores that are not finite, or shapes that do not fit.
    """
    known, names, member = _labelled(scores, labels)
    return names, _areas(known, member)


def detection(
    train_scores: Tensor,
    train_labels: Sequence[str | None],
    test_scores: Tensor,
    test_labels: Sequence[str | None],
) -> Detection:
    """Match features to concepts, and choose probes, on training texts; score them on held-out texts.

    The probe is k-sparse probing with k = 1 (Gurnee et al. 2023, "Finding Neurons in a Haystack",
    arXiv:2305.01610), with a threshold for the classifier; it says "the concept" above the threshold only.

    Args:
        train_scores: ``[k, n_train]``, one row a feature.
        train_labels: the label of each training text; texts without one are left out.
        test_scores: ``[k, n_test]``, the same features.
        test_labels: the label of each held-out text. Concepts are the labels that both halves have; texts of
            the others are among the "other texts" that a concept is told from.

    Returns:
        A :class:`Detection`.

    Raises:
        ValueError: a half with fewer than two labels, no label in both, scores that are not finite, or shapes
            that do not fit.
    """
    train, train_names, train_member = _labelled(train_scores, train_labels, "train_")
    test, test_names, test_member = _labelled(test_scores, test_labels, "test_")
    if len(train) == 0 or len(train) != len(test):
        raise ValueError(
            "test_scores: wanted as many features as train_scores and at least one, "
            f"got {len(test)} and {len(train)}"
        )
    names = sorted(set(train_names) & set(test_names))
    if not names:
        raise ValueError(f"test_labels: wanted a label that train_labels has too, got {_some(test_names)}")
    train_member = train_member[:, [train_names.index(name) for name in names]]
    test_member = test_member[:, [test_names.index(name) for name in names]]
    train_auroc, feature = _areas(train, train_member).max(0)
    probe_feature, threshold, train_accuracy = _probes(train, train_member)
    inside = test_member.T.bool()
    right = (test[probe_feature] > threshold[:, None]) == inside
    return Detection(
        names=tuple(names),
        feature=feature,
        train_auroc=train_auroc,
        auroc=_areas(test[feature], test_member).diagonal().clone(),
        probe_feature=probe_feature,
        probe_threshold=threshold,
        probe_train_accuracy=train_accuracy,
        probe_accuracy=(_share(right, inside) + _share(right, ~inside)) / 2,
    )


def evaluate_features(
    factors: snmf_kernels.Factorization,
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
) -> Detection:
    """What the features of a factorisation are worth as detectors: a text scores its largest coefficient.

    The coefficients of all texts, training texts too, come from ``factors.encode``: ``factors.Y`` is where the
    solver stopped, not the optimum on Z, and thresholds chosen on one would be applied to the other. This asks what
    the factorisation says of a text. ``snmf detect`` and ``snmf eval`` ask what its directions do beside those of other
    methods, which have no coefficients: there a text scores its largest cosine with a column of Z
    (:func:`snmf_interp.dictionaries.features`), as in the paper.

    Args:
        factors: a factorisation of ``activations[train[text_of]].T``.
        activations: of all texts, ``[n, d]``, tokens × neurons.
        text_of: which text each token belongs to, ``[n]`` int64.
        labels: the label of each text.
        train: which texts are training texts, ``[n_texts]`` bool; see :func:`split_texts`.

    Returns:
        A :class:`Detection`; its features are columns of ``factors.Z``.

    Raises:
        ValueError: the factors are not of the training tokens (their number differs), shapes that do not fit,
            or labels as for :func:`detection`.
    """
    _check(activations, text_of, labels, train, factors)
    # One call for both halves: the same number of sweeps for both.
    Y = torch.as_tensor(factors.encode(activations.T).Y).cpu()
    return halves(text_scores(Y, text_of, len(labels)), labels, train)


def permuted_labels(
    factors: snmf_kernels.Factorization,
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
    *,
    seed: int = 0,
) -> Detection:
    """The control for leaks: :func:`evaluate_features` after shuffling the labels within each half.

    Held-out values must be near 0.5, with a standard error of about ``sqrt(1 / (12 · m · n_concepts))`` for m
    held-out texts a concept; training values show what the choice among k features is worth by itself.

    Args, returns and errors are those of :func:`evaluate_features`; ``seed`` is that of the shuffle.
    """
    _check(activations, text_of, labels, train, factors)
    shuffled = shuffle_labels(labels, train, seed=seed)
    return evaluate_features(factors, activations, text_of, shuffled, train)


def shuffle_labels(labels: Sequence[str | None], train: Tensor, *, seed: int = 0) -> list[str | None]:
    """``labels`` in a random order within each half; texts without one keep none."""
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[str | None] = [None] * len(labels)
    for half in (train, ~train):
        known = [i for i in half.nonzero().squeeze(1).tolist() if labels[i] is not None]
        order = torch.randperm(len(known), generator=generator).tolist()
        for place, other in zip(known, order, strict=True):
            shuffled[place] = labels[known[other]]
    return shuffled


def random_directions(
    factors: snmf_kernels.Factorization,
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
    *,
    seed: int = 0,
) -> Detection:
    """The control for the features' content: as many random groups of as many neurons.

    See :func:`snmf_interp.dictionaries.random_groups`.

    Args, returns and errors are those of :func:`evaluate_features`; ``seed`` is that of the directions.
    """
    _check(activations, text_of, labels, train, factors)
    return halves(random_groups(factors, seed=seed).scores(activations, text_of, len(labels)), labels, train)


def best_neurons(
    activations: Tensor, text_of: Tensor, labels: Sequence[str | None], train: Tensor
) -> Detection:
    """The baseline without any factorisation: the best of all single neurons and their negatives.

    A text scores the largest value of ``±activation``, not cut at 0; without tokens it scores 0. There are
    2d detectors to choose from, against k features.

    Args and errors are those of :func:`evaluate_features`.

    Returns:
        A :class:`Detection`; feature ``2 i`` is neuron i, ``2 i + 1`` its negative.
    """
    _check(activations, text_of, labels, train)
    best = None
    for first in range(0, activations.shape[1], _NEURONS):
        part = activations[:, first : first + _NEURONS]
        scores = NeuronDictionary(part.shape[1]).scores(part, text_of, len(labels))
        found = halves(scores, labels, train)
        best = found if best is None else _better(best, found, 2 * first)
    assert best is not None  # _check wants a neuron
    return best


def concept_detection_score(activating: Tensor, neutral: Tensor, *, eps: float = EPS) -> Tensor:
    """The paper's score, ``S_CD = log((mean activating + eps) / (mean neutral + eps))``.

    Source: Shafran, Geiger & Geva (arXiv:2506.10920), where both are a feature's scores of sentences (the
    largest over tokens) that an LLM wrote to activate it and not to. eps is ours. Where a mean is near 0, as
    those of non-negative coefficients often are, it decides the value but not the sign: rather count values
    above 0, as the paper does, than average them. That count is uninformative without a control: random groups of
    neurons, chosen as features are, have a value above 0 for 58 to 85 % of the bundled concepts.

    Args:
        activating: scores of the activating texts, ``[..., m1]``.
        neutral: scores of the neutral texts, ``[..., m2]``.
        eps: added to both means, in the units of the scores.

    Returns:
        ``[...]`` float64, natural logarithm.

    Raises:
        ValueError: no scores, scores that are not finite, a negative mean, shapes that do not fit, or
            ``eps`` that is not above 0.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: wanted a number above 0, got {eps}")
    for name, scores in (("activating", activating), ("neutral", neutral)):
        if scores.ndim == 0 or scores.shape[-1] == 0:
            raise ValueError(f"{name}: wanted at least one score, [..., m], got shape {list(scores.shape)}")
    if activating.shape[:-1] != neutral.shape[:-1]:
        raise ValueError(f"neutral: wanted shape {[*activating.shape[:-1], 'm2']}, got {list(neutral.shape)}")
    means = {"activating": activating.double().mean(-1), "neutral": neutral.double().mean(-1)}
    for name, mean in means.items():
        if not bool(((mean >= 0) & mean.isfinite()).all()):
            raise ValueError(
                f"{name}: wanted finite scores with a mean of at least 0, got means down to {float(mean.min()):.3g}; "
                "cut signed similarities at 0 first"
            )
    return ((means["activating"] + eps) / (means["neutral"] + eps)).log()


def _check(
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
    factors: snmf_kernels.Factorization | None = None,
) -> None:
    if activations.ndim != 2 or 0 in activations.shape:
        raise ValueError(
            f"activations: wanted [n, d], tokens × neurons, neither of them 0, got {list(activations.shape)}"
        )
    if not all(bool(extreme.isfinite()) for extreme in activations.aminmax()):
        raise ValueError("activations: wanted finite numbers, got inf or nan; collect them in float32")
    n, d = activations.shape
    if text_of.shape != (n,) or text_of.dtype != torch.int64:
        raise ValueError(
            f"text_of: wanted an int64 text number for each of the {n} rows of activations, "
            f"got {text_of.dtype} {list(text_of.shape)}"
        )
    if int(text_of.min()) < 0 or int(text_of.max()) >= len(labels):
        raise ValueError(
            f"text_of: wanted numbers of the {len(labels)} texts that have an entry in labels, "
            f"got {int(text_of.min())} to {int(text_of.max())}"
        )
    if train.shape != (len(labels),) or train.dtype != torch.bool:
        raise ValueError(
            f"train: wanted a bool for each of the {len(labels)} texts, got {train.dtype} {list(train.shape)}"
        )
    if factors is None:
        return
    if factors.Z.shape[0] != d:
        raise ValueError(
            f"activations: wanted {factors.Z.shape[0]} columns (neurons), as factors.Z has rows, got {d}"
        )
    wanted = int(train[text_of].sum())
    if factors.Y.shape[1] != wanted:
        raise ValueError(
            f"factors: wanted Y with {wanted} columns, one for each token of the training texts, got "
            f"{factors.Y.shape[1]}; fit activations[train[text_of]].T"
        )


def halves(scores: Tensor, labels: Sequence[str | None], train: Tensor) -> Detection:
    """:func:`detection` of the scores of all texts, ``[k, n_texts]``."""
    ours = [label for label, chosen in zip(labels, train.tolist(), strict=True) if chosen]
    theirs = [label for label, chosen in zip(labels, train.tolist(), strict=True) if not chosen]
    return detection(scores[:, train], ours, scores[:, ~train], theirs)


def _better(one: Detection, two: Detection, shift: int) -> Detection:
    """For each concept the better on training texts, ``one`` among equals; features of ``two`` count from shift."""
    match = two.train_auroc > one.train_auroc
    probe = two.probe_train_accuracy > one.probe_train_accuracy
    return Detection(
        names=one.names,
        feature=torch.where(match, two.feature + shift, one.feature),
        train_auroc=torch.where(match, two.train_auroc, one.train_auroc),
        auroc=torch.where(match, two.auroc, one.auroc),
        probe_feature=torch.where(probe, two.probe_feature + shift, one.probe_feature),
        probe_threshold=torch.where(probe, two.probe_threshold, one.probe_threshold),
        probe_train_accuracy=torch.where(probe, two.probe_train_accuracy, one.probe_train_accuracy),
        probe_accuracy=torch.where(probe, two.probe_accuracy, one.probe_accuracy),
    )


def _labelled(
    scores: Tensor, labels: Sequence[str | None], half: str = ""
) -> tuple[Tensor, list[str], Tensor]:
    """Scores of the labelled texts ``[k, m]``, the labels, and who has which, ``[m, n_labels]``; float64."""
    if scores.ndim != 2 or scores.shape[1] != len(labels):
        raise ValueError(
            f"{half}scores: wanted [k, {len(labels)}], a column for each entry of {half}labels, "
            f"got {list(scores.shape)}"
        )
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise ValueError(f"{half}labels: wanted texts of at least two labels, got {_some(names)}")
    known = scores[:, torch.tensor([label is not None for label in labels])].cpu().double()
    if not bool(known.isfinite().all()):
        feature = int((~known.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{half}scores: wanted finite numbers, got inf or nan in row {feature}")
    number = {name: i for i, name in enumerate(names)}
    label_of = torch.tensor([number[label] for label in labels if label is not None])
    return known, names, torch.nn.functional.one_hot(label_of, len(names)).double()


def _areas(scores: Tensor, member: Tensor) -> Tensor:
    """AUROC ``[k, n_labels]`` from midranks; sums of half-integers, so equal areas are equal bits."""
    ranks = torch.from_numpy(rankdata(scores.numpy(), axis=1))
    inside = member.sum(0)
    return (ranks @ member - inside * (inside + 1) / 2) / (inside * (len(member) - inside))


def _probes(scores: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feature, threshold and balanced accuracy of each label's best probe."""
    # A best threshold lies just below a text of the label: only those are looked at. For each, the texts that
    # score as high or higher, of all labels and of its own.
    reached = torch.from_numpy(rankdata(-scores.numpy(), "max", axis=1))
    features, thresholds, accuracies = [], [], []
    for inside in member.T.bool():
        hits = torch.from_numpy(rankdata(-scores[:, inside].numpy(), "max", axis=1))
        n_inside, n_outside = int(inside.sum()), int((~inside).sum())
        # (true minus false positive rate) · n_inside · n_outside: integers, so that equals compare equal.
        gain = hits * n_outside - (reached[:, inside] - hits) * n_inside
        feature = int(gain.amax(1).argmax())
        most = int(gain[feature].max())
        features.append(feature)
        accuracies.append((1 + most / (n_inside * n_outside)) / 2)
        # Below all of the label's texts nothing is lost, so it is never negative.
        if most == 0:
            thresholds.append(math.inf)
            continue
        row = scores[feature]
        above = float(row[inside][gain[feature] == most].max())
        # There is a lower score: a threshold below all texts would gain nothing.
        below = float(row[row < above].max())
        middle = above / 2 + below / 2
        # Between neighbouring floats the middle may round to the upper one.
        thresholds.append(middle if middle < above else below)
    return (
        torch.tensor(features),
        torch.tensor(thresholds, dtype=torch.float64),
        torch.tensor(accuracies, dtype=torch.float64),
    )


def _share(right: Tensor, among: Tensor) -> Tensor:
    """The share of True ``among`` the marked, by row."""
    return (right & among).sum(1).double() / among.sum(1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "") if names else "none"
