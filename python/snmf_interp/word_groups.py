"""A bundled corpus of closed groups of words, each word in many sentences: weekdays, months, seasons, numbers, family.

The sentences of a word come from templates that all words of its group share, so that nothing but the word tells them
apart, and from free text written for the word alone. No sentence holds another word of any group. The text is written
for this package and kept as templates in ``data/word_groups.json``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from .texts import Sample

NAME = "word-groups"


@dataclass(frozen=True)
class WordSentence:
    """A sentence that holds one word of a group.

    Attributes:
        text: the sentence.
        group: ``"weekdays"``, ``"months"``, ``"seasons"``, ``"numbers"`` or ``"family"``.
        word: the word, as it stands in the text.
        template: which template of the group it is made from; None for free text.
        number: of the template, or of the free text among those of the word.
    """

    text: str
    group: str
    word: str
    template: int | None
    number: int

    @property
    def id(self) -> str:
        """Its origin, such as ``weekdays/Monday/template-3`` or ``weekdays/Monday/free-3``."""
        kind = "free" if self.template is None else "template"
        return f"{self.group}/{self.word}/{kind}-{self.number}"

    @property
    def half(self) -> int:
        """0 or 1. All sentences of a template are in one half, and half of each word's free text."""
        return self.number % 2

    @property
    def sample(self) -> Sample:
        """As the other corpora have it, labelled with the word."""
        return Sample(self.id, self.text, self.word)


def groups() -> dict[str, list[str]]:
    """The words of each group, in their natural order."""
    return {name: list(content["words"]) for name, content in _content().items()}


def group_words(name: str) -> list[str]:
    """The words of one group.

    Raises:
        ValueError: there is no group of that name.
    """
    known = groups()
    if name not in known:
        raise ValueError(f"group: wanted one of {', '.join(known)}, got {name!r}")
    return known[name]


def group_sentences(names: Sequence[str] | None = None) -> list[WordSentence]:
    """All sentences of some groups, or of all: group by group, word by word, always in the same order.

    Raises:
        ValueError: there is no group of a name.
    """
    found = []
    for name in groups() if names is None else names:
        words = group_words(name)
        content = _content()[name]
        for word in words:
            found += [
                WordSentence(template.format(word), name, word, number, number)
                for number, template in enumerate(content["templates"])
            ]
            found += [
                WordSentence(text, name, word, None, number)
                for number, text in enumerate(content["free"][word])
            ]
    return found


def half_of(sample_id: str) -> int | None:
    """The half of a sentence by its :attr:`WordSentence.id`; None for an id of another corpus."""
    found = re.fullmatch(r"(\w+)/(\w+)/(?:template|free)-(\d+)", sample_id)
    return None if found is None or found[1] not in _content() else int(found[3]) % 2


@functools.cache
def _content() -> dict[str, dict]:
    text = resources.files("snmf_interp.data").joinpath("word_groups.json").read_text(encoding="utf-8")
    content: dict[str, dict] = json.loads(text)
    return content
