"""``fit_many``: what each member has by itself, whatever happens to the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import planted

from snmf_kernels import Factorization, FitManyError, StopReason, _steps, fit, fit_many


def matrices(count: int = 3) -> list[torch.Tensor]:
    return [planted(40 + 10 * i, 90 + 7 * i, 4, keep=0.2, noise=0.3, seed=i)[0] for i in range(count)]


def assert_same(got: Factorization, wanted: Factorization) -> None:
    assert torch.equal(got.Z, wanted.Z)
    assert torch.equal(got.Y, wanted.Y)
    assert got.loss_history == wanted.loss_history
    assert got.options == wanted.options


@pytest.mark.parametrize("solver", ["auto", "mu"])
def test_members_are_what_fit_gives(solver):
    options = {"keep": 0.2, "solver": solver, "max_iter": 20}
    data = matrices()
    together = fit_many(data, [4, 3, 5], seed=(0, 1, 2), **options)
    assert len(together) == 3
    for got, A, k, seed in zip(together, data, (4, 3, 5), (0, 1, 2), strict=True):
        assert_same(got, fit(A, k, seed=seed, **options))


def test_one_matrix_with_several_seeds():
    A = matrices(1)[0]
    results = fit_many(A, 4, seed=[0, 1], keep=0.2, max_iter=10)
    assert_same(results[1], fit(A, 4, seed=1, keep=0.2, max_iter=10))
    assert not torch.equal(results[0].Y, results[1].Y)


@pytest.mark.parametrize("seeds", [range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), (1, 2)])
def test_seeds_in_any_sequence(seeds):
    A = matrices(1)[0]
    results = fit_many(A, 3, seed=seeds, keep=0.2, max_iter=8)
    for seed, result in zip((1, 2), results, strict=True):
        assert_same(result, fit(A, 3, seed=seed, keep=0.2, max_iter=8))


def test_numpy_gives_numpy():
    result = fit_many([matrices(1)[0].numpy()], 3, keep=0.2, max_iter=5)[0]
    assert isinstance(result.Y, np.ndarray)


def test_members_take_turns_where_there_is_room(monkeypatch):
    # The first two share the device; the third waits until one of them has finished.
    monkeypatch.setattr("snmf_kernels.many._Member.on_gpu", True)
    monkeypatch.setattr("snmf_kernels.many._Member._on_its_stream", lambda self: torch.no_grad())
    heard = []
    options = {"keep": 0.2, "solver": "mu", "max_iter": 4, "tol": 0.0}
    results = fit_many(
        matrices(), 3, at_once=2, callback=lambda member, state: heard.append(member), **options
    )
    assert heard == [0, 1] * 4 + [2] * 4
    assert_same(results[2], fit(matrices()[2], 3, **options))


def test_one_after_another_on_a_cpu():
    heard = []
    fit_many(matrices(2), 3, callback=lambda member, state: heard.append(member), keep=0.2, max_iter=6)
    assert heard == sorted(heard)


def test_a_callback_stops_its_member_only():
    results = fit_many(
        matrices(2), 3, callback=lambda member, state: member == 0 and state.n_iter == 2, keep=0.2, max_iter=9
    )
    assert results[0].stop_reason == StopReason.CALLBACK
    assert results[0].n_iter == 2
    assert results[1].n_iter > 2


def test_a_failed_member_reports_its_own_error_and_the_others_finish():
    data = matrices()
    data[1][3, 5] = float("nan")
    with pytest.raises(
        FitManyError, match=r"1 of 3 members failed; member 1: ValueError: A: wanted finite"
    ) as caught:
        fit_many(data, 3, keep=0.2, max_iter=8)
    first, second, third = caught.value.results
    assert isinstance(second, ValueError)
    assert_same(first, fit(data[0], 3, keep=0.2, max_iter=8))
    assert_same(third, fit(data[2], 3, keep=0.2, max_iter=8))


def test_a_member_that_fails_on_the_way():
    def fails(number, state):
        if number < 2 and state.n_iter == 2:
            raise ArithmeticError("on the way")

    with pytest.raises(FitManyError, match=r"member 0: ArithmeticError: on the way.*and 1 more") as raised:
        fit_many([matrices(1)[0]] * 3, 3, keep=0.2, callback=fails)
    assert torch.equal(raised.value.results[2].Z, fit(matrices(1)[0], 3, keep=0.2).Z)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((torch.rand(9, 9), 2), {}, TypeError, "wanted a sequence of at least one of them"),
        (([], 2), {}, ValueError, "at least 1, got 0 of A"),
        (([torch.rand(9, 9)] * 2, [2, 2, 3]), {}, ValueError, "got 2 of A, 3 of k"),
        (([torch.rand(9, 9)], 2), {"kepe": 0.1}, TypeError, "kepe: fit has no such option; it has keep, solver"),
        (([torch.rand(9, 9)], 2), {"at_once": 0}, ValueError, "at_once: wanted"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, text):
    with pytest.raises(error, match=text):
        fit_many(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    data = [A.cuda() for A in matrices(5)]
    options = {"keep": 0.2, "max_iter": 30}
    for got, A in zip(fit_many(data, 4, at_once=3, **options), data, strict=True):
        wanted = fit(A, 4, **options)
        assert got.loss_history == wanted.loss_history
        assert torch.equal(got.Z, wanted.Z)
    assert _steps.lag_on(data[0].device) > 0
