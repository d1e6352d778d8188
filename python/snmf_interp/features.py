"""What a feature stands for: its tokens in context, logit-lens words, neurons, and share of the whole."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files
from .concepts import average_precision, text_scores

if TYPE_CHECKING:
    import snmf_kernels

    from .models import LanguageModel
    from .store import ActivationStore

# Of what a described feature says. 2: the logit lens has the gain of a norm behind the MLP.
_VERSION = 2
# Features per logit-lens product: bounds the table of [features, vocabulary].
_LENS_CHUNK = 64


@dataclass(frozen=True)
class TokenInContext:
    """A token on which a feature is strong.

    ``strength`` is the norm of the feature's contribution to the token's activations, ``y · ‖z‖``, which does
    not depend on how scale is divided between Z and Y; ``share`` is that divided by the sum over all features
    at this token. ``cut_before`` and ``cut_after`` say that the text goes on beyond the window.
    """

    before: str
    token: str
    after: str
    cut_before: bool
    cut_after: bool
    token_id: int
    sample: str
    position: int
    label: str | None
    strength: float
    share: float

    @property
    def word(self) -> str:
        """The whole word that the token is a piece of: ``Lisbon`` for ``bon``, ``1710`` for ``1``."""
        if not (self.token[:1].isalnum() or self.token[-1:].isalnum()):
            return self.token.strip()
        head = re.search(r"\w*$", self.before) if self.token[:1].isalnum() else None
        tail = re.match(r"\w*", self.after) if self.token[-1:].isalnum() else None
        return f"{head[0] if head else ''}{self.token.strip()}{tail[0] if tail else ''}"


@dataclass(frozen=True)
class _Words:
    """The logit-lens part of a feature."""

    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    distinctive: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Feature:
    """One column of Z with its row of Y, made readable.

    Attributes:
        layer, index: the feature's place.
        tokens: where it is strongest, strongest first.
        promoted, suppressed: top and bottom logit-lens tokens of the direction that the feature adds to the residual
            stream (:meth:`LanguageModel.output_weight`), with their logits.
        distinctive: the tokens whose logit stands out most among all features of the layer, with the number
            of standard deviations. Some tokens are promoted by nearly every direction; these are not. (On
            SmolLM2 layer 23, three seeds, 16, 14 and 10 of these words belong to their feature's concept, of
            ``promoted`` 9, 6 and 3; in layers 5 and 8 hardly any do in either list.)
        neurons: ``(neuron, weight)`` by falling |weight|, weights relative to ``‖z‖``.
        n_neurons: non-zero entries of z.
        n_active, active_share: tokens whose coefficient exceeds the stated threshold times the row's largest.
        energy: ``‖z‖²‖y‖²`` as a share of its sum over all features.
        distinct_tokens: distinct words among ``tokens``, as a share (case and surrounding space ignored).
        concept, concept_precision: the label that the feature ranks best and its average precision
            (:func:`snmf_interp.concepts.average_precision`); None and 0 without labels.
        clarity: how clearly it stands for one thing, 0 to 1: ``concept_precision`` when the texts have
            labels, else the share that the most frequent word has in the summed strength of ``tokens``.
    """

    layer: int
    index: int
    tokens: tuple[TokenInContext, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    distinctive: tuple[tuple[str, float], ...]
    neurons: tuple[tuple[int, float], ...]
    n_neurons: int
    n_active: int
    active_share: float
    energy: float
    distinct_tokens: float
    concept: str | None
    concept_precision: float
    clarity: float

    @property
    def words(self) -> list[tuple[str, int]]:
        """The whole words around :attr:`tokens` with their counts, by falling summed strength."""
        counts = Counter(token.word for token in self.tokens)
        strengths = dict.fromkeys(counts, 0.0)
        for token in self.tokens:
            strengths[token.word] += token.strength
        return [(word, counts[word]) for word in sorted(counts, key=lambda word: -strengths[word])]

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Feature:
        """The inverse of :func:`dataclasses.asdict` through JSON."""
        pairs = {
            name: tuple((a, b) for a, b in row[name])
            for name in ("promoted", "suppressed", "distinctive", "neurons")
        }
        return cls(**{**row, **pairs, "tokens": tuple(TokenInContext(**token) for token in row["tokens"])})


def describe(
    factors: snmf_kernels.Factorization,
    store: ActivationStore,
    model: LanguageModel,
    layer: int,
    *,
    indices: Iterable[int] | None = None,
    n_tokens: int = 25,
    window: int = 15,
    n_words: int = 10,
    n_neurons: int = 20,
    active_threshold: float = 0.1,
    one_per_text: bool = True,
) -> list[Feature]:
    """Describe features.

    Args:
        factors: of ``store.layer(layer).T``.
        store: the activations that were factorised.
        model: the model that they come from.
        layer: the layer.
        indices: which features; by default all.
        n_tokens: tokens in context per feature (25 in the paper).
        window: tokens of context on each side (15 in the paper).
        n_words: logit-lens tokens at each end.
        n_neurons: neurons listed per feature.
        active_threshold: a token counts as active above this share of the feature's largest coefficient.
        one_per_text: list at most one token of each text, so that one repetitive text cannot fill the list.

    Raises:
        ValueError: the factors do not belong to this layer of this store (their shapes differ), or an index
            is out of range.
    """
    Z, Y = torch.as_tensor(factors.Z).cpu().float(), torch.as_tensor(factors.Y).cpu().float()
    places = store.places(layer)
    if Z.shape[0] != model.d_mlp(layer) or Y.shape[1] != len(places):
        raise ValueError(
            f"factors: wanted Z with {model.d_mlp(layer)} rows and Y with {len(places)} columns for "
            f"layer {layer} of this store, got {list(Z.shape)} and {list(Y.shape)}; "
            f"fit store.layer({layer}).T again"
        )
    k = Z.shape[1]
    wanted = list(range(k)) if indices is None else list(indices)
    if outside := [i for i in wanted if not 0 <= i < k]:
        raise ValueError(f"indices: there are features 0-{k - 1}, got {outside[0]}")
    norms = Z.norm(dim=0)
    strength = Y * norms[:, None]
    everything = strength.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    energies = norms.double().square() * Y.double().square().sum(1)
    energies /= energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
    text_of = store.samples(layer)
    labels = store.corpus.labels
    names: list[str] = []
    precision = torch.zeros(k, 0)
    if any(label is not None for label in labels):
        names, precision = average_precision(text_scores(Y[wanted], text_of, len(labels)), labels)
    lens = _lens(model, layer, Z, wanted, n_words)
    features = []
    for row, index in enumerate(wanted):
        tokens = []
        for column in _strongest(strength[index], text_of, n_tokens, one_per_text):
            share = float(strength[index, column] / everything[column])
            tokens.append(
                token_in_context(
                    model,
                    store,
                    int(places[column]),
                    strength=float(strength[index, column]),
                    share=share,
                    window=window,
                )
            )
        weights, order = (
            (Z[:, index] / norms[index].clamp_min(1e-30)).abs().sort(descending=True, stable=True)
        )
        n_nonzero = int((weights > 0).sum())
        listed = order[: min(n_neurons, n_nonzero)]
        active = int((Y[index] > active_threshold * Y[index].max()).sum())
        concept, concept_precision = None, 0.0
        if names and tokens:
            best = int(precision[row].argmax())
            concept, concept_precision = names[best], float(precision[row, best])
        words = _word_strengths(tokens)
        features.append(
            Feature(
                layer=layer,
                index=index,
                tokens=tuple(tokens),
                promoted=lens[row].promoted,
                suppressed=lens[row].suppressed,
                distinctive=lens[row].distinctive,
                neurons=tuple((int(i), float(Z[i, index] / norms[index])) for i in listed),
                n_neurons=n_nonzero,
                n_active=active,
                active_share=active / Y.shape[1],
                energy=float(energies[index]),
                distinct_tokens=len(words) / len(tokens) if tokens else 0.0,
                concept=concept,
                concept_precision=concept_precision,
                clarity=concept_precision if names else max(words.values(), default=0.0),
            )
        )
    return features


def token_in_context(
    model: LanguageModel,
    store: ActivationStore,
    place: int,
    *,
    strength: float,
    share: float,
    window: int = 15,
) -> TokenInContext:
    """The token at a place of the store's corpus with ``window`` tokens of context on each side."""
    corpus = store.corpus
    before, token, after = corpus.context(place, window)
    left, middle, right = _split_text(model, [i for i in before if i not in model.special_ids], token, after)
    sample = int(corpus.sample_of[place])
    position = place - int(corpus.offsets[sample])
    end = int(corpus.offsets[sample + 1])
    return TokenInContext(
        before=left,
        token=middle,
        after=right,
        cut_before=position - len(before) > 0,
        cut_after=place + len(after) + 1 < end,
        token_id=token,
        sample=corpus.sample_ids[sample],
        position=position,
        label=corpus.labels[sample],
        strength=strength,
        share=share,
    )


class OutdatedFeaturesError(ValueError):
    """Features that another version described, which took other directions or counts for theirs."""


def write_features(path: Path, features: Sequence[Feature]) -> None:
    """Write one JSON object a line; the file appears when it is whole."""
    rows = ({"version": _VERSION, **asdict(feature)} for feature in features)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_features(path: Path) -> list[Feature]:
    """Read what :func:`write_features` wrote.

    Raises:
        OutdatedFeaturesError: another version wrote it; its features are to be described anew.
        ValueError: the file is damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        versions = {row.pop("version", 1) for row in rows}
        if versions - {_VERSION}:
            raise OutdatedFeaturesError(f"{path} has features of version {min(versions)}, not {_VERSION}")
        return [Feature.from_dict(row) for row in rows]
    except OutdatedFeaturesError:
        raise
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it written again") from error


def visible(text: str) -> str:
    """``text`` with line breaks, control characters and unusual spaces spelled out: it stays on its line."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character == " " or unicodedata.category(character) not in (
        "Cc",
        "Cf",
        "Co",
        "Cn",
        "Cs",
        "Zl",
        "Zp",
        "Zs",
    ):
        return character
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or f"\\u{ord(character):04x}"


def _strongest(strength: Tensor, text_of: Tensor, count: int, one_per_text: bool) -> list[int]:
    """Columns of the largest positive strengths, largest first, ties by lower column."""
    values, order = strength.sort(descending=True, stable=True)
    order = order[: int((values > 0).sum())]
    if not one_per_text:
        return order[:count].tolist()
    chosen: list[int] = []
    seen: set[int] = set()
    for column, text in zip(order.tolist(), text_of[order].tolist(), strict=True):
        if len(chosen) == count:
            break
        if text not in seen:
            seen.add(text)
            chosen.append(column)
    return chosen


def _split_text(
    model: LanguageModel, before: list[int], token: int, after: list[int]
) -> tuple[str, str, str]:
    """Text before, at and after a token.

    Decoding the whole and cutting it keeps the spaces and multi-byte characters that pieces decoded alone
    would lose. Where a character straddles the token, the pieces are shown one by one.
    """

    def decode(ids: list[int]) -> str:
        text: str = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    left, upto, whole = decode(before), decode([*before, token]), decode([*before, token, *after])
    if upto.startswith(left) and whole.startswith(upto) and "\ufffd" not in whole:
        return left, upto[len(left) :], whole[len(upto) :]
    return (
        "".join(map(model.token_text, before)),
        model.token_text(token),
        "".join(map(model.token_text, after)),
    )


def _lens(model: LanguageModel, layer: int, Z: Tensor, wanted: Sequence[int], count: int) -> list[_Words]:
    """Logit-lens tokens of the residual directions of the wanted columns of Z."""
    # Mean and spread of each token's logit over the features, for how unusual one feature's logit is.
    live = (Z != 0).any(0).nonzero().squeeze(1)
    total = squares = torch.zeros(())
    for part in live.split(_LENS_CHUNK):
        logits = _logits(model, layer, Z[:, part]).double()
        total, squares = total + logits.sum(0), squares + logits.square().sum(0)
    mean = total / max(len(live), 1)
    spread = (squares / max(len(live), 1) - mean.square()).clamp_min(0).sqrt()
    rows = []
    for part in torch.tensor(wanted, dtype=torch.long).split(_LENS_CHUNK):
        logits = _logits(model, layer, Z[:, part])
        count = min(count, logits.shape[1])
        for index, row in zip(part.tolist(), logits, strict=True):
            unusual = (row - mean) / spread.clamp_min(1e-6)
            rows.append(
                _Words(
                    promoted=_named(model, row.topk(count)),
                    suppressed=_named(model, row.topk(count, largest=False)),
                    # Two features differ from their mean by equal amounts: three say more.
                    distinctive=_named(model, unusual.topk(count)) if len(live) > 2 and index in live else (),
                )
            )
    return rows


def _logits(model: LanguageModel, layer: int, Z: Tensor) -> Tensor:
    """Logits ``[m, vocabulary]`` of the residual directions of the columns of Z, each scaled to unit length.

    The final norm drops the length anyway, but for its epsilon.
    """
    weight = model.output_weight(layer)
    unit = Z / Z.norm(dim=0).clamp_min(1e-30)
    with torch.inference_mode():
        return model.logit_lens((weight @ unit.to(weight.device, weight.dtype)).T).cpu()


def _named(model: LanguageModel, best: Any) -> tuple[tuple[str, float], ...]:
    """``(token, value)`` pairs of what topk returns."""
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return tuple((model.token_text(token), value) for value, token in pairs)


def _word_strengths(tokens: Sequence[TokenInContext]) -> dict[str, float]:
    """Each word's share of the summed strength, words compared without case and surrounding space."""
    total = sum(token.strength for token in tokens)
    words: dict[str, float] = {}
    for token in tokens:
        word = token.token.strip().casefold()
        words[word] = words.get(word, 0.0) + token.strength / total
    return words
