"""Each operation on each backend against the float64 reference, on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from conftest import GPU, runs_here
from problems import DESCENT_TOLERANCE, SOLVE_TOLERANCE, TOLERANCE, assert_near, relative_difference

import snmf_kernels
from snmf_kernels import SparseColumns, _backends, ops, reference

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


@pytest.mark.parametrize("backend", ["cpp", "torch"])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "k"), [(1, 6), (3, 40), (40, 6)])
@pytest.mark.parametrize(("backend", "device"), runs_here("ridge_solve"))
def test_ridge_solve_names_the_bad_pivot(backend, device, batch, k, dtype):
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


@pytest.mark.parametrize(("backend", "device"), runs_here("multiplicative_update"))
def test_empty(backend, device):
    empty = torch.zeros(3, 0, device=device)
    assert ops.multiplicative_update(empty, empty, torch.eye(3, device=device), backend=backend).shape == (
        3,
        0,
    )


def test_opcheck():
    Y, ZtA, ZtZ = coefficient_problem(5, 12, torch.float32, "cpu")
    namespace = torch.ops.snmf_kernels
    cases = [
        (namespace.multiplicative_update, (Y, ZtA, ZtZ, 1e-6, 2, "cpp")),
        (namespace.coordinate_descent, (Y, ZtA, ZtZ, 2, "torch")),
        (namespace.winner_take_all, (Y, 2, "cpp")),
        (namespace.sparse_product, (torch.tensor([[0, 2]]), torch.ones(1, 2), Y, "cpp")),
        (namespace.ridge_solve, (ZtZ[None], ZtA[None], 0.1, "cpp")),
    ]
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
    Y, ZtA, ZtZ = coefficient_problem(40, 5000, torch.float32, "cuda")
    G, B = systems(8, 40, 30, torch.float32, "cuda")
    wanted = ops.multiplicative_update(Y, ZtA, ZtZ), ops.ridge_solve(G, B, ridge=0.1)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            50_000_000
        )  # inputs on this stream come late: a kernel on another stream would read garbage
        late = [tensor.clone() for tensor in (Y, ZtA, ZtZ, G, B)]
        got = ops.multiplicative_update(*late[:3]), ops.ridge_solve(*late[3:], ridge=0.1)[0]
    stream.synchronize()
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_solve_up_to_the_largest_that_fits(dtype):
    from snmf_kernels import _cuda

    largest = _cuda.ridge_max_k(0, dtype)
    for k in (31, 32, 33, 64, 128, 129, largest):
        G, B = systems(2, k, 70, dtype, "cuda")
        X, info = ops.ridge_solve(G, B, ridge=0.1, backend="cuda")
        wanted = torch.linalg.solve(
            G.double() + 0.1 * torch.eye(k, device="cuda", dtype=torch.float64), B.double()
        )
        assert info.tolist() == [0, 0]
        assert_near(X, wanted, SOLVE_TOLERANCE[dtype])
    G, B = systems(1, largest + 1, 1, dtype, "cuda")
    with pytest.raises(snmf_kernels.BackendError, match="does not fit shared memory"):
        ops.ridge_solve(G, B, backend="cuda")
    assert _backends.choose("ridge_solve", B.device, dtype, k=largest + 1).backend == "torch"
