"""What steering with core, exclusive and random neuron sets does to the words of a group, at equal divergence.

    table = intervention_table(model, 3, factors.Z, {"Monday": 12, "Tuesday": 40, …})
    table.core.shifts, table.core.p_value

Each set is steered as strongly as moves the next-token distribution by the same KL divergence, and what is read is the
change of each word's logit, relative to words that were as likely without steering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core import CORE, NeuronSets, neuron_sets, permutation_p, random_sets, set_directions
from .strengths import PROMPTS
from .word_meter import WordMeter, matched_words, solve_each, steer_to

if TYPE_CHECKING:
    from .models import LanguageModel

# Of neutral openings, apart from PROMPTS: what was chosen on those is reported on these.
HELD_OUT_PROMPTS = (
    "She told us about",
    "They kept talking about",
    "The story begins with",
    "He never mentioned",
    "We were thinking of",
    "The main reason was",
    "Nobody cared about",
    "This one is called",
)


@dataclass(frozen=True)
class RandomSets:
    """The control of a set: its weights on as many random neurons, steered to the same divergence.

    Attributes:
        count: how many random sets.
        statistics: the set's statistic under each, in logits.
        rises: under each the shift of the set's own word; for the core the smallest among the members. Above 0 the
            random set raises the word, or all members.
        reached: the share that passed the divergence, or missed it by less than a tenth.
        typical_error: the median of ``|achieved / wanted − 1|`` of the divergence among those; what is left of it is
            interpolated away, linearly in its square root.
    """

    count: int
    statistics: tuple[float, ...]
    rises: tuple[float, ...]
    reached: float
    typical_error: float | None


@dataclass(frozen=True)
class SetEffect:
    """What one neuron set does.

    Attributes:
        name: ``"core"``, or the word whose exclusive set it is.
        neurons: the set, ascending.
        strength: α, along the set's unit direction, in units of activation.
        kl: the divergence achieved there, in nats.
        reached: whether it is the wanted one; if not, it is the largest that was found.
        shifts: of each word of the group the change of its logit, less the mean change of its frequency-matched
            words; averaged over prompts.
        related: the same for the words of other groups, averaged over each group.
        statistic: core: the mean of ``shifts`` over the members. Exclusive: the own shift less the mean of the other
            members'.
        p_value: one-sided, against ``random``; None without random sets.
        random: the control, or None.
    """

    name: str
    neurons: tuple[int, ...]
    strength: float
    kl: float
    reached: bool
    shifts: dict[str, float]
    related: dict[str, float]
    statistic: float
    p_value: float | None
    random: RandomSets | None


@dataclass(frozen=True)
class InterventionTable:
    """Core and exclusive sets of a group of features and what they do; see :func:`intervention_table`.

    Attributes:
        layer: the layer that was steered.
        words: all words that were watched; ``sets.members`` are those with a feature.
        sets: the neuron sets.
        target: the wanted divergence in nats.
        prompts: the prompts averaged over.
        controls: the frequency-matched words of each word.
        log_probability: of each word after the prompts, without steering, averaged; natural logarithm.
        core: what the core does; None where it is empty.
        core_minimum_p: of :attr:`core_minimum`, against the smallest shift under each random set; None without them.
        exclusive: what each exclusive set does, members in their order; without the empty ones.
        exclusive_statistic: the mean statistic of ``exclusive``; None where there is none.
        exclusive_p: of that mean, against one random set for each, drawn together.
    """

    layer: int
    words: tuple[str, ...]
    sets: NeuronSets
    target: float
    prompts: tuple[str, ...]
    controls: dict[str, list[str]]
    log_probability: dict[str, float]
    core: SetEffect | None
    core_minimum_p: float | None
    exclusive: tuple[SetEffect, ...]
    exclusive_statistic: float | None
    exclusive_p: float | None

    @property
    def core_minimum(self) -> float | None:
        """The smallest shift among the members under the core: above 0, it raises all."""
        return None if self.core is None else _core_minimum(self.core, self.sets)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"core_minimum": self.core_minimum}


def intervention_table(
    model: LanguageModel,
    layer: int,
    Z: Tensor,
    members: Mapping[str, int],
    *,
    words: Sequence[str] | None = None,
    related: Mapping[str, Sequence[str]] | None = None,
    m: int | None = None,
    kl: float = 0.25,
    prompts: Sequence[str] = PROMPTS,
    n_random: int = 99,
    n_controls: int = 10,
    controls: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    tolerance: float = 0.02,
    batch_size: int = 64,
) -> InterventionTable:
    """Steer with the core, each exclusive set, and random sets of the same weights, all to the same divergence.

    Args:
        model, layer: what is steered, at the input of the layer's down projection.
        Z: features ``[d_mlp, k]``.
        members: a feature for each word.
        words: words to watch; all members and perhaps more. Each is a single token behind a space.
        related: other groups of words to watch, by name: is it this group that a core raises, or all such words?
        m: how many supports make a neuron core; see :func:`snmf_interp.neuron_sets`.
        kl: the divergence of the next-token distribution in nats, averaged over ``prompts``.
        prompts: openings after which the words are neither likely nor impossible.
        n_random: random sets for each set; 0 for none. The smallest p-value is ``1 / (n_random + 1)``.
        n_controls: frequency-matched words for each word; see :func:`snmf_interp.word_meter.matched_words`.
        controls: these words instead.
        seed: of the random sets.
        tolerance: of the divergence of core and exclusive sets; see :func:`snmf_interp.solve_strengths`.
        batch_size: rows in a forward pass.

    Raises:
        ValueError: an argument is out of range, or a word is not a single token; the message names it.
    """
    if not 0 < kl < math.inf:
        raise ValueError(f"kl: wanted a divergence above 0, got {kl}")
    if n_random < 0:
        raise ValueError(f"n_random: wanted 0 or more random sets, got {n_random}")
    if Z.ndim != 2 or Z.shape[0] != model.d_mlp(layer):
        raise ValueError(f"Z: wanted [{model.d_mlp(layer)}, k] for layer {layer}, got {list(Z.shape)}")
    watched = list(members if words is None else words)
    if missing := [word for word in members if word not in watched]:
        raise ValueError(f"words: wanted all members among them, but {missing[0]!r} is not")
    sets = neuron_sets(Z, members, m)
    others = {name: list(group) for name, group in (related or {}).items()}
    every = watched + [word for group in others.values() for word in group]
    if controls is None:
        controls = matched_words(model, every, prompts, n_controls)
    meter = WordMeter(model, layer, prompts, every, controls, batch_size)
    directions = set_directions(Z, sets)
    solved = solve_each(meter, list(directions.values()), (kl,), tolerance) if directions else []
    generator = torch.Generator().manual_seed(seed)
    place = {word: i for i, word in enumerate(every)}
    inside = [place[word] for word in members]
    effects: dict[str, SetEffect] = {}
    for (name, direction), (own_strength,) in zip(directions.items(), solved, strict=True):
        strength, achieved, reached, shifts, _ = own_strength
        own = None if name == CORE else inside.index(place[name])
        random, p_value = None, None
        statistic = _statistic(shifts[inside], own)
        if n_random:
            drawn = random_sets(direction, n_random, generator)
            outcome = steer_to(meter, drawn, kl, start=strength)
            values = [_statistic(row[inside], own) for row in outcome.shifts]
            p_value = permutation_p(statistic, values)
            rises = [_rise(row[inside], own) for row in outcome.shifts]
            random = RandomSets(
                n_random, tuple(values), tuple(rises), outcome.share_reached, outcome.typical_error
            )
        effects[name] = SetEffect(
            name=name,
            neurons=sets.core if own is None else sets.exclusive[name],
            strength=strength,
            kl=achieved,
            reached=reached,
            shifts={word: float(shifts[place[word]]) for word in watched},
            related={
                name: float(shifts[[place[word] for word in group]].mean()) for name, group in others.items()
            },
            statistic=statistic,
            p_value=p_value,
            random=random,
        )
    core = effects.pop(CORE, None)
    minimum_p = None
    if core is not None and core.random is not None:
        minimum_p = permutation_p(_core_minimum(core, sets), core.random.rises)
    exclusive = tuple(effects[word] for word in members if word in effects)
    mean, mean_p = None, None
    if exclusive:
        mean = sum(effect.statistic for effect in exclusive) / len(exclusive)
        if n_random:
            draws = zip(*(effect.random.statistics for effect in exclusive if effect.random), strict=True)
            mean_p = permutation_p(mean, [sum(draw) / len(draw) for draw in draws])
    return InterventionTable(
        layer=layer,
        words=tuple(watched),
        sets=sets,
        target=kl,
        prompts=tuple(prompts),
        controls={word: list(controls[word]) for word in every},
        log_probability=dict(zip(every, meter.log_probability.tolist(), strict=True)),
        core=core,
        core_minimum_p=minimum_p,
        exclusive=exclusive,
        exclusive_statistic=mean,
        exclusive_p=mean_p,
    )


def _statistic(shifts: Tensor, own: int | None) -> float:
    """Of the members' shifts: their mean, or for an exclusive set its own less the mean of the others."""
    if own is None:
        return float(shifts.mean())
    return float(shifts[own] - (shifts.sum() - shifts[own]) / (len(shifts) - 1))


def _rise(shifts: Tensor, own: int | None) -> float:
    """Of the members' shifts: the smallest, or for an exclusive set its own."""
    return float(shifts.min() if own is None else shifts[own])


def _core_minimum(core: SetEffect, sets: NeuronSets) -> float:
    return min(core.shifts[word] for word in sets.members)
