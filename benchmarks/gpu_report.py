"""GPU figures: each stage appends to one JSON file as it ends, and a short table is printed last.

    python benchmarks/gpu_report.py --out DIR [--stages floors,update,products,pass,...] [--smoke]

Times are medians of device events after a warm-up, with the spread (10th and 90th percentile). ``--smoke`` runs every
stage on tiny shapes, on the CPU (Triton interpreted) where there is no GPU: it shows that the script works,
its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import triton
from published import PublishedLoop, synthetic_activations
from safetensors.torch import load_file

import snmf_kernels
from snmf_kernels import SparseColumns, _backends, _triton, reference
from snmf_kernels._triton import coefficients, configs, products, selection, tile_pass

SMOKE = False
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(function, *arguments, repeat=20, warmup=3):
    """(median, 10th, 90th percentile) of device time per call."""
    if SMOKE:
        repeat, warmup = 1, 0
    for _ in range(warmup):
        function(*arguments)
    times = []
    for _ in range(repeat):
        if DEVICE == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function(*arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function(*arguments)
            times.append(1e3 * (time.perf_counter() - begun))
    times.sort()
    return statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10]


def timed(prefix, function, *arguments, repeat=20):
    median, low, high = milliseconds(function, *arguments, repeat=repeat)
    return {f"{prefix}_ms": median, f"{prefix}_p10": low, f"{prefix}_p90": high}


def shapes(real, smoke):
    return smoke if SMOKE else real


def error_of(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def floors():
    """Measured bandwidth and matrix rates of this device."""
    source = torch.randn(shapes(1 << 29, 1 << 10), device=DEVICE)
    target = torch.empty_like(source)
    copy = {"name": "copy", "bytes": source.nbytes, **timed("copy", target.copy_, source)}
    yield {**copy, "TB_per_s": 2 * source.nbytes / copy["copy_ms"] / 1e9}
    del source, target
    size = shapes(8192, 64)
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        product = {
            "name": f"matmul {size} {dtype}{' tf32' if tf32 else ''}",
            **timed("product", torch.mm, left, right),
        }
        yield {**product, "TFLOP_per_s": 2 * size**3 / product["product_ms"] / 1e9}
    torch.backends.cuda.matmul.allow_tf32 = False


def update_problem(k, n):
    generator = torch.Generator(DEVICE).manual_seed(0)
    Z = torch.randn(2000, k, device=DEVICE, generator=generator)
    Z *= torch.rand(2000, k, device=DEVICE, generator=generator) < 0.05
    Y = torch.rand(k, n, device=DEVICE, generator=generator)
    return Y, torch.randn(k, n, device=DEVICE, generator=generator), Z.T @ Z


def update():
    """The fused Y update against the torch expression."""
    for k, n in shapes(list(itertools.product((50, 100, 200, 400, 1000), (7500, 100_000))), [(5, 70)]):
        problem = update_problem(k, n)
        wanted = reference.multiplicative_update(*(tensor.double() for tensor in problem))
        facts = {
            "name": f"update k={k} n={n}",
            **timed("torch", reference.multiplicative_update, *problem),
            **timed("triton", _triton.multiplicative_update, *problem),
            "error": error_of(_triton.multiplicative_update(*problem), wanted),
            "torch_error": error_of(reference.multiplicative_update(*problem), wanted),
        }
        facts["speedup"] = facts["torch_ms"] / facts["triton_ms"]
        yield {**facts, "TFLOP_per_s": 4 * k * k * n / facts["triton_ms"] / 1e9}


def descent():
    """Coordinate descent over Y, by tokens of a program and by sweeps, against torch's multiplicative update."""
    committed = dict(configs.DESCENT)
    tiles = [committed[torch.float32]] + [
        configs.SweepConfig(block_k, 32, block_n, warps, 1, "ieee")
        for block_k, block_n, warps in ((16, 16, 1), (16, 64, 2), (32, 32, 2), (32, 16, 1))
    ]
    sizes = shapes(list(itertools.product((50, 100, 200, 400), (7500, 100_000))), [(5, 70)])
    try:
        for k, n in sizes:
            problem = update_problem(k, n)
            wanted = reference.coordinate_descent(*(tensor.double() for tensor in problem))
            plain = timed("torch_multiplicative", reference.multiplicative_update, *problem)
            for tile in shapes(tiles, tiles[:1]):
                configs.DESCENT[torch.float32] = tile
                yield {
                    "name": f"descent k={k} n={n} block_k={tile.block_k} block_n={tile.block_n} w={tile.num_warps}",
                    **plain,
                    **timed("triton", _triton.coordinate_descent, *problem),
                    **timed("triton_5_sweeps", _triton.coordinate_descent, *problem, 5),
                    "error": error_of(_triton.coordinate_descent(*problem), wanted),
                }
    finally:
        configs.DESCENT.update(committed)


def pass_matrices(d, n, k, dtype, token_major, keep=0.01):
    """(Y, Z, A, ZtZ) of the size of a layer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    A = synthetic_activations(d, n, device=DEVICE, dtype=dtype)
    A = A.T.contiguous().T if token_major else A.contiguous()
    Z = reference.winner_take_all(
        torch.randn(k, d, device=DEVICE, generator=generator).T, max(1, round(keep * d))
    )
    dense = Z.to_dense()
    return torch.rand(k, n, device=DEVICE, generator=generator), Z, A, dense.T @ dense


def sparse_products():
    """ZᵀA gathered and dense, against torch's dense product (a bfloat16 A: of a bfloat16 Z, which rounds)."""
    sizes = shapes([(14336, 7500, 100), (14336, 7500, 400), (14336, 50_000, 100)], [(64, 70, 3)])
    committed = dict(configs.DENSE_FROM)
    try:
        for (d, n, k), dtype, token_major in itertools.product(
            sizes, (torch.bfloat16, torch.float16, torch.float32), (False, True)
        ):
            _, Z, A, _ = pass_matrices(d, n, k, dtype, token_major)
            dense = Z.to_dense().T.to(dtype)
            facts = {
                "name": f"products d={d} n={n} k={k} {str(dtype)[6:]} {'token' if token_major else 'neuron'}-major",
                **timed("torch_same_dtype", torch.mm, dense, A),
                "torch_error": error_of(
                    dense[:, :] @ A[:, :64], Z.to_dense().T.double() @ A[:, :64].double()
                ),
            }
            ways = {"dense": 0.0} if token_major else {"gathered": 1.0, "dense": 0.0}
            for way, share in ways.items():
                products.DENSE_FROM.update(dict.fromkeys(committed, share))
                facts |= timed(way, _triton.sparse_product, Z, A)
                got = _triton.sparse_product(Z, A)[:, :64]
                facts[f"{way}_error"] = error_of(got, Z.to_dense().T.double() @ A[:, :64].double())
            products.DENSE_FROM.update(committed)
            yield {**facts, "chosen": "gathered" if products.gathers(Z, A) else "dense"}
    finally:
        products.DENSE_FROM.update(committed)


def tile_passes():
    """The pass over A by bytes of a tile (the last: all tokens at once), against one composed of torch's operations."""
    sizes = shapes([(14336, 7500, 100), (14336, 100_000, 100), (14336, 100_000, 200)], [(40, 100, 3)])
    tile_sizes = shapes([8 << 20, 16 << 20, 24 << 20, 64 << 20, 1 << 40], [1, 1 << 40])
    committed = configs.PASS
    for (d, n, k), dtype, token_major in itertools.product(
        sizes, shapes((torch.bfloat16, torch.float32), (torch.bfloat16,)), (False, True)
    ):
        Y, Z, A, ZtZ = pass_matrices(d, n, k, dtype, token_major)
        out = torch.empty_like(Y)
        for wanted, sweeps in itertools.product(("kept", "all"), shapes((1, 5), (1,))):
            options = {"out": out, "sweeps": sweeps, "products": wanted}
            fused = functools.partial(tile_pass.coefficient_pass, Y, Z, A, ZtZ, **options)
            few = slice(0, min(n, 500))
            exact = torch.empty(k, few.stop, dtype=torch.float64, device=DEVICE)
            reference.coefficient_pass(
                Y[:, few].double(), SparseColumns(Z.indices, Z.values.double(), d), A[:, few].double(),
                ZtZ.double(), out=exact, sweeps=sweeps,
            )  # fmt: skip
            facts = {
                "name": f"pass d={d} n={n} k={k} {str(dtype)[6:]} {'token' if token_major else 'neuron'}-major "
                f"{wanted} sweeps={sweeps}",
                "floor_ms_at_3.35_TB_per_s": A.nbytes / 3.35e9,
            }
            try:
                for tile_bytes in tile_sizes:
                    tile_pass.PASS = dataclasses.replace(committed, tile_bytes=tile_bytes, busy_programs=0)
                    name = "whole" if tile_bytes == 1 << 40 else f"{tile_bytes >> 20}MB"
                    facts |= timed(name, fused, repeat=7)
            finally:
                tile_pass.PASS = committed
            facts |= timed("committed", fused, repeat=7)
            result = fused()
            facts["error"] = error_of(out[:, few], exact)
            if wanted == "all":
                facts["error_AYt"] = error_of(result.AYt, out.double() @ A.double().T)
            if n < 50_000:  # as many blocks of few tokens take seconds
                composed = functools.partial(
                    reference.coefficient_pass, Y, Z, A, ZtZ, multiplicative=True, **options
                )
                facts |= timed("torch_multiplicative", composed, repeat=3)
            yield facts


def on_streams(streams, function, *arguments):
    """The same on each stream, behind what is queued on the current one and before what will be."""
    current = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(*arguments)
    for stream in streams:
        current.wait_stream(stream)


def columns():
    """Column descent, which a single program does, by itself and on eight streams, as ``fit_many`` has them."""
    committed = dict(selection.COLUMNS)
    launches = [
        committed[torch.float32],
        *(
            configs.ColumnConfig(*launch)
            for launch in (
                (1 << 14, 1024, 16, 128, 64), (1 << 14, 2048, 16, 64, 64), (1 << 14, 2048, 8, 64, 64),
                (0, 2048, 16, 128, 64), (0, 2048, 32, 128, 64),
            )
        ),
    ]  # fmt: skip
    try:
        for d, k in shapes([(1536, 100), (14336, 100), (14336, 400)], [(70, 3)]):
            count = max(1, d // 100)
            Y = torch.rand(k, 2000, device=DEVICE)
            AYt = torch.randn(k, d, device=DEVICE)
            Z = reference.winner_take_all(torch.randn(k, d, device=DEVICE).T, count)
            problem = Z, AYt, Y @ Y.T
            wanted = reference.column_descent(*problem)
            for launch in shapes(launches, launches[:2]):
                selection.COLUMNS[torch.float32] = launch
                facts = {
                    "name": f"columns d={d} k={k} {launch}",
                    **timed("one", _triton.column_descent, *problem, repeat=5),
                    **timed("five_sweeps", _triton.column_descent, *problem, 5, repeat=5),
                }
                if DEVICE == "cuda":
                    streams = [torch.cuda.Stream() for _ in range(8)]
                    facts |= timed(
                        "8_streams", on_streams, streams, _triton.column_descent, *problem, repeat=5
                    )
                got = _triton.column_descent(*problem)
                yield {**facts, "same_entries": float((got.indices == wanted.indices).double().mean())}
    finally:
        selection.COLUMNS.update(committed)


TILES = [  # block_k, block_j, block_n, num_warps, num_stages
    (32, 16, 64, 4, 2), (32, 32, 64, 4, 2), (32, 16, 128, 4, 2), (64, 16, 64, 4, 2), (64, 16, 64, 4, 3),
    (64, 32, 64, 4, 2), (64, 16, 128, 8, 2), (64, 16, 128, 8, 3), (64, 32, 64, 8, 3), (64, 32, 128, 8, 2),
    (128, 16, 64, 8, 3), (128, 16, 128, 8, 3), (128, 32, 64, 8, 2),
]  # fmt: skip


def tune():
    """Every sensible configuration of the update kernel; the best ones go into the table by hand."""
    sizes = shapes([(100, 7500), (100, 100_000), (400, 7500), (400, 100_000), (1000, 50_000)], [(5, 70)])
    problems = {size: update_problem(*size) for size in sizes}
    committed = dict(configs.UPDATE)
    try:
        for precision, tile in itertools.product(("ieee", "tf32x3"), shapes(TILES, TILES[:1])):
            for key in committed:
                coefficients.UPDATE[key] = configs.SweepConfig(*tile, precision)
            facts = {"name": f"{precision} {tile}"}
            for (k, n), problem in problems.items():
                facts |= timed(f"k={k} n={n}", _triton.multiplicative_update, *problem, repeat=7)
            yield facts
    finally:
        coefficients.UPDATE.update(committed)


def select():
    """Winner-take-all against torch.topk, with columns in registers and from cache, over blocks and warps."""
    launches = [
        (whole, *launch)
        for whole in (1 << 14, 0)
        for launch in ((1024, 8), (2048, 8), (4096, 8), (1024, 16), (2048, 16), (4096, 16))
    ]
    committed = dict(selection.SELECT)
    try:
        for d, k in shapes([(1536, 100), (14336, 100), (14336, 400), (14336, 1000)], [(70, 3)]):
            count = -(-d // 100)
            Z = torch.randn(k, d, device=DEVICE).T
            plain = timed("topk", lambda Z, count: Z.abs().topk(count, dim=0), Z, count)
            wanted = reference.winner_take_all(Z, count)
            for launch in shapes(launches, launches[::6]):
                selection.SELECT[torch.float32] = configs.SelectConfig(*launch)
                fused = timed("triton", _triton.winner_take_all, Z, count)
                yield {
                    "name": f"select d={d} k={k} whole, block, warps={launch}",
                    **plain,
                    **fused,
                    "speedup": plain["topk_ms"] / fused["triton_ms"],
                    "equal": torch.equal(_triton.winner_take_all(Z, count).indices, wanted.indices),
                }
    finally:
        selection.SELECT.update(committed)


def compare(operation, exact, *arguments):
    """Times and errors of a solve in torch and in CUDA, if this device has it."""
    function = getattr(reference, operation)
    facts = {
        **timed("torch", function, *arguments),
        "torch_error": error_of(function(*arguments)[0], exact),
    }
    refused = _backends.refusal("cuda", exact.device, arguments[0].dtype, operation)
    if refused is None:
        from snmf_kernels import _cuda

        function = getattr(_cuda, operation)
        facts |= timed("cuda", function, *arguments)
        facts["speedup"] = facts["torch_ms"] / facts["cuda_ms"]
        facts["error"] = error_of(function(*arguments)[0], exact)
    return {**facts, "refused": refused}


def solve():
    """Batched and ragged regularised solves against torch.linalg, which asks the device for the ragged ones' sizes."""
    sizes = shapes(
        [
            (10_000, 8, 1),
            (10_000, 32, 1),
            (4096, 64, 4),
            (1024, 128, 8),
            (256, 200, 1),
            (1, 100, 14336),
            (1, 200, 14336),
            (1, 400, 2688),  # by torch.linalg
        ],
        [(3, 4, 2)],
    )
    dtypes = (torch.float32, torch.float64)
    for (batch, k, m), dtype, escalations in itertools.product(sizes, dtypes, (0, 8)):
        factor = torch.randn(batch, k, k, device=DEVICE, dtype=dtype)
        G, B = factor @ factor.mT / k, torch.randn(batch, k, m, device=DEVICE, dtype=dtype)
        regular = G.double() + 0.1 * torch.eye(k, device=DEVICE, dtype=torch.float64)
        exact = torch.linalg.solve(regular, B.double())
        yield {
            "name": f"solve {str(dtype)[6:]} batch={batch} k={k} m={m} escalations={escalations}",
            **compare("ridge_solve", exact, G, B, 0.1, escalations),
        }
    for (d, k), dtype in itertools.product(
        shapes([(14336, 100), (14336, 400), (14336, 1000)], [(30, 5)]), dtypes
    ):
        # Neurons differ in how often they are kept: some by nearly all features, most by few.
        popularity = torch.randn(d, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).exp()
        scores = torch.rand(d, k, device=DEVICE).log() / popularity[:, None]
        supports, _ = reference.winner_take_all(1 / scores, -(-d // 100)).supports()
        factor = torch.randn(k, 2 * k, device=DEVICE, dtype=dtype)
        B = torch.randn(len(supports.members), device=DEVICE, dtype=dtype)
        G = factor @ factor.T / k
        exact, _ = reference.support_solve(G.double(), supports, B.double(), 0.1)
        facts = compare("support_solve", exact, G, supports, B, 0.1)
        largest = int(supports.offsets.diff().max())
        yield {"name": f"supports {str(dtype)[6:]} d={d} k={k}", "largest": largest, **facts}


class FirstReach:
    """A callback of ``fit`` that notes when a loss was reached first."""

    def __init__(self, loss):
        self.loss, self.seconds, self.n_iter = loss, None, None
        self.start = time.perf_counter()

    def __call__(self, state):
        if self.seconds is None and state.loss <= self.loss:
            self.seconds, self.n_iter = time.perf_counter() - self.start, state.n_iter


# On A as it is, as the published loop sees it: losses on scaled neurons would not compare.
SETTINGS = {
    "mu": {"solver": "mu"},
    "auto": {"solver": "auto", "refit": True, "neuron_scale": None},
    "auto, TF32 allowed": {"solver": "auto", "refit": True, "neuron_scale": None, "allow_tf32": True},
}


# Made by benchmarks/real_activations.py, which needs the models; carry it to the machine with the GPU.
REAL_LAYER = Path(__file__).parent / "data" / "real_layer.safetensors"


def fit():
    """Per iteration, and to the same loss, against the published loop on this device: synthetic, and one real layer."""
    d = shapes(14336, 300)
    for (n, k), dtype in itertools.product(
        shapes([(7500, 100), (7500, 400), (100_000, 100), (100_000, 400)], [(90, 4)]),
        (torch.float32, torch.bfloat16),
    ):
        A = synthetic_activations(d, n, device=DEVICE, dtype=dtype)
        yield from against_published("synthetic", A, k, shapes(200 if n < 50_000 else 60, 3))
    if not REAL_LAYER.is_file():
        yield {
            "name": "fit real layer",
            "refused": f"no {REAL_LAYER}; benchmarks/real_activations.py writes it",
        }
        return
    # Tokens are rows there.
    A = load_file(REAL_LAYER)["A"].T[: shapes(None, 40), : shapes(None, 60)].to(DEVICE)
    for k, dtype in itertools.product(shapes((100, 400), (4,)), (torch.float32, torch.bfloat16)):
        yield from against_published("real", A.to(dtype), k, shapes(200, 3))


def against_published(name, A, k, iterations):
    """Rows of the published loop against each solver on A."""
    loop = PublishedLoop(A.float(), k)
    for _ in range(3):
        loop.step()
    synchronize()
    start = time.perf_counter()
    best = min(loop.step() for _ in range(iterations))
    synchronize()
    published = time.perf_counter() - start
    norm = float(loop.A.double().square().sum())
    del loop
    for solver, settings in SETTINGS.items():
        options = settings | {"patience": 10_000, "tol": 0.0}
        snmf_kernels.fit(A, k, max_iter=3, **options)
        synchronize()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        reach = FirstReach(best)
        result = snmf_kernels.fit(A, k, max_iter=iterations, callback=reach, **options)
        synchronize()
        mine = time.perf_counter() - reach.start
        peak = torch.cuda.max_memory_allocated() / (A.nbytes + result.Y.nbytes) if DEVICE == "cuda" else None
        yield {
            "name": f"fit {solver} {name} d={A.shape[0]} n={A.shape[1]} k={k} {str(A.dtype)[6:]}",
            "published_ms_per_iteration": 1e3 * published / iterations,
            "ms_per_iteration": 1e3 * mine / result.n_iter,
            "speedup_per_iteration": published / iterations / (mine / result.n_iter),
            "published_relative_error": best / norm,
            "relative_error": min(result.loss_history) / norm,
            "to_published_loss_s": reach.seconds,
            "to_published_loss_iterations": reach.n_iter,
            "published_s": published,
            "speedup_to_loss": published / reach.seconds if reach.seconds else None,
            "peak_over_A_and_Y": peak,
            "backend": result.backend,
        }


def many():
    """Many layers together against one after another, each until it converges."""
    count, d, n, k = shapes((32, 14336, 7500, 100), (3, 200, 90, 4))
    layers = [
        synthetic_activations(d, n, seed=seed, device=DEVICE, dtype=torch.bfloat16) for seed in range(count)
    ]
    held = sum(A.nbytes for A in layers) + 4 * count * k * n
    snmf_kernels.fit(layers[0], k)
    for at_once in shapes((1, 4, 8, 16), (2,)):
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        results = snmf_kernels.fit_many(layers, k, at_once=at_once)
        synchronize()
        yield {
            "name": f"fit_many {count} layers d={d} n={n} k={k}, {at_once} at once",
            "seconds": time.perf_counter() - start,
            "iterations": sum(result.n_iter for result in results),
            "relative_error": statistics.mean(result.relative_error for result in results),
            "peak_over_A_and_Y": torch.cuda.max_memory_allocated() / held if DEVICE == "cuda" else None,
        }


STAGES = {
    "floors": floors,
    "update": update,
    "descent": descent,
    "products": sparse_products,
    "pass": tile_passes,
    "columns": columns,
    "select": select,
    "solve": solve,
    "fit": fit,
    "many": many,
    "tune": tune,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    global SMOKE
    SMOKE = arguments.smoke
    if DEVICE == "cpu" and not SMOKE:
        parser.error("torch finds no GPU here; --smoke tries the script out on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu.json"
    report = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (smoke test)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "snmf_kernels": snmf_kernels.__version__,
        "build": _backends.compiled_module().build_info(),
        "stages": {},
    }
    failed = 0
    for name in arguments.stages.split(","):
        rows = report["stages"][name] = []
        start = time.perf_counter()
        try:
            for result in STAGES[name]():
                rows.append(result)
                path.write_text(json.dumps(report, indent=1))
                print(
                    json.dumps(
                        {key: round(v, 5) if isinstance(v, float) else v for key, v in result.items()}
                    ),
                    flush=True,
                )
        except Exception:  # a failed stage is reported in the file and must not cost the others
            failed += 1
            rows.append({"failed": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
        path.write_text(json.dumps(report, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
