from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import snmf_kernels
from snmf_interp import Hierarchy, HierarchyState, JointOptions, build_tree, fit_hierarchy, joint
from snmf_interp.joint import JointIteration, Levels, Tokens, finetune, fit_features, joint_loss
from snmf_kernels import StopReason, ops

from .planted_tree import Planted, Score, adjusted_rand, planted_tree, score

KEEP = 0.1


def data(d: int = 60, n: int = 150, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Activations of which twelve features explain most."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(d, 12, generator=generator) * (torch.rand(d, 12, generator=generator) < 0.2)
    A = Z @ torch.rand(12, n, generator=generator).square()
    return (A + 0.2 * A.std() * torch.randn(d, n, generator=generator)).to(dtype)


def random_levels(A: Tensor, sizes: tuple[int, ...], count: int, seed: int = 1) -> Levels:
    generator = torch.Generator().manual_seed(seed)
    Z = [ops.winner_take_all(torch.randn(len(A), k, generator=generator).double(), count) for k in sizes]
    Y = [torch.rand(sizes[0], A.shape[1], generator=generator).to(A.dtype)]
    Y += [torch.rand(k, below, generator=generator).double() for below, k in itertools.pairwise(sizes)]
    return Levels(tuple(Z), tuple(Y))


def dense_loss(A: Tensor, levels: Levels, level: int) -> float:
    C = levels.Y[0].double()
    for Y in levels.Y[1 : level + 1]:
        C = Y @ C
    return float((A.double() - levels.Z[level].to_dense() @ C).square().sum())


def relative(A: Tensor, hierarchy: Hierarchy, level: int, scaled: bool) -> float:
    scale = hierarchy.neuron_scale if scaled and hierarchy.neuron_scale is not None else torch.ones(len(A))
    A, Z = A.double() / scale[:, None], hierarchy.levels[level].Z.double() / scale[:, None]
    return float((A - Z @ hierarchy.coefficients(level).double()).square().sum() / A.square().sum())


class TestJoint:
    @pytest.mark.parametrize("counted", [(0, 1, 2), (2,), (1,)])
    def test_loss_is_that_of_the_residual(self, counted: tuple[int, ...]) -> None:
        A = data()
        levels, tokens = random_levels(A, (10, 6, 3), 6), Tokens(A, None, A.dtype)
        expected = sum(dense_loss(A, levels, level) for level in counted)
        products = tokens.products(levels.Y[0])
        assert joint_loss(levels, products, counted, tokens.squared_norm) == pytest.approx(
            expected, rel=1e-12
        )

    def test_loss_in_both_units(self) -> None:
        A, scale = data(), torch.linspace(0.1, 3, 60, dtype=torch.float64)
        levels, tokens = random_levels(A, (10, 3), 6), Tokens(A, scale, A.dtype)
        products = tokens.products(levels.Y[0])
        scaled = joint_loss(levels, products, [1], tokens.squared_norm)
        assert scaled == pytest.approx(dense_loss(A / scale[:, None], levels, 1), rel=1e-12)
        original = Levels(tuple(Z.scaled_rows(scale) for Z in levels.Z), levels.Y)
        plain = joint_loss(levels, products, [1], float(tokens.energies.sum()), scale)
        assert plain == pytest.approx(dense_loss(A, original, 1), rel=1e-12)

    @pytest.mark.parametrize("which", ["top", "all"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_every_step_keeps_its_promises(self, which: str, dtype: torch.dtype) -> None:
        """The residual's loss never rises, Y >= 0, and Z within its sparsity, after every single iteration."""
        A = data(dtype=dtype)
        counts, options = (6, 4, 3), JointOptions(which, max_iter=30, tol=0)
        seen: list[float] = []

        def check(state: JointIteration) -> None:
            assert all(bool((Y >= 0).all()) for Y in state.levels.Y)
            for Z, count in zip(state.levels.Z, counts, strict=True):
                assert int((Z.to_dense() != 0).sum(0).max()) <= count
            losses = [dense_loss(A, state.levels, level) for level in options.counted(3)]
            assert sum(losses) == pytest.approx(state.losses[-1], rel=1e-5)
            seen.append(sum(losses))

        start = random_levels(A, (10, 6, 3), 3)
        state, _, _ = finetune(Tokens(A, None, dtype), start, counts, options, check)
        assert len(seen) >= 10
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(seen))
        assert all(after <= before for before, after in itertools.pairwise(state.losses))
        assert seen[-1] < 0.95 * seen[0]

    def test_middle_coefficients_reach_their_optimum(self) -> None:
        """Alone, the step for Y_1 converges to the non-negative least squares solution: its gradient says so."""
        A = data()
        levels, tokens = random_levels(A, (10, 6, 3), 6), Tokens(A, None, A.dtype)
        products = tokens.products(levels.Y[0])
        for _ in range(3000):
            levels = levels.with_coefficients(1, joint._descend_rows(levels, 1, products, (1, 2)))
        Y = levels.Y[1].clone().requires_grad_()
        C = Y @ levels.Y[0]
        loss = (A - levels.Z[1].to_dense() @ C).square().sum()
        loss = loss + (A - levels.Z[2].to_dense() @ (levels.Y[2] @ C)).square().sum()
        (gradient,) = torch.autograd.grad(loss, Y)
        assert float(torch.minimum(Y.detach(), gradient / gradient.abs().max()).abs().max()) < 1e-6
        assert 0 < int((levels.Y[1] == 0).sum()) < levels.Y[1].numel()

    def test_more_rows_than_are_solved_at_once(self) -> None:
        A = data()
        levels, tokens = random_levels(A, (40, 35, 20), 6), Tokens(A, None, A.dtype)
        products = tokens.products(levels.Y[0])
        before = joint_loss(levels, products, (2,), tokens.squared_norm)
        for level in (2, 1):
            levels = levels.with_coefficients(level, joint._descend_rows(levels, level, products, (2,)))
            after = joint_loss(levels, products, (2,), tokens.squared_norm)
            assert after < before
            before = after

    def test_dead_features_do_no_harm(self) -> None:
        A = data()
        levels = random_levels(A, (10, 6, 3), 6)
        for level, Z in enumerate(levels.Z):
            values = Z.values.clone()
            values[1] = 0
            levels = levels.with_features(level, dataclasses.replace(Z, values=values))
        Y = levels.Y[0].clone()
        Y[2] = 0
        state, _, _ = finetune(
            Tokens(A, None, A.dtype), levels.with_coefficients(0, Y), (6,) * 3, JointOptions(max_iter=5)
        )
        assert all(bool(Y.isfinite().all()) for Y in state.levels.Y)
        assert all(bool(Z.values.isfinite().all()) for Z in state.levels.Z)

    @pytest.mark.parametrize("name", ["_round", "_descend_tokens"])
    def test_a_step_that_would_raise_the_loss_is_taken_back(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        A = data()
        real = getattr(joint, name)

        def spoiled(*args: Any) -> Any:
            made = real(*args)
            return made.with_coefficients(1, made.Y[1] + 5) if name == "_round" else made + 5

        monkeypatch.setattr(joint, name, spoiled)
        options = JointOptions(max_iter=3, tol=0, patience=9)
        state, _, _ = finetune(Tokens(A, None, A.dtype), random_levels(A, (10, 3), 6), (6, 6), options)
        assert state.rejected == 3
        assert all(after <= before for before, after in itertools.pairwise(state.losses))
        assert float(state.levels.Y[1].min()) < 5

    def test_nothing_as_large_as_the_activations_is_made(self) -> None:
        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                made = function(*args, **(kwargs or {}))
                if isinstance(made, Tensor) and not made._is_view():
                    Largest.numel = max(Largest.numel, made.numel())
                return made

        A = data(d=100, n=2 * joint._TOKENS + 100, dtype=torch.float32)
        levels = random_levels(A, (8, 3), 6)
        with Largest():
            finetune(Tokens(A, None, A.dtype), levels, (6, 6), JointOptions(max_iter=2))
        assert Largest.numel <= max(A.shape[0] * joint._TOKENS, levels.Y[0].numel())
        assert Largest.numel < A.numel()

    def test_features_of_a_level_fit_its_coefficients(self) -> None:
        """From a start of zeros it finds supports by least squares."""
        A = data()
        levels, tokens = random_levels(A, (10, 3), 6), Tokens(A, None, A.dtype)
        products = tokens.products(levels.Y[0])
        zero = dataclasses.replace(levels.Z[0], values=torch.zeros_like(levels.Z[0].values))
        fitted = fit_features(levels.with_features(0, zero), products, (6, 6), (0,))
        assert dense_loss(A, fitted, 0) < dense_loss(A, levels.with_features(0, zero), 0)
        again = ops.column_descent(fitted.Z[0], products.AYt, products.YYt)
        assert torch.allclose(again.to_dense(), fitted.Z[0].to_dense(), atol=1e-6)

    def test_stop_reasons(self) -> None:
        A = data()

        def stopped(callback: Callable[[JointIteration], object] | None = None, **options: Any) -> StopReason:
            start = random_levels(A, (10, 3), 6)
            return finetune(Tokens(A, None, A.dtype), start, (6, 6), JointOptions(**options), callback)[2]

        assert stopped(max_iter=2, tol=0) is StopReason.MAX_ITER
        assert stopped(tol=0.5, patience=1) is StopReason.CONVERGED
        assert stopped(lambda state: len(state.losses) == 3) is StopReason.CALLBACK
        # Both levels can express the data exactly.
        levels = random_levels(A, (10, 3), 6)
        exact = levels.Z[1].to_dense() @ levels.Y[1] @ levels.Y[0]
        start = levels.with_features(0, ops.winner_take_all(levels.Z[1].to_dense() @ levels.Y[1], 60))
        assert finetune(Tokens(exact, None, A.dtype), start, (60, 60), JointOptions())[2] is StopReason.EXACT

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"levels": "best"}, "levels: wanted 'top' or 'all', got 'best'"),
            ({"max_iter": 0}, "max_iter: wanted a number >= 1"),
            ({"patience": True}, "patience: wanted"),
            ({"tol": float("nan")}, "tol: wanted a number >= 0"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            JointOptions(**options)


@pytest.fixture(scope="module")
def fitted() -> tuple[Tensor, Hierarchy]:
    A = data(dtype=torch.float32)
    return A, fit_hierarchy(A, [10, 6, 3], keep=KEEP, joint=JointOptions(max_iter=5))


class TestFit:
    def test_is_what_it_says(self, fitted: tuple[Tensor, Hierarchy]) -> None:
        A, hierarchy = fitted
        assert hierarchy.sizes == (10, 6, 3)
        for number, level in enumerate(hierarchy.levels):
            assert bool((level.Y >= 0).all())
            assert int((level.Z != 0).sum(0).max()) <= 6
            assert level.relative_error == pytest.approx(relative(A, hierarchy, number, False), rel=1e-4)
            assert level.relative_loss == pytest.approx(relative(A, hierarchy, number, True), rel=1e-4)
        losses = hierarchy.loss_history
        assert losses[-1] == pytest.approx(
            sum(level.relative_loss for level in hierarchy.levels) / 3, rel=1e-5
        )
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert hierarchy.stop_reason in (StopReason.MAX_ITER, StopReason.CONVERGED)

    def test_recursion_alone_is_the_public_fit(self) -> None:
        """With the paper's weights: level 1 is fit on the columns of Z_0, rows of Y_0 at unit norm."""
        A = data()
        hierarchy = fit_hierarchy(
            A, [8, 4], keep=KEEP, neuron_scale=None, feature_norm="energy", link_penalty=0, joint=None, seed=3
        )
        bottom = snmf_kernels.fit(A, 8, keep=KEEP, neuron_scale=None, seed=3)
        assert torch.equal(hierarchy.levels[0].Z, bottom.Z)
        assert torch.equal(hierarchy.levels[0].Y, bottom.Y)
        norms = bottom.Y.norm(dim=1)
        top = snmf_kernels.fit(bottom.Z * norms, 4, keep=KEEP, neuron_scale=None, seed=3)
        assert torch.equal(hierarchy.levels[1].Z, top.Z)
        assert torch.allclose(hierarchy.levels[1].Y, top.Y / norms)
        assert hierarchy.stop_reason is None
        assert hierarchy.loss_history == ()
        assert hierarchy.levels[1].start_loss == hierarchy.levels[1].relative_loss

    def test_fine_tuning_pays(self) -> None:
        A = data()
        alone = fit_hierarchy(A, [10, 6, 3], keep=KEEP, joint=None)
        both = {
            which: fit_hierarchy(A, [10, 6, 3], keep=KEEP, joint=JointOptions(which))
            for which in ("top", "all")
        }
        for tuned in both.values():
            assert tuned.levels[2].relative_loss < alone.levels[2].relative_loss
            assert tuned.levels[2].start_loss == pytest.approx(alone.levels[2].relative_loss)
        # Counting the top level alone leaves the finest one to look after itself.
        assert both["all"].levels[0].relative_loss < both["top"].levels[0].relative_loss

    def test_same_bits_again(self, fitted: tuple[Tensor, Hierarchy]) -> None:
        A, hierarchy = fitted
        state = torch.random.get_rng_state()
        again = fit_hierarchy(A, [10, 6, 3], keep=KEEP, joint=JointOptions(max_iter=5))
        assert torch.equal(state, torch.random.get_rng_state())
        assert_equal(hierarchy, again)

    @pytest.mark.parametrize("kind", ["strided", "numpy", "read-only", "bfloat16"])
    def test_any_activations(self, kind: str) -> None:
        A = data(dtype=torch.float32).bfloat16().float()
        kinds: dict[str, Callable[[], Any]] = {
            "strided": lambda: A.T.contiguous().T,
            "numpy": lambda: A.numpy(),
            "read-only": lambda: read_only(A),
            "bfloat16": lambda: A.bfloat16(),
        }
        options: dict[str, Any] = {"keep": KEEP, "joint": JointOptions(max_iter=3)}
        expected = fit_hierarchy(A, [8, 3], **options)
        found = fit_hierarchy(kinds[kind](), [8, 3], **options)
        assert found.loss_history == pytest.approx(expected.loss_history, rel=1e-3)
        assert found.levels[0].Z.dtype is torch.float32

    def test_a_fit_can_be_the_finest_level(self) -> None:
        A = data()
        base = snmf_kernels.fit(A, 10, keep=KEEP)
        with_base = fit_hierarchy(A, [10, 3], keep=KEEP, base=base)
        assert_equal(with_base, fit_hierarchy(A, [10, 3], keep=KEEP), options=False)
        with pytest.raises(ValueError, match="base: wanted a factorisation of A with 9 features"):
            fit_hierarchy(A, [9, 3], keep=KEEP, base=base)
        with pytest.raises(ValueError, match="at most 3 neurons in a feature, as keep has it, got 6"):
            fit_hierarchy(A, [10, 3], keep=KEEP / 2, base=base)

    def test_callback_is_told_of_every_stage_and_can_stop_it(self) -> None:
        states: list[HierarchyState] = []
        A = data()
        fit_hierarchy(A, [8, 4, 2], keep=KEEP, callback=states.append, joint=JointOptions(max_iter=4, tol=0))
        assert list(dict.fromkeys(state.stage for state in states)) == [
            "level 0",
            "level 1",
            "level 2",
            "joint",
        ]
        of_joint = [state for state in states if state.stage == "joint"]
        assert [state.n_iter for state in of_joint] == [1, 2, 3, 4]
        assert {state.max_iter for state in of_joint} == {4}
        stopped = fit_hierarchy(A, [8, 2], keep=KEEP, callback=lambda state: state.stage == "joint")
        assert stopped.stop_reason is StopReason.CALLBACK
        assert len(stopped.loss_history) == 2

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"sizes": [8]}, ValueError, "sizes: wanted two or more"),
            ({"sizes": [8, 8]}, ValueError, r"got \[8, 8\]"),
            ({"sizes": [8, 0]}, ValueError, r"got \[8, 0\]"),
            ({"keep": [0.1]}, ValueError, "keep: wanted one number, or one for each of 2 levels, got 1"),
            ({"keep": 0.0}, ValueError, "keep: wanted fractions"),
            ({"fixed": None}, TypeError, "fixed: no option of fit_hierarchy"),
            ({"feature_norm": "loud"}, ValueError, "feature_norm: wanted"),
            ({"link_penalty": -1.0}, ValueError, "link_penalty: wanted"),
            ({"solver": "mu"}, ValueError, "link_penalty: solver='mu'"),
            ({"A": torch.full((9, 9), torch.nan)}, ValueError, "A: wanted finite values"),
            ({"A": torch.zeros(3)}, ValueError, "A: wanted a floating-point matrix"),
            ({"A": [[1.0]]}, TypeError, "A: wanted a torch tensor"),
        ],
    )  # fmt: skip
    def test_arguments_are_checked(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            fit_hierarchy(**{"A": data(), "sizes": [8, 4], "keep": KEEP, **arguments})

    def test_the_papers_solver(self) -> None:
        hierarchy = fit_hierarchy(data(), [8, 4], keep=KEEP, solver="mu", link_penalty=0, max_iter=20)
        assert hierarchy.levels[0].relative_loss < 0.7

    def test_zeros(self) -> None:
        hierarchy = fit_hierarchy(torch.zeros(20, 30), [4, 2], keep=KEEP)
        assert [level.relative_error for level in hierarchy.levels] == [0, 0]
        assert not build_tree(hierarchy).nodes


class TestCheckpoint:
    OPTIONS: ClassVar[dict[str, Any]] = {"keep": KEEP, "joint": JointOptions(max_iter=6, tol=0)}

    @pytest.mark.parametrize("stop", [("level 0", 2), ("level 1", 1), ("joint", 1), ("joint", 4)])
    def test_a_killed_fit_goes_on_to_the_same_result(self, stop: tuple[str, int], tmp_path: Path) -> None:
        A = data(dtype=torch.float32)
        expected = fit_hierarchy(A, [10, 6, 3], **self.OPTIONS)

        def killed(state: HierarchyState) -> None:
            if (state.stage, state.n_iter) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_hierarchy(A, [10, 6, 3], checkpoint=tmp_path, callback=killed, **self.OPTIONS)
        seen: list[HierarchyState] = []
        found = fit_hierarchy(A, [10, 6, 3], checkpoint=tmp_path, callback=seen.append, **self.OPTIONS)
        assert_equal(found, expected)
        assert (seen[0].stage, seen[0].n_iter) == (stop[0], 1 if stop[0] != "joint" else stop[1] + 1)
        # A finished one is read.
        seen.clear()
        assert_equal(
            fit_hierarchy(A, [10, 6, 3], checkpoint=tmp_path, callback=seen.append, **self.OPTIONS), expected
        )
        assert not seen
        assert not list(tmp_path.rglob("*.tmp"))

    def test_of_another_call_is_refused(self, tmp_path: Path) -> None:
        A = data()
        fit_hierarchy(A, [8, 3], checkpoint=tmp_path, **self.OPTIONS)
        with pytest.raises(ValueError, match=r"was begun with sizes = \[8, 3\], not \[8, 4\]"):
            fit_hierarchy(A, [8, 4], checkpoint=tmp_path, **self.OPTIONS)
        with pytest.raises(ValueError, match="was begun on other activations"):
            fit_hierarchy(data(seed=1), [8, 3], checkpoint=tmp_path, **self.OPTIONS)
        with pytest.raises(ValueError, match="was begun with base = None"):
            fit_hierarchy(
                A, [8, 3], checkpoint=tmp_path, base=snmf_kernels.fit(A, 8, keep=KEEP), **self.OPTIONS
            )
        with pytest.raises(ValueError, match="was begun on other activations"):
            fit_hierarchy(data(d=50), [8, 3], checkpoint=tmp_path, **self.OPTIONS)


class TestHierarchy:
    def test_coefficients_and_encoding(self, fitted: tuple[Tensor, Hierarchy]) -> None:
        A, hierarchy = fitted
        Y0, Y1, Y2 = (level.Y for level in hierarchy.levels)
        assert torch.allclose(hierarchy.coefficients(2), Y2 @ Y1 @ Y0, rtol=1e-4)
        for level in range(3):
            factors = hierarchy.factorization(level)
            assert torch.equal(factors.Y, hierarchy.coefficients(level))
            assert factors.relative_error == hierarchy.levels[level].relative_error
            encoding = hierarchy.encode(A[:, :40], level, tol=1e-5)
            assert encoding.Y.shape == (hierarchy.sizes[level], 40)
            assert encoding.kkt_residual <= 1e-5
            # Not bound to what the levels below can express, so no worse in the units of the fit.
            scale = hierarchy.neuron_scale[:, None]
            scaled, Z = A[:, :40] / scale, factors.Z / scale
            free = (scaled - Z @ encoding.Y).square().sum()
            assert float(free) <= float((scaled - Z @ factors.Y[:, :40]).square().sum()) * (1 + 1e-5)
        for level, error in ((3, ValueError), (-1, ValueError), (1.0, TypeError)):
            with pytest.raises(error):
                hierarchy.coefficients(level)
        with pytest.raises(ValueError, match="level: wanted 1 or more"):
            hierarchy.links(0)

    def test_links_do_not_depend_on_how_scale_is_divided(self, fitted: tuple[Tensor, Hierarchy]) -> None:
        _, hierarchy = fitted
        low, middle, top = hierarchy.levels
        a, b = torch.rand(10) + 0.5, torch.rand(6) + 0.5
        other = dataclasses.replace(
            hierarchy,
            levels=(
                dataclasses.replace(low, Z=low.Z / a, Y=low.Y * a[:, None]),
                dataclasses.replace(middle, Z=middle.Z / b, Y=middle.Y / a * b[:, None]),
                dataclasses.replace(top, Y=top.Y / b),
            ),
        )
        for level in (1, 2):
            assert torch.allclose(other.links(level), hierarchy.links(level), atol=1e-5)
            assert float(hierarchy.links(level).max()) == pytest.approx(1)

    def test_file(self, fitted: tuple[Tensor, Hierarchy], tmp_path: Path) -> None:
        _, hierarchy = fitted
        path = tmp_path / "deep" / "tree.safetensors"
        hierarchy.save(path)
        assert_equal(Hierarchy.load(path), hierarchy)
        assert [p.name for p in path.parent.iterdir()] == ["tree.safetensors"]
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not match its checksum"):
            Hierarchy.load(path)
        path.write_bytes(content[:100])
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            Hierarchy.load(path)
        with pytest.raises(FileNotFoundError):
            Hierarchy.load(tmp_path / "nowhere")
        snmf_kernels.fit(data(), 3, keep=KEEP).save(path)
        with pytest.raises(
            ValueError, match="has no snmf_interp header, so it is none of this package's files"
        ):
            Hierarchy.load(path)

    def test_a_newer_file_is_refused(
        self, fitted: tuple[Tensor, Hierarchy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("snmf_interp.levels._VERSION", 2)
        fitted[1].save(tmp_path / "h")
        monkeypatch.undo()
        with pytest.raises(ValueError, match="has version 2, this package reads up to 1; upgrade it"):
            Hierarchy.load(tmp_path / "h")


class TestPlanted:
    """A planted tree is found under noise as strong as the signal, and nothing is found where nothing is."""

    def scores(
        self, spoil: Callable[[Hierarchy], Hierarchy] = lambda hierarchy: hierarchy, **options: Any
    ) -> Iterator[Score]:
        for seed in range(6):
            planted, hierarchy = fit_planted(seed, **options)
            spoilt = spoil(hierarchy)
            yield score(planted, spoilt, build_tree(spoilt))

    def mean(self, scores: Iterator[Score]) -> Score:
        rows = torch.tensor([dataclasses.astuple(score) for score in scores])
        return Score(*rows.mean(0).tolist())

    @pytest.mark.parametrize("which", ["all", "top"])
    def test_is_recovered(self, which: str) -> None:
        found = self.mean(self.scores(which=which))
        # Measured: 0.98, 0.74, 0.86, 0.88; local optima of the fits in single seeds are what is missing.
        assert found.cosine > 0.95
        assert found.rand > 0.6
        assert found.children > 0.75
        assert found.core > 0.8

    def test_nothing_is_found_where_nothing_is(self) -> None:
        found = self.mean(self.scores(shuffled=True))
        assert found.cosine > 0.95
        assert found.rand < 0.15
        assert found.children < 0.4
        assert found.core < 0.15

    def test_permuted_links_are_noticed(self) -> None:
        def permuted(hierarchy: Hierarchy) -> Hierarchy:
            low, top = hierarchy.levels
            order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
            return dataclasses.replace(hierarchy, levels=(low, dataclasses.replace(top, Y=top.Y[:, order])))

        found = self.mean(self.scores(spoil=permuted))
        assert found.rand < 0.2
        assert found.core < 0.3

    def test_without_winner_take_all_there_is_no_core(self) -> None:
        assert self.mean(self.scores(keep=1.0)).core < 0.1

    def test_adjusted_rand(self) -> None:
        left = torch.tensor([0, 0, 1, 1, 2, 2])
        assert adjusted_rand(left, (left + 1) % 3) == 1
        # By hand: one pair of 3 and 2 pairs together, of 15; (1 − 3·2/15) / (5/2 − 3·2/15).
        assert adjusted_rand(left, torch.tensor([0, 0, 0, 1, 1, 2])) == pytest.approx(
            (1 - 3 * 4 / 15) / (3.5 - 3 * 4 / 15)
        )


@functools.cache
def fit_planted(
    seed: int, *, shuffled: bool = False, which: str = "all", keep: float | None = None
) -> tuple[Planted, Hierarchy]:
    planted = planted_tree(noise=1.0, shuffled=shuffled, seed=seed)
    # Parents keep as many neurons as there are in a core.
    keeps = [planted.keep, planted.keep / 2] if keep is None else keep
    return planted, fit_hierarchy(planted.A, [16, 4], keep=keeps, joint=JointOptions(which))


def read_only(A: Tensor) -> np.ndarray:
    array = A.numpy().copy()
    array.setflags(write=False)
    return array


def assert_equal(left: Hierarchy, right: Hierarchy, *, options: bool = True) -> None:
    for a, b in zip(left.levels, right.levels, strict=True):
        for field in dataclasses.fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name
    assert left.loss_history == right.loss_history
    assert (left.rejected, left.stop_reason) == (right.rejected, right.stop_reason)
    if left.neuron_scale is not None:
        assert torch.equal(left.neuron_scale, right.neuron_scale)
    if options:
        assert json.loads(json.dumps(left.options)) == json.loads(json.dumps(right.options))
