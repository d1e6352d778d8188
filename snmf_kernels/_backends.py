"""The only place that chooses a backend, and says why one was refused.

A *backend* is a module with functions named like those of ``reference``. ``choose`` is a pure function of its
arguments and the machine: a backend that was named runs or raises, only ``"auto"`` falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._checks import dtype_name

OPERATIONS = (
    "multiplicative_update",
    "coordinate_descent",
    "winner_take_all",
    "sparse_product",
    "coefficient_pass",
    "column_descent",
    "ridge_solve",
    "support_solve",
    "copy_if",
)
# What is solved in float64, whatever the rest computes in.
SOLVES = ("ridge_solve", "support_solve")
# In order of preference.
BACKENDS = ("cpp", "triton", "cuda", "torch")
PROVIDES = {
    # On a CPU nothing waits: torch copies as well.
    "cpp": tuple(name for name in OPERATIONS if name != "copy_if"),
    "triton": tuple(name for name in OPERATIONS if name not in SOLVES),
    "cuda": SOLVES,
    "torch": OPERATIONS,
}
# What completes a backend that does not provide every operation of `fit`.
COMPANIONS = {"cpp": ("torch",), "triton": ("cuda", "torch"), "cuda": ("triton", "torch"), "torch": ()}
# Measured on the default fit of 1,536 x 4,000 in float32, k = 100, backend="torch" against "cpp" in one process, two
# cores of an AMD EPYC (Zen 5, AVX-512), torch 2.13 (MKL): 4.7 to 5.5 times on planted features, 9.7 on noise.
WITHOUT_EXTENSION = (
    "snmf_kernels runs without its compiled kernels, and a fit on a CPU takes 5 to 10 times as long"
)
_MODULES = {"cpp": "_cpp", "triton": "_triton", "cuda": "_cuda", "torch": "reference"}


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here; the text says why and what to do."""


class Choice(NamedTuple):
    """A chosen backend and its function for one operation."""

    backend: str
    function: Callable[..., Any]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def compiled_module() -> ModuleType | str:
    """The module ``_C``, or why it cannot be imported."""
    try:
        return importlib.import_module("snmf_kernels._C")
    except ImportError as error:
        here = os.path.dirname(os.path.abspath(__file__))
        return (
            f"snmf_kernels._C cannot be imported from {here} ({error}); in a source checkout run "
            "'pip install -e .' first, elsewhere reinstall snmf-kernels where there is a C++ compiler "
            "(pip install --force-reinstall --no-deps --no-cache-dir, without SNMF_EXTENSION=0)"
        )


def warn_without_extension() -> None:
    """Nobody is to run many times slower without a word; for ``__init__``, in the name of who imports the package."""
    module = compiled_module()
    # The page of `python -m snmf_kernels` says it itself.
    own_page = sys.argv[:1] == ["-m"] and "snmf_kernels" in sys.orig_argv
    if isinstance(module, str) and not own_page:
        warnings.warn(f"{WITHOUT_EXTENSION}: {module}", RuntimeWarning, stacklevel=3)


def refusal(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    operation: str | None = None,
    k: int | None = None,
    max_active: int = 0,
) -> str | None:
    """Why ``backend`` cannot run ``operation`` (None: anything) on tensors of this device and dtype; None if it can.

    Without k, the operation is taken to be within its limits; ``max_active`` matters to a coefficient_pass alone.
    """
    if operation is not None and operation not in PROVIDES[backend]:
        return f"it has no {operation} (it provides {', '.join(PROVIDES[backend])})"
    if backend == "torch":
        return None
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64, not {dtype_name(dtype)}"
    if backend == "cpp":
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        module = compiled_module()
        return module if isinstance(module, str) else None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
            return f"it runs on CUDA and ROCm devices, the tensors are on {device}"
        if k is not None and operation == "coefficient_pass":
            from . import _triton

            return _triton.pass_refusal(k, max_active)
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on CUDA devices, the tensors are on {device}"
    module = compiled_module()
    if isinstance(module, str):
        return module
    if module.build_info()["cuda"] is None:
        return "this build of snmf_kernels has no CUDA code (reinstall it where a CUDA toolkit is found, SNMF_CUDA=1)"
    if module.cuda_device_count() == 0:
        return "the CUDA runtime of snmf_kernels finds no device (is the driver older than the toolkit?)"
    return None


def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    k: int | None = None,
    max_active: int = 0,
) -> Choice:
    """The backend and function that run one operation.

    Raises:
        ValueError: no such backend.
        BackendError: the named backend cannot run the operation here.
    """
    if backend == "auto":
        found = _first(_automatic(device), operation, device, dtype, k, max_active)
        assert found is not None, "the torch backend refuses nothing"
        return found
    check_name(backend)
    reason = refusal(backend, device, dtype, operation, k, max_active)
    if reason is not None:
        raise BackendError(f"backend: {backend!r} cannot run {operation}: {reason}; use backend='auto'")
    return Choice(backend, _function(backend, operation))


def _automatic(device: torch.device) -> tuple[str, ...]:
    """What ``"auto"`` tries on this device, in order."""
    # Interpreted kernels are for tests: on the CPU they are chosen by name only.
    return tuple(name for name in BACKENDS if name != "triton" or device.type != "cpu")


def _first(
    order: tuple[str, ...],
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    k: int | None,
    max_active: int = 0,
) -> Choice | None:
    """The first backend of ``order`` that does not refuse."""
    for name in order:
        if refusal(name, device, dtype, operation, k, max_active) is None:
            return Choice(name, _function(name, operation))
    return None


def check_name(backend: str) -> None:
    """Raises ValueError unless ``backend`` is a known name."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: wanted one of auto, {', '.join(BACKENDS)}, got {backend!r}")


class Kernels(NamedTuple):
    """A function for each operation, the name of the backend that leads, and whether a CUDA graph can hold them."""

    backend: str
    multiplicative_update: Callable[..., Any]
    coordinate_descent: Callable[..., Any]
    winner_take_all: Callable[..., Any]
    sparse_product: Callable[..., Any]
    coefficient_pass: Callable[..., Any]
    column_descent: Callable[..., Any]
    ridge_solve: Callable[..., Any]
    support_solve: Callable[..., Any]
    copy_if: Callable[..., Any]
    recordable: bool


def choose_all(
    device: torch.device, dtype: torch.dtype, backend: str = "auto", k: int | None = None
) -> Kernels:
    """Functions for all operations, as ``fit`` needs them.

    A named backend must provide at least one operation here; its companions (``COMPANIONS``) fill the gaps. The solves
    may be of another dtype than the rest, so they are looked up for float64.
    """
    check_name(backend)
    if backend != "auto":
        reason = refusal(backend, device, dtype)
        if reason is not None:
            raise BackendError(f"backend: {backend!r} cannot run here: {reason}; use backend='auto'")
    order = _automatic(device) if backend == "auto" else (backend, *COMPANIONS[backend])
    functions = {}
    chosen = {}
    for operation in OPERATIONS:
        needed = torch.float64 if operation in SOLVES and device.type != "mps" else dtype
        found = _first(order, operation, device, needed, k)
        if found is None:
            raise BackendError(
                f"backend: {backend!r} has nothing to run {operation} on {device}; use backend='auto'"
            )
        chosen[operation], functions[operation] = found
    if backend != "auto" and backend not in chosen.values():
        operation = PROVIDES[backend][0]
        reason = refusal(backend, device, torch.float64 if operation in SOLVES else dtype, operation, k)
        raise BackendError(f"backend: {backend!r} cannot run {operation} here: {reason}; use backend='auto'")
    if chosen["coefficient_pass"] in ("torch", "triton"):
        # Composed of what this backend has.
        own = [functions[name] for name in ("multiplicative_update", "coordinate_descent", "sparse_product")]
        composed = _function("torch", "composed_pass")(*own)
        if chosen["coefficient_pass"] == "triton":
            composed = _either_pass(functions["coefficient_pass"], composed)
        functions["coefficient_pass"] = composed
    return Kernels(
        chosen["multiplicative_update"] if backend == "auto" else backend,
        **functions,
        recordable=_recordable(chosen, device, k),
    )


def _recordable(chosen: dict[str, str], device: torch.device, k: int | None) -> bool:
    """Whether nothing in these operations waits for the device: neither plain torch nor torch.linalg runs them."""
    if device.type != "cuda" or "torch" in chosen.values():
        return False
    from . import _cuda, _triton

    largest = _cuda.ridge_max_k(device.index or 0, torch.float64)
    return k is not None and k <= largest and _triton.pass_refusal(k) is None


def _either_pass(fused: Callable[..., Any], composed: Callable[..., Any]) -> Callable[..., Any]:
    """A coefficient_pass that is composed where Triton's refuses what it is asked for."""
    from . import _triton

    def coefficient_pass(Y: Any, Z: Any, *arguments: Any, max_active: int = 0, **options: Any) -> Any:
        function = fused if _triton.pass_refusal(Z.k, max_active) is None else composed
        return function(Y, Z, *arguments, max_active=max_active, **options)

    return coefficient_pass


def report() -> dict[str, str]:
    """For each backend ``"usable"`` or the reason why it is not, on this machine's GPU where it needs one."""
    cpu = torch.device("cpu")
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else None
    rows = {}
    for name in BACKENDS:
        device = cpu if name in ("cpp", "torch") else gpu
        if device is None:
            rows[name] = "needs a GPU, and torch finds none here"
        else:
            rows[name] = refusal(name, device, torch.float32) or "usable"
    return rows


def _function(backend: str, operation: str) -> Callable[..., Any]:
    module = importlib.import_module(f"snmf_kernels.{_MODULES[backend]}")
    return getattr(module, operation)
