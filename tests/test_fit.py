"""``fit``: agreement with the published iteration, invariants, inputs and errors."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import interpreted, runs_here
from problems import PARITY, assert_near, planted, published_iteration, relative_difference

import snmf_kernels
from snmf_kernels import FitWarning, StopReason, _backends, fit, ops, reference
from snmf_kernels._data import DataMatrix, rounding
from snmf_kernels._problem import Problem


def problem(dtype=torch.float64, d=64, n=60, k=5, keep=0.1):
    A, _, _ = planted(d, n, k, keep=keep, noise=0.3, seed=5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    Y0 = torch.rand(k, n, generator=generator).double().clamp(min=1e-6)
    return A.to(dtype), Y0.to(dtype), keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.slow_where(
    lambda backend, device, dtype: interpreted(backend, device) and dtype == torch.float32
)
@pytest.mark.parametrize(("backend", "device"), runs_here("multiplicative_update"))
def test_mu_is_the_published_iteration(backend, device, dtype):
    A, Y0, keep = problem(dtype)
    Z_wanted, Y_wanted, losses = published_iteration(A.double(), Y0.double(), keep, 50)
    result = fit(
        A.to(device),
        5,
        keep=keep,
        solver="mu",
        init=(None, Y0.to(device)),
        max_iter=50,
        tol=0,
        patience=50,
        backend=backend,
    )
    assert result.backend == backend
    assert result.n_iter == 50
    assert_near(torch.tensor(result.loss_history), torch.tensor(losses), PARITY[dtype])
    assert losses[-1] == min(losses), "the transcription's last iterate must be its best for this comparison"
    assert torch.equal(result.Z.cpu() != 0, Z_wanted != 0)
    assert_near(result.Z, Z_wanted, PARITY[dtype])
    assert_near(result.Y, Y_wanted, PARITY[dtype])


@pytest.mark.parametrize("solver", ["mu", "auto"])
@pytest.mark.parametrize("neuron_scale", [None, "rms"])
def test_planted_factors_are_found(solver, neuron_scale):
    A, Z, _ = planted(300, 2000, 6, keep=0.03, noise=0.05, seed=1)
    results = [
        fit(A, 6, keep=0.03, solver=solver, neuron_scale=neuron_scale, seed=seed, max_iter=300)
        for seed in range(4)
    ]
    best = min(results, key=lambda result: result.loss_history[-1])
    found, wanted = (torch.nn.functional.normalize(features, dim=0) for features in (best.Z, Z))
    similarity = (wanted.T @ found).abs().max(1).values
    assert float(similarity.min()) > 0.95, similarity


def test_fewer_passes_with_more_sweeps():
    A, _, _ = planted(300, 1500, 10, keep=0.05, noise=0.3, seed=2)
    target = min(fit(A, 10, keep=0.05, solver="mu", max_iter=60, tol=0, patience=60).loss_history)
    history = fit(A, 10, keep=0.05, solver="mu", sweeps=5, max_iter=60, tol=0, patience=60).loss_history
    assert next(i for i, loss in enumerate(history) if loss <= target) < 30


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.333, 1.0])
def test_invariants(keep):
    A, _, _ = planted(150, 400, 9, keep=0.1, noise=0.5)
    before = A.clone()
    result = fit(A, 9, keep=keep, neuron_scale=None, max_iter=30)
    assert torch.equal(A, before)
    assert bool((result.Y >= 0).all())
    assert int((result.Z != 0).sum(0).max()) <= math.ceil(keep * 150)
    assert len(result.loss_history) == result.n_iter + 1  # and the sweeps over Y after the last
    # The best iterate is returned, and the loss from Gram matrices is the loss.
    exact = float((A.double() - result.Z.double() @ result.Y.double()).square().sum())
    assert min(result.loss_history) == pytest.approx(exact, rel=1e-4)
    assert result.relative_error == pytest.approx(exact / float(A.double().square().sum()), rel=1e-4)


def test_ties_do_not_add_entries():
    A = torch.ones(40, 30)  # every neuron alike: every selection is a tie
    result = fit(A, 3, keep=0.1, max_iter=5)
    assert int((result.Z != 0).sum(0).max()) <= 4


def test_without_sparsity_each_iteration_lowers_the_loss():
    A, _, _ = planted(60, 300, 8, keep=0.2, noise=0.2, dtype=torch.float64)
    history = fit(A, 8, keep=1.0, solver="mu", max_iter=100, tol=0, patience=100).loss_history
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(history))


def test_deterministic_and_leaves_the_global_generators_alone():
    A, _, _ = planted(100, 200, 5, keep=0.1, noise=0.5)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # the legacy state is what must stay untouched
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for init in ("random", "svd", "kmeans"):
        first, second, other = (fit(A, 5, keep=0.1, init=init, max_iter=20, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(first.Z, second.Z)
        assert torch.equal(first.Y, second.Y)
        if init != "svd":  # a seed must not matter much where the start is the leading subspace
            assert not torch.equal(first.Y, other.Y)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


LAYOUTS = {
    "neuron-major": lambda A: A.contiguous(),
    "token-major": lambda A: A.T.contiguous().T,
    "strided": lambda A: A.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_layouts_agree(layout, backend):
    A, _, _ = planted(100, 230, 5, keep=0.1, noise=0.5)
    wanted = fit(A, 5, keep=0.1, max_iter=10, backend="torch")
    got = fit(LAYOUTS[layout](A), 5, keep=0.1, max_iter=10, backend=backend)
    assert_near(got.Y, wanted.Y, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("neuron_scale", [None, "rms"])
def test_half_precision_input_is_read_exactly(dtype, backend, neuron_scale):
    A = planted(100, 230, 5, keep=0.1, noise=0.5)[0].to(dtype)
    options = {"keep": 0.1, "max_iter": 10, "backend": backend, "neuron_scale": neuron_scale}
    for layout in LAYOUTS.values():
        got, wanted = fit(layout(A), 5, **options), fit(A.float(), 5, **options)
        assert got.Y.dtype == torch.float32
        assert_near(got.Y, wanted.Y, 1e-4)  # the products add up in another order: worst 2.6e-5
        assert got.relative_error == pytest.approx(wanted.relative_error, rel=1e-4)


def test_blocks_do_not_change_the_result(monkeypatch):
    A = planted(100, 230, 5, keep=0.1, noise=0.5)[0].bfloat16()
    wanted = [fit(A, 5, keep=0.1, max_iter=5, init=init) for init in ("random", "kmeans", "svd")]
    monkeypatch.setattr(
        snmf_kernels.reference, "_BLOCK_ELEMENTS", {"cpu": 100 * 7}
    )  # blocks of 7 tokens, the last of 6
    for init, before in zip(("random", "kmeans", "svd"), wanted, strict=True):
        assert_near(fit(A, 5, keep=0.1, max_iter=5, init=init).Y, before.Y, 1e-5)


def test_numpy_and_memmap(tmp_path):
    A = planted(60, 80, 4, keep=0.1, noise=0.5)[0].numpy()
    wanted = fit(torch.from_numpy(A), 4, keep=0.1, max_iter=10)
    path = tmp_path / "acts.bin"
    A.tofile(path)
    variants = {
        "array": A,
        "memmap": np.memmap(path, dtype=np.float32, mode="r", shape=A.shape),
        "fortran": np.asfortranarray(A),
        "reversed": A[::-1, ::-1].copy()[::-1, ::-1],
        "big-endian": A.astype(">f4"),
        "read-only": np.frombuffer(A.tobytes(), dtype=np.float32).reshape(A.shape),
    }
    for name, variant in variants.items():
        got = fit(variant, 4, keep=0.1, max_iter=10)
        for array in (got.Z, got.Y, got.dead_features):
            assert isinstance(array, np.ndarray), name
        assert np.allclose(got.Y, wanted.Y.numpy(), atol=1e-4), name
        assert isinstance(got.encode(variant).Y, np.ndarray)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (5, 8), (30, 4)])
@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("init", ["random", "svd", "kmeans"])
def test_degenerate_shapes(shape, k, init):
    A = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    A[0] = 0 if shape[0] > 1 else A[0]
    A[:, 0] = 0 if shape[1] > 1 else A[:, 0]
    for neuron_scale in (None, "rms"):
        result = fit(A, k, keep=0.3, init=init, max_iter=20, neuron_scale=neuron_scale)
        assert result.Z.shape == (shape[0], k)
        assert result.Y.shape == (k, shape[1])
        assert bool(result.Z.isfinite().all())
        assert bool(result.Y.isfinite().all())
        assert 0 <= result.relative_error <= 1 + 1e-6


def test_all_zero_data_and_dead_features():
    result = fit(torch.zeros(8, 9), 3, keep=0.5)
    assert result.dead_features.tolist() == [0, 1, 2]
    assert result.relative_error == 0
    assert result.stop_reason is StopReason.EXACT
    assert fit(planted(50, 60, 3, keep=0.1, noise=0.1)[0], 3, keep=0.1).dead_features.tolist() == []


def test_neuron_scale_balances_neurons():
    A, Z, _ = planted(200, 1500, 5, keep=0.05, noise=0.02, seed=3)
    loud = A.clone()
    loud[:4] += 200 * torch.rand(4, 1500, generator=torch.Generator().manual_seed(1))
    plain, scaled = (
        fit(loud, 5, keep=0.05, neuron_scale=scale, init="kmeans", max_iter=100) for scale in (None, "rms")
    )

    def found(result):
        rows = slice(4, None)
        a, b = (torch.nn.functional.normalize(m[rows], dim=0) for m in (Z, result.Z))
        return float((a.T @ b).abs().max(1).values.mean())

    assert found(scaled) > found(plain) + 0.1
    assert scaled.neuron_scale is not None
    assert_near(scaled.neuron_scale, loud.square().mean(1).sqrt(), 1e-5)
    exact = float((loud - scaled.Z @ scaled.Y).double().square().sum() / loud.double().square().sum())
    assert scaled.relative_error == pytest.approx(exact, rel=1e-4)


def test_stop_reasons():
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    assert fit(A, 4, keep=0.1, max_iter=3, tol=0, patience=99).stop_reason is StopReason.MAX_ITER
    converged = fit(A, 4, keep=0.1, max_iter=500, tol=1e-3, patience=5)
    assert converged.stop_reason is StopReason.CONVERGED
    assert converged.n_iter < 500
    # Stopping on the last allowed iteration is still convergence.
    again = fit(A, 4, keep=0.1, max_iter=converged.n_iter, tol=1e-3, patience=5)
    assert again.stop_reason is StopReason.CONVERGED
    exact = fit(torch.ones(20, 30), 1, keep=1.0, tol=0, patience=100)
    assert exact.stop_reason is StopReason.EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_large_factors_leave_of_each_other_is_not_exact(dtype):
    """``Z Y`` is far larger than A in parts that nearly cancel: its loss is far from zero, and lost to rounding."""
    huge = torch.finfo(dtype).eps ** -0.9
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(20, 30, generator=generator, dtype=dtype)
    kernels = _backends.choose_all(A.device, dtype)
    problem = Problem(DataMatrix(A, dtype, kernels), count=20, ridge=0.0)
    missed = 0
    for _ in range(20):
        z = torch.randn(1, 20, generator=generator, dtype=dtype)
        Z = reference.winner_take_all(torch.cat([z, -z]).T, 20)
        y = huge * torch.rand(1, 30, generator=generator, dtype=dtype)
        Y = torch.cat([y, y + torch.rand(1, 30, generator=generator, dtype=dtype)])
        ZtZ = problem.gram(Z)
        result = problem.data.coefficient_pass(Z, ZtZ, Y, 0, out=Y)
        wanted = float(problem.data.squared_residual(Z, Y, torch.float64))
        loss = problem.loss(result, ZtZ, problem.data.gram_of_coefficients(Y))
        exact = rounding(dtype) * float(problem.data.squared_norm())
        assert wanted > exact < float(loss)
        missed += float(reference_loss(A, Z, Y)) <= exact
    assert missed, "rounding has hidden some of them"


def reference_loss(A, Z, Y):
    """The loss from Gram matrices, whatever is left of it."""
    dense = Z.to_dense()
    return A.square().sum() + ((dense.T @ dense) * (Y @ Y.T)).sum() - 2 * ((dense.T @ A) * Y).sum()


def test_the_scale_of_the_data_does_not_matter():
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    wanted = fit(A, 4, keep=0.1, tol=1e-3, patience=5)
    for power in (-60, -20, 20, 50):
        got = fit(2.0**power * A, 4, keep=0.1, tol=1e-3, patience=5)
        assert got.n_iter == wanted.n_iter
        assert got.relative_error == pytest.approx(wanted.relative_error, rel=1e-5)


def test_the_scale_of_a_given_start_does_not_matter():
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    start = fit(A, 4, keep=0.1, max_iter=20).Y
    errors = [
        fit(A, 4, keep=0.1, init=(None, c * start), max_iter=3, ridge=0).relative_error
        for c in (1.0, 1e-6, 1e6)
    ]
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("keep", "d", "count"),
    [(0.07, 100, 7), (0.01, 1536, 16), (0.01, 14336, 144), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_the_kept_count_is_that_of_the_decimal_fraction(keep, d, count):
    # math.ceil(0.07 * 100) is 8.
    A = torch.randn(d, 30, generator=torch.Generator().manual_seed(0))
    assert int((fit(A, 2, keep=keep, max_iter=2).Z != 0).sum(0).max()) == count


def test_torch_defaults_do_not_matter(monkeypatch):
    # Torch's default device does not reach through the poisoned torch.empty of conftest.py, so that goes first.
    monkeypatch.undo()
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    options = {"keep": 0.1, "max_iter": 5}
    wanted = {init: fit(A, 4, init=init, **options) for init in ("random", "svd", "kmeans")}
    for init, before in wanted.items():
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = fit(A, 4, init=init, **options)
            code = got.encode(A).Y
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got.Y, before.Y)
        assert torch.equal(code, before.encode(A).Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fit(A, 4, **options).Y, wanted["kmeans"].Y)


def test_numpy_scalars_are_welcome_as_options(tmp_path):
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    plain = fit(A, 4, keep=0.125, seed=3, tol=1e-4, max_iter=5)
    exotic = fit(
        A,
        np.int64(4),
        keep=np.float32(0.125),
        seed=np.int32(3),
        tol=torch.tensor(1e-4).double(),
        max_iter=np.uint8(5),
    )
    assert torch.equal(plain.Y, exotic.Y)
    exotic.save(tmp_path / "f.safetensors")
    assert type(exotic.options["k"]) is int


def test_tf32_is_for_gpus_alone():
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    plain, allowed = (fit(A, 4, max_iter=5, allow_tf32=value) for value in (False, np.True_))
    assert torch.equal(plain.Y, allowed.Y)
    assert allowed.options["allow_tf32"] is True
    with pytest.raises(TypeError, match="allow_tf32: wanted True or False, got 'yes'"):
        fit(A, 4, allow_tf32="yes")


def test_lazily_negated_tensors_are_read_with_their_sign():
    lazy = torch.randn(50, 60, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(
        fit(lazy, 3, keep=0.2, max_iter=5).Y, fit(lazy.clone().resolve_neg(), 3, keep=0.2, max_iter=5).Y
    )


def test_a_nearly_dead_neuron_does_not_break_the_scale():
    A = planted(60, 100, 4, keep=0.1, noise=0.5)[0]
    A[5] = 1e-39
    assert fit(A, 4, keep=0.1, neuron_scale="rms", max_iter=5).relative_error < 1


def test_callback():
    A, _, _ = planted(60, 100, 4, keep=0.1, noise=0.5)
    states = []
    result = fit(A, 4, keep=0.1, tol=0, callback=lambda state: states.append(state) or state.n_iter == 7)
    assert result.stop_reason is StopReason.CALLBACK
    assert [state.n_iter for state in states] == list(range(1, 8))
    assert tuple(state.loss for state in states) == result.loss_history[:-1]


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    fit(torch.rand(10, 10), 2, keep=0.5, max_iter=3, progress=True)
    printed = capsys.readouterr()
    assert "snmf_kernels.fit" in printed.err
    for phase in ("start", "last sweeps"):
        assert phase in printed.err
    # However many iterations it might have had.
    assert "3/3" in printed.err.rpartition("\r")[2]
    assert printed.out == ""


def test_a_bar_that_ended_early_is_full(capsys):
    pytest.importorskip("tqdm")
    result = fit(torch.rand(10, 10), 2, keep=0.5, max_iter=150, progress=True)
    assert result.n_iter < 150
    assert f"{result.n_iter}/{result.n_iter}" in capsys.readouterr().err.rpartition("\r")[2]


def test_warm_start():
    A, _, _ = planted(100, 200, 5, keep=0.1, noise=0.5)
    first = fit(A, 5, keep=0.1, max_iter=50, neuron_scale="rms")
    for init in ((first.Z, first.Y), (None, first.Y), (first.Z, None), (first.Z.numpy(), None)):
        again = fit(A, 5, keep=0.1, init=init, max_iter=3, neuron_scale="rms")
        assert again.loss_history[0] < 1.05 * min(first.loss_history)


def test_identical_coefficients_do_not_break_the_solve():
    A = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    Y0 = torch.rand(1, 40, generator=torch.Generator().manual_seed(1)).expand(6, 40).contiguous() * 1e4
    for dtype in (torch.float32, torch.float64):
        result = fit(A.to(dtype), 6, keep=0.5, init=(None, Y0), ridge=0, max_iter=5)
        assert bool(result.Z.isfinite().all())


MATRIX = torch.ones(3, 4)
REFUSALS = {
    "type": (lambda: fit([[1.0]], 1), TypeError, "A: wanted a torch tensor or a numpy array, got list"),
    "integers": (
        lambda: fit(torch.ones(3, 3, dtype=torch.int64), 1),
        TypeError,
        "A: wanted dtype float16.*got int64",
    ),
    "complex": (lambda: fit(np.ones((3, 3), dtype=complex), 1), TypeError, "A: wanted dtype"),
    "objects": (lambda: fit(np.array([["a"]]), 1), TypeError, "A: wanted dtype"),
    "sparse": (lambda: fit(torch.eye(3).to_sparse(), 1), TypeError, "A: wanted a dense tensor"),
    "rank": (lambda: fit(torch.ones(3), 1), ValueError, r"A: wanted a matrix \[d, n\].*got shape \(3,\)"),
    "masked": (
        lambda: fit(np.ma.masked_array(np.ones((3, 3), "f4"), np.eye(3)), 1),
        TypeError,
        "A: wanted a plain array, got a masked one",
    ),
    "keep text": (lambda: fit(MATRIX, 1, keep="0.1"), TypeError, r"keep: wanted a number, got '0.1' \(str\)"),
    "sweeps huge": (lambda: fit(MATRIX, 1, sweeps=2**31), ValueError, "sweeps: wanted an integer below"),
    "empty": (
        lambda: fit(torch.ones(3, 0), 1),
        ValueError,
        r"A: wanted at least one row and one column, got shape \(3, 0\)",
    ),
    "k zero": (lambda: fit(MATRIX, 0), ValueError, "k: wanted an integer >= 1, got 0"),
    "k float": (lambda: fit(MATRIX, 2.0), TypeError, r"k: wanted an integer >= 1, got 2.0 \(float\)"),
    "keep zero": (lambda: fit(MATRIX, 1, keep=0), ValueError, r"keep: wanted a fraction in \(0, 1\]"),
    "keep percent": (
        lambda: fit(MATRIX, 1, keep=5),
        ValueError,
        r"keep: wanted a fraction in \(0, 1\].*got 5",
    ),
    "solver": (lambda: fit(MATRIX, 1, solver="als"), ValueError, "solver: wanted one of auto, mu, got 'als'"),
    "tiny values": (
        lambda: fit(MATRIX.float() * 2.0**-120, 1, neuron_scale=None),
        ValueError,
        "A: its values are too small for float32",
    ),
    "init": (lambda: fit(MATRIX, 1, init="nndsvd"), ValueError, "init: wanted one of random, svd, kmeans"),
    "init type": (lambda: fit(MATRIX, 1, init=3), TypeError, "init: wanted"),
    "init none": (lambda: fit(MATRIX, 1, init=(None, None)), ValueError, "init: wanted Z0, Y0 or both"),
    "init shape": (
        lambda: fit(MATRIX, 2, init=(None, torch.ones(2, 3))),
        ValueError,
        r"init\[1\]: wanted shape \(2, 4\)",
    ),
    "init sign": (
        lambda: fit(MATRIX, 2, init=(None, -torch.ones(2, 4))),
        ValueError,
        r"init\[1\]: wanted Y0 >= 0, got 8",
    ),
    "init nan": (
        lambda: fit(MATRIX, 2, init=(torch.full((3, 2), torch.nan), None)),
        ValueError,
        r"init\[0\]: wanted finite",
    ),
    "scale": (lambda: fit(MATRIX, 1, neuron_scale="std"), ValueError, "neuron_scale: wanted None or 'rms'"),
    "ridge": (lambda: fit(MATRIX, 1, ridge=-1), ValueError, "ridge: wanted a finite number >= 0, got -1"),
    "tol": (lambda: fit(MATRIX, 1, tol=math.nan), ValueError, "tol: wanted a finite number >= 0, got nan"),
    "patience": (lambda: fit(MATRIX, 1, patience=0), ValueError, "patience: wanted an integer >= 1, got 0"),
    "max_iter": (lambda: fit(MATRIX, 1, max_iter=0), ValueError, "max_iter: wanted an integer >= 1, got 0"),
    "sweeps": (lambda: fit(MATRIX, 1, sweeps=0), ValueError, "sweeps: wanted an integer >= 1, got 0"),
    "seed": (lambda: fit(MATRIX, 1, seed=-1), ValueError, "seed: wanted an integer >= 0, got -1"),
    "dtype": (
        lambda: fit(MATRIX, 1, dtype=torch.float16),
        ValueError,
        "dtype: wanted torch.float32 or torch.float64",
    ),
    "backend": (lambda: fit(MATRIX, 1, backend="fast"), ValueError, "backend: wanted one of auto, cpp"),
    "unavailable": (
        lambda: fit(MATRIX, 1, backend="cuda"),
        snmf_kernels.BackendError,
        "it runs on CUDA devices",
    ),
    "solver type": (
        lambda: fit(MATRIX, 1, solver=[]),
        ValueError,
        r"solver: wanted one of auto, mu, got \[\]",
    ),
    "device that does not compute": (
        lambda: fit(MATRIX, 1, device="meta"),
        ValueError,
        "device: wanted a device that this torch computes on, got meta; use device='cpu'",
    ),
    "no device": (
        lambda: fit(MATRIX, 1, device="gpu"),
        ValueError,
        "device: wanted a device such as 'cpu' or 'cuda:0', got 'gpu'",
    ),
    "callback": (
        lambda: fit(MATRIX, 1, callback=3),
        TypeError,
        "callback: wanted a function of an Iteration",
    ),
    "weights type": (
        lambda: fit(MATRIX, 1, token_weights="a"),
        TypeError,
        "token_weights: wanted a tensor or array of one number for each token, 'clip' or None, got 'a'",
    ),
    "tiny weights": (
        lambda: fit(MATRIX, 1, token_weights=1e-40 * torch.ones(4)),
        ValueError,
        "token_weights: wanted a largest weight between 1e-12 and 1e12, got 1e-40; only their ratios",
    ),
    "tiny fixed": (
        lambda: fit(MATRIX, 2, fixed=torch.tensor([[1e-30], [0.0], [0.0]])),
        ValueError,
        "fixed: wanted columns in the units of A, got column 0 with a norm of 1e-30",
    ),
    "memory": (
        lambda: fit(MATRIX.repeat(1, 1000), 2**31 - 1),
        ValueError,
        r"k: Y \[k, n\] = \[2147483647, 4000\] would take 34,359.7 GB in float32, and .* GB are free on cpu",
    ),
    "overflow": (
        lambda: fit(torch.full((2, 2), 1e300, dtype=torch.float64), 1),
        ValueError,
        r"A: its values are too large for float64, in which their products overflow \(the largest magnitude is 1e\+300",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_non_finite_values_are_counted_and_located(dtype, monkeypatch):
    monkeypatch.setattr(snmf_kernels.reference, "_BLOCK_ELEMENTS", {"cpu": 4 * 3})
    A = torch.ones(4, 10, dtype=dtype)
    A[2, 7] = torch.inf
    A[3, 9] = torch.nan
    with pytest.raises(
        ValueError, match=r"got 2 of 40 NaN or infinite, the first \(inf\) at neuron 2, token 7"
    ):
        fit(A, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device: wanted cuda, but torch finds no CUDA or ROCm device"):
        fit(torch.ones(3, 3), 1, device="cuda")


@pytest.mark.parametrize("neuron_scale", [None, "rms"])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, (-108, -60, 60, 110)), (torch.float64, (-470, -300, 300, 470))],
)
def test_a_power_of_two_in_the_data_changes_nothing_but_the_scale(dtype, exponents, neuron_scale):
    A = planted(40, 60, 4, keep=0.1, noise=0.3, dtype=dtype)[0]
    options = {"keep": 0.1, "neuron_scale": neuron_scale, "max_iter": 6}
    plain = fit(A, 4, **options)
    for exponent in exponents:
        scaled = fit(A * 2.0**exponent, 4, **options)
        assert torch.equal(scaled.Z * 2.0**-exponent != 0, plain.Z != 0)
        # One factor of the power is in Z.
        assert_near(scaled.Z * 2.0**-exponent, plain.Z, 1e-4)
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-5)
        assert (scaled.neuron_scale is None) == (neuron_scale is None)
        unit = 4.0**exponent if neuron_scale is None else 1.0
        assert scaled.loss_history == pytest.approx([loss * unit for loss in plain.loss_history], rel=1e-5)
        code = scaled.encode(A * 2.0**exponent)
        assert_near(code.Y, plain.encode(A).Y, 1e-3)


@pytest.mark.parametrize("neuron_scale", [None, "rms"])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, -115), (torch.float32, 124), (torch.float64, -550), (torch.float64, 540)],
)
def test_data_that_products_lose_is_refused_by_name(dtype, exponent, neuron_scale):
    A = planted(40, 60, 4, keep=0.1, noise=0.3, dtype=dtype)[0] * 2.0**exponent
    wanted = f"A: its values are too {'small' if exponent < 0 else 'large'} for {dtype}".replace("torch.", "")
    with pytest.raises(ValueError, match=wanted):
        fit(A, 4, keep=0.1, neuron_scale=neuron_scale)


def test_a_given_start_may_be_of_any_scale():
    A, Y0, _ = problem()
    plain, scaled = (fit(A, 5, keep=0.1, init=(None, scale * Y0), max_iter=4) for scale in (1.0, 2.0**-600))
    assert_near(scaled.Z @ scaled.Y, plain.Z @ plain.Y, 1e-6)


def test_loss_history_matches_dense_losses():
    A, Y0, keep = problem()
    history = fit(A, 5, keep=keep, solver="mu", init=(None, Y0), max_iter=20, tol=0, patience=20).loss_history
    _, _, losses = published_iteration(A, Y0, keep, 20)
    assert relative_difference(torch.tensor(history), torch.tensor(losses)) < 1e-10


def test_doubts_are_said_before_the_work():
    A = torch.rand(64, 50)
    with pytest.warns(FitWarning, match=r"keep: a feature would keep 1 of 64 neurons.*use keep=0.05 or more"):
        fit(A, 2, max_iter=1)
    with pytest.warns(FitWarning, match="k: 60 features for 50 tokens"):
        fit(A, 60, keep=0.2, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(A, 50, keep=0.05, max_iter=1)
        fit(torch.rand(2, 50), 2, keep=1.0, max_iter=1)


def test_a_warning_names_the_line_of_the_caller():
    with pytest.warns(FitWarning) as caught:
        fit(torch.rand(64, 50), 2, max_iter=1)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("shape", "hint"), [((1000, 768), True), ((1536, 1000), False), ((1536, 768), False)]
)
def test_what_looks_the_wrong_way_round_gets_a_hint(caplog, shape, hint):
    fit(torch.rand(shape), 2, max_iter=1)
    assert ("rows are neurons: if yours are tokens, pass A.T" in caplog.text) == hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
@pytest.mark.parametrize("neuron_scale", [None, "rms"])
def test_subnormal_numbers_count_as_zeros(dtype, layout, neuron_scale):
    A = LAYOUTS[layout](planted(60, 900, 4, keep=0.1, noise=0.3)[0].to(dtype))
    faint = torch.rand(A.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tiny = torch.finfo(dtype).tiny / 8
    assert tiny > 0
    results = [
        fit(
            torch.where(faint, torch.full_like(A, value), A),
            4,
            keep=0.1,
            neuron_scale=neuron_scale,
            max_iter=5,
        )
        for value in (0.0, tiny)
    ]
    assert_near(results[1].Z, results[0].Z, 1e-5)
    assert_near(results[1].Y, results[0].Y, 1e-5)


@pytest.mark.parametrize("method", ["coordinate_descent", "multiplicative_update"])
def test_kernels_make_no_subnormal_numbers(method):
    """Whose operations take a hundred times as long on many processors."""
    generator = torch.Generator().manual_seed(0)
    Y, ZtA = torch.rand(4, 50, generator=generator), torch.rand(4, 50, generator=generator)
    scale = torch.finfo(torch.float32).tiny / 4
    got = getattr(ops, method)(Y * scale, ZtA * scale, torch.eye(4), backend="cpp")
    assert int((got != 0).sum()) == 0
    # Only while a kernel runs.
    assert float(torch.full((), 1.0) * scale) != 0
