"""Loud tokens and neurons that say next to nothing do not decide a fit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems import assert_near, planted

from snmf_kernels import Factorization, OutlierWarning, fit

D, N, K = 200, 3000, 12
BAD = torch.arange(0, N, 100)  # 1 % of the tokens
GOOD = torch.ones(N, dtype=torch.bool).index_fill(0, BAD, False)


PLANTED = planted(D, N, K, keep=0.05, noise=0.5, seed=3)


@pytest.fixture(scope="module")
def clean():
    return PLANTED[0]


def options(**more):
    # From the planted features, so that no fit ends in another optimum by its start.
    return {"keep": 0.05, "init": (PLANTED[1], None), **more}


def error_on(A, result, tokens):
    return float((A - result.Z @ result.Y)[:, tokens].square().sum() / A[:, tokens].square().sum())


def sinks(A, kind, times):
    """A with 1 % of the tokens so many times as large as the mean one."""
    generator = torch.Generator().manual_seed(5)
    A, norm = A.clone(), times * A.norm(dim=0).mean()
    if kind == "scaled":
        A[:, BAD] *= times
        return A
    directions = torch.randn(D, 1 if kind == "one direction" else len(BAD), generator=generator)
    if kind == "three neurons":
        directions[3:] = 0
    A[:, BAD] = norm * directions / directions.norm(dim=0)
    return A


@pytest.mark.parametrize("times", [10, 50, 200])
@pytest.mark.parametrize("kind", ["scaled", "one direction", "directions", "three neurons"])
@pytest.mark.filterwarnings("ignore::snmf_kernels.OutlierWarning")
def test_loud_tokens_do_not_spoil_the_others(clean, kind, times):
    A = sinks(clean, kind, times)
    wanted = error_on(clean, fit(clean, K, **options()), GOOD)
    assert error_on(A, fit(A, K, **options()), GOOD) <= 1.01 * wanted
    if kind in ("one direction", "directions") and times >= 50:
        unclipped = error_on(A, fit(A, K, token_weights=None, **options()), GOOD)
        assert unclipped > 1.05 * wanted, "such tokens must be able to spoil a fit"


def test_what_the_errors_are_of(clean, tmp_path):
    A = sinks(clean, "three neurons", 200)
    with pytest.warns(OutlierWarning, match=r"1% of the tokens hold \d+% of the energy.*weights are clipped"):
        result = fit(A, K, **options())
    whole = error_on(A, result, torch.ones(N, dtype=torch.bool))
    assert result.relative_error == pytest.approx(whole, rel=1e-3)
    # Loud tokens as if they were of typical norm.
    norms = A.norm(dim=0)
    typical = norms.sort().values[: int(0.9 * N)].square().mean().sqrt()
    weights = torch.where(norms > 5 * typical, typical / norms, 1.0).square()
    squares = (A - result.Z @ result.Y).square().sum(0) * weights
    assert result.clipped_error == pytest.approx(
        float(squares.sum() / (norms.square() * weights).sum()), rel=1e-3
    )
    # The loud tokens are given up, and only one of the errors says what became of the others.
    assert result.relative_error > 0.9
    assert result.clipped_error == pytest.approx(error_on(A, result, GOOD), rel=0.05)
    assert f"clipped_error={result.clipped_error:.4g}" in repr(result)
    result.save(tmp_path / "f.safetensors")
    loaded = Factorization.load(tmp_path / "f.safetensors")
    assert loaded.clipped_error == result.clipped_error


def test_clipped_weights_are_kept_and_used_again(clean, tmp_path):
    A = sinks(clean, "one direction", 50)
    with pytest.warns(OutlierWarning):
        result = fit(A.numpy(), K, **options())
    assert isinstance(result.token_weights, np.ndarray)
    assert bool((result.token_weights[BAD] < 0.01).all())
    assert float(result.token_weights[GOOD].mean()) > 0.99
    result.save(tmp_path / "f.safetensors")
    loaded = Factorization.load(tmp_path / "f.safetensors")
    assert np.array_equal(loaded.token_weights.numpy(), result.token_weights)
    certificate = loaded.certificate(A, bound=False)
    assert certificate == result.certificate(A, bound=False)
    share = result.loss_history[-1] / float(
        ((A / torch.from_numpy(result.neuron_scale)[:, None]).square().sum(0) * loaded.token_weights).sum()
    )
    assert certificate.relative_loss == pytest.approx(share, rel=1e-3)


def test_ordinary_tokens_have_no_weights(clean):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(clean, K, **options())
    assert result.token_weights is None
    assert result.clipped_error == result.relative_error
    assert torch.equal(result.Z, fit(clean, K, token_weights=None, **options()).Z)


@pytest.mark.parametrize(
    "more", [{"token_weights": None}, {"neuron_scale": None}, {"solver": "mu", "max_iter": 5}]
)
def test_a_warning_where_loud_tokens_are_left_as_they_are(clean, more):
    with pytest.warns(
        OutlierWarning, match="they decide the fit: leave them out, or use token_weights='clip'"
    ):
        fit(sinks(clean, "scaled", 50), K, **options(**more))


def test_clipping_without_a_neuron_scale(clean):
    A = sinks(clean, "one direction", 50)
    with pytest.warns(OutlierWarning):
        result = fit(A, K, neuron_scale=None, token_weights="clip", **options())
    wanted = error_on(clean, fit(clean, K, neuron_scale=None, **options()), GOOD)
    assert error_on(A, result, GOOD) <= 1.01 * wanted


def junk(kind):
    generator = torch.Generator().manual_seed(7)
    neurons = torch.zeros(40, N)
    if kind == "faint":
        return 1e-6 * torch.randn(40, N, generator=generator)
    if kind == "faint, of one sign":
        return 1e-6 * torch.rand(40, N, generator=generator)
    tokens = 5 if kind == "five tokens" else 1
    for neuron in neurons:
        neuron[torch.randperm(N, generator=generator)[:tokens]] = 100.0 if kind == "one loud token" else 1.0
    if kind == "one token for all":
        neurons.zero_()
        neurons[:, 17] = 1.0
    return neurons


@pytest.mark.parametrize(
    "kind", ["faint", "faint, of one sign", "one token", "one loud token", "one token for all", "five tokens"]
)
@pytest.mark.filterwarnings("ignore::snmf_kernels.OutlierWarning")
def test_neurons_that_say_next_to_nothing_own_no_feature(clean, kind):
    A = torch.cat([clean, junk(kind)])
    # Junk must not draw seeds of clusters either.
    result = fit(A, K, keep=0.05)
    energy = (result.Z / result.neuron_scale[:, None]).square()
    assert float((energy[D:].sum(0) / energy.sum(0)).max()) < 0.1
    assert_near(result.neuron_scale[:D], fit(clean, K, **options()).neuron_scale, 0.02)


def test_the_scale_of_a_silent_neuron_is_the_least_one(clean):
    A = torch.cat([clean, torch.zeros(1, N)])
    scale = fit(A, K, keep=0.05).neuron_scale
    assert float(scale[-1]) == pytest.approx(0.05 * float(scale[:-1].median()), rel=0.02)
    assert bool((fit(torch.zeros(20, 30), 2, keep=0.2).neuron_scale == 1).all())


def test_tokens_without_activations_are_no_typical_ones(clean):
    """Nor are the few others loud."""
    A = torch.cat([torch.zeros(D, 19 * 300), clean[:, :300]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlierWarning)
        result = fit(A, K, **options())
    assert result.token_weights is None
    assert result.relative_error < 0.5


@pytest.mark.parametrize("where", ["entry", "token"])
@pytest.mark.filterwarnings("ignore::snmf_kernels.OutlierWarning")
def test_values_far_beyond_all_others(clean, where):
    """Whose squares leave the range of float32, while those of all others stay in it."""
    A = clean.clone()
    if where == "entry":
        A[3, 5] = 1e30
    else:
        A[:, 5] *= 1e30
    others = torch.arange(N) != 5
    result = fit(A, K, **options())
    assert float(result.token_weights[5]) < 1e-30
    assert error_on(A, result, others) <= 1.01 * error_on(clean, fit(clean, K, **options()), others)
    assert 0 < result.clipped_error < 1
    assert len(result.dead_features) == 0
