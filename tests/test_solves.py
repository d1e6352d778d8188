"""Larger ridges for systems without a Cholesky factor, on each backend; and what must not wait for a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU, runs_here
from problems import SOLVE_TOLERANCE, assert_near

import snmf_kernels
from snmf_kernels import _loop, ops, reference
from snmf_kernels.sparse import SparseColumns, Supports

DTYPES = [torch.float32, torch.float64]
RIDGE = 0.02  # the ladder of the tests is then 0.02, 0.2, 2, 20
# What the most negative eigenvalue is lowered to, so that the ladder has to be climbed 0, 1, 2, 3 times, and in vain.
DEPTHS = [-1.0, 0.1, 1.0, 10.0, 40.0]


def system(k, depth, generator):
    """A symmetric matrix ``[k, k]``: positive definite for a depth below 0, else its least eigenvalue is ``−depth``."""
    factor = torch.randn(k, k + 4, generator=generator, dtype=torch.float64)
    G = factor @ factor.T / (k + 4)
    if depth < 0:
        return G
    values, vectors = torch.linalg.eigh(G)
    return G - (values[0] + depth) * vectors[:, :1] @ vectors[:, :1].T


def solved(G, B, ridge):
    return torch.linalg.solve(G + ridge * torch.eye(len(G), dtype=torch.float64), B)


@pytest.mark.parametrize("dtype", DTYPES)
# Interleaved, and each by itself; a warp, and a block to a system.
@pytest.mark.parametrize(("batch", "k", "m"), [(5, 1, 2), (5, 7, 3), (40, 7, 70), (5, 45, 2), (40, 33, 1)])
@pytest.mark.parametrize(("backend", "device"), runs_here("ridge_solve"))
def test_the_first_ridge_that_serves(backend, device, batch, k, m, dtype):
    generator = torch.Generator().manual_seed(k + m)
    depths = [DEPTHS[b % 5] for b in range(batch)]
    G = torch.stack([system(k, depth, generator) for depth in depths]).to(dtype)
    B = torch.randn(batch, k, m, generator=generator, dtype=torch.float64).to(dtype)
    upper_garbage = G + torch.full_like(G, torch.nan).triu(1)
    X, info = ops.ridge_solve(
        upper_garbage.to(device), B.to(device), ridge=RIDGE, escalations=3, backend=backend
    )
    assert info.dtype == torch.int32
    for b, found in enumerate(info.tolist()):
        if b % 5 == 4:
            last = G[b].double() + 20 * torch.eye(k, dtype=torch.float64)
            assert found == int(torch.linalg.cholesky_ex(last)[1]) > 0
            assert bool(X[b].isnan().all())
        else:
            assert found == -(b % 5)
            assert_near(
                X[b], solved(G[b].double(), B[b].double(), RIDGE * 10 ** (b % 5)), SOLVE_TOLERANCE[dtype]
            )
    # Without escalations, the same systems are solved as before, and the others are not.
    X_once, info_once = ops.ridge_solve(upper_garbage.to(device), B.to(device), ridge=RIDGE, backend=backend)
    assert [found > 0 for found in info_once.tolist()] == [b % 5 > 0 for b in range(batch)]
    assert torch.equal(X_once[::5], X[::5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [512, 32, 0])
@pytest.mark.parametrize(("backend", "device"), runs_here("support_solve"))
def test_each_support_has_a_ladder_of_its_own(monkeypatch, backend, device, large, dtype):
    if backend == "cpp":
        # Larger systems are LAPACK's.
        monkeypatch.setattr("snmf_kernels._cpp._LARGE_SUPPORT", large)
    elif large != 512:
        pytest.skip("this backend solves all alike")
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 7, 31, 32, 33, 45, 0, 70]
    blocks = [(size, depth) for size in sizes for depth in DEPTHS]
    k = sum(sizes) * 5 + 3
    G = torch.randn(k, k, generator=generator, dtype=torch.float64)
    G = G + G.T
    order = torch.randperm(k, generator=generator)
    members, first = [], 0
    for size, depth in blocks:
        # Each neuron has features of its own, in any order, and what lies beside its system must not matter.
        chosen = order[first : first + size]
        if size:
            G[chosen[:, None], chosen] = system(size, depth, generator)
        members.append(chosen)
        first += size
    offsets = torch.tensor([0, *itertools.accumulate(size for size, _ in blocks)])
    supports = Supports(offsets.to(device), torch.cat(members).to(device), len(blocks))
    G, B = G.to(dtype), torch.randn(first, generator=generator, dtype=torch.float64).to(dtype)
    X, info = ops.support_solve(
        G.to(device), supports, B.to(device), ridge=RIDGE, escalations=3, backend=backend
    )
    for r, found in enumerate(info.tolist()):
        part, at = G[members[r][:, None], members[r]].double(), slice(*offsets[r : r + 2].tolist())
        if not len(part):
            assert found == 0
        elif r % 5 == 4:
            assert found == int(torch.linalg.cholesky_ex(part + 20 * torch.eye(len(part)))[1]) > 0
            assert bool(X[at].isnan().all())
        else:
            assert found == -(r % 5)
            assert_near(X[at], solved(part, B[at].double(), RIDGE * 10 ** (r % 5)), SOLVE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 20])  # each by itself, and interleaved
@pytest.mark.parametrize(("backend", "device"), runs_here("ridge_solve"))
def test_the_floor_of_the_ladder(backend, device, batch, dtype):
    def ladder(diagonal, ridge, floor, escalations=1):
        G = torch.diag(torch.tensor(diagonal, dtype=dtype)).expand(batch, -1, -1).to(device)
        B = torch.ones(batch, len(diagonal), 1, dtype=dtype, device=device)
        X, info = ops.ridge_solve(G, B, ridge=ridge, escalations=escalations, floor=floor, backend=backend)
        assert len(set(info.tolist())) == 1
        return 1 / X[-1, :, 0].cpu() - torch.tensor(diagonal, dtype=dtype), int(info[0])

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # (diagonal, ridge, floor, the second ridge): a share of the largest entry, the precision, or ten times the first.
    for diagonal, ridge, floor, wanted in (
        ([4.0, 0.0], 0.0, 1e-3, 4e-3),
        ([0.0, 0.0, 4.0], 0.0, 0.0, 4 * eps),
        ([1.0, -1e-3], 5e-4, 1e-3, 5e-3),
        ([-1.0], 0.5, 1e-3, 5.0),
    ):
        raised, info = ladder(diagonal, ridge, floor)
        assert info == -1
        least = min(range(len(diagonal)), key=lambda i: diagonal[i])
        assert float(raised[least]) == pytest.approx(wanted, rel=1e-3)
    # Zeros alone: the least ridge there is, whose reciprocal is finite.
    raised, info = ladder([0.0, 0.0], 0.0, 1e-3)
    assert info == -1
    assert raised.tolist() == pytest.approx([tiny, tiny], rel=1e-3)
    # NaN is no ridge's to heal, and does not hide what the others need.
    raised, info = ladder([1.0, torch.nan, 1.0], 0.0, 1e-3, 5)
    assert info == 2
    assert bool(raised.isnan().all())


@pytest.mark.parametrize("escalations", [0, 1, 4])
@pytest.mark.parametrize("silent", [False, True])
def test_all_ridges_at_once_find_what_one_after_another_does(monkeypatch, escalations, silent):
    """As a GPU tries them, also with a library that does not say that it met NaN."""
    healthy = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    broken = torch.full((3, 3), torch.nan)
    G = torch.stack([healthy, -healthy, healthy - 1.5 * torch.eye(3), broken, torch.zeros(3, 3)]).double()
    wanted_X, wanted = reference.ridge_solve(G, torch.ones(5, 3, 1).double(), 1e-3, escalations, 0.1)
    assert (wanted > 0).tolist()[3]
    if silent:
        real = torch.linalg.cholesky_ex

        def cholesky_ex(A):
            factor, info = real(A)
            nan = A.isnan().any(-1).any(-1)
            return torch.where(nan[..., None, None], A, factor), torch.where(nan, 0, info)

        monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
    monkeypatch.setattr(reference, "cholesky_by_ladder", reference._all_rungs)
    X, info = reference.ridge_solve(G, torch.ones(5, 3, 1).double(), 1e-3, escalations, 0.1)
    assert torch.equal(info, wanted)
    assert torch.equal(X.nan_to_num(7), wanted_X.nan_to_num(7))


def test_the_ridge_that_was_used():
    G = torch.diag_embed(torch.tensor([[1.0, 4.0], [2.0, 0.0], [-3.0, -1.0], [torch.nan, 8.0]]))
    steps = torch.tensor([0, 1, 2, 3])
    used = reference.escalated_ridge(G, 1e-6, 1e-2, steps)
    assert used.tolist() == pytest.approx([1e-6, 2e-2, 1e-4, 8.0], rel=1e-6)
    assert reference.escalated_ridge(torch.zeros(2, 0, 0), 1e-3, 0.0, torch.tensor([0, 1])).tolist() == (
        pytest.approx([1e-3, 1e-2])
    )


def problem(kernels, ridge, n=50):
    return SimpleNamespace(data=SimpleNamespace(kernels=kernels, n=n), ridge=ridge)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "twins", "triplets of large norm", "zeros", "infinite"])
@pytest.mark.parametrize("way", ["cpp", "torch", "inverse factor"])
def test_least_squares_in_blocks(monkeypatch, way, kind, dtype):
    from snmf_kernels import _backends

    kernels = _backends.choose_all(torch.device("cpu"), dtype, "torch" if way == "torch" else "cpp")
    generator = torch.Generator().manual_seed(1)
    Y = torch.rand(6, 50, generator=generator, dtype=dtype)
    if kind == "twins":
        Y[3] = Y[1]
    elif kind == "triplets of large norm":
        Y[3] = Y[4] = Y[1]
        Y *= 1e6
    elif kind == "zeros":
        Y.zero_()
    elif kind == "infinite":
        Y *= torch.finfo(dtype).max
    A = torch.randn(40, 50, generator=generator, dtype=dtype)
    AYt, YYt = Y @ A.T, Y @ Y.T
    # However a processor rounds: without a Cholesky factor at ridge 0, and with one at the first rung that has one.
    lost = {"twins": 64, "triplets of large norm": 1e4}.get(kind, 0)
    YYt[3, 3] *= 1 - lost * torch.finfo(dtype).eps

    def in_a_host_loop(width, ridge):
        """What the ladder of ``ridge_solve`` replaced."""
        G, X, start = YYt.double()[None], torch.empty_like(AYt), 0
        info = torch.finfo(dtype)
        floor = float(info.eps * torch.diagonal(YYt).max().clamp(min=info.tiny))
        while start < 40:
            block = slice(start, start + width)
            solved, failed = kernels.ridge_solve(G, AYt[:, block].double()[None], ridge)
            if int(failed[0]) == 0:
                X[:, block] = solved[0]
                start += width
            else:
                ridge = max(10 * ridge, floor)
        return X, ridge

    if way == "inverse factor":
        monkeypatch.setattr(_loop, "_FACTOR_BLOCK", 4)
    # The second ridge is more than float32 has lost of the twins.
    for ridge, width in itertools.product((0.0, 1e-3), (40, 7)):
        monkeypatch.setattr(_loop, "_SOLVE_ELEMENTS", 6 * (width - 1))
        monkeypatch.setattr(_loop, "_SOLVE_SHARE", 0.0)
        got = _loop.least_squares_(
            AYt.clone(), YYt, problem(kernels, ridge), deferred=way != "inverse factor"
        )
        if kind == "infinite":
            assert bool(got.isnan().all())
            continue
        wanted, used = in_a_host_loop(width, ridge)
        assert (used > ridge) == ((kind in ("twins", "zeros") and ridge == 0) or kind.startswith("triplets"))
        # Of zeros the ridge is a subnormal number, of which some processors make zero.
        if way != "inverse factor" or kind == "zeros":
            assert torch.equal(got, wanted)
            continue
        system = YYt.double() + used * torch.eye(6).double()
        off = got.double() - wanted.double()
        # In units of the residual: what rounding the inverse factor W costs is eps ‖W‖, not its square.
        values = torch.linalg.eigvalsh(system)
        # Both are positive, but for what rounding makes of them.
        least = max(float(values[0]), torch.finfo(torch.float64).eps * float(values[-1]))
        distance = max(0.0, float((off * (system @ off)).sum())) ** 0.5
        assert distance <= 20 * torch.finfo(dtype).eps * least**-0.5 * float(AYt.norm())
        if dtype == torch.float32:  # float64 itself cannot tell twins apart at its own ladder's ridges
            assert float(off.abs().max()) <= 1e-4 * max(1, float(wanted.abs().max()))


# At 100, solves in float64 are no nearer than what is asked here.
@pytest.mark.parametrize("scale", [1, 10, 30])
def test_least_squares_of_features_alike_are_alike(scale):
    """Rows of Y that coincide share their part evenly, which an inverse rounded to float32 does not see to."""
    generator = torch.Generator().manual_seed(0)
    Y = scale * torch.rand(10, 2000, generator=generator)
    Y[1] = Y[0]
    AYt, YYt = Y @ torch.randn(2000, 300, generator=generator), Y @ Y.T
    # Alike to the bit, in whatever order a processor adds up.
    AYt[1], YYt[1], YYt[:, 1] = AYt[0], YYt[0], YYt[:, 0]
    X = _loop.least_squares_(AYt.clone(), YYt, problem(None, 1e-6), deferred=False)
    Gd = YYt.double() + 1e-6 * torch.eye(10).double()
    wanted = torch.linalg.solve(Gd, AYt.double())
    assert torch.allclose(X.double(), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)
    assert torch.allclose(X[0], X[1], atol=1e-3 * float(wanted.abs().max()), rtol=0)


def test_a_start_of_equal_coefficients_ends_well():
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(300, 10, generator=generator) * (torch.rand(300, 10, generator=generator) < 0.1)
    A = Z @ (torch.rand(10, 2000, generator=generator) * (torch.rand(10, 2000, generator=generator) < 0.3))
    A += 0.1 * torch.randn(300, 2000, generator=generator)
    # Of such numbers a sum is exact in any order, so that the features do start alike.
    A = (64 * A).round() / 64
    start = (None, torch.ones(10, 2000))
    got = snmf_kernels.fit(A, 10, keep=0.1, solver="mu", init=start, max_iter=30)
    assert got.relative_error < 1


def test_nothing_asks_a_gpu():
    """Meta tensors have no values: whatever would wait for one raises."""
    meta = {"device": "meta", "dtype": torch.float32}
    kernels = SimpleNamespace(
        ridge_solve=reference.ridge_solve,
        support_solve=lambda G, supports, B, *ladder: (
            torch.empty_like(B),
            B.new_empty(supports.d, dtype=torch.int32),
        ),
    )
    AYt, YYt = torch.empty(9, 4000, **meta), torch.empty(9, 9, **meta)
    with pytest.raises(RuntimeError, match="item"):
        bool(AYt.isnan().any())
    solved = _loop.least_squares_(AYt, YYt, problem(kernels, 1e-6), deferred=True)
    assert solved.shape == (9, 4000)
    Z = SparseColumns(torch.empty(9, 30, device="meta", dtype=torch.int64), torch.empty(9, 30, **meta), 4000)
    refit = _loop.refit_on_support(Z, torch.empty(9, 30, **meta), YYt, problem(kernels, 1e-6))
    assert refit.values.shape == (9, 30)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


def definite(k, dtype, seed=0):
    """A symmetric positive definite matrix ``[k, k]`` of condition about 40 on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(k, k + 4, generator=generator, dtype=torch.float64)
    return (factor @ factor.T / (k + 4) + 0.1 * torch.eye(k, dtype=torch.float64)).to("cuda", dtype)


def supports_of(sizes, k, seed=0):
    """Random supports of these sizes on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    members = [torch.randperm(k, generator=generator)[:size] for size in sizes]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return Supports(offsets.cuda(), torch.cat(members).cuda(), len(sizes))


class TestOnAGpu:
    """What concerns the launches: classes of sizes, lists, streams, capture, and that the host never waits."""

    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_class_of_sizes(self, dtype):
        from snmf_kernels import _cuda

        largest = _cuda.ridge_max_k(0, dtype)
        k = largest + 60
        sizes = [0, 1, 31, 32, 33, 64, 65, 128, 129, largest, largest + 1, largest + 40, k, 2, largest + 2]
        supports, G = supports_of(sizes, k), definite(k, dtype)
        B = torch.randn(sum(sizes), dtype=dtype, device="cuda")
        X, info = ops.support_solve(G, supports, B, ridge=0.1, backend="cuda")
        assert info.tolist() == [0] * len(sizes)
        wanted, _ = reference.support_solve(G.double(), supports, B.double(), 0.1)
        assert_near(X, wanted, SOLVE_TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lists_longer_than_there_are_blocks(self, dtype):
        sizes = [33 + r % 32 if r % 2 else r % 5 for r in range(20_000)]
        supports, G = supports_of(sizes, 64), definite(64, dtype)
        B = torch.randn(sum(sizes), dtype=dtype, device="cuda")
        X, info = ops.support_solve(G, supports, B, ridge=0.1, backend="cuda")
        assert not bool(info.any())
        assert_near(
            X, reference.support_solve(G.double(), supports, B.double(), 0.1)[0], SOLVE_TOLERANCE[dtype]
        )
        # Whatever the order in which systems were listed.
        assert torch.equal(ops.support_solve(G, supports, B, ridge=0.1, backend="cuda")[0], X)

    def test_one_large_system_too_many(self):
        """More systems beyond shared memory than slots, one of which fails and one of which needs a larger ridge."""
        k, sizes = 1500, [700, 1500, 1200, 0, 900, 1100, 800, 1300]
        supports, G = supports_of(sizes, k), definite(k, torch.float64)
        first = supports.members[supports.offsets[:-1].clamp(max=sum(sizes) - 1)].tolist()
        G[first[0]] = G[:, first[0]] = 0
        G[first[0], first[0]] = -0.5
        B = torch.randn(sum(sizes), dtype=torch.float64, device="cuda")
        for escalations in (0, 1):
            got = ops.support_solve(
                G, supports, B, ridge=0.1, escalations=escalations, floor=0.5, backend="cuda"
            )
            wanted = reference.support_solve(G, supports, B, 0.1, escalations, 0.5)
            assert got[1].tolist() == wanted[1].tolist()
            assert torch.equal(got[0].isnan(), wanted[0].isnan())
            assert_near(got[0].nan_to_num(), wanted[0].nan_to_num(), SOLVE_TOLERANCE[torch.float64])

    def test_systems_beyond_shared_memory_climb_as_well(self):
        G = torch.stack([system(400, depth, torch.Generator().manual_seed(1)) for depth in DEPTHS])
        B = torch.randn(5, 400, 3, dtype=torch.float64)
        arguments = {"ridge": RIDGE, "escalations": 3}
        X, info = ops.ridge_solve(G.cuda(), B.cuda(), backend="cuda", **arguments)
        wanted, wanted_info = ops.ridge_solve(G, B, backend="torch", **arguments)
        assert info[:4].tolist() == wanted_info[:4].tolist() == [0, -1, -2, -3]
        assert int(info[4]) > 0
        assert bool(X[4].isnan().all())
        assert_near(X[:4], wanted[:4], 10 * SOLVE_TOLERANCE[torch.float64])

    def test_the_host_never_waits(self):
        """Neither torch, which says so, nor the module, whose launches return while the stream is busy."""
        from snmf_kernels import _cuda

        kernels = SimpleNamespace(ridge_solve=_cuda.ridge_solve, support_solve=_cuda.support_solve)
        runs = []
        for k in (20, 100, 400):  # a warp, a block, torch.linalg
            Y = torch.rand(k, 600, device="cuda")
            Y[1] = Y[0]
            Z = reference.winner_take_all(torch.randn(300, k, device="cuda"), 40)
            runs.append((Y @ Y.T, torch.randn(k, 300, device="cuda"), Z))

        def work():
            for YYt, AYt, Z in runs:
                _loop.least_squares_(AYt.clone(), YYt, problem(kernels, 0.0), deferred=True)
                _loop.refit_on_support(Z, Z.gather(AYt), YYt, problem(kernels, 1e-6))

        work()  # loads the kernels
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.cuda.current_stream().query()
        torch.cuda.synchronize()

    def test_capture_in_a_graph(self):
        from snmf_kernels import _cuda

        supports = supports_of([3, 40, 100, 0, 300], 350)
        G, B = definite(350, torch.float64), torch.randn(443, dtype=torch.float64, device="cuda")
        dense = definite(50, torch.float64)[None]
        right = torch.randn(1, 50, 4, dtype=torch.float64, device="cuda")

        def work():
            return _cuda.support_solve(G, supports, B, 0.1, 2), _cuda.ridge_solve(dense, right, 0.1, 2)

        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            work()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        for scale in (1.0, -3.0):
            B.mul_(scale)
            right.mul_(scale)
            graph.replay()
            torch.cuda.synchronize()
            for (X, info), (wanted, wanted_info) in zip(captured, work(), strict=True):
                assert torch.equal(X, wanted)
                assert torch.equal(info, wanted_info)
