"""What a report page holds, as JSON values: the features of a run's layers, cut to what is shown.

One object per layer::

    {"layer": 8, "width": 1536, "tokens": 14760, "mean_active": 82.1, "chance_precision": 0.2, "lens_agreement": 0.1,
     "neurons_cut": "", "features": […], "overlap": {…}, "tree": null}

and in it one per feature: the fields of :class:`snmf_interp.Feature` that the page shows, its labels, the histogram of
its strengths, and its contexts, each as a list of token texts with ``at`` (which of them is the token), and ``shade``:
for each token a hexadecimal digit, 15 times its strength over the feature's largest, or ``-`` for a token that is not
among the factorised ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .features import mean_active
from .trees import VERSION as TREE_VERSION

if TYPE_CHECKING:
    import snmf_kernels

    from .effects import WordEffects
    from .features import Feature, TokenInContext
    from .labels import Label
    from .store import ActivationStore

# Tokens of context on each side: as many as describe() keeps by default.
_WINDOW = 15
_BINS = 30
# Per feature, and features in one heat map: k² pairs of more would be most of the page.
_NEURONS, _HEAT = 100, 600
# Characters of a reason why a label is missing.
_REASON = 200


@dataclass(frozen=True)
class _Strengths:
    """Strengths ``y · ‖z‖`` of a layer's features, ``values [k, n]``, and the row of each token of the corpus.

    ``row_of [T]`` is −1 for tokens that were not factorised.
    """

    values: np.ndarray
    row_of: np.ndarray

    @classmethod
    def of(cls, factors: snmf_kernels.Factorization, store: ActivationStore, layer: int) -> _Strengths:
        Z, Y = torch.as_tensor(factors.Z).cpu().float(), torch.as_tensor(factors.Y).cpu().float()
        places = store.places(layer).numpy()
        row_of = np.full(len(store.corpus.ids), -1, dtype=np.int64)
        row_of[places] = np.arange(len(places))
        return cls((Y * Z.norm(dim=0)[:, None]).numpy(), row_of)


def layer_data(
    layer: int,
    features: Sequence[Feature],
    factors: snmf_kernels.Factorization,
    store: ActivationStore,
    texts: Mapping[int, str],
    labels: Iterable[Label] = (),
    tree: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One layer of the page.

    Args:
        layer: the layer.
        features: all of it, as :func:`snmf_interp.describe` returns them.
        factors: that they describe.
        store: the activations that were factorised.
        texts: of the corpus's tokens by id, without special tokens.
        labels: of any source.
        tree: what ``Tree.to_json`` of a hierarchy of this layer gives, if there is one.

    Raises:
        ValueError: the features are not those of the factors.
    """
    Z = torch.as_tensor(factors.Z).cpu().float()
    if len(features) != Z.shape[1]:
        raise ValueError(
            f"features: wanted all {Z.shape[1]} of layer {layer}, got {len(features)}; describe them again"
        )
    strengths = _Strengths.of(factors, store, layer)
    sample_of = {name: i for i, name in enumerate(store.corpus.sample_ids)}
    named: dict[int, list[Label]] = {}
    for label in labels:
        named.setdefault(label.index, []).append(label)
    dead = {int(i) for i in factors.dead_features}
    rows = []
    for feature in features:
        positive = strengths.values[feature.index]
        positive = positive[positive > 0]
        largest = float(positive.max(initial=0.0))
        bins = np.histogram(positive, _BINS, (0, largest))[0] if largest else np.zeros(0, dtype=int)
        rows.append(
            {
                "index": feature.index,
                "name": feature.name,
                "named_by": feature.named_by,
                "clarity": _short(feature.clarity),
                "word_clarity": _short(feature.word_clarity),
                "concept": feature.concept,
                "precision": _short(feature.concept_precision),
                "energy": _short(feature.energy),
                "firing": feature.n_firing,
                "firing_share": _short(feature.firing_share),
                "strong": feature.n_strong,
                "strong_share": _short(feature.strong_share),
                "n_neurons": feature.n_neurons,
                "distinct": _short(feature.distinct_tokens),
                "dead": feature.index in dead or not feature.tokens,
                "words": feature.words[:12],
                "effects": _effects(feature.effects),
                "lens": _lens(feature),
                "neurons": _neurons(Z[:, feature.index]),
                "strengths": {
                    "max": _short(largest),
                    "positive": len(positive),
                    "counts": bins.tolist(),
                },
                "labels": [
                    {
                        "side": label.side,
                        "source": label.source,
                        "text": label.text,
                        "clear": label.clear,
                        "reason": label.reason and label.reason[:_REASON],
                    }
                    for label in named.get(feature.index, [])
                ],
                "contexts": [
                    _context(token, strengths, feature.index, largest, store, sample_of, texts)
                    for token in feature.tokens
                ],
            }
        )
    cut = max(int((Z != 0).sum(0).max()) - _NEURONS, 0)
    return {
        "layer": layer,
        "width": Z.shape[0],
        "tokens": strengths.values.shape[1],
        "mean_active": _short(mean_active(factors)),
        "chance_precision": _short(features[0].chance_precision),
        "lens_agreement": features[0].lens_agreement,
        "neurons_cut": f"Of each feature its {_NEURONS} strongest neurons are in this page." if cut else "",
        "features": rows,
        "overlap": _overlap(Z, [feature.energy for feature in features]),
        "tree": tree,
    }


def steering_data(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ``snmf steer --json`` printed, for features: per prompt the texts, each under its setting.

    Raises:
        ValueError: a record is not such a one.
    """
    rows = []
    for record in records:
        try:
            if record["feature"] is None:
                continue
            settings = [("unsteered", record["unsteered"])]
            settings += [(_setting(one), one["continuations"]) for one in record["steered"]]
            prompts: dict[str, list[dict[str, str]]] = {}
            for name, texts in settings:
                for text in texts:
                    row = {"setting": name, "text": str(text["text"])}
                    prompts.setdefault(str(text["prompt"]), []).append(row)
            rows.append(
                {
                    "layer": int(record["layer"]),
                    "feature": int(record["feature"]),
                    "prompts": [{"prompt": prompt, "texts": texts} for prompt, texts in prompts.items()],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"steering: wanted what `snmf steer DIR --feature N --json` prints, got a record in which {error!r}"
            ) from error
    return rows


def check_tree(tree: Mapping[str, Any]) -> None:
    """Whether this is what ``Tree.to_json`` gives: nodes, and links between them that form no circle.

    Raises:
        ValueError: it is not.
    """
    wanted = "hierarchy: wanted the JSON that `snmf tree DIR --export FILE.json` writes"
    try:
        levels = {node["id"]: node["level"] for node in tree["nodes"]}
        used = [*tree["roots"], *(link[end] for link in tree["links"] for end in ("parent", "child"))]
        if unknown := [name for name in used if name not in levels]:
            raise ValueError(f"{wanted}; it names a node {unknown[0]!r} that it does not have")
        if any(levels[link["child"]] >= levels[link["parent"]] for link in tree["links"]):
            raise ValueError(f"{wanted}; in it a child stands above its parent")
        missing = [name for name in ("sizes", "threshold", "most") if name not in tree]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{wanted}; got something in which {error!r}") from error
    if missing:
        raise ValueError(f"{wanted}; it has no {missing[0]!r}")
    if tree.get("version") != TREE_VERSION:
        raise ValueError(
            f"{wanted}; this one is of version {tree.get('version')}, not {TREE_VERSION}: write it again"
        )


def _context(
    token: TokenInContext,
    strengths: _Strengths,
    index: int,
    largest: float,
    store: ActivationStore,
    sample_of: Mapping[str, int],
    texts: Mapping[int, str],
) -> dict[str, Any]:
    """A token in its context, every token with its own shade where the pieces give the text again.

    They do not where a character is divided between tokens, or the features were described with another window:
    then the text stands before and after the token as it was described.
    """
    corpus = store.corpus
    place = int(corpus.offsets[sample_of[token.sample]]) + token.position
    before, _, after = corpus.context(place, _WINDOW)
    places = range(place - len(before), place + len(after) + 1)
    kept = [(p, texts[int(corpus.ids[p])]) for p in places if int(corpus.ids[p]) in texts]
    at = next((i for i, (p, _) in enumerate(kept) if p == place), 0)
    pieces = _aligned(token.before + token.token + token.after, [text for _, text in kept])
    if pieces and ("".join(pieces[:at]), pieces[at]) == (token.before, token.token):
        rows = strengths.row_of[[p for p, _ in kept]]
        own = np.where(rows >= 0, strengths.values[index, rows], 0)
        levels = np.rint(15 * own / max(largest, 1e-30)).astype(int)
        shade = "".join("-" if row < 0 else f"{level:x}" for row, level in zip(rows, levels, strict=True))
    else:
        pieces, at = [token.before, token.token, token.after], 1
        shade = f"0{round(15 * min(token.strength / max(largest, 1e-30), 1)):x}0"
    return {
        "pieces": pieces,
        "at": at,
        "shade": shade,
        "cut_before": token.cut_before,
        "cut_after": token.cut_after,
        "sample": token.sample,
        "position": token.position,
        "label": token.label,
        "strength": _short(token.strength),
        "share": _short(token.share),
    }


def _aligned(text: str, pieces: Sequence[str]) -> list[str]:
    """``text`` cut into as many parts as there are pieces; empty where they do not spell it.

    A piece's own text may differ from its part by the space around it: decoders add some between words, or take the
    first away.
    """
    parts = []
    at = 0
    for piece in pieces:
        end = at + len(piece)
        if not text.startswith(piece, at):
            bare = piece.strip(" ")
            start = len(text) - len(text[at:].lstrip(" "))
            if not bare or not text.startswith(bare, start):
                return []
            end = start + len(bare)
        parts.append(text[at:end])
        at = end
    return parts if at == len(text) else []


def _neurons(z: Tensor) -> list[list[float]]:
    """``[neuron, weight]`` by falling |weight|, weights relative to ‖z‖, ties by lower neuron."""
    weights = z / z.norm().clamp_min(1e-30)
    order = weights.abs().sort(descending=True, stable=True).indices[:_NEURONS]
    return [[int(i), _short(float(weights[i]))] for i in order if weights[i] != 0]


def _overlap(Z: Tensor, energies: Sequence[float]) -> dict[str, Any]:
    """Neurons that pairs of features share: their upper triangle row by row, and an order by clustering.

    Of many features those of most energy.
    """
    chosen = sorted(sorted(range(Z.shape[1]), key=lambda i: -energies[i])[:_HEAT])
    from .supports import overlap

    found = overlap(Z[:, chosen])
    return {
        "features": chosen,
        "order": found.order.tolist(),
        "shared": [row[i:] for i, row in enumerate(found.shared.tolist())],
    }


def _setting(steered: Mapping[str, Any]) -> str:
    strength, solved = steered["strength"], steered["solved"]
    name = str(steered["mode"]) if strength is None else f"{steered['mode']} {strength:+.3g}"
    return f"{name}, KL {solved['kl']:.2g}" if solved else name


def _effects(effects: WordEffects | None) -> dict[str, Any] | None:
    if effects is None:
        return None
    return {
        "raised": _pairs(effects.raised),
        "lowered": _pairs(effects.lowered),
        "kl": _short(effects.kl),
        "strength": _short(effects.strength),
        "reached": effects.reached,
        "repeatability": _short(effects.repeatability),
        "lens_correlation": _short(effects.lens_correlation),
    }


def _lens(feature: Feature) -> dict[str, Any] | None:
    """The logit lens, but where it is known not to tell what features of the layer do."""
    if not feature.lens_holds:
        return None
    return {name: _pairs(getattr(feature, name)) for name in ("distinctive", "promoted", "suppressed")}


def _pairs(pairs: Iterable[tuple[str, float]]) -> list[list[Any]]:
    return [[text, _short(value)] for text, value in pairs]


def _short(value: float) -> float:
    """Four figures: as many as the page shows, and one."""
    return float(f"{value:.4g}")
