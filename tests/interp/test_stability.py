from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import planted

import snmf_kernels
from snmf_interp import KChoice, LanguageModel, Sample, choosing, match_features, stability_of, suggest_k
from snmf_interp.choosing import KEvidence, _choose, _held_out, candidates
from snmf_interp.refits import choose_k, other_starts
from snmf_interp.runs import Run
from snmf_interp.stability import stability


@pytest.fixture(scope="module")
def fits() -> list[snmf_kernels.Factorization]:
    A, _, _ = planted(200, 1200, 8, keep=0.05, noise=0.1, seed=1)
    return snmf_kernels.fit_many(A, 8, seed=[0, 1, 2], keep=0.05)


def permuted(
    fit: snmf_kernels.Factorization, order: torch.Tensor, **changes: Any
) -> snmf_kernels.Factorization:
    return replace(fit, Z=fit.Z[:, order] * 2, Y=fit.Y[order], **changes)


class TestMatching:
    def test_recovers_a_permutation(self, fits: list[snmf_kernels.Factorization]) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        match = match_features(fits[0], permuted(fits[0], order))
        assert torch.equal(order[match.other], torch.arange(8))
        torch.testing.assert_close(match.similarity, torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(match.correlation, torch.ones(8, dtype=torch.float64))

    def test_no_feature_twice(self, fits: list[snmf_kernels.Factorization]) -> None:
        """Two copies of a feature: only one of them can have its match, whatever the cosines say."""
        doubled = permuted(fits[0], torch.tensor([0, 0, 2, 3, 4, 5, 6, 7]))
        match = match_features(doubled, fits[0])
        assert sorted(match.other.tolist()) == list(range(8))
        assert int((match.similarity > 0.99).sum()) == 7

    def test_opposite_features_are_not_the_same(self, fits: list[snmf_kernels.Factorization]) -> None:
        match = match_features(fits[0], replace(fits[0], Z=-fits[0].Z))
        assert float(match.similarity.max()) < 0.5

    def test_fewer_features_in_the_other(self, fits: list[snmf_kernels.Factorization]) -> None:
        fewer = permuted(fits[0], torch.arange(5))
        match = match_features(fits[0], fewer)
        assert match.other.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
        assert match.similarity[5:].tolist() == [0, 0, 0]
        assert bool(match.correlation[5:].isnan().all())

    def test_other_neurons_are_refused(self, fits: list[snmf_kernels.Factorization]) -> None:
        with pytest.raises(ValueError, match="the same 200 neurons, got 100"):
            match_features(fits[0], replace(fits[0], Z=fits[0].Z[:100]))


class TestStability:
    def test_copies_recur_and_strangers_do_not(self, fits: list[snmf_kernels.Factorization]) -> None:
        first = fits[0]
        copy = permuted(first, torch.arange(8).flip(0))
        order = torch.rand(first.Z.shape, generator=torch.Generator().manual_seed(0)).argsort(0)
        stranger = replace(first, Z=torch.as_tensor(first.Z).gather(0, order))
        report = stability_of([first, copy, stranger])
        assert report.recurrence.tolist() == [0.5] * 8
        assert report.agreement.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        assert report.mean_recurrence == pytest.approx(1 / 3)
        # Without one of them: 0, 0 and 1, whose jackknife variance is 2/3 · 2/3.
        assert report.standard_error == pytest.approx(2 / 3)
        assert report.share_recurring(0.5) == 1
        assert report.share_recurring(0.6) == 0

    def test_chance_is_low_and_structure_is_not(self, fits: list[snmf_kernels.Factorization]) -> None:
        report = stability_of(fits)
        assert report.mean_recurrence > 0.6
        assert report.chance.neurons < 0.02
        assert report.chance.features < 0.15

    def test_a_loud_neuron_makes_chance_high(self) -> None:
        """All features share one neuron that outweighs the rest: dealing its weights out changes nothing."""
        made = snmf_kernels.fit(torch.rand(40, 30), 6, keep=0.2, max_iter=2)
        generator = torch.Generator().manual_seed(0)
        loud = []
        for _ in range(3):
            Z = torch.randn(40, 6, generator=generator)
            Z[0] = 100
            loud.append(replace(made, Z=Z))
        report = stability_of(loud)
        assert report.mean_recurrence == 1
        assert report.chance.features == 1
        assert report.chance.neurons < 0.5
        assert report.n_duplicates == (15, 15, 15)

    def test_dead_and_duplicate_features(self, fits: list[snmf_kernels.Factorization]) -> None:
        Z = torch.as_tensor(fits[0].Z).clone()
        Z[:, 3], Z[:, 5] = 0, 3 * Z[:, 1]
        ill = replace(fits[0], Z=Z, dead_features=torch.tensor([3]))
        report = stability_of([ill, fits[0]])
        assert report.dead == (1, 0)
        assert report.n_duplicates == (1, 0)
        assert [(pair.first, pair.second) for pair in report.duplicates] == [(1, 5)]
        assert report.duplicates[0].cosine == pytest.approx(1)
        assert float(report.recurrence[3]) == 0
        assert math.isnan(report.standard_error)

    def test_fits_and_reports(self) -> None:
        A, _, _ = planted(100, 300, 4, keep=0.1, noise=0.1)
        report = stability(A.numpy(), 4, seeds=[5, 2], keep=0.1)
        assert report.seeds == (5, 2)
        assert report.matched.shape == report.similarity.shape == report.correlation.shape == (4, 1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seeds": 1}, "seeds: wanted at least 2"),
            ({"seeds": [3, 3]}, "all different"),
            ({"threshold": 0}, "threshold: wanted a cosine"),
            ({"duplicate_threshold": 1.5}, "duplicate_threshold: wanted a cosine"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stability(torch.rand(20, 30), 2, **arguments)

    def test_unlike_fits_are_refused(self, fits: list[snmf_kernels.Factorization]) -> None:
        with pytest.raises(ValueError, match="Z of one shape"):
            stability_of([fits[0], permuted(fits[0], torch.arange(5))])
        with pytest.raises(ValueError, match="at least 2, got 1"):
            stability_of(fits[:1])


class TestSuggestK:
    @pytest.mark.parametrize(("k", "ks"), [(6, [2, 4, 6, 8, 12]), (20, [10, 15, 20, 25, 40])])
    @pytest.mark.parametrize("noise", [0.05, 0.3])
    def test_finds_the_planted_number(self, k: int, ks: list[int], noise: float) -> None:
        A, _, _ = planted(300, 2000, k, keep=0.03, noise=noise, seed=1)
        choice = suggest_k(A, ks, groups=torch.arange(2000) // 10, seeds=4, keep=0.03)
        assert choice.k == k, choice.evidence
        errors = {row.k: row.relative_error for row in choice.evidence}
        # The error knows it too: it falls steeply up to k.
        assert errors[ks[1]] > 2 * errors[k]

    def test_noise_is_said_to_be_noise(self) -> None:
        A = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
        choice = suggest_k(A, [3, 6], seeds=3, keep=0.1)
        assert all(row.beyond_chance < 0.3 for row in choice.evidence)

    def test_rule(self) -> None:
        def row(k: int, recurrence: float, error: float = 0.05, chance: float = 0.0) -> KEvidence:
            return KEvidence(k, 0.5, 0.5, recurrence, error, chance, 0, 0)

        assert _choose([row(10, 0.5), row(20, 0.8), row(40, 0.76), row(80, 0.7)])[0] == 40
        k, reason = _choose([row(10, 0.5), row(20, 0.8), row(40, 0.78)])
        assert (k, "larger ones may do as well" in reason) == (40, True)
        # What chance gives is taken off: 0.75 against 0.7.
        assert _choose([row(10, 0.8, 0.01, chance=0.2), row(20, 0.7, 0.01)])[0] == 10
        assert _choose([row(10, 0.8, 0.01, chance=0.5), row(20, 0.7, 0.01)])[0] == 20
        assert "says little" in _choose([row(10, 0.05, 0.04), row(20, 0.0)])[1]
        assert row(10, 0.6, chance=0.2).n_recurring == pytest.approx(5)
        assert row(10, 1.0, chance=1.0).beyond_chance == 0

    def test_candidates(self) -> None:
        assert candidates(1536, 14_000) == [25, 50, 100, 200, 400]
        assert candidates(1536, 640) == [4, 8, 16, 32, 64]
        assert candidates(24, 30) == [1, 3]

    def test_known_evidence_is_not_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        A, _, _ = planted(60, 300, 4, keep=0.1, noise=0.1)
        seen: list[KEvidence] = []
        first = suggest_k(A.numpy(), [2, 4], seeds=3, after=seen.append, keep=0.1)
        assert [row.k for row in seen] == [2, 4]
        monkeypatch.setattr(snmf_kernels, "fit_many", lambda *_a, **_o: pytest.fail("fitted again"))
        assert suggest_k(A.numpy(), [2, 4], seeds=3, known=seen, keep=0.1) == first

    def test_whole_texts_are_held_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3] * 5)
        A = torch.arange(50.0).expand(20, 50) + 1
        trained: list[torch.Tensor] = []

        def fit_many(A: torch.Tensor, *_arguments: Any, **_options: Any) -> Any:
            trained.append(A[0].long() - 1)
            raise KeyboardInterrupt

        monkeypatch.setattr(snmf_kernels, "fit_many", fit_many)
        with pytest.raises(KeyboardInterrupt):
            suggest_k(A, [2], groups=groups, held_out=0.5, seeds=3)
        used = set(groups[trained[0]].tolist())
        assert len(used) == 2
        assert len(trained[0]) == sum(int((groups == group).sum()) for group in used)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seeds": 2}, "seeds: wanted at least 3"),
            ({"ks": []}, "ks: wanted at least one"),
            ({"held_out": 1.0}, "held_out: wanted a share"),
            ({"held_out": 0.001}, "leaves none on one side"),
            ({"groups": torch.zeros(3)}, "groups: wanted one number for each of the 40"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            suggest_k(torch.rand(20, 40), **{"ks": [2], **arguments})


class TestRuns:
    @pytest.fixture
    def run(self, tmp_path: Path, make_model: Callable[..., LanguageModel], samples: list[Sample]) -> Run:
        run = Run.collect(tmp_path / "run", make_model(), samples, "0", texts="here")
        list(run.fit([0], 3, max_iter=5, keep=0.2, seed=1))
        return run

    def test_other_starts_are_kept(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        made = other_starts(run, 0, 3)
        assert [fit.options["seed"] for fit in made] == [1, 0, 2]
        assert torch.equal(torch.as_tensor(made[0].Z), torch.as_tensor(run.factors(0).Z))
        with monkeypatch.context() as patch:
            patch.setattr(snmf_kernels, "fit_many", lambda *_a, **_o: pytest.fail("fitted again"))
            again = other_starts(run, 0, 3)
        assert all(
            torch.equal(torch.as_tensor(a.Z), torch.as_tensor(b.Z)) for a, b in zip(made, again, strict=True)
        )
        # With other options the old fits are none of this layer's.
        list(run.fit([0], 2, max_iter=5, keep=0.2, seed=1, overwrite=True))
        assert [fit.k for fit in other_starts(run, 0, 3)] == [2, 2, 2]

    def test_what_is_fitted_before_an_interrupt_is_kept(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(seed: int) -> None:
            if seed == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            other_starts(run, 0, 4, before=stop)
        seeds: list[int] = []
        other_starts(run, 0, 4, before=seeds.append)
        assert seeds == [2, 3]

    def test_equal_texts_are_held_out_together(
        self, tmp_path: Path, make_model: Callable[..., LanguageModel], samples: list[Sample],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        twice = [*samples, *(Sample(f"{one.id} again", one.text.replace(" ", "  ")) for one in samples)]
        run = Run.collect(tmp_path / "twice", make_model(), twice, "0", sink_threshold=None)
        masks: list[torch.Tensor] = []

        def held_out(*arguments: Any) -> torch.Tensor:
            masks.append(_held_out(*arguments))
            raise KeyboardInterrupt

        monkeypatch.setattr(choosing, "_held_out", held_out)
        with pytest.raises(KeyboardInterrupt):
            choose_k(run, 0, [2], {})
        text_of = run.store().samples(0)
        held, trained = (set(text_of[mask].tolist()) for mask in (masks[0], ~masks[0]))
        assert held
        assert trained
        assert not held & trained
        n = len(samples)
        assert held == {(text + n) % (2 * n) for text in held}

    def test_evidence_is_kept(self, run: Run) -> None:
        options = {"max_iter": 5, "keep": 0.2, "seed": 1}

        def fitted(ks: list[int], **changes: Any) -> tuple[list[int], KChoice]:
            begun: list[int] = []
            choice = choose_k(run, 0, ks, options | changes, before=begun.append)
            return begun, choice

        begun, choice = fitted([2, 4])
        assert begun == [2, 4]
        assert choice.seeds == (1, 2, 3, 4, 5)
        assert fitted([2, 4]) == ([], choice)
        assert fitted([2, 3, 4])[0] == [3]
        assert fitted([2], keep=0.3)[0] == [2]
