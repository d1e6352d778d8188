from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from snmf_interp import ActivationStore, LanguageModel, Sample, collect, describe, features
from snmf_interp.concepts import average_precision, chance_precision, text_maxima, text_scores
from snmf_interp.features import mean_active, read_features, visible, with_names, write_features
from snmf_interp.labels import Label
from snmf_interp.words import Word

from .conftest import VOCABULARY

Maker = Callable[..., LanguageModel]
MONDAY, TUESDAY, RED, CAT = (VOCABULARY.index(word) for word in ("Monday", "Tuesday", "red", "cat"))


@dataclass
class Factors:
    """What describe() reads of a factorisation."""

    Z: torch.Tensor
    Y: torch.Tensor
    neuron_scale: torch.Tensor | None = None


@pytest.fixture
def store(make_model: Maker, samples: list[Sample]) -> ActivationStore:
    return collect(make_model(), samples, 1, sink_threshold=None)


@pytest.fixture
def planted(make_model: Maker, store: ActivationStore) -> tuple[LanguageModel, Factors]:
    """Feature 0 fires on Monday (3, 2.5) and Tuesday (1), feature 1 weakly on red, 2 is dead.

    Feature 0 has neurons 5 and 7; neuron 5 writes along the unembedding of Friday.
    """
    model = make_model()
    tokens = store.tokens(1)
    Y = torch.zeros(3, len(tokens))
    Y[0, tokens == MONDAY] = torch.tensor([3.0, 2.5])
    Y[0, tokens == TUESDAY] = torch.tensor([1.0, 0.0])
    Y[1, tokens == RED] = 0.5
    Y[1, tokens == CAT] = 0.001
    Z = torch.zeros(24, 3)
    Z[5, 0], Z[7, 0] = 4.0, -3.0
    Z[2, 1] = 2.0
    with torch.no_grad():
        # Neuron 5 alone writes, along the unembedding row of Friday; the others write nothing.
        down = model.down_weight(1)
        down.zero_()
        friday = VOCABULARY.index("Friday")
        model.model.lm_head.weight.copy_(torch.linspace(-0.5, 0.5, len(VOCABULARY))[:, None].expand(-1, 16))
        direction = torch.ones(16)
        direction[8:] = -1
        model.model.lm_head.weight[friday] = direction
        model.model.lm_head.weight[CAT] = -direction
        down[:, 5] = direction
    return model, Factors(Z, Y)


def test_planted_feature(planted: tuple[LanguageModel, Factors], store: ActivationStore) -> None:
    model, factors = planted
    monday, red, dead = describe(factors, store, model, 1, n_words=3)
    assert [t.token.strip() for t in monday.tokens] == ["Monday", "Monday", "Tuesday"]
    # strength is y · ‖z‖, and ‖z‖ is 5.
    assert [t.strength for t in monday.tokens] == pytest.approx([15.0, 12.5, 5.0])
    assert all(t.share == pytest.approx(1) for t in monday.tokens)
    first = monday.tokens[0]
    assert (first.before.strip(), first.after.strip()) == ("on", "the cat ran")
    assert (first.sample, first.position, first.label, first.token_id) == ("days/0", 2, "days", MONDAY)
    assert monday.neurons == ((5, pytest.approx(0.8)), (7, pytest.approx(-0.6)))
    assert monday.n_neurons == 2
    assert monday.promoted[0][0].strip() == "Friday"
    assert monday.suppressed[0][0].strip() == "cat"
    # Two live features cannot stand out from each other.
    assert monday.distinctive == ()
    n = len(store.tokens(1))
    assert (monday.n_firing, monday.n_strong) == (3, 3)
    # It fires on the cat, at less than a tenth of its coefficient on red, where it is strong.
    n_cat, n_red = (int((store.tokens(1) == token).sum()) for token in (CAT, RED))
    assert (red.n_firing, red.n_strong) == (n_cat + n_red, n_red)
    assert (red.firing_share, red.strong_share) == (
        pytest.approx((n_cat + n_red) / n), pytest.approx(n_red / n)
    )  # fmt: skip
    assert (dead.n_firing, dead.n_strong) == (0, 0)
    assert mean_active(factors) == pytest.approx((3 + n_cat + n_red) / n)  # type: ignore[arg-type]
    assert monday.distinct_tokens == pytest.approx(2 / 3)
    total = 25 * (9 + 6.25 + 1) + 4 * (2 * 0.25 + 4e-6)
    assert monday.energy == pytest.approx(25 * 16.25 / total, rel=1e-4)
    assert red.tokens[0].token.strip() == "red"
    assert (dead.tokens, dead.neurons, dead.energy, dead.clarity, dead.concept) == ((), (), 0.0, 0.0, None)


def test_distinctive_words(make_model: Maker, store: ActivationStore) -> None:
    """A token that every direction promotes is no feature's own, neither beside the others nor beside random groups."""
    model = make_model()
    friday, red, cat, common = (VOCABULARY.index(word) for word in ("Friday", "red", "cat", "the"))
    with torch.no_grad():
        model.down_weight(1).zero_()
        model.model.lm_head.weight.zero_()
        # Neuron i writes coordinate i, and each of three tokens reads one; "the" reads all of them, strongly.
        for neuron, token in enumerate((friday, red, cat)):
            model.down_weight(1)[neuron, neuron] = 1
            model.model.lm_head.weight[token, neuron] = 1
        model.model.lm_head.weight[common, :3] = 5
    Z = torch.zeros(24, 3)
    Z[[0, 1, 2], [0, 1, 2]] = 1
    found = describe(Factors(Z, torch.rand(3, len(store.tokens(1)))), store, model, 1, n_words=2)
    assert [feature.distinctive[0][0].strip() for feature in found] == ["Friday", "red", "cat"]
    assert (
        describe(Factors(Z, torch.rand(3, len(store.tokens(1)))), store, model, 1, indices=[1], n_words=2)[
            0
        ].distinctive
        == found[1].distinctive
    )


def test_concept(planted: tuple[LanguageModel, Factors], store: ActivationStore) -> None:
    model, factors = planted
    monday, *_ = describe(factors, store, model, 1)
    assert monday.concept == "days"
    # Three of the four texts come first (3, 2.5, 1); the fourth, with 0, ties with the other eight.
    assert monday.concept_precision == pytest.approx((3 + 4 / 12) / 4)
    assert monday.clarity == monday.concept_precision > monday.chance_precision > 0


def test_no_concept_below_chance(make_model: Maker, samples: list[Sample], store: ActivationStore) -> None:
    """Features that have nothing to do with the labels have none, and are ordered by their words."""
    model, n = make_model(), len(store.tokens(1))
    generator = torch.Generator().manual_seed(2)
    factors = Factors(torch.rand(24, 6, generator=generator), torch.rand(6, n, generator=generator))
    for feature in describe(factors, store, model, 1):
        assert (feature.concept, feature.concept_precision) == (None, 0.0)
        assert feature.chance_precision > 0.4
        assert feature.clarity == feature.word_clarity


def test_chance_is_asked_of_each_feature(
    planted: tuple[LanguageModel, Factors], store: ActivationStore
) -> None:
    """One feature with a concept gives none to the others of its layer."""
    model, factors = planted
    generator = torch.Generator().manual_seed(2)
    n_random, n = 5, factors.Y.shape[1]
    Z = torch.cat([factors.Z[:, :1], torch.rand(24, n_random, generator=generator)], 1)
    labels = store.corpus.labels
    perfect = torch.tensor([float(labels[text] == "days") for text in store.samples(1).tolist()])
    Y = torch.cat([perfect[None], torch.rand(n_random, n, generator=generator)])
    days, *others = describe(Factors(Z, Y), store, model, 1)
    assert days.concept == "days"
    assert [(other.concept, other.concept_precision, other.clarity) for other in others] == [
        (None, 0.0, 0.0)
    ] * n_random


@pytest.mark.parametrize("label", ["x", None])
def test_labels_that_say_nothing(
    planted: tuple[LanguageModel, Factors], samples: list[Sample], label: str | None
) -> None:
    """One for all texts, or one for each: every feature has an average precision of 1, and so has chance."""
    model, factors = planted
    relabelled = [replace(sample, label=label or f"text {i}") for i, sample in enumerate(samples)]
    store = collect(model, relabelled, 1, sink_threshold=None)
    for feature in describe(factors, store, model, 1):
        assert (feature.concept, feature.concept_precision, feature.chance_precision) == (None, 0.0, 1.0)


def test_clarity_without_labels(planted: tuple[LanguageModel, Factors], samples: list[Sample]) -> None:
    model, factors = planted
    store = collect(model, [replace(sample, label=None) for sample in samples], 1, sink_threshold=None)
    monday = describe(factors, store, model, 1)[0]
    assert (monday.concept, monday.chance_precision) == (None, 0.0)
    assert monday.clarity == monday.word_clarity


def word(text: str, z: float) -> Word:
    return Word(text, z, True)


def test_clarity_wants_several_content_words() -> None:
    """Function words and marks say nothing; a second and third word must stand out too."""
    assert features._word_clarity([word("the", 9.0), word(".", 9.0), word("of", 5.0)]) == 0
    one, three = [word("wasp", 6.0)], [word("wasp", 6.0), word("bee", 6.0), word("ant", 6.0)]
    assert features._word_clarity(three) == pytest.approx(6 / (6 + 3.5))
    assert features._word_clarity(one) == pytest.approx(2 / (2 + 3.5))
    assert features._word_clarity([*three, word("the", 20.0)]) == features._word_clarity(three)
    assert features._word_clarity([]) == 0


def test_names(planted: tuple[LanguageModel, Factors], store: ActivationStore) -> None:
    """Words that stand out, without stop words; else content words of the tokens; else the tokens as such."""
    token = describe(planted[1], store, planted[0], 1)[0].tokens[0]
    tokens = [replace(token, before="", token=text, after="") for text in (" the", " wasp", " of")]
    assert features._name(tokens, [word("the", 9.0), word("bee", 5.0)]) == "bee"
    assert features._name(tokens, []) == "wasp"
    assert features._name(tokens[::2], [word("the", 9.0)]) == "‹the› ‹of›"
    # A feature of two function words is of these, whatever stands beside them.
    assert (
        features._name(tokens[:1] * 12 + tokens[2:] * 8 + tokens[1:2] * 5, [word("bee", 5.0)]) == "‹the› ‹of›"
    )
    named = describe(planted[1], store, planted[0], 1)
    label = Label(1, 0, "input", "days of the week", True, "judge")
    for useless in (
        replace(label, source="words"), replace(label, side="output"), replace(label, text=None, clear=False)
    ):  # fmt: skip
        assert with_names(named, [useless]) == named
    first, *rest = with_names(named, [label])
    assert (first.name, first.named_by) == ("days of the week", "judge")
    assert rest == named[1:]


def test_one_per_text(make_model: Maker) -> None:
    model = make_model()
    store = collect(model, [Sample("0", "cat cat cat"), Sample("1", "cat")], 0, sink_threshold=None)
    factors = Factors(torch.ones(24, 1), torch.tensor([[1.0, 3.0, 2.0, 0.5]]))
    assert [t.position for t in describe(factors, store, model, 0)[0].tokens] == [2, 1]
    every = describe(factors, store, model, 0, one_per_text=False)[0]
    assert [t.position for t in every.tokens] == [2, 3, 1, 1]
    assert len(describe(factors, store, model, 0, n_tokens=1)[0].tokens) == 1


def test_window(make_model: Maker) -> None:
    model = make_model()
    store = collect(model, [Sample("0", "one two three the cat")], 0, sink_threshold=None)
    factors = Factors(torch.ones(24, 1), torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]]))
    token = describe(factors, store, model, 0, window=1)[0].tokens[0]
    assert (token.before.strip(), token.token.strip(), token.after.strip()) == ("two", "three", "the")
    assert (token.cut_before, token.cut_after) == (True, True)
    token = describe(factors, store, model, 0, window=9)[0].tokens[0]
    # The start token is structure, and not shown.
    assert (token.before.strip(), token.after.strip()) == ("one two", "the cat")
    assert (token.cut_before, token.cut_after) == (False, False)


def test_numpy_factors_and_indices(planted: tuple[LanguageModel, Factors], store: ActivationStore) -> None:
    model, factors = planted
    numpy = Factors(factors.Z.numpy(), factors.Y.numpy())  # type: ignore[arg-type]
    everything = describe(factors, store, model, 1)
    assert describe(numpy, store, model, 1, indices=[1, 0]) == [everything[1], everything[0]]


def test_wrong_factors(planted: tuple[LanguageModel, Factors], store: ActivationStore) -> None:
    model, factors = planted
    with pytest.raises(
        ValueError, match=r"factors: wanted Z with 24 rows and Y with 55 columns.*fit store\.layer\(1\)"
    ):
        describe(Factors(factors.Z, factors.Y[:, 1:]), store, model, 1)
    with pytest.raises(ValueError, match="there are features 0-2, got 3"):
        describe(factors, store, model, 1, indices=[3])


def test_file(planted: tuple[LanguageModel, Factors], store: ActivationStore, tmp_path: Path) -> None:
    model, factors = planted
    described = describe(factors, store, model, 1)
    path = tmp_path / "features.jsonl"
    write_features(path, described)
    assert read_features(path) == described
    assert json.loads(path.read_text().split("\n")[0])["tokens"][0]["token"].strip() == "Monday"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"features\.jsonl is damaged"):
        read_features(path)


def test_pieces_of_words_and_characters(
    planted: tuple[LanguageModel, Factors], store: ActivationStore
) -> None:
    token = describe(planted[1], store, planted[0], 1)[0].tokens[0]
    assert replace(token, before="in Lis", token="bon", after=" was").word == "Lisbon"
    assert replace(token, before="in", token=" Lis", after="bon was").word == "Lisbon"
    assert replace(token, before="1", token="7", after="10.").word == "1710"
    assert replace(token, before="end", token=".", after="Then").word == "."
    assert replace(token, before="in", token=" ", after="1710, or").word == "1710"
    assert replace(token, before="in", token=" ", after=", or").word == ""
    assert replace(token, before="a", token="\n", after="The").word == ""
    assert replace(token, before="हि", token="न्", after="दी में").word == "हिन्दी"


def test_visible() -> None:
    assert visible("a\nb\tc\u200b\u00a0é") == "a\\nb\\tc\\u200b\\u00a0é"
    for joined in ("می\u200cخواهم", "👨\u200d👩\u200d👧", "❤\ufe0f"):
        assert visible(joined) == joined


class TestAveragePrecision:
    def test_against_the_definition(self) -> None:
        """Plain Python on random scores with many ties and some texts without label."""
        generator = torch.Generator().manual_seed(3)
        scores = torch.randint(0, 6, (4, 40), generator=generator).float()
        labels = [None if i % 7 == 0 else "abc"[i % 3] for i in range(40)]
        names, result = average_precision(scores, labels)
        assert names == ["a", "b", "c"]
        for row in range(4):
            for column, name in enumerate(names):
                known = [(float(scores[row, i]), label) for i, label in enumerate(labels) if label]
                shares = []
                for score, label in known:
                    if label == name:
                        above = [other for value, other in known if value >= score]
                        shares.append(above.count(name) / len(above))
                assert float(result[row, column]) == pytest.approx(sum(shares) / len(shares))

    def test_order_of_the_corpus_does_not_matter(self) -> None:
        scores = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        labels = ["a", "a", "b", "b"]
        straight = average_precision(scores, labels)[1]
        backwards = average_precision(scores.flip(1), labels[::-1])[1]
        torch.testing.assert_close(straight, backwards)

    def test_perfect_and_chance(self) -> None:
        labels = [label for label in "abcdefgh" for _ in range(12)]
        scores = torch.stack(
            [torch.tensor([float(label == other) for label in labels]) for other in "abcdefgh"]
        )
        assert average_precision(scores, labels)[1].diagonal().tolist() == [1.0] * 8
        chance = chance_precision(scores, labels)
        assert 1 / 8 < chance < 0.5
        # The same on every call, and of more features higher.
        assert chance_precision(scores, labels) == chance
        assert chance_precision(scores[:1], labels) < chance

    def test_text_scores(self) -> None:
        Y = torch.tensor([[1.0, 5.0, 2.0]])
        assert text_scores(Y, torch.tensor([0, 0, 2]), 4).tolist() == [[5.0, 0.0, 2.0, 0.0]]

    def test_text_maxima_come_in_parts(self) -> None:
        """Also of negative values, and of texts that a border divides."""
        values, text_of = torch.randn(3, 40), torch.arange(40) // 8 % 6
        text_of[text_of == 2] = 3
        expected = torch.stack(
            [values[:, text_of == t].amax(1) if t != 2 else torch.zeros(3) for t in range(5)], 1
        )
        for size in (1, 7, 40):
            assert torch.equal(text_maxima(values.split(size, 1), text_of, 5), expected)
        assert torch.equal(text_maxima([-values.abs()], text_of, 5) < 0, expected != 0)
