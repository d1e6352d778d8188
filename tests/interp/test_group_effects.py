from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from snmf_interp import LanguageModel, hooks, solve_strength, steer
from snmf_interp.group_effects import intervention_table
from snmf_interp.word_meter import WordMeter, is_single_token, matched_words, solve_each, steer_to

from .conftest import VOCABULARY

Maker = Callable[..., LanguageModel]
DAYS = {"Monday": 0, "Tuesday": 1, "Friday": 2}
PROMPTS = ["the cat", "a red rug and", "rain"]


@pytest.fixture
def planted(make_model: Maker) -> tuple[LanguageModel, Tensor]:
    """A model in which neurons 0-2 raise all days, 3-4, 5-6 and 7-8 one each, the others other words; and features."""
    model = make_model(layers=1)
    network = model.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.model.norm = torch.nn.Identity()
        down, words = network.model.layers[0].mlp.down_proj.weight, network.lm_head.weight
        down[0, :3] = 1.0
        for day, first in ((1, 3), (2, 5), (3, 7)):
            down[day, first : first + 2] = 1.0
        down[4:, 9:] = torch.randn(12, 15, generator=generator) / 3
        for i, day in enumerate(DAYS, start=1):
            words[VOCABULARY.index(day), [0, i]] = 1.0
        others = [i for i, word in enumerate(VOCABULARY) if word not in DAYS]
        words[others, 4:] = torch.randn(len(others), 12, generator=generator) / 3
    Z = torch.zeros(24, 4)
    for column, first in ((0, 3), (1, 5), (2, 7)):
        Z[:3, column] = torch.tensor([1.0, 2.0, 1.0])
        Z[first : first + 2, column] = torch.tensor([2.0, 1.0])
    Z[12:15, 3] = 1.0
    return model, Z


def test_finds_what_is_planted(planted: tuple[LanguageModel, Tensor]) -> None:
    model, Z = planted
    table = intervention_table(
        model,
        0,
        Z,
        DAYS,
        related={"numbers": ["one", "two", "three"]},
        m=3,
        kl=0.1,
        prompts=PROMPTS,
        n_random=59,
    )
    assert table.core is not None
    assert table.core.neurons == (0, 1, 2)
    assert table.core_minimum is not None
    assert table.core_minimum > 1
    # All three days alike, and nothing else.
    assert max(table.core.shifts.values()) == pytest.approx(table.core_minimum, abs=1e-4)
    assert abs(table.core.related["numbers"]) < 1e-4
    assert table.core.p_value is not None
    assert table.core.p_value <= 0.05
    assert [effect.name for effect in table.exclusive] == list(DAYS)
    for effect in table.exclusive:
        others = [shift for word, shift in effect.shifts.items() if word != effect.name]
        assert effect.shifts[effect.name] > 1
        assert others == pytest.approx([0, 0], abs=1e-4)
        assert effect.statistic == pytest.approx(effect.shifts[effect.name], abs=1e-4)
        assert effect.p_value is not None
        assert effect.p_value <= 0.1
    assert table.exclusive_p == pytest.approx(1 / 60)
    effects = [table.core, *table.exclusive]
    assert all(effect.reached and 0.1 <= effect.kl <= 0.102 * (1 + 1e-6) for effect in effects)
    random = [value for effect in effects if effect.random for value in effect.random.statistics]
    assert len(random) == 4 * 59
    assert table.core.random is not None
    # The smallest of some changes is no larger than their mean.
    rises = table.core.random.rises
    assert all(rise <= value + 1e-4 for rise, value in zip(rises, table.core.random.statistics, strict=True))
    as_well = sum(rise >= table.core_minimum for rise in rises)
    assert table.core_minimum_p == pytest.approx((1 + as_well) / 60)
    assert table.core_minimum_p <= 0.05
    # Of 24 neurons 9 are planted, so random sets do something, but far less on average.
    assert abs(sum(random) / len(random)) < 0.35 * table.core.statistic
    assert json.loads(json.dumps(table.as_dict()))["core"]["shifts"] == table.core.shifts


def test_without_a_core(planted: tuple[LanguageModel, Tensor]) -> None:
    model, Z = planted
    Z = Z.clone()
    Z[:3] = 0
    table = intervention_table(model, 0, Z, DAYS, prompts=PROMPTS, n_random=0)
    assert (table.core, table.core_minimum, table.core_minimum_p) == (None, None, None)
    assert len(table.exclusive) == 3
    assert all(effect.random is effect.p_value is None for effect in table.exclusive)
    assert table.exclusive_p is None
    # The same feature for the same support: nothing is exclusive either.
    table = intervention_table(
        model, 0, Z[:, [0, 0]], {"Monday": 0, "Tuesday": 1}, m=2, prompts=PROMPTS, n_random=0
    )
    assert table.exclusive == ()
    assert table.exclusive_statistic is None
    assert table.core is not None
    assert table.core_minimum_p is None


def naive(
    model: LanguageModel, z: Tensor, alpha: float, words: list[str], controls: Any
) -> tuple[float, list[float], list[float]]:
    """Divergence, shifts and changes of log-probability, a prompt at a time and in double precision."""
    kl, shifts = 0.0, torch.zeros(len(words)).double()
    rises = torch.zeros_like(shifts)
    index = VOCABULARY.index
    for prompt in PROMPTS:
        ids = torch.tensor([model.encode(prompt)])
        before = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, -1].double()
        with steer(model, {1: z}, strength=alpha):
            after = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, -1].double()
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum()) / len(PROMPTS)
        change = after - before
        own = torch.stack([change[index(word)] for word in words])
        other = torch.stack([change[[index(w) for w in controls[word]]].mean() for word in words])
        shifts += (own - other) / len(PROMPTS)
        rises += torch.stack([(q - p)[index(word)] for word in words]) / len(PROMPTS)
    return kl, shifts.tolist(), rises.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_meter(family: str, batch_size: int, make_model: Maker) -> None:
    model = make_model(family)
    words, controls = ["Monday", "cat"], {"Monday": ["dog", "rain"], "cat": ["Friday"]}
    width = model.d_mlp(1)
    directions = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    strengths = torch.tensor([0.5, 3.0, -3.0, 8.0])
    meter = WordMeter(model, 1, PROMPTS, words, controls, batch_size)
    kl, shifts, log_probability = meter.measure(directions, strengths)
    for i in range(4):
        expected_kl, expected, rises = naive(model, directions[i], float(strengths[i]), words, controls)
        assert float(kl[i]) == pytest.approx(expected_kl, rel=1e-3, abs=1e-5)
        assert shifts[i].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert log_probability[i].tolist() == pytest.approx(rises, rel=1e-3, abs=1e-4)


def test_strengths_are_those_of_the_solver(make_model: Maker) -> None:
    model = make_model()
    directions = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    meter = WordMeter(model, 1, PROMPTS, ["Monday"], {"Monday": ["cat"]})
    targets = (0.02, 0.1)
    for direction, solved in zip(directions, solve_each(meter, list(directions), targets), strict=True):
        for target, one in zip(targets, solved, strict=True):
            assert one.reached
            assert target <= one.kl <= 1.02 * target
            expected = naive(model, direction, one.strength, ["Monday"], {"Monday": ["cat"]})
            assert one.kl == pytest.approx(expected[0], rel=1e-3)
            assert one.shifts.tolist() == pytest.approx(expected[1], abs=1e-3)
        # One divergence alone takes the very steps of the other search.
        expected_strength = solve_strength(model, 1, direction, 0.1, PROMPTS)
        (((strength, kl, *_),),) = solve_each(meter, [direction], (0.1,))
        assert (strength, kl) == pytest.approx((expected_strength.strength, expected_strength.kl), rel=1e-3)


def test_few_passes_are_near_the_solver(make_model: Maker) -> None:
    """What is measured for random sets against what a full search finds, started far from it in both directions."""
    model = make_model()
    directions = torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    meter = WordMeter(model, 1, PROMPTS, ["Monday", "cat"], {"Monday": ["dog", "rain"], "cat": ["sun"]})
    exact = [one for (one,) in solve_each(meter, list(directions), (0.1,), 0.001)]
    for start in (exact[0][0], exact[0][0] / 5, exact[0][0] * 3):
        found = steer_to(meter, directions, 0.1, start)
        assert found.share_reached > 0.9
        assert found.typical_error is not None
        assert found.typical_error < 0.2
        shifts = torch.stack([row[3] for row in exact])
        error = (found.shifts - shifts)[found.reached].abs()
        assert float(error.median()) < 0.05 * float(shifts.abs().mean())


def test_unreachable(make_model: Maker) -> None:
    """Gemma's norm behind the MLP bounds the divergence: stated, and the nearest measurement taken."""
    model = make_model("gemma3")
    meter = WordMeter(model, 1, PROMPTS, ["Monday"], {"Monday": ["cat"]})
    directions = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    ((first,), *_) = solve_each(meter, list(directions), (50.0,))
    assert not first.reached
    found = steer_to(meter, directions, 50.0, 10.0)
    assert (found.share_reached, found.typical_error) == (0.0, None)
    assert bool(found.shifts.isfinite().all())
    assert bool((found.kl < 50).all())


class TestMatchedWords:
    def test_are_the_nearest(self, make_model: Maker) -> None:
        model = make_model()
        found = matched_words(model, list(DAYS), PROMPTS, 5)
        ids, mask = hooks.pad([model.encode(prompt) for prompt in PROMPTS], side="left", pad_id=0)
        likely = hooks.forward(model, ids, mask).logits[:, -1].log_softmax(-1).mean(0)
        usable = [w for w in VOCABULARY[4:] if len(w) >= 3 and w.isalpha() and w not in DAYS]
        for day, controls in found.items():
            gaps = {
                word: abs(float(likely[VOCABULARY.index(word)] - likely[VOCABULARY.index(day)]))
                for word in usable
            }
            assert controls == sorted(usable, key=gaps.__getitem__)[:5]

    def test_no_relatives(self, make_model: Maker) -> None:
        """A word that begins one of the watched words, or is begun by one, is no control."""
        model = make_model()
        everything = matched_words(model, ["Monday"], PROMPTS, 15)["Monday"]
        assert "Monday" not in everything
        # Of the 20 usable words only "one" begins with "on".
        assert "one" in matched_words(model, ["and"], PROMPTS, 20)["and"]
        assert "one" not in matched_words(model, ["on"], PROMPTS, 19)["on"]

    def test_errors(self, make_model: Maker) -> None:
        model = make_model()
        assert is_single_token(model, "Monday")
        assert not is_single_token(model, "Sunday")
        for arguments, message in (
            ((["Sunday"], PROMPTS, 3), "'Sunday' is not a single token"),
            ((["Monday cat"], PROMPTS, 3), "2 tokens behind a space"),
            ((["Monday"], [], 3), "prompts: wanted a list"),
            ((["Monday"], [""], 3), "'' has no token"),
            ((["Monday"], PROMPTS, 0), "at least 1 control"),
            ((["Monday"], PROMPTS, 99), "wanted 99 control words for 'Monday'"),
        ):
            with pytest.raises(ValueError, match=message):
                matched_words(model, *arguments)


def test_errors(planted: tuple[LanguageModel, Tensor]) -> None:
    model, Z = planted
    for options, message in (
        ({"kl": 0.0}, "kl: wanted a divergence above 0"),
        ({"kl": math.inf}, "kl: wanted"),
        ({"n_random": -1}, "n_random: wanted 0 or more"),
        ({"Z": Z[:5]}, r"Z: wanted \[24, k\] for layer 0, got \[5, 4\]"),
        ({"words": ["Monday"]}, "'Tuesday' is not"),
        ({"m": 4}, "m: wanted 2 to 3"),
        ({"controls": {"Monday": ["cat"]}}, "got none for 'Tuesday'"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_controls": 50}, "wanted 50 control words"),
    ):
        given: dict[str, Any] = {"Z": Z, "n_random": 0, "prompts": PROMPTS} | options
        with pytest.raises(ValueError, match=message):
            intervention_table(model, 0, given.pop("Z"), DAYS, **given)
