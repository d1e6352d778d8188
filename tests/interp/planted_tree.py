"""Activations with a known hierarchy, and scores of a recovered one against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snmf_interp import Hierarchy, Tree


@dataclass(frozen=True)
class Planted:
    """Tokens of a two-level tree: each leaf has its parent's core neurons and some of its own.

    Attributes:
        A: ``[d, n]``.
        leaves: ``[d, k]``, unit columns.
        parent_of: ``[k]``.
        cores: the core neurons of each parent.
        keep: the fraction of neurons that a leaf has.
    """

    A: Tensor
    leaves: Tensor
    parent_of: Tensor
    cores: list[list[int]]
    keep: float


def planted_tree(
    n_parents: int = 4,
    n_leaves: int = 4,
    *,
    core: int = 6,
    own: int = 6,
    d: int = 400,
    n: int = 2000,
    active: int = 2,
    noise: float = 0.0,
    shuffled: bool = False,
    seed: int = 0,
) -> Planted:
    """Plants a tree.

    Args:
        n_parents, n_leaves: parents, and leaves of each.
        core, own: neurons that siblings share, and that are a leaf's alone.
        d, n: neurons and tokens.
        active: leaves that a token uses, with coefficients from 0.5 to 1.5.
        noise: standard deviation of white noise, relative to the root mean square of the entries.
        shuffled: the control: each leaf's core is drawn for itself, so that there is no tree to find.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    k = n_parents * n_leaves
    order = torch.randperm(d, generator=generator).tolist()
    cores = [order[p * core : (p + 1) * core] for p in range(n_parents)]
    free = order[n_parents * core :]
    leaves = torch.zeros(d, k)
    core_values = torch.randn(n_parents, core, generator=generator).sign() * (
        0.8 + 0.4 * torch.rand(n_parents, core, generator=generator)
    )
    for leaf in range(k):
        parent = leaf // n_leaves
        place = torch.randperm(d, generator=generator)[:core].tolist() if shuffled else cores[parent]
        leaves[free[leaf * own : (leaf + 1) * own], leaf] = torch.randn(own, generator=generator).sign()
        leaves[place, leaf] = core_values[parent]
    leaves /= leaves.norm(dim=0)
    Y = torch.zeros(k, n)
    used = torch.rand(k, n, generator=generator).topk(active, dim=0).indices
    Y.scatter_(0, used, 0.5 + torch.rand(active, n, generator=generator))
    A = leaves @ Y
    A += noise * A.square().mean().sqrt() * torch.randn(d, n, generator=generator)
    return Planted(A, leaves, torch.arange(k) // n_leaves, cores, (core + own) / d)


@dataclass(frozen=True)
class Score:
    """How well a tree is recovered.

    Attributes:
        cosine: mean cosine of planted leaves and the features that the Hungarian method matches to them.
        rand: adjusted Rand index of leaves by their strongest parent, against the planted parents; 0 by chance.
        children: mean Jaccard index of the planted parents' leaves and those of the nodes that match them best.
        core: the same of the core neurons and the neurons of those nodes.
    """

    cosine: float
    rand: float
    children: float
    core: float


def score(planted: Planted, hierarchy: Hierarchy, tree: Tree) -> Score:
    """Scores levels 0 and 1 of a hierarchy."""
    from scipy.optimize import linear_sum_assignment

    Z = torch.nn.functional.normalize(hierarchy.levels[0].Z.float(), dim=0)
    cosines = planted.leaves.T @ Z
    rows, columns = linear_sum_assignment(-cosines.numpy())
    leaf_of = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    strongest = hierarchy.links(1).argmax(0)
    found = torch.tensor([int(strongest[column]) for column in columns])
    found_sets = [
        {leaf_of[index] for index, _ in node.children if index in leaf_of}
        for (level, _), node in tree.nodes.items()
        if level == 1
    ]
    planted_sets = [
        set((planted.parent_of == p).nonzero()[:, 0].tolist()) for p in planted.parent_of.unique()
    ]
    jaccard = torch.tensor([[len(a & b) / max(1, len(a | b)) for b in found_sets] for a in planted_sets])
    pairs = linear_sum_assignment(-jaccard.numpy())
    supports = [set(column.nonzero()[:, 0].tolist()) for column in hierarchy.levels[1].Z.T]
    nodes = [index for level, index in tree.nodes if level == 1]
    cores = [
        len(set(planted.cores[p]) & supports[nodes[q]]) / len(set(planted.cores[p]) | supports[nodes[q]])
        for p, q in zip(*pairs, strict=True)
    ]
    return Score(
        cosine=float(cosines[rows, columns].mean()),
        rand=adjusted_rand(planted.parent_of, found),
        children=float(jaccard[pairs].sum() / len(planted_sets)),
        core=sum(cores) / len(planted_sets),
    )


def adjusted_rand(left: Tensor, right: Tensor) -> float:
    """Agreement of two partitions of the same items: 1 if equal, 0 on average by chance (Hubert & Arabie 1985)."""

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = torch.zeros(int(left.max()) + 1, int(right.max()) + 1, dtype=torch.float64)
    table.index_put_((left, right), torch.ones(len(left), dtype=torch.float64), accumulate=True)
    together, one, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = one * other / pairs(torch.tensor([float(len(left))]))
    most = (one + other) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)
