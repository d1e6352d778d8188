"""The CUDA solves' algorithms on host threads, watched by ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def build(folder: Path, *flags: str) -> Path:
    program = folder / "ridge_threads"
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *flags]
    command += ["-I", str(ROOT / "csrc"), str(ROOT / "tests/csrc/ridge_threads.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.slow_where(lambda sanitizer: sanitizer != "thread")
def test_right_and_without_races(tmp_path, sanitizer):
    run = subprocess.run(
        [build(tmp_path, f"-fsanitize={sanitizer}")], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert float(run.stdout.removeprefix("worst residual")) < 1e-5


# Between a column of the factor and its use; before a system is read anew; between two systems of a list.
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("barrier", [1, 2, 3])
def test_a_missing_barrier_is_found(tmp_path, barrier):
    program = build(tmp_path, "-fsanitize=thread", f"-DSNMF_TEST_DROP_BARRIER={barrier}")
    # Threads that disagree about what they have read would wait for each other in the end.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run([program], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode != 0
    assert "data race" in run.stderr
