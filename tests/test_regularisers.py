"""What the options of ``fit`` beyond the paper promise: penalties, fixed features, weights, and the certificate."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from problems import assert_near, planted

from snmf_kernels import Factorization, fit

SCALES = [None, "rms"]


@pytest.fixture(scope="module")
def activations():
    return planted(90, 300, 6, keep=0.1, noise=0.3, dtype=torch.float64)[0]


def in_scaled_units(result, A):
    """(Z, A) in which ``fit`` minimised, float64."""
    A, Z = A.double(), torch.as_tensor(result.Z).double()
    if result.neuron_scale is None:
        return Z, A
    scale = torch.as_tensor(result.neuron_scale).double()[:, None]
    return Z / scale, A / scale


def dense_objective(result, A, weights=None):
    """What ``fit`` says that it minimised, from dense matrices."""
    Z, A = in_scaled_units(result, A)
    Y, norms = result.Y.double(), Z.norm(dim=0)[:, None]
    threshold, l2 = result.options["l1_threshold"], result.options["l2"]
    terms = (A - Z @ Y).square().sum(0) + (2 * threshold * norms * Y + l2 * (norms * Y).square()).sum(0)
    return float((terms if weights is None else terms * weights).sum())


def distance_from_optimum(result, A, Y=None):
    """``‖min(Y, gradient / curvature)‖ / ‖Y‖`` of the penalised problem, from dense matrices.

    With max_active, of the features that a token uses.
    """
    Z, A = in_scaled_units(result, A)
    Y = (result.Y if Y is None else Y).double()
    norms = Z.norm(dim=0)
    alive = norms > 0
    threshold, l2 = result.options["l1_threshold"], result.options["l2"]
    gradient = Z.T @ (Z @ Y - A) + threshold * norms[:, None] + l2 * norms[:, None].square() * Y
    step = torch.minimum(Y[alive], gradient[alive] / (norms[alive, None].square() * (1 + l2)))
    if result.options["max_active"]:
        step = torch.where(Y[alive] > 0, step, 0)
    return float(step.norm() / Y.norm())


def used_share(Y):
    return float((Y > 0).double().mean())


@pytest.mark.parametrize("neuron_scale", SCALES)
def test_l1_thins_out_the_coefficients(activations, neuron_scale):
    results = [
        fit(activations, 6, keep=0.1, l1=l1, neuron_scale=neuron_scale) for l1 in (0, 0.01, 0.03, 0.1, 0.3)
    ]
    shares = [used_share(result.Y) for result in results]
    assert all(later < earlier for earlier, later in itertools.pairwise(shares)), shares
    codes = [used_share(result.encode(activations).Y) for result in results]
    assert codes == pytest.approx(shares, rel=0.02)
    token = in_scaled_units(results[0], activations)[1].square().sum(0).mean().sqrt()
    assert results[2].options["l1_threshold"] == pytest.approx(0.03 * float(token), rel=1e-12)


def test_an_l1_beyond_every_projection_leaves_nothing(activations):
    result = fit(activations, 6, keep=0.1, l1=20)
    assert not bool(result.Y.any())
    assert result.relative_error == 1
    assert result.dead_features.tolist() == list(range(6))
    assert result.loss_history[-1] == pytest.approx(dense_objective(result, activations), rel=1e-12)


@pytest.mark.parametrize("neuron_scale", SCALES)
def test_l2_shrinks_the_reconstruction(activations, neuron_scale):
    results = [fit(activations, 6, keep=0.1, l2=l2, neuron_scale=neuron_scale) for l2 in (0, 0.1, 0.5, 2)]
    sizes = [float((result.Z @ result.Y).norm()) for result in results]
    assert all(later < 0.95 * earlier for earlier, later in itertools.pairwise(sizes)), sizes
    # It is used no less often, unlike with l1.
    assert used_share(results[-1].Y) > 0.8 * used_share(results[0].Y)


@pytest.mark.parametrize("l1", [0.0, 0.05])
@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_coefficients_are_the_optimum_of_the_penalised_problem(activations, backend, neuron_scale, l1, l2):
    new = planted(90, 70, 6, keep=0.1, noise=0.3, seed=4, dtype=torch.float64)[0]
    result = fit(activations, 6, keep=0.1, l1=l1, l2=l2, neuron_scale=neuron_scale, backend=backend)
    assert distance_from_optimum(result, activations) < 1e-3
    for A in (activations, new):
        code = result.encode(A, tol=1e-8, backend=backend)
        assert code.kkt_residual <= 1e-8
        assert distance_from_optimum(result, A, code.Y) == pytest.approx(
            code.kkt_residual, rel=1e-3, abs=1e-14
        )
    assert result.loss_history[-1] == pytest.approx(dense_objective(result, activations), rel=1e-10)


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.1, 0.5)])
def test_penalties_of_a_single_feature_by_hand(l1, l2):
    A = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)).double()
    A[:, :5] = -A[:, :5]
    result = fit(A, 1, keep=0.5, l1=l1, l2=l2, neuron_scale=None)
    z = result.Z[:, 0]
    threshold = l1 * float(A.square().sum(0).mean().sqrt())
    wanted = ((z @ A - threshold * z.norm()) / (z @ z * (1 + l2))).clamp(min=0)
    assert not bool(wanted[:5].any())
    assert_near(result.encode(A).Y[0], wanted, 1e-12)
    assert_near(result.Y[0], wanted, 1e-12)


@pytest.mark.parametrize(
    "options", [{"l1": 0.05}, {"l2": 0.5}, {"max_active": 2}, {"l1": 0.05, "max_active": 2}]
)
@pytest.mark.parametrize("neuron_scale", SCALES)
def test_the_scale_of_the_data_does_not_matter_to_penalties(activations, neuron_scale, options):
    options = {"keep": 0.1, "neuron_scale": neuron_scale, **options}
    wanted = fit(activations, 6, **options)
    for power in (-30, 30):
        got = fit(2.0**power * activations, 6, **options)
        assert got.n_iter == wanted.n_iter
        assert_near(got.Y, wanted.Y, 1e-12)
        assert_near(got.Z, 2.0**power * wanted.Z, 1e-12)
        assert_near(got.encode(2.0**power * activations).Y, wanted.encode(activations).Y, 1e-12)


def test_only_the_product_of_z_and_y_is_penalised(activations):
    start = fit(activations, 6, keep=0.1, max_iter=5).Y
    factors = torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    options = {"keep": 0.1, "l1": 0.05, "l2": 0.1, "max_iter": 4, "tol": 0, "patience": 9}
    plain, scaled = (fit(activations, 6, init=(None, Y0), **options) for Y0 in (start, factors * start))
    assert_near(scaled.Z @ scaled.Y, plain.Z @ plain.Y, 1e-9)
    assert scaled.loss_history == pytest.approx(plain.loss_history, rel=1e-9)


@pytest.mark.parametrize("options", [{"l1": 0.05, "l2": 0.1}, {"max_active": 2}])
@pytest.mark.parametrize("neuron_scale", SCALES)
def test_the_lengths_of_features_do_not_matter_to_a_code(activations, neuron_scale, options):
    result = fit(activations, 6, keep=0.1, neuron_scale=neuron_scale, max_iter=5, **options)
    lengths = torch.logspace(-2, 2, 6, dtype=torch.float64)
    other = dataclasses.replace(result, Z=result.Z * lengths)
    codes = [factors.encode(activations, tol=1e-9).Y for factors in (result, other)]
    assert_near(codes[1] * lengths[:, None], codes[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_max_active_is_a_bound_on_every_token(activations, most, backend, neuron_scale, dtype):
    A = activations.to(dtype)
    new = planted(90, 70, 6, keep=0.1, noise=0.3, seed=4, dtype=dtype)[0]
    result = fit(A, 6, keep=0.1, max_active=most, neuron_scale=neuron_scale, backend=backend)
    code = result.encode(new, backend=backend)
    for Y in (result.Y, code.Y):
        assert int((Y > 0).sum(0).max()) == most
        assert bool((Y >= 0).all())
    # What is used is at its optimum.
    assert distance_from_optimum(result, A) < 1e-3
    assert distance_from_optimum(result, new, code.Y) < 1e-4
    assert result.loss_history[-1] == pytest.approx(dense_objective(result, A), rel=1e-4)
    exact = (A - result.Z @ result.Y).double().square().sum() / A.double().square().sum()
    assert result.relative_error == pytest.approx(float(exact), rel=1e-4)


def test_max_active_costs_loss_until_it_binds_nobody(activations):
    losses = [fit(activations, 6, keep=0.1, max_active=most).loss_history[-1] for most in (1, 2, 4)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    free, bound = (fit(activations, 6, keep=0.1, max_active=most) for most in (None, 6))
    assert torch.equal(free.Y, bound.Y)
    assert losses[-1] > free.loss_history[-1]


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("seed", [0, 1])
def test_max_active_gives_the_best_iterate(neuron_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(100, 5, generator=generator) @ torch.rand(5, 300, generator=generator)
    A += 0.01 * torch.rand(100, 300, generator=generator)
    result = fit(A.double(), 25, keep=0.5, max_active=4, neuron_scale=neuron_scale)
    assert result.loss_history[-1] <= min(result.loss_history) * (1 + 1e-6)


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("refit", [False, True, "late"])
@pytest.mark.parametrize("kind", ["sparse", "dense", "fitted", "zero column", "numpy"])
def test_fixed_features_stay(activations, kind, refit, neuron_scale):
    generator = torch.Generator().manual_seed(7)
    if kind == "fitted":
        fixed = fit(activations, 3, keep=0.1).Z[:, :2]
    else:
        fixed = torch.randn(90, 2, generator=generator, dtype=torch.float64)
        if kind == "sparse":
            fixed *= torch.rand(90, 2, generator=generator) < 0.05
        elif kind == "zero column":
            fixed[:, 1] = 0
    given = fixed.numpy() if kind == "numpy" else fixed
    before = fixed.clone()
    result = fit(activations, 6, keep=0.1, fixed=given, refit=refit, neuron_scale=neuron_scale, max_iter=12)
    assert torch.equal(fixed, before), "the argument was changed"
    if neuron_scale is None:
        assert torch.equal(result.Z[:, :2], fixed)
    else:
        assert_near(result.Z[:, :2], fixed, 1e-15)
    assert int((result.Z[:, 2:] != 0).sum(0).max()) <= 9, "more than ceil(keep·d) kept by a free feature"
    assert (1 in result.dead_features) == (kind == "zero column")
    assert distance_from_optimum(result, activations) < 1e-3
    assert result.loss_history[-1] == pytest.approx(dense_objective(result, activations), rel=1e-10)
    exact = (activations - result.Z @ result.Y).square().sum() / activations.square().sum()
    assert result.relative_error == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("neuron_scale", SCALES)
def test_fixed_features_stay_in_single_precision_beside_other_options(activations, neuron_scale, backend):
    fixed = torch.randn(90, 2, generator=torch.Generator().manual_seed(7))
    weights = torch.rand(300, generator=torch.Generator().manual_seed(8))
    result = fit(
        activations.float(), 6, keep=0.1, fixed=fixed.half(), neuron_scale=neuron_scale, backend=backend,
        l1=0.02, l2=0.1, max_active=3, token_weights=weights, max_iter=12,
    )  # fmt: skip
    assert_near(result.Z[:, :2], fixed.half(), 0 if neuron_scale is None else 1e-6)
    assert int((result.Y > 0).sum(0).max()) <= 3
    objective = dense_objective(result, activations.float(), weights.double())
    assert result.loss_history[-1] == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("neuron_scale", SCALES)
def test_free_features_find_what_fixed_ones_leave(neuron_scale):
    A, Z, _ = planted(300, 2000, 6, keep=0.03, noise=0.05, seed=1)
    lengths = torch.tensor([3.0, 0.2, 1.0])
    results = [
        fit(A, 6, keep=0.03, fixed=Z[:, :3] * lengths, neuron_scale=neuron_scale, seed=seed)
        for seed in range(3)
    ]
    best = min(results, key=lambda result: result.loss_history[-1])
    found, wanted = (torch.nn.functional.normalize(features[:, 3:], dim=0) for features in (best.Z, Z))
    similarity = (wanted.T @ found).abs()
    assert float(similarity.max(1).values.min()) > 0.95, similarity
    # The given ones are used as the planted ones are, whatever their lengths.
    alone = fit(A, 3, keep=0.03, neuron_scale=neuron_scale)
    assert best.relative_error < 0.5 * alone.relative_error


def test_a_start_beside_fixed_features(activations):
    first = fit(activations, 6, keep=0.1)
    options = {"keep": 0.1, "fixed": first.Z[:, :2], "max_iter": 3}
    for init in ((None, first.Y), (first.Z, None)):
        again = fit(activations, 6, init=init, **options)
        assert again.loss_history[0] < 1.05 * first.loss_history[-1]
    for init in ("random", "svd", "kmeans"):
        assert fit(activations, 6, init=init, **options).relative_error < 0.2


FIXED_REFUSALS = {
    "as many as k": (
        torch.ones(90, 6),
        ValueError,
        "fixed: wanted fewer than k = 6 columns, got 6; .*encode",
    ),
    "rows": (
        torch.ones(89, 2),
        ValueError,
        r"fixed: wanted 90 rows \(neurons\), as A has, got shape \(89, 2\)",
    ),
    "nan": (
        torch.full((90, 2), torch.nan),
        ValueError,
        "fixed: wanted finite values, got 180 NaN or infinite",
    ),
    "type": ([[1.0]], TypeError, "fixed: wanted a torch tensor or a numpy array, got list"),
    "integers": (torch.ones(90, 2).long(), TypeError, "fixed: wanted dtype float16"),
    "rank": (torch.ones(90), ValueError, "fixed: wanted a matrix"),
    "empty": (torch.ones(90, 0), ValueError, "fixed: wanted at least one row and one column"),
}


@pytest.mark.parametrize("case", FIXED_REFUSALS)
def test_bad_fixed_features_are_refused(activations, case):
    fixed, error, message = FIXED_REFUSALS[case]
    with pytest.raises(error, match=message):
        fit(activations, 6, keep=0.1, fixed=fixed)


# One sweep an iteration: with more, tokens are left alone tile by tile, and these lie elsewhere then.
ONE_SWEEP = {"keep": 0.1, "sweeps": 1, "max_iter": 8, "tol": 0.0, "patience": 99}


def given_start(k, n, seed=3):
    return torch.rand(k, n, generator=torch.Generator().manual_seed(seed)).double() + 0.1


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("options", [{}, {"l1": 0.05, "l2": 0.1, "max_active": 3}, {"refit": False}])
def test_weight_zero_leaves_a_token_out(activations, options, backend, neuron_scale):
    kept = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.6
    A = activations.clone()
    A[:, ~kept] = 3 * A.flip(0)[:, ~kept]  # they would matter
    Y0 = given_start(6, 300)
    options = {**ONE_SWEEP, **options, "backend": backend, "neuron_scale": neuron_scale}
    weighted = fit(A, 6, init=(None, Y0), token_weights=kept.double(), **options)
    without = fit(A[:, kept], 6, init=(None, Y0[:, kept]), **options)
    assert_near(weighted.Z, without.Z, 1e-10)
    assert weighted.loss_history[:-1] == pytest.approx(without.loss_history[:-1], rel=1e-10)
    assert weighted.relative_error == pytest.approx(without.relative_error, rel=1e-3)
    if neuron_scale:
        assert_near(weighted.neuron_scale, without.neuron_scale, 1e-14)
    # A token that was left out has its coefficients all the same.
    if "max_active" in options:  # no last sweeps make them optimal
        assert_near(weighted.Y[:, kept], without.Y, 1e-10)
        assert_near(weighted.Y[:, ~kept], weighted.encode(A[:, ~kept]).Y, 0.2)
        return
    # The last sweeps stop tile by tile, where a change of Y is below 1e-3.
    assert distance_from_optimum(without, A[:, kept]) < 1e-3
    for tokens in (kept, ~kept):
        assert distance_from_optimum(weighted, A[:, tokens], weighted.Y[:, tokens]) < 1e-3


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("init", ["kmeans", "random", "svd"])
def test_a_token_of_weight_zero_has_no_say_in_the_start(activations, init, neuron_scale):
    kept = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.6
    wild = activations.clone()
    wild[:, ~kept] = 100 * activations.flip(0)[:, ~kept]
    options = {"keep": 0.1, "init": init, "neuron_scale": neuron_scale, "token_weights": kept.double()}
    # More than one sweep would end tile by tile.
    tame, other = (fit(A, 6, sweeps=1, max_iter=3, **options) for A in (activations, wild))
    assert_near(other.Z, tame.Z, 1e-10)


def test_the_start_by_svd_is_that_of_weighted_tokens(activations):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)).double() + 0.1
    options = {"keep": 1.0, "init": "svd", "neuron_scale": None, "max_iter": 1, "refit": False}
    weighted = fit(activations, 6, token_weights=weights, **options)
    plain = fit(activations * weights.sqrt(), 6, **options)
    assert_near(weighted.Z, plain.Z, 0.05)  # the draws below the rank's floor differ


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("options", [{}, {"l1": 0.05, "l2": 0.1, "max_active": 3}])
def test_integer_weights_repeat_tokens(activations, options, neuron_scale):
    times = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(2))
    Y0 = given_start(6, 300)
    options = {**ONE_SWEEP, **options, "neuron_scale": neuron_scale}
    weighted = fit(activations, 6, init=(None, Y0), token_weights=times, **options)
    repeated = fit(
        activations.repeat_interleave(times, 1), 6, init=(None, Y0.repeat_interleave(times, 1)),
        token_weights=None, **options,
    )  # fmt: skip
    assert_near(weighted.Z, repeated.Z, 1e-10)
    assert weighted.loss_history[:-1] == pytest.approx(repeated.loss_history[:-1], rel=1e-10)
    assert weighted.relative_error == pytest.approx(repeated.relative_error, rel=1e-3)
    assert weighted.options["l1_threshold"] == pytest.approx(repeated.options["l1_threshold"], rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"l1": 0.05, "l2": 0.1}, {"fixed": torch.ones(90, 1)}])
def test_the_size_of_the_weights_does_not_matter(activations, options):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)).double() + 0.1
    options = {**ONE_SWEEP, **options, "init": (None, given_start(6, 300))}
    small, large = (fit(activations, 6, token_weights=c * weights, **options) for c in (1.0, 64.0))
    assert [64 * loss for loss in small.loss_history[:-1]] == pytest.approx(
        large.loss_history[:-1], rel=1e-10
    )
    # The last sweeps stop by the size of Y, of which fixed features' part does not follow the weights.
    assert_near(small.Z @ small.Y, large.Z @ large.Y, 1e-3 if "fixed" in options else 1e-10)


@pytest.mark.parametrize("neuron_scale", SCALES)
def test_losses_are_those_of_weighted_residuals(activations, neuron_scale):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)).double()
    options = {"keep": 0.1, "neuron_scale": neuron_scale}
    result = fit(activations, 6, token_weights=weights, **options)
    assert result.loss_history[-1] == pytest.approx(dense_objective(result, activations, weights), rel=1e-10)
    squares = (activations - result.Z @ result.Y).square(), activations.square()
    shares = [float((weights * square).sum()) for square in squares]
    assert result.relative_error == pytest.approx(shares[0] / shares[1], rel=1e-10)
    ones, none = (fit(activations, 6, token_weights=w, **options) for w in (torch.ones(300), None))
    assert_near(ones.Z @ ones.Y, none.Z @ none.Y, 1e-4)
    for same in (weights.numpy(), weights.tolist(), weights.float()):
        assert_near(fit(activations, 6, token_weights=same, **options).Z, result.Z, 1e-3)


def test_tokens_of_larger_weight_are_explained_better(activations):
    first = torch.arange(300) < 150
    errors = []
    for weight in (0.05, 1.0, 20.0):
        result = fit(
            activations, 3, keep=0.1, neuron_scale=None, token_weights=torch.where(first, weight, 1.0)
        )
        residual = (activations - result.Z @ result.Y).square().sum(0)
        errors.append(float(residual[first].sum()))
    assert errors[2] < errors[1] < errors[0]


def test_tokens_that_are_left_out_start_no_feature():
    # The tokens of weight 0 have directions of their own, and are most of the tokens.
    A = planted(100, 200, 6, keep=0.1, noise=0.05, seed=1)[0]
    others = planted(100, 1800, 40, keep=0.1, noise=0.05, seed=9)[0]
    weights = torch.cat([torch.ones(200), torch.zeros(1800)])
    errors = {
        name: [fit(data, 6, keep=0.1, seed=seed, **options).relative_error for seed in range(5)]
        for name, data, options in (
            ("alone", A, {}),
            ("weighted", torch.cat([A, others], 1), {"token_weights": weights}),
        )
    }
    assert sorted(errors["weighted"])[2] < 1.5 * sorted(errors["alone"])[2], errors


WEIGHT_REFUSALS = {
    "shape": (torch.ones(299), r"token_weights: wanted one for each of the 300 tokens, got shape \(299,\)"),
    "matrix": (
        torch.ones(1, 300),
        r"token_weights: wanted one for each of the 300 tokens, got shape \(1, 300\)",
    ),
    "negative": (-torch.ones(300), "token_weights: wanted finite numbers >= 0"),
    "nan": (torch.full((300,), torch.nan), "token_weights: wanted finite numbers >= 0"),
    "infinite": (torch.full((300,), torch.inf), "token_weights: wanted finite numbers >= 0"),
    "zeros": (torch.zeros(300), "token_weights: wanted at least one above 0"),
}


@pytest.mark.parametrize("case", WEIGHT_REFUSALS)
def test_bad_token_weights_are_refused(activations, case):
    weights, message = WEIGHT_REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        fit(activations, 6, keep=0.1, token_weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1": -0.1}, "l1: wanted a finite number >= 0, got -0.1"),
        ({"l1": "0.1"}, "l1: wanted a number, got '0.1'"),
        ({"l2": math.nan}, "l2: wanted a finite number >= 0, got nan"),
        ({"max_active": 0}, "max_active: wanted an integer >= 1, got 0"),
        ({"max_active": 2.5}, "max_active: wanted an integer >= 1, got 2.5"),
        ({"refit": "early"}, "refit: wanted True, False or 'late', got 'early'"),
        ({"refit": 0}, "refit: wanted True, False or 'late', got 0"),
        ({"refit": 1}, "refit: wanted True, False or 'late', got 1"),
    ],
)
def test_bad_values_are_refused_by_name(activations, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(activations, 6, keep=0.1, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("refit", True), ("refit", "late"), ("l1", 0.1), ("l2", 0.1), ("max_active", 2),
        ("fixed", torch.ones(90, 1)), ("token_weights", torch.ones(300)),
    ],
)  # fmt: skip
def test_the_paper_iteration_has_none_of_it(activations, name, value):
    message = f"{name}: solver='mu' is the paper's iteration, which has no such thing; use solver='auto'"
    with pytest.raises(ValueError, match=message):
        fit(activations, 6, keep=0.1, solver="mu", **{name: value})


def test_the_paper_iteration_takes_what_switches_it_all_off(activations):
    options = {"keep": 0.1, "solver": "mu", "max_iter": 3}
    plain = fit(activations, 6, **options)
    off = fit(
        activations, 6, refit=False, l1=0, l2=0.0, max_active=None, fixed=None, token_weights=None, **options
    )
    assert torch.equal(plain.Y, off.Y)


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("as_numpy", [False, True])
def test_files_keep_the_penalties(tmp_path, activations, neuron_scale, as_numpy):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)).double()
    A = activations.numpy() if as_numpy else activations
    result = fit(
        A, 6, keep=0.1, l1=0.05, l2=0.2, max_active=2, fixed=activations[:, :1].contiguous(),
        token_weights=weights, neuron_scale=neuron_scale, max_iter=6,
    )  # fmt: skip
    result.save(tmp_path / "f.safetensors")
    loaded = Factorization.load(tmp_path / "f.safetensors")
    assert loaded.options == result.options
    new = planted(90, 70, 6, keep=0.1, noise=0.3, seed=4, dtype=torch.float64)[0]
    codes = [factors.encode(new) for factors in (loaded, result)]
    assert torch.equal(codes[0].Y, codes[1].Y)
    assert int((codes[0].Y > 0).sum(0).max()) == 2
    assert codes[0].relative_error == codes[1].relative_error
    certificates = [factors.certificate(activations) for factors in (loaded, result)]
    assert certificates[0] == certificates[1]


def noisy(seed):
    return planted(150, 600, 12, keep=0.1, noise=0.8, seed=seed, dtype=torch.float64)[0]


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_refit_explores_chooses_or_both(seed, neuron_scale):
    options = {"keep": 0.05, "neuron_scale": neuron_scale, "tol": 0, "patience": 99, "max_iter": 40}
    histories = {
        refit: fit(noisy(seed), 12, refit=refit, **options).loss_history
        for refit in (True, False, "late", None)
    }
    assert histories[None] == histories["late"], "the default"

    def shared(one, other):
        pairs = zip(histories[one], histories[other], strict=True)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    assert shared(True, False) == shared(True, "late") == 1, "True chooses from the second iteration on"
    explored = shared(False, "late")
    assert 2 <= explored <= 6, "from clusters"
    # Choosing anew never raises the loss, exploring may.
    for history in (histories[True], histories["late"][explored - 1 :]):
        assert all(after <= before * (1 + 1e-10) for before, after in itertools.pairwise(history))
        assert history[-1] < history[0]


@pytest.mark.parametrize("l2", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_choosing_anew_never_raises_what_the_squared_penalty_makes_of_the_loss(seed, l2):
    options = {"keep": 0.05, "refit": True, "l2": l2, "tol": 0, "patience": 99, "max_iter": 40}
    history = fit(noisy(seed), 12, **options).loss_history
    assert all(after <= before * (1 + 1e-10) for before, after in itertools.pairwise(history))


@pytest.mark.parametrize(("init", "most"), [("kmeans", 6), ("random", 12), ("svd", 12), ("given", 12)])
def test_how_often_it_explores_at_most_depends_on_the_start(monkeypatch, init, most):
    monkeypatch.setattr("snmf_kernels._loop.EXPLORE_GAIN", 0.0)
    A = noisy(0)
    start = (None, given_start(12, 600)) if init == "given" else init
    options = {"keep": 0.05, "init": start, "tol": 0, "patience": 99, "max_iter": 20}
    exploring, late = (fit(A, 12, refit=refit, **options).loss_history for refit in (False, "late"))
    shared = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(exploring, late, strict=True))
    )
    assert shared == most


@pytest.mark.parametrize("fixed", [None, torch.ones(150, 1).double()])
def test_a_choice_of_supports_is_kept_for_two_iterations(fixed):
    results = [
        fit(noisy(0), 12, keep=0.05, refit=True, fixed=fixed, tol=0, patience=99, max_iter=m)
        for m in range(1, 7)
    ]
    kept = [bool(((a.Z != 0) == (b.Z != 0)).all()) for a, b in itertools.pairwise(results)]
    # explore, choose, frozen, frozen, choose, frozen
    assert kept == [False, True, True, False, True]
    # Frozen, the values are still moved.
    assert not torch.equal(results[1].Z, results[2].Z)
    assert results[2].loss_history[2] < results[1].loss_history[1]


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_fixed", [0, 2])
def test_exploring_is_the_winners_of_least_squares_on_what_fixed_features_leave(
    activations, n_fixed, weighted, neuron_scale
):
    Y0 = given_start(6, 300)
    fixed = 0.3 * torch.rand(90, 2, generator=torch.Generator().manual_seed(7)).double()
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)).double() if weighted else None
    options = {"keep": 0.1, "ridge": 0, "max_iter": 1, "fixed": fixed if n_fixed else None}
    result = fit(activations, 6, init=(None, Y0), neuron_scale=neuron_scale, token_weights=weights, **options)
    rest, free = activations - fixed[:, :n_fixed] @ Y0[:n_fixed], Y0[n_fixed:]
    roots = torch.ones(300).double() if weights is None else weights.sqrt()
    scale = 1 if result.neuron_scale is None else result.neuron_scale[:, None]
    wanted = torch.linalg.lstsq((free * roots).T, (rest * roots / scale).T).solution.T
    wanted.scatter_(0, wanted.abs().argsort(dim=0, descending=True, stable=True)[9:], 0)
    got = result.Z[:, n_fixed:] / scale
    assert_near(got / got.norm(dim=0), wanted / wanted.norm(dim=0), 1e-12)


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("weighted", [False, True])
def test_choosing_beside_fixed_features_never_raises_the_loss(neuron_scale, weighted):
    A = noisy(0)
    # Two that share neurons with the free ones, so that it matters what they explain.
    fixed = A[:, :2] + A.abs().mean()
    weights = torch.rand(600, generator=torch.Generator().manual_seed(2)) if weighted else None
    history = fit(
        A, 12, keep=0.1, refit=True, fixed=fixed, token_weights=weights, neuron_scale=neuron_scale,
        tol=0, patience=99, max_iter=20,
    ).loss_history  # fmt: skip
    assert all(after <= before * (1 + 1e-10) for before, after in itertools.pairwise(history))
    assert history[-1] < 0.99 * history[0]


@pytest.mark.parametrize("refit", [np.bool_(True), np.bool_(False)])
def test_a_numpy_boolean_is_a_boolean(tmp_path, activations, refit):
    options = {"keep": 0.1, "max_iter": 20, "tol": 0, "patience": 99}
    got, wanted = (
        fit(activations, 6, refit=refit, **options),
        fit(activations, 6, refit=bool(refit), **options),
    )
    assert torch.equal(got.Y, wanted.Y)
    got.save(tmp_path / "f.safetensors")


def tiny(d=7, n=25, seed=0):
    return planted(d, n, 3, keep=0.4, noise=0.5, seed=seed, dtype=torch.float64)[0]


def best_single_change(result, A, count, weights=None, first=0):
    """By which share of the loss the best replacement of one column, of all supports, lowers it; by brute force."""
    Z, A = in_scaled_units(result, A)
    Y = result.Y
    roots = torch.ones(A.shape[1], dtype=A.dtype) if weights is None else weights.sqrt()
    A, Y = A * roots, Y * roots
    loss = float((A - Z @ Y).square().sum())
    best = loss
    for i in range(first, Z.shape[1]):
        if not bool(Y[i].any()):
            continue
        others = [j for j in range(Z.shape[1]) if j != i]
        rest = A - Z[:, others] @ Y[others]
        for support in itertools.combinations(range(len(A)), count):
            column = torch.zeros(len(A), dtype=A.dtype)
            for row in support:
                column[row] = (rest[row] @ Y[i]) / (Y[i] @ Y[i])
            best = min(best, float((rest - column[:, None] * Y[i]).square().sum()))
    return 1 - best / loss


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_iter", [1, 2, 40])
def test_swap_residual_is_the_best_single_change(neuron_scale, weighted, max_iter):
    A = tiny()
    weights = torch.rand(25, generator=torch.Generator().manual_seed(2)).double() if weighted else None
    result = fit(
        A,
        3,
        keep=0.4,
        neuron_scale=neuron_scale,
        token_weights=weights,
        max_iter=max_iter,
        refit=max_iter > 1,
    )
    certificate = result.certificate(A)
    wanted = best_single_change(result, A, 3, weights)
    assert certificate.swap_residual == pytest.approx(wanted, abs=1e-12)
    assert 0 <= certificate.swap_residual < 1
    if max_iter == 1:
        assert certificate.swap_residual > 1e-3, "the choice must not be the best one for this comparison"


@pytest.mark.parametrize("fixed_kind", ["sparse", "dense"])
@pytest.mark.parametrize("neuron_scale", SCALES)
def test_swap_residual_is_of_free_features_only(neuron_scale, fixed_kind):
    A = tiny(seed=1)
    fixed = torch.zeros(7, 1, dtype=torch.float64)
    fixed[0] = -1  # a bad one, which a swap would improve
    if fixed_kind == "dense":
        fixed = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    result = fit(A, 3, keep=0.4, fixed=fixed, neuron_scale=neuron_scale, max_iter=3)
    wanted = best_single_change(result, A, 3, first=1)
    assert result.certificate(A).swap_residual == pytest.approx(wanted, abs=1e-12)


def test_choosing_anew_to_the_end_leaves_no_better_column():
    A = planted(40, 200, 5, keep=0.1, noise=0.5, dtype=torch.float64)[0]
    result = fit(A, 5, keep=0.1, refit=True, neuron_scale=None, tol=0, patience=200, max_iter=300)
    assert result.certificate(A).swap_residual < 1e-6


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize(
    "options",
    [{}, {"l1": 0.02}, {"l2": 0.1}, {"max_active": 3}, {"refit": True}, {"fixed": torch.ones(90, 1)}],
)
def test_a_fit_ends_at_the_optimum_for_its_features(activations, options, neuron_scale):
    result = fit(activations, 6, keep=0.1, neuron_scale=neuron_scale, **options)
    certificate = result.certificate(activations)
    assert certificate.kkt_residual == pytest.approx(
        distance_from_optimum(result, activations), rel=1e-6, abs=1e-12
    )
    assert certificate.kkt_residual < 1e-3
    Z, A = in_scaled_units(result, activations)
    share = float((A - Z @ result.Y).square().sum() / A.square().sum())
    assert certificate.relative_loss == pytest.approx(share, rel=1e-10)
    assert 0 <= certificate.swap_residual <= 1
    assert certificate.lower_bound <= certificate.relative_loss
    assert certificate.gap >= 0


@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("seed", range(3))
def test_a_certificate_of_tokens_with_few_features(neuron_scale, seed):
    A = planted(80, 400, 20, keep=0.1, noise=0.5, seed=seed, dtype=torch.float64)[0]
    result = fit(A, 40, keep=0.05, max_active=5, neuron_scale=neuron_scale)
    wanted = distance_from_optimum(result, A)
    assert wanted < 2e-2  # no last sweeps here: worst 6.2e-3
    assert result.certificate(A, bound=False).kkt_residual == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)])
@pytest.mark.parametrize("neuron_scale", SCALES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lower_bound_is_the_tail_of_the_spectrum(monkeypatch, dtype, weighted, neuron_scale, shape):
    A = planted(*shape, 5, keep=0.2, noise=0.5)[0].to(dtype)
    weights = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) if weighted else None
    monkeypatch.setattr("snmf_kernels.reference._BLOCK_ELEMENTS", {"cpu": 7 * shape[0]})  # blocks of 7 tokens
    result = fit(A, 5, keep=0.2, neuron_scale=neuron_scale, token_weights=weights)
    _, scaled = in_scaled_units(result, A)
    scaled = scaled if weights is None else scaled * weights.double().sqrt()
    squares = torch.linalg.svdvals(scaled).square()
    certificate = result.certificate(A)
    assert certificate.lower_bound == pytest.approx(float(squares[5:].sum() / squares.sum()), rel=1e-6)
    assert certificate.gap == pytest.approx(certificate.relative_loss / certificate.lower_bound - 1)
    assert certificate.gap >= 0
    assert result.certificate(A, bound=False).lower_bound is None
    assert result.certificate(A, bound=False).gap is None


def test_certificates_of_exact_and_of_empty_data():
    exact = torch.rand(8, 1, generator=torch.Generator().manual_seed(0)).double() @ torch.ones(1, 9).double()
    result = fit(exact, 3, keep=1.0, tol=0, patience=50)
    certificate = result.certificate(exact)
    assert certificate.relative_loss < 1e-14
    assert certificate.lower_bound < 1e-14
    assert fit(exact, 9, keep=1.0).certificate(exact).lower_bound == 0, "no more singular values than that"
    nothing = torch.zeros(5, 6)
    certificate = fit(nothing, 2, keep=0.5).certificate(nothing)
    assert certificate == type(certificate)(0.0, 0.0, 0.0, 0.0)
    assert certificate.gap == 0
    assert type(certificate)(0.0, 0.0, 0.1, 0.0).gap == math.inf


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", [0, 2])
def test_a_certificate_of_single_precision_sees_small_losses(seed, weighted, noise):
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(300, 1, generator=generator) @ torch.rand(1, 2000, generator=generator)
    A += noise * torch.randn(300, 2000, generator=generator)
    weights = torch.rand(2000, generator=generator) + 0.5 if weighted else None
    result = fit(A, 1, keep=1.0, neuron_scale=None, tol=0, patience=20, token_weights=weights)
    certificate = result.certificate(A)
    residual = (A.double() - result.Z.double() @ result.Y.double()).square()
    share = (residual if weights is None else residual * weights.double()).sum()
    whole = A.double().square()
    share /= (whole if weights is None else whole * weights.double()).sum()
    assert certificate.relative_loss == pytest.approx(float(share), rel=1e-4)
    assert 0 <= certificate.gap < 0.05
    assert 0 <= certificate.swap_residual < 0.05


def test_certificate_of_arrays_and_of_the_paper_iteration(activations):
    for solver in ("auto", "mu"):
        plain, array = (
            fit(A, 6, keep=0.1, solver=solver, max_iter=20) for A in (activations, activations.numpy())
        )
        wanted, got = plain.certificate(activations), array.certificate(activations.numpy())
        assert got == wanted
        for backend in ("cpp", "torch"):
            named = plain.certificate(activations, backend=backend)
            assert named.relative_loss == pytest.approx(wanted.relative_loss, rel=1e-10)
            assert named.swap_residual == pytest.approx(wanted.swap_residual, rel=1e-6, abs=1e-12)
    assert wanted.kkt_residual > 1e-3, "the paper's Y is not at its optimum"


def test_certificate_errors(activations):
    result = fit(activations, 6, keep=0.1, max_iter=2)
    weights = torch.ones(300)
    weighted = fit(activations, 6, keep=0.1, max_iter=2, token_weights=weights)
    with pytest.raises(
        ValueError, match=r"A: wanted the activations of the fit, \(90, 300\), got \(90, 299\)"
    ):
        result.certificate(activations[:, 1:])
    with pytest.raises(TypeError, match="A: wanted a torch tensor or a numpy array"):
        result.certificate([[1.0]])
    with pytest.raises(ValueError, match="token_weights: the fit had some, and the version that wrote"):
        dataclasses.replace(weighted, token_weights=None).certificate(activations)
    with pytest.raises(ValueError, match="backend: wanted one of auto"):
        result.certificate(activations, backend="fast")
