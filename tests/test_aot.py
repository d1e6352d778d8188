"""Every Triton kernel and configuration compiles for three targets without a GPU, within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# By kernel and dtype: registers on NVIDIA (255 would hide spills), and bytes of shared memory that two
# programs per multiprocessor of an sm_80 (164 KB) have room for. Wide loads: at least this many 128-bit or
# 64-bit vector loads or copies.
BOUNDS = {
    "multiplicative_update-fp32-small": (200, 40_000, 4),
    "multiplicative_update-fp32-large": (254, 80_000, 4),
    "multiplicative_update-fp64-small": (128, 40_000, 4),
    "multiplicative_update-fp64-large": (128, 40_000, 4),
    "winner_take_all-fp32": (200, 40_000, 4),
    "winner_take_all-fp64": (220, 40_000, 4),
}
TARGETS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {(row["kernel"], row["target"]): row for row in rows}


def test_every_configuration_is_covered(compiled):
    assert set(compiled) == {(kernel, target) for kernel in BOUNDS for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", BOUNDS)
def test_resources(compiled, kernel, target):
    row = compiled[kernel, target]
    registers, shared, wide_loads = BOUNDS[kernel]
    assert row["stack"] == 0, "registers were spilled"
    assert row["registers"] <= registers
    assert row["shared"] <= shared
    assert row["wide_loads"] >= wide_loads
