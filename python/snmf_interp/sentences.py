"""The paper's concept detection: a model writes sentences from a feature's label, and the feature must tell them.

    written = write_sentences(labels, llm)              # 5 that should activate each feature, 5 that should not
    result = detect_sentences(factors, model, layer, written)
    result.share_above_zero, result.interval, result.random_above_zero

Source: Shafran, Geiger & Geva (arXiv:2506.10920). A label that is wrong, sentences that miss it and a feature
that does not detect it all lower the score: it judges label and feature together. A score above 0 is uninformative
by itself: many random groups of neurons reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from scipy.stats import binomtest
from torch import Tensor

from . import prompts
from .activations import collect
from .answers import Request, ask_json
from .concepts import text_scores
from .dictionaries import features, random_groups
from .equal_texts import text_key
from .evaluation import concept_detection_score
from .texts import Sample

if TYPE_CHECKING:
    import snmf_kernels

    from .answers import ChatModel
    from .labels import Label
    from .models import LanguageModel

_LONGEST = 400


@dataclass(frozen=True)
class Sentences:
    """What a model wrote for a label; both tuples are empty, with the ``reason``, where it failed."""

    layer: int
    index: int
    label: str
    activating: tuple[str, ...]
    neutral: tuple[str, ...]
    reason: str | None = None
    raw: str | None = None


@dataclass(frozen=True, eq=False)
class SentenceDetection:
    """Whether features detect the sentences written from their labels.

    Attributes:
        index: the features, ``[m]`` int64.
        scores: their S_CD, ``[m]`` float64 (:func:`snmf_interp.evaluation.concept_detection_score`).
        share_above_zero: the share of features with S_CD above 0, NaN without features. A feature that is silent
            on all sentences has 0, and is not above it. Uninformative without ``random_above_zero`` beside it.
        interval: of that share, Wilson's, which takes features as independent; (NaN, NaN) without features.
        confidence: of the interval.
        missing: the share of labels for which no usable sentences came.
        random_above_zero: the share with S_CD above 0 where each feature is replaced by a random group of as many
            neurons (:func:`snmf_interp.dictionaries.random_groups`), scored by cosines; NaN without features.
    """

    index: Tensor
    scores: Tensor
    share_above_zero: float
    interval: tuple[float, float]
    confidence: float
    missing: float
    random_above_zero: float


def write_sentences(labels: Sequence[Label], llm: ChatModel, *, count: int = 5) -> list[Sentences]:
    """Have sentences written for every label that has a text (5 and 5 in the paper)."""
    if count < 1:
        raise ValueError(f"count: wanted at least 1, got {count}")
    named = [(label, label.text) for label in labels if label.text is not None]
    requests = [
        Request.of(
            prompts.SENTENCES.substitute(concept=prompts.quote(text), count=count),
            max_tokens=100 + 80 * count,
        )
        for _, text in named
    ]
    answers = ask_json(llm, requests, partial(parse_sentences, count=count))
    return [
        Sentences(label.layer, label.index, text, *(answer.value or ((), ())), answer.reason, answer.raw)
        for (label, text), answer in zip(named, answers, strict=True)
    ]


def parse_sentences(answer: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(activating, neutral)``, ``count`` different sentences each.

    Raises:
        ValueError: they are too few, empty, overlong, or the same. Of too many, the first are taken.
    """
    found = []
    for name in ("activating", "neutral"):
        texts = answer.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'wanted a list of strings as "{name}"')
        first = {text_key(text): " ".join(text.split()) for text in reversed(texts)}
        kept = tuple(first[key] for key in dict.fromkeys(map(text_key, texts)))[:count]
        if len(kept) < count or "" in kept or "…" in kept:
            raise ValueError(f'wanted {count} different sentences as "{name}"')
        if max(map(len, kept)) > _LONGEST:
            raise ValueError(f"wanted sentences of at most {_LONGEST} characters")
        found.append(kept)
    if set(map(text_key, found[0])) & set(map(text_key, found[1])):
        raise ValueError("wanted other sentences as neutral than as activating")
    return found[0], found[1]


def detect_sentences(
    factors: snmf_kernels.Factorization,
    model: LanguageModel,
    layer: int,
    sentences: Sequence[Sentences],
    *,
    scoring: Literal["encode", "cosine"] = "encode",
    eps: float = 1e-6,
    confidence: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
) -> SentenceDetection:
    """Run the model over the sentences and score each feature on its own.

    Args:
        factors: the layer's factorisation.
        model: the model that it is of.
        layer: the layer; sentences of other layers are left out.
        sentences: of :func:`write_sentences`.
        scoring: how much a token activates a feature. ``"encode"``: its coefficient, features competing for the
            token. ``"cosine"``: the similarity of its activations with the column of Z, as in the paper, cut at 0,
            both divided by the neuron scale of the fit. A sentence has that of its largest token.
        eps: see :func:`snmf_interp.evaluation.concept_detection_score`; in units of the scores.
        confidence: of the interval.
        batch_size: sentences per forward pass.
        seed: of the random groups.

    Raises:
        ValueError: no sentence is of this layer, a feature's index or the factors do not fit, or ``scoring`` is
            neither of the two.
    """
    if scoring not in ("encode", "cosine"):
        raise ValueError(f"scoring: wanted 'encode' or 'cosine', got {scoring!r}")
    ours = [entry for entry in sentences if entry.layer == layer]
    if not ours:
        raise ValueError(f"sentences: wanted some of layer {layer}, got none")
    Z = torch.as_tensor(factors.Z).cpu().float()
    if Z.shape[0] != model.d_mlp(layer):
        raise ValueError(
            f"factors: wanted Z with {model.d_mlp(layer)} rows for layer {layer}, got {Z.shape[0]}"
        )
    if outside := [entry.index for entry in ours if not 0 <= entry.index < Z.shape[1]]:
        raise ValueError(f"sentences: there are features 0-{Z.shape[1] - 1}, got {outside[0]}")
    written = [entry for entry in ours if entry.activating]
    missing = 1 - len(written) / len(ours)
    index = torch.tensor([entry.index for entry in written], dtype=torch.int64)
    if not written:
        nothing = torch.empty(0, dtype=torch.float64)
        return SentenceDetection(
            index, nothing, float("nan"), (float("nan"),) * 2, confidence, missing, float("nan")
        )
    texts = [text for entry in written for text in (*entry.activating, *entry.neutral)]
    store = collect(model, [Sample(str(i), text) for i, text in enumerate(texts)], layer,
                    batch_size=batch_size, progress=False)  # fmt: skip
    A = store.layer(layer).float().T
    text_of = store.samples(layer)
    if scoring == "encode":
        coefficients = torch.as_tensor(factors.encode(A).Y).cpu()
        by_text = text_scores(coefficients, text_of, len(texts))
    else:
        by_text = features(factors).scores(A.T, text_of, len(texts))
    values = _score(by_text, written, eps)
    chance = _score(random_groups(factors, seed=seed).scores(A.T, text_of, len(texts)), written, eps)
    above = int((values > 0).sum())
    interval = binomtest(above, len(values)).proportion_ci(confidence, method="wilson")
    return SentenceDetection(
        index,
        values,
        above / len(values),
        (float(interval.low), float(interval.high)),
        confidence,
        missing,
        float((chance > 0).double().mean()),
    )


def _score(by_text: Tensor, written: Sequence[Sentences], eps: float) -> Tensor:
    """S_CD of each entry's direction, ``[m]``, from scores ``[directions, texts]`` of all sentences in turn."""
    scores, first = [], 0
    for entry in written:
        middle = first + len(entry.activating)
        end = middle + len(entry.neutral)
        row = by_text[entry.index]
        scores.append(concept_detection_score(row[first:middle], row[middle:end], eps=eps))
        first = end
    return torch.stack(scores)
