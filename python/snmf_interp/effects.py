"""What a feature does to the model's next word, measured: the feature is added, and every logit is read.

    effects = measure_effects(model, 23, factors)            # all features of a layer, at 0.25 nats
    effects.words(model, 74)                                 # WordEffects: what feature 74 raises and lowers
    effects.agreement                                        # how far the logit lens would have told

The logit lens multiplies a feature's direction by the unembedding and leaves out all layers in between, which in the
lower half of a network say something else. Here the whole model runs: with the feature added at every position, as
strongly as moves the next-token distribution by a stated divergence, behind several prompts. The same is done to random
groups of as many neurons, since some tokens rise whatever is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files
from .dictionaries import random_group_vectors
from .strengths import PROMPTS as OPENINGS
from .word_meter import VocabularyMeter, solve_each, steer_to

if TYPE_CHECKING:
    import snmf_kernels

    from .models import LanguageModel

_FORMAT, _VERSION = "snmf_interp.effects", 1
# The divergence at which features are added, in nats: enough to be seen, and far from nonsense.
KL = 0.25
# Openings after which nearly anything may follow, those of strengths among them. In early layers what a feature does
# depends on the prompt: of eight of these as much is found again behind the other eight as ``repeatability`` says.
PROMPTS = (
    *OPENINGS,
    "She looked at the",
    "It is often said that",
    "The most important thing is",
    "After a while,",
    "There was once a",
    "According to the",
    "We need to talk about",
    "He had never seen",
)
# Random groups whose effects say what any direction does.
N_RANDOM = 16
# Rank correlation with measured effects from which the logit lens is taken for what a feature does.
AGREES = 0.3
# Tokens listed at either end.
LISTED = 10
# Directions that are solved for together: bounds the tables [passes, directions, vocabulary].
_TOGETHER = 16


@dataclass(frozen=True)
class WordEffects:
    """What one feature does to the next word.

    Attributes:
        raised: ``(token, change of its logit)``, of those that rise the ones that rise most above what random groups
            do, see :meth:`Effects.excess`; the change is less the mean over the vocabulary.
        lowered: likewise of those that fall.
        strength: how strongly the feature was added, in units of activation along the unit direction.
        kl: the divergence there, in nats.
        reached: whether it is the wanted one within a tenth; else no strength reaches it.
        repeatability: Spearman's rank correlation, over the vocabulary, of the changes behind one half of the prompts
            with those behind the other.
        lens_correlation: likewise of the changes with the logit lens.
    """

    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]
    strength: float
    kl: float
    reached: bool
    repeatability: float
    lens_correlation: float

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> WordEffects:
        """The inverse of :func:`dataclasses.asdict` through JSON."""
        pairs = {name: tuple((word, value) for word, value in row[name]) for name in ("raised", "lowered")}
        return cls(**{**row, **pairs})


@dataclass(frozen=True, eq=False)
class Effects:
    """Measured effects of features of a layer.

    Attributes:
        layer: the layer.
        target: the wanted divergence of the next-token distribution in nats, averaged over the prompts.
        prompts: what the features were added behind.
        index: which features, ``[m]`` int64, ascending.
        change: of each the change of every token's logit, less the mean change over the vocabulary, averaged over the
            prompts and interpolated to the target, ``[m, vocabulary]`` float32.
        strength: ``[m]`` float32, in units of activation.
        kl: the divergence at the nearest measurement, ``[m]`` float32.
        reached: whether the target was, ``[m]`` bool; else all is at the nearest.
        repeatability: Spearman's rank correlation, over the vocabulary, of the changes behind one half of the prompts
            (every second one) with those behind the other, ``[m]`` float32.
        lens_correlation: likewise of ``change`` with the logit lens, ``[m]`` float32.
        random_mean, random_deviation: of ``change`` over random groups of as many neurons, ``[vocabulary]`` float32.
        n_random: how many.
    """

    layer: int
    target: float
    prompts: tuple[str, ...]
    index: Tensor
    change: Tensor
    strength: Tensor
    kl: Tensor
    reached: Tensor
    repeatability: Tensor
    lens_correlation: Tensor
    random_mean: Tensor
    random_deviation: Tensor
    n_random: int

    @property
    def agreement(self) -> float | None:
        """The median rank correlation of the logit lens with the measured changes; None of no feature."""
        return float(self.lens_correlation.median()) if len(self.index) else None

    def row(self, index: int) -> int:
        """Where a feature stands in the tables.

        Raises:
            KeyError: it was not measured.
        """
        found = (self.index == index).nonzero()
        if not len(found):
            raise KeyError(f"the effects of feature {index} of layer {self.layer} were not measured")
        return int(found[0])

    def excess(self, index: int) -> Tensor:
        """How far each token's change is above that under random groups, ``[vocabulary]``, in standard deviations.

        The deviation has its median over the vocabulary added: tokens that few random groups move would otherwise win
        by nearly nothing (Tusher, Tibshirani & Chu 2001 do so for genes).
        """
        deviation = self.random_deviation + self.random_deviation.median()
        return (self.change[self.row(index)] - self.random_mean) / deviation.clamp_min(1e-12)

    def words(self, model: LanguageModel, index: int, count: int = LISTED) -> WordEffects:
        """What a feature raises and lowers, named by the model's tokenizer."""
        row, excess = self.row(index), self.excess(index)
        change = self.change[row]

        def listed(sign: int) -> tuple[tuple[str, float], ...]:
            best = (sign * excess).masked_fill(sign * change <= 0, 0.0).topk(min(count, len(excess)))
            return tuple(
                (model.token_text(token), float(change[token]))
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value > 0
            )

        return WordEffects(
            listed(1),
            listed(-1),
            float(self.strength[row]),
            float(self.kl[row]),
            bool(self.reached[row]),
            float(self.repeatability[row]),
            float(self.lens_correlation[row]),
        )

    def joined(self, other: Effects) -> Effects:
        """These and others that were measured in the same way; of a feature in both, the other's."""
        own = ~torch.isin(self.index, other.index)
        index = torch.cat([self.index[own], other.index])
        order = index.argsort()
        tables: dict[str, Any] = {
            name: torch.cat([getattr(self, name)[own], getattr(other, name)])[order]
            for name in ("change", "strength", "kl", "reached", "repeatability", "lens_correlation")
        }
        return replace(other, index=index[order], **tables)

    def save(self, path: Path, named: dict[int, WordEffects], record: dict[str, Any]) -> None:
        """Write one safetensors file; it appears when it is whole.

        Args:
            path: the file.
            named: :meth:`words` of each feature, so that they can be read without the model's tokenizer.
            record: JSON values that say how the effects were made.
        """
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "layer": self.layer,
            "target": self.target,
            "prompts": list(self.prompts),
            "n_random": self.n_random,
            "record": record,
            "words": {str(index): asdict(words) for index, words in named.items()},
        }
        # Half precision is a thousandth of a change, far below what another prompt would change.
        tensors = {
            "index": self.index,
            "change": self.change.half(),
            "strength": self.strength,
            "kl": self.kl,
            "reached": self.reached,
            "repeatability": self.repeatability,
            "lens_correlation": self.lens_correlation,
            "random_mean": self.random_mean,
            "random_deviation": self.random_deviation,
        }
        files.write_bundle(path, header, tensors)

    @classmethod
    def load(cls, path: Path) -> tuple[Effects, dict[int, WordEffects]]:
        """Read what :meth:`save` wrote: the tables, and the words of each feature.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, or none of :meth:`save`.
        """
        header, tensors = files.read_bundle(path, _FORMAT, _VERSION)
        tensors["change"] = tensors["change"].float()
        effects = cls(
            layer=header["layer"],
            target=header["target"],
            prompts=tuple(header["prompts"]),
            n_random=header["n_random"],
            **tensors,
        )
        return effects, _words_of(header)


def read_words(path: Path) -> dict[int, WordEffects]:
    """The words of each feature in a file of :meth:`Effects.save`; its tables are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or none of :meth:`Effects.save`.
    """
    return _words_of(files.read_header(path, _FORMAT, _VERSION))


def _words_of(header: dict[str, Any]) -> dict[int, WordEffects]:
    return {int(index): WordEffects.from_dict(row) for index, row in header["words"].items()}


def measure_effects(
    model: LanguageModel,
    layer: int,
    factors: snmf_kernels.Factorization,
    indices: Sequence[int] | None = None,
    *,
    kl: float = KL,
    prompts: Sequence[str] = PROMPTS,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 64,
    like: Effects | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Add features to a layer and read what that does to every token's logit behind the prompts.

    A feature is added as it is, +z, at every position, at the strength at which the next-token distribution has moved
    by ``kl`` nats (within a tenth; changes are interpolated to ``kl``). Dead features have no direction: they are left
    out.

    Args:
        model: the model.
        layer: the layer that ``factors`` are of.
        factors: whose columns of Z are added.
        indices: which features; by default all.
        kl: the wanted divergence in nats, averaged over ``prompts``.
        prompts: openings after which nearly anything may follow; at least two.
        n_random: random groups that are measured for comparison, see
            :func:`snmf_interp.dictionaries.random_group_vectors`.
        seed: of the random groups.
        batch_size: rows in a forward pass.
        like: effects of other features of these factors, measured with the same arguments: their random groups are not
            measured again.
        progress: called with how many directions are done, and how many there are.

    Raises:
        ValueError: an argument is out of range, every feature is dead, or the factors are not of this layer's width.
    """
    if not 0 < kl < float("inf"):
        raise ValueError(f"kl: wanted a divergence above 0, got {kl}")
    if n_random < 2:
        raise ValueError(f"n_random: wanted at least 2 random groups, got {n_random}")
    Z = torch.as_tensor(factors.Z).cpu().float()
    if Z.shape[0] != model.d_mlp(layer):
        raise ValueError(
            f"factors: wanted Z with {model.d_mlp(layer)} rows for layer {layer}, got {Z.shape[0]}"
        )
    wanted = sorted(set(range(Z.shape[1]) if indices is None else indices))
    if outside := [index for index in wanted if not 0 <= index < Z.shape[1]]:
        raise ValueError(f"indices: there are features 0-{Z.shape[1] - 1}, got {outside[0]}")
    index = torch.tensor([i for i in wanted if bool(Z[:, i].any())], dtype=torch.int64)
    random = random_group_vectors(factors, n_random, seed=seed)
    directions = Z[:, index].T if like is not None else torch.cat([random, Z[:, index].T])
    meter = VocabularyMeter(model, layer, prompts, batch_size, parts=2)
    weights = torch.tensor([(len(prompts) + 1) // 2, len(prompts) // 2]) / len(prompts)
    # One search along the ladder; the others begin where it ended.
    ((first,),) = solve_each(meter, [random[0]], (kl,), tolerance=0.1)
    rows = []
    for part in directions.split(_TOGETHER):
        steered = steer_to(meter, part, kl, first.strength or 1.0)
        halves = steered.shifts.float().reshape(len(part), 2, -1)
        change = (halves * weights[:, None]).sum(1)
        repeats = rank_correlation(halves[:, 0], halves[:, 1])
        rows.append((change, repeats, steered.strength, steered.kl, steered.reached))
        if progress:
            progress(sum(len(row[1]) for row in rows), len(directions))
    every, repeats, strength, divergence, reached = (torch.cat(column) for column in zip(*rows, strict=True))
    n_first = len(directions) - len(index)
    by_chance, change = every.split([n_first, len(index)])
    lens = lens_logits(model, layer, Z[:, index])
    return Effects(
        layer=layer,
        target=kl,
        prompts=tuple(prompts),
        index=index,
        change=change,
        strength=strength[n_first:].float(),
        kl=divergence[n_first:].float(),
        reached=reached[n_first:],
        repeatability=repeats[n_first:],
        lens_correlation=rank_correlation(lens, change),
        random_mean=by_chance.mean(0) if like is None else like.random_mean,
        random_deviation=by_chance.std(0) if like is None else like.random_deviation,
        n_random=n_random,
    )


def lens_logits(model: LanguageModel, layer: int, Z: Tensor) -> Tensor:
    """The logit lens: logits ``[m, vocabulary]`` of the residual directions of the columns of Z, each of unit length.

    The final norm drops the length anyway, but for its epsilon.
    """
    weight = model.output_weight(layer)
    unit = Z / Z.norm(dim=0).clamp_min(1e-30)
    with torch.inference_mode():
        return model.logit_lens((weight @ unit.to(weight.device, weight.dtype)).T).cpu()


def rank_correlation(one: Tensor, two: Tensor) -> Tensor:
    """Spearman's rank correlation of each pair of rows, ``[m]`` float32; ties take any order."""
    ranks = [rows.argsort(-1).argsort(-1).double() for rows in (one, two)]
    first, second = (rows - rows.mean(-1, keepdim=True) for rows in ranks)
    product = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1)).clamp_min(1e-30)
    return product.float()
