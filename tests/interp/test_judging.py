"""Sentences and judgements, with models that are scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from snmf_interp import LanguageModel, collect
from snmf_interp.answers import Answer, Request
from snmf_interp.dictionaries import random_groups
from snmf_interp.evaluation import concept_detection_score
from snmf_interp.intervals import bootstrap_mean
from snmf_interp.judging import KINDS, Judgement, gold_set, judge, parse_score, qualify
from snmf_interp.labels import Label
from snmf_interp.sentences import (
    Sentences,
    detect_sentences,
    parse_sentences,
    write_sentences,
)
from snmf_interp.texts import Sample

from .conftest import VOCABULARY

Maker = Callable[..., LanguageModel]


class Scripted:
    """A judge or writer whose answers are a function of the question's text."""

    name = "scripted"

    def __init__(self, answer: Callable[[str], str | None]) -> None:
        self.answer = answer

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        found = [self.answer(request.messages[0][1]) for request in requests]
        return [Answer(text) if text is not None else Answer(None, "time-out") for text in found]


def part(question: str, tag: str) -> Any:
    """What stands between tags, or None."""
    if f"<{tag}>" not in question:
        return None
    return json.loads(question.split(f"<{tag}>")[1].split(f"</{tag}>")[0])


class TestJudge:
    def test_scores(self) -> None:
        def answer(question: str) -> str | None:
            concept, text = part(question, "concept"), part(question, "text")
            if text == "fails":
                return None
            if text == "babbles":
                return "a solid two"
            return json.dumps({"score": 1 if concept else 2})

        good, failed, babbled = judge(["fine", "fails", "babbles"], "weather", Scripted(answer))
        assert (good.concept, good.fluency, good.reason) == (1, 2, None)
        assert good.score == pytest.approx(4 / 3)
        assert good.raw == ('{"score": 1}', '{"score": 2}')
        for missing in (failed, babbled):
            assert (missing.concept, missing.fluency, missing.score) == (None, None, None)
        assert (good.unanswered, failed.unanswered, babbled.unanswered) == (False, True, False)
        assert failed.reason == "concept: time-out; fluency: time-out"
        assert babbled.reason is not None
        assert babbled.reason.startswith("concept: unusable answer")
        assert babbled.raw == ("a solid two", "a solid two")

    def test_one_half_missing_is_missing(self) -> None:
        (only,) = judge(["x"], "y", Scripted(lambda q: None if part(q, "concept") else '{"score": 2}'))
        assert (only.concept, only.fluency, only.score) == (None, 2, None)
        assert only.unanswered
        assert only.reason == "concept: time-out"

    @pytest.mark.parametrize(
        ("concept", "fluency", "score"),
        [(0, 0, 0), (0, 2, 0), (1, 0, 0), (1, 1, 1), (2, 1, 4 / 3), (2, 2, 2)],
    )
    def test_harmonic_mean(self, concept: int, fluency: int, score: float) -> None:
        assert Judgement(concept, fluency).score == pytest.approx(score)

    @pytest.mark.parametrize("given", [{}, {"score": 3}, {"score": -1}, {"score": 1.5}, {"score": "2"}, {"score": True},
                                       {"score": None}])  # fmt: skip
    def test_what_is_no_score(self, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="wanted"):
            parse_score(given)

    def test_a_concept_for_each_text(self) -> None:
        seen = []
        judge(["a", "b"], ["c", "d"], Scripted(lambda q: seen.append((part(q, "concept"), part(q, "text")))))
        assert seen[:4] == [("c", "a"), ("d", "b"), (None, "a"), (None, "b")]
        with pytest.raises(ValueError, match="concept: wanted one, or one for each of 2 texts, got 1"):
            judge(["a", "b"], ["c"], Scripted(lambda q: None))


def right(question: str) -> str:
    concept, text = part(question, "concept"), part(question, "text")
    item = next(item for item in gold_set() if item.text == text)
    return json.dumps({"score": (item.concept_scores if concept else item.fluency_scores)[0]})


class TestQualification:
    def test_gold_set(self) -> None:
        gold = gold_set()
        assert Counter(item.kind for item in gold) == dict.fromkeys(KINDS, 8)
        assert len({item.text for item in gold}) == 32
        for item in gold:
            assert set(item.concept_scores) | set(item.fluency_scores) <= {0, 1, 2}

    def test_a_right_judge_passes(self) -> None:
        found = qualify(Scripted(right))
        assert found.passed
        assert found.concept == found.fluency == dict.fromkeys(KINDS, 1.0)
        found.check()

    @pytest.mark.parametrize("score", [0, 1, 2])
    def test_one_answer_to_all_fails(self, score: int) -> None:
        found = qualify(Scripted(lambda q: json.dumps({"score": score})))
        assert len({kind for kind in KINDS if min(found.concept[kind], found.fluency[kind]) < 0.75}) >= 3
        with pytest.raises(ValueError, match=r"'scripted' does not qualify as a judge.*right on the"):
            found.check()

    def test_guessing_fails(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def guess(question: str) -> str:
            return json.dumps({"score": int(torch.randint(3, (), generator=generator))})

        for _ in range(5):
            assert not qualify(Scripted(guess)).passed

    def test_a_judge_that_likes_words_alone_fails(self) -> None:
        """Sees the concept where its words are, but takes any words for fluent."""
        found = qualify(Scripted(lambda q: right(q) if part(q, "concept") else '{"score": 2}'))
        assert not found.passed
        assert found.fluency == {"clean": 1, "off-topic": 1, "shuffled": 0, "looping": 0}
        assert all("fluency" in failure for failure in found.failures)

    def test_silence_is_not_right(self) -> None:
        found = qualify(
            Scripted(lambda q: None if "Saturn" in q or "Tuesday" in q or "onions" in q else right(q))
        )
        assert found.answered == pytest.approx(1 - 6 / 64)
        assert found.concept["clean"] == 5 / 8
        assert not found.passed
        silent = qualify(Scripted(lambda q: None))
        assert silent.answered == 0
        assert "gave 0% usable answers" in silent.failures[-1]


def label(index: int, text: str | None = "days", layer: int = 1) -> Label:
    return Label(layer, index, "input", text, text is not None, "scripted")


class TestSentences:
    GOOD = {"activating": ["Monday came .", "on Friday"], "neutral": ["the cat sat", "a red rug"]}  # noqa: RUF012

    def test_written_for_labels_with_a_text(self) -> None:
        def answer(question: str) -> str | None:
            return None if part(question, "concept") == "fails" else json.dumps(self.GOOD)

        labels = [label(0), label(1, None), label(2, "fails")]
        good, failed = write_sentences(labels, Scripted(answer), count=2)
        assert (good.index, good.activating, good.neutral) == (
            0,
            ("Monday came .", "on Friday"),
            ("the cat sat", "a red rug"),
        )
        assert (failed.index, failed.activating, failed.reason) == (2, (), "time-out")

    @pytest.mark.parametrize(
        "changed",
        [
            {"activating": ["one"]},
            {"activating": ["same", "same"]},
            {"activating": ["Same", "same"]},
            {"activating": ["A RED rug", "x"]},
            {"activating": ["a red rug", "x"]},
            {"activating": "Monday came ."},
            {"activating": ["a", 3]},
            {"activating": ["", "a"]},
            {"activating": ["…", "a"]},
            {"neutral": ["a", "x" * 401]},
            {"neutral": None},
        ],
    )
    def test_what_is_refused(self, changed: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="wanted"):
            parse_sentences({**self.GOOD, **changed}, 2)

    def test_too_many_are_cut(self) -> None:
        assert parse_sentences({**self.GOOD, "neutral": list("abcdef")}, 2)[1] == ("a", "b")


class Factors:
    """One feature for each column of Z, whose coefficients are the activations themselves."""

    neuron_scale: torch.Tensor | None = None

    def __init__(self, Z: torch.Tensor) -> None:
        self.Z = Z

    def encode(self, A: torch.Tensor) -> Any:
        self.Y = (self.Z.T @ A).relu()
        return self


class TestDetection:
    DAYS = Sentences(1, 0, "days", ("on Monday the cat ran", "not on Monday ."), ("the cat sat", "a red rug"))

    @pytest.fixture
    def planted(self, make_model: Maker) -> tuple[LanguageModel, Factors]:
        """Feature 0 is the part of Monday's activations that other tokens lack, 1 its negative, 2 silent."""
        model = make_model()
        texts = ["on Monday the cat ran", "not on Monday .", "the cat sat", "a red rug"]
        store = collect(
            model, [Sample(str(i), t) for i, t in enumerate(texts)], 1, sink_threshold=None, progress=False
        )
        rows, monday = store.layer(1), store.tokens(1) == VOCABULARY.index("Monday")
        direction = torch.linalg.lstsq(rows, monday.float()[:, None]).solution[:, 0]
        return model, Factors(torch.stack([direction, -direction, torch.zeros_like(direction)], 1))

    @pytest.mark.parametrize("scoring", ["encode", "cosine"])
    def test_planted_feature_is_found_and_its_negative_is_not(
        self, planted: tuple[LanguageModel, Factors], scoring: Any
    ) -> None:
        model, factors = planted
        entries = [Sentences(1, i, "days", self.DAYS.activating, self.DAYS.neutral) for i in range(3)]
        failed = Sentences(1, 2, "x", (), (), "time-out")
        other_layer = Sentences(2, 0, "x", ("a",), ("b",))
        result = detect_sentences(factors, model, 1, [*entries, failed, other_layer], scoring=scoring)
        assert result.index.tolist() == [0, 1, 2]
        assert result.scores[0] > 1
        # Silent on all sentences: 0, which is not above 0.
        assert result.scores[2] == 0
        assert result.share_above_zero == pytest.approx(float((result.scores > 0).double().mean()))
        assert result.scores[1] < result.scores[0]
        assert result.missing == pytest.approx(1 / 4)
        low, high = result.interval
        assert 0 <= low <= result.share_above_zero <= high <= 1
        again = detect_sentences(factors, model, 1, [*entries, failed], scoring=scoring)
        assert again.interval == result.interval

    def test_cosines_are_taken_in_the_units_of_the_fit(self, planted: tuple[LanguageModel, Factors]) -> None:
        model, factors = planted
        scale = torch.rand(len(factors.Z), generator=torch.Generator().manual_seed(0)) + 0.5
        factors.neuron_scale = scale
        texts = (*self.DAYS.activating, *self.DAYS.neutral)
        store = collect(model, [Sample(str(i), t) for i, t in enumerate(texts)], 1, progress=False)
        cosines = torch.cosine_similarity(store.layer(1) / scale, (factors.Z[:, 0] / scale)[None]).clamp(
            min=0
        )
        largest = torch.stack([cosines[store.samples(1) == i].amax() for i in range(4)])
        wanted = concept_detection_score(largest[:2], largest[2:])
        result = detect_sentences(factors, model, 1, [self.DAYS], scoring="cosine")
        assert float(result.scores) == pytest.approx(float(wanted), rel=1e-5)

    def test_random_groups_meet_the_same_sentences(self, planted: tuple[LanguageModel, Factors]) -> None:
        model, factors = planted
        entries = [Sentences(1, i, "days", self.DAYS.activating, self.DAYS.neutral) for i in range(3)]
        shares = set()
        for seed in range(6):
            groups = Factors(random_groups(factors, seed=seed).vectors.T)  # type: ignore[arg-type]
            wanted = detect_sentences(groups, model, 1, entries, scoring="cosine").share_above_zero
            result = detect_sentences(factors, model, 1, entries, seed=seed)
            assert result.random_above_zero == pytest.approx(wanted)
            shares.add(wanted)
        assert len(shares) > 1

    def test_swapped_sentences_change_the_sign(self, planted: tuple[LanguageModel, Factors]) -> None:
        model, factors = planted
        swapped = Sentences(1, 0, "days", self.DAYS.neutral, self.DAYS.activating)
        there = detect_sentences(factors, model, 1, [self.DAYS])
        back = detect_sentences(factors, model, 1, [swapped])
        assert float(there.scores) == pytest.approx(-float(back.scores))
        # One of one says little.
        assert there.interval == (pytest.approx(0.207, abs=1e-3), 1)

    def test_all_missing(self, planted: tuple[LanguageModel, Factors]) -> None:
        result = detect_sentences(planted[1], planted[0], 1, [Sentences(1, 0, "x", (), (), "time-out")])
        assert result.missing == 1
        assert len(result.scores) == 0
        assert result.share_above_zero != result.share_above_zero
        assert result.random_above_zero != result.random_above_zero

    def test_arguments(self, planted: tuple[LanguageModel, Factors]) -> None:
        model, factors = planted
        for sentences, options, message in (
            ([self.DAYS], {"scoring": "dot"}, "scoring: wanted 'encode' or 'cosine'"),
            ([], {}, "wanted some of layer 1, got none"),
            ([Sentences(1, 3, "x", ("a",), ("b",))], {}, "there are features 0-2, got 3"),
        ):
            with pytest.raises(ValueError, match=message):
                detect_sentences(factors, model, 1, sentences, **options)
        with pytest.raises(ValueError, match="wanted Z with 24 rows for layer 1, got 5"):
            detect_sentences(Factors(torch.ones(5, 3)), model, 1, [self.DAYS])


def test_bootstrap_interval() -> None:
    """Of 100 values, 70 of them 1, the normal approximation gives 0.70 ± 0.09."""
    low, high = bootstrap_mean(torch.tensor([1.0] * 70 + [0.0] * 30))
    assert low == pytest.approx(0.61, abs=0.02)
    assert high == pytest.approx(0.79, abs=0.02)
    assert bootstrap_mean(torch.ones(5)) == (1.0, 1.0)
