"""What the GPU scripts share: device times, problems of the size of a layer, errors."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from published import synthetic_activations
from torch import Tensor

from snmf_kernels import SparseColumns, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tiny shapes, each call once: shows that a script works; its times mean nothing.
SMOKE = False
# A millisecond, longer than the launches of any call here.
_BUSY_CYCLES = 2_000_000


def shapes(real, smoke):
    """What is measured, or what a smoke test has instead."""
    return smoke if SMOKE else real


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable, *arguments, repeat: int = 20, warmup: int = 3) -> list[float]:
    """Device times of calls after a warm-up, sorted, without what the host takes to launch them.

    The device is kept busy until a call has been queued: else it would wait for the host, which is no part of a step
    that is replayed. A call that itself waits for the device is timed with its waiting.
    """
    if SMOKE:
        repeat, warmup = 1, 0
    for _ in range(warmup):
        function(*arguments)
    times = []
    for _ in range(repeat):
        if DEVICE == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(_BUSY_CYCLES)
            start.record()
            function(*arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function(*arguments)
            times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times)


def timed(prefix: str, function: Callable, *arguments, repeat: int = 20) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    times = milliseconds(function, *arguments, repeat=repeat)
    return {
        f"{prefix}_ms": statistics.median(times),
        f"{prefix}_p10": times[len(times) // 10],
        f"{prefix}_p90": times[-1 - len(times) // 10],
    }


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Of the whole, relative to its norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def update_problem(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, ZᵀA, ZᵀZ) of features that share a few of their neurons."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    Z = torch.randn(2000, k, device=DEVICE, generator=generator)
    Z *= torch.rand(2000, k, device=DEVICE, generator=generator) < 0.05
    Y = torch.rand(k, n, device=DEVICE, generator=generator)
    return Y, torch.randn(k, n, device=DEVICE, generator=generator), Z.T @ Z


def pass_problem(
    d: int, n: int, k: int, dtype: torch.dtype, token_major: bool, keep: float = 0.01
) -> tuple[Tensor, SparseColumns, Tensor, Tensor]:
    """(Y, Z, A, ZᵀZ) of the size of a layer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    A = activations(d, n, dtype, token_major)
    Z = reference.winner_take_all(
        torch.randn(k, d, device=DEVICE, generator=generator).T, max(1, round(keep * d))
    )
    dense = Z.to_dense()
    return torch.rand(k, n, device=DEVICE, generator=generator), Z, A, dense.T @ dense


@functools.lru_cache(maxsize=1)
def activations(d: int, n: int, dtype: torch.dtype, token_major: bool) -> Tensor:
    """The last ones are kept."""
    A = synthetic_activations(d, n, device=DEVICE, dtype=dtype)
    return A if token_major else A.contiguous()


def columns_problem(d: int, k: int) -> tuple[SparseColumns, Tensor, Tensor]:
    """(Z, A Yᵀ, Y Yᵀ) for column descent, far from its end: many entries change."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    Y = torch.rand(k, 2000, device=DEVICE, generator=generator)
    AYt = torch.randn(k, d, device=DEVICE, generator=generator)
    start = torch.randn(k, d, device=DEVICE, generator=generator)
    return reference.winner_take_all(start.T, max(1, d // 100)), AYt, Y @ Y.T
