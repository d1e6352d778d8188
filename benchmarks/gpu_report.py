"""GPU figures: each stage appends to one JSON file as it goes; last come a short table, and which targets are met.

    python benchmarks/gpu_report.py --out DIR [--stages fit,many,pass,...] [--seconds 400] [--smoke]

Times are medians of device events after a warm-up, with the spread (10th and 90th percentile). What a pass over A and
an iteration of a fit take is compared with two floors that no version goes below: the bytes of A and Y once by the
bandwidth, and the multiplications by the rates, that this device has been measured to have. Of the time each stage
has a share, by its weight, of what is left; one that has used it up ends after its row, and says so.

``--smoke`` runs every stage on tiny shapes, on the CPU (Triton interpreted) where there is no GPU: it shows that the
script works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

import gpu_measure
import torch
import triton
from gpu_measure import (
    DEVICE,
    columns_problem,
    error_of,
    pass_problem,
    shapes,
    synchronize,
    timed,
    update_problem,
)
from published import PublishedLoop, synthetic_activations
from safetensors.torch import load_file

import snmf_kernels
from snmf_interp.files import write_json
from snmf_kernels import SparseColumns, _backends, _triton, reference
from snmf_kernels._precision import product_precision
from snmf_kernels._triton import configs, products, tile_pass


@functools.cache
def bandwidth():
    """Bytes a millisecond that this device reads and writes."""
    source = torch.randn(shapes(1 << 29, 1 << 10), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed("copy", target.copy_, source)["copy_ms"]


@functools.cache
def rate(dtype, tf32):
    """Operations a millisecond of a large matrix product."""
    size = shapes(8192, 64)
    left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    with product_precision(torch.device(DEVICE), tf32):
        return 2 * size**3 / timed("product", torch.mm, left, right)["product_ms"]


def floors():
    """Measured bandwidth and matrix rates of this device."""
    yield {"name": "copy", "TB_per_s": bandwidth() / 1e9}
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        name = f"matmul {str(dtype)[6:]}{' tf32' if tf32 else ''}"
        yield {"name": name, "TFLOP_per_s": rate(dtype, tf32) / 1e9}


def floor_of(A, k, *, sweeps, dense=2, kept=0, tf32=False):
    """Milliseconds below which nothing that multiplies A by Z and by Y, with sweeps over Y between, can be.

    A multiplication with a bfloat16 A counts once at the rate of bfloat16, however many parts its other operand has.

    Args:
        sweeps: over Y that every token takes.
        dense: products with all rows of A.
        kept: rows of A for each feature in the other products, together.
        tf32: whether dense products of a float32 A may use TF32.
    """
    d, n = A.shape
    moved = A.nbytes + 2 * 4 * k * n
    of_tensors = torch.bfloat16 if A.dtype == torch.bfloat16 else torch.float32
    arithmetic = 2 * d * n * k * dense / rate(of_tensors, tf32 and of_tensors == torch.float32)
    arithmetic += (2 * k * k * n * sweeps + 2 * kept * n * k) / rate(torch.float32, False)
    return max(moved / bandwidth(), arithmetic)


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
    """Coordinate descent over Y against torch's multiplicative update, which is as many products."""
    for k, n in shapes(list(itertools.product((50, 100, 200, 400), (7500, 100_000))), [(5, 70)]):
        problem = update_problem(k, n)
        wanted = reference.coordinate_descent(*(tensor.double() for tensor in problem))
        facts = {
            "name": f"descent k={k} n={n}",
            **timed("torch_multiplicative", reference.multiplicative_update, *problem),
            **timed("triton", _triton.coordinate_descent, *problem),
            **timed("triton_5_sweeps", _triton.coordinate_descent, *problem, 5),
            "error": error_of(_triton.coordinate_descent(*problem), wanted),
        }
        yield {**facts, "speedup": facts["torch_multiplicative_ms"] / facts["triton_ms"]}


def sparse_products():
    """ZᵀA gathered and dense, against torch's dense product (a bfloat16 A: of a bfloat16 Z, which rounds)."""
    sizes = shapes([(14336, 7500, 100), (14336, 7500, 400), (14336, 50_000, 100)], [(64, 70, 3)])
    committed = dict(products.DENSE_FROM)
    try:
        for (d, n, k), dtype, token_major in itertools.product(
            sizes, (torch.bfloat16, torch.float16, torch.float32), (False, True)
        ):
            _, Z, A, _ = pass_problem(d, n, k, dtype, token_major)
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
    """The pass over A against its floor, and against one composed of torch's operations."""
    sizes = shapes([(14336, 7500, 100), (14336, 100_000, 100), (14336, 100_000, 200)], [(40, 100, 3)])
    for (d, n, k), dtype, token_major in itertools.product(
        sizes, shapes((torch.bfloat16, torch.float32), (torch.bfloat16,)), (True, False)
    ):
        Y, Z, A, ZtZ = pass_problem(d, n, k, dtype, token_major)
        out = torch.empty_like(Y)
        for wanted, sweeps in itertools.product(("all", "kept"), shapes((1, 5), (1,))):
            options = {"out": out, "sweeps": sweeps, "products": wanted}
            fused = functools.partial(tile_pass.coefficient_pass, Y, Z, A, ZtZ, **options)
            few = slice(0, min(n, 500))
            exact = torch.empty(k, few.stop, dtype=torch.float64, device=DEVICE)
            reference.coefficient_pass(
                Y[:, few].double(), SparseColumns(Z.indices, Z.values.double(), d), A[:, few].double(),
                ZtZ.double(), out=exact, sweeps=sweeps,
            )  # fmt: skip
            # The first product gathers where few rows are kept, the second only if no others are wanted.
            gathered = (2 if wanted == "kept" else 1) if products.gathers(Z, A) else 0
            facts = {
                "name": f"pass d={d} n={n} k={k} {str(dtype)[6:]} {'token' if token_major else 'neuron'}-major "
                f"{wanted} sweeps={sweeps}",
                **timed("pass", fused, repeat=7),
                "floor_ms": floor_of(
                    A, k, sweeps=sweeps, dense=2 - gathered, kept=gathered * Z.indices.shape[1]
                ),
            }
            facts["over_floor"] = facts["pass_ms"] / facts["floor_ms"]
            # Without keeping a tile in cache.
            committed = tile_pass.PASS
            try:
                tile_pass.PASS = dataclasses.replace(committed, tile_bytes=1 << 40)
                facts |= timed("one_tile", fused, repeat=7)
            finally:
                tile_pass.PASS = committed
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
    for d, k in shapes([(1536, 100), (14336, 100), (14336, 400)], [(70, 3)]):
        problem = columns_problem(d, k)
        wanted = reference.column_descent(*problem)
        facts = {
            "name": f"columns d={d} k={k}",
            **timed("one", _triton.column_descent, *problem, repeat=5),
            **timed("five_sweeps", _triton.column_descent, *problem, 5, repeat=5),
        }
        if DEVICE == "cuda":
            streams = [torch.cuda.Stream() for _ in range(8)]
            facts |= timed("8_streams", on_streams, streams, _triton.column_descent, *problem, repeat=5)
        got = _triton.column_descent(*problem)
        yield {**facts, "same_entries": float((got.indices == wanted.indices).double().mean())}


def select():
    """Winner-take-all against torch.topk."""
    for d, k in shapes([(1536, 100), (14336, 100), (14336, 400), (14336, 1000)], [(70, 3)]):
        count = -(-d // 100)
        Z = torch.randn(k, d, device=DEVICE).T
        facts = {
            "name": f"select d={d} k={k}",
            **timed("topk", lambda Z, count: Z.abs().topk(count, dim=0), Z, count),
            **timed("triton", _triton.winner_take_all, Z, count),
        }
        yield {
            **facts,
            "speedup": facts["topk_ms"] / facts["triton_ms"],
            "equal": torch.equal(
                _triton.winner_take_all(Z, count).indices, reference.winner_take_all(Z, count).indices
            ),
        }


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


class Clock:
    """Notes when each loss was there, in seconds from now; a callback of ``fit``."""

    def __init__(self):
        self.seconds, self.losses = [], []
        self.start = time.perf_counter()

    def __call__(self, state):
        self.note(state.loss)

    def note(self, loss):
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(loss)

    def first(self, loss):
        """(seconds, iterations) until the loss was reached, or (None, None)."""
        for number, (seconds, reached) in enumerate(zip(self.seconds, self.losses, strict=True), 1):
            if reached <= loss:
                return seconds, number
        return None, None

    def milliseconds_per_iteration(self):
        """Without the start of the fit, and what follows the last iteration."""
        return 1e3 * (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


# On A as it is, as the published loop sees it: losses on scaled neurons would not compare.
SETTINGS = {
    "mu": {"solver": "mu"},
    "auto": {"solver": "auto", "refit": True, "neuron_scale": None},
    "auto, TF32 allowed": {"solver": "auto", "refit": True, "neuron_scale": None, "allow_tf32": True},
}


# The paper's iteration needs as many as the published loop; of the others so many tell what one takes.
MOST_ITERATIONS = {"mu": 1000, "auto": 100}

# Made by benchmarks/real_activations.py, which needs the models; carry it to the machine with the GPU.
REAL_LAYER = Path(__file__).parent / "data" / "real_layer.safetensors"


def fit():
    """Per iteration, and to the same loss, against the published loop on this device: one real layer, and synthetic."""
    if REAL_LAYER.is_file():
        # Tokens are rows there.
        A = load_file(REAL_LAYER)["A"].T[: shapes(None, 40), : shapes(None, 60)].to(DEVICE)
        for k, dtype in itertools.product(shapes((100, 400), (4,)), (torch.float32, torch.bfloat16)):
            yield from against_published("real", A.to(dtype), k, shapes(1000, 3))
    else:
        yield {"name": f"no real layer: benchmarks/real_activations.py writes {REAL_LAYER.name}"}
    d = shapes(14336, 300)
    for (n, k), dtype in itertools.product(
        shapes([(7500, 100), (7500, 400), (100_000, 100), (100_000, 400)], [(90, 4)]),
        (torch.float32, torch.bfloat16),
    ):
        A = synthetic_activations(d, n, device=DEVICE, dtype=dtype)
        yield from against_published("synthetic", A, k, shapes(1000 if n < 50_000 else 200, 3))


class Peak:
    """The most memory that is held from here on, of ``data`` bytes that are there already and whatever is added.

    Nothing that a fit before has left in caches counts as there before.
    """

    def __init__(self, data):
        self._others = 0
        if DEVICE == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._others = torch.cuda.memory_allocated() - data

    def over(self, wanted):
        """Its ratio to so many bytes until now; None without a GPU."""
        return (torch.cuda.max_memory_allocated() - self._others) / wanted if DEVICE == "cuda" else None


def against_published(name, A, k, iterations):
    """Rows of the published loop against each solver on A."""
    loop = PublishedLoop(A.float(), k)
    for _ in range(3):
        loop.step()
    clock = Clock()
    for _ in range(iterations):
        clock.note(loop.step())
    norm = float(loop.A.double().square().sum())
    del loop
    best = min(clock.losses)
    published, _ = clock.first(best)
    for solver, settings in SETTINGS.items():
        options = settings | {
            "patience": 10_000,
            "tol": 0.0,
            "max_iter": min(iterations, MOST_ITERATIONS[settings["solver"]]),
        }
        # Compiles every kind of step.
        snmf_kernels.fit(A, k, **options | {"max_iter": min(iterations, 12)})
        synchronize()
        memory = Peak(A.nbytes)
        mine = Clock()
        result = snmf_kernels.fit(A, k, callback=mine, **options)
        synchronize()
        whole = time.perf_counter() - mine.start
        # Before anything else is allocated.
        peak = memory.over(A.nbytes + result.Y.nbytes)
        reached, needed = mine.first(best)
        # Tokens may take but one of the sweeps.
        floor = floor_of(A, k, sweeps=1, tf32=settings.get("allow_tf32", False))
        yield {
            "name": f"fit {solver} {name} d={A.shape[0]} n={A.shape[1]} k={k} {str(A.dtype)[6:]}",
            "published_iterations": iterations,
            "published_ms_per_iteration": clock.milliseconds_per_iteration(),
            "published_relative_error": best / norm,
            # Until it first had its best loss, and all its iterations.
            "published_s": published,
            "published_whole_s": clock.seconds[-1],
            "ms_per_iteration": mine.milliseconds_per_iteration(),
            "floor_ms": floor,
            "over_floor": mine.milliseconds_per_iteration() / floor,
            "speedup_per_iteration": clock.milliseconds_per_iteration() / mine.milliseconds_per_iteration(),
            "relative_error": min(result.loss_history) / norm,
            "to_published_loss_s": reached,
            "to_published_loss_iterations": needed,
            "whole_s": whole,
            "speedup_to_loss": published / reached if reached else None,
            "peak_over_A_and_Y": peak,
            "backend": result.backend,
        }


def many():
    """Many layers together against one after another, each until it converges."""
    count, d, n, k = shapes((32, 14336, 7500, 100), (3, 200, 90, 4))
    layers = [
        synthetic_activations(d, n, seed=seed, device=DEVICE, dtype=torch.bfloat16) for seed in range(count)
    ]
    data = sum(A.nbytes for A in layers)
    snmf_kernels.fit(layers[0], k)
    for at_once in shapes((1, 4, 8, 16), (2,)):
        memory = Peak(data)
        synchronize()
        start = time.perf_counter()
        results = snmf_kernels.fit_many(layers, k, at_once=at_once)
        synchronize()
        seconds = time.perf_counter() - start
        peak = memory.over(data + 4 * count * k * n)
        row = {
            "name": f"fit_many {count} layers d={d} n={n} k={k}, {at_once} at once",
            "seconds": seconds,
            "iterations": sum(result.n_iter for result in results),
            "relative_error": statistics.mean(result.relative_error for result in results),
            "peak_over_A_and_Y": peak,
        }
        # They would be in the memory of the next.
        del results
        yield row


# By name: what it runs, its weight when time is shared out, and what of its rows the table shows. What matters most
# comes first, for the last ones may be cut short.
STAGES = {
    "floors": (floors, 1, ("TB_per_s", "TFLOP_per_s")),
    "fit": (
        fit,
        6,
        (
            "speedup_to_loss",
            "to_published_loss_s",
            "speedup_per_iteration",
            "over_floor",
            "peak_over_A_and_Y",
        ),
    ),
    "many": (many, 4, ("seconds", "iterations", "relative_error", "peak_over_A_and_Y")),
    "pass": (tile_passes, 4, ("pass_ms", "over_floor", "one_tile_ms", "torch_multiplicative_ms", "error")),
    "columns": (columns, 1, ("one_ms", "five_sweeps_ms", "8_streams_ms", "same_entries")),
    "products": (
        sparse_products,
        2,
        ("gathered_ms", "dense_ms", "torch_same_dtype_ms", "dense_error", "chosen"),
    ),
    "descent": (descent, 2, ("triton_ms", "triton_5_sweeps_ms", "speedup", "error")),
    "update": (update, 2, ("triton_ms", "speedup", "TFLOP_per_s", "error")),
    "select": (select, 1, ("triton_ms", "speedup", "equal")),
    "solve": (solve, 2, ("torch_ms", "cuda_ms", "speedup", "error", "refused")),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure should be: of all rows of a stage whose names have these words, at least (at most) a bound."""

    what: str
    stage: str
    key: str
    bound: float
    words: tuple[str, ...] = ()
    at_least: bool = False
    of_all: bool = True

    def verdict(self, rows):
        """The row that decides, in words. What was never reached has no figure, and counts as 0."""
        if any("failed" in row for row in rows):
            return "its stage failed"
        figures = {
            row["name"]: row[self.key] or 0.0
            for row in rows
            if all(word in row["name"] for word in self.words)
            and self.key in row
            and (self.at_least or row[self.key] is not None)
        }
        if not figures:
            return "not measured"
        # The worst of all rows, or the best.
        name = (min if self.at_least == self.of_all else max)(figures, key=figures.__getitem__)
        met = figures[name] >= self.bound if self.at_least else figures[name] <= self.bound
        return (
            f"{'met' if met else 'MISSED'}: {figures[name]:.3g} ({name}); "
            f"of {len(figures)} rows {min(figures.values()):.3g} to {max(figures.values()):.3g}"
        )


TARGETS = (
    Target("times sooner at the published loss, at least 100", "fit", "speedup_to_loss", 100, ("fit auto ",), True),
    Target("a pass over its floor for k <= 128, at most 1.5", "pass", "over_floor", 1.5, (" k=100 ", " all ")),
    Target("seconds for 32 layers together, at most 10", "many", "seconds", 10, of_all=False),
    Target("peak memory over A and Y, at most 1.05: fit", "fit", "peak_over_A_and_Y", 1.05, ("fit auto ",)),
    Target("peak memory over A and Y, at most 1.05: fit_many", "many", "peak_over_A_and_Y", 1.05),
)  # fmt: skip


def run_stage(name, rows, seconds):
    """Appends to the rows, for about as long; yields after each."""
    if seconds <= 0:
        rows.append({"name": f"{name}: no time was left"})
        return
    start = time.perf_counter()
    # What another stage has kept would count as memory of this one.
    gpu_measure.activations.cache_clear()
    for row in STAGES[name][0]():
        rows.append(row)
        yield
        if time.perf_counter() - start > seconds:
            rows.append({"name": f"{name}: stopped after its share of the time, {seconds:.0f} s"})
            return


def print_table(stages):
    """What the stages show of their rows."""
    for name, rows in stages.items():
        keys = STAGES[name][2]
        cells = [(name, *keys)]
        for row in rows:
            values = (row.get(key, "") for key in keys)
            cells.append(
                (
                    row["name"],
                    *(f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in values),
                )
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print(flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=400, help="for all stages together; default: 400")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    gpu_measure.SMOKE = arguments.smoke
    if DEVICE == "cpu" and not arguments.smoke:
        parser.error("torch finds no GPU here; --smoke tries the script out on the CPU")
    wanted = arguments.stages.split(",")
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        parser.error(f"--stages: no such stage as {unknown[0]!r}; there are {', '.join(STAGES)}")
    path = arguments.out / "gpu.json"
    build = _backends.compiled_module()
    report = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (smoke test)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "snmf_kernels": snmf_kernels.__version__,
        "build": build if isinstance(build, str) else build.build_info(),
        "table": hashlib.sha256(Path(configs.__file__).read_bytes()).hexdigest()[:12],
        "stages": {},
    }
    start, failed = time.perf_counter(), 0
    for number, name in enumerate(wanted):
        rows = report["stages"][name] = []
        begun = time.perf_counter()
        left = arguments.seconds - (begun - start)
        share = left * STAGES[name][1] / sum(STAGES[later][1] for later in wanted[number:])
        try:
            for _ in run_stage(name, rows, share):
                write_json(path, report)
        except Exception:  # a failed stage is reported in the file and must not cost the others
            failed += 1
            rows.append({"name": f"{name}: failed", "failed": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)
        write_json(path, report)
    print_table(report["stages"])
    for target in TARGETS:
        if target.stage in report["stages"]:
            print(f"{target.what}: {target.verdict(report['stages'][target.stage])}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
