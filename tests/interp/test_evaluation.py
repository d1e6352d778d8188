from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu

import snmf_interp
import snmf_kernels
from snmf_interp import dictionaries, evaluation, text_groups
from snmf_interp.evaluation import (
    Detection,
    auroc,
    best_neurons,
    concept_detection_score,
    detection,
    evaluate_features,
    permuted_labels,
    random_directions,
    split_texts,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Detection, two: Detection) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True)
    )


class TestSplit:
    @pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
    def test_every_label_is_on_both_sides(self, fraction: float) -> None:
        sizes = {"a": 1, "b": 2, "c": 3, "d": 7, "e": 20, None: 9}
        labels = [label for label, size in sizes.items() for _ in range(size)]
        labels = [labels[i] for i in torch.randperm(len(labels), generator=generator(1)).tolist()]
        for seed in range(30):
            train = split_texts(labels, seed=seed, fraction=fraction)
            assert (train.dtype, train.shape) == (torch.bool, (len(labels),))
            assert torch.equal(train, split_texts(labels, seed=seed, fraction=fraction))
            for label, size in sizes.items():
                count = sum(int(t) for t, other in zip(train, labels, strict=True) if other == label)
                assert abs(count - fraction * size) < 1 or count == 1 or count == size - 1
                if size > 1:
                    assert 0 < count < size

    def test_no_half_and_no_text_is_favoured(self) -> None:
        labels = [str(i // 3) for i in range(900)]
        splits = torch.stack([split_texts(labels, seed=seed) for seed in range(40)]).double()
        # 12,000 groups of one or two training texts; standard error 0.0015.
        assert float(splits.mean()) == pytest.approx(0.5, abs=0.01)
        # Each place in a group, each single text.
        assert float((splits.reshape(-1, 3).mean(0) - 0.5).abs().max()) < 0.02
        assert float(splits.mean(0).min()) > 0.05
        assert float(splits.mean(0).max()) < 0.95
        alone = [bool(split_texts(["a"], seed=seed)[0]) for seed in range(40)]
        assert 10 < sum(alone) < 30

    def test_no_global_generator_is_touched(self) -> None:
        before = torch.get_rng_state()
        split_texts(["a"] * 9)
        assert torch.equal(torch.get_rng_state(), before)

    def test_equal_texts_stay_on_one_side(self) -> None:
        texts = [f"{'aAb'[i % 3]} text {i // 3} " for i in range(60)]
        groups = text_groups(texts)
        # Case does not tell texts apart: twenty of "b", twenty of "a" and as many of "A".
        assert len(groups.unique()) == 40
        labels = ["xy"[i // 3 % 2] for i in range(60)]
        for seed in range(20):
            train = split_texts(labels, groups=groups, seed=seed)
            sides = {(group, side) for group, side in zip(groups.tolist(), train.tolist(), strict=True)}
            assert len(sides) == 40
            # Half of the different ones of each label.
            for label in "xy":
                own = {g for g, one in zip(groups.tolist(), labels, strict=True) if one == label}
                assert sum(side for group, side in sides if group in own) == 10
        assert split_texts(["a", "a"], groups=text_groups(["one", "One "])).unique().numel() == 1

    def test_a_text_of_several_labels_is_on_one_side(self) -> None:
        texts = [f"{i}" for i in range(12)]
        labels: list[str | None] = [*(["a"] * 12), *(["b"] * 6), None]
        groups = text_groups([*texts, *texts[:5], "other", "3"])
        for seed in range(20):
            train = split_texts(labels, groups=groups, seed=seed)
            assert torch.equal(train[12:17], train[:5])
            assert bool(train[18]) == bool(train[3])
            assert int(train[:12].sum()) == 6

    def test_different_texts_are_divided_as_without_groups(self) -> None:
        labels = ["xyz"[i % 3] for i in range(31)]
        assert torch.equal(split_texts(labels, seed=3), split_texts(labels, seed=3, groups=torch.arange(31)))
        with pytest.raises(ValueError, match="groups: wanted a number for each of 31 texts, got 3"):
            split_texts(labels, groups=[0, 1, 2])

    def test_edges(self) -> None:
        assert split_texts([]).tolist() == []
        assert text_groups([]).tolist() == []
        for fraction in (0.0, 1.0, math.nan):
            with pytest.raises(ValueError, match="fraction: wanted a number between 0 and 1, got"):
                split_texts(["a", "a"], fraction=fraction)


def test_text_groups() -> None:
    """Case, spaces and Unicode form do not tell texts apart; what is equal over others is equal."""
    texts = ["a cat", "A  cat\n", "Straße", "STRASSE", "cafe\u0301", "caf\u00e9", "a dog"]
    assert text_groups(texts).tolist() == [0, 0, 2, 2, 4, 4, 6]
    assert text_groups(texts, [0, 1, 1, 2, 3, 4, 5]).tolist() == [0, 0, 0, 0, 4, 4, 6]


class TestAuroc:
    def test_against_mann_whitney(self) -> None:
        """Many ties, labels of different sizes, some texts without label."""
        scores = torch.randint(-2, 4, (5, 60), generator=generator(0)).float()
        labels = [None if i % 7 == 0 else "aabc"[i % 4] for i in range(60)]
        names, areas = auroc(scores, labels)
        assert names == ["a", "b", "c"]
        assert areas.dtype == torch.float64
        for row, ours in zip(scores.tolist(), areas.tolist(), strict=True):
            for name, area in zip(names, ours, strict=True):
                inside = [x for x, label in zip(row, labels, strict=True) if label == name]
                outside = [x for x, label in zip(row, labels, strict=True) if label not in (name, None)]
                wanted = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
                assert area == pytest.approx(wanted, abs=1e-12)

    def test_by_hand(self) -> None:
        labels = ["x", "x", "y", None, "y", "y"]
        scores = [
            [3, 2, 1, 9, 0, 1],  # perfect
            [0, 0, 1, 9, 2, 1],  # the wrong way round
            [5, 5, 5, 9, 5, 5],  # says nothing
            [4, 1, 1, 9, 2, 3],  # of six pairs 3 won, 2 lost and 1 tied
        ]
        for dtype in (torch.int64, torch.bfloat16, torch.float64):
            names, areas = auroc(torch.tensor(scores, dtype=dtype), labels)
            assert names == ["x", "y"]
            assert areas[:, 0].tolist() == pytest.approx([1, 0, 0.5, 3.5 / 6])
            # Of two labels, each is what the other is not.
            assert areas.sum(1).tolist() == pytest.approx([1] * 4)

    @pytest.mark.parametrize(
        ("scores", "labels", "message"),
        [
            (torch.zeros(2, 3), [None] * 3, "labels: wanted texts of at least two labels, got none"),
            (torch.zeros(2, 3), ["a", "a", None], "labels: wanted texts of at least two labels, got 'a'"),
            (torch.zeros(2, 3), ["a", "b"], r"scores: wanted \[k, 2\], a column for each .* got \[2, 3\]"),
            (torch.zeros(3), ["a", "b", "b"], r"scores: wanted \[k, 3\].* got \[3\]"),
            (
                torch.tensor([[0.0, 1.0], [0.0, math.nan]]),
                ["a", "b"],
                "scores: wanted finite numbers, got inf or nan in row 1",
            ),
            (torch.tensor([[math.inf, 1.0]]), ["a", "b"], "scores: wanted finite numbers"),
        ],
    )
    def test_errors(self, scores: torch.Tensor, labels: list[str | None], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            auroc(scores, labels)


class TestDetection:
    def test_only_the_training_half_chooses(self) -> None:
        """The best training feature is the worst held-out one, and the other way round."""
        labels = ["a", "a", "a", "b", "b", "b"]
        train = torch.tensor([[3, 3, 3, 0, 0, 0], [3, 0, 3, 0, 2, 0], [0, 0, 0, 3, 3, 3]]).float()
        test = torch.tensor([[0, 0, 0, 3, 3, 3], [3, 3, 3, 0, 0, 0], [3, 3, 3, 0, 0, 0]]).float()
        found = detection(train, labels, test, labels)
        assert found.names == ("a", "b")
        assert found.feature.tolist() == found.probe_feature.tolist() == [0, 2]
        assert found.train_auroc.tolist() == found.probe_train_accuracy.tolist() == [1, 1]
        assert found.auroc.tolist() == found.probe_accuracy.tolist() == [0, 0]
        assert found.probe_threshold.tolist() == [1.5, 1.5]
        assert (found.mean_auroc, found.mean_probe_accuracy, found.share_above()) == (0, 0, 0)
        # Without the two that deceive, the mediocre feature is what there is for a.
        honest = detection(train[1:2], labels, test[1:2], labels)
        assert honest.auroc.tolist() == [1, 0]
        assert honest.train_auroc.tolist() == pytest.approx([7 / 9, 2 / 9])
        assert (honest.mean_auroc, honest.share_above(), honest.share_above(1.0)) == (0.5, 0.5, 0)

    def test_probe_by_hand(self) -> None:
        """Two thirds of a's texts and one of four others are above 6: the best that is to be had."""
        labels = ["a", "a", "a", "b", "b", "c", "c", None]
        train = torch.tensor([[9.0, 7, 1, 8, 5, 2, 0, 6]])
        test = torch.tensor([[6.5, 6.0, 3, 6, 7, 0, 0, 99]])
        found = detection(train, labels, test, labels)
        assert float(found.probe_threshold[0]) == 6
        assert float(found.probe_train_accuracy[0]) == pytest.approx((2 / 3 + 3 / 4) / 2)
        # 6 is not above 6.
        assert float(found.probe_accuracy[0]) == pytest.approx((1 / 3 + 3 / 4) / 2)

    def test_probe_against_all_probes(self) -> None:
        """Every feature and every threshold, in plain Python, on scores with many ties."""
        scores = torch.randint(0, 9, (4, 40), generator=generator(5)).double()
        labels = ["aabc"[int(i)] for i in torch.randint(0, 4, (40,), generator=generator(6))]
        found = detection(scores, labels, scores, labels)
        for i, name in enumerate(found.names):
            probes = []
            for feature, row in enumerate(scores.tolist()):
                values = sorted(set(row))
                for threshold in [(low + high) / 2 for low, high in pairwise(values)]:
                    above = [score > threshold for score in row]
                    hits = [a for a, label in zip(above, labels, strict=True) if label == name]
                    alarms = [a for a, label in zip(above, labels, strict=True) if label != name]
                    accuracy = (sum(hits) / len(hits) + 1 - sum(alarms) / len(alarms)) / 2
                    probes.append((round(accuracy, 12), -feature, threshold))
            best = max(probes)
            assert best[0] > 0.5
            assert (-best[1], best[2]) == (int(found.probe_feature[i]), float(found.probe_threshold[i]))
            assert best[0] == pytest.approx(float(found.probe_train_accuracy[i]))
            assert best[0] == pytest.approx(float(found.probe_accuracy[i]))

    def test_ties(self) -> None:
        labels = ["a", "a", "b", "b"]
        # Feature 1 and its copy are best. Above 2.5 or above 0.5, a's share exceeds b's by one half.
        scores = torch.tensor([[0.0, 0, 1, 1], [3, 1, 2, 0], [3, 1, 2, 0]])
        found = detection(scores, labels, scores, labels)
        assert (found.feature.tolist(), found.probe_feature.tolist()) == ([1, 0], [1, 0])
        assert found.probe_threshold.tolist() == [2.5, 0.5]

    def test_threshold_between_neighbouring_floats(self) -> None:
        low = 1 + 2**-52
        high = math.nextafter(low, 2)
        assert (low + high) / 2 == high, "their middle rounds up"
        scores = torch.tensor([[high, low]], dtype=torch.float64)
        found = detection(scores, ["a", "b"], scores, ["a", "b"])
        assert float(found.probe_accuracy[0]) == 1

    def test_useless_features(self) -> None:
        """A constant, and one that is only ever lower on the concept: nothing is detected, nothing claimed."""
        scores = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 2]])
        found = detection(scores, ["a", "a", "b", "c"], scores, ["a", "a", "b", "c"])
        assert float(found.train_auroc[0]) == float(found.auroc[0]) == 0.5
        assert float(found.probe_threshold[0]) == math.inf
        assert float(found.probe_train_accuracy[0]) == float(found.probe_accuracy[0]) == 0.5

    def test_labels_of_one_half_only(self) -> None:
        """No concept of their own, but among the others that a concept is told from."""
        train = torch.tensor([[2.0, 1, 3, 0]])
        test = torch.tensor([[2.0, 1, 3, 0, 9]])
        found = detection(train, ["b", "c", "a", None], test, ["b", "c", "d", "d", None])
        assert found.names == ("b", "c")
        assert found.train_auroc.tolist() == [0.5, 0]
        assert found.auroc.tolist() == pytest.approx([2 / 3, 1 / 3])

    def test_chance(self) -> None:
        """Noise: the best of 50 looks good on the texts that chose it and says nothing about the others."""
        labels = [str(i // 10) for i in range(300)]
        found = detection(
            torch.rand(50, 300, generator=generator(1)),
            labels,
            torch.rand(50, 300, generator=generator(2)),
            labels,
        )
        assert float(found.train_auroc.min()) > 0.6
        assert float(found.probe_train_accuracy.min()) > 0.6
        # Standard errors 0.017 and, as the threshold is noise too, about as much.
        assert found.mean_auroc == pytest.approx(0.5, abs=0.06)
        assert found.mean_probe_accuracy == pytest.approx(0.5, abs=0.06)

    def test_errors(self) -> None:
        ok, labels = torch.zeros(2, 2), ["a", "b"]
        for arguments, message in (
            ((torch.zeros(2, 3), labels, ok, labels), "train_scores: wanted"),
            ((ok, labels, ok, ["a", "b", "c"]), "test_scores: wanted"),
            ((ok, labels, ok / 0, labels), "test_scores: wanted finite"),
            ((ok, labels, ok, ["a", None]), "test_labels: wanted texts of at least two labels, got 'a'"),
            ((ok, [None, None], ok, labels), "train_labels: wanted"),
            ((ok, labels, ok, ["c", "d"]), "test_labels: wanted a label that train_labels has too, got 'c'"),
            ((ok, labels, ok[:1], labels), "test_scores: wanted as many features .* got 1 and 2"),
            ((ok[:0], labels, ok[:0], labels), "test_scores: .* at least one, got 0 and 0"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                detection(*arguments)


CONCEPTS = "abcdefgh"
TOKENS = 3


@dataclasses.dataclass
class Planted:
    """Eight concepts of 12 texts: one token of each text has the concept's four neurons of 200, all have noise."""

    activations: torch.Tensor
    text_of: torch.Tensor
    labels: list[str | None]
    train: torch.Tensor
    factors: snmf_kernels.Factorization

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.factors, self.activations, self.text_of, self.labels, self.train


@pytest.fixture(scope="module")
def planted() -> Planted:
    n_texts = 12 * len(CONCEPTS)
    order = torch.randperm(n_texts, generator=generator(1))
    labels: list[str | None] = [CONCEPTS[int(i) // 12] for i in order]
    text_of = torch.arange(n_texts).repeat_interleave(TOKENS)
    activations = 0.2 * torch.randn(len(text_of), 200, generator=generator(2))
    places = torch.randint(0, TOKENS, (n_texts,), generator=generator(3))
    for text, label in enumerate(labels):
        first = 4 * CONCEPTS.index(str(label))
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
        activations[text * TOKENS + int(places[text]), first : first + 4] += signs
    train = split_texts(labels)
    rows = activations[train[text_of]]
    factors = snmf_kernels.fit(rows.T, len(CONCEPTS) + 4, keep=0.02, init="svd", neuron_scale="rms")
    return Planted(activations, text_of, labels, train, factors)


class TestEvaluateFeatures:
    def test_planted_concepts_are_found(self, planted: Planted) -> None:
        found = evaluate_features(*planted.arguments)
        assert found.names == tuple(CONCEPTS)
        assert found.mean_auroc > 0.95
        assert found.mean_probe_accuracy > 0.9
        assert len(set(found.feature.tolist())) == len(CONCEPTS)
        for i, feature in enumerate(found.feature.tolist()):
            neurons = planted.factors.Z[:, feature].nonzero().squeeze(1).tolist()
            assert neurons == list(range(4 * i, 4 * i + 4))

    def test_both_halves_come_from_the_encoder(self, planted: Planted) -> None:
        """What the solver left in Y, for the training tokens, plays no part."""
        factors = dataclasses.replace(planted.factors, Y=torch.rand(planted.factors.Y.shape))
        found = evaluate_features(factors, *planted.arguments[1:])
        assert same(found, evaluate_features(*planted.arguments))

    def test_it_is_detection_of_encoded_texts(self, planted: Planted) -> None:
        """Against the definition: each half encoded alone, the maximum over a text's tokens in plain Python."""
        halves = []
        for texts in (planted.train, ~planted.train):
            Y = torch.as_tensor(planted.factors.encode(planted.activations[texts[planted.text_of]].T).Y)
            scores = Y.unflatten(1, (-1, TOKENS)).amax(2)
            halves += [scores, [planted.labels[i] for i in texts.nonzero().squeeze(1).tolist()]]
        wanted, found = detection(*halves), evaluate_features(*planted.arguments)
        assert found.feature.tolist() == wanted.feature.tolist()
        torch.testing.assert_close(found.auroc, wanted.auroc, atol=1e-2, rtol=0)
        torch.testing.assert_close(found.probe_threshold, wanted.probe_threshold, atol=1e-3, rtol=1e-3)

    def test_numpy_factors_and_bfloat16(self, planted: Planted) -> None:
        factors = dataclasses.replace(
            planted.factors,
            **{name: getattr(planted.factors, name).numpy() for name in ("Z", "Y", "neuron_scale")},
        )
        for function in (evaluate_features, permuted_labels, random_directions):
            assert same(function(factors, *planted.arguments[1:]), function(*planted.arguments))
            half = function(factors, planted.activations.bfloat16(), *planted.arguments[2:])
            assert half.mean_auroc == pytest.approx(function(*planted.arguments).mean_auroc, abs=0.05)

    def test_errors(self, planted: Planted) -> None:
        good = dict(
            zip(("factors", "activations", "text_of", "labels", "train"), planted.arguments, strict=True)
        )
        everything = dataclasses.replace(planted.factors, Y=torch.zeros(12, 288))
        broken = planted.activations.clone()
        broken[3, 4] = math.nan
        for wrong, message in (
            ({"factors": everything}, r"factors: wanted Y with 144 columns.*got 288; fit activations\[train"),
            ({"activations": planted.activations[:, 1:]}, "activations: wanted 200 columns.* got 199"),
            ({"activations": planted.activations[0]}, r"activations: wanted \[n, d\].*got \[200\]"),
            ({"activations": broken}, "activations: wanted finite"),
            ({"text_of": planted.text_of[1:]}, "text_of: wanted an int64 .* each of the 288 rows"),
            ({"text_of": planted.text_of.int()}, "text_of: wanted an int64 .* got torch.int32"),
            ({"text_of": planted.text_of + 1}, "text_of: wanted numbers of the 96 texts .* got 1 to 96"),
            ({"text_of": planted.text_of - 1}, "text_of: wanted numbers of the 96 texts .* got -1 to 94"),
            ({"train": planted.train[1:]}, "train: wanted a bool for each of the 96 texts"),
            ({"train": planted.train.long()}, "train: wanted a bool .* got torch.int64"),
            ({"labels": [None] * 96}, "train_labels: wanted texts of at least two labels"),
        ):
            for function in (evaluate_features, permuted_labels, random_directions):
                with pytest.raises(ValueError, match=f"^{message}"):
                    function(**(good | wrong))


class TestControls:
    def test_permuted_labels_say_nothing(self, planted: Planted) -> None:
        runs = [permuted_labels(*planted.arguments, seed=seed) for seed in range(10)]
        # Standard error 0.013 for ten runs together.
        assert sum(run.mean_auroc for run in runs) / 10 == pytest.approx(0.5, abs=0.05)
        assert all(float(run.train_auroc.mean()) > 0.6 for run in runs)
        assert same(runs[0], permuted_labels(*planted.arguments))
        assert not same(runs[0], runs[1])

    def test_labels_stay_in_their_half(self, planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[str | None]] = []
        monkeypatch.setattr(evaluation, "evaluate_features", lambda *arguments: seen.append(arguments[3]))
        labels = [None if i % 5 == 0 else label for i, label in enumerate(planted.labels)]
        permuted_labels(*planted.arguments[:3], labels, planted.train)
        assert [label is None for label in seen[0]] == [label is None for label in labels]
        assert seen[0] != labels
        for half in (planted.train, ~planted.train):
            places = half.nonzero().squeeze(1).tolist()
            assert Counter(seen[0][i] for i in places) == Counter(labels[i] for i in places)

    def test_random_directions_find_less(self, planted: Planted) -> None:
        found = random_directions(*planted.arguments)
        assert found.names == tuple(CONCEPTS)
        assert found.mean_auroc < evaluate_features(*planted.arguments).mean_auroc - 0.2
        assert same(found, random_directions(*planted.arguments))
        assert not same(found, random_directions(*planted.arguments, seed=1))

    def test_random_directions_have_the_features_sizes(
        self, planted: Planted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Read off one-neuron tokens, of either sign because of the ReLU; each is a text of its own."""
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(evaluation, "halves", lambda scores, *_: seen.append(scores))
        # Several blocks of tokens, the last one short.
        monkeypatch.setattr(dictionaries, "_TOKENS", 7)
        Z = torch.zeros(200, 4)
        Z[:3, 1], Z[:, 2], Z[5:45, 3] = 1.0, -2.0, 1.0
        factors = dataclasses.replace(planted.factors, Z=Z, Y=torch.zeros(4, 0), neuron_scale=None)
        unit = torch.eye(200)
        everyone = torch.arange(400)
        random_directions(
            factors, torch.cat([unit, -unit]), everyone, ["x"] * 400, torch.zeros(400, dtype=torch.bool)
        )
        assert float(seen[0].min()) == 0
        values = seen[0][:, :200] - seen[0][:, 200:]
        assert (values != 0).sum(1).tolist() == [0, 3, 200, 40]
        assert values[1].nonzero().squeeze(1).tolist() != [0, 1, 2]
        assert float(values[2].mean()) == pytest.approx(0, abs=0.25 / math.sqrt(200))
        assert float(values[2].norm()) == pytest.approx(1)

    def test_random_directions_see_what_the_fit_saw(self, planted: Planted) -> None:
        """In other units for each neuron, with the neuron scale in the same units: the same result."""
        assert planted.factors.neuron_scale is not None
        units = 2.0 ** torch.randint(-6, 7, (200,), generator=generator(4))
        factors = dataclasses.replace(planted.factors, neuron_scale=planted.factors.neuron_scale * units)
        found = random_directions(factors, planted.activations * units, *planted.arguments[2:])
        assert same(found, random_directions(*planted.arguments))

    @pytest.mark.parametrize("block", [1, 7, 40, 256])
    def test_best_neurons(self, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against all neurons at once, on noise; every neuron has a copy, of which the lower one is meant."""
        monkeypatch.setattr(evaluation, "_NEURONS", block)
        noise = torch.randn(80 * TOKENS, 20, generator=generator(0))
        A = torch.cat([noise[:, 10:], -noise[:, :10], noise], 1)
        labels = [CONCEPTS[i % 8] for i in range(80)]
        train = split_texts(labels)
        scores = torch.stack([A, -A], 2).flatten(1).T.unflatten(1, (-1, TOKENS)).amax(2)
        halves = []
        for texts in (train, ~train):
            halves += [scores[:, texts], [labels[i] for i in texts.nonzero().squeeze(1).tolist()]]
        text_of = torch.arange(80).repeat_interleave(TOKENS)
        found = best_neurons(A, text_of, labels, train)
        assert same(found, detection(*halves))
        assert int(found.feature.max()) < 40
        assert found.feature.tolist() != found.probe_feature.tolist()

    def test_best_neurons_of_planted_concepts(self, planted: Planted) -> None:
        found = best_neurons(*planted.arguments[1:])
        assert found.mean_auroc > 0.95
        for i, feature in enumerate(found.feature.tolist()):
            # The planted neurons are up, down, up, down.
            assert feature in (8 * i, 8 * i + 3, 8 * i + 4, 8 * i + 7)

    def test_neurons_are_not_cut_at_zero(self) -> None:
        """All values negative, tokens out of order, and a text without tokens, which scores 0."""
        text_of = torch.tensor([3, 0, 1, 2, 3, 0, 5, 6, 7])
        values = torch.tensor([-8.0, -1, -7, -4, -6, -5, -1, -3, -5])
        labels = ["a", "b", "a", "b", "a", "a", "b", "b"]
        train = torch.tensor([True] * 4 + [False] * 4)
        found = best_neurons(values[:, None], text_of, labels, train)
        # The neuron's largest value in a's texts −1 and −4, in b's −7 and −6; its negative's 5, 4 and 7, 8.
        assert found.feature.tolist() == found.probe_feature.tolist() == [0, 1]
        assert found.train_auroc.tolist() == [1, 1]
        assert found.probe_threshold.tolist() == [-5, 6]
        # Held out: 0, as the text has no token, and −1; −3 and −5.
        assert found.auroc.tolist() == [1, 1]
        assert found.probe_accuracy.tolist() == [0.75, 0.5]
        positive = best_neurons(-values[:, None], text_of, labels, train)
        assert (positive.feature.tolist(), positive.train_auroc.tolist()) == ([1, 0], [1, 1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_best_neurons_of_any_dtype(self, planted: Planted, dtype: torch.dtype) -> None:
        A = planted.activations.bfloat16()
        assert same(
            best_neurons(A.to(dtype), *planted.arguments[2:]), best_neurons(A.float(), *planted.arguments[2:])
        )

    def test_best_neurons_errors(self, planted: Planted) -> None:
        with pytest.raises(ValueError, match=r"^activations: wanted finite"):
            best_neurons(planted.activations / 0, *planted.arguments[2:])
        with pytest.raises(ValueError, match=r"^activations: wanted .* neither of them 0"):
            best_neurons(planted.activations[:, :0], *planted.arguments[2:])


class TestConceptDetectionScore:
    def test_by_hand(self) -> None:
        activating = torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
        neutral = torch.tensor([[0.5, 0.25, 0.75], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
        score = concept_detection_score(activating, neutral, eps=0.5)
        assert score.dtype == torch.float64
        assert score.tolist() == pytest.approx([math.log(2.5), 0, math.log(0.2)])
        assert float(concept_detection_score(activating[0], neutral[0])) == pytest.approx(
            math.log(4), abs=1e-5
        )

    @pytest.mark.parametrize(
        ("activating", "neutral", "eps", "message"),
        [
            ([[1.0]], [[1.0], [1.0]], 1.0, r"neutral: wanted shape \[1, 'm2'\], got \[2, 1\]"),
            ([[]], [[1.0]], 1.0, "activating: wanted at least one score"),
            (1.0, [1.0], 1.0, "activating: wanted at least one score"),
            ([1.0], [-1.0], 2.0, "neutral: wanted finite scores with a mean of at least 0"),
            ([math.nan], [1.0], 1.0, "activating: wanted finite"),
            ([1.0], [math.inf], 1.0, "neutral: wanted finite"),
            ([1.0], [1.0], 0.0, "eps: wanted a number above 0, got 0.0"),
            ([1.0], [1.0], math.nan, "eps: wanted"),
        ],
    )
    def test_errors(self, activating: Any, neutral: Any, eps: float, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            concept_detection_score(torch.tensor(activating), torch.tensor(neutral), eps=eps)


def test_names_are_imported_on_first_use() -> None:
    for name in ("Detection", "best_neurons", "evaluate_features", "permuted_labels", "random_directions"):
        assert getattr(snmf_interp, name) is getattr(evaluation, name)
    assert snmf_interp.split_texts is split_texts
    code = "import sys, snmf_interp; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr
