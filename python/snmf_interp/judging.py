"""A judge of steered text: how far it has to do with a concept, and how well it reads, 0 to 2 each.

    qualification = qualify(llm)                   # on texts whose scores are known
    qualification.check()                          # raises, and says where the judge fails
    judge(texts, "weather", llm)[0].score

The scale is the paper's (Shafran, Geiger & Geva, arXiv:2506.10920): the score of a text is the harmonic mean of
the two, 0 where either is 0. The two are asked apart, so that a text on the concept is not read as a better one.
A judgement that failed is missing; it is no 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import prompts
from .answers import Request, ask_json

if TYPE_CHECKING:
    from .answers import ChatModel

# What a judge must reach on each kind of text, for concept and fluency alike; a missing answer is not right.
# A judge that always says the same fails on three kinds or four. One that guesses is right on a third, or on two thirds
# where two scores are allowed.
WANTED_ACCURACY = 0.75
WANTED_ANSWERS = 0.9
KINDS = ("clean", "off-topic", "shuffled", "looping")
_GOLD = "judge_gold.json"


@dataclass(frozen=True)
class Judgement:
    """A text's scores, each None where no usable answer came; ``reason`` then says why.

    Attributes:
        concept, fluency: 0, 1 or 2.
        reason: what failed.
        raw: what the judge wrote about concept and fluency.
        unanswered: whether an answer did not come, so that asking again may help.
    """

    concept: int | None
    fluency: int | None
    reason: str | None = None
    raw: tuple[str | None, str | None] = (None, None)
    unanswered: bool = False

    @property
    def score(self) -> float | None:
        """The harmonic mean, 0 to 2; None where either score is missing."""
        if self.concept is None or self.fluency is None:
            return None
        total = self.concept + self.fluency
        return 2 * self.concept * self.fluency / total if total else 0.0


@dataclass(frozen=True)
class GoldItem:
    """A text with the scores that a judge may give it."""

    kind: str
    concept: str
    text: str
    concept_scores: tuple[int, ...]
    fluency_scores: tuple[int, ...]


@dataclass(frozen=True)
class Qualification:
    """How a judge did on the gold set.

    Attributes:
        judge: its name.
        concept, fluency: the share of right answers by kind of text, missing ones not right.
        answered: the share of answers that could be used.
        failures: where it falls short, in words; empty for a judge that qualifies.
    """

    judge: str
    concept: Mapping[str, float]
    fluency: Mapping[str, float]
    answered: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether its scores may be shown."""
        return not self.failures

    def check(self) -> None:
        """Do nothing for a judge that qualifies.

        Raises:
            ValueError: it does not; the message says where.
        """
        if self.failures:
            raise ValueError(
                f"{self.judge!r} does not qualify as a judge, so no scores are shown: {'; '.join(self.failures)}"
            )


def judge(texts: Sequence[str], concept: str | Sequence[str], llm: ChatModel) -> list[Judgement]:
    """Judge texts.

    Args:
        texts: what a model wrote, with or without its prompt.
        concept: what they should have to do with; one for all, or one for each.
        llm: the judge; see :func:`qualify`.

    Returns:
        A :class:`Judgement` for each text.

    Raises:
        ValueError: as many concepts as texts were wanted.
    """
    concepts = [concept] * len(texts) if isinstance(concept, str) else list(concept)
    if len(concepts) != len(texts):
        raise ValueError(f"concept: wanted one, or one for each of {len(texts)} texts, got {len(concepts)}")
    questions = [
        prompts.CONCEPT.substitute(concept=prompts.quote(name), text=prompts.quote(text))
        for name, text in zip(concepts, texts, strict=True)
    ] + [prompts.FLUENCY.substitute(text=prompts.quote(text)) for text in texts]
    answers = ask_json(llm, [Request.of(question, max_tokens=60) for question in questions], parse_score)
    judgements = []
    for about, reads in zip(answers[: len(texts)], answers[len(texts) :], strict=True):
        reasons = [
            f"{name}: {answer.reason}"
            for name, answer in (("concept", about), ("fluency", reads))
            if answer.reason
        ]
        judgements.append(
            Judgement(
                about.value,
                reads.value,
                "; ".join(reasons) or None,
                (about.raw, reads.raw),
                about.unanswered or reads.unanswered,
            )
        )
    return judgements


def parse_score(answer: Mapping[str, Any]) -> int:
    """The score in a judge's answer.

    Raises:
        ValueError: it is not ``{"score": 0}``, 1 or 2. A score in words, or of 1.5, is none.
    """
    score = answer.get("score")
    if isinstance(score, bool) or score not in (0, 1, 2):
        raise ValueError('wanted {"score": 0}, {"score": 1} or {"score": 2}')
    return int(score)


def qualify(llm: ChatModel) -> Qualification:
    """Have a judge rate the gold set: clean, off-topic, shuffled and looping texts, eight of each.

    On each kind it must be right on 75 % for concept and for fluency, and 90 % of its answers must be usable.
    """
    gold = gold_set()
    judged = judge([item.text for item in gold], [item.concept for item in gold], llm)
    concept, fluency, failures = {}, {}, []
    for kind in KINDS:
        pairs = [(item, given) for item, given in zip(gold, judged, strict=True) if item.kind == kind]
        concept[kind] = sum(given.concept in item.concept_scores for item, given in pairs) / len(pairs)
        fluency[kind] = sum(given.fluency in item.fluency_scores for item, given in pairs) / len(pairs)
        for name, accuracy in (("concept", concept[kind]), ("fluency", fluency[kind])):
            if accuracy < WANTED_ACCURACY:
                failures.append(
                    f"right on the {name} of {accuracy:.0%} of {kind} texts, wanted {WANTED_ACCURACY:.0%}"
                )
    given = [score for judgement in judged for score in (judgement.concept, judgement.fluency)]
    answered = sum(score is not None for score in given) / len(given)
    if answered < WANTED_ANSWERS:
        failures.append(f"gave {answered:.0%} usable answers, wanted {WANTED_ANSWERS:.0%}")
    return Qualification(llm.name, concept, fluency, answered, tuple(failures))


def gold_set() -> list[GoldItem]:
    """The bundled texts with known scores."""
    text = resources.files("snmf_interp.data").joinpath(_GOLD).read_text(encoding="utf-8")
    return [
        GoldItem(
            kind,
            item["concept"],
            item["text"],
            tuple(group["concept_scores"]),
            tuple(group["fluency_scores"]),
        )
        for kind, group in json.loads(text).items()
        for item in group["items"]
    ]
