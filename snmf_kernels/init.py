"""Starting points ``Y0 [k, n]`` of the solver (Z follows from it): random, truncated SVD, k-means.

All take the activations as a ``DataMatrix`` (so that a neuron scale applies) and draw from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# Up to so many neurons, all decide which tokens belong together; of more, some in blocks, which are gathered faster.
# A centroid of all neurons is then made of up to so many tokens.
_ALL_NEURONS, _SOME_NEURONS, _BLOCK_NEURONS, _TOKENS_OF_CENTROID = 4096, 2048, 64, 8
# Tokens of a part at least: products of narrower ones are slow.
_LEAST_WIDTH = 128
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

    Of more than 4,096 neurons, blocks of about 2,048 in all decide which tokens belong together, and a centroid is the
    mean direction of up to eight tokens of its cluster.
    """
    sample = torch.randperm(data.n, generator=generator, device="cpu").to(data.device)
    if data.token_weights is not None:
        # Tokens of weight 0 take no part, in random order still.
        sample = sample[data.token_weights[sample] > 0]
    clusters = min(k, len(sample))
    sample = sample[: max(_LEAST_SAMPLE, _SAMPLE_PER_CLUSTER * clusters)]
    width = max(_LEAST_WIDTH, _PART_ELEMENTS.get(data.device.type, _GPU_PART_ELEMENTS) // data.d)
    if data.d <= _ALL_NEURONS:

        def columns(places: Tensor) -> Tensor:
            return data.columns(sample[places])

        return _cluster(columns, len(sample), clusters, width, max_iter, generator, data.device)[0]
    label = _clusters_by_blocks(data, sample, clusters, width, max_iter, generator)
    # The first few tokens of each cluster, ordered by cluster.
    order = label.argsort(stable=True)
    ordered = label[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    chosen = rank < _TOKENS_OF_CENTROID
    order, ordered = order[chosen], ordered[chosen]
    sums = torch.zeros(clusters, data.d, dtype=data.dtype, device=data.device).T
    members = torch.zeros(clusters, dtype=data.dtype, device=data.device)
    for start in range(0, len(order), width):
        part = slice(start, start + width)
        _add_to_clusters(sums, members, ordered[part], _directions_(data.columns(sample[order[part]])))
    return _directions_(sums)


def _clusters_by_blocks(
    data: DataMatrix, sample: Tensor, clusters: int, width: int, max_iter: int, generator: torch.Generator
) -> Tensor:
    """The cluster of each sampled token, by blocks of neurons that lie together, evenly spread over all."""
    count = _SOME_NEURONS // _BLOCK_NEURONS
    blocks = [slice(first, first + _BLOCK_NEURONS) for first in (i * data.d // count for i in range(count))]
    some = torch.cat([data.columns(sample, neurons).T for neurons in blocks], 1)  # [size, neurons]

    def columns(places: Tensor) -> Tensor:
        return some.index_select(0, places).T

    return _cluster(columns, len(sample), clusters, width, max_iter, generator, data.device)[1]


def _cluster(
    columns: Callable[[Tensor], Tensor],
    size: int,
    clusters: int,
    width: int,
    max_iter: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Centroids ``[d, clusters]``, and the cluster of each token before their last change, ``[size]``.

    Args:
        columns: gives copies of the tokens at some places of the sample, as columns.
        size: of the sample.
        clusters, max_iter, generator: as of ``kmeans_centroids``.
        width: how many tokens are held at a time.
        device: where they are.
    """
    places = torch.arange(size, device=device)
    candidates = places[: max(_LEAST_CANDIDATES, _CANDIDATES_PER_CLUSTER * clusters)]
    seeds = _seeds(columns, candidates.split(width), clusters, generator)
    centroids = _directions_(columns(seeds))
    similarity = torch.empty(size, dtype=centroids.dtype, device=centroids.device)
    label = torch.empty_like(places)
    for _ in range(max_iter):
        sums = torch.zeros_like(centroids)
        members = torch.zeros(clusters, dtype=centroids.dtype, device=centroids.device)
        # Gathered anew in parts, which costs less than it would take to keep them.
        for part in places.split(width):
            tokens = _directions_(columns(part))  # [d, part]
            similarity[part], label[part] = (centroids.T @ tokens).max(0)
            _add_to_clusters(sums, members, label[part], tokens)
            del tokens
        empty = (members == 0).nonzero()[:, 0]
        farthest = similarity.argsort(stable=True)[: len(empty)]
        sums[:, empty], label[farthest] = columns(farthest), empty
        centroids = _directions_(sums)
    return centroids, label


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


def _seeds(
    columns: Callable[[Tensor], Tensor], parts: Sequence[Tensor], clusters: int, generator: torch.Generator
) -> Tensor:
    """Which of the candidate tokens are k-means++ seeds, in the squared distance ``2 − 2 cos`` of their directions."""
    # Of all pairs at once, so that a seed costs a look at one row.
    count = sum(len(part) for part in parts)
    cosines: Tensor | None = None
    for i, part in enumerate(parts):
        directions = _directions_(columns(part))
        if cosines is None:
            cosines = directions.new_empty(count, count)
        for other in parts[i:]:
            products = directions.T @ (directions if other is part else _directions_(columns(other)))
            rows, cols = slice(int(part[0]), int(part[-1]) + 1), slice(int(other[0]), int(other[-1]) + 1)
            cosines[rows, cols], cosines[cols, rows] = products, products.T
    assert cosines is not None, "there is at least one token"
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
    return torch.tensor(seeds, device=parts[0].device)


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
