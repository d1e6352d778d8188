"""Iterations of ``fit`` against those of the published loop, and against what no iteration can do without."""

from __future__ import annotations

import math

import pytest
import torch
from published import PublishedLoop, synthetic_activations

import snmf_kernels
from snmf_kernels import _cpp, reference

SIZES = [(1536, 10_000, 100), (1536, 10_000, 400)]
ITERATIONS = 20  # so that the checks before and after the loop weigh what they weigh in a short fit


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "d{}-n{}-k{}".format(*size))
def problem(request):
    d, n, k = request.param
    return synthetic_activations(d, n), k


@pytest.mark.parametrize("what", ["published", "mu", "auto", "floor"])
def test_iterations(benchmark, problem, what):
    A, k = problem
    benchmark.extra_info.update(operation=f"{ITERATIONS} iterations", backend=what)
    if what == "published":
        loop = PublishedLoop(A, k)

        def run():
            for _ in range(ITERATIONS):
                loop.step()
    elif what == "floor":
        # The dense product and a multiplicative sweep over Y, on features as an iteration has them.
        Z = snmf_kernels.fit(A, k, solver="mu", max_iter=2).Z
        Z = reference.winner_take_all(Z, math.ceil(0.01 * len(A)))
        Y = torch.rand(k, A.shape[1])
        ZtA, ZtZ = _cpp.sparse_product(Z, A), _cpp.sparse_product(Z, Z.to_dense())

        def run():
            for _ in range(ITERATIONS):
                torch.mm(Y, A.T)
                _cpp.multiplicative_update(Y, ZtA, ZtZ)
    else:

        def run():
            snmf_kernels.fit(A, k, solver=what, max_iter=ITERATIONS, tol=0, patience=ITERATIONS)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
