"""Fits that go on: from given factors, from a checkpoint, under the eyes of a callback."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from problems import assert_near, planted

from snmf_kernels import Factorization, fit


@pytest.fixture(scope="module")
def A():
    return planted(120, 500, 10, keep=0.1, noise=0.6, seed=2, dtype=torch.float64)[0]


def objective(A, Z, Y, result):
    """What a fit without penalties minimises."""
    scale = 1.0 if result.neuron_scale is None else result.neuron_scale[:, None]
    weights = 1.0 if result.token_weights is None else result.token_weights
    return float((((A - Z @ Y) / scale).square() * weights).sum())


OPTIONS = {
    "default": {},
    "refit=True": {"refit": True},
    "refit=False": {"refit": False},
    "as it is": {"neuron_scale": None},
    "l2": {"l2": 0.1},
    "max_active": {"max_active": 3},
    "fixed": {"fixed": torch.ones(120, 1).double()},
    "fixed twice": {"fixed": torch.ones(120, 2).double()},
    "weights": {"token_weights": torch.linspace(0.1, 1, 500).double()},
}


@pytest.mark.parametrize("early", [1, 3, 200])
@pytest.mark.parametrize("case", OPTIONS)
def test_given_factors_are_continued(A, case, early):
    options = {"keep": 0.1, **OPTIONS[case]}
    given = fit(A, 10, max_iter=early, **options)
    for init in (given, (given.Z, given.Y)):
        first = fit(A, 10, init=init, max_iter=1, **options)
        longer = fit(A, 10, init=init, **options)
        if case != "max_active":  # which features a token uses is chosen anew by every pass
            assert first.loss_history[0] <= given.loss_history[-1] * (1 + 1e-6)
        assert longer.loss_history[-1] <= given.loss_history[-1] * (1 + 1e-9)
    # No support was chosen anew yet.
    assert torch.equal(first.Z != 0, given.Z != 0)


def test_a_continued_fit_gets_where_a_longer_one_gets(A):
    options = {"keep": 0.1, "refit": True, "tol": 1e-6, "patience": 10}
    longer = fit(A, 10, max_iter=200, **options)
    short = fit(A, 10, max_iter=4, **options)
    assert short.loss_history[-1] > 1.001 * longer.loss_history[-1]
    assert fit(A, 10, init=short, **options).loss_history[-1] <= 1.01 * longer.loss_history[-1]


def test_columns_are_chosen_anew_when_refits_gain_little(A):
    """Until the loss is as far below the given one as it would be below what exploring reached."""
    Z0 = torch.zeros(120, 10).double()
    Z0[torch.arange(120), torch.arange(120) % 10] = 1.0  # any supports
    result = fit(A, 10, keep=0.1, init=(Z0, None))
    assert int(((result.Z != 0) & (Z0 != 0)).sum()) < 60
    assert result.loss_history[-1] < 0.9 * result.loss_history[0]


def test_features_alone_are_a_start(A):
    given = fit(A, 10, keep=0.1)
    other = planted(120, 300, 10, keep=0.1, noise=0.6, seed=9, dtype=torch.float64)[0]
    for tokens, init in ((A, (given.Z, None)), (other, given), (other, (given.Z, None))):
        result = fit(tokens, 10, keep=0.1, init=init, max_iter=1)
        assert torch.equal(result.Z != 0, given.Z != 0)
        assert result.Y.shape == (10, tokens.shape[1])


def test_features_with_too_many_neurons_keep_the_largest(A):
    Z0 = torch.randn(120, 10, generator=torch.Generator().manual_seed(0)).double()
    result = fit(A, 10, keep=0.1, neuron_scale=None, init=(Z0, None), max_iter=1)
    assert torch.equal(result.Z != 0, Z0.abs() >= Z0.abs().sort(0, descending=True).values[11])


def test_the_papers_iteration_is_never_worse_than_its_start(A):
    given = fit(A, 10, keep=0.1, neuron_scale=None)
    result = fit(A, 10, keep=0.1, solver="mu", init=given, max_iter=3)
    # Zeros of Y were raised to 1e-6 of their row's largest entry.
    assert objective(A, result.Z, result.Y, given) <= objective(A, given.Z, given.Y, given) * (1 + 1e-5)
    assert result.loss_history[0] > given.loss_history[-1] * (1 + 1e-3), "its own steps make it worse"


def test_a_given_start_of_another_scale(A):
    given = fit(A, 10, keep=0.1)
    scales = 10.0 ** torch.linspace(-30, 30, 10).double()
    init = (given.Z / scales, given.Y * scales[:, None])
    assert_near(
        torch.tensor(fit(A, 10, keep=0.1, init=init).loss_history),
        torch.tensor(fit(A, 10, keep=0.1, init=given).loss_history),
        1e-9,
    )


class Killed(Exception):
    pass


def killed_at(iteration):
    def callback(state):
        if state.n_iter == iteration:
            raise Killed

    return callback


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"refit": True}, {"refit": False}, {"neuron_scale": None}, {"max_active": 3}, {"solver": "mu"},
        {"l1": 0.05, "fixed": torch.ones(120, 1)}, {"init": "random", "tol": 0.0, "patience": 99},
    ],
    ids=str,
)  # fmt: skip
def test_a_killed_fit_ends_with_the_same_bits(tmp_path, A, options, dtype):
    path = tmp_path / "fit.ckpt"
    options = {"keep": 0.1, "max_iter": 30, "checkpoint_every": 2, **options}
    wanted = fit(A.to(dtype), 10, checkpoint=tmp_path / "other.ckpt", **options)
    for iteration in (3, 4, 6):
        with pytest.raises(Killed):
            fit(A.to(dtype), 10, checkpoint=path, callback=killed_at(iteration), **options)
        assert path.is_file()
    seen = []
    result = fit(
        A.to(dtype), 10, checkpoint=path, callback=lambda state: seen.append(state.n_iter), **options
    )
    assert seen[0] == (5 if wanted.n_iter > 4 else 0), "it goes on, it does not begin anew"
    assert result.loss_history == wanted.loss_history
    for name in ("Z", "Y"):
        assert torch.equal(getattr(result, name), getattr(wanted, name))
    # Without a checkpoint it takes the same steps.
    options.pop("checkpoint_every")
    assert torch.equal(fit(A.to(dtype), 10, **options).Z, wanted.Z)
    assert not list(tmp_path.iterdir()), "a finished fit leaves no file"


def test_a_fit_of_many_coefficients_ends_with_the_same_bits(tmp_path, monkeypatch, A):
    """Where no copy of the best Y is kept."""
    monkeypatch.setattr("snmf_kernels._loop.SMALL_Y", 0)
    options = {"keep": 0.1, "refit": False, "checkpoint_every": 3, "checkpoint": tmp_path / "fit.ckpt"}
    wanted = fit(A, 10, **options)
    with pytest.raises(Killed):
        fit(A, 10, callback=killed_at(5), **options)
    result = fit(A, 10, **options)
    assert torch.equal(result.Y, wanted.Y)
    assert result.loss_history == wanted.loss_history


def test_a_checkpoint_of_another_fit_is_refused(tmp_path, A):
    path = tmp_path / "fit.ckpt"
    with pytest.raises(Killed):
        fit(A, 10, keep=0.1, checkpoint=path, checkpoint_every=1, callback=killed_at(3))
    kept = path.read_bytes()
    for changed, text in (
        ({"keep": 0.2}, "was begun with keep = 0.1, not 0.2"),
        ({"seed": 1}, "was begun with seed = 0, not 1"),
        ({"A": 2 * A}, "is of a fit of another A;"),
        ({"A": A[:, :400]}, "was begun with n = 500, not 400"),
        ({"checkpoint": tmp_path}, "wanted a file name, got the folder"),
        ({"checkpoint_every": 0}, "checkpoint_every: wanted an integer >= 1"),
    ):
        arguments = {"A": A, "keep": 0.1, "checkpoint": path, "checkpoint_every": 1} | changed
        with pytest.raises(ValueError, match=text):
            fit(k=10, **arguments)
        assert path.read_bytes() == kept
    path.write_bytes(kept[:-5])
    with pytest.raises(ValueError, match="delete it to begin the fit anew"):
        fit(A, 10, keep=0.1, checkpoint=path, checkpoint_every=1)
    fit(A, 10, keep=0.1).save(path)
    with pytest.raises(
        ValueError, match=r"holds 'snmf_kernels\.factorization', wanted 'snmf_kernels\.checkpoint'"
    ):
        fit(A, 10, keep=0.1, checkpoint=path)


@pytest.mark.parametrize("options", [{}, {"refit": False}, {"solver": "mu"}, {"max_active": 3}], ids=str)
def test_a_killed_fit_ends_with_the_same_bits_where_losses_are_read_late(tmp_path, monkeypatch, A, options):
    """As on a GPU, whose iterations are under way when the loss of one before is read."""
    monkeypatch.setattr("snmf_kernels._steps._runs_ahead", lambda device: True)
    options = {
        "keep": 0.1,
        "max_iter": 20,
        "checkpoint": tmp_path / "fit.ckpt",
        "checkpoint_every": 2,
        **options,
    }
    wanted = fit(A, 10, **options)
    with pytest.raises(Killed):
        fit(A, 10, callback=killed_at(5), **options)
    seen = []
    result = fit(A, 10, callback=lambda state: seen.append(state.n_iter), **options)
    assert seen[0] == 5
    assert result.loss_history == wanted.loss_history
    assert torch.equal(result.Z, wanted.Z)
    assert torch.equal(result.Y, wanted.Y)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("fixed", torch.ones(120, 1).double(), torch.ones(120, 1).double().cumsum(0)),
        ("init", (None, torch.rand(10, 500).double()), (None, torch.rand(10, 500).double())),
        ("A", None, None),
    ],
)
def test_a_checkpoint_knows_what_was_given(tmp_path, A, name, one, other):
    options = {"keep": 0.1, "checkpoint": tmp_path / "fit.ckpt", "checkpoint_every": 1}
    given, changed = ({}, {}) if name == "A" else ({name: one}, {name: other})
    with pytest.raises(Killed):
        fit(A, 10, callback=killed_at(3), **options, **given)
    with pytest.raises(ValueError, match=f"is of a fit of another {name};"):
        fit(A.flip(0) if name == "A" else A, 10, **options, **changed)
    assert fit(A, 10, **options, **given).n_iter > 3


def test_a_checkpoint_may_be_extended(tmp_path, A):
    options = {"keep": 0.1, "tol": 0.0, "patience": 99, "checkpoint": tmp_path / "c", "checkpoint_every": 2}
    with pytest.raises(Killed):
        fit(A, 10, max_iter=6, callback=killed_at(6), **options)
    assert fit(A, 10, max_iter=20, **options).n_iter == 20


@pytest.mark.parametrize("solver", ["auto", "mu"])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_callback_sees_the_factors(A, solver, as_numpy):
    seen = []

    def callback(state):
        seen.append((state, state.Z, state.Y))

    result = fit(A.numpy() if as_numpy else A, 10, keep=0.1, solver=solver, callback=callback, max_iter=8)
    plain = dataclasses.replace(
        result,
        neuron_scale=None if result.neuron_scale is None else torch.as_tensor(result.neuron_scale),
        token_weights=None if result.token_weights is None else torch.as_tensor(result.token_weights),
    )
    assert len(seen) == result.n_iter
    for state, Z, Y in seen:
        assert isinstance(Z, np.ndarray) == as_numpy
        assert int((Z != 0).sum(0).max()) <= 12
        wanted = objective(A, torch.as_tensor(Z), torch.as_tensor(Y), plain)
        assert state.loss == pytest.approx(wanted, rel=1e-9)
    seen[0][2][:] = 7  # copies
    with pytest.raises(ValueError, match="can be read by a callback"):
        seen[0][0].Z  # noqa: B018  # a property that raises


def problem_with_tiny_losses(d, n, k, rank, dtype):
    generator = torch.Generator().manual_seed(1)
    left = torch.rand(d, rank, generator=generator, dtype=dtype)
    return left @ torch.rand(rank, n, generator=generator, dtype=dtype), k


@pytest.mark.parametrize("refit", ["late", True, False])
@pytest.mark.parametrize(
    "case",
    [(100, 400, 150, 5, torch.float32), (100, 400, 150, 5, torch.float64), (50, 200, 400, 50, torch.float64)],
)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.filterwarnings("ignore::snmf_kernels.FitWarning")
def test_the_result_is_no_worse_than_the_best_iterate(monkeypatch, case, refit, kept):
    if not kept:
        monkeypatch.setattr("snmf_kernels._loop.SMALL_Y", 0)
    A, k = problem_with_tiny_losses(*case)
    precise = A.double()
    losses = []

    def callback(state):
        losses.append((precise - state.Z.double() @ state.Y.double()).square().sum())

    result = fit(A, k, keep=0.05, neuron_scale=None, refit=refit, callback=callback, max_iter=60)
    returned = (precise - result.Z.double() @ result.Y.double()).square().sum()
    # Rounding of the factors themselves is the rest.
    floor = float(precise.square().sum()) * (100 * torch.finfo(A.dtype).eps) ** 2
    assert float(returned) <= 1.001 * float(min(losses)) + floor


@pytest.mark.parametrize("rank", [3, 10])
def test_without_refits_a_fit_goes_where_it_can(monkeypatch, rank):
    """On data of low rank the paper's step for Z ends far above its best loss."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(300, rank, generator=generator) @ torch.rand(rank, 1000, generator=generator)
    result = fit(A, 150, refit=False)
    monkeypatch.setattr("snmf_kernels._loop.DIVERGED", torch.inf)
    explored = fit(A, 150, refit=False)
    assert explored.loss_history[explored.n_iter - 1] > 1.05 * min(explored.loss_history)
    assert result.relative_error < 0.7 * explored.relative_error


def test_resuming_keeps_numbers_of_any_kind(tmp_path, A):
    given = fit(A, 10, keep=0.1, max_iter=2)
    given.save(tmp_path / "f.safetensors")
    loaded = Factorization.load(tmp_path / "f.safetensors")
    results = [fit(A, 10, keep=0.1, init=init) for init in (given, loaded)]
    assert torch.equal(results[0].Z, results[1].Z)
