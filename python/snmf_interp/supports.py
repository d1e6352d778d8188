"""Which neurons features share, and how many they would share by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Overlap:
    """Neurons that features share, pair by pair; see :func:`overlap`.

    Attributes:
        shared: ``M = Z̄ᵀ Z̄ [k, k]`` int64, with ``Z̄ [d, k]`` the supports: neurons in both; on the diagonal, in one.
        expected: what supports of the same sizes share on average when drawn at random, ``s_i s_j / d``, float64 like
            the next three.
        z_score: ``(M − expected) / σ`` with the hypergeometric σ; 0 where σ is 0.
        p_value: the chance that random supports of these sizes share as many or more. On the diagonal, that a random
            support is the same.
        jaccard: ``M_ij / (s_i + s_j − M_ij)``; 0 for two empty supports.
        order: the features ``[k]`` int64 so that those with much in common stand together: average linkage of
            ``1 − jaccard``, leaves in their optimal order (Bar-Joseph, Gifford & Jaakkola 2001).
    """

    shared: Tensor
    expected: Tensor
    z_score: Tensor
    p_value: Tensor
    jaccard: Tensor
    order: Tensor


def overlap(Z: Tensor) -> Overlap:
    """The overlap of features, of one level or of several side by side, ``Z [d, k]``: entries that are not zero count.

    The paper writes features as rows, so that its ``Z̄ Z̄ᵀ`` is the same. Chance means supports drawn uniformly from
    all d neurons: where some neurons are in far more supports than others, as loud ones are in unscaled fits, pairs
    share more than that without having anything to do with each other.

    Raises:
        ValueError: Z is not a matrix with at least one row and one column.
    """
    if Z.ndim != 2 or not Z.numel():
        raise ValueError(f"Z: wanted a matrix [d, k], got shape {tuple(Z.shape)}")
    from scipy.stats import hypergeom

    support = (Z != 0).cpu().double()
    d, k = support.shape
    shared = support.T @ support
    sizes = torch.diagonal(shared)
    one, other = sizes[:, None], sizes[None, :]
    expected = one * other / d
    variance = expected * (d - one) * (d - other) / (d * max(d - 1, 1))
    random = variance > 0
    z_score = torch.where(random, (shared - expected) / torch.where(random, variance, 1).sqrt(), 0)
    union = one + other - shared
    jaccard = shared / union.clamp_min(1)
    # Few triples are different: most supports have the same size.
    triples, place = np.unique(
        torch.stack([shared, one.expand(k, k), other.expand(k, k)], -1).reshape(-1, 3).long().numpy(),
        axis=0,
        return_inverse=True,
    )
    tails = hypergeom.sf(triples[:, 0] - 1, d, triples[:, 1], triples[:, 2])
    return Overlap(
        shared=shared.long(),
        expected=expected,
        z_score=z_score,
        p_value=torch.from_numpy(tails[place.reshape(k, k)]),
        jaccard=jaccard,
        order=_order(jaccard),
    )


def _order(jaccard: Tensor) -> Tensor:
    k = len(jaccard)
    if k < 3:
        return torch.arange(k)
    from scipy.cluster.hierarchy import leaves_list, linkage

    distances = (1 - jaccard[tuple(torch.triu_indices(k, k, 1))]).numpy()
    joined = linkage(distances, method="average", optimal_ordering=True)
    return torch.from_numpy(leaves_list(joined).astype(np.int64))
