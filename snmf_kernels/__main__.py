"""``python -m snmf_kernels``: what was built, and which backends run here."""

from __future__ import annotations

import importlib.metadata
import platform

import numpy as np
import torch

from . import _backends
from ._version import __version__


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _facts() -> list[tuple[str, list[tuple[str, str]]]]:
    versions = [
        ("snmf-kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    versions += [("numpy", np.__version__)]
    versions += [(name, _version_of(name)) for name in ("safetensors", "triton", "transformers")]
    module = _backends.compiled_module()
    try:
        info = None if isinstance(module, str) else module.build_info()
    except ValueError as error:  # SNMF_CPU_ISA names no level
        module, info = str(error), None
    if info is None:
        build = [("extension", str(module)), ("speed", _backends.WITHOUT_EXTENSION)]
    else:
        build = [
            ("compiler", info["compiler"]),
            ("CPU levels", f"{info['levels']} usable here, {info['level']} in use (SNMF_CPU_ISA caps it)"),
            ("OpenMP", "yes" if info["openmp"] else "no"),
            (
                "CUDA code",
                f"{info['cuda']} for {info['cuda_architectures'].replace('_', ' ')}"
                if info["cuda"]
                else "none",
            ),
        ]
    machine = [("platform", platform.platform()), ("threads", str(torch.get_num_threads()))]
    if torch.cuda.is_available():
        machine += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    return [
        ("Versions", versions),
        ("Build", build),
        ("Machine", machine),
        ("Backends", list(_backends.report().items())),
    ]


def main() -> None:
    """Prints the page."""
    for title, rows in _facts():
        print(title)
        for name, value in rows:
            print(f"  {name:<14}{value}")


if __name__ == "__main__":
    main()
