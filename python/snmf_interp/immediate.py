"""What steering does to the very next token: a concept's words beside words that were as likely.

    vocabulary = Vocabulary.of(model, words_of_concepts, [*protocol.choosing, *protocol.reporting])
    meter = ImmediateMeter(model, 12, vocabulary, protocol)
    meter.measure(record, direction)         # an ImmediateEffect for each divergence of a SteeringRecord

Text of fifty tokens says whether a concept is written about; this says, without sampling and without a scorer, whether
the direction itself writes the concept's words. Both are asked of the same direction at the same strengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .word_meter import WordMeter, matched_words, single_tokens

if TYPE_CHECKING:
    from .models import LanguageModel
    from .steering_protocol import Protocol, SteeringRecord

# Of what is measured below; effects of another are measured again.
VERSION = "1"
# Words that each word is compared with.
CONTROLS = 10


@dataclass(frozen=True)
class ImmediateEffect:
    """What a direction does to a concept's words at one divergence, on the reporting prompts.

    Attributes:
        target: the divergence aimed at on the choosing prompts, in nats.
        reached: whether it was, there; else all is at the largest that was found.
        sign: the one under which ``shift`` is larger on the choosing prompts, of those that were tried.
        kl: the divergence on the reporting prompts, in nats.
        shift: the change of the words' logits, less the mean change of words that were as likely without steering;
            averaged over the concept's words.
        others: the mean over the other concepts of the same of *their* words: near 0 where the direction is specific.
            No null for the choice of direction and sign, which only the concept's own words decide: that is the shift
            under a random direction.
        log_probability: the change of the words' log-probability, averaged over them, in nats.
    """

    target: float
    reached: bool
    sign: int
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

    def measure(self, record: SteeringRecord, direction: Tensor) -> tuple[ImmediateEffect, ...]:
        """The effect at each divergence that a record found strengths for, smallest first.

        Args:
            record: of this layer; its strengths are taken.
            direction: ``[d_mlp]``, the direction that the record chose.

        Returns:
            Nothing where no word of the record's concept is a single token.
        """
        own = self._columns.get(record.concept)
        if own is None:
            return ()
        # Divergences that are not reached share one strength.
        row = {strength: at for at, strength in enumerate(dict.fromkeys(c.strength for c in record.cells))}
        strengths, directions = torch.tensor(list(row)), direction.expand(len(row), -1)
        chosen_by = self._choosing.measure(directions, strengths).shifts[:, own].mean(1)
        found = self._reporting.measure(directions, strengths)
        # Of the concept itself nothing is left.
        strangers = [
            rest for columns in self._columns.values() if len(rest := columns[~torch.isin(columns, own)])
        ]
        effects = []
        for target in sorted({cell.target for cell in record.cells}):
            best = max(
                (cell for cell in record.cells if cell.target == target),
                key=lambda cell: float(chosen_by[row[cell.strength]]),
            )
            at = row[best.strength]
            others = [float(found.shifts[at, columns].mean()) for columns in strangers]
            effects.append(
                ImmediateEffect(
                    target,
                    best.reached,
                    best.sign,
                    float(found.kl[at]),
                    float(found.shifts[at, own].mean()),
                    sum(others) / len(others) if others else None,
                    float(found.log_probability[at, own].mean()),
                )
            )
        return tuple(effects)
