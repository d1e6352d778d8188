"""What holds for any data: half steps do not raise their objectives, results are what they say, backends agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import DESCENT_TOLERANCE, SOLVE_TOLERANCE, assert_near
from test_operations import double

from snmf_kernels import SparseColumns, _backends, fit, ops, reference

# The same examples in every run, however slow the machine.
FEW = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

BACKENDS = st.sampled_from(["cpp", "torch"])
SEEDS = st.integers(0, 2**31 - 1)
KINDS = ["plain", "constant rows", "duplicated tokens", "zero tokens", "zero neurons", "low rank", "positive"]
LAYOUTS = {
    "neuron-major": lambda A: A.contiguous(),
    "token-major": lambda A: A.T.contiguous().T,
    "strided": lambda A: A.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "reversed": lambda A: A.flip(0, 1).contiguous().flip(0, 1),
    "offset": lambda A: torch.nn.functional.pad(A, (3, 1, 1, 2))[1:-2, 3:-1],
}


@st.composite
def matrices(
    draw, kinds=KINDS, powers=(0, 0, -30, 30), dtypes=(torch.float32, torch.float64), least_d=1, least_n=1
):
    """Activations ``[d, n]``, small and often degenerate."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    d, n, kind = draw(st.integers(least_d, 24)), draw(st.integers(least_n, 70)), draw(st.sampled_from(kinds))
    A = torch.randn(d, n, generator=generator, dtype=torch.float64)
    some_rows, some_tokens = torch.arange(d) % 2 == 1, torch.arange(n) % 3 != 0
    if kind == "constant rows":
        A[some_rows] = 1
    elif kind == "duplicated tokens":
        A[:, some_tokens] = A[:, :1].clone()
    elif kind == "zero tokens":
        A[:, some_tokens] = 0
    elif kind == "zero neurons":
        A[some_rows] = 0
    elif kind == "low rank":
        A = A[:, :1] @ torch.rand(1, n, generator=generator, dtype=torch.float64)
    elif kind == "positive":
        A = A.abs()
    A = (2.0 ** draw(st.sampled_from(powers)) * A).to(draw(st.sampled_from(dtypes)))
    return draw(st.sampled_from(list(LAYOUTS.values())))(A)


def random_start(A, k, seed, least=0.0):
    """(Y, Z): non-negative and signed, with zeros where ``least`` is zero, in the units of A."""
    generator = torch.Generator().manual_seed(seed)
    d, n = A.shape
    Y = least + torch.rand(k, n, generator=generator, dtype=torch.float64)
    Z = torch.randn(d, k, generator=generator, dtype=torch.float64)
    if least == 0:
        Y *= torch.rand(k, n, generator=generator) < 0.5
        Z *= torch.rand(1, k, generator=generator) < 0.8  # some features are dead
    scale = float(A.abs().max()) or 1.0
    return Y.to(A.dtype), reference.winner_take_all(scale * Z, min(d, 4))


def quadratic(X, gram, linear, eps):
    """``⟨X, gram X⟩ − 2 ⟨linear, X⟩`` in float64, and what rounding in a dtype of this ``eps`` makes of it."""
    X, gram, linear = X.double(), gram.double(), linear.double()
    size = (X.abs() * (gram.abs() @ X.abs() + 2 * linear.abs())).sum()
    return float((X * (gram @ X - 2 * linear)).sum()), 8 * len(X) * eps * float(size)


def assert_not_raised(before, after):
    (start, slack), (end, more_slack) = before, after
    assert math.isfinite(end)
    assert end <= start + slack + more_slack


@FEW
@given(A=matrices(), k=st.integers(1, 9), seed=SEEDS, backend=BACKENDS, sweeps=st.integers(1, 3))
def test_coordinate_descent_does_not_raise_the_loss(A, k, seed, backend, sweeps):
    Y, Z = random_start(A, k, seed)
    Z = SparseColumns(Z.indices, Z.values.to(A.dtype), Z.d)
    dense = Z.to_dense()
    ZtA, ZtZ, eps = ops.sparse_product(Z, A), dense.T @ dense, torch.finfo(A.dtype).eps
    for _ in range(2):
        before, Y = Y, ops.coordinate_descent(Y, ZtA, ZtZ, sweeps=sweeps, backend=backend)
        assert bool((Y >= 0).all())
        assert bool(Y.isfinite().all())
        assert_not_raised(quadratic(before, ZtZ, ZtA, eps), quadratic(Y, ZtZ, ZtA, eps))


@FEW
@given(A=matrices(), k=st.integers(1, 9), seed=SEEDS, backend=BACKENDS, l1=st.sampled_from([0.0, 0.1, 10.0]))
def test_a_pass_does_not_raise_the_penalised_loss(A, k, seed, backend, l1):
    Y, Z = random_start(A, k, seed)
    Z = SparseColumns(Z.indices, Z.values.to(A.dtype), Z.d)
    dense = Z.to_dense()
    ZtZ, eps = dense.T @ dense, torch.finfo(A.dtype).eps
    shift = l1 * torch.diagonal(ZtZ).sqrt() * A.abs().max()
    linear = dense.T @ A - shift[:, None]
    new, sums = ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=2, shift=shift, residual=True, backend=backend)
    assert bool((new >= 0).all())
    assert_not_raised(quadratic(Y, ZtZ, linear, eps), quadratic(new, ZtZ, linear, eps))
    exact = float((A.double() - dense.double() @ new.double()).square().sum())
    assert float(sums.residual) == pytest.approx(exact, abs=1e-5 * (float(sums.data) + exact))


@FEW
@given(A=matrices(), k=st.integers(1, 9), seed=SEEDS, backend=BACKENDS)
def test_the_multiplicative_update_does_not_raise_the_loss(A, k, seed, backend):
    # Without eps, where the proof holds; where a coefficient or a feature is zero that would be 0 / 0.
    Y, Z = random_start(A, k, seed, least=0.1)
    dense = Z.to_dense().to(A.dtype)
    ZtA, ZtZ, eps = dense.T @ A, dense.T @ dense, torch.finfo(A.dtype).eps
    new = ops.multiplicative_update(Y, ZtA, ZtZ, eps=0.0, backend=backend)
    assert bool((new >= 0).all())
    assert_not_raised(quadratic(Y, ZtZ, ZtA, eps), quadratic(new, ZtZ, ZtA, eps))


@FEW
@given(A=matrices(), k=st.integers(1, 9), seed=SEEDS, backend=BACKENDS)
def test_column_descent_and_the_solve_do_not_raise_the_loss(A, k, seed, backend):
    Y, Z = random_start(A, k, seed)
    Z = SparseColumns(Z.indices, Z.values.to(A.dtype), Z.d)
    AYt, YYt, eps = Y @ A.T, Y @ Y.T, torch.finfo(A.dtype).eps
    for _ in range(2):
        before, Z = Z, ops.column_descent(Z, AYt, YYt, backend=backend)
        assert bool((Z.indices.diff(dim=1) > 0).all()), "rows ascend, each once"
        assert_not_raised(
            quadratic(before.to_dense().T, YYt, AYt, eps), quadratic(Z.to_dense().T, YYt, AYt, eps)
        )
    # On the supports that were chosen, the solve minimises the same with a ridge.
    supports, order = Z.supports()
    ridge = 1e-3 * max(float(torch.diagonal(YYt).max()), 1e-30)
    solved, info = ops.support_solve(
        YYt.double(), supports, Z.gather(AYt).flatten()[order].double(), ridge=ridge, backend=backend
    )
    assert not bool(info.any())
    values = torch.empty_like(solved)
    values[order] = solved
    best = SparseColumns(Z.indices, values.view_as(Z.values), Z.d).to_dense().T
    ridged = YYt.double() + ridge * torch.eye(k, dtype=torch.float64)
    # The order of the sums is all that differs from an exact minimum.
    assert_not_raised(quadratic(Z.to_dense().T, ridged, AYt, 1e-15), quadratic(best, ridged, AYt, 1e-15))


@st.composite
def fit_options(draw):
    options = {
        "keep": draw(st.sampled_from([0.1, 0.3, 0.34, 1.0])),
        "neuron_scale": draw(st.sampled_from([None, "rms"])),
        "refit": draw(st.sampled_from([False, True, "late"])),
        "init": draw(st.sampled_from(["random", "kmeans", "svd"])),
        "backend": draw(BACKENDS),
        "seed": draw(st.integers(0, 5)),
        "max_iter": draw(st.integers(1, 12)),
    }
    extra = draw(st.sampled_from(["none", "none", "l1", "l2", "max_active", "fixed", "token_weights"]))
    return options, extra


def with_extra(options, extra, A, k):
    n = A.shape[1]
    values = {
        "none": {},
        "l1": {"l1": 0.05},
        "l2": {"l2": 0.5},
        "max_active": {"max_active": 2},
        "fixed": {"fixed": A[:, :1] + float(A.abs().max())} if k > 1 else {},
        "token_weights": {"token_weights": torch.arange(1, n + 1) % 4 + (0.5 if n < 4 else 0.0)},
    }
    return options | values[extra]


@settings(FEW, max_examples=100)
@given(A=matrices(), k=st.integers(1, 12), chosen=fit_options())
def test_a_fit_is_what_it_says(A, k, chosen):
    options, extra = chosen
    options = with_extra(options, extra, A, k)
    kept = A.clone()
    result = fit(A, k, **options)
    assert torch.equal(A, kept), "the activations were changed"
    d, n = A.shape
    assert result.Z.shape == (d, k)
    assert result.Y.shape == (k, n)
    for factor in (result.Z, result.Y):
        assert factor.dtype == A.dtype
        assert bool(factor.isfinite().all())
    assert bool((result.Y >= 0).all())
    free = result.Z[:, result.options["n_fixed"] :]
    assert int((free != 0).sum(0).max()) <= math.ceil(round(options["keep"] * d, 6))
    if extra == "max_active":
        assert int((result.Y > 0).sum(0).max()) <= 2
    weights = torch.as_tensor(options.get("token_weights", torch.ones(n))).double()
    data = float((A.double().square() * weights).sum())
    residual = float(((A.double() - result.Z.double() @ result.Y.double()).square() * weights).sum())
    share = residual / data if data else 0.0
    assert result.relative_error == pytest.approx(share, rel=1e-4, abs=1e-6)
    alive = (result.Z != 0).any(0) & (result.Y > 0).any(1)
    assert result.dead_features.tolist() == (~alive).nonzero()[:, 0].tolist()
    # The losses are those of the scaled data, from Gram matrices.
    scale = torch.ones(d, dtype=torch.float64)
    if result.neuron_scale is not None:
        scale = result.neuron_scale.double()
    Z, A_scaled = result.Z.double() / scale[:, None], A.double() / scale[:, None]
    contributions = Z.norm(dim=0)[:, None] * result.Y.double()
    penalty = (
        2 * result.options["l1_threshold"] * contributions + result.options["l2"] * contributions.square()
    )
    # Clipped tokens count less in the objective, and like others in relative_error.
    weights = torch.ones(n).double() if result.token_weights is None else result.token_weights.double()
    objective = float((((A_scaled - Z @ result.Y.double()).square().sum(0) + penalty.sum(0)) * weights).sum())
    # Features of opposite signs may add up to less than each of them.
    sizes = (A_scaled.abs() + Z.abs() @ result.Y.double()).square().sum(0)
    rounding = 8 * torch.finfo(A.dtype).eps * float((sizes * weights).sum())
    history = result.loss_history
    assert len(history) == result.n_iter + 1
    assert history[-1] == pytest.approx(objective, rel=1e-6, abs=rounding)
    if extra != "max_active":
        # The last sweeps start from the best Y.
        assert history[-1] <= min(history) * (1 + 1e-6) + rounding


@FEW
@given(A=matrices(), k=st.integers(1, 12), chosen=fit_options(), threads=st.sampled_from([1, 2]))
def test_the_same_seed_gives_the_same_bits(A, k, chosen, threads):
    options = with_extra(*chosen, A, k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (fit(A, k, **options) for _ in range(2))
        codes = [result.encode(A, max_sweeps=9).Y for result in (first, second)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first.Z, second.Z)
    assert torch.equal(first.Y, second.Y)
    assert first.loss_history == second.loss_history
    assert torch.equal(*codes)


@FEW
@given(
    A=matrices(kinds=("plain", "positive"), dtypes=(torch.float64,), least_d=8, least_n=20),
    k=st.integers(1, 6),
    chosen=fit_options(),
)
def test_layouts_and_backends_give_the_same_fit(A, k, chosen):
    # Of data without ties, for a few iterations; one sweep in each, since tokens are left alone tile by tile.
    options = with_extra(*chosen, A, k)
    # Two features of the same one neuron would be a tie as well.
    options |= {"sweeps": 1, "keep": max(0.3, options["keep"])}
    for iterations in (1, 3):
        wanted = fit(A, k, **options | {"max_iter": iterations})
        size = A.numel() if options["neuron_scale"] else float(A.square().sum())
        for layout in LAYOUTS.values():
            for backend in ("cpp", "torch"):
                got = fit(layout(A), k, **options | {"max_iter": iterations, "backend": backend})
                for loss, other in zip(
                    got.loss_history[:iterations], wanted.loss_history[:iterations], strict=True
                ):
                    assert loss == pytest.approx(other, rel=1e-6, abs=1e-9 * size)
                if iterations == 1:  # of several, rounding may decide which is the best
                    assert_near(got.Z, wanted.Z, 1e-6)


@FEW
@given(A=matrices(), k=st.integers(1, 5), order=st.sampled_from("CF"), half=st.booleans())
def test_arrays_in_arrays_out(A, k, order, half):
    if half:
        A = (A / (A.abs().max() + 1e-30)).half()
    array = np.array(A.numpy(), order=order)
    result = fit(array, k, keep=0.3, max_iter=3)
    for value in (result.Z, result.Y, result.dead_features, result.neuron_scale, result.encode(array).Y):
        assert isinstance(value, np.ndarray)
    assert result.Z.dtype == (np.float64 if A.dtype == torch.float64 else np.float32)
    wanted = fit(A, k, keep=0.3, max_iter=3, device="cpu")
    if A.stride() == torch.from_numpy(array).stride():
        assert np.array_equal(result.Y, wanted.Y.numpy())


@FEW
@given(
    A=matrices(powers=(0,)), k=st.integers(1, 9), seed=SEEDS,
    max_active=st.sampled_from([0, 1, 3]), shifted=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_backends_and_levels_agree(A, k, seed, max_active, shifted, weighted):
    dtype = A.dtype
    Y, Z = random_start(A, k, seed)
    Z = SparseColumns(Z.indices, Z.values.to(dtype), Z.d)
    dense = Z.to_dense().double()
    ZtZ = (dense.T @ dense).to(dtype)
    options = {"sweeps": 2, "measure": True, "products": "kept"}
    if shifted:
        options["shift"] = torch.full((k,), 0.25, dtype=dtype)
    if weighted:
        options["token_weights"] = torch.linspace(0, 2, A.shape[1], dtype=dtype)
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    wanted_Y = torch.empty(Y.shape, dtype=torch.float64)
    wanted = reference.coefficient_pass(
        Y.double(), double(Z), A.double(), ZtZ.double(), out=wanted_Y, max_active=max_active,
        feature_norms=torch.diagonal(ZtZ.double()).sqrt(), residual_values=Z.values.double(), **exact,
    )  # fmt: skip
    diagonal = torch.diagonal(ZtZ.double()).clamp(min=1e-30)
    size = float((2 * (dense.abs().T @ A.double().abs()) / diagonal[:, None]).norm() + wanted_Y.norm())
    AYt, YYt = Y @ A.T, Y @ Y.T
    columns = reference.column_descent(double(Z), AYt.double(), YYt.double())
    supports, order = Z.supports()
    G, B = YYt / max(1, A.shape[1]), Z.gather(AYt).flatten()[order]
    solved, _ = reference.support_solve(G.double(), supports, B.double(), 0.1)
    module = _backends.compiled_module()
    info = module.build_info()
    levels = [("torch", None), *(("cpp", level) for level in info["levels"].split(","))]
    try:
        for backend, level in levels:
            if level:
                module.set_level(level)
            got_Y, got = ops.coefficient_pass(
                Y, Z, A, ZtZ, max_active=max_active, residual=True, backend=backend, **options
            )
            # Beside what the shift and other features take of it.
            assert float((got_Y - wanted_Y).norm()) <= DESCENT_TOLERANCE[dtype] * size
            assert float((got.AYt - wanted.AYt).norm()) <= DESCENT_TOLERANCE[dtype] * size * float(A.norm())
            assert got.sweeps == wanted.sweeps
            assert float(got.data) == pytest.approx(float(wanted.data), rel=1e-6)
            chosen = ops.column_descent(Z, AYt, YYt, backend=backend)
            # Where magnitudes are nearly equal the choice may differ, but hardly what it gains.
            loss, slack = quadratic(chosen.to_dense().T, YYt, AYt, torch.finfo(dtype).eps)
            assert loss == pytest.approx(quadratic(columns.to_dense().T, YYt, AYt, 0)[0], abs=slack)
            assert_near(
                ops.support_solve(G, supports, B, ridge=0.1, backend=backend)[0],
                solved,
                SOLVE_TOLERANCE[dtype],
            )
    finally:
        module.set_level(info["level"])
