"""Starting points ``(Z0 [d, k], Y0 [k, n])`` of the solver: random, truncated SVD, k-means.

All take the activations as a ``DataMatrix`` (so that a neuron scale applies) and draw from a generator of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._data import DataMatrix

FLOOR = 1e-6  # the paper's: multiplicative updates cannot leave an exact zero
# Drawn on the CPU in float32, so that a seed means the same start on every device, in every dtype, and whatever
# torch's own defaults are.
DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def random_init(data: DataMatrix, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``Z ~ N(0, 1)``, ``Y ~ U(0, 1)`` clamped at 1e-6 (the paper's default)."""
    Y = _on(data, torch.rand(k, data.n, generator=generator, **DRAWN)).clamp_(min=FLOOR)
    Z = _on(data, torch.randn(data.d, k, generator=generator, **DRAWN))
    return Z, Y


def svd_init(data: DataMatrix, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``Z = U √Σ``, ``Y = max(√Σ Vᵀ, 1e-6)`` from the leading k singular triplets.

    Of the two signs of a triplet, that is taken whose V has the larger positive part.
    The triplets come from a randomised range finder with power iterations (Halko, Martinsson & Tropp 2011,
    algorithm 4.4). Where k exceeds the rank that A can have, the remaining features start at random.
    """
    rank = min(k, data.d, data.n)
    width = min(rank + 10, data.d, data.n)
    basis = _on(data, torch.randn(data.n, width, generator=generator, **DRAWN))
    basis = _orthonormal(data.times(basis).T)  # [d, width]
    for _ in range(4):
        basis = _orthonormal(data.transposed_times(basis).T)  # [n, width]
        basis = _orthonormal(data.times(basis).T)
    small = data.transposed_times(basis)  # [width, n]
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    root = S[:rank].clamp(min=0).sqrt()
    V = Vh[:rank]
    # The sign of a pair of singular vectors is arbitrary: take that which loses less to the clamp.
    sign = torch.where(V.clamp(min=0).norm(dim=1) >= V.clamp(max=0).norm(dim=1), 1.0, -1.0).to(V.dtype)
    Z, Y = random_init(data, k, generator)
    Z[:, :rank] = (basis @ U[:, :rank]) * (sign * root)
    Y[:rank] = ((sign * root)[:, None] * V).clamp(min=FLOOR)
    return Z, Y


def kmeans_init(
    data: DataMatrix, k: int, generator: torch.Generator, max_iter: int = 20
) -> tuple[Tensor, Tensor]:
    """``Z`` = centroids of the tokens, ``Y`` = one-hot membership floored at 1e-6.

    Seeds are drawn by squared distance (k-means++, Arthur & Vassilvitskii 2007); Lloyd's iterations follow
    until no token moves or ``max_iter`` is reached; an empty cluster restarts at the token farthest from its
    centroid. Where k exceeds the number of tokens, the remaining features start at random.
    """
    clusters = min(k, data.n)
    centroids = data.columns(_seeds(data, clusters, generator))
    labels = torch.full((data.n,), -1, device=data.device)
    for _ in range(max_iter):
        nearest, distance = _assign(data, centroids)
        occupied = torch.bincount(nearest, minlength=clusters)
        # One restarted cluster can take the last token of another, so look again until none is empty.
        while int(occupied.min()) == 0:
            empty = int(occupied.argmin())
            movable = torch.where(occupied[nearest] > 1, distance, -1)
            farthest = int(movable.argmax())
            occupied[nearest[farthest]] -= 1
            nearest[farthest], distance[farthest] = empty, 0
            occupied[empty] = 1
        if torch.equal(nearest, labels):
            break
        labels = nearest
        centroids = _means(data, labels, clusters)
    Z, Y = random_init(data, k, generator)
    Z[:, :clusters] = centroids
    Y[:clusters] = FLOOR
    Y[labels, torch.arange(data.n, device=data.device)] = 1
    return Z, Y


def _on(data: DataMatrix, drawn: Tensor) -> Tensor:
    return drawn.to(data.device, data.dtype)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _squared_distances(block: Tensor, centroids: Tensor) -> Tensor:
    """Of each token of ``block [d, m]`` to each centroid ``[d, c]``, ``[c, m]``."""
    cross = centroids.T @ block
    return (block.square().sum(0) - 2 * cross + centroids.square().sum(0)[:, None]).clamp_(min=0)


def _seeds(data: DataMatrix, clusters: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(data.n, (1,), generator=generator, device="cpu"))]
    distance = torch.full((data.n,), torch.inf, dtype=data.dtype, device=data.device)
    for _ in range(1, clusters):
        newest = data.columns(torch.tensor(chosen[-1:], device=data.device))
        for tokens, block in data.blocks():
            distance[tokens] = torch.minimum(distance[tokens], _squared_distances(block, newest)[0])
        distance[chosen] = 0
        # Inverse sampling on the CPU: torch.multinomial takes at most 2**24 categories.
        cumulative = distance.double().cpu().cumsum(0)
        if cumulative[-1] > 0:
            draw = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu") * cumulative[-1]
            chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), data.n - 1))
        else:  # only copies of the seeds are left
            taken = set(chosen)
            chosen.append(next(token for token in range(data.n) if token not in taken))
    return torch.tensor(chosen, device=data.device)


def _assign(data: DataMatrix, centroids: Tensor) -> tuple[Tensor, Tensor]:
    nearest = torch.empty(data.n, dtype=torch.int64, device=data.device)
    distance = torch.empty(data.n, dtype=data.dtype, device=data.device)
    for tokens, block in data.blocks():
        distance[tokens], nearest[tokens] = _squared_distances(block, centroids).min(0)
    return nearest, distance


def _means(data: DataMatrix, labels: Tensor, clusters: int) -> Tensor:
    sums = torch.zeros(data.d, clusters, dtype=data.dtype, device=data.device)
    for tokens, block in data.blocks():
        sums.index_add_(1, labels[tokens], block)
    return sums / torch.bincount(labels, minlength=clusters)


INITS = {"random": random_init, "svd": svd_init, "kmeans": kmeans_init}
