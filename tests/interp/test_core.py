from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from snmf_interp.core import (
    assign_features,
    holm,
    neuron_sets,
    permutation_p,
    random_sets,
    set_directions,
)

DAYS = ("Monday", "Tuesday", "Friday")


def features() -> Tensor:
    """Four columns: all share neurons 0 and 1, the first two also 2; 3, 4 and 5, 6 and 7 are their own."""
    Z = torch.zeros(12, 4)
    Z[:2] = torch.tensor([[1.0, 2.0, -1.0, 1.0], [1.0, -2.0, 1.0, 1.0]])
    Z[2, :2] = 5.0
    for column, own in ((0, [3, 4]), (1, [5, 6]), (2, [7]), (3, [9])):
        Z[own, column] = torch.arange(1.0, len(own) + 1)
    return Z


class TestNeuronSets:
    def test_known_answer(self) -> None:
        sets = neuron_sets(features(), dict(zip(DAYS, (0, 1, 2), strict=True)), m=3)
        assert sets.core == (0, 1)
        assert sets.exclusive == {"Monday": (3, 4), "Tuesday": (5, 6), "Friday": (7,)}
        assert neuron_sets(features(), sets.members, m=2).core == (0, 1, 2)

    def test_expected_by_chance(self) -> None:
        """Against the share of random supports of the same sizes that give a core neuron."""
        generator = torch.Generator().manual_seed(0)
        Z = features()
        sets = neuron_sets(Z, dict(zip(DAYS, (0, 1, 2), strict=True)), m=2)
        sizes = (Z[:, :3] != 0).sum(0)
        supports = torch.rand(20_000, len(Z), 3, generator=generator).argsort(1) < sizes
        assert sets.expected_core == pytest.approx(
            float((supports.sum(2) >= 2).sum(1).double().mean()), rel=0.02
        )

    def test_default_m_is_beyond_chance(self) -> None:
        """Seven supports of 1 %: pairs share neurons by chance, trios do not."""
        Z = (torch.rand(2000, 8, generator=torch.Generator().manual_seed(0)).argsort(0) < 20).float()
        members = {str(i): i for i in range(7)}
        assert neuron_sets(Z, members).m == 3
        assert neuron_sets(Z, members, m=2).expected_core > 1 > neuron_sets(Z, members).expected_core
        assert neuron_sets(Z, {"a": 0, "b": 1}).m == 2

    @pytest.mark.parametrize(
        ("members", "m", "message"),
        [
            ({"a": 0}, None, "at least two words"),
            ({"a": 0, "b": 0}, None, "a feature of their own"),
            ({"a": 0, "b": 4}, None, "features 0-3, got 4"),
            ({"a": 0, "b": 1}, 3, "m: wanted 2 to 2, the number of members, got 3"),
            ({"a": 0, "b": 1}, 1, "got 1"),
        ],
    )
    def test_errors(self, members: Any, m: int | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            neuron_sets(features(), members, m)
        with pytest.raises(ValueError, match="wanted a matrix"):
            neuron_sets(torch.ones(3), {"a": 0, "b": 1})


def test_directions() -> None:
    Z = features()
    sets = neuron_sets(Z, {"Monday": 0, "Tuesday": 1, "Friday": 2}, m=2)
    found = set_directions(Z, sets)
    units = Z[:, :3] / Z[:, :3].norm(dim=0)
    core = units.mean(1) * (torch.arange(12) <= 2)
    torch.testing.assert_close(found["core"], core / core.norm())
    torch.testing.assert_close(
        found["Tuesday"],
        torch.zeros(12).index_copy(0, torch.tensor([5, 6]), torch.tensor([1.0, 2.0]) / 5**0.5),
    )
    # A set whose weights cancel, and an empty one, have no direction.
    opposed = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    assert set_directions(opposed, neuron_sets(opposed, {"a": 0, "b": 1}, m=2)) == {}


class TestAssignment:
    def test_is_the_best_of_all(self) -> None:
        """Two words that the same feature detects best do not both get it, and the total is the largest possible."""
        generator = torch.Generator().manual_seed(3)
        labels = [*DAYS * 6, "other", None]
        scores = torch.rand(5, len(labels), generator=generator)
        scores[1] += torch.tensor([label in DAYS[:2] for label in labels]).float()
        found = assign_features(scores, labels, DAYS)
        assert len(set(found.features)) == 3
        from snmf_interp.concepts import average_precision

        names, table = average_precision(scores, labels)
        best = max(
            sum(float(table[f, names.index(day)]) for f, day in zip(chosen, DAYS, strict=True))
            for chosen in itertools.permutations(range(5), 3)
        )
        assert sum(found.precision) == pytest.approx(best)
        assert 1 in found.features
        assert found.members(max(found.precision)) == {
            DAYS[found.precision.index(max(found.precision))]: found.features[
                found.precision.index(max(found.precision))
            ]
        }

    def test_errors(self) -> None:
        scores = torch.rand(2, 3)
        for words, message in (
            (DAYS, "at least as many features as words"),
            (("Monday", "Sunday"), "'Sunday' labels no text"),
            (("Monday", "Monday"), "each once"),
            ((), "at least one word"),
        ):
            with pytest.raises(ValueError, match=message):
                assign_features(scores, ["Monday", "Tuesday", "Friday"], words)


class TestPermutation:
    def test_random_sets_have_the_weights(self) -> None:
        direction = torch.zeros(50).index_copy(0, torch.tensor([3, 9, 40]), torch.tensor([0.5, -2.0, 1.0]))
        drawn = random_sets(direction, 200, torch.Generator().manual_seed(0))
        assert torch.equal(drawn.sort(1).values, direction.sort().values.expand(200, -1))
        # Every neuron is used about equally, the set's own too.
        assert (drawn != 0).sum(0).float().std() < 6
        assert len({tuple(row.nonzero().flatten().tolist()) for row in drawn}) > 190

    def test_uniform_under_the_null(self) -> None:
        """A set that is itself a random one: every p-value is as likely as every other."""
        generator = torch.Generator().manual_seed(1)
        direction = torch.zeros(100).index_copy(0, torch.arange(10), torch.randn(10, generator=generator))
        effect = torch.randn(100, generator=generator)
        values = []
        for _ in range(2000):
            statistics = (random_sets(direction, 20, generator) @ effect).tolist()
            values.append(permutation_p(statistics[0], statistics[1:]))
        counts = torch.tensor(values).mul(20).round().long().bincount(minlength=21)[1:]
        assert int(counts.sum()) == 2000
        # 100 each, with a standard deviation of 10.
        assert 60 < int(counts.min()) <= int(counts.max()) < 140

    def test_p(self) -> None:
        assert permutation_p(2.0, [1.0, 2.0, 3.0]) == 0.75
        assert permutation_p(9.0, [1.0] * 99) == 0.01
        assert permutation_p(0.0, []) == 1.0

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.5, 0.9]) == [1.0, 1.0]
        assert holm([]) == []
