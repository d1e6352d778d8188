from __future__ import annotations

import re
from collections import Counter

import pytest

from snmf_interp import read_texts
from snmf_interp.word_groups import group_sentences, group_words, groups, half_of


def test_counts() -> None:
    counts = Counter((s.group, s.word) for s in group_sentences())
    assert {group for group, _ in counts} == {"weekdays", "months", "seasons", "numbers", "family"}
    assert all(counts["weekdays", day] >= 100 for day in groups()["weekdays"])
    assert len(groups()["weekdays"]) == 7
    assert len(groups()["months"]) == 12
    assert min(counts.values()) >= 20
    free = Counter(s.word for s in group_sentences(["weekdays"]) if s.template is None)
    assert set(free.values()) == {16}


def test_every_sentence_holds_its_word_and_no_other() -> None:
    every = {word for words in groups().values() for word in words}
    for sentence in group_sentences():
        assert "{" not in sentence.text
        assert set(re.findall(r"[A-Za-z]+", sentence.text)) & every == {sentence.word}, sentence.text
    texts = [sentence.text for sentence in group_sentences()]
    assert len(set(texts)) == len(texts)


def test_a_template_says_nothing_about_its_word() -> None:
    """But for the word, the sentences of a template are the same."""
    for group in groups():
        rest: dict[int, set[str]] = {}
        for sentence in group_sentences([group]):
            if sentence.template is not None:
                blank = re.sub(rf"\b{sentence.word}\b", "_", sentence.text)
                rest.setdefault(sentence.template, set()).add(blank)
        assert all(len(blanks) == 1 for blanks in rest.values())


def test_halves() -> None:
    """Disjoint by template, and of every word about as much in each."""
    half_by_template = {(s.group, s.template): s.half for s in group_sentences() if s.template is not None}
    for sentence in group_sentences():
        assert sentence.half == half_of(sentence.id)
        if sentence.template is not None:
            assert sentence.half == half_by_template[sentence.group, sentence.template]
    counts = Counter((s.word, s.half) for s in group_sentences())
    assert all(counts[word, 0] == counts[word, 1] for word, _ in counts)
    blanks = [{re.sub(s.word, "_", s.text) for s in group_sentences() if s.half == half} for half in (0, 1)]
    assert not blanks[0] & blanks[1]


def test_as_a_bundled_corpus() -> None:
    samples = read_texts("word-groups")
    assert samples == [sentence.sample for sentence in group_sentences()] == read_texts("word-groups")
    assert samples[0].label == "Monday"
    assert len({sample.id for sample in samples}) == len(samples)


def test_other_names() -> None:
    assert half_of("weekdays/3") is half_of("notes.txt:12") is half_of("animals/cat/free-1") is None
    with pytest.raises(ValueError, match=r"wanted one of weekdays, months, .* got 'days'"):
        group_words("days")
