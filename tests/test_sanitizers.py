"""All CPU kernels of every instruction level under AddressSanitizer and UndefinedBehaviorSanitizer.

``csrc/kernels_sanitized.cpp`` holds the cases; see there. Here it is built, run, and proven able to fail.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# They take half a minute to compile. tests/test_operations.py has every level's kernels at awkward sizes.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests/csrc/kernels_sanitized.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
KERNELS = ["multiplicative_update", "coordinate_descent", "winner_take_all", "sparse_product"]
KERNELS += ["coefficient_pass", "column_descent", "ridge_solve", "support_solve"]

SANITIZE = ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# As in setup.py, but for -O3: without optimisation every access that is written is checked, and compiling, which most
# of the time goes into, takes 4 s a level, where -O1 takes 9 s. -g1 names lines, which is all that a report needs.
FLAGS = ["-std=c++17", "-O0", "-g1", "-Wno-psabi", "-Wno-unknown-pragmas", *SANITIZE, f"-I{ROOT / 'csrc'}"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

# LeakSanitizer needs ptrace, which a container may forbid: does it find these? Several, for the last one's address may
# still lie in a register.
LEAKS = """
#include <cstdlib>
void* volatile lost;
int main() {
    for (int i = 0; i < 10; ++i) lost = std::malloc(1);
    lost = nullptr;
}
"""


def compile_objects(folder: Path) -> list[Path]:
    """The levels, the dispatcher and the driver, side by side."""
    jobs: dict[Path, list[str]] = {}
    for source in sorted(ROOT.glob("csrc/isa_*.cpp")):
        level = source.stem.removeprefix("isa_")
        if (level == "baseline") != X86:
            jobs[source] = [f"-march=x86-64-{level}"] if X86 else []
    jobs[DRIVER] = jobs[ROOT / "csrc/dispatch.cpp"] = []

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *jobs[source], "-c", str(source), "-o", str(target)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


class Program:
    """The driver, and the options that it can run with here."""

    def __init__(self, folder: Path):
        probe = folder / "probe.cpp"
        probe.write_text(LEAKS)
        self.path = folder / "probe"
        made = subprocess.run(
            [COMPILER, *SANITIZE, str(probe), "-o", str(self.path)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"{COMPILER} cannot link OpenMP with the sanitizers' runtime: {made.stderr.strip()}")
        self.finds_leaks = True
        self.finds_leaks = "detected memory leaks" in self.run().stderr
        self.path = folder / "kernels_sanitized"
        objects = map(str, compile_objects(folder))
        subprocess.run([COMPILER, *SANITIZE, *objects, "-o", str(self.path)], check=True)
        self.levels = self.run().stdout.strip().split(",")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.clean_runs = dict(zip(self.levels, pool.map(self.run, self.levels), strict=True))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # More threads than processors: waiting must not burn what the others need.
        environment = os.environ | {
            "ASAN_OPTIONS": f"detect_leaks={self.finds_leaks:d}",
            "OMP_WAIT_POLICY": "passive",
        }
        return subprocess.run(
            [self.path, *arguments], capture_output=True, text=True, timeout=300, env=environment
        )


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return Program(tmp_path_factory.mktemp("sanitized"))


def reports(stdout: str) -> dict[tuple[str, str], tuple[int, list[str]]]:
    """(type, kernel) → (calls, names of the arguments), from what a clean run prints."""
    pattern = r"\w+ (f32|f64) (\w+): (\d+) calls, worst error \S+, arguments (.*)"
    found = re.findall(pattern, stdout)
    return {(dtype, kernel): (int(calls), names.split()) for dtype, kernel, calls, names in found}


def test_kernels_are_clean_and_right(program):
    for level, run in program.clean_runs.items():
        assert run.returncode == 0, f"{level}: {run.stdout[-2000:]}{run.stderr[-8000:]}"
        calls = {kernel: calls for kernel, (calls, _) in reports(run.stdout).items()}
        assert set(calls) == {(dtype, kernel) for dtype in ("f32", "f64") for kernel in KERNELS}
        assert min(calls.values()) >= 100


FAULTS = {
    "short": r"AddressSanitizer: heap-buffer-overflow",
    "misaligned": r"runtime error: load of misaligned address",
    "idle": r"wrong: .*(wanted|written)",
    "smear": r"wrong: .*written behind the end of row 0",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found(program, kind):
    level = program.levels[-1]
    arguments = [
        f"{kernel}.{name}"
        for (dtype, kernel), (_, names) in reports(program.clean_runs[level].stdout).items()
        for name in names
        if dtype == "f32"
    ]
    targets = {
        "short": arguments,
        # The others are read by memcpy, or by vectors that need no more than they get.
        "misaligned": ["coordinate_descent.ZtZ", "winner_take_all.Z", "sparse_product.values"],
        "idle": KERNELS,
        "smear": ["multiplicative_update", "coordinate_descent", "coefficient_pass"],
    }[kind]
    assert targets
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda target: program.run(level, f"{kind}:{target}"), targets)
        for target, run in zip(targets, runs, strict=True):
            printed = run.stdout + run.stderr
            # By the kernel, not by the driver's own reading and writing.
            place = rf"(while running|wrong:) {level} f32 {target.split('.')[0]}, "
            assert run.returncode != 0, f"{kind}:{target} went unnoticed"
            assert re.search(FAULTS[kind], printed), printed
            assert re.search(place, printed), printed
