"""Each CPU operation against its torch expression, at the sizes of a small and of a large model."""

from __future__ import annotations

import math

import pytest
import torch
from published import synthetic_activations

from snmf_kernels import _cpp, reference

IMPLEMENTATIONS = {"torch": reference, "cpp": _cpp}
# (d, n, k) with one per cent kept.
SIZES = [(1536, 10_000, 100), (1536, 10_000, 400), (14_336, 4_000, 100)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "d{}-n{}-k{}".format(*size))
def problem(request):
    d, n, k = request.param
    A = synthetic_activations(d, n)  # token-major storage, as a hook delivers it
    generator = torch.Generator().manual_seed(1)
    # Features as they come out of a first iteration: some neurons loud, so that supports overlap.
    dense = A[:, torch.randint(n, (k,), generator=generator)]
    Z = reference.winner_take_all(dense, math.ceil(0.01 * d))
    Y = torch.rand(k, n, generator=generator)
    return A, dense, Z, Y, reference.sparse_product(Z, A), reference.sparse_product(Z, Z.to_dense())


def topk(Z, count):
    """Winner-take-all as one writes it in torch: faster than the reference's stable sort, but without its tie rule."""
    kept = Z.abs().topk(count, dim=0).indices
    return kept, Z.gather(0, kept)


def measure(benchmark, operation, *arguments):
    backend = benchmark.extra_info["backend"]
    function = getattr(IMPLEMENTATIONS[backend], operation)
    if backend == "torch" and operation == "winner_take_all":
        function = topk
    benchmark.pedantic(function, arguments, rounds=15, warmup_rounds=2)


@pytest.fixture(params=IMPLEMENTATIONS)
def timed(request, benchmark):
    benchmark.extra_info["backend"] = request.param
    return benchmark


@pytest.mark.parametrize("sweeps", [1, 10])
def test_multiplicative_update(timed, problem, sweeps):
    _, _, _, Y, ZtA, ZtZ = problem
    measure(timed, "multiplicative_update", Y, ZtA, ZtZ, 1e-6, sweeps)


def test_winner_take_all(timed, problem):
    measure(timed, "winner_take_all", problem[1].T.contiguous().T, problem[2].values.shape[1])


@pytest.mark.parametrize("storage", ["token-major", "neuron-major"])
def test_sparse_product(timed, problem, storage):
    A, _, Z, *_ = problem
    measure(timed, "sparse_product", Z, A if storage == "token-major" else A.contiguous())


@pytest.mark.parametrize(
    ("batch", "k", "m"),
    [(1000, 8, 1), (1000, 32, 1), (200, 100, 1), (1, 100, 1536), (1, 400, 1536)],
    ids=lambda value: str(value),
)
def test_ridge_solve(timed, batch, k, m):
    factor = torch.randn(batch, k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measure(timed, "ridge_solve", factor @ factor.mT / k, torch.ones(batch, k, m, dtype=torch.float64), 1e-3)
