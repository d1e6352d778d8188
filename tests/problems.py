"""Random problems, comparisons and an independent transcription of the published iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snmf_kernels.sparse import PassResult

# Bounds on the relative Frobenius error against the float64 reference, by dtype: five to ten times the worst
# seen over all shapes, layouts, levels and backends of tests/test_operations.py on x86-64 (2026-11).
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 2e-15,
}  # one or three sweeps, products: worst 1.5e-7, 3.1e-16
DESCENT_TOLERANCE = {
    torch.float32: 4e-6,
    torch.float64: 1e-14,
}  # divisions by small diagonals: worst 4.9e-7, 1.2e-15
# A pass: two sweeps, products, sums (assert_same_sums has their scales): worst 3.7e-7, 8.2e-16.
PASS_TOLERANCE = {torch.float32: 3e-6, torch.float64: 6e-15}
COLUMN_TOLERANCE = {
    torch.float32: 6e-7,
    torch.float64: 1e-15,
}  # values where supports agree: worst 7.6e-8, 1.6e-16
SOLVE_TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1.5e-14,
}  # condition about 40, or 200: worst 1.6e-6, 2.5e-15
# 50 iterations of "mu" against the transcription in float64, error of Z, Y and the losses: worst 1.7e-6, 3.6e-15.
PARITY = {torch.float32: 1e-5, torch.float64: 1e-12}


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """``‖got − wanted‖ / ‖wanted‖`` in float64; NaN or infinity in ``got`` counts as infinite."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if not bool(got.isfinite().all()):
        return math.inf
    scale = float(wanted.norm())
    difference = float((got - wanted).norm())
    return difference / scale if scale > 0 else difference


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    difference = relative_difference(got, wanted)
    assert difference <= tolerance, f"relative difference {difference:.3g}, tolerance {tolerance:.3g}"


def assert_same_sums(got: PassResult, wanted: PassResult, tolerance: float) -> None:
    """Two results of a pass agree, each sum relative to the size of what it adds up (entries being about one)."""
    assert (got.AYt is None) == (wanted.AYt is None)
    if got.AYt is not None and wanted.AYt is not None:
        assert_near(got.AYt, wanted.AYt, tolerance)
    scales = {
        "squared_norm": wanted.squared_norm,
        "data": wanted.data,
        "residual": wanted.data + wanted.residual,  # where A is reproduced it is what rounding leaves
        "dot": max(abs(wanted.dot), wanted.squared_norm),  # terms of both signs
    }
    for name, scale in scales.items():
        # Written so that NaN fails.
        assert abs(getattr(got, name) - getattr(wanted, name)) <= tolerance * scale, (name, got, wanted)
    distance = abs(got.violation**0.5 - wanted.violation**0.5)
    assert distance <= tolerance * wanted.squared_norm**0.5, ("violation", got, wanted)
    assert got.sweeps == wanted.sweeps


def planted(d: int, n: int, k: int, *, keep: float, noise: float = 0.0, seed: int = 0, dtype=torch.float32):
    """``(A, Z, Y)`` with sparse signed Z, sparse non-negative Y and ``A = Z Y + noise``."""
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(keep * d)
    Z = torch.zeros(d, k, dtype=dtype)
    for column in range(k):
        rows = torch.randperm(d, generator=generator)[:count]
        Z[rows, column] = torch.randn(count, generator=generator, dtype=dtype)
    active = torch.rand(k, n, generator=generator) < 0.15
    Y = torch.rand(k, n, generator=generator, dtype=dtype) * active
    A = Z @ Y
    return A + noise * A.std() * torch.randn(d, n, generator=generator, dtype=dtype), Z, Y


def published_iteration(A: Tensor, Y: Tensor, keep: float, iterations: int, ridge: float = 1e-6):
    """The five steps of paper.md in plain torch, dense throughout: ``(Z, Y, losses)`` of the last iteration.

    Written apart from the package; selection by sorting (magnitude descending, row ascending) in Python.
    """
    k = Y.shape[0]
    d = A.shape[0]
    count = math.ceil(keep * d)
    losses = []
    Z = torch.zeros(d, k, dtype=A.dtype)
    for _ in range(iterations):
        Z = torch.linalg.solve(Y @ Y.T + ridge * torch.eye(k, dtype=A.dtype), Y @ A.T).T.contiguous()
        for column in range(k):
            magnitudes = Z[:, column].abs().tolist()
            order = sorted(range(d), key=lambda row: (-magnitudes[row], row))
            Z[order[count:], column] = 0
        norms = Y.norm(dim=1)
        norms[norms == 0] = 1
        Y = Y / norms[:, None]
        Z = Z * norms
        P, Q = Z.T @ A, Z.T @ Z
        plus, minus = (lambda x: (x.abs() + x) / 2), (lambda x: (x.abs() - x) / 2)
        Y = Y * torch.sqrt((plus(P) + minus(Q) @ Y) / (minus(P) + plus(Q) @ Y + 1e-6))
        losses.append(float((A - Z @ Y).square().sum()))
    return Z, Y, losses
