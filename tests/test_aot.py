"""Every Triton kernel and configuration compiles for three targets without a GPU, within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# By kernel, dtype, dtype of A and layout: registers of a thread (255 would hide spills), bytes of shared memory, and at
# least this many 128-bit loads or copies. Each a little above (below) the most (least) of all targets; shared memory
# leaves room for two programs on a multiprocessor of an sm_80 (164 KB) everywhere.
BOUNDS = {
    "multiplicative_update-fp32-small": (254, 16_000, 7),
    "multiplicative_update-fp32-large": (254, 40_000, 11),
    "multiplicative_update-fp64-small": (128, 16_000, 7),
    "multiplicative_update-fp64-large": (128, 16_000, 7),
    "coordinate_descent-fp32": (144, 8_000, 6),
    "coordinate_descent-fp64": (200, 8_000, 8),
    "winner_take_all-fp32": (72, 20_000, 4),
    "winner_take_all-fp32-long": (72, 20_000, 0),
    "winner_take_all-fp64": (84, 20_000, 5),
    "winner_take_all-fp64-long": (84, 20_000, 3),
    "column_descent-fp32": (128, 20_000, 0),
    "column_descent-fp32-long": (112, 20_000, 0),
    "column_descent-fp64": (128, 20_000, 2),
    "column_descent-fp64-long": (128, 20_000, 4),
    "product-fp32-bf16": (168, 32_000, 9),
    "product-fp32-bf16-token_major": (168, 32_000, 9),
    "product-fp32-fp32": (128, 20_000, 4),
    "product-fp32-fp32-token_major": (144, 20_000, 4),
    "product-fp32-fp32-tf32": (136, 50_000, 12),
    "product-fp32-fp32-tf32-token_major": (136, 50_000, 12),
    "product-fp64-fp64": (88, 16_000, 6),
    "product-fp64-fp64-token_major": (88, 16_000, 6),
    "accumulate-fp32-bf16": (168, 36_000, 8),
    "accumulate-fp32-bf16-token_major": (176, 36_000, 8),
    "accumulate-fp32-fp32": (144, 24_000, 10),
    "accumulate-fp32-fp32-token_major": (120, 24_000, 10),
    "accumulate-fp32-fp32-tf32": (136, 42_000, 19),
    "accumulate-fp32-fp32-tf32-token_major": (136, 42_000, 19),
    "accumulate-fp64-fp64": (88, 16_000, 8),
    "accumulate-fp64-fp64-token_major": (88, 16_000, 8),
    "gather-fp32-bf16": (64, 4_000, 1),
    "gather-fp32-fp32": (64, 4_000, 2),
    "gather-fp64-fp64": (64, 4_000, 2),
    "accumulate_kept-fp32-bf16": (80, 4_000, 2),
    "accumulate_kept-fp32-fp32": (96, 4_000, 4),
    "accumulate_kept-fp64-fp64": (80, 4_000, 4),
    "sweep-fp32-descent": (254, 8_000, 31),
    "sweep-fp64-descent": (254, 8_000, 45),
    "sweep-fp32-multiplicative": (168, 16_000, 14),
    "sweep-fp64-multiplicative": (144, 16_000, 26),
    "residual-fp32-bf16": (96, 20_000, 6),
    "residual-fp64-fp64": (80, 16_000, 5),
    "copy_if-fp32": (64, 0, 4),
    "copy_if-fp64": (144, 0, 8),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The products whose float32 operand goes to tensor cores in three bfloat16 parts.
IN_PARTS = [kernel for kernel in BOUNDS if kernel.startswith(("product-fp32-bf16", "accumulate-fp32-bf16"))]
# Those that a user allows to round float32 to 11 bits.
IN_TF32 = [kernel for kernel in BOUNDS if "-tf32" in kernel]
# Those that are compiled once more for numbers of tokens that 16 does not divide.
RAGGED = [
    kernel
    for kernel in BOUNDS
    if "-fp32" in kernel
    and kernel.startswith(("multiplicative", "coordinate", "product", "accumulate-", "sweep"))
]


def compile_all(*arguments):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {(row["kernel"], row["target"]): row for row in rows}


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def assert_within_bounds(row):
    registers, shared, wide_loads = BOUNDS[row["kernel"]]
    assert row["stack"] == 0, "registers were spilled"
    # On gfx942, of the kernel with the most addresses.
    assert row["scalar_spills"] <= (40 if row["kernel"].startswith("column_descent") else 0)
    assert row["registers"] <= registers
    assert row["shared"] <= shared
    assert row["wide_loads"] >= wide_loads


def assert_within_bounds_without_aligned_rows(row):
    kernel = row["kernel"].removesuffix("-ragged")
    # The large tile of the update is at the limit where rows are aligned.
    assert row["stack"] <= (192 if kernel == "multiplicative_update-fp32-large" else 0), (
        "registers were spilled"
    )
    assert row["shared"] <= BOUNDS[kernel][1]
    assert (row["reduced"] > 0) == (kernel in IN_PARTS + IN_TF32)


def assert_float32_is_float32(row):
    kernel = row["kernel"]
    if kernel in IN_TF32:
        assert row["reduced"] >= 1
        return
    if kernel not in IN_PARTS:
        assert row["reduced"] == 0, row["opcodes"]
        return
    assert row["reduced"] >= 3, "three parts"
    # Tensor cores, which round towards zero, add up one block alone; what accumulates adds its sums to memory, too.
    of_a_thread = 64 * 64 // (256 if row["target"] == "gfx942" else 128)
    wanted = of_a_thread * (2 if kernel.startswith("accumulate") else 1)
    assert row["additions"] >= wanted, "sums were left to tensor cores"
    assert not [opcode for opcode in row["opcodes"] if "tf32" in opcode]


# The smallest kernel for every target, and one whose products go to tensor cores in parts, in each layout.
@pytest.mark.parametrize(("words", "count"), [(("copy_if",), 8), (("product-fp32-bf16", "sm_90"), 4)])
def test_a_few(words, count):
    rows = compile_all(*words).values()
    assert len(rows) == count
    for row in rows:
        if row["kernel"].endswith("-ragged"):
            assert_within_bounds_without_aligned_rows(row)
        else:
            assert_within_bounds(row)
            assert_float32_is_float32(row)


@pytest.mark.slow
class TestAll:
    """Minutes of compiling, unless Triton has kept what it compiled before."""

    def test_sizes_of_one_compile(self):
        assert {kernel for kernel, _ in compile_all("ones")} >= set(BOUNDS)

    def test_every_configuration_is_covered(self, compiled):
        ragged = [f"{kernel}-ragged" for kernel in RAGGED]
        assert set(compiled) == {(kernel, target) for kernel in (*BOUNDS, *ragged) for target in TARGETS}

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("kernel", RAGGED)
    def test_resources_without_aligned_rows(self, compiled, kernel, target):
        assert_within_bounds_without_aligned_rows(compiled[f"{kernel}-ragged", target])

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("kernel", BOUNDS)
    def test_resources(self, compiled, kernel, target):
        assert_within_bounds(compiled[kernel, target])

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("kernel", BOUNDS)
    def test_float32_is_float32(self, compiled, kernel, target):
        assert_float32_is_float32(compiled[kernel, target])
