"""What only the Triton backend has: its limits, tiles of a pass, problems side by side, and what a GPU shows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from conftest import GPU, runs_here
from problems import COLUMN_TOLERANCE, PASS_TOLERANCE, TOLERANCE, assert_near, assert_same_sums
from test_operations import coefficient_problem, column_problem, in_layout, pass_options, pass_problem
from torch import Tensor

import snmf_kernels
from snmf_kernels import SparseColumns, _backends, ops, reference
from snmf_kernels._precision import product_precision

pytest.importorskip("triton")
from snmf_kernels import _triton  # once it is known to be there
from snmf_kernels._triton import configs, products, schedule, selection, tile_pass

DEVICE = "cuda" if GPU else "cpu"


def here(test):
    """A test of kernels on whatever device runs them on this machine."""
    return pytest.mark.gpu(test) if GPU else test


def gpu_test(test):
    """A test that makes sense on a GPU alone."""
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA device")(test))


def run_pass(Y, Z, A, ZtZ, **options):
    """(new Y, sums) of the kernels themselves."""
    out = torch.empty_like(Y)
    sums = _triton.coefficient_pass(Y, Z, A, ZtZ, out=out, feature_norms=None, **options)
    return out, sums


def small_tiles(monkeypatch):
    """Tiles of 64 tokens."""
    changed = dataclasses.replace(configs.PASS, tile_bytes=1, busy_programs=0)
    monkeypatch.setattr(tile_pass, "PASS", changed)


@here
@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
@pytest.mark.parametrize("kept", ["kept", "all"])
def test_tiles_of_a_pass_do_not_matter(monkeypatch, layout, multiplicative, kept):
    Y, Z, A, ZtZ = pass_problem(130, 140, 9, 4, torch.float32, DEVICE)
    A = in_layout(A, layout)
    names = ("multiplicative", "weights", "shift") if multiplicative else ("weights", "shift")
    options = pass_options(names, 9, 140, torch.float32, DEVICE) | {
        "products": kept,
        "residual_values": Z.values,
    }
    whole_Y, whole = run_pass(Y, Z, A, ZtZ, **options)
    small_tiles(monkeypatch)
    got_Y, got = run_pass(Y, Z, A, ZtZ, **options)
    assert torch.equal(got_Y, whole_Y), "tokens are independent of each other"
    assert_same_sums(got, whole, PASS_TOLERANCE[torch.float32])


@here
@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
def test_split_neurons_add_up(monkeypatch, layout):
    Y, Z, A, ZtZ = pass_problem(300, 31, 3, 30, torch.float32, DEVICE)
    A = in_layout(A, layout)
    assert not products.gathers(Z, A)
    exact = Z.to_dense().double().T @ A.double()
    for programs in (1, 10_000):
        monkeypatch.setattr(products, "PROGRAMS", programs)
        monkeypatch.setattr(tile_pass, "PROGRAMS", programs)
        assert_near(_triton.sparse_product(Z, A), exact, TOLERANCE[torch.float32])
        wanted = reference.coefficient_pass(
            Y.double(), SparseColumns(Z.indices, Z.values.double(), Z.d), A.double(), ZtZ.double(),
            out=torch.empty_like(Y, dtype=torch.float64),
        )  # fmt: skip
        assert_near(run_pass(Y, Z, A, ZtZ)[1].dot, wanted.dot, PASS_TOLERANCE[torch.float32])


@here
def test_gathers_where_rows_lie_together_and_few_are_kept():
    A = torch.zeros(3200, 4, device=DEVICE)
    for dtype, limit in ((torch.float32, 200), (torch.bfloat16, 100)):
        for count in (limit - 1, limit):
            Z = SparseColumns(
                torch.zeros(2, count, dtype=torch.int64, device=DEVICE),
                torch.zeros(2, count, device=DEVICE),
                3200,
            )
            assert products.gathers(Z, A.to(dtype)) == (count < limit)
            assert not products.gathers(Z, A.to(dtype).T.contiguous().T)


@here
def test_three_parts_of_bfloat16_are_a_float32():
    """The split product is as near as float32 is where one or two parts would show."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(256, 64, generator=generator).bfloat16().to(DEVICE)
    dense = torch.randn(256, 16, generator=generator).to(DEVICE)
    Z = reference.winner_take_all(dense, 256)
    assert not products.gathers(Z, A)
    exact = dense.double().T @ A.double()
    assert_near(_triton.sparse_product(Z, A), exact, TOLERANCE[torch.float32])
    rounded = dense.bfloat16().double().T @ A.double()
    with pytest.raises(AssertionError, match="relative difference"):
        assert_near(rounded, exact, 1e-4)


@here
def test_limits_of_the_pass_are_reasons():
    device = torch.device(DEVICE)
    largest = configs.PASS.max_k

    def refusal(k, most=0):
        return _backends.refusal("triton", device, torch.float32, "coefficient_pass", k, most)

    assert refusal(largest) is None
    assert refusal(9, 9) is None, "as many as there are"
    assert f"1 to {largest} features, not {largest + 1}" in refusal(largest + 1)
    assert "max_active = 3" in refusal(9, 3)
    Y, Z, A, ZtZ = pass_problem(7, 12, 5, 2, torch.float32, DEVICE)
    with pytest.raises(
        snmf_kernels.BackendError, match="'triton' cannot run coefficient_pass: its pass keeps any"
    ):
        ops.coefficient_pass(Y, Z, A, ZtZ, max_active=2, backend="triton")


@here
def test_a_refused_pass_is_composed_of_the_kernels_there_are():
    kernels = _backends.choose_all(torch.device(DEVICE), torch.float32, "triton")
    Y, Z, A, ZtZ = pass_problem(30, 20, 5, 3, torch.float32, DEVICE)
    norms = torch.diagonal(ZtZ).sqrt()
    options = {"sweeps": 2, "feature_norms": norms, "products": "kept"}
    for most in (0, 2):
        wanted_Y, got_Y = torch.empty_like(Y), torch.empty_like(Y)
        wanted = reference.coefficient_pass(Y, Z, A, ZtZ, out=wanted_Y, max_active=most, **options)
        got = kernels.coefficient_pass(Y, Z, A, ZtZ, out=got_Y, max_active=most, **options)
        assert_near(got_Y, wanted_Y, PASS_TOLERANCE[torch.float32])
        assert_same_sums(got, wanted, PASS_TOLERANCE[torch.float32])
    assert int((got_Y > 0).sum(0).max()) <= 2


@here
def test_a_column_that_was_filled_up_lists_a_row_twice():
    narrow, AYt, YYt, _, _ = column_problem(40, 2, 3, torch.float64, DEVICE)
    wide = column_problem(40, 1, 6, torch.float64, DEVICE)[0]
    Z = narrow.joined(wide)
    _, AYt, YYt, _, _ = column_problem(40, 3, 6, torch.float64, DEVICE, seed=5)
    got = _triton.column_descent(Z, AYt, YYt + torch.eye(3, dtype=torch.float64, device=DEVICE), 1)
    wanted = reference.column_descent(Z, AYt, YYt + torch.eye(3, dtype=torch.float64, device=DEVICE), 1)
    assert torch.equal(got.indices, wanted.indices)
    assert_near(got.values, wanted.values, COLUMN_TOLERANCE[torch.float64])


def without_registers(monkeypatch):
    """Columns are searched 32 rows at a time, as those that registers do not hold."""
    for table in (selection.SELECT, selection.COLUMNS):
        for dtype, config in table.items():
            monkeypatch.setitem(table, dtype, dataclasses.replace(config, whole=0, block=32))


def magnitudes(kind, dtype):
    """Columns ``[77, 3]`` whose keys are not all different, or are such as numbers do not have."""
    Z = torch.randn(77, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    if kind == "equal":
        return Z.round()
    if kind == "zero":
        return Z * (Z.abs() > 1.2)
    if kind == "nan":
        Z[::3] = torch.nan
    if kind == "nan of all bits":
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        Z.view(bits)[::3] = torch.iinfo(bits).max
    return Z


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["different", "equal", "zero", "nan", "nan of all bits"])
@pytest.mark.slow_where(lambda kind, dtype: dtype == torch.float64 and kind.startswith(("zero", "nan")))
def test_a_column_that_registers_do_not_hold(monkeypatch, kind, dtype):
    Z = magnitudes(kind, dtype).to(DEVICE)
    # Up to the last tie, in it, and all.
    counts = (1, 9, 20, 27, 77)
    held = [_triton.winner_take_all(Z, count) for count in counts]
    for count, kept in zip(counts, held, strict=True):
        keys = Z.abs().view(torch.int32 if dtype == torch.float32 else torch.int64)
        order = keys.argsort(dim=0, descending=True, stable=True)[:count].sort(dim=0).values.T
        assert torch.equal(kept.indices, order)
    without_registers(monkeypatch)
    for count, kept in zip(counts, held, strict=True):
        got = _triton.winner_take_all(Z, count)
        assert torch.equal(got.indices, kept.indices)
        assert torch.equal(got.values.isnan(), kept.values.isnan())
        assert torch.equal(got.values.nan_to_num(), kept.values.nan_to_num())


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.slow_where(lambda dtype: dtype == torch.float64)
def test_column_descent_of_columns_that_registers_do_not_hold(monkeypatch, dtype):
    k = selection.GROUP + 1
    Z, AYt, YYt, _, _ = column_problem(140, k, 6, dtype, DEVICE)
    wanted = _triton.column_descent(Z, AYt, YYt, 2)
    without_registers(monkeypatch)
    got = _triton.column_descent(Z, AYt, YYt, 2)
    assert torch.equal(got.indices, wanted.indices)
    assert torch.equal(got.values, wanted.values)


@here
@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.97, 1.03, 1e30, torch.nan])
def test_where_a_search_begins_does_not_matter(monkeypatch, factor):
    """``column_descent`` begins with what was kept of the column before; here it is far off, or just beside."""
    Z, AYt, YYt, _, _ = column_problem(140, 5, 6, torch.float32, DEVICE)
    wanted = _triton.column_descent(Z, AYt, YYt)
    monkeypatch.setattr(Tensor, "amin", lambda values, dim: factor * torch.amin(values, dim))
    got = _triton.column_descent(Z, AYt, YYt)
    assert torch.equal(got.indices, wanted.indices)
    assert torch.equal(got.values, wanted.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5000), (7, 64), (0, 3)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("backend", "device"), runs_here("copy_if"))
def test_copy_if(backend, device, turned, rows, columns, dtype):
    copy_if = _backends.choose("copy_if", torch.device(device), torch.float32, backend).function
    source = torch.arange(rows * columns, device=device).reshape(rows, columns).to(dtype)
    source = source.T.contiguous().T if turned else source
    for flag in (torch.tensor(False), torch.tensor(True), torch.tensor(0), torch.tensor(7)):
        target = torch.full((rows, 2 * columns), -1.0, dtype=dtype, device=device)[:, ::2]
        copy_if(flag.to(device), source, target)
        assert torch.equal(target, source if flag else torch.full_like(target, -1.0))


@pytest.mark.skipif(GPU, reason="on a GPU, torch itself watches (test_no_launcher_waits_for_the_device)")
def test_no_launcher_asks_for_a_value(monkeypatch):
    """What a launcher would wait for on a GPU: numbers, truth values and shapes that depend on data."""
    Y, Z, A, ZtZ = pass_problem(30, 40, 5, 3, torch.float32)
    _, P, Q = coefficient_problem(5, 40, torch.float32, "cpu")
    _, AYt, YYt, _, _ = column_problem(30, 5, 3, torch.float32)
    options = pass_options(("shift", "weights"), 5, 40, torch.float32) | {
        "residual_values": Z.values,
        "tol": 1e-2,
    }

    def waits(*_, **__):
        raise AssertionError("the host would wait for the device here")

    launches = launchers(Y, Z, A, ZtZ, P, Q, AYt, YYt, options)
    for name in ("item", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    for launch in launches:
        launch()
    with pytest.raises(AssertionError, match="would wait"):
        float(torch.ones(()))


def launchers(Y, Z, A, ZtZ, P, Q, AYt, YYt, options):
    """Every launcher on these arguments; each call returns tensors."""
    flag, target = torch.ones((), dtype=torch.bool, device=Y.device), torch.zeros_like(Y)
    return [
        lambda: [_triton.multiplicative_update(Y, P, Q, 1e-6, 2)],
        lambda: [_triton.coordinate_descent(Y, P, Q, 2)],
        lambda: [_triton.winner_take_all(AYt.T, 3).values],
        lambda: [_triton.sparse_product(Z, A)],
        lambda: [_triton.sparse_product(Z, A.T.contiguous().T)],
        lambda: [_triton.column_descent(Z, AYt, YYt, 2).values],
        lambda: [_triton.copy_if(flag, Y, target), target][1:],
        *(
            lambda multiplicative=multiplicative, kept=kept: _flat(
                run_pass(
                    Y, Z, A, ZtZ,
                    **options | {
                        "products": kept, "multiplicative": multiplicative, "measure": not multiplicative,
                    },
                )
            )
            for multiplicative, kept in itertools.product((False, True), ("kept", "all"))
        ),
    ]  # fmt: skip


def _flat(result):
    new, sums = result
    return [new, *sums]


# The schedule of a pass: d = 14,336 in bfloat16, 100 features.
def plan(n=100_000, k=100, tile_bytes=configs.PASS.tile_bytes, gather=True, busy_programs=0, **options):
    arguments = {
        "a_bytes": 2, "y_bytes": 4, "kept": 144, "gather": gather, "products": "all", "residual": False,
        "product": configs.PRODUCT[torch.float32, "bf16"], "sweep": configs.PASS.sweeps[torch.float32, False],
        "programs": configs.PROGRAMS, "tile_bytes": tile_bytes, "busy_programs": busy_programs,
    }  # fmt: skip
    return schedule.plan_pass(14_336, n, k, **arguments | options)


def read_of_a(planned, cache_bytes):
    """Bytes of A that memory gives in one pass."""
    read = schedule.bytes_from_memory(planned, cache_bytes)
    return sum(size for name, size in read.items() if name.startswith("A "))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("kept", ["kept", "all"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7500, 100), (100_000, 100), (100_000, 256), (100_003, 37)])
def test_tiles_that_fit_the_cache_read_the_activations_once(n, k, residual, kept, gather):
    planned = plan(n, k, gather=gather, products=kept, residual=residual)
    once = 14_336 * n * 2
    assert read_of_a(planned, 40 << 20) == once, "an A100's cache"
    covered = [launch.tokens for launch in planned.launches if launch.kernel == "sweep"]
    assert [tokens.start for tokens in covered] == [0, *(tokens.stop for tokens in covered[:-1])]
    assert covered[-1].stop == n


@pytest.mark.parametrize("n", [7500, 100_000])
def test_sweeps_keep_the_device_busy(n):
    """As the table has it: programs enough for every multiprocessor, at the price of a second read where d is large."""
    busy = configs.PASS.busy_programs
    planned = plan(n, busy_programs=busy)
    block = configs.PASS.sweeps[torch.float32, False].block_n
    sizes = [
        launch.tokens.stop - launch.tokens.start for launch in planned.launches if launch.kernel == "sweep"
    ]
    assert all(size >= busy * block for size in sizes[:-1])
    assert len(sizes) == -(-n // (busy * block))
    assert read_of_a(planned, 40 << 20) == 2 * 14_336 * n * 2
    narrow = schedule.plan_pass(
        256, n, 20, a_bytes=2, y_bytes=4, kept=3, gather=True, products="all", residual=False,
        product=configs.PRODUCT[torch.float32, "bf16"], sweep=configs.PASS.sweeps[torch.float32, False],
        programs=configs.PROGRAMS, tile_bytes=configs.PASS.tile_bytes, busy_programs=busy,
    )  # fmt: skip
    assert read_of_a(narrow, 40 << 20) == 256 * n * 2, "where such a tile fits the cache, it is read once"


def test_the_schedules_model_can_fail():
    once = 14_336 * 100_000 * 2
    assert read_of_a(plan(), 8 << 20) == 2 * once, "a tile does not fit"
    assert read_of_a(plan(residual=True), 8 << 20) == 3 * once
    assert read_of_a(plan(tile_bytes=1 << 40), 40 << 20) == 2 * once, "all tokens in one tile"
    assert read_of_a(plan(products=None), 8 << 20) == once, "read but for one product"


@here
def test_the_launcher_follows_the_plan(monkeypatch):
    """Each launch of the plan is one of the kernels it names, in its order."""
    Y, Z, A, ZtZ = pass_problem(130, 140, 9, 4, torch.float32, DEVICE)
    small_tiles(monkeypatch)
    seen = []
    kernels = {
        "product": (products, "gather_product_kernel"),
        "sweep": (tile_pass, "sweep_kernel"),
        "residual": (tile_pass, "residual_kernel"),
        "accumulate": (tile_pass, "accumulate_kernel"),
        "accumulate_kept": (tile_pass, "accumulate_kept_kernel"),
    }

    class Noted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append(self.name)
            return self.kernel[grid]

    for name, (module, attribute) in kernels.items():
        monkeypatch.setattr(module, attribute, Noted(name, getattr(module, attribute)))
    plans = []
    planner = tile_pass.plan_pass
    monkeypatch.setattr(
        tile_pass, "plan_pass", lambda *args, **named: plans.append(planner(*args, **named)) or plans[-1]
    )
    for kept in ("kept", "all"):
        seen.clear()
        run_pass(Y, Z, A, ZtZ, products=kept, residual_values=Z.values)
        assert seen == [launch.kernel for launch in plans[-1].launches]
        assert len(seen) == 4 * 3, "140 tokens in tiles of 64"


def gpu_launchers(n=5000):
    Y, Z, A, ZtZ = pass_problem(301, n, 37, 12, torch.float32, "cuda", torch.bfloat16)
    _, P, Q = coefficient_problem(37, n, torch.float32, "cuda")
    _, AYt, YYt, _, _ = column_problem(301, 37, 12, torch.float32, "cuda")
    options = pass_options(("shift", "weights"), 37, n, torch.float32, "cuda")
    options |= {"residual_values": Z.values, "tol": 1e-2, "sweeps": 9}
    return launchers(Y, Z, A, ZtZ, P, Q, AYt, YYt, options)


@gpu_test
def test_the_same_bits_twice():
    for launch in gpu_launchers():
        first, second = launch(), launch()
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)


@gpu_test
def test_no_launcher_waits_for_the_device():
    launches = gpu_launchers()
    for launch in launches:
        launch()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for launch in launches:
            launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_test
def test_launchers_follow_the_current_stream():
    launches = gpu_launchers()
    wanted = [launch() for launch in launches]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = [launch() for launch in launches]
        # Not even begun, unless on another stream.
        assert not stream.query()
    stream.synchronize()
    for one, other in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True):
        assert torch.equal(one, other)


@gpu_test
def test_launchers_can_be_captured():
    for launch in gpu_launchers():
        wanted = [tensor.clone() for tensor in launch()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = launch()
        for tensor in got:
            tensor.zero_()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


@gpu_test
@pytest.mark.parametrize("a_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
@pytest.mark.parametrize("count", [30, 1000])
def test_products_keep_float32_on_tensor_cores(a_dtype, layout, count):
    """Long sums, at the size of a model: beside float32 sums, not beside bfloat16 or tf32 ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    A = in_layout(torch.randn(8192, 3000, device="cuda", generator=generator).to(a_dtype), layout)
    dense = torch.randn(8192, 100, device="cuda", generator=generator)
    Z = reference.winner_take_all(dense, count)
    exact = Z.to_dense().double().T @ A.double()
    assert_near(_triton.sparse_product(Z, A), exact, 2e-6)
    Y = torch.rand(100, 3000, device="cuda", generator=generator)
    ZtZ = Z.to_dense().T @ Z.to_dense()
    new, sums = run_pass(Y, Z, A, ZtZ, sweeps=0, products="all")
    assert_near(sums.AYt, new.double() @ A.double().T, 2e-6)


@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
def test_products_where_tf32_is_allowed(layout, monkeypatch):
    """Another tile; the interpreter multiplies in float32, so that only indices and edges are seen here."""
    monkeypatch.setattr(products, "tf32_allowed", lambda: True)
    generator = torch.Generator().manual_seed(0)
    A = in_layout(torch.randn(130, 70, generator=generator), layout)
    Z = reference.winner_take_all(torch.randn(130, 33, generator=generator), 100)
    used = []
    monkeypatch.setattr(
        products, "dot_of", lambda config, real=products.dot_of: used.append(config.how) or real(config)
    )
    assert_near(_triton.sparse_product(Z, A), Z.to_dense().T @ A, 1e-5)
    assert used == ["tf32"]


def test_the_stated_error_of_tf32():
    """Both factors cut to 10 stored bits, as tensor cores read them, where all errors add up."""
    generator = torch.Generator().manual_seed(0)

    def cut(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    a, b = 1 + torch.rand(50, 200, generator=generator), 1 + torch.rand(200, 40, generator=generator)
    error = (cut(a).double() @ cut(b).double() - a.double() @ b.double()).abs()
    size = a.double() @ b.double()
    assert float((error / size).max()) < 2**-9
    worst = torch.tensor([[1 + 2**-10 - 2**-23]])
    assert float(1 - (cut(worst) ** 2 / worst**2)) > 0.9 * 2**-9


@gpu_test
@pytest.mark.parametrize("layout", ["neuron-major", "token-major"])
def test_tf32_is_used_where_it_is_allowed(layout):
    generator = torch.Generator("cuda").manual_seed(0)
    A = in_layout(torch.randn(8192, 3000, device="cuda", generator=generator), layout)
    Z = reference.winner_take_all(torch.randn(8192, 100, device="cuda", generator=generator), 1000)
    dense = Z.to_dense().double()
    with product_precision(A.device, allow_tf32=True):
        error = (_triton.sparse_product(Z, A) - dense.T @ A.double()).abs()
    assert bool((error <= 2**-9 * (dense.abs().T @ A.double().abs())).all())
    assert float(error.max() / (dense.T @ A.double()).abs().max()) > 1e-5
