"""Where a fit begins: a drawn start, or factors that were given."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ._data import DataMatrix, as_matrix
from ._loop import Start
from ._problem import Problem
from .factorization import Factorization, sparse_features
from .init import FLOOR, INITS, kmeans_centroids
from .sparse import SparseColumns

logger = logging.getLogger(__name__)

# Rows of a given Y whose largest entry is further from 1 than this are brought there: squares of theirs would vanish or
# overflow. The scale of a row, inversely that of its column of Z, is free.
_FAR = 2.0**20


def start_of(problem: Problem, init: Any, *, k: int, sweeps: int, seed: int, floored: bool) -> Start:
    """The start that ``init`` of :func:`snmf_kernels.fit` names; ``floored`` for multiplicative updates.

    These cannot leave a zero, so that zeros become 1e-6 of their row's largest entry.
    """
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(
                f"init: wanted one of {', '.join(INITS)}, a Factorization or a pair (Z0, Y0), got {init!r}"
            )
        return Start(_drawn(problem, init, k, sweeps, seed, lets_kmeans_solve=not floored))
    start = _continued(problem, _pair(init, problem.data.n), k)
    return Start(_floored(start.Y), start.Z) if floored else start


def fixed_features(features: Tensor, data: DataMatrix) -> SparseColumns:
    """The features that a fit leaves as they are, in scaled units.

    Raises:
        ValueError: of another number of neurons, not finite, or so small or large that products with them vanish or
            overflow.
    """
    if features.shape[0] != data.d:
        raise ValueError(
            f"fixed: wanted {data.d} rows (neurons), as A has, got shape {tuple(features.shape)}"
        )
    given = _given("fixed", features, data)
    assert given is not None
    fixed = sparse_features(data.scaled(given))
    norms = torch.linalg.vector_norm(fixed.values, dim=1)
    limits = torch.finfo(data.dtype)
    bad = (norms > 0) & ~((norms > limits.tiny**0.5 * 1e3) & (norms < limits.max**0.5 * 1e-3))
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        raise ValueError(
            f"fixed: wanted columns in the units of A, got column {column} with a norm of {float(norms[column]):.2g} "
            "beside it; multiply it by a constant, which only divides its coefficients"
        )
    return fixed


def _pair(init: Any, n: int) -> tuple[Any, Any]:
    if isinstance(init, Factorization):
        if int(init.Y.shape[1]) == n:
            return init.Z, init.Y
        logger.info("init: the factors are of %d tokens, A has %d: Y starts from Z", init.Y.shape[1], n)
        return init.Z, None
    if not isinstance(init, tuple) or len(init) != 2:
        raise TypeError(
            f"init: wanted one of {', '.join(INITS)}, a Factorization or a pair (Z0, Y0), got {type(init).__name__}"
        )
    return init


def _continued(problem: Problem, pair: tuple[Any, Any], k: int) -> Start:
    data = problem.data
    Z0, Y0 = (_given(f"init[{i}]", value, data) for i, value in enumerate(pair))
    for i, (value, shape) in enumerate(((Z0, (data.d, k)), (Y0, (k, data.n)))):
        if value is not None and value.shape != shape:
            raise ValueError(f"init[{i}]: wanted shape {shape}, got {tuple(value.shape)}")
    if Z0 is None and Y0 is None:
        raise ValueError(
            "init: wanted Z0, Y0 or both, got (None, None); use init='random' for a random start"
        )
    rows = None
    if Y0 is not None:
        if bool((Y0 < 0).any()):
            raise ValueError(f"init[1]: wanted Y0 >= 0, got {int((Y0 < 0).sum())} negative entries")
        largest = Y0.amax(1)
        far = (largest > 0) & ~((largest > 1 / _FAR) & (largest < _FAR))
        far[: problem.n_fixed] = False  # their columns are what they are
        rows = torch.where(far, largest, 1)
        Y0 = Y0 / rows[:, None]
    if Z0 is None:
        assert Y0 is not None
        return Start(Y0)
    Z0 = data.scaled(Z0 if rows is None else Z0 * rows)
    if not bool(Z0.isfinite().all()):
        raise ValueError(f"init[0]: its values are too large beside those of A for {Z0.dtype}")
    Z = data.kernels.winner_take_all(Z0[:, problem.n_fixed :], problem.count)
    cut = int((Z0[:, problem.n_fixed :] != 0).sum() - (Z.values != 0).sum())
    if cut:
        logger.info(
            "init[0]: %d entries beyond the %d largest of each column are left out", cut, problem.count
        )
    if Y0 is None:
        Y0, *_ = problem.solve_coefficients(problem.all_features(Z), tol=1e-3, max_sweeps=100)
    return Start(Y0, Z)


def _drawn(problem: Problem, init: str, k: int, sweeps: int, seed: int, *, lets_kmeans_solve: bool) -> Tensor:
    data, free = problem.data, k - problem.n_fixed
    generator = torch.Generator().manual_seed(seed)
    centroids = kmeans_centroids(data, free, generator) if init == "kmeans" and lets_kmeans_solve else None
    if centroids is not None and centroids.shape[1] == free:
        # Winner-take-all of the centroids and their coefficients take one sparse pass, and are nearer than memberships.
        Z = problem.all_features(data.kernels.winner_take_all(centroids, problem.count))
        Y = torch.zeros(k, data.n, dtype=data.dtype, device=data.device)
        problem.update_coefficients(Z, problem.gram(Z), Y, sweeps, out=Y)
        return Y
    Y = INITS[init](data, free, generator)
    if problem.fixed is None:
        return Y
    # What fixed features explain is not left for the others to start from.
    of_fixed, *_ = problem.solve_coefficients(problem.fixed, tol=1e-3, max_sweeps=100)
    return torch.cat([of_fixed, Y])


def _floored(Y: Tensor) -> Tensor:
    """Y without zeros: at least 1e-6 of each row's largest entry, whatever its scale (1e-6 where a row is zero)."""
    largest = Y.amax(1, keepdim=True)
    return torch.maximum(Y, FLOOR * torch.where(largest > 0, largest, 1))


def _given(name: str, value: Any, data: DataMatrix) -> Tensor | None:
    if value is None:
        return None
    matrix = as_matrix(name, value).to(data.device, data.dtype)
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{name}: wanted finite values, got {int((~matrix.isfinite()).sum())} NaN or infinite"
        )
    return matrix
