"""Compilers: what setup.py says of missing and old ones, and the CPU kernels of others than this machine's.

The oldest g++ that setup.py promises, and a cross-compiler for aarch64, with setup.py's flags and warnings as errors.
What they make runs the cases of ``csrc/kernels_sanitized.cpp``, without sanitizers, on emulated processors: the v2
kernels on one that has no AVX, where an instruction of a higher level ends the process, and the baseline ones on
aarch64. Of the module itself only compiling is tried for aarch64, not loading: that would take a torch for aarch64.
``.ci/run`` installs what this needs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGES = "g++-11 g++-aarch64-linux-gnu qemu-user"
X86 = platform.machine().lower() in ("x86_64", "amd64")

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", f"-I{CSRC}"]
# Those of this Python, which are of the same size on both processors, and pybind11 as torch ships it.
MODULE = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
MODULE += ["-DSNMF_VERSION=0", "-DSNMF_COMPILER=none"]


class Target(NamedTuple):
    compiler: str
    sources: dict[str, list[str]]  # with their own flags
    emulator: list[str]
    level: str  # the only one that the emulated processor has
    link: list[str]


TARGETS = {
    "x86-64 without AVX": Target(
        "g++-11",
        {f"isa_{level}.cpp": [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")},
        ["qemu-x86_64", "-cpu", "Nehalem"],
        "v2",
        [],
    ),
    # Static, so that it does not matter where the other processor's libraries lie.
    "aarch64": Target(
        "aarch64-linux-gnu-g++", {"isa_baseline.cpp": []}, ["qemu-aarch64"], "baseline", ["-static"]
    ),
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # The cases use more threads than there are processors.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_of(name, tmp_path):
    target = TARGETS[name]
    missing = [tool for tool in (target.compiler, target.emulator[0]) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', no '.join(missing)} (Debian: apt-get install {PACKAGES})")
    if target.level == "v2" and not X86:
        pytest.skip(f"{target.compiler} does not compile for x86-64 here")
    program = build(target, tmp_path)
    assert run(*target.emulator, program).stdout.strip() == target.level
    runs = {f"{name}, emulated": run(*target.emulator, program, target.level)}
    if target.level == "v2":
        runs |= {level: run(program, level) for level in run(program).stdout.strip().split(",")}
    for where, cases in runs.items():
        assert cases.returncode == 0, f"{where}: {cases.stdout[-2000:]}{cases.stderr[-2000:]}"
        # Eight kernels in two types.
        assert cases.stdout.count(" calls, worst error") == 16, f"{where}: {cases.stdout}"


def build(target: Target, folder: Path) -> Path:
    """The driver with the target's kernels; the module's own file is compiled, but not linked."""
    jobs = {CSRC / name: [*FLAGS, *flags] for name, flags in target.sources.items()}
    jobs[CSRC / "dispatch.cpp"] = FLAGS
    jobs[CSRC / "bindings.cpp"] = [*FLAGS, *MODULE]
    jobs[ROOT / "tests/csrc/kernels_sanitized.cpp"] = [*FLAGS, "-O1"]

    def compile_one(source: Path) -> Path:
        made = run(target.compiler, *jobs[source], "-c", source, "-o", folder / f"{source.stem}.o")
        assert made.returncode == 0, made.stderr
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [made for made in pool.map(compile_one, jobs) if made.stem != "bindings"]
    made = run(target.compiler, "-fopenmp", *target.link, *objects, "-o", folder / "kernels")
    assert made.returncode == 0, made.stderr
    return folder / "kernels"


@pytest.fixture
def setup(tmp_path):
    """Runs setup.py build_ext with these variables, as pip does, with a stand-in for pybind11."""
    (tmp_path / "pybind11.py").write_text("def get_include():\n    return ''\n")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]

    def run_setup(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "SNMF_CUDA": "0"} | variables
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)

    return run_setup


def test_a_missing_compiler_is_said_in_a_few_lines(setup):
    made = setup(CXX="no-such-compiler")
    assert made.returncode == 1
    assert "there is no C++ compiler (no-such-compiler is not found)" in made.stderr
    for advice in (
        "g++ 11 or newer",
        "apt install g++",
        "dnf install gcc-c++",
        "conda install gxx",
        "xcode-select",
    ):
        assert advice in made.stderr
    assert "SNMF_EXTENSION=0" in made.stderr
    assert made.stderr.count("\n") < 12


def test_a_failing_compiler_is_named_before_its_own_messages(setup, tmp_path):
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\ncase "$*" in -dump*) echo 9.4.0;; *) echo bad value >&2; exit 1;; esac\n')
    old.chmod(0o755)
    made = setup(CXX=str(old))
    assert made.returncode == 1
    named = made.stderr.index("compiling with old-g++-9.4.0; needed: g++ 11 or newer")
    failed = made.stderr.index("old-g++-9.4.0 failed, its messages are above")
    assert named < made.stderr.index("bad value") < failed
    assert "Traceback" not in made.stderr


def test_the_extension_can_be_left_out(setup):
    assert setup(SNMF_EXTENSION="0", CXX="no-such-compiler").returncode == 0
    refused = setup(SNMF_EXTENSION="no")
    assert refused.returncode == 1
    assert "SNMF_EXTENSION: wanted 0 or 1, got 'no'" in refused.stderr
