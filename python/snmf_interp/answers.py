"""What a language model is asked and what comes back: requests, answers that may be missing, JSON that is checked.

Whoever has ``name`` and ``ask`` is a :class:`ChatModel`; :mod:`snmf_interp.llm` has two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
# How many characters of an answer or of an endpoint's message a reason quotes.
_QUOTED = 200


@dataclass(frozen=True)
class Request:
    """One conversation to be continued.

    Attributes:
        messages: ``(role, content)`` pairs, the last of them the user's. Questions are put without a system
            message, which some chat templates refuse.
        max_tokens: the most tokens that the answer may have.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int = 300

    @classmethod
    def of(cls, question: str, *, max_tokens: int = 300) -> Request:
        """A conversation that begins with ``question``."""
        return cls((("user", question),), max_tokens)

    def then(self, answer: str, question: str) -> Request:
        """The conversation after ``answer``, with another question."""
        return Request((*self.messages, ("assistant", answer), ("user", question)), self.max_tokens)

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as endpoints and chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Answer:
    """What came back: ``text``, or None and the ``reason``.

    ``cached`` answers cost nothing now; ``cut_off`` ones ended where their tokens did.
    """

    text: str | None
    reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    cut_off: bool = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.reason is None):
            raise ValueError("an answer has either a text or the reason why there is none")


@dataclass(frozen=True)
class Usage:
    """What was asked: distinct requests sent, taken from the cache, and failed; tokens as the model counts them."""

    sent: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, answer: Answer) -> Usage:
        """With one more answer; one from the cache costs no tokens."""
        if answer.cached:
            return Usage(self.sent, self.cached + 1, self.failed, self.prompt_tokens, self.completion_tokens)
        return Usage(
            self.sent + 1,
            self.cached,
            self.failed + (answer.text is None),
            self.prompt_tokens + answer.prompt_tokens,
            self.completion_tokens + answer.completion_tokens,
        )

    def cost(self, per_million_prompt: float, per_million_completion: float) -> float:
        """The price, in the currency in which a million tokens of each kind cost this much."""
        return (
            self.prompt_tokens * per_million_prompt + self.completion_tokens * per_million_completion
        ) / 1e6


class ChatModel(Protocol):
    """What labels, sentences and judgements need of a model."""

    @property
    def name(self) -> str:
        """For the record."""

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in their order; a failed one is missing, with its reason."""


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A validated answer: ``value``, or None and the ``reason``; ``raw`` is what the model wrote, if it did.

    ``unanswered`` if no answer came, so that asking again may help; the same unusable answer would come again.
    """

    value: T | None
    reason: str | None
    raw: str | None
    unanswered: bool = False


def ask_json(
    model: ChatModel, requests: Sequence[Request], parse: Callable[[dict[str, Any]], T], *, repairs: int = 1
) -> list[Parsed[T]]:
    """Ask for JSON objects and validate them.

    Args:
        model: whom to ask.
        requests: the questions; they must say what the object looks like.
        parse: makes the value of an object, or raises ValueError, whose message the model is told.
        repairs: how often a model is told that its answer could not be used, and asked again.

    Returns:
        For each request its value; None with a reason where no answer came or none was valid.
    """
    results: list[Parsed[T]] = [Parsed(None, "not asked", None)] * len(requests)
    asked = dict(enumerate(requests))
    for attempt in range(repairs + 1):
        again = {}
        for place, answer in zip(asked, model.ask(list(asked.values())), strict=True):
            if answer.text is None:
                results[place] = Parsed(None, answer.reason, results[place].raw, unanswered=True)
                continue
            try:
                results[place] = Parsed(
                    parse(find_object(answer.text, cut_off=answer.cut_off)), None, answer.text
                )
            except ValueError as error:
                results[place] = Parsed(None, f"unusable answer: {error}", answer.text)
                again[place] = asked[place].then(
                    answer.text, f"That cannot be used: {error}. Answer with the JSON object alone."
                )
        asked = again
        if not asked or attempt == repairs:
            break
    return results


def find_object(text: str, *, cut_off: bool = False) -> dict[str, Any]:
    """The last JSON object in ``text``, outside of ``<think>`` blocks; models put words and fences around it.

    Args:
        text: the answer. A block that is not closed goes to its end; one that the prompt opened begins with it.
        cut_off: whether it ended where its tokens did. Then the last object may be one that was only weighed, so all
            must be the same.

    Raises:
        ValueError: there is none, or it cannot be told which was meant.
    """
    said = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    decoder, found, place = json.JSONDecoder(), [], said.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(said, place)
            found.append(value)
        except (json.JSONDecodeError, RecursionError):
            end = place + 1
        place = said.find("{", end)
    if not found:
        raise ValueError(f"wanted a JSON object, got {quoted(text)}")
    if cut_off and any(value != found[-1] for value in found):
        raise ValueError(f"the answer was cut off among several JSON objects: {quoted(said)}")
    result: dict[str, Any] = found[-1]
    return result


def quoted(value: object) -> str:
    """The beginning of what came, on one line, for a reason."""
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "…"
