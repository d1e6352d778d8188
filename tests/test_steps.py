"""How iterations run on a GPU, tried out on the CPU: losses are read late, state stays in place, nothing waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import planted
from torch.utils._python_dispatch import TorchDispatchMode

import snmf_kernels
from snmf_kernels import Factorization, _backends, _loop, _steps, fit
from snmf_kernels._precision import product_precision

# Operations whose result, or whose shape, the host can only know by waiting for a GPU.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_consecutive",
    "unique_dim", "is_nonzero",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would make the host wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        ragged = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or ragged:
            raise AssertionError(f"{name} would wait for the device")
        return operation(*args, **(kwargs or {}))


class Recording:
    """Stands in for a CUDA graph: does the step again, and sees that it leaves no trace but in memory."""

    def __init__(self, steps: _steps.Steps, step) -> None:
        self._step = step
        self._owner = step.__self__ if hasattr(step, "__self__") else step.__closure__
        self.replayed = 0
        recordings.append(self)

    def replay(self) -> None:
        owner = (
            self._owner if isinstance(self._owner, _loop.PaperIterations) else fast_iterations(self._owner)
        )
        before = where(owner)
        with NoWaiting():
            self._step()
        assert where(owner) == before, "a replayed graph would not do this"
        self.replayed += 1


recordings: list[Recording] = []


def fast_iterations(closure):
    return next(
        cell.cell_contents for cell in closure if isinstance(cell.cell_contents, _loop.FastIterations)
    )


def where(owner) -> dict:
    """The addresses of all tensors that outlive a step."""
    found = {}
    for part, holder in (("state", owner._state), ("best", owner._best)):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                found[part, name] = value.data_ptr()
            elif dataclasses.is_dataclass(value):
                found[part, name] = value.indices.data_ptr(), value.values.data_ptr()
    return found


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Fits on the CPU run as they would on a GPU."""
    recordings.clear()
    monkeypatch.setattr(_steps, "_runs_ahead", lambda device: True)
    monkeypatch.setattr(_backends, "_recordable", lambda *_: True)
    monkeypatch.setattr(_steps.Steps, "_recorded", lambda self, step: Recording(self, step))


OPTIONS = {
    "mu": {"solver": "mu", "max_iter": 12},
    "mu, scaled": {"solver": "mu", "max_iter": 12, "neuron_scale": "rms"},
    "late": {},
    "refit": {"refit": True, "max_iter": 15, "tol": 0.0},
    "explore": {"refit": False, "max_iter": 9},
    "penalties": {"l1": 0.02, "l2": 0.01, "max_iter": 12},
    "max_active": {"max_active": 3, "max_iter": 12},
}


def problem(name: str) -> tuple[torch.Tensor, dict]:
    A, Z, _ = planted(120, 400, 12, keep=0.1, noise=0.5)
    options = {"keep": 0.1} | OPTIONS.get(name, {})
    if name == "fixed and weighted":
        options |= {"fixed": Z[:, :2], "token_weights": torch.linspace(0, 2, 400), "max_iter": 12}
    return A, options


@pytest.mark.parametrize("name", [*OPTIONS, "fixed and weighted"])
def test_same_factors_as_without(name, like_a_gpu, monkeypatch):
    A, options = problem(name)
    # The number of iterations is given, since decisions that follow from losses come later.
    options |= {"tol": 0.0, "patience": 1000, "max_iter": options.get("max_iter", 12)}
    monkeypatch.setattr(_loop, "EXPLORE_GAIN", 0.0)
    monkeypatch.setitem(_loop.EXPLORE_MOST, "kmeans", 4)
    monkeypatch.setattr(_loop, "LATE_GAIN", 1.0)
    deferred = fit(A, 12, **options)
    # What keeps so many features to a token is composed of plain torch, and may wait.
    assert bool(recordings) == (name != "max_active")
    assert all(recording.replayed for recording in recordings)
    monkeypatch.undo()
    monkeypatch.setattr(_loop, "EXPLORE_GAIN", 0.0)
    monkeypatch.setitem(_loop.EXPLORE_MOST, "kmeans", 4)
    monkeypatch.setattr(_loop, "LATE_GAIN", 1.0)
    plain = fit(A, 12, **options)
    assert deferred.n_iter == plain.n_iter
    assert deferred.loss_history == pytest.approx(plain.loss_history, rel=1e-5)
    assert torch.equal(deferred.Z != 0, plain.Z != 0)
    assert (deferred.Y - plain.Y).norm() <= 1e-4 * plain.Y.norm()


def test_stops_late_but_for_the_same_reason(like_a_gpu, monkeypatch):
    A, options = problem("mu")
    options |= {"max_iter": 500, "tol": 1e-2, "patience": 3}
    deferred = fit(A, 12, **options)
    monkeypatch.undo()
    plain = fit(A, 12, **options)
    assert deferred.stop_reason == plain.stop_reason == snmf_kernels.StopReason.CONVERGED
    assert deferred.n_iter == plain.n_iter + _steps._LAG
    assert deferred.loss_history[: plain.n_iter] == pytest.approx(plain.loss_history, rel=1e-5)


def test_the_best_of_what_was_under_way_is_kept(like_a_gpu):
    A, options = problem("explore")
    result = fit(A, 12, **options | {"max_iter": 30, "tol": 0.0, "patience": 1000})
    assert isinstance(result, Factorization)
    assert result.n_iter == 30
    assert result.loss_history[-1] <= min(result.loss_history) * (1 + 1e-6)


def test_callbacks_hear_of_every_iteration(like_a_gpu):
    A, options = problem("mu")
    heard = []

    def stop_after_five(state):
        heard.append(state.n_iter)
        return state.n_iter == 5

    result = fit(A, 12, callback=stop_after_five, **options)
    assert result.stop_reason == snmf_kernels.StopReason.CALLBACK
    assert heard == list(range(1, 5 + _steps._LAG + 1))
    assert len(result.loss_history) == result.n_iter == len(heard)


def test_the_watch_sees_what_waits():
    A = torch.arange(6.0)
    with NoWaiting():
        A + 1
        for waits in (lambda: float(A.sum()), lambda: A[A > 2], lambda: A.nonzero(), lambda: bool(A[0])):
            with pytest.raises(AssertionError, match="would wait"):
                waits()


def test_a_setting_for_tf32_is_put_aside_and_put_back():
    matmul = torch.backends.cuda.matmul
    name, loose, exact = (
        ("fp32_precision", "tf32", "ieee")
        if hasattr(matmul, "fp32_precision")
        else ("allow_tf32", True, False)
    )
    before = getattr(matmul, name)
    try:
        setattr(matmul, name, loose)
        with product_precision(torch.device("cuda")):
            assert getattr(matmul, name) == exact
        assert getattr(matmul, name) == loose
        with pytest.raises(FloatingPointError), product_precision(torch.device("cuda")):
            raise FloatingPointError
        assert getattr(matmul, name) == loose
        setattr(matmul, name, exact)
        with product_precision(torch.device("cuda"), allow_tf32=True):
            assert getattr(matmul, name) == loose
        assert getattr(matmul, name) == exact
    finally:
        setattr(matmul, name, before)
