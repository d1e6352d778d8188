"""Builds snmf_kernels._C. Everything that does not need a compiler is in pyproject.toml.

SNMF_CUDA=auto|0|1   auto (default): CUDA code when a toolkit is found and works; 0: never; 1: a failure is an error.
SNMF_CUDA_ARCHS      compute capabilities, default "80;90" (the last one is also embedded as PTX).
SNMF_EXTENSION=1|0   0: nothing is compiled, and everything runs in plain torch, several times slower.
CXX                  the C++ compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).parent
CSRC = Path("csrc")
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "snmf_kernels/_version.py").read_text())[1]
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Instruction levels: the file and its compiler flag. Target-wide flags would put newer instructions into code that runs
# before the level is chosen, so each level is a file of its own.
LEVELS = (
    {f"isa_{level}.cpp": [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
    if X86
    else {"isa_baseline.cpp": []}
)
# No -ffast-math: NaN and infinity must stay visible. sqrt needs no errno, and may be vectorised then.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]

# The lowest versions that the code has been built and tested with.
NEEDED = "g++ 11 or newer, or clang++ 14 or newer with its OpenMP library (Debian: libomp-dev)"
HELP = f"""\
snmf_kernels: {{reason}}. Needed are Python's headers and a C++ compiler: {NEEDED}.
    Debian, Ubuntu  apt install g++ python3-dev
    Fedora, RHEL    dnf install gcc-c++ python3-devel
    conda           conda install gxx
    macOS           xcode-select --install
CXX=... names a compiler elsewhere. With SNMF_EXTENSION=0 in the environment nothing is compiled: everything then runs
in plain torch, several times slower on a CPU."""


class NoToolkit(Exception):
    """CUDA code cannot be built here; the text says why."""


def static_runtime(toolkit: Path) -> Path | None:
    """libcudart_static.a of this toolkit for this machine."""
    machine = "sbsa" if platform.machine() == "aarch64" else platform.machine()
    for folder in ("lib64", "lib", f"targets/{machine}-linux/lib", f"lib/{platform.machine()}-linux-gnu"):
        if (toolkit / folder / "libcudart_static.a").is_file():
            return toolkit / folder / "libcudart_static.a"
    return None


def find_toolkit() -> tuple[Path, str]:
    """(toolkit folder, release) of the first usable CUDA toolkit."""
    # nvcc on the PATH may be a wrapper script outside of its toolkit, so it comes last.
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(str(Path(on_path).resolve().parent.parent))
    incomplete = []
    for folder in map(Path, filter(None, candidates)):
        nvcc = folder / "bin" / "nvcc"
        if not nvcc.is_file():
            continue
        if static_runtime(folder) is None:
            incomplete.append(f"{folder} has nvcc but no libcudart_static.a")
            continue
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+\.\d+)", printed.stdout)
        if not printed.returncode and release:
            return folder, release[1]
        incomplete.append(f"{nvcc} --version failed: {printed.stderr.strip() or printed.stdout.strip()}")
    if incomplete:
        raise NoToolkit("; ".join(incomplete))
    raise NoToolkit("no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda or on the PATH")


class Build(build):
    """The extension first: what it fails for is not to be looked for behind a hundred lines about copied files."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class BuildKernels(build_ext):
    """Per-file instruction levels, compiled side by side, and CUDA objects linked into the same module."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        compiler = self.compiler_version()
        python_headers = Path(sysconfig.get_path("include"))
        if not (python_headers / "Python.h").is_file():
            raise SystemExit(HELP.format(reason=f"no Python.h in {python_headers}"))
        from pybind11 import get_include  # not for SNMF_EXTENSION=0

        # Before what the compiler itself says: of an old one that is no more than that it knows no such option.
        print(f"snmf_kernels: compiling with {compiler}; needed: {NEEDED}", file=sys.stderr)
        include = [get_include(), str(CSRC)]
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        macros = [("SNMF_VERSION", VERSION), ("SNMF_COMPILER", compiler)]
        objects, libraries = [], []
        cuda = self.build_cuda(build)
        if cuda:
            cuda_objects, cuda_macros, link = cuda
            objects += cuda_objects
            macros += cuda_macros
            libraries += link

        jobs = {name: [*FLAGS, *WARNINGS, *openmp, *flags] for name, flags in LEVELS.items()}
        jobs["dispatch.cpp"] = jobs["bindings.cpp"] = [*FLAGS, *WARNINGS, *openmp]

        def compile_one(job: tuple[str, list[str]]) -> list[str]:
            name, flags = job
            return self.compiler.compile(
                [str(CSRC / name)],
                output_dir=str(build),
                macros=macros,
                include_dirs=[*include, *self.compiler.include_dirs],
                extra_postargs=flags,
            )

        try:
            with ThreadPoolExecutor() as pool:
                for made in pool.map(compile_one, jobs.items()):
                    objects += made
            self.compiler.link_shared_object(
                objects,
                self.get_ext_fullpath(ext.name),
                libraries=libraries,
                extra_postargs=openmp,
                target_lang="c++",
                build_temp=str(build),
            )
        except (CompileError, LinkError) as error:
            raise SystemExit(HELP.format(reason=f"{compiler} failed, its messages are above")) from error

    def compiler_version(self) -> str:
        """Name and version of the compiler, which must be there."""
        command = (getattr(self.compiler, "compiler_cxx", None) or ["c++"])[0]
        if shutil.which(command) is None:
            raise SystemExit(HELP.format(reason=f"there is no C++ compiler ({command} is not found)"))
        # The first is gcc's option for all three numbers, the second clang's.
        printed = subprocess.run(
            [command, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
        )
        return f"{Path(command).name}-{printed.stdout.strip() or 'unknown'}"

    def build_cuda(self, build: Path) -> tuple[list[str], list[tuple[str, str]], list[str]] | None:
        """Objects, macros and libraries of the CUDA part, or None if it is left out."""
        wanted = os.environ.get("SNMF_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"SNMF_CUDA: wanted auto, 0 or 1, got {wanted!r}")
        if wanted == "0":
            return None
        try:
            return self.compile_cuda(build)
        except NoToolkit as reason:
            if wanted == "1":
                raise SystemExit(f"SNMF_CUDA=1, but CUDA code cannot be built: {reason}") from reason
            print(f"snmf_kernels: building without CUDA code: {reason}", file=sys.stderr)
            return None

    def compile_cuda(self, build: Path) -> tuple[list[str], list[tuple[str, str]], list[str]]:
        toolkit, release = find_toolkit()
        archs = [
            arch.strip() for arch in os.environ.get("SNMF_CUDA_ARCHS", "80;90").split(";") if arch.strip()
        ]
        if not archs:
            raise SystemExit("SNMF_CUDA_ARCHS: wanted compute capabilities such as '80;90', got nothing")
        target = build / "ridge.o"
        sources = [CSRC / name for name in ("ridge.cu", "plan.hpp", "ridge.hpp", "ladder.hpp", "cuda.hpp")]
        command = [
            str(toolkit / "bin" / "nvcc"),
            "-O3",
            "-std=c++17",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
        ]
        command += ["-c", str(sources[0]), "-o", str(target), "--threads", "0"]
        named = os.environ.get("CXX", "").split()
        if len(named) == 1:  # more is a wrapper or options, which nvcc does not take
            command += ["-ccbin", named[0]]
        for arch in archs:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        newest = max(path.stat().st_mtime for path in sources)
        stamp = build / "ridge.command"
        fresh = target.is_file() and target.stat().st_mtime > newest
        if not (fresh and stamp.is_file() and stamp.read_text() == " ".join(command)):
            print(" ".join(command))
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise NoToolkit(f"nvcc failed:\n{made.stderr or made.stdout}")
            stamp.write_text(" ".join(command))
        macros = [
            ("SNMF_WITH_CUDA", "1"),
            ("SNMF_CUDA_VERSION", release),
            ("SNMF_CUDA_ARCHITECTURES", "_".join(f"sm_{arch}" for arch in archs) + f"_compute_{archs[-1]}"),
        ]
        return [str(target), str(static_runtime(toolkit))], macros, ["dl", "rt", "pthread"]


def extensions() -> list[Extension]:
    wanted = os.environ.get("SNMF_EXTENSION", "1")
    if wanted not in ("0", "1"):
        raise SystemExit(f"SNMF_EXTENSION: wanted 0 or 1, got {wanted!r}")
    return [Extension("snmf_kernels._C", [str(CSRC / "bindings.cpp")])] if wanted == "1" else []


setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": BuildKernels})
