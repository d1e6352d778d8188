"""Measured effects of features on the next word, on models in which they can be computed by hand."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import snmf_kernels
from snmf_interp import LanguageModel, Sample, hooks, steer, terminal
from snmf_interp import effects as effects_module
from snmf_interp.effects import Effects, lens_logits, measure_effects
from snmf_interp.runs import Run

Maker = Callable[..., LanguageModel]
PROMPTS = ("the cat", "on Monday", "a red dog ran")


@pytest.fixture
def model(make_model: Maker) -> LanguageModel:
    return make_model()


@pytest.fixture(scope="module")
def factors() -> snmf_kernels.Factorization:
    A = torch.rand(24, 200, generator=torch.Generator().manual_seed(3))
    return snmf_kernels.fit(A, 4, keep=0.25)


@pytest.fixture
def effects(model: LanguageModel, factors: snmf_kernels.Factorization) -> Effects:
    return measure_effects(model, 1, factors, kl=0.02, prompts=PROMPTS, n_random=6)


def naive(
    model: LanguageModel, z: Tensor, alpha: float, prompts: tuple[str, ...] = PROMPTS
) -> tuple[float, Tensor]:
    """Divergence and centred changes of logits, a prompt at a time, in double precision."""
    kl, change = 0.0, torch.zeros(())
    for prompt in prompts:
        ids = torch.tensor([model.encode(prompt)])
        before = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, -1].double()
        with steer(model, {1: z}, strength=alpha):
            after = hooks.forward(model, ids, torch.ones_like(ids)).logits[0, -1].double()
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum()) / len(prompts)
        change = change + ((after - after.mean()) - (before - before.mean())) / len(prompts)
    return kl, change


def test_against_single_passes(
    model: LanguageModel, factors: snmf_kernels.Factorization, effects: Effects
) -> None:
    """A feature is added as itself, +z, at the stated divergence, averaged over the prompts."""
    Z = torch.as_tensor(factors.Z)
    assert effects.index.tolist() == [0, 1, 2, 3]
    assert bool(effects.reached.all())
    for row in range(4):
        alpha = float(effects.strength[row])
        assert alpha > 0
        kl, change = naive(model, Z[:, row], alpha)
        assert float(effects.kl[row]) == pytest.approx(kl, rel=1e-3)
        assert kl == pytest.approx(0.02, rel=0.11)
        # Interpolated to the divergence from a measurement within a tenth of it, so by at most about a twentieth.
        assert float((effects.change[row] - change).norm() / change.norm()) < 0.08
        assert float(effects.change[row].double().mean()) == pytest.approx(0, abs=1e-5)


def test_repeatability_is_that_of_two_halves(
    model: LanguageModel, factors: snmf_kernels.Factorization, effects: Effects
) -> None:
    """Of every second prompt and the others, at the same strengths."""
    from scipy.stats import spearmanr

    Z = torch.as_tensor(factors.Z)
    for row in range(4):
        halves = [naive(model, Z[:, row], float(effects.strength[row]), PROMPTS[at::2])[1] for at in (0, 1)]
        expected = spearmanr(*(half.numpy() for half in halves)).statistic
        assert float(effects.repeatability[row]) == pytest.approx(expected, abs=0.1)
        assert effects.words(model, row).repeatability == float(effects.repeatability[row])


def test_the_lens_is_compared(
    model: LanguageModel, factors: snmf_kernels.Factorization, effects: Effects
) -> None:
    from scipy.stats import spearmanr

    lens = lens_logits(model, 1, torch.as_tensor(factors.Z))
    for row in range(4):
        expected = spearmanr(lens[row].numpy(), effects.change[row].numpy()).statistic
        assert float(effects.lens_correlation[row]) == pytest.approx(expected, abs=1e-3)
    assert effects.agreement == pytest.approx(float(effects.lens_correlation.median()))


def test_random_groups_are_the_level(effects: Effects, model: LanguageModel) -> None:
    """Of the words that rise those come first that rise most above random groups; what falls is never among them."""
    excess = effects.excess(2)
    deviation = effects.random_deviation + effects.random_deviation.median()
    assert torch.allclose(excess, (effects.change[2] - effects.random_mean) / deviation)
    words = effects.words(model, 2, count=5)
    assert all(change > 0 for _, change in words.raised)
    assert all(change < 0 for _, change in words.lowered)
    order = excess.masked_fill((effects.change[2] <= 0) | (excess <= 0), 0).argsort(descending=True)
    assert [word for word, _ in words.raised] == [
        model.token_text(int(i)) for i in order[: len(words.raised)]
    ]
    # A token that every random group raises as far is no feature's own.
    level = effects.change[2].clone()
    assert replace(effects, random_mean=level).words(model, 2).raised == ()


def test_some_features_and_then_others(
    model: LanguageModel, factors: snmf_kernels.Factorization, effects: Effects
) -> None:
    options: dict[str, Any] = {"kl": 0.02, "prompts": PROMPTS, "n_random": 6}
    first = measure_effects(model, 1, factors, [3, 1], **options)
    second = measure_effects(model, 1, factors, [0, 1], **options)
    joined = first.joined(second)
    assert joined.index.tolist() == [0, 1, 3]
    for name in ("change", "strength", "kl", "lens_correlation"):
        whole, part = getattr(effects, name)[[0, 1, 3]], getattr(joined, name)
        # Strengths are approached from the same start, whatever stands beside them.
        assert torch.allclose(whole, part, rtol=0.02, atol=1e-4), name
    with pytest.raises(KeyError, match="feature 2 of layer 1 were not measured"):
        joined.words(model, 2)


def test_random_groups_are_measured_once(
    model: LanguageModel, factors: snmf_kernels.Factorization, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"kl": 0.02, "prompts": PROMPTS, "n_random": 6}
    first = measure_effects(model, 1, factors, [3], **options)
    alone = measure_effects(model, 1, factors, [0], **options)
    measured: list[int] = []
    real = effects_module.steer_to
    monkeypatch.setattr(
        effects_module,
        "steer_to",
        lambda meter, part, *rest: measured.append(len(part)) or real(meter, part, *rest),
    )
    other = measure_effects(model, 1, factors, [0], like=first, **options)
    assert measured == [1]
    assert torch.equal(other.random_mean, first.random_mean)
    assert torch.allclose(other.change, alone.change, rtol=1e-4, atol=1e-5)
    assert torch.allclose(other.strength, alone.strength, rtol=1e-4)


def test_unreached_is_said(make_model: Maker, factors: snmf_kernels.Factorization) -> None:
    """Gemma's norm behind the MLP bounds what any strength can do."""
    gemma = make_model("gemma3")
    found = measure_effects(gemma, 1, factors, [0], kl=50.0, prompts=PROMPTS, n_random=2)
    assert not bool(found.reached[0])
    assert not found.words(gemma, 0).reached
    assert float(found.kl[0]) < 50


def test_dead_features_are_left_out(model: LanguageModel, factors: snmf_kernels.Factorization) -> None:
    Z = torch.as_tensor(factors.Z).clone()
    Z[:, 1] = 0
    found = measure_effects(model, 1, replace(factors, Z=Z), kl=0.02, prompts=PROMPTS, n_random=2)
    assert found.index.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": 0.0}, "kl: wanted a divergence above 0"),
        ({"n_random": 1}, "n_random: wanted at least 2"),
        ({"indices": [4]}, "there are features 0-3, got 4"),
        ({"prompts": ("the",)}, "prompts: wanted at least 2"),
    ],
)
def test_bad_arguments(
    model: LanguageModel, factors: snmf_kernels.Factorization, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_effects(model, 1, factors, **options)


def test_other_width(model: LanguageModel, factors: snmf_kernels.Factorization) -> None:
    other = replace(factors, Z=torch.as_tensor(factors.Z)[1:])
    with pytest.raises(ValueError, match="wanted Z with 24 rows for layer 1, got 23"):
        measure_effects(model, 1, other)


class TestRun:
    @pytest.fixture
    def run(self, model: LanguageModel, samples: list[Sample], tmp_path: Path) -> Run:
        run = Run.collect(tmp_path / "run", model, samples, "1", sink_threshold=None)
        list(run.fit([1], 4, keep=0.25))
        return run

    def test_kept_and_extended(self, run: Run, model: LanguageModel) -> None:
        assert all(feature.effects is None for feature in run.features(1, model))
        some = run.effects(1, model, [2])
        assert some.index.tolist() == [2]
        described = run.features(1, lambda: pytest.fail("nothing is missing"))
        assert [feature.effects is None for feature in described] == [True, True, False, True]
        assert all(feature.lens_agreement == pytest.approx(some.agreement) for feature in described)
        assert described[2].effects == some.words(model, 2)
        every = run.effects(1, model)
        assert every.index.tolist() == [0, 1, 2, 3]
        again = run.effects(1, lambda: pytest.fail("nothing is missing"))
        # Half precision in the file.
        assert torch.allclose(again.change, every.change, atol=1e-3, rtol=1e-3)
        assert all(feature.effects is not None for feature in run.features(1, model))

    def test_of_a_run_that_may_not_be_written_to(
        self, run: Run, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are shown all the same."""
        run.features(1, model)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Effects, "save", refuse)
        shown = terminal.with_effects_of(run, 1, lambda: model, lambda described: described[:2])
        assert [feature.effects is not None for feature in shown] == [True, True, False, False]
        assert shown[0].lens_agreement is not None
        assert run.features(1, model)[0].effects is None

    def test_effects_of_other_prompts_are_measured_anew(
        self, run: Run, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(effects_module, "PROMPTS", PROMPTS)
            patch.setattr(
                effects_module.measure_effects,
                "__kwdefaults__",
                {**(effects_module.measure_effects.__kwdefaults__ or {}), "prompts": PROMPTS},
            )
            assert run.effects(1, model, [0, 2]).prompts == PROMPTS
        found = run.effects(1, model, [1])
        assert (found.prompts, found.index.tolist()) == (effects_module.PROMPTS, [1])

    def test_another_divergence_is_another_measurement(self, run: Run, model: LanguageModel) -> None:
        run.effects(1, model)
        other = run.effects(1, model, [1], kl=0.1)
        assert (other.target, other.index.tolist()) == (0.1, [1])
        assert run.effects(1, model).target == 0.1

    def test_they_do_not_outlive_their_factors(self, run: Run, model: LanguageModel) -> None:
        run.effects(1, model, [0])
        list(run.fit([1], 3, keep=0.25, overwrite=True))
        assert not run.effects_path(1).exists()

    def test_of_another_model(self, run: Run, make_model: Maker) -> None:
        other = make_model()
        with torch.no_grad():
            other.down_weight(0).add_(1)
        with pytest.raises(ValueError, match="are not those that"):
            run.effects(1, other)
