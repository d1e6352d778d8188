"""One iteration of ``fit(solver="mu")`` against one of the published loop, and one pass of the default solver."""

from __future__ import annotations

import pytest
from published import PublishedLoop, synthetic_activations

import snmf_kernels

SIZES = [(1536, 10_000, 100), (1536, 10_000, 400)]
ITERATIONS = 20  # so that the checks before and after the loop weigh what they weigh in a short fit


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "d{}-n{}-k{}".format(*size))
def problem(request):
    d, n, k = request.param
    return synthetic_activations(d, n), k


@pytest.mark.parametrize("what", ["published", "mu", "auto"])
def test_iterations(benchmark, problem, what):
    A, k = problem
    benchmark.extra_info.update(operation=f"{ITERATIONS} iterations", backend=what)
    if what == "published":
        loop = PublishedLoop(A, k)

        def run():
            for _ in range(ITERATIONS):
                loop.step()
    else:

        def run():
            snmf_kernels.fit(A, k, solver=what, max_iter=ITERATIONS, tol=0, patience=ITERATIONS)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
