"""Times every sensible tile of the Triton kernels on this GPU and rewrites the table of configurations.

    python benchmarks/gpu_tune.py --out DIR [--seconds 60] [--write] [--smoke]

Each entry of snmf_kernels/_triton/configs.py that float32 work uses is tried with other values on problems of the size
of a layer, one entry after another, each with the best of those before it. Values are compiled first, by many processes
at once; one that fails or computes something else is out. The committed value stays unless another takes at most
97 % of its time (geometric mean over the problems, against the committed one timed beside it).

DIR gets ``tune.json``, all that was measured, and ``configs.py``, the table with what was found best; ``--write`` puts
that in the place of the committed one as well. Then run ``make format`` and tests/test_aot.py, which says whether it
compiles for other GPUs without spills, and give each new value its reason.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import gpu_measure
import torch
import triton
from gpu_measure import (
    DEVICE,
    columns_problem,
    error_of,
    milliseconds,
    pass_problem,
    shapes,
    update_problem,
)
from torch import Tensor

from snmf_interp.files import write_json, write_text
from snmf_kernels import _triton
from snmf_kernels._precision import product_precision
from snmf_kernels._triton import configs, tile_pass
from snmf_kernels._triton.configs import (
    ColumnConfig,
    DenseConfig,
    GatherConfig,
    SelectConfig,
    SweepConfig,
)

TABLE = Path(configs.__file__)
# The least share of its time that a new value must save.
GAIN = 0.03
# Processes that compile: as many have a context on the GPU and one problem in its memory.
WORKERS = 12
# Of the seconds given, the share after which no more is compiled.
COMPILING = 0.6

Calls = dict[str, Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the table: where it is, what else it may be, and what it is measured by.

    Attributes:
        table: a name in configs.py, with dots for attributes.
        key: in that table; None if the whole of it is meant.
        candidates: values beside the committed one.
        calls: makes named calls that use the entry; each returns what has been computed.
        tolerance: the largest error of that, relative to what the committed value computes.
    """

    table: str
    key: Hashable
    candidates: tuple[Any, ...]
    calls: Callable[[], Calls]
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        """As it is shown."""
        return self.table if self.key is None else f"{self.table}[{self.key}]"

    def value(self) -> Any:
        """What the table has now."""
        table = attrgetter(self.table)(configs)
        return table if self.key is None else table[self.key]

    def show(self, value: Any) -> str:
        """A value for readers, of the pass what is tried of it."""
        if self.table == "PASS":
            return f"tile_bytes={value.tile_bytes}, busy_programs={value.busy_programs}"
        return text_of(value)

    def put(self, value: Any) -> None:
        """Has the kernels use another value."""
        if self.key is not None:
            attrgetter(self.table)(configs)[self.key] = value
        else:
            # The only one that is not in a dict, and the only module that has it.
            assert self.table == "PASS"
            configs.PASS = tile_pass.PASS = value


@contextmanager
def changed(entry: Entry, value: Any) -> Iterator[None]:
    """The table with one other value."""
    before = entry.value()
    entry.put(value)
    try:
        yield
    finally:
        entry.put(before)


def sweeps(*tiles: tuple[int, ...]) -> tuple[SweepConfig, ...]:
    return tuple(SweepConfig(*tile, "ieee") for tile in tiles)


def dense(how: str, *tiles: tuple[int, ...]) -> tuple[DenseConfig, ...]:
    return tuple(DenseConfig(*tile, how) for tile in tiles)


# None of these spills registers on an sm_90. block_k, block_j, block_n, warps, stages: features follow one another, so
# few tokens and warps.
DESCENT = sweeps(
    (16, 32, 16, 1, 1), (16, 32, 64, 2, 1), (16, 16, 32, 1, 1), (32, 32, 32, 1, 1), (32, 32, 32, 2, 1),
    (32, 32, 16, 1, 1),
)  # fmt: skip
MULTIPLICATIVE = sweeps(
    (16, 32, 32, 1, 1), (16, 32, 64, 4, 1), (32, 32, 32, 2, 1), (32, 32, 32, 4, 1), (16, 32, 16, 1, 1)
)  # fmt: skip
UPDATE = sweeps(
    (32, 16, 32, 4, 2), (32, 16, 64, 4, 2), (32, 16, 64, 4, 3), (32, 32, 32, 4, 2), (32, 16, 64, 8, 2),
    (16, 16, 128, 4, 2), (32, 16, 128, 4, 2), (32, 16, 128, 8, 2), (64, 16, 64, 8, 2), (64, 16, 64, 8, 3),
    (64, 16, 128, 8, 2), (64, 16, 128, 8, 3),
)  # fmt: skip
# More features to a program would bring the entry for few features other numbers of them, too.
SMALL_UPDATE = tuple(tile for tile in UPDATE if tile.block_k <= 32)
GATHER = tuple(
    GatherConfig(*tile) for tile in ((8, 128, 4), (32, 128, 4), (16, 256, 4), (16, 256, 8), (16, 64, 2), (32, 64, 4))
)  # fmt: skip
# block_k, block_d, block_n, warps, stages of products with a tile of A.
PRODUCT = (
    (64, 32, 64, 4, 2), (64, 32, 64, 4, 4), (64, 32, 128, 4, 3), (64, 32, 128, 8, 3), (128, 32, 64, 8, 3),
    (128, 32, 128, 8, 3), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (32, 64, 64, 4, 3),
)  # fmt: skip
EXACT_PRODUCT = (
    (64, 16, 64, 4, 3), (64, 32, 64, 4, 2), (64, 16, 128, 4, 2), (64, 16, 128, 8, 2), (128, 16, 64, 8, 2),
    (128, 16, 128, 8, 2), (32, 16, 64, 4, 2),
)  # fmt: skip
ACCUMULATE = (
    (64, 64, 32, 4, 2), (64, 64, 32, 4, 4), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 128, 32, 8, 3),
    (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (64, 32, 64, 4, 3), (128, 64, 64, 8, 2),
)  # fmt: skip
EXACT_ACCUMULATE = (
    (64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 128, 16, 8, 3), (128, 64, 16, 8, 3), (128, 128, 16, 8, 2),
    (64, 32, 16, 4, 3), (32, 64, 16, 4, 3),
)  # fmt: skip
SELECT = tuple(
    SelectConfig(*launch)
    for launch in itertools.product((16384, 0), (1024, 2048, 4096), (8, 16))
)  # fmt: skip
# whole, block, warps, changed rows and features at a time.
COLUMNS = tuple(
    ColumnConfig(*launch)
    for launch in (
        (16384, 1024, 16, 128, 64), (16384, 2048, 16, 64, 64), (16384, 2048, 8, 64, 64), (16384, 2048, 16, 128, 32),
        (16384, 2048, 32, 128, 64), (0, 2048, 16, 128, 64), (0, 2048, 32, 128, 64),
    )
)  # fmt: skip
PASSES = tuple(
    dataclasses.replace(configs.PASS, tile_bytes=megabytes << 20, busy_programs=programs)
    for megabytes, programs in itertools.product((8, 16, 24, 64), (0, 528, 1056, 2112))
)
DENSE_FROM = (1 / 128, 1 / 64, 1 / 48, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 8)

LAYER = 14_336, 7_500


def entries() -> list[Entry]:
    """In the order in which they are tried: what takes the most of a fit first, and a pass after what it is made of."""
    single = torch.float32
    bf16, exact, tf32 = ((single, kind) for kind in ("bf16", "exact", "tf32"))
    passes = functools.partial(layer_calls, run_pass, torch.bfloat16, products="all")
    exact_passes = functools.partial(layer_calls, run_pass, single, products="all")
    product = functools.partial(layer_calls, run_product, torch.bfloat16)
    exact_product = functools.partial(layer_calls, run_product, single)
    return [
        Entry("PASS.sweeps", (single, False), DESCENT, functools.partial(passes, sweeps=5)),
        Entry("PRODUCT", bf16, dense("parts", *PRODUCT), product),
        Entry("ACCUMULATE", bf16, dense("parts", *ACCUMULATE), passes),
        Entry("GATHER", single, GATHER, gather_calls),
        Entry("DENSE_FROM", True, DENSE_FROM, functools.partial(share_calls, torch.bfloat16)),
        Entry("PASS", None, PASSES, functools.partial(passes, sweeps=5)),
        Entry("COLUMNS", single, COLUMNS, columns_calls, tolerance=1e-2),
        Entry("SELECT", single, SELECT, select_calls),
        Entry("PRODUCT", exact, dense("ieee", *EXACT_PRODUCT), exact_product),
        Entry("ACCUMULATE", exact, dense("ieee", *EXACT_ACCUMULATE), exact_passes),
        Entry("DENSE_FROM", False, DENSE_FROM, functools.partial(share_calls, single)),
        Entry("PASS.sweeps", (single, True), MULTIPLICATIVE, functools.partial(passes, multiplicative=True)),
        Entry("DESCENT", single, DESCENT, descent_calls),
        Entry("UPDATE", (single, True), UPDATE, functools.partial(update_calls, (100, 400, 1000))),
        Entry("UPDATE", (single, False), SMALL_UPDATE, functools.partial(update_calls, (16, 32))),
        Entry("PRODUCT", tf32, dense("tf32", *PRODUCT), functools.partial(exact_product, tf32=True), 5e-3),
        Entry("ACCUMULATE", tf32, dense("tf32", *ACCUMULATE), functools.partial(exact_passes, tf32=True), 5e-3),
    ]  # fmt: skip


def run_pass(problem: tuple, tf32: bool, **options: Any) -> Tensor:
    """A pass over A: Y and A Yᵀ."""
    Y, Z, A, ZtZ = problem
    out = torch.empty_like(Y)
    with product_precision(A.device, tf32):
        result = tile_pass.coefficient_pass(Y, Z, A, ZtZ, out=out, **options)
    return torch.cat([out.flatten(), result.AYt.flatten()])


def run_product(problem: tuple, tf32: bool) -> Tensor:
    """``ZᵀA``."""
    _, Z, A, _ = problem
    with product_precision(A.device, tf32):
        return _triton.sparse_product(Z, A)


def layer_calls(run: Callable[..., Tensor], dtype: torch.dtype, tf32: bool = False, **options: Any) -> Calls:
    """Of token-major A, as hooks deliver it: products with it are dense."""
    return {
        f"k={k}": functools.partial(run, pass_problem(*size, k, dtype, token_major=True), tf32, **options)
        for size, k in shapes([(LAYER, 100), (LAYER, 400)], [((64, 70), 3)])
    }


def rows_problem(dtype: torch.dtype, keep: float) -> tuple:
    """Of neuron-major A, a share of whose rows each feature keeps."""
    return pass_problem(*shapes(LAYER, (300, 70)), shapes(100, 3), dtype, token_major=False, keep=keep)


def gather_calls() -> Calls:
    """Passes that gather rows of A of either dtype twice, of 0.5 % of them: always few enough."""
    return {
        str(dtype)[6:]: functools.partial(run_pass, rows_problem(dtype, 0.005), False, products="kept")
        for dtype in (torch.bfloat16, torch.float32)
    }


def share_calls(dtype: torch.dtype) -> Calls:
    """Products with ever larger shares of the rows of A, either side of where a dense one is faster."""
    return {
        f"keep={keep}": functools.partial(run_product, rows_problem(dtype, keep), False)
        for keep in shapes((0.01, 0.018, 0.026, 0.036, 0.05, 0.07, 0.1), (0.01, 0.1))
    }


def columns_calls() -> Calls:
    def call(problem: tuple) -> Tensor:
        return _triton.column_descent(*problem).to_dense()

    return {
        f"d={d}, k={k}": functools.partial(call, columns_problem(d, k))
        for d, k in shapes([(1536, 100), (14336, 100)], [(70, 3)])
    }


def select_calls() -> Calls:
    def call(Z: Tensor, count: int) -> Tensor:
        return _triton.winner_take_all(Z, count).indices

    generator = torch.Generator(DEVICE).manual_seed(0)
    return {
        f"d={d}, k={k}": functools.partial(
            call, torch.randn(k, d, device=DEVICE, generator=generator).T, -(-d // 100)
        )
        for d, k in shapes([(1536, 100), (14336, 100), (14336, 400)], [(70, 3)])
    }


def descent_calls() -> Calls:
    return {
        f"k={k}, n={n}": functools.partial(_triton.coordinate_descent, *update_problem(k, n))
        for k, n in shapes([(100, 7500), (400, 7500), (100, 100_000)], [(5, 70)])
    }


def update_calls(features: tuple[int, ...]) -> Calls:
    return {
        f"k={k}, n={n}": functools.partial(_triton.multiplicative_update, *update_problem(k, n))
        for k, n in shapes(list(itertools.product(features, (7500, 50_000))), [(features[0], 70)])
    }


@functools.lru_cache(maxsize=1)
def prepared(number: int) -> tuple[Calls, dict[str, Tensor]]:
    """The calls of an entry, and what the committed value computes; the last ones are kept."""
    calls = entries()[number].calls()
    return calls, {name: call() for name, call in calls.items()}


def check(number: int, candidate: int, smoke: bool) -> str | None:
    """Compiles a candidate by calling it; what is wrong with it, if anything."""
    gpu_measure.SMOKE = smoke
    entry = entries()[number]
    try:
        calls, wanted = prepared(number)
        with changed(entry, entry.candidates[candidate]):
            for name, call in calls.items():
                error = error_of(call(), wanted[name])
                # NaN is no error that may pass.
                if not error <= entry.tolerance:
                    return f"{name}: error {error:.1e}"
    # Whatever a compiler or a launch may throw is a reason not to take this candidate, and is reported with it.
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def check_all(work: list[tuple[int, int]], seconds: float, workers: int) -> dict[tuple[int, int], str | None]:
    """What is wrong with each of these candidates, None if nothing, for as many as were compiled in that time."""
    if workers == 0:
        return {
            (number, candidate): check(number, candidate, gpu_measure.SMOKE) for number, candidate in work
        }
    done: dict[tuple[int, int], str | None] = {}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(check, *item, gpu_measure.SMOKE): item for item in work}
        wait(futures, timeout=seconds)
    finally:
        # What is being compiled ends first, so that nothing else uses the GPU when times are taken.
        pool.shutdown(cancel_futures=True)
    for future, item in futures.items():
        if not future.cancelled():
            # An exception here is that the process died, for those in ``check`` are caught there.
            died = future.exception()
            done[item] = future.result() if died is None else str(died)
    print(f"{len(done)} of {len(work)} values were compiled")
    return done


def ratio(entry: Entry, value: Any, committed: Any, calls: Calls) -> tuple[float, dict[str, list[float]]]:
    """The time of a value by that of the committed one, and median milliseconds of both for each call."""
    times = {}
    for name, call in calls.items():
        medians = []
        for tried in (committed, value):
            with changed(entry, tried):
                medians.append(statistics.median(milliseconds(call, repeat=7, warmup=2)))
        times[name] = medians
    logs = [math.log(new / old) for old, new in times.values()]
    return math.exp(statistics.mean(logs)), times


def tuned(seconds: float, workers: int, most: int | None) -> Iterator[dict[str, Any]]:
    """Finds the best value of each entry and leaves it in the table; yields what was measured."""
    start = time.perf_counter()
    table = entries()
    work = [
        (number, candidate)
        for number, entry in enumerate(table)
        for candidate, value in enumerate(entry.candidates[:most])
        if value != entry.value()
    ]
    wrong = check_all(work, COMPILING * seconds, workers)
    for number, entry in enumerate(table):
        committed = best = entry.value()
        least, tried = 1 - GAIN, []
        calls = entry.calls()
        for candidate in (candidate for n, candidate in work if n == number):
            value = entry.candidates[candidate]
            row = {
                "value": entry.show(value),
                "wrong": wrong.get((number, candidate), "not compiled in time"),
            }
            if row["wrong"] is None and time.perf_counter() - start > seconds:
                row["wrong"] = "no time was left"
            if row["wrong"] is None:
                row["share"], row["ms"] = ratio(entry, value, committed, calls)
                if row["share"] <= least:
                    least, best = row["share"], value
            tried.append(row)
        result = {"entry": entry.name, "committed": entry.show(committed), "tried": tried, "share": 1.0}
        if best is not committed:
            # The least of many is less than it should be by chance; once more says what it is.
            result["share"], result["ms"] = ratio(entry, best, committed, calls)
            if result["share"] > 1 - GAIN:
                best = committed
        entry.put(best)
        yield result | {"best": entry.show(best)}


def text_of(value: Any) -> str:
    """A value as configs.py writes it: positional, without what is the default."""
    if not dataclasses.is_dataclass(value):
        return json.dumps(value)
    fields = list(dataclasses.fields(value))
    while fields and fields[-1].default == getattr(value, fields[-1].name):
        fields.pop()
    return f"{type(value).__name__}({', '.join(json.dumps(getattr(value, field.name)) for field in fields)})"


def node_of(tree: ast.Module, table: str, key: Hashable) -> ast.expr:
    """Where a value is in the source of the table."""
    name, *attributes = table.split(".")
    values: dict[str, ast.expr] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            values[ast.unparse(target)] = statement.value
    node = values[name]
    for attribute in attributes:
        assert isinstance(node, ast.Call)
        node = next(keyword.value for keyword in node.keywords if keyword.arg == attribute)
    if key is None:
        return node
    assert isinstance(node, ast.Dict)
    # In the order in which they are written.
    return node.values[list(attrgetter(table)(configs)).index(key)]


def rewritten(source: str, table: str, key: Hashable, before: Any, after: Any) -> str:
    """The source of the table with one value replaced, and nothing else: of one with names, those that differ."""
    node = node_of(ast.parse(source), table, key)
    if isinstance(node, ast.Call) and node.keywords:
        changes = [
            (keyword.value, getattr(after, keyword.arg))
            for keyword in node.keywords
            if keyword.arg and getattr(after, keyword.arg) != getattr(before, keyword.arg)
        ]
    else:
        changes = [(node, after)]
    # Positions count bytes. The last change first, so that those before it stay where they are.
    lines = source.encode().splitlines(keepends=True)
    begins = list(itertools.accumulate((len(line) for line in lines), initial=0))
    content = source.encode()
    for place, value in reversed(changes):
        assert place.end_lineno is not None
        assert place.end_col_offset is not None
        start = begins[place.lineno - 1] + place.col_offset
        end = begins[place.end_lineno - 1] + place.end_col_offset
        content = content[:start] + text_of(value).encode() + content[end:]
    return content.decode()


def table_with(committed: list[Any]) -> str:
    """The source of the table with the values that entries have now; ``committed`` are those that it has."""
    source = TABLE.read_text()
    pairs = list(zip(entries(), committed, strict=True))
    if all(entry.value() == before for entry, before in pairs):
        return source
    for entry, before in pairs:
        # One that is written as another's value would change with that one.
        by_reference = isinstance(node_of(ast.parse(source), entry.table, entry.key), ast.Subscript)
        if by_reference or entry.value() != before:
            source = rewritten(source, entry.table, entry.key, before, entry.value())
    return source


def found(row: dict[str, Any]) -> str:
    """What became of an entry, in words."""
    if row["best"] == row["committed"]:
        return f"stays {row['best']}"
    return f"{row['best']} takes {row['share']:.2f} of the time of {row['committed']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60, help="for all entries together; default: 60")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name} in place as well")
    parser.add_argument(
        "--smoke", action="store_true", help="two candidates of each on tiny shapes, also without a GPU"
    )
    arguments = parser.parse_args()
    gpu_measure.SMOKE = arguments.smoke
    if DEVICE == "cpu" and not arguments.smoke:
        parser.error("torch finds no GPU here; --smoke tries the script out on the CPU")
    committed = [entry.value() for entry in entries()]
    rows = []
    report = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (smoke test)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": rows,
    }
    for row in tuned(arguments.seconds, 0 if arguments.smoke else WORKERS, 2 if arguments.smoke else None):
        rows.append(row)
        write_json(arguments.out / "tune.json", report)
        measured = sum("share" in tried for tried in row["tried"])
        print(f"{row['entry']:<36} {measured:>2} measured: {found(row)}", flush=True)
    source = table_with(committed)
    write_text(arguments.out / TABLE.name, source)
    if arguments.write:
        write_text(TABLE, source)


if __name__ == "__main__":
    sys.exit(main())
