"""What a feature stands for: its tokens in context, logit-lens words, neurons, and share of the whole."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor

from . import decoding, files
from .concepts import average_precision, chance_precision, text_scores
from .dictionaries import random_group_vectors
from .effects import AGREES, WordEffects, lens_logits
from .words import Word, context_words, corpus_words, is_function_word

if TYPE_CHECKING:
    import snmf_kernels

    from .labels import Label
    from .models import LanguageModel
    from .store import ActivationStore

# Of what a described feature says. 2: the logit lens has the gain of a norm behind the MLP. 3: concepts above chance
# alone, tokens with a coefficient and strong ones apart, promoted words above those of random groups.
_VERSION = 3
# Random groups whose logit-lens words say what any direction promotes.
_N_RANDOM = 64
# A token is strong above this share of the feature's largest coefficient.
STRONG = 0.1
# Words of a name; the share of its tokens from which two function words are what a feature is of.
_NAME, _MOSTLY = 5, 0.6
# Who names a feature that no language model has named.
WORDS = "words"
# Content words that a clear feature has, and the standard deviations by which they stand out where clarity is a half:
# what makes a label by words clear.
_CONTENT_WORDS, _HALF_CLEAR = 3, 3.5
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
        """The whole word that the token is a piece of: ``Lisbon`` for ``bon``, ``1710`` for ``1``.

        A lone space, which some tokenizers cut off a number, stands for the word behind it.
        """
        # Of regex, for which vowel signs are a part of the word, as they are in Hindi or Thai.
        blank = not self.token.strip(" ")
        head = "" if blank or not regex.match(r"\w", self.token) else regex.search(r"\w*$", self.before)[0]
        tail = regex.match(r"\w*", self.after)[0] if blank or regex.search(r"\w$", self.token) else ""
        return f"{head}{self.token.strip()}{tail}"


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
        promoted, suppressed: by the logit lens, the tokens that the direction which the feature adds to the residual
            stream (:meth:`LanguageModel.output_weight`) makes likelier or less likely than random groups of as many
            neurons do, with the number of standard deviations.
        distinctive: by the logit lens, the tokens whose logit stands out most among all features of the layer,
            likewise.
        neurons: ``(neuron, weight)`` by falling |weight|, weights relative to ``‖z‖``.
        n_neurons: non-zero entries of z.
        n_firing, firing_share: tokens on which it fires: those with a coefficient above 0.
        n_strong, strong_share: tokens on which it is strong: above a tenth of its largest coefficient.
        energy: ``‖z‖²‖y‖²`` as a share of its sum over all features.
        distinct_tokens: distinct words among ``tokens``, as a share (case and surrounding space ignored).
        name: what it is called: a label by a language model where there is one, else the words that set its contexts
            apart from the corpus.
        named_by: ``"words"``, or the language model.
        concept, concept_precision: the label that the feature ranks best and its average precision
            (:func:`snmf_interp.concepts.average_precision`), on the texts that the fit saw; None and 0 where that is
            not above ``chance_precision``, or without labels.
        chance_precision: what the best of all features of the layer reaches with shuffled labels
            (:func:`snmf_interp.concepts.chance_precision`); 0 without labels.
        word_clarity: how clearly its words stand for one thing, 0 to 1, by words alone: z / (z + 3.5), z being the mean
            log-odds of the three content words that set its contexts apart most from the corpus (function words and
            marks count nothing, and so does a second or third word that is not there).
        clarity: what features are ordered by: ``concept_precision`` where any feature of the layer has a concept, else
            ``word_clarity``.
        effects: what it does to the next word, measured; None where that has not been done (see
            :meth:`snmf_interp.Run.effects`).
        lens_agreement: the median rank correlation of the logit lens with the effects that were measured in the layer;
            None where none was.
    """

    layer: int
    index: int
    tokens: tuple[TokenInContext, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    distinctive: tuple[tuple[str, float], ...]
    neurons: tuple[tuple[int, float], ...]
    n_neurons: int
    n_firing: int
    firing_share: float
    n_strong: int
    strong_share: float
    energy: float
    distinct_tokens: float
    name: str
    named_by: str
    concept: str | None
    concept_precision: float
    chance_precision: float
    word_clarity: float
    clarity: float
    effects: WordEffects | None = None
    lens_agreement: float | None = None

    @property
    def lens_holds(self) -> bool:
        """Whether the logit lens agrees with measured effects in this layer, as far as that is known."""
        return self.lens_agreement is None or self.lens_agreement >= AGREES

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
        tokens = tuple(TokenInContext(**token) for token in row["tokens"])
        effects = row.get("effects")
        return cls(
            **{**row, **pairs, "tokens": tokens, "effects": effects and WordEffects.from_dict(effects)}
        )


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
    one_per_text: bool = True,
    corpus: Mapping[str, float] | None = None,
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
        one_per_text: list at most one token of each text, so that one repetitive text cannot fill the list.
        corpus: counts of the corpus's words (:func:`snmf_interp.words.corpus_words`), by default counted now.

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
    precision, chance = torch.zeros(k, 0), 0.0
    if any(label is not None for label in labels):
        scores = text_scores(Y, text_of, len(labels))
        names, precision = average_precision(scores, labels)
        chance = chance_precision(scores, labels)
    has_concepts = bool((precision > chance).any())
    counts = corpus_words(store, model) if corpus is None else corpus
    lens = _lens(model, layer, factors, wanted, n_words)
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
        firing = int((Y[index] > 0).sum())
        strong = int((Y[index] > STRONG * Y[index].max()).sum())
        concept, concept_precision = None, 0.0
        if has_concepts and tokens and float(precision[index].max()) > chance:
            best = int(precision[index].argmax())
            concept, concept_precision = names[best], float(precision[index, best])
        standing_out = context_words(tokens, counts)
        word_clarity = _word_clarity(standing_out)
        words = {token.token.strip().casefold() for token in tokens}
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
                n_firing=firing,
                firing_share=firing / Y.shape[1],
                n_strong=strong,
                strong_share=strong / Y.shape[1],
                energy=float(energies[index]),
                distinct_tokens=len(words) / len(tokens) if tokens else 0.0,
                name=_name(tokens, standing_out),
                named_by=WORDS,
                concept=concept,
                concept_precision=concept_precision,
                chance_precision=chance,
                word_clarity=word_clarity,
                clarity=concept_precision if has_concepts else word_clarity,
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
    left, middle, right = decoding.split_text(
        model.tokenizer, [i for i in before if i not in model.special_ids], token, after
    )
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
    """Write one JSON object a line, without measured effects; the file appears when it is whole."""
    measured = ("effects", "lens_agreement")
    rows = (
        {"version": _VERSION}
        | {name: value for name, value in asdict(feature).items() if name not in measured}
        for feature in features
    )
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
    """``text`` with line breaks, control characters and unusual spaces spelled out: it stays on its line.

    What joins or parts letters, as within Persian words and emoji, stays as it is.
    """
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in " \u200c\u200d" or unicodedata.category(character) not in (
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


def _lens(
    model: LanguageModel, layer: int, factors: snmf_kernels.Factorization, wanted: Sequence[int], count: int
) -> list[_Words]:
    """Logit-lens tokens of the residual directions of the wanted columns of Z."""
    Z = torch.as_tensor(factors.Z).cpu().float()
    live = (Z != 0).any(0).nonzero().squeeze(1)
    if not len(live):
        return [_Words((), (), ())] * len(wanted)
    # How unusual a feature's logit of a token is: among the features, and among random groups.
    others = _mean_and_spread(model, layer, Z[:, live])
    random = _mean_and_spread(model, layer, random_group_vectors(factors, _N_RANDOM).T)
    rows = []
    for part in torch.tensor(wanted, dtype=torch.long).split(_LENS_CHUNK):
        logits = lens_logits(model, layer, Z[:, part])
        count = min(count, logits.shape[1])
        for index, row in zip(part.tolist(), logits, strict=True):
            if index not in live:
                rows.append(_Words((), (), ()))
                continue
            above_random = (row - random[0]) / random[1]
            unusual = (row - others[0]) / others[1]
            rows.append(
                _Words(
                    promoted=_named(model, above_random.topk(count)),
                    suppressed=_named(model, above_random.topk(count, largest=False)),
                    # Two features differ from their mean by equal amounts: three say more.
                    distinctive=_named(model, unusual.topk(count)) if len(live) > 2 else (),
                )
            )
    return rows


def _mean_and_spread(model: LanguageModel, layer: int, Z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each token's lens logit over the columns of Z, ``[vocabulary]`` float64."""
    total = squares = torch.zeros(())
    for part in Z.split(_LENS_CHUNK, 1):
        logits = lens_logits(model, layer, part).double()
        total, squares = total + logits.sum(0), squares + logits.square().sum(0)
    mean = total / max(Z.shape[1], 1)
    return mean, (squares / max(Z.shape[1], 1) - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6)


def _named(model: LanguageModel, best: Any) -> tuple[tuple[str, float], ...]:
    """``(token, value)`` pairs of what topk returns."""
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return tuple((model.token_text(token), value) for value, token in pairs)


def _word_clarity(standing_out: Sequence[Word]) -> float:
    """See :attr:`Feature.word_clarity`."""
    content = [word.z for word in standing_out if not is_function_word(word.text)]
    z = sum(sorted(content, reverse=True)[:_CONTENT_WORDS]) / _CONTENT_WORDS
    return z / (z + _HALF_CLEAR)


def _name(tokens: Sequence[TokenInContext], standing_out: Sequence[Word]) -> str:
    """The content words that stand out; or the tokens as such, of a feature of one or two function words or marks."""
    words = Counter(token.word.casefold() for token in tokens)
    common = [word for word, _ in words.most_common(2) if is_function_word(word)]
    if tokens and sum(words[word] for word in common) > _MOSTLY * len(tokens):
        return _as_tokens(common)
    chosen = [word.text for word in standing_out if not is_function_word(word.text)]
    if not chosen:
        plain = dict.fromkeys(token.word for token in tokens)
        chosen = [word for word in plain if word and not is_function_word(word)]
    return ", ".join(chosen[:_NAME]) if chosen else _as_tokens(list(words)[:_NAME])


def _as_tokens(words: Sequence[str]) -> str:
    return " ".join(f"‹{word or '␣'}›" for word in words)


def with_effects(features: Sequence[Feature], named: Mapping[int, WordEffects]) -> list[Feature]:
    """The features of a layer with what was measured of them, and with how far that agrees with the logit lens."""
    agreement = median_low(words.lens_correlation for words in named.values()) if named else None
    return [
        replace(feature, effects=named.get(feature.index), lens_agreement=agreement) for feature in features
    ]


def by_clarity(feature: Feature) -> tuple[float, float, int]:
    """Sorts features by falling clarity, those of equal clarity by their words, then by index."""
    return -feature.clarity, -feature.word_clarity, feature.index


def with_names(features: Sequence[Feature], labels: Iterable[Label]) -> list[Feature]:
    """The features under the names that language models gave them.

    Args:
        features: of one layer.
        labels: of that layer, of any sources; the first source that names what a feature fires on is taken.
    """
    named: dict[int, tuple[str, str]] = {}
    for label in labels:
        if label.side == "input" and label.text is not None and label.clear and label.source != WORDS:
            named.setdefault(label.index, (label.text, label.source))
    found = []
    for feature in features:
        name, source = named.get(feature.index, (feature.name, feature.named_by))
        found.append(replace(feature, name=name, named_by=source))
    return found


def mean_active(factors: snmf_kernels.Factorization) -> float:
    """L0: how many features fire on a token on average, those with a coefficient above 0."""
    return float((torch.as_tensor(factors.Y) > 0).sum(0).double().mean())
