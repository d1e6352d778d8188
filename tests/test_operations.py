"""Each operation on each backend against the float64 reference, on awkward shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import GPU, interpreted, runs_here
from problems import (
    COLUMN_TOLERANCE,
    DESCENT_TOLERANCE,
    PASS_TOLERANCE,
    SOLVE_TOLERANCE,
    TOLERANCE,
    assert_near,
    assert_same_sums,
    relative_difference,
)

import snmf_kernels
from snmf_kernels import SparseColumns, _backends, ops, reference
from snmf_kernels.sparse import Supports

LEVELS = ["v2", "v3", "v4"]
DTYPES = [torch.float32, torch.float64]
SWEEPS = [
    (operation, backend)
    for operation in ("multiplicative_update", "coordinate_descent")
    for backend in ("cpp", "torch", "triton")
    if operation in _backends.PROVIDES[backend]
]
# (k, n): ones, primes, multiples of a tile and one off, k above and below n.
COEFFICIENT_SHAPES = [(1, 1), (1, 65), (7, 3), (16, 64), (31, 129), (67, 200), (130, 33)]


def coefficient_problem(k, n, dtype, device, seed=0):
    """A consistent (Y, ZtA, ZtZ) with signed entries, exact zeros in ZtZ, and a feature that is zero."""
    generator = torch.Generator().manual_seed(seed)
    d = 50
    Z = torch.randn(d, k, generator=generator, dtype=torch.float64) * (
        torch.rand(d, k, generator=generator) < 0.2
    )
    if k > 2:
        Z[:, 1] = 0
    A = torch.randn(d, n, generator=generator, dtype=torch.float64)
    Y = torch.rand(k, n, generator=generator, dtype=torch.float64)
    return tuple(tensor.to(device, dtype) for tensor in (Y, Z.T @ A, Z.T @ Z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), COEFFICIENT_SHAPES)
@pytest.mark.parametrize("sweeps", [1, 2, 3])
@pytest.mark.parametrize(("backend", "device"), runs_here("multiplicative_update"))
def test_multiplicative_update(backend, device, sweeps, k, n, dtype):
    Y, ZtA, ZtZ = coefficient_problem(k, n, dtype, device)
    before = Y.clone()
    got = ops.multiplicative_update(Y, ZtA, ZtZ, sweeps=sweeps, backend=backend)
    wanted = reference.multiplicative_update(Y.double(), ZtA.double(), ZtZ.double(), sweeps=sweeps)
    assert_near(got, wanted, TOLERANCE[dtype])
    assert torch.equal(Y, before), "the argument was changed"
    assert bool((got >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), COEFFICIENT_SHAPES)
@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.slow_where(
    lambda backend, device, sweeps, k, **_: interpreted(backend, device) and k * sweeps > 100
)
@pytest.mark.parametrize(("backend", "device"), runs_here("coordinate_descent"))
def test_coordinate_descent(backend, device, sweeps, k, n, dtype):
    Y, ZtA, ZtZ = coefficient_problem(k, n, dtype, device)
    before = Y.clone()
    got = ops.coordinate_descent(Y, ZtA, ZtZ, sweeps=sweeps, backend=backend)
    wanted = reference.coordinate_descent(Y.double(), ZtA.double(), ZtZ.double(), sweeps=sweeps)
    assert_near(got, wanted, DESCENT_TOLERANCE[dtype])
    assert torch.equal(Y, before), "the argument was changed"
    assert bool((got >= 0).all())


@pytest.mark.parametrize(("operation", "backend"), SWEEPS)
def test_strided_arguments(operation, backend):
    device = "cuda" if backend == "triton" and GPU else "cpu"
    Y, ZtA, ZtZ = coefficient_problem(7, 70, torch.float32, device)
    wanted = getattr(reference, operation)(Y, ZtA, ZtZ, sweeps=2)
    wide = [torch.stack([tensor, tensor + 9], dim=1)[:, 0] for tensor in (Y, ZtA)]  # rows apart
    turned = [tensor.T.contiguous().T for tensor in (Y, ZtA, ZtZ)]
    for y, p, q in ((*wide, ZtZ), turned):
        assert_near(getattr(ops, operation)(y, p, q, sweeps=2, backend=backend), wanted, 4e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("operation", "backend"), SWEEPS)
def test_nan_stays_visible(operation, backend, place):
    arguments = list(
        coefficient_problem(5, 20, torch.float32, "cuda" if backend == "triton" and GPU else "cpu")
    )
    arguments[place][2, 3] = torch.nan
    assert bool(getattr(ops, operation)(*arguments, backend=backend).isnan().any())


@pytest.mark.parametrize(("operation", "backend"), SWEEPS)
def test_a_gram_matrix_of_nan_stays_in_bounds(operation, backend):
    Y, ZtA, ZtZ = coefficient_problem(
        130, 40, torch.float32, "cuda" if backend == "triton" and GPU else "cpu"
    )
    off_diagonal = torch.full_like(ZtZ, torch.nan).fill_diagonal_(1.0)
    # Written past the end of its scratch memory once, which the allocator noticed or not.
    assert bool(getattr(ops, operation)(Y, ZtA, off_diagonal, sweeps=2, backend=backend).isnan().all())


@pytest.mark.parametrize("operation", ["multiplicative_update", "coordinate_descent"])
def test_no_sweep_raises_the_loss(operation):
    generator = torch.Generator().manual_seed(3)
    Z = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    A = torch.randn(40, 70, generator=generator, dtype=torch.float64)
    Y = torch.rand(9, 70, generator=generator, dtype=torch.float64)
    arguments = {"eps": 0.0} if operation == "multiplicative_update" else {}
    loss = float((A - Z @ Y).square().sum())
    for _ in range(30):
        Y = getattr(ops, operation)(Y, Z.T @ A, Z.T @ Z, **arguments)
        now = float((A - Z @ Y).square().sum())
        assert now <= loss * (1 + 1e-14)
        loss = now


# (d, k, count)
SELECT_SHAPES = [(1, 1, 1), (7, 3, 7), (64, 5, 1), (97, 4, 13), (300, 11, 3), (5000, 2, 50)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "k", "count"), SELECT_SHAPES)
@pytest.mark.parametrize("layout", ["row-major", "column-major", "strided"])
@pytest.mark.parametrize("values", ["random", "ties", "zeros", "signs", "extremes"])
# The kernel takes strides as they are: each kind of values in one layout, and each layout with one kind of values.
@pytest.mark.slow_where(
    lambda backend, device, values, layout, **_: (
        interpreted(backend, device) and values != "random" and layout != "row-major"
    )
)
@pytest.mark.parametrize(("backend", "device"), runs_here("winner_take_all"))
def test_winner_take_all(backend, device, values, layout, d, k, count, dtype):
    generator = torch.Generator().manual_seed(d + k)
    Z = torch.randn(d, k, generator=generator, dtype=dtype)
    if values == "ties":
        Z = (2 * Z).round()
    elif values == "zeros":
        Z = Z * (torch.rand(d, k, generator=generator) < 0.1)
    elif values == "signs":
        Z = Z.sign()
    elif values == "extremes":
        info = torch.finfo(dtype)
        Z = torch.tensor([info.max, -info.max, info.tiny, -info.tiny, 0.0, -0.0, 1.0], dtype=dtype)[
            torch.randint(7, (d, k), generator=generator)
        ]
    wanted = reference.winner_take_all(Z, count)
    Z = Z.to(device)
    if layout == "column-major":
        Z = Z.T.contiguous().T
    elif layout == "strided":
        Z = torch.stack([Z, torch.full_like(Z, 9.0)], dim=2).repeat(1, 2, 1)[:, :k, 0]
    got = ops.winner_take_all(Z, count, backend=backend)
    # A discrete choice: equal to the bit, order included.
    assert torch.equal(got.indices.cpu(), wanted.indices)
    assert torch.equal(got.values.cpu(), wanted.values)


@pytest.mark.parametrize("backend", ["cpp", "torch"] + ([] if GPU else ["triton"]))
def test_winner_take_all_of_nan_stays_in_bounds(backend):
    # All bits set: the largest key there is.
    Z = torch.full((1000, 2), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert ops.winner_take_all(Z, 3, backend=backend).indices.tolist() == [[0, 1, 2]] * 2


def test_winner_take_all_reference_by_hand():
    Z = torch.tensor([[1.0, 0.0], [-3.0, 2.0], [3.0, -2.0], [2.0, 2.0]])
    kept = reference.winner_take_all(Z, 2)
    assert kept.indices.tolist() == [[1, 2], [1, 2]]
    assert kept.values.tolist() == [[-3.0, 3.0], [2.0, -2.0]]
    assert torch.equal(kept.to_dense(), torch.tensor([[0.0, 0.0], [-3.0, 2.0], [3.0, -2.0], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("d", "n", "k", "count"),
    [(1, 1, 1, 1), (7, 3, 5, 2), (130, 257, 9, 4), (65, 64, 70, 65), (300, 31, 3, 3)],
)
@pytest.mark.parametrize("layout", ["neuron-major", "token-major", "strided"])
@pytest.mark.parametrize(("backend", "device"), runs_here("sparse_product"))
def test_sparse_product(backend, device, layout, d, n, k, count, a_dtype, dtype):
    generator = torch.Generator().manual_seed(d + n)
    A = torch.randn(d, n, generator=generator).to(a_dtype).to(device)
    Z = reference.winner_take_all(torch.randn(d, k, generator=generator, dtype=dtype), count)
    Z = SparseColumns(Z.indices.to(device), Z.values.to(device), d)
    if layout == "token-major":
        A = A.T.contiguous().T
    elif layout == "strided":
        A = A.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    got = ops.sparse_product(Z, A, backend=backend)
    assert got.dtype == dtype
    wanted = Z.to_dense().double().T @ A.double()
    assert_near(got, wanted, TOLERANCE[dtype])


def systems(batch, k, m, dtype, device):
    generator = torch.Generator().manual_seed(batch + k + m)
    factor = torch.randn(batch, k, k + 4, generator=generator, dtype=torch.float64)
    G = factor @ factor.mT / (k + 4)
    B = torch.randn(batch, k, m, generator=generator, dtype=torch.float64)
    return G.to(device, dtype), B.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "k", "m"),
    [(1, 1, 1), (1, 5, 70), (3, 33, 2), (20, 8, 1), (37, 17, 5), (5, 64, 65), (2, 120, 130)],
)
@pytest.mark.parametrize(("backend", "device"), runs_here("ridge_solve"))
def test_ridge_solve(backend, device, batch, k, m, dtype):
    G, B = systems(batch, k, m, dtype, device)
    upper_garbage = G + torch.full_like(G, 7.0).triu(1)  # only the lower triangle is read
    X, info = ops.ridge_solve(upper_garbage, B, ridge=0.1, backend=backend)
    wanted = torch.linalg.solve(
        G.double() + 0.1 * torch.eye(k, device=device, dtype=torch.float64), B.double()
    )
    assert_near(X, wanted, SOLVE_TOLERANCE[dtype])
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * batch


def clean_memory(monkeypatch):
    """Outputs start as zeros, not as NaN: for NaN that a kernel is to write itself."""
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "k"), [(1, 6), (3, 40), (40, 6)])
@pytest.mark.parametrize(("backend", "device"), runs_here("ridge_solve"))
def test_ridge_solve_names_the_bad_pivot(monkeypatch, backend, device, batch, k, dtype):
    clean_memory(monkeypatch)
    G, B = systems(batch, k, 3, dtype, device)
    G[batch // 2] = torch.eye(k)
    G[batch // 2, 4, 4] = -1
    X, info = ops.ridge_solve(G, B, ridge=0.1, backend=backend)
    wanted = [0] * batch
    wanted[batch // 2] = 5
    assert info.tolist() == wanted
    assert bool(X[batch // 2].isnan().all())
    good = [b for b in range(batch) if b != batch // 2]
    assert bool(X[good].isfinite().all())


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_levels(level, dtype):
    Y, ZtA, ZtZ = coefficient_problem(67, 201, dtype, "cpu")
    for name in ("multiplicative_update", "coordinate_descent"):
        wanted = getattr(reference, name)(Y.double(), ZtA.double(), ZtZ.double(), sweeps=2)
        assert_near(
            getattr(ops, name)(Y, ZtA, ZtZ, sweeps=2, backend="cpp"), wanted, DESCENT_TOLERANCE[dtype]
        )
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(211, 6, generator=generator, dtype=dtype)
    kept = ops.winner_take_all(Z, 9, backend="cpp")
    assert torch.equal(kept.indices, reference.winner_take_all(Z, 9).indices)
    for a_dtype in (torch.float16, torch.bfloat16, torch.float32):
        A = torch.randn(211, 133, generator=generator).to(a_dtype)
        for layout in (A, A.T.contiguous().T):
            assert_near(
                ops.sparse_product(kept, layout, backend="cpp"),
                kept.to_dense().double().T @ A.double(),
                TOLERANCE[dtype],
            )
    for batch, k, m in ((40, 9, 3), (2, 70, 65)):
        G, B = systems(batch, k, m, dtype, "cpu")
        wanted = torch.linalg.solve(G.double() + 0.1 * torch.eye(k, dtype=torch.float64), B.double())
        assert_near(ops.ridge_solve(G, B, ridge=0.1, backend="cpp")[0], wanted, SOLVE_TOLERANCE[dtype])


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("layout", ["neuron-major", "token-major", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_is_read_exactly(level, layout, dtype):
    """Features of one neuron each give back what A holds; sizes leave remainders of vectors, which take other code."""
    d, n = 71, 924
    A = torch.arange(d * n).to(torch.int16).view(torch.float16).reshape(d, n)
    assert len(A.view(torch.int16).unique()) == 1 << 16
    Z = SparseColumns(torch.arange(d)[:, None], torch.ones(d, 1, dtype=dtype), d)
    got = ops.sparse_product(Z, in_layout(A, layout), backend="cpp")
    torch.testing.assert_close(got, A.to(dtype), rtol=0, atol=0, equal_nan=True)


def double(Z):
    return SparseColumns(Z.indices, Z.values.double(), Z.d)


def moved(Z, device):
    return SparseColumns(Z.indices.to(device), Z.values.to(device), Z.d)


def in_layout(A, layout):
    if layout == "token-major":
        return A.T.contiguous().T
    if layout == "strided":
        return A.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    return A


def pass_problem(d, n, k, count, dtype, device="cpu", a_dtype=None, seed=0):
    """(Y, Z, A, ZtZ) with a feature that is zero and one that is nearly used up, consistent to rounding."""
    generator = torch.Generator().manual_seed(seed + d + n)
    Z = reference.winner_take_all(torch.randn(d, k, generator=generator, dtype=torch.float64), count)
    if k > 2:
        Z.values[1] = 0
    A = torch.randn(d, n, generator=generator, dtype=torch.float64).to(a_dtype or dtype)
    Y = torch.rand(k, n, generator=generator, dtype=torch.float64)
    dense = Z.to_dense()
    Z = SparseColumns(Z.indices, Z.values.to(dtype), d)
    return Y.to(device, dtype), moved(Z, device), A.to(device), (dense.T @ dense).to(device, dtype)


def pass_options(names, k, n, dtype, device="cpu"):
    """Arguments of a pass that these names stand for."""
    generator = torch.Generator().manual_seed(k + n)
    shift, weights, scale = (
        torch.rand(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in (k, n, k)
    )
    weights[0] = 0  # a token left out
    values = {
        "no_sweeps": {"sweeps": 0},
        "multiplicative": {"multiplicative": True},
        "shift": {"shift": shift},
        "max_active": {"max_active": max(1, k // 3)},
        "weights": {"token_weights": weights},
        "row_scale": {"row_scale": 0.5 + scale},
        "all": {"products": "all"},
    }
    options = {"sweeps": 2, "products": "kept"}
    for name in names:
        options |= values[name]
    return options | {"measure": not options.get("multiplicative", False)}


# (d, n, k, count): ones, primes, multiples of a tile and one off, k above and below n, and a k whose tiles are narrow
# at every instruction level.
PASS_SHAPES = [
    (1, 1, 1, 1), (7, 3, 5, 2), (130, 257, 9, 4), (65, 64, 70, 65), (300, 31, 3, 3), (90, 33, 520, 2),
]  # fmt: skip
PASS_OPTIONS = [
    (), ("no_sweeps",), ("shift",), ("max_active",), ("weights",), ("no_sweeps", "max_active"),
    ("shift", "max_active", "weights"), ("multiplicative",), ("multiplicative", "shift", "max_active", "weights"),
    ("shift", "weights", "all"), ("multiplicative", "shift", "weights", "all"),
]  # fmt: skip


def skip_if_refused(backend, device, dtype, k, max_active=0):
    reason = _backends.refusal(backend, torch.device(device), dtype, "coefficient_pass", k, max_active)
    if reason is not None:
        pytest.skip(reason)


def assert_same_pass(function, Y, Z, A, ZtZ, dtype, **options):
    """``function`` gives what the reference gives in float64 on the same numbers."""
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    exact.pop("backend", None)
    wanted_Y = torch.empty(Y.shape, dtype=torch.float64, device=Y.device)
    if exact.pop("residual", False):
        exact["residual_values"] = Z.values.double()
    wanted = reference.coefficient_pass(
        Y.double(), double(Z), A.double(), ZtZ.double(), out=wanted_Y,
        feature_norms=torch.diagonal(ZtZ.double()).sqrt(), **exact,
    )  # fmt: skip
    before = Y.clone()
    got_Y, got = function(Y, Z, A, ZtZ, **options)
    assert_near(got_Y, wanted_Y, PASS_TOLERANCE[dtype])
    assert bool((got_Y >= 0).all())
    assert torch.equal(Y, before), "the argument was changed"
    assert_same_sums(got, wanted, PASS_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_that_vanish_become_zero(dtype):
    # Subnormal numbers would make every product with Y several times as slow.
    tiny = torch.finfo(dtype).tiny
    # y shrinks to a half: sqrt(1 / 4) with ZtZ- y = 1 from the other feature and ZtA- = 4.
    Y = torch.tensor([[4 * tiny, 1.5 * tiny, 0.5], [1.0, 1.0, 1.0]], dtype=dtype)
    ZtA = torch.tensor([[-4.0] * 3, [1.0] * 3], dtype=dtype)
    ZtZ = torch.tensor([[0.0, -1.0], [-1.0, 1.0]], dtype=dtype)
    new = ops.multiplicative_update(Y, ZtA, ZtZ, eps=0.0, backend="cpp")
    assert new[0].tolist() == [2 * tiny, 0.0, 0.25]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n", "k", "count"), PASS_SHAPES)
@pytest.mark.parametrize("names", PASS_OPTIONS, ids="+".join)
# The widest takes half a minute, and float64 differs from float32 in the tiles alone.
@pytest.mark.slow_where(
    lambda backend, device, names, k, dtype, **_: (
        interpreted(backend, device)
        and ((k > 500 and names != ("no_sweeps",)) or (dtype == torch.float64 and len(names) in (1, 2)))
    )
)
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_coefficient_pass(backend, device, names, d, n, k, count, dtype):
    options = pass_options(names, k, n, dtype, device)
    skip_if_refused(backend, device, dtype, k, options.get("max_active", 0))
    Y, Z, A, ZtZ = pass_problem(d, n, k, count, dtype, device)
    # Interpreted kernels see the third in test_coefficient_pass_reads_any_dtype; with many features one takes half a
    # minute.
    layouts = 3 if not interpreted(backend, device) else 2 if k < 500 else 1
    for layout in ("token-major", "neuron-major", "strided")[:layouts]:
        assert_same_pass(
            ops.coefficient_pass,
            Y,
            Z,
            in_layout(A, layout),
            ZtZ,
            dtype,
            residual=True,
            backend=backend,
            **options,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_coefficient_pass_reads_any_dtype(backend, device, a_dtype, dtype):
    Y, Z, A, ZtZ = pass_problem(67, 70, 9, 4, dtype, device, a_dtype)
    for layout in ("neuron-major", "token-major", "strided"):
        for residual in (False, True):
            assert_same_pass(
                ops.coefficient_pass, Y, Z, in_layout(A, layout), ZtZ, dtype,
                residual=residual, products="kept", backend=backend,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_a_pass_in_place_with_scales(backend, device, dtype):
    """What only ``fit`` asks for: Y scaled first and written over, a residual in other units than the sweeps."""
    kernel = _backends.choose("coefficient_pass", torch.device(device), dtype, backend).function
    Y, Z, A, ZtZ = pass_problem(67, 70, 9, 4, dtype, device)
    norms = torch.diagonal(ZtZ).sqrt()

    def in_place(Y, Z, A, ZtZ, **options):
        target = Y.clone()
        return target, kernel(target, Z, A, ZtZ, out=target, feature_norms=norms, **options)

    def into_columns(Y, Z, A, ZtZ, **options):
        target = torch.empty(Y.shape[1], Y.shape[0], dtype=dtype, device=device).T
        return target, kernel(Y.T.contiguous().T, Z, A, ZtZ, out=target, feature_norms=norms, **options)

    limited = _backends.refusal(backend, torch.device(device), dtype, "coefficient_pass", 9, 3) is None
    for names in (("row_scale",), ("row_scale", "shift", "weights", *(("max_active",) if limited else ()))):
        options = pass_options(names, 9, 70, dtype, device) | {"residual_values": 2 * Z.values}
        for function in (in_place, into_columns):
            assert_same_pass(function, Y, Z, A, ZtZ, dtype, **options)


def test_blocks_of_the_reference_do_not_matter(monkeypatch):
    Y, Z, A, ZtZ = pass_problem(67, 70, 9, 4, torch.float64)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 67 * 9)  # blocks of 9 tokens, the last of 7
    options = pass_options(("shift", "max_active", "weights"), 9, 70, torch.float64)
    got_Y, got = ops.coefficient_pass(Y, Z, A, ZtZ, residual=True, backend="torch", **options)
    monkeypatch.undo()
    wanted_Y, wanted = ops.coefficient_pass(Y, Z, A, ZtZ, residual=True, backend="torch", **options)
    assert_near(got_Y, wanted_Y, PASS_TOLERANCE[torch.float64])
    assert_same_sums(got, wanted, PASS_TOLERANCE[torch.float64])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_the_sums_of_a_pass_are_what_they_say(backend, device, weighted):
    Y, Z, A, ZtZ = pass_problem(67, 70, 9, 4, torch.float64, device)
    options = pass_options(("shift", "weights") if weighted else ("shift",), 9, 70, torch.float64, device)
    w = options.get("token_weights", torch.ones(70, dtype=torch.float64, device=device))
    new, sums = ops.coefficient_pass(Y, Z, A, ZtZ, residual=True, backend=backend, **options)
    dense, shift, alive = Z.to_dense(), options["shift"], torch.diagonal(ZtZ) > 0
    assert not bool(alive.all())
    P = dense.T @ A - shift[:, None]
    assert float(sums.dot) == pytest.approx(float((w * P * new).sum()), rel=1e-13)
    assert float(sums.squared_norm) == pytest.approx(float(new.square().sum()), rel=1e-13)
    assert float(sums.data) == pytest.approx(float((w * A.square()).sum()), rel=1e-13)
    assert float(sums.residual) == pytest.approx(float((w * (A - dense @ new).square()).sum()), rel=1e-13)
    assert_near(sums.AYt, Z.gather(((w * A) @ new.T).T.contiguous()), 1e-13)
    step = ((ZtZ @ new - P) / torch.diagonal(ZtZ)[:, None])[alive]
    assert float(sums.violation) == pytest.approx(
        float(torch.minimum(new[alive], step).square().sum()), rel=1e-12
    )
    assert sums.violation > 1e-3, "not at the optimum, or the formula would not matter"
    # What was not asked for.
    _, bare = ops.coefficient_pass(Y, Z, A, ZtZ, backend=backend)
    assert bare.AYt is None
    assert (bare.violation, bare.residual, bare.data, bare.sweeps) == (0, 0, 0, 1)


@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_a_pass_reaches_the_optimum_and_says_so(backend, device):
    n, plenty = (97, 150) if interpreted(backend, device) else (257, 500)
    Y, Z, A, ZtZ = pass_problem(67, n, 9, 4, torch.float64, device)
    optimum, measured = ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=plenty, measure=True, backend=backend)
    assert measured.violation < 1e-24 * measured.squared_norm
    assert measured.sweeps == plenty
    # Tokens that are done at once, tiles of their own, before and after the others.
    done = (torch.arange(n, device=device) - 48).abs() > 16
    Y = torch.where(done, optimum, Y)
    for tol in (1e-1, 1e-3, 1e-6):

        def passed(sweeps, tol=tol):
            return ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=sweeps, tol=tol, backend=backend)

        near, stopped = passed(500)
        assert 1 < stopped.sweeps < 100
        assert 1e-12 < relative_difference(near, optimum) < 10 * tol
        # No sweep is done beyond the one that changed little, and that one is.
        enough, again = passed(stopped.sweeps)
        assert again.sweeps == stopped.sweeps
        assert torch.equal(enough, near)
        assert not torch.equal(passed(stopped.sweeps - 1)[0], near)
    assert ops.coefficient_pass(optimum, Z, A, ZtZ, sweeps=500, tol=1e-6, backend=backend)[1].sweeps == 1


@pytest.mark.parametrize("most", [1, 2, 5, 8])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass", k=9, max_active=1))
def test_max_active_keeps_the_largest_contributions(backend, device, most):
    Y, Z, A, ZtZ = pass_problem(67, 40, 9, 20, torch.float64, device)
    before, _ = ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=50, backend=backend)
    after, _ = ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=50, max_active=most, backend=backend)
    assert int((after > 0).sum(0).max()) <= most
    norms = torch.diagonal(ZtZ).sqrt().tolist()
    dropped = 0
    for token in range(40):
        values = before[:, token].tolist()
        order = sorted(range(9), key=lambda i: (-norms[i] * values[i], i))
        chosen = sorted(order[:most])
        dropped += int((before[order[most:], token] > 0).sum())
        wanted = torch.zeros(9, dtype=torch.float64, device=device)
        # Coordinate descent over the chosen features alone.
        wanted[chosen] = reference.coordinate_descent(
            before[chosen, token : token + 1],
            Z.to_dense()[:, chosen].T @ A[:, token : token + 1],
            ZtZ[chosen][:, chosen],
            50,
        )[:, 0]
        assert_near(after[:, token], wanted, 1e-12)
    assert dropped or most == 8, "nothing had to be dropped"


@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass", k=9, max_active=1))
def test_max_active_takes_the_lower_of_equal_features(backend, device):
    rows = torch.arange(6, device=device)[:, None]
    Z = SparseColumns(rows, torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0], device=device)[:, None], 6)
    Y = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 3.0], device=device)[:, None].expand(-1, 70).contiguous()
    ZtZ = torch.diag(Z.values[:, 0].square())
    kept, _ = ops.coefficient_pass(Y, Z, Z.to_dense() @ Y, ZtZ, sweeps=0, max_active=3, backend=backend)
    assert torch.equal(kept, Y * torch.tensor([1, 1, 0, 0, 0, 1], device=device)[:, None])


@pytest.mark.parametrize("power", [-50, -30, 30, 55])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass", k=9, max_active=1))
def test_max_active_at_any_scale_of_the_data(backend, device, power):
    Y, Z, A, ZtZ = pass_problem(67, 40, 9, 20, torch.float32, device)
    wanted, _ = ops.coefficient_pass(Y, Z, A, ZtZ, sweeps=20, max_active=2, backend=backend)
    scale = 2.0**power
    scaled = SparseColumns(Z.indices, scale * Z.values, Z.d)
    got, sums = ops.coefficient_pass(
        Y, scaled, scale * A, scale**2 * ZtZ, sweeps=20, max_active=2, products="kept", backend=backend
    )
    assert int((got > 0).sum(0).max()) <= 2
    assert torch.equal(got, wanted), "powers of two round nothing"
    assert sums.dot > 0


@pytest.mark.parametrize("n", [1, 63, 70])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_unused_lanes_add_nothing(backend, device, n):
    # Without eps, a lane beyond the last token would be 0 / 0.
    Y, Z, A, ZtZ = pass_problem(30, n, 2, 4, torch.float64, device)
    assert_same_pass(
        ops.coefficient_pass, Y, Z, A, ZtZ, torch.float64,
        multiplicative=True, eps=0.0, products="kept", residual=True, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("max_active", [0, 2])
@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_a_pass_keeps_nan_visible_and_in_bounds(backend, device, max_active):
    skip_if_refused(backend, device, torch.float32, 5, max_active)
    Y, Z, A, ZtZ = pass_problem(30, 70, 5, 30, torch.float32, device)
    A[2, 3] = torch.nan
    new, sums = ops.coefficient_pass(
        Y, Z, A, ZtZ, max_active=max_active, products="kept", residual=True, backend=backend
    )
    clean = [token for token in range(70) if token != 3]
    assert bool(new[:, 3].isnan().any())
    assert bool(new[:, clean].isfinite().all()), "tokens are independent of each other"
    assert not torch.tensor(sums[1:]).isfinite().all()
    assert bool(sums.AYt.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "k", "count"), [*SELECT_SHAPES[:5], (5000, 3, 50), (40, 67, 6)])
@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize(("backend", "device"), runs_here("column_descent"))
def test_column_descent(backend, device, sweeps, d, k, count, dtype):
    if interpreted(backend, device) and k * sweeps > (70 if dtype == torch.float32 else 30):
        pytest.skip("takes minutes where kernels are interpreted")
    Z, AYt, YYt, _, _ = column_problem(d, k, count, dtype, device)
    before = Z.values.clone()
    for turned in (False, True):
        products = AYt.T.contiguous().T if turned else AYt
        got = ops.column_descent(Z, products, YYt, sweeps=sweeps, backend=backend)
        wanted = reference.column_descent(double(Z), AYt.double(), YYt.double(), sweeps)
        assert torch.equal(got.indices.cpu(), wanted.indices.cpu()), "no two magnitudes are near the cut-off"
        assert_near(got.values, wanted.values, COLUMN_TOLERANCE[dtype])
        assert torch.equal(Z.values, before), "the argument was changed"


def column_problem(d, k, count, dtype=torch.float64, device="cpu", n=80, seed=0):
    """(Z, AYt, YYt, A, Y) with sparse Y, exact zeros in YYt, and a feature that is not used."""
    generator = torch.Generator().manual_seed(seed + d + k)
    A = torch.randn(d, n, generator=generator, dtype=torch.float64)
    Y = torch.rand(k, n, generator=generator, dtype=torch.float64)
    Y *= torch.rand(k, n, generator=generator) < 0.1
    if k > 2:
        Y[1] = 0
    Z = reference.winner_take_all(torch.randn(d, k, generator=generator, dtype=torch.float64), count)
    Z = SparseColumns(Z.indices, Z.values.to(dtype), d)
    moved_on = (tensor.to(device, dtype) for tensor in (Y @ A.T, Y @ Y.T, A, Y))
    return moved(Z, device), *moved_on


@pytest.mark.parametrize(("d", "k", "count"), [(6, 1, 2), (7, 4, 3), (40, 9, 5), (30, 5, 30)])
@pytest.mark.parametrize(("backend", "device"), runs_here("column_descent"))
def test_column_descent_never_raises_the_loss(backend, device, d, k, count):
    Z, AYt, YYt, A, Y = column_problem(d, k, count, device=device, n=15)
    losses = [float((A - Z.to_dense() @ Y).square().sum())]
    for _ in range(3 if interpreted(backend, device) else 20):
        Z = ops.column_descent(Z, AYt, YYt, backend=backend)
        losses.append(float((A - Z.to_dense() @ Y).square().sum()))
    assert all(after <= before * (1 + 1e-14) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    if (
        count == d and k == 5 and not interpreted(backend, device)
    ):  # without a choice of supports this is least squares
        used = torch.diagonal(YYt) > 0
        for _ in range(200):
            Z = ops.column_descent(Z, AYt, YYt, backend=backend)
        wanted = torch.linalg.lstsq(Y[used].T, A.T).solution.T
        assert_near(Z.to_dense()[:, used], wanted, 1e-9)


@pytest.mark.parametrize(("d", "k", "count"), [(6, 1, 2), (7, 3, 3), (8, 4, 1), (5, 2, 5)])
@pytest.mark.parametrize(("backend", "device"), runs_here("column_descent"))
def test_each_column_is_the_best_of_all_sparse_columns(backend, device, d, k, count):
    Z, AYt, YYt, A, Y = column_problem(d, k, count, device=device, n=30)
    for last in range(k):
        if YYt[last, last] == 0:
            continue
        # The column that is chosen last is the best one beside the others as they are then.
        order = [i for i in range(k) if i != last] + [last]
        Z_in_order = SparseColumns(Z.indices[order], Z.values[order], d)
        new = ops.column_descent(
            Z_in_order, AYt[order], YYt[order][:, order], sweeps=2, backend=backend
        ).to_dense()
        y = Y[last]
        rest = A - new[:, :-1] @ Y[order[:-1]]
        best = torch.inf
        for support in itertools.combinations(range(d), count):
            column = torch.zeros(d, dtype=torch.float64, device=device)
            for row in support:
                column[row] = (rest[row] @ y) / (y @ y)
            best = min(best, float((rest - column[:, None] * y).square().sum()))
        assert float((rest - new[:, -1:] * y).square().sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("backend", "device"), runs_here("column_descent"))
def test_unused_features_keep_their_columns_and_ties_go_to_the_lower_rows(backend, device):
    Z = SparseColumns(torch.tensor([[0, 3], [1, 4]]), torch.tensor([[1.0, -2.0], [3.0, 4.0]]), 5)
    AYt = torch.tensor([[9.0, 9.0, 9.0, 9.0, 9.0], [2.0, -4.0, 4.0, 4.0, 1.0]])
    YYt = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    got = ops.column_descent(moved(Z, device), AYt.to(device), YYt.to(device), backend=backend)
    assert got.indices.tolist() == [[0, 3], [1, 2]]
    assert got.values.tolist() == [[1.0, -2.0], [-2.0, 2.0]]


@pytest.mark.parametrize("backend", ["cpp", "torch"] + ([] if GPU else ["triton"]))
def test_column_descent_of_nan_stays_in_bounds(backend):
    Z, AYt, YYt, _, _ = column_problem(50, 4, 3, torch.float32)
    for products in (torch.full_like(AYt, torch.nan), AYt.index_fill(1, torch.tensor([7]), torch.nan)):
        got = ops.column_descent(Z, products, YYt, backend=backend)
        assert bool(((got.indices >= 0) & (got.indices < 50)).all())
        assert bool(got.values.isnan().any())


def support_problem(d, k, share, dtype=torch.float64, device="cpu", n=200):
    """(G, supports, B, Y, A): least squares of A on Y with ragged supports, some of them empty."""
    generator = torch.Generator().manual_seed(d + k)
    Y = torch.rand(k, n, generator=generator, dtype=torch.float64)
    A = torch.randn(d, n, generator=generator, dtype=torch.float64)
    belongs = torch.rand(d, k, generator=generator) < share
    if d > 1:
        belongs[0], belongs[1] = False, True  # none, and all of them
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), belongs.sum(1).cumsum(0)])
    supports = Supports(offsets.to(device), belongs.nonzero()[:, 1].contiguous().to(device), d)
    B = (A @ Y.T)[belongs]
    # Entries near one, whatever the number of tokens.
    return (*((x / n).to(device, dtype) for x in (Y @ Y.T,)), supports, (B / n).to(device, dtype), Y, A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "k", "share"), [(1, 1, 1.0), (5, 3, 0.5), (100, 9, 0.1), (37, 40, 0.5), (3, 130, 0.9)]
)
@pytest.mark.parametrize(("backend", "device"), runs_here("support_solve"))
def test_support_solve(backend, device, d, k, share, dtype):
    G, supports, B, _, _ = support_problem(d, k, share, dtype, device)
    X, info = ops.support_solve(G, supports, B, ridge=0.1, backend=backend)
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * d
    wanted = torch.empty(B.shape, dtype=torch.float64, device=device)
    for start, stop in itertools.pairwise(supports.offsets.tolist()):
        members = supports.members[start:stop]
        system = G.double()[members][:, members] + 0.1 * torch.eye(
            stop - start, dtype=torch.float64, device=device
        )
        wanted[start:stop] = torch.linalg.solve(system, B[start:stop].double())
    assert_near(X, wanted, SOLVE_TOLERANCE[dtype])
    turned, _ = ops.support_solve(
        G.T.contiguous().T, supports, torch.stack([B, B], 1)[:, 0], ridge=0.1, backend=backend
    )
    assert torch.equal(turned, X)


@pytest.mark.parametrize(("backend", "device"), runs_here("support_solve"))
def test_support_solve_is_least_squares_on_supports(backend, device):
    G, supports, B, Y, A = support_problem(20, 9, 0.4, device=device)
    X, _ = ops.support_solve(G, supports, B, ridge=0, backend=backend)
    for neuron, (start, stop) in enumerate(itertools.pairwise(supports.offsets.tolist())):
        members = supports.members[start:stop].cpu()
        wanted = torch.linalg.lstsq(Y[members].T, A[neuron][:, None]).solution[:, 0]
        assert_near(X[start:stop], wanted, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), runs_here("support_solve"))
def test_support_solve_names_the_bad_pivot(monkeypatch, backend, device, dtype):
    clean_memory(monkeypatch)
    offsets = torch.tensor([0, 1, 4, 4, 6], device=device)
    supports = Supports(offsets, torch.tensor([2, 0, 1, 3, 0, 2], device=device), 4)
    G = torch.eye(4, dtype=dtype, device=device)
    G[0, 3] = G[3, 0] = 1  # features 0 and 3 are the same
    X, info = ops.support_solve(
        G, supports, torch.ones(6, dtype=dtype, device=device), ridge=0, backend=backend
    )
    assert info.tolist() == [0, 3, 0, 0]
    assert X[1:4].isnan().tolist() == [True] * 3
    assert X[[0, 4, 5]].tolist() == [1.0] * 3
    X, info = ops.support_solve(
        G, supports, torch.ones(6, dtype=dtype, device=device), ridge=1, backend=backend
    )
    assert info.tolist() == [0] * 4
    assert bool(X.isfinite().all())
    G[2, 2] = torch.nan
    X, info = ops.support_solve(
        G, supports, torch.ones(6, dtype=dtype, device=device), ridge=1, backend=backend
    )
    assert (info > 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_same_bits_with_the_same_threads(backend, threads):
    Y, Z, A, ZtZ = pass_problem(60, 1500, 20, 6, torch.float32)
    options = pass_options(("shift", "max_active", "weights"), 20, 1500, torch.float32) | {
        "tol": 1e-2,
        "sweeps": 9,
    }
    columns, AYt, YYt, _, _ = column_problem(60, 9, 5, torch.float32)
    G, supports, B, _, _ = support_problem(300, 20, 0.3, torch.float32)

    def results():
        new, sums = ops.coefficient_pass(Y, Z, A, ZtZ, residual=True, backend=backend, **options)
        chosen = ops.column_descent(columns, AYt, YYt, sweeps=3, backend=backend)
        solved, info = ops.support_solve(G, supports, B, backend=backend)
        return [new, sums.AYt, torch.tensor(sums[1:]), chosen.indices, chosen.values, solved, info]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = results(), results()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    if backend == "cpp" and threads == 2:
        alone = results_with_one_thread(results)
        assert torch.equal(first[0], alone[0]), "tokens are independent of each other"
        assert_near(first[1], alone[1], PASS_TOLERANCE[torch.float32])


def results_with_one_thread(results):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return results()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_fit_at_instruction_levels(level, dtype):
    for d, n, k, count in ((67, 133, 9, 4), (90, 33, 520, 2)):  # wide tiles and narrow ones
        for names in PASS_OPTIONS:
            Y, Z, A, ZtZ = pass_problem(d, n, k, count, dtype)
            options = pass_options(names, k, n, dtype)
            assert_same_pass(
                ops.coefficient_pass, Y, Z, A, ZtZ, dtype, residual=True, backend="cpp", **options
            )
            assert_same_pass(
                ops.coefficient_pass, Y, Z, A.T.contiguous().T, ZtZ, dtype, backend="cpp", **options
            )
    for a_dtype in (torch.float16, torch.bfloat16):
        Y, Z, A, ZtZ = pass_problem(67, 70, 9, 4, dtype, a_dtype=a_dtype)
        assert_same_pass(ops.coefficient_pass, Y, Z, A, ZtZ, dtype, residual=True, backend="cpp")
    Z, AYt, YYt, _, _ = column_problem(300, 11, 7, dtype)
    got = ops.column_descent(Z, AYt, YYt, sweeps=2, backend="cpp")
    wanted = reference.column_descent(double(Z), AYt.double(), YYt.double(), 2)
    assert torch.equal(got.indices, wanted.indices)
    assert_near(got.values, wanted.values, COLUMN_TOLERANCE[dtype])
    G, supports, B, _, _ = support_problem(60, 33, 0.4, dtype)
    X, _ = ops.support_solve(G, supports, B, ridge=0.1, backend="cpp")
    assert_near(X, reference.support_solve(G.double(), supports, B.double(), 0.1)[0], SOLVE_TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "device"), runs_here("coefficient_pass"))
def test_a_pass_over_nothing(backend, device):
    _, Z, A, ZtZ = pass_problem(7, 3, 5, 2, torch.float32, device)
    new, sums = ops.coefficient_pass(
        torch.zeros(5, 0, device=device), Z, A[:, :0], ZtZ, products="kept", residual=True, backend=backend
    )
    assert new.shape == (5, 0)
    assert torch.equal(sums.AYt, torch.zeros(5, 2, device=device))
    assert sums[1:6] == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(("backend", "device"), runs_here("multiplicative_update"))
def test_empty(backend, device):
    empty = torch.zeros(3, 0, device=device)
    assert ops.multiplicative_update(empty, empty, torch.eye(3, device=device), backend=backend).shape == (
        3,
        0,
    )


def column_arguments():
    Z, AYt, YYt, _, _ = column_problem(30, 4, 3, torch.float32)
    return Z.indices, Z.values, 30, AYt, YYt


def test_opcheck():
    Y, ZtA, ZtZ = coefficient_problem(5, 12, torch.float32, "cpu")
    namespace = torch.ops.snmf_kernels
    cases = [
        (namespace.multiplicative_update, (Y, ZtA, ZtZ, 1e-6, 2, "cpp")),
        (namespace.coordinate_descent, (Y, ZtA, ZtZ, 2, "torch")),
        (namespace.winner_take_all, (Y, 2, "cpp")),
        (namespace.sparse_product, (torch.tensor([[0, 2]]), torch.ones(1, 2), Y, "cpp")),
        (namespace.ridge_solve, (ZtZ[None], ZtA[None], 0.1, 2, 1e-3, "cpp")),
        (namespace.column_descent, (*column_arguments(), 2, "cpp")),
        (
            namespace.support_solve,
            (ZtZ, torch.tensor([0, 2, 3]), torch.tensor([0, 4, 1]), torch.ones(3), 0.1, 2, 1e-3, "cpp"),
        ),
    ]
    Y, Z, A, ZtZ = pass_problem(7, 12, 5, 2, torch.float32)
    optional = torch.ones(5), torch.ones(12)
    for shift, weights, products in ((None, None, None), (*optional, "kept"), (*optional, "all")):
        wanted = products is not None
        arguments = (2, False, 0.0, 1e-3, shift, 3, weights, products, wanted, wanted, "cpp")
        cases.append((namespace.coefficient_pass, (Y, Z.indices, Z.values, A, ZtZ, *arguments)))
    for operation, arguments in cases:
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


REFUSALS = {
    "Y dtype": (
        lambda y, p, q: ops.multiplicative_update(y.half(), p, q),
        "Y: wanted a float32 or float64 matrix",
    ),
    "ZtA shape": (lambda y, p, q: ops.multiplicative_update(y, p[:2], q), r"ZtA: wanted shape \(5, 12\)"),
    "ZtZ shape": (lambda y, p, q: ops.coordinate_descent(y, p, q[:2]), r"ZtZ: wanted shape \(5, 5\)"),
    "sweeps": (
        lambda y, p, q: ops.multiplicative_update(y, p, q, sweeps=0),
        "sweeps: wanted at least 1, got 0",
    ),
    "eps": (lambda y, p, q: ops.multiplicative_update(y, p, q, eps=-1.0), "eps: wanted"),
    "count low": (lambda y, p, q: ops.winner_take_all(y, 0), "count: wanted 1 to d = 5, got 0"),
    "count high": (lambda y, p, q: ops.winner_take_all(y, 6), "count: wanted 1 to d = 5, got 6"),
    "rows": (lambda y, p, q: ops.sparse_product(ops.winner_take_all(y, 2), q[:3]), r"A: wanted 5 rows"),
    "indices": (
        lambda y, p, q: ops.sparse_product(SparseColumns(torch.tensor([[5]]), torch.ones(1, 1), 5), y),
        "Z.indices: wanted rows from 0 to 4, got 5 to 5",
    ),
    "indices type": (
        lambda y, p, q: SparseColumns(torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2), 5),
        "indices: wanted an int64 matrix",
    ),
    "values shape": (
        lambda y, p, q: SparseColumns(torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 1), 5),
        r"values: wanted shape \(2, 5\)",
    ),
    "G shape": (lambda y, p, q: ops.ridge_solve(q[None], p[None, :2]), r"G: wanted shape \(1, 2, 2\)"),
    "G rank": (
        lambda y, p, q: ops.ridge_solve(q, p[None]),
        "G: wanted a float32 or float64 tensor of three dimensions",
    ),
    "ridge": (lambda y, p, q: ops.ridge_solve(q[None], p[None], ridge=float("nan")), "ridge: wanted"),
    "backend": (
        lambda y, p, q: ops.winner_take_all(y, 2, backend="fast"),
        "backend: wanted one of auto, cpp, triton",
    ),
}


def call_pass(**replaced):
    arguments = dict(zip(("Y", "Z", "A", "ZtZ"), pass_problem(7, 12, 5, 2, torch.float32), strict=True))
    return ops.coefficient_pass(**arguments | replaced)


def call_columns(**replaced):
    arguments = dict(zip(("Z", "AYt", "YYt"), column_problem(7, 5, 2, torch.float32), strict=False))
    return ops.column_descent(**arguments | replaced)


def call_solve(G=None, offsets=(0, 2, 3), members=(0, 4, 1), B=None, **options):
    supports = Supports(torch.tensor(offsets), torch.tensor(members), len(offsets) - 1)
    return ops.support_solve(
        torch.eye(5) if G is None else G, supports, torch.ones(3) if B is None else B, **options
    )


BEYOND = SparseColumns(torch.full((5, 2), 7), torch.ones(5, 2), 7)
STEP_REFUSALS = {
    "pass": {
        "Y shape": (lambda: call_pass(Y=torch.ones(5, 11)), r"Y: wanted shape \(5, 12\).*to go with Z and A"),
        "Y dtype": (lambda: call_pass(Y=torch.ones(5, 12).double()), "Y: wanted shape .* in torch.float32"),
        "Z rows": (lambda: call_pass(Z=BEYOND), "Z.indices: wanted rows from 0 to 6, got 7 to 7"),
        "A rows": (lambda: call_pass(A=torch.ones(8, 12)), r"A: wanted 7 rows"),
        "A type": (lambda: call_pass(A=torch.ones(7, 12).long()), "A: wanted a float16 or bfloat16 or"),
        "ZtZ": (lambda: call_pass(ZtZ=torch.eye(4)), r"ZtZ: wanted shape \(5, 5\)"),
        "shift shape": (lambda: call_pass(shift=torch.ones(4)), r"shift: wanted shape \(5,\)"),
        "shift sign": (
            lambda: call_pass(shift=torch.tensor([1.0, 2, -3, 4, 5])),
            "shift: wanted .* >= 0, got -3.0",
        ),
        "weights": (lambda: call_pass(token_weights=torch.ones(5)), r"token_weights: wanted shape \(12,\)"),
        "sweeps": (lambda: call_pass(sweeps=-1), "sweeps: wanted a number >= 0, got -1"),
        "tol": (lambda: call_pass(tol=float("nan")), "tol: wanted a number >= 0, got nan"),
        "eps": (lambda: call_pass(eps=-1.0), "eps: wanted"),
        "max_active": (lambda: call_pass(max_active=-2), "max_active: wanted a number >= 0, got -2"),
        "measure": (lambda: call_pass(measure=True, multiplicative=True), "measure: wanted False"),
    },
    "columns": {
        "Z rows": (lambda: call_columns(Z=BEYOND), "Z.indices: wanted rows from 0 to 6, got 7 to 7"),
        "Z count": (
            lambda: call_columns(Z=SparseColumns(torch.zeros(5, 0, dtype=torch.int64), torch.ones(5, 0), 7)),
            "Z: wanted 1 to d = 7 kept entries in each column, got 0",
        ),
        "AYt": (lambda: call_columns(AYt=torch.ones(7, 5)), r"AYt: wanted shape \(5, 7\)"),
        "YYt": (lambda: call_columns(YYt=torch.eye(5).double()), "YYt: wanted shape .* in torch.float32"),
        "sweeps": (lambda: call_columns(sweeps=0), "sweeps: wanted at least 1, got 0"),
    },
    "solve": {
        "G": (lambda: call_solve(G=torch.ones(5, 4)), r"G: wanted a square matrix, got shape \(5, 4\)"),
        "B": (lambda: call_solve(B=torch.ones(3).double()), "B: wanted shape .* in torch.float32"),
        "B length": (lambda: call_solve(B=torch.ones(2)), r"supports.members: wanted shape \(2,\)"),
        "offsets end": (lambda: call_solve(offsets=(0, 2, 4)), "supports.offsets: wanted ascending numbers"),
        "offsets order": (
            lambda: call_solve(offsets=(0, 4, 3)),
            "supports.offsets: wanted ascending numbers",
        ),
        "offsets type": (
            lambda: call_solve(offsets=(0.0, 2.0, 3.0)),
            "supports.offsets: wanted .* torch.int64",
        ),
        "members": (
            lambda: call_solve(members=(0, 5, 1)),
            "supports.members: wanted features from 0 to 4, got 0 to 5",
        ),
        "ridge": (lambda: call_solve(ridge=-1.0), "ridge: wanted a number >= 0, got -1"),
    },
}


@pytest.mark.parametrize(
    ("operation", "case"), [(operation, case) for operation, cases in STEP_REFUSALS.items() for case in cases]
)
def test_arguments_of_the_steps_are_checked(operation, case):
    call, message = STEP_REFUSALS[operation][case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", REFUSALS)
def test_arguments_are_checked(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call(*coefficient_problem(5, 12, torch.float32, "cpu"))


def test_arrays_are_refused_by_type():
    with pytest.raises(TypeError, match="Z: wanted a torch tensor, got ndarray"):
        ops.winner_take_all(torch.ones(3, 4).numpy(), 1)


def test_a_named_backend_raises_with_a_reason():
    Y, ZtA, ZtZ = coefficient_problem(5, 12, torch.float32, "cpu")
    with pytest.raises(
        snmf_kernels.BackendError,
        match="'cuda' cannot run multiplicative_update: it has no multiplicative_update",
    ):
        ops.multiplicative_update(Y, ZtA, ZtZ, backend="cuda")
    with pytest.raises(snmf_kernels.BackendError, match="it runs on CUDA devices, the tensors are on cpu"):
        ops.ridge_solve(ZtZ[None], ZtA[None], backend="cuda")


def test_the_comparison_can_fail():
    wanted = torch.ones(3, 3)
    wrong = wanted.clone()
    wrong[1, 1] += 1e-3
    with pytest.raises(AssertionError, match="relative difference"):
        assert_near(wrong, wanted, 1e-5)
    assert relative_difference(torch.full((3, 3), float("nan")), wanted) == float("inf")


def test_poisoned_memory_shows():
    assert bool(torch.empty(3).isnan().all())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_kernels_follow_the_current_stream():
    from snmf_kernels import _cuda

    Y, ZtA, ZtZ = coefficient_problem(40, 5000, torch.float32, "cuda")
    G, B = systems(8, 40, 30, torch.float32, "cuda")
    H, supports, b, _, _ = support_problem(300, 40, 0.5, torch.float32, "cuda")
    wanted = (
        ops.multiplicative_update(Y, ZtA, ZtZ),
        ops.ridge_solve(G, B, ridge=0.1)[0],
        _cuda.support_solve(H, supports, b, 0.1)[0],
    )
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            50_000_000
        )  # inputs on this stream come late: a kernel on another stream would read garbage
        late = [tensor.clone() for tensor in (Y, ZtA, ZtZ, G, B, H, b)]
        got = (
            ops.multiplicative_update(*late[:3]),
            ops.ridge_solve(*late[3:5], ridge=0.1)[0],
            _cuda.support_solve(late[5], supports, late[6], 0.1)[0],  # ops would wait, to check the supports
        )
    stream.synchronize()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_solve_up_to_the_largest_that_fits_and_beyond(dtype):
    from snmf_kernels import _cuda

    largest = _cuda.ridge_max_k(0, dtype)
    for k in (31, 32, 33, 64, 128, 129, largest, largest + 1):  # the last one by torch.linalg
        G, B = systems(2, k, 70, dtype, "cuda")
        X, info = ops.ridge_solve(G, B, ridge=0.1, backend="cuda")
        wanted = torch.linalg.solve(
            G.double() + 0.1 * torch.eye(k, device="cuda", dtype=torch.float64), B.double()
        )
        assert info.tolist() == [0, 0]
        assert_near(X, wanted, SOLVE_TOLERANCE[dtype])
