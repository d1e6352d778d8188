"""What steering does to the very next token: a concept's words beside words that were as likely.

    vocabulary = Vocabulary.of(model, words_of_concepts, [*protocol.choosing, *protocol.reporting])
    meter = ImmediateMeter(model, 12, vocabulary, protocol)
    meter.rises(directions, "weather")       # on the choosing prompts, to choose a direction by
    meter.measure(record, direction)         # on the reporting prompts, an ImmediateEffect for each divergence

Text of fifty tokens says whether a concept is written about; this says, without sampling and without a scorer, whether
the direction itself writes the concept's words. A direction is chosen by the same quantity that is reported, on other
prompts. Strengths are solved for on the prompts where the effect is read, so that all directions are compared there
at one divergence; no word of a concept has a part in that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .word_meter import WordMeter, matched_words, single_tokens, solve_each

if TYPE_CHECKING:
    from .models import LanguageModel
    from .steering_protocol import Protocol, SteeringRecord

# Of what is measured below; effects of another are measured again.
VERSION = "2"
# Words that each word is compared with.
CONTROLS = 10


@dataclass(frozen=True)
class ImmediateEffect:
    """What a direction does to a concept's words at one divergence, on the reporting prompts.

    Attributes:
        target: the divergence aimed at on these prompts, in nats.
        reached: whether it was; else all is at the largest that was found.
        sign: that of the record.
        strength: the signed strength.
        kl: the divergence achieved, in nats.
        shift: the change of the words' logits, less the mean change of words that were as likely without steering;
            averaged over the concept's words.
        others: the mean over the other concepts of the same of *their* words: near 0 where the direction is specific;
            None where there are none.
        log_probability: the change of the words' log-probability, averaged over them, in nats.
    """

    target: float
    reached: bool
    sign: int
    strength: float
    kl: float
    shift: float
    others: float | None
    log_probability: float


@dataclass(frozen=True)
class Vocabulary:
    """The words of concepts that are single tokens of a model, and what each is compared with.

    Attributes:
        words: by concept, as they are given or with a capital; concepts without any are left out.
        controls: of each word the words that are as likely without steering (:func:`matched_words`).
    """

    words: dict[str, tuple[str, ...]]
    controls: dict[str, list[str]]

    @classmethod
    def of(
        cls, model: LanguageModel, words: Mapping[str, Sequence[str]], prompts: Sequence[str]
    ) -> Vocabulary:
        """Match the concepts' words after ``prompts``; no control is a word of any of the concepts.

        Raises:
            ValueError: no prompt, or the vocabulary has too few words to compare with.
        """
        single = {concept: single_tokens(model, own) for concept, own in words.items()}
        single = {concept: own for concept, own in single.items() if own}
        every = list(dict.fromkeys(word for own in single.values() for word in own))
        return cls(single, matched_words(model, every, prompts, CONTROLS) if every else {})


class ImmediateMeter:
    """Measures the next token under the directions of one layer, on both halves of a protocol's prompts.

    Args:
        model, layer: what is steered.
        vocabulary: of the concepts that are steered to; each is also a control of the others.
        protocol: whose prompts are used.

    Raises:
        ValueError: ``vocabulary`` has no concept.
    """

    def __init__(self, model: LanguageModel, layer: int, vocabulary: Vocabulary, protocol: Protocol) -> None:
        if not vocabulary.words:
            raise ValueError(f"vocabulary: wanted words that are single tokens of {model.name!r}, got none")
        self._protocol = protocol
        every = list(vocabulary.controls)
        position = {word: at for at, word in enumerate(every)}
        self._columns = {
            concept: torch.tensor([position[word] for word in own])
            for concept, own in vocabulary.words.items()
        }
        self._choosing, self._reporting = (
            WordMeter(model, layer, prompts, every, vocabulary.controls, protocol.batch_size)
            for prompts in (protocol.choosing, protocol.reporting)
        )

    def has_words(self, concept: str) -> bool:
        """Whether a concept has words that are single tokens."""
        return concept in self._columns

    def rises(self, directions: Sequence[Tensor], concept: str) -> list[float]:
        """What directions are chosen by: :attr:`ImmediateEffect.shift` at ``screen_kl``, on the choosing prompts.

        Args:
            directions: ``[d_mlp]`` each.
            concept: one that :meth:`has_words`.
        """
        solved = solve_each(self._choosing, directions, (self._protocol.screen_kl,), tolerance=0.1)
        own = self._columns[concept]
        return [float(at_target.shifts[own].mean()) for (at_target,) in solved]

    def measure(self, record: SteeringRecord, direction: Tensor) -> tuple[ImmediateEffect, ...]:
        """The effect at each of the protocol's divergences, in their order.

        Args:
            record: of this layer; its concept and sign are taken.
            direction: ``[d_mlp]``, the direction that the record chose.

        Returns:
            Nothing where no word of the record's concept is a single token.
        """
        own = self._columns.get(record.concept)
        if own is None:
            return ()
        targets = self._protocol.targets
        (solved,) = solve_each(self._reporting, [record.sign * direction], targets)
        # Of the concept itself nothing is left.
        strangers = [
            rest for columns in self._columns.values() if len(rest := columns[~torch.isin(columns, own)])
        ]
        effects = []
        for target, at_target in zip(targets, solved, strict=True):
            others = [float(at_target.shifts[columns].mean()) for columns in strangers]
            effects.append(
                ImmediateEffect(
                    target,
                    at_target.reached,
                    record.sign,
                    record.sign * at_target.strength,
                    at_target.kl,
                    float(at_target.shifts[own].mean()),
                    sum(others) / len(others) if others else None,
                    float(at_target.log_probability[own].mean()),
                )
            )
        return tuple(effects)
