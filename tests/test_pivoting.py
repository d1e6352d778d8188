"""Non-negative least squares by exchanging active sets, and when ``encode`` does that."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import planted
from scipy.optimize import nnls
from test_properties import FEW

from snmf_kernels import _backends, _pivoting, _problem, fit, reference
from snmf_kernels._pivoting import Pivoting, price_in_sweeps


def gram(k: int, rows: int, seed: int, shared: float = 0.0) -> torch.Tensor:
    """Of k features that share a part, as ``[rows, k]``."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    return own + shared * torch.randn(rows, 1, generator=generator, dtype=torch.float64)


def solver_of(G: torch.Tensor, backend: str = "cpp") -> Pivoting:
    return Pivoting(
        G, _backends.choose("support_solve", G.device, torch.float64, backend).function, torch.float64
    )


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("shared", [0.0, 3.0])
@pytest.mark.parametrize("shift", [-0.4, 0.0, 1.0], ids=["mostly zeros", "half", "few zeros"])
def test_it_is_non_negative_least_squares(backend, shared, shift):
    Z = gram(12, 30, 0, shared)
    A = Z @ (torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).double() + shift)
    A += 0.5 * torch.randn(30, 40, generator=torch.Generator().manual_seed(2)).double()
    got = solver_of(Z.T @ Z, backend).solve(Z.T @ A)
    wanted = np.stack([nnls(Z.numpy(), a.numpy())[0] for a in A.T], axis=1)
    assert wanted.any()
    assert np.abs(got.numpy() - wanted).max() < 1e-9 * np.abs(wanted).max()
    assert np.array_equal(got.numpy() == 0, wanted == 0)


@settings(FEW, max_examples=60)
@given(
    k=st.integers(1, 9),
    extra=st.integers(0, 5),
    shared=st.sampled_from([0.0, 1.0, 30.0]),
    loudness=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
    whole=st.booleans(),
)
# Signs that rounding decides, where one feature is a sum of others.
@example(k=3, extra=1, shared=1.0, loudness=1e-12, seed=31, whole=True)
def test_any_problem_ends_at_its_optimum(k, extra, shared, loudness, seed, whole):
    """Whole numbers bring ties: coefficients and gradients that are zero at once."""
    Z, A = gram(k, k + extra, seed, shared), gram(7, k + extra, seed + 1)
    if whole:
        Z, A = Z.round() + torch.eye(k + extra, k).double(), A.round()
    Z *= torch.logspace(-3, 3, k, dtype=torch.float64)
    G, P = Z.T @ Z, Z.T @ A
    living = torch.diagonal(G) > 0
    solver = solver_of(G)
    if not solver.possible:
        assert not living.any()
        return
    y = solver.solve(P * loudness)
    assert bool((y >= 0).all())
    assert not bool(y[~living].any())
    unit = torch.diagonal(G)[living].sqrt()[:, None]
    x, gradient = y[living] * unit, (G @ y - P * loudness)[living] / unit
    tolerance = 1e-4 * loudness * float((P[living] / unit).abs().max())
    assert float(torch.minimum(x, gradient).abs().max()) <= tolerance


@pytest.mark.parametrize("rounded", [False, True], ids=["float64", "of float32"])
@pytest.mark.parametrize("alike", ["two alike", "two opposites", "a sum", "the opposite of a sum"])
def test_dependent_features_have_an_optimum_too(alike, rounded):
    Z = gram(8, 20, 3)
    both = Z[:, 0] + Z[:, 1]
    features = {
        "two alike": Z[:, 0],
        "two opposites": -Z[:, 0],
        "a sum": both,
        "the opposite of a sum": -both,
    }
    Z[:, 7] = features[alike]
    A = gram(40, 20, 4)
    G, P = Z.T @ Z, Z.T @ A
    y = solver_of(G.float()).solve(P.float()).double() if rounded else solver_of(G).solve(P)
    wanted = np.stack([nnls(Z.numpy(), a.numpy())[0] for a in A.T], axis=1)
    assert float(y.norm()) < 2 * float(np.linalg.norm(wanted)), "not large ones that cancel each other"
    left, least = (A - Z @ y).square().sum(0), (A - Z @ torch.from_numpy(wanted)).square().sum(0)
    assert bool((y >= 0).all())
    assert bool((left <= least * (1 + (1e-5 if rounded else 1e-8))).all())


def test_rounding_to_float32_does_not_make_dependent_features_impossible():
    """It leaves their Gram matrix indefinite or not, by chance."""
    for seed in range(8):
        Z = gram(8, 20, seed)
        Z[:, 7] = Z[:, 0] + Z[:, 1]
        assert solver_of((Z.T @ Z).float()).possible


def test_dead_features_stay_at_zero_and_indefinite_matrices_are_refused():
    Z = gram(5, 9, 3)
    Z[:, 2] = 0
    solver = solver_of(Z.T @ Z)
    y = solver.solve(Z.T @ gram(6, 9, 4))
    rest = [0, 1, 3, 4]
    assert not bool(y[2].any())
    alone = solver_of((Z.T @ Z)[rest][:, rest]).solve((Z.T @ gram(6, 9, 4))[rest])
    assert torch.equal(y[rest], alone)
    indefinite = solver_of(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())
    assert not indefinite.possible
    assert not bool(indefinite.solve(torch.ones(2, 3).double()).any())


def test_rounds_that_bring_nothing_end_in_exchanges_of_one(monkeypatch):
    """Without patience every round exchanges one coefficient of a token, and the optimum is the same."""
    Z = gram(10, 14, 5, shared=2.0)
    P = Z.T @ gram(30, 14, 6)
    wanted = solver_of(Z.T @ Z).solve(P)
    sets: list[torch.Tensor] = []
    exchanged = Pivoting._round

    def watched(self, zero, *arguments):
        sets.append(zero.clone())
        return exchanged(self, zero, *arguments)

    monkeypatch.setattr(Pivoting, "_round", watched)
    monkeypatch.setattr(_pivoting, "_PATIENCE", -2)  # its last value is never above it, so that all are stuck
    monkeypatch.setattr(_pivoting, "_ROUNDS", 1000)
    longest = 0
    for token in range(P.shape[1]):
        sets.clear()
        got = solver_of(Z.T @ Z).solve(P[:, token : token + 1])
        assert torch.allclose(got, wanted[:, token : token + 1], atol=1e-12)
        assert all(int((a ^ b).sum()) == 1 for a, b in itertools.pairwise(sets))
        longest = max(longest, len(sets))
    assert longest > 4


def test_the_price_grows_with_what_pivoting_does():
    G = torch.eye(40).double() + 0.1
    few, half = torch.ones(40, 5), torch.ones(40, 5)
    few[:3], half[:20] = 0, 0
    many = price_in_sweeps(G, few, 10_000)
    assert many < price_in_sweeps(G, half, 10_000)
    assert many == price_in_sweeps(G, 1 - few, 10_000), "of few non-zeros as of few zeros"
    assert many < price_in_sweeps(G, few, 10), "the inverse is shared by fewer"
    assert price_in_sweeps(G, few, 1) == price_in_sweeps(G, few, 16), "which are swept side by side"
    assert many < price_in_sweeps(torch.eye(40).double(), few, 10_000), "sweeps over a sparse ZtZ are cheap"


@pytest.fixture(scope="module")
def crowded():
    """A fit with features that are nearly dependent, and activations."""
    A, _, _ = planted(60, 300, 8, keep=0.1, noise=0.3)
    result = fit(A, 30, keep=0.1, max_iter=15)
    alike = result.Z[:, :1] + 0.03 * result.Z
    return replace(result, Z=reference.winner_take_all(alike, 30).to_dense()), A


def spied(monkeypatch) -> list[bool]:
    """What is decided from now on."""
    decisions = []
    decide = _problem.Problem._converges_slowly

    def spy(*arguments):
        decisions.append(decide(*arguments))
        return decisions[-1]

    monkeypatch.setattr(_problem.Problem, "_converges_slowly", spy)
    return decisions


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("options", [{}, {"l1_threshold": 0.4, "l2": 0.01}], ids=["plain", "penalised"])
def test_encode_exchanges_where_descent_crawls(monkeypatch, crowded, options, backend):
    result, A = crowded
    result, A = replace(result, options=result.options | options), A[:, :60]
    with monkeypatch.context() as patch:
        patch.setattr(_problem.Problem, "_converges_slowly", lambda *_: False)
        crawling = result.encode(A, tol=1e-6, max_sweeps=20_000, backend="cpp")
    decisions, exchanged = spied(monkeypatch), []
    exchange = _problem.Problem._pivot

    def kept(self, Z, ZtZ, out):
        exchange(self, Z, ZtZ, out)
        exchanged.append(out.clone())

    monkeypatch.setattr(_problem.Problem, "_pivot", kept)
    got = result.encode(A, tol=1e-6, backend=backend)
    assert decisions == [True]
    assert got.kkt_residual <= 1e-6
    assert got.relative_error == pytest.approx(crawling.relative_error, rel=1e-4)
    # The sweeps that follow would mend a start that is not the optimum.
    assert bool(exchanged[0].any())
    assert torch.allclose(exchanged[0], got.Y, rtol=1e-3, atol=1e-4 * float(got.Y.max()))


def test_encode_of_tokens_that_use_all_features(monkeypatch, crowded):
    """Few zeros, which the inverse of the Gram matrix serves."""
    generator = torch.Generator().manual_seed(3)
    Z = torch.randn(200, 30, generator=generator) + 30 * torch.randn(200, 1, generator=generator)
    Z /= Z.norm(dim=0)
    Y = 0.5 + torch.rand(30, 300, generator=generator)
    result = replace(crowded[0], Z=Z, neuron_scale=None)
    decisions = spied(monkeypatch)
    got = result.encode(Z @ Y)
    assert decisions == [True]
    assert got.kkt_residual <= 1e-4
    assert got.relative_error < 1e-5


def test_encode_descends_where_that_is_quick_or_asked_for(monkeypatch, crowded):
    result, A = crowded
    decisions = spied(monkeypatch)
    fit(A, 4, keep=0.1).encode(A)
    assert decisions == [False], "features that hardly overlap"
    del decisions[:]
    sparse = replace(result, options=result.options | {"max_active": 3})
    encoding = sparse.encode(A, max_sweeps=50)
    assert decisions == [False], "which features a token uses is not a question of signs"
    assert int((encoding.Y > 0).sum(0).max()) <= 3


def test_what_exchanging_leaves_is_descended(monkeypatch, crowded):
    """Tokens that took too many rounds, and all tokens if ZtZ has no factor."""
    result, A = crowded
    wanted = result.encode(A, tol=1e-5)
    monkeypatch.setattr(_pivoting, "_ROUNDS", 1)
    some = result.encode(A, tol=1e-5, max_sweeps=20_000)
    assert some.kkt_residual <= 1e-5
    assert some.relative_error == pytest.approx(wanted.relative_error, rel=1e-4)
    monkeypatch.undo()
    twice = result.Z.clone()
    twice[:, 1] = twice[:, 0]
    monkeypatch.setattr(_problem.Problem, "_converges_slowly", lambda *_: True)
    for limit in (_pivoting._SINGULAR, np.inf):
        monkeypatch.setattr(_pivoting, "_SINGULAR", limit)
        singular = replace(result, Z=twice).encode(A, tol=1e-4, max_sweeps=20_000)
        assert singular.kkt_residual <= 1e-4
