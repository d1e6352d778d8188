from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import snmf_kernels
from snmf_interp import (
    NeuronIndex,
    Sample,
    collect,
    feature_neurons,
    nearest_by_coefficients,
    nearest_by_direction,
    nearest_by_neurons,
    pair_overlap,
)
from snmf_interp.provenance import common_tokens


def factors_of(Z: Tensor | Sequence[Sequence[float]], Y: Tensor | None = None) -> Any:
    Z = torch.as_tensor(Z)
    made = snmf_kernels.fit(torch.rand(len(Z), 8), 1, keep=1.0, max_iter=1)
    Y = torch.rand(Z.shape[1], 12, generator=torch.Generator().manual_seed(0)) if Y is None else Y
    return replace(made, Z=Z, Y=Y)


def sparse(d: int, k: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(d, k, generator=generator).argsort(0) < count
    return torch.randn(d, k, generator=generator) * support


class TestFeatureNeurons:
    def test_by_hand(self) -> None:
        factors = factors_of([[0.0], [3.0], [0.0], [-4.0]])
        found = feature_neurons(factors, 0)
        assert found.norm == 5
        assert [part.neuron for part in found.neurons] == [3, 1]
        assert [part.weight for part in found.neurons] == pytest.approx([-0.8, 0.6])
        assert [part.share for part in found.neurons] == pytest.approx([0.64, 0.36])
        assert [part.written for part in found.neurons] == [None, None]
        assert found.effective_neurons == pytest.approx(1 / (0.64**2 + 0.36**2))

    def test_shares_of_the_direction(self) -> None:
        """Neuron 1 writes (3, 0), neuron 3 (-1, 2): f = (2, 2), of which 6/8 and 2/8."""
        weight = torch.tensor([[9.0, 1.0, 9.0, 0.25], [9.0, 0.0, 9.0, -0.5]])
        parts = feature_neurons(factors_of([[0.0], [3.0], [0.0], [-4.0]]), 0, output_weight=weight).neurons
        assert [(part.neuron, part.written) for part in parts] == [(3, 0.25), (1, 0.75)]

    def test_shares_add_up(self) -> None:
        factors = factors_of(sparse(60, 5, 7))
        weight = torch.randn(16, 60, generator=torch.Generator().manual_seed(1))
        for feature in range(5):
            parts = feature_neurons(factors, feature, output_weight=weight).neurons
            assert {part.neuron for part in parts} == set(factors.Z[:, feature].nonzero().squeeze(1).tolist())
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert sum(part.written or 0 for part in parts) == pytest.approx(1)

    def test_dead_feature(self) -> None:
        found = feature_neurons(factors_of(torch.zeros(4, 1)), 0, output_weight=torch.ones(2, 4))
        assert (found.neurons, found.norm, found.effective_neurons) == ((), 0, 0)

    def test_refused(self) -> None:
        factors = factors_of(sparse(6, 2, 2))
        with pytest.raises(ValueError, match="there are features 0-1, got 2"):
            feature_neurons(factors, 2)
        with pytest.raises(ValueError, match=r"output_weight: wanted \[d_model, 6\], got \[3, 5\]"):
            feature_neurons(factors, 0, output_weight=torch.ones(3, 5))


class TestNeuronIndex:
    def test_is_the_reverse_of_the_supports(self) -> None:
        factors = {3: factors_of(sparse(40, 9, 6)), 5: factors_of(sparse(30, 4, 3, seed=1))}
        index = NeuronIndex.of(factors)
        for layer, of_layer in factors.items():
            counts = index.counts(layer)
            for neuron in range(len(of_layer.Z)):
                uses = index.uses(layer, neuron)
                assert {use.feature for use in uses} == {
                    j for j in range(of_layer.k) if of_layer.Z[neuron, j] != 0
                }
                assert len(uses) == counts[neuron]
                assert [abs(use.weight) for use in uses] == sorted(
                    (abs(u.weight) for u in uses), reverse=True
                )
                for use in uses:
                    parts = feature_neurons(of_layer, use.feature).neurons
                    assert parts[use.rank - 1].neuron == neuron
                    assert parts[use.rank - 1].weight == pytest.approx(use.weight)
                if uses:
                    assert sum(use.explained for use in uses) == pytest.approx(1)

    def test_explained(self) -> None:
        """Neuron 0 is 2 y_0 + 1 y_1 with orthogonal rows of squared norms 1 and 4: 4 of 8 each."""
        factors = factors_of([[2.0, 1.0], [0.0, 1.0]], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        assert [use.explained for use in NeuronIndex.of({0: factors}).uses(0, 0)] == pytest.approx([0.5, 0.5])

    def test_refused(self) -> None:
        index = NeuronIndex.of({3: factors_of(sparse(6, 2, 2))})
        with pytest.raises(ValueError, match="layer 4 is not in this index; it has 3"):
            index.uses(4, 0)
        with pytest.raises(ValueError, match="there are neurons 0-5, got -1"):
            index.uses(3, -1)
        with pytest.raises(ValueError, match="at least one layer"):
            NeuronIndex.of({})


class TestPairOverlap:
    def test_p_value_by_hand(self) -> None:
        """Of 10 neurons, groups of 3 and 4 share 2: C(4,2) C(6,1) + C(4,3) of C(10,3) = 40 of 120."""
        Z = torch.zeros(10, 2)
        Z[[0, 1, 2], 0] = torch.tensor([1.0, 2.0, 2.0])
        Z[[1, 2, 3, 4], 1] = torch.tensor([1.0, -1.0, 1.0, 1.0])
        pair = pair_overlap(factors_of(Z), 0, 1, output_weight=torch.eye(10))
        assert pair.sizes == (3, 4)
        assert [row.neuron for row in pair.shared] == [1, 2]
        assert pair.shared[1].first_weight == pytest.approx(2 / 3)
        assert pair.shared[1].second_weight == pytest.approx(-1 / 2)
        assert pair.p_value == pytest.approx(40 / 120)
        assert pair.expected == pytest.approx(1.2)
        assert pair.jaccard == pytest.approx(2 / 5)
        assert pair.cosine == pytest.approx(0)
        assert pair.direction_cosine == pytest.approx(0)

    def test_itself_and_a_stranger(self) -> None:
        factors = factors_of(torch.eye(6)[:, :2])
        same, other = pair_overlap(factors, 0, 0), pair_overlap(factors, 0, 1)
        assert (same.jaccard, same.cosine, same.direction_cosine) == (1, 1, None)
        assert same.correlation == pytest.approx(1)
        assert same.p_value == pytest.approx(1 / 6)
        assert (other.jaccard, other.cosine, other.p_value, other.shared) == (0, 0, 1, ())

    def test_random_supports_have_uniform_p_values(self) -> None:
        """At least as many shared neurons as a p-value of p says happen with probability p at most."""
        factors = factors_of(sparse(50, 60, 10))
        p_values = torch.tensor(
            [pair_overlap(factors, i, j).p_value for i in range(60) for j in range(i)], dtype=torch.float64
        )
        for level in (0.05, 0.2, 0.5):
            assert float((p_values <= level).double().mean()) <= level + 0.03


class TestNearest:
    def test_by_neurons_finds_the_permuted_feature(self) -> None:
        Z = sparse(50, 8, 6)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
        factors, other = factors_of(Z), factors_of(2.5 * Z[:, order])
        for feature in range(8):
            best, second = nearest_by_neurons(factors, feature, {4: other}, layer=4, count=2)
            assert order[best.feature] == feature
            assert best.similarity == pytest.approx(1)
            assert second.similarity < 0.9
            itself = nearest_by_neurons(factors, feature, {4: factors}, layer=4, count=8)
            assert feature not in {row.feature for row in itself}
            assert len(itself) == 7

    def test_by_direction_sees_through_other_neurons(self) -> None:
        """Layer 1's neurons are layer 0's in another order and W_down follows: directions are the same."""
        Z = sparse(40, 6, 5)
        weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(3))
        order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
        factors = {0: factors_of(Z), 1: factors_of(Z[order])}
        weights = {0: weight, 1: weight[:, order]}
        for feature in range(6):
            best = nearest_by_direction(factors, weights, 0, feature)[0]
            assert (best.layer, best.feature) == (1, feature)
            assert best.similarity == pytest.approx(1)
        only_zero = nearest_by_direction(factors, weights, 1, 2, others={0: factors[0]})
        assert {row.layer for row in only_zero} == {0}
        with pytest.raises(ValueError, match="output_weights: layer 1 is missing"):
            nearest_by_direction(factors, {0: weight}, 0, 0)

    def test_by_coefficients_on_the_tokens_that_both_keep(
        self, make_model: Any, samples: list[Sample]
    ) -> None:
        model = make_model()
        # So low that each layer leaves out tokens of its own.
        store = collect(model, samples, "0,2", sink_threshold=1.05)
        here, there = store.places(0), store.places(2)
        assert set(here.tolist()) != set(there.tolist())
        one, two = common_tokens(here, there)
        assert torch.equal(here[one], there[two])
        signal = torch.rand(3, len(store.corpus.ids), generator=torch.Generator().manual_seed(0))
        factors = {
            0: factors_of(sparse(24, 3, 4), signal[:, here]),
            2: factors_of(sparse(24, 3, 4, seed=1), 3 * signal.flip(0)[:, there]),
        }
        for feature in range(3):
            best = nearest_by_coefficients(factors, store, 0, feature)[0]
            assert (best.layer, best.feature) == (2, 2 - feature)
            assert best.similarity == pytest.approx(1)
        with pytest.raises(ValueError, match=r"factors: wanted Y with \d+ columns for layer 0"):
            nearest_by_coefficients({0: factors_of(sparse(24, 3, 4))}, store, 0, 0)
        fewer = collect(model, samples[:5], "0")
        with pytest.raises(ValueError, match="the same tokens"):
            nearest_by_coefficients(factors, store, 0, 0, other_store=fewer)

    def test_refused(self) -> None:
        factors = factors_of(sparse(10, 2, 3))
        with pytest.raises(ValueError, match="wanted layer 4, got 5"):
            nearest_by_neurons(factors, 0, {5: factors}, layer=4)
        with pytest.raises(ValueError, match="features of 10 neurons, got 11"):
            nearest_by_neurons(factors, 0, {4: factors_of(sparse(11, 2, 3))}, layer=4)
        with pytest.raises(ValueError, match="count: wanted at least 1"):
            nearest_by_neurons(factors, 0, {4: factors}, layer=4, count=0)


def test_a_dead_feature_is_like_none() -> None:
    Z = sparse(20, 3, 4)
    Z[:, 1] = 0
    found = nearest_by_neurons(factors_of(Z), 1, {0: factors_of(Z)}, layer=0, count=3)
    assert [row.similarity for row in found] == [0, 0, 0]
    assert not any(math.isnan(row.similarity) for row in found)
