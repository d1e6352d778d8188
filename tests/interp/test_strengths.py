from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from snmf_interp import (
    Intervention,
    LanguageModel,
    Strength,
    hooks,
    solve_strength,
    solve_strengths,
    steer,
    strengths,
)

Maker = Callable[..., LanguageModel]
PROMPTS = ["the cat", "on Monday the dog", "a red rug and", "rain"]
TOLERANCE = 0.02


def vector(seed: int = 0) -> Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(seed))


def divergence(model: LanguageModel, layer: int, z: Tensor, alpha: float, positions: str = "last") -> float:
    """KL(unsteered ‖ steered) one prompt at a time, in double precision, without the solver's code."""
    total = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([model.encode(prompt)])
        first = -1 if positions == "last" else 1
        p = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, first:].double().log_softmax(-1)
        with steer(model, {layer: z}, strength=alpha):
            q = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, first:].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "gpt_neox", "qwen3"])
def test_reaches_the_targets(family: str, make_model: Maker) -> None:
    model = make_model(family)
    found = solve_strengths(model, 1, vector(), prompts=PROMPTS, tolerance=TOLERANCE)
    assert [(s.sign, s.target) for s in found] == [(s, t) for s in (1, -1) for t in strengths.KL_TARGETS]
    # The norm behind the MLP bounds Gemma early, the final norm the others late.
    assert sum(s.reached for s in found) >= (5 if family == "gemma3" else 10)
    for s in found:
        assert math.copysign(1, s.strength) == s.sign
        assert divergence(model, 1, vector(), s.strength) == pytest.approx(s.kl, rel=1e-3, abs=1e-5)
        if s.reached:
            assert s.target <= s.kl <= (1 + TOLERANCE) * s.target * (1 + 1e-6)
        else:
            assert s.kl < s.target
    # The signs are searched apart: a model is not symmetric.
    plus, minus = (next(s for s in found if s.sign == sign and s.target == 0.1) for sign in (1, -1))
    assert abs(plus.strength + minus.strength) > 0.01 * plus.strength


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_do_not_matter(batch_size: int, make_model: Maker) -> None:
    model = make_model()
    options: dict[str, Any] = {"targets": [0.05, 0.2], "prompts": PROMPTS}
    expected = solve_strengths(model, 1, vector(), **options)
    found = solve_strengths(model, 1, vector(), **options, batch_size=batch_size)
    for s, e in zip(found, expected, strict=True):
        assert (s.strength, s.kl) == pytest.approx((e.strength, e.kl), rel=1e-3)


def test_all_positions(make_model: Maker) -> None:
    model = make_model()
    found = solve_strength(model, 1, vector(), 0.1, PROMPTS, positions="all")
    assert found.reached
    assert divergence(model, 1, vector(), found.strength, "all") == pytest.approx(found.kl, rel=1e-3)
    assert abs(divergence(model, 1, vector(), found.strength) / found.kl - 1) > 0.05


def test_length_does_not_matter_and_neurons_do(make_model: Maker) -> None:
    model = make_model()
    one, long, part = (
        solve_strength(model, 1, z, 0.1, PROMPTS, neurons=neurons)
        for z, neurons in ((vector(), None), (100 * vector().numpy(), None), (vector(), range(8)))
    )
    assert one.strength == pytest.approx(long.strength, rel=1e-5)
    assert part.strength != pytest.approx(one.strength, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_last_only(family: str, make_model: Maker) -> None:
    """The last position's logits alone are those of the whole pass, and no hook is left."""
    model = make_model(family)
    ids, mask = hooks.pad([model.encode(prompt) for prompt in PROMPTS], side="left", pad_id=0)
    alone = hooks.forward(model, ids, mask, last_only=True).logits[:, -1]
    torch.testing.assert_close(alone, hooks.forward(model, ids, mask).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert not model.unembedding._forward_pre_hooks


def test_not_reached(make_model: Maker) -> None:
    """A norm behind the MLP (Gemma 2 and 3) bounds what any strength can do; the same where the caller does."""
    model = make_model("gemma3")
    low, high = solve_strengths(model, 1, vector(), [0.05, 50.0], PROMPTS, signs=[-1])
    assert low.reached
    assert not high.reached
    assert high.strength < 0
    assert low.kl < high.kl < 50
    grid = [divergence(model, 1, vector(), -alpha) for alpha in torch.logspace(-1, 3, 30).tolist()]
    assert high.kl > 0.8 * max(grid)
    bounded = solve_strength(make_model(), 1, vector(), 5.0, PROMPTS, max_strength=0.01)
    assert (bounded.reached, bounded.strength) == (False, pytest.approx(0.01))
    assert 0 < bounded.kl < 5


@pytest.mark.parametrize("sign", [1, -1])
def test_known_answer(sign: int, make_model: Maker) -> None:
    """A model whose only non-zero logit is s = gain · α: the KL from the uniform distribution has a formula."""
    model = make_model(layers=1)
    network = model.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.model.norm = torch.nn.Identity()
        network.model.layers[0].mlp.down_proj.weight[0] = vector() / vector().norm() * 0.5
        network.lm_head.weight[4, 0] = 3.0
    v = network.config.vocab_size

    def exact(alpha: float) -> float:
        s = 1.5 * alpha
        return math.log((v - 1 + math.exp(s)) / v) - s / v

    found = solve_strengths(model, 0, vector(), [0.025, 0.5], PROMPTS, signs=[sign], tolerance=0.001)
    for s in found:
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if exact(sign * middle) < s.target else (low, middle)
        assert s.reached
        assert s.strength == pytest.approx(sign * high, rel=1e-3)
        assert s.kl == pytest.approx(exact(s.strength), rel=1e-3)
        assert abs(s.strength) >= high * (1 - 1e-4)


def search(
    kl: Callable[[float], float], targets: list[float], *, first: float = 0.1, limit: float = 1e4
) -> tuple[list[Strength], dict[float, float]]:
    """The search itself on a given curve, and all that it measured."""
    found = strengths.Search(targets, first, limit, TOLERANCE)
    seen: dict[float, float] = {}
    rounds = 0
    while wanted := found.proposals():
        rounds += 1
        assert rounds < 40
        assert not seen.keys() & set(wanted)
        for alpha in wanted:
            seen[alpha] = kl(alpha)
            found.record(alpha, seen[alpha])
    return [found.result(target, 1) for target in targets], seen


class TestSearch:
    def test_few_measurements(self) -> None:
        """Where the root of the divergence is nearly linear, false position needs a step or two per target."""
        found, seen = search(lambda a: 0.003 * a**2 / (1 + 0.01 * a), list(strengths.KL_TARGETS))
        assert all(s.reached and s.target <= s.kl <= (1 + TOLERANCE) * s.target for s in found)
        assert len(seen) < 50

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 3e3])
    def test_any_scale(self, scale: float) -> None:
        (found,), _ = search(lambda a: (a / scale) ** 2, [0.25], limit=math.inf)
        assert found.strength == pytest.approx(0.5 * scale, rel=0.01)

    def test_first_crossing_of_a_curve_that_falls_again(self) -> None:
        found, _ = search(lambda a: 0.3 * math.sin(a) ** 2 if a < math.pi else 0.01 * a, [0.1, 0.2, 0.5])
        for s in found[:2]:
            assert s.strength == pytest.approx(math.asin(math.sqrt(s.target / 0.3)), rel=0.02)
        assert found[2].strength == pytest.approx(50, rel=0.03)

    def test_saturated(self) -> None:
        found, seen = search(lambda a: 0.2 * math.exp(-((math.log(a + 1e-9) - 1) ** 2)), [0.1, 0.3])
        assert found[0].reached
        assert (found[1].reached, found[1].kl) == (False, max(seen.values()))
        assert found[1].strength == max(seen, key=lambda a: seen[a])
        assert max(seen) == 1e4

    def test_a_step_is_narrowed_down_and_reported(self) -> None:
        """As in half precision, where neighbouring strengths may jump over a target."""
        (found,), _ = search(lambda a: 0.0 if a < 7 else 0.4, [0.25])
        assert (found.reached, found.kl) == (True, 0.4)
        assert found.strength == pytest.approx(7, rel=1e-5)
        assert found.strength >= 7

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_overflow_ends_the_range(self, bad: float) -> None:
        found, _ = search(lambda a: 0.01 * a if a < 20 else bad, [0.1, 0.5])
        assert found[0].reached
        assert not found[1].reached
        assert found[1].kl < 0.2

    def test_nothing_usable(self) -> None:
        (found,), _ = search(lambda a: math.nan, [0.1])
        assert (found.strength, found.kl, found.reached) == (0.0, 0.0, False)


def test_half_precision(make_model: Maker) -> None:
    """bfloat16 keeps three digits: a target is reached, and what is passed is near what was asked for."""
    model = make_model()
    model.model.to(torch.bfloat16)
    for s in solve_strengths(model, 1, vector(), [0.1, 0.3], PROMPTS):
        assert s.reached
        assert s.target <= s.kl < 1.2 * s.target


def test_overflowing_model(make_model: Maker) -> None:
    model = make_model("gpt2")
    model.model.to(torch.float16)
    found = solve_strength(model, 2, vector(), 1e4, PROMPTS)
    assert not found.reached
    assert math.isfinite(found.kl)
    assert found.kl > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "targets: wanted divergences above 0"),
        ({"targets": [0.0]}, "targets: wanted divergences above 0"),
        ({"signs": [2]}, "signs: wanted any of 1 and -1"),
        ({"signs": []}, "signs: wanted any of 1 and -1"),
        ({"tolerance": 0.0}, "tolerance: wanted a share"),
        ({"max_strength": 0.0}, "max_strength: wanted more than 0"),
        ({"batch_size": 0}, "batch_size: wanted at least 1"),
        ({"positions": "first"}, "wanted 'last' or 'all', got 'first'"),
        ({"prompts": []}, "prompts: wanted a list of at least one text"),
        ({"prompts": "the cat"}, "prompts: wanted a list of at least one text"),
        ({"prompts": ["the cat", ""]}, "'' has no token"),
        ({"direction": torch.ones(16)}, "wanted 24 entries"),
        ({"direction": torch.zeros(24)}, "it is zero"),
        ({"layer": 3}, "layer 3 is outside"),
    ],
)
def test_errors(options: dict[str, Any], message: str, make_model: Maker) -> None:
    arguments: dict[str, Any] = {"layer": 1, "direction": vector(), "prompts": PROMPTS} | options
    with pytest.raises(ValueError, match=message):
        solve_strengths(make_model(), **arguments)


def test_a_broken_model_is_an_error(make_model: Maker) -> None:
    model = make_model()
    model.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite without any steering"):
        solve_strength(model, 1, vector(), 0.1, PROMPTS)


def test_steer_takes_a_divergence(make_model: Maker) -> None:
    model = make_model()
    found = solve_strength(model, 1, vector(), 0.1)
    assert found.reached
    ids = torch.tensor([model.encode(PROMPTS[0])])
    for name in (1, model.hook_name(1)):
        with steer(model, {name: vector()}, kl=0.1):
            got = hooks.forward(model, ids, torch.ones_like(ids)).logits
        with steer(model, {1: vector()}, strength=found.strength):
            wanted = hooks.forward(model, ids, torch.ones_like(ids)).logits
        assert torch.equal(got, wanted)


def test_steer_says_when_a_divergence_is_out_of_reach(make_model: Maker) -> None:
    model = make_model("gemma3")
    refused = [
        ({1: vector()}, {"kl": 50.0}, r"no strength of this vector reaches 50.0 nats at layer 1: at most \d"),
        ({1: vector()}, {"kl": 0.1, "strength": 1.0}, "wanted a strength or a divergence, got both"),
        ({0: vector(), 1: vector()}, {"kl": 0.1}, "wanted one bare vector to solve for, got 2"),
        ({1: Intervention(vector(), "ablate")}, {"kl": 0.1}, "got 0"),
    ]
    for interventions, options, message in refused:
        with pytest.raises(ValueError, match=message), steer(model, interventions, **options):
            pass
