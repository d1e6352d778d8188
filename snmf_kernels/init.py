"""Starting points ``Y0 [k, n]`` of the solver (Z follows from it): random, truncated SVD, k-means.

All take the activations as a ``DataMatrix`` (so that a neuron scale applies) and draw from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._data import DataMatrix
from ._scope import interruptible

KMEANS_ITERATIONS = 5
_LEAST_SAMPLE, _SAMPLE_PER_CLUSTER = 2000, 10  # tokens that k-means looks at
_LEAST_CANDIDATES, _CANDIDATES_PER_CLUSTER = 500, 2  # and those of them that may be its seeds
# Elements of the sampled tokens that are held at a time: a CPU's stay in cache; on a GPU each part costs some twenty
# launches, and two copies of 16 MB are no more than the iterations hold of matrices [k, d] later (d = 14,336, k = 100).
_PART_ELEMENTS = {"cpu": 1 << 18}
# Tokens of a part at least: products of narrower ones are slow.
_LEAST_WIDTH = 256
_GPU_PART_ELEMENTS = 1 << 22
# Numbers that are drawn in one call, of about a second, in which Ctrl-C is not heard.
_DRAWN_AT_ONCE = 1 << 28
FLOOR = 1e-6  # the paper's: multiplicative updates cannot leave an exact zero
# Drawn on the CPU in float32, so that a seed means the same start on every device, in every dtype, and whatever
# torch's own defaults are.
DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def random_init(data: DataMatrix, k: int, generator: torch.Generator) -> Tensor:
    """``Y ~ U(0, 1)`` clamped at 1e-6 (the paper's default)."""
    Y = torch.empty(k, data.n, dtype=data.dtype, device=data.device)
    rows = k if k * data.n <= _DRAWN_AT_ONCE else 1
    for start in range(0, k, rows):
        part = Y[start : start + rows]
        part.copy_(torch.rand(part.shape, generator=generator, **DRAWN))
    return Y.clamp_(min=FLOOR)


def svd_init(data: DataMatrix, k: int, generator: torch.Generator) -> Tensor:
    """``Y = max(√Σ Vᵀ, 1e-6)`` from the leading k singular triplets.

    Of the two signs of a triplet, that is taken whose V has the larger positive part.
    The triplets come from a randomised range finder with power iterations (Halko, Martinsson & Tropp 2011,
    algorithm 4.4). Where k exceeds the rank that A can have, the remaining features start at random. With token weights
    w they are those of ``A diag(√w)``, and V is what A itself, token by token, has of them.
    """
    roots = None if data.token_weights is None else data.token_weights.sqrt()

    def weighted(product: Tensor) -> Tensor:
        return product if roots is None else product * roots

    rank = min(k, data.d, data.n)
    width = min(rank + 10, data.d, data.n)
    basis = _on(data, torch.randn(data.n, width, generator=generator, **DRAWN))
    basis = _orthonormal(data.times(basis, roots).T)  # [d, width]
    for _ in range(4):
        basis = _orthonormal(weighted(data.transposed_times(basis)).T)  # [n, width]
        basis = _orthonormal(data.times(basis, roots).T)
    small = data.transposed_times(basis)  # [width, n]
    U, S, Vh = interruptible(data.n, lambda: torch.linalg.svd(weighted(small), full_matrices=False))
    S = S[:rank].clamp(min=0)
    root = S.sqrt()
    V = Vh[:rank]
    # The sign of a pair of singular vectors is arbitrary: take that which loses less to the clamp.
    sign = torch.where(V.clamp(min=0).norm(dim=1) >= V.clamp(max=0).norm(dim=1), 1.0, -1.0).to(V.dtype)
    if roots is not None:
        V = U[:, :rank].T @ small / torch.where(S > 0, S, torch.inf)[:, None]
    Y = random_init(data, k, generator)
    Y[:rank] = ((sign * root)[:, None] * V).clamp(min=FLOOR)
    return Y


def kmeans_init(data: DataMatrix, k: int, generator: torch.Generator) -> Tensor:
    """``Y`` = one-hot membership of the tokens in the clusters of :func:`kmeans_centroids`, floored at 1e-6.

    A token joins the centroid of largest cosine. Where k exceeds the number of tokens, the remaining features start at
    random.
    """
    centroids = kmeans_centroids(data, k, generator)
    clusters = centroids.shape[1]
    Y = torch.full((k, data.n), FLOOR, dtype=data.dtype, device=data.device)
    best = torch.zeros(clusters, dtype=torch.int64, device=data.device)
    best_similarity = torch.full((clusters,), -torch.inf, dtype=data.dtype, device=data.device)
    for tokens, similarity in data.transposed_times_blocks(centroids):
        Y[similarity.argmax(0), torch.arange(tokens.start, tokens.stop, device=data.device)] = 1
        value, place = similarity.max(1)
        closer = value > best_similarity
        best_similarity = torch.where(closer, value, best_similarity)
        best = torch.where(closer, place + tokens.start, best)
    # A cluster that no token joined shares the token that is nearest to it, so that no feature starts unused.
    unused = (Y[:clusters] < 1).all(1).nonzero()[:, 0]
    Y[unused, best[unused]] = 1
    if clusters < k:
        Y[clusters:] = random_init(data, k - clusters, generator)
    return Y


def kmeans_centroids(
    data: DataMatrix, k: int, generator: torch.Generator, max_iter: int = KMEANS_ITERATIONS
) -> Tensor:
    """Unit centroids ``[d, k]`` of spherical k-means (Dhillon & Modha 2001) on a random sample of the tokens.

    Fewer than k where fewer tokens have a weight above 0. The sample has 10 tokens a cluster, at least 2,000. The seeds
    are drawn by squared distance (k-means++, Arthur & Vassilvitskii 2007) among two tokens a cluster, at least 500; a
    few iterations follow. An empty cluster restarts at the sampled token that is farthest from its centroid.
    """
    sample = torch.randperm(data.n, generator=generator, device="cpu").to(data.device)
    if data.token_weights is not None:
        # Tokens of weight 0 take no part, in random order still.
        sample = sample[data.token_weights[sample] > 0]
    clusters = min(k, len(sample))
    sample = sample[: max(_LEAST_SAMPLE, _SAMPLE_PER_CLUSTER * clusters)]
    size = len(sample)
    candidates = sample[: max(_LEAST_CANDIDATES, _CANDIDATES_PER_CLUSTER * clusters)]
    width = max(_LEAST_WIDTH, _PART_ELEMENTS.get(data.device.type, _GPU_PART_ELEMENTS) // data.d)
    seeds = _seeds(data, candidates.split(width), clusters, generator)
    centroids = _directions_(data.columns(candidates[seeds]))
    similarity = torch.empty(size, dtype=data.dtype, device=data.device)
    for _ in range(max_iter):
        sums = torch.zeros_like(centroids)
        members = torch.zeros(clusters, dtype=data.dtype, device=data.device)
        # Gathered anew in parts, which costs less than it would take to keep them.
        for start in range(0, size, width):
            part = slice(start, min(start + width, size))
            tokens = _directions_(data.columns(sample[part]))  # [d, part]
            similarity[part], label = (centroids.T @ tokens).max(0)
            _add_to_clusters(sums, members, label, tokens)
            del tokens
        empty = (members == 0).nonzero()[:, 0]
        sums[:, empty] = data.columns(sample[similarity.argsort(stable=True)[: len(empty)]])
        centroids = _directions_(sums)
    return centroids


def _add_to_clusters(sums: Tensor, members: Tensor, label: Tensor, tokens: Tensor) -> None:
    """Adds tokens ``[d, m]`` to the sums ``[d, clusters]`` of their clusters, and counts them."""
    if tokens.device.type == "cpu":
        # Along the tokens where they lie together: torch adds rows a hundred times sooner than strided columns.
        if tokens.stride(0) == 1:
            sums.T.index_add_(0, label, tokens.T)
        else:
            sums.index_add_(1, label, tokens)
        members += torch.bincount(label, minlength=len(members))
        return
    # On a GPU these two add in any order, so that no two fits have the same bits, and wait for the device.
    joins = (label[:, None] == torch.arange(len(members), device=label.device)).to(tokens.dtype)
    sums.addmm_(tokens, joins)
    members += joins.sum(0)


def _seeds(data: DataMatrix, parts: Sequence[Tensor], clusters: int, generator: torch.Generator) -> Tensor:
    """Which of the candidate tokens are k-means++ seeds, in the squared distance ``2 − 2 cos`` of their directions."""
    # Of all pairs at once, so that a seed costs a look at one row.
    count = sum(len(part) for part in parts)
    cosines = torch.empty(count, count, dtype=data.dtype, device=data.device)
    start = 0
    for i, part in enumerate(parts):
        rows = slice(start, start + len(part))
        directions = _directions_(data.columns(part))
        column = start
        for other in parts[i:]:
            columns = slice(column, column + len(other))
            others = directions if other is part else _directions_(data.columns(other))
            cosines[rows, columns] = directions.T @ others
            cosines[columns, rows] = cosines[rows, columns].T
            column += len(other)
        start += len(part)
    distances = cosines.mul_(-2).add_(2).clamp_(min=0).cpu()
    draws = torch.rand(clusters, generator=generator, **DRAWN).double()
    seeds = [0]  # the sample is in random order already
    nearest = distances[0].double()
    nearest[0] = 0
    for draw in draws[1:]:
        cumulative = nearest.cumsum(0)
        # Where only copies of the seeds are left, any token will do.
        seed = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
        seeds.append(min(seed, len(nearest) - 1))
        nearest = torch.minimum(nearest, distances[seeds[-1]].double())
        nearest[seeds[-1]] = 0
    return torch.tensor(seeds, device=data.device)


def _directions_(columns: Tensor) -> Tensor:
    """Columns at unit norm, in place; zero columns stay."""
    # By the largest magnitude first: squares of very large or small activations leave the range of the dtype.
    _divide_(columns, columns.abs().amax(0))
    return _divide_(columns, torch.linalg.vector_norm(columns, dim=0))


def _divide_(columns: Tensor, norms: Tensor) -> Tensor:
    return columns.div_(torch.where(norms > 0, norms, 1))


def _on(data: DataMatrix, drawn: Tensor) -> Tensor:
    return drawn.to(data.device, data.dtype)


def _orthonormal(columns: Tensor) -> Tensor:
    return interruptible(len(columns), lambda: torch.linalg.qr(columns).Q)


INITS = {"random": random_init, "svd": svd_init, "kmeans": kmeans_init}
