"""Which texts are the same, so that none is on both sides of a split."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor


def text_groups(texts: Sequence[str], *others: Sequence[Hashable]) -> Tensor:
    """For each text the number of the first one that is equal to it; case, spaces and Unicode form do not count.

    Args:
        texts: the texts.
        others: further values, one for each text; texts that are equal in any of them are equal too.

    Returns:
        ``[n_texts]`` int64, ``0, 1, 2, …`` where all texts differ.
    """
    return first_equal([text_key(text) for text in texts], *others)


def first_equal(*values: Sequence[Hashable]) -> Tensor:
    """For each place the first one that is equal to it in any of several sequences, or in steps over others.

    Returns:
        ``[n]`` int64.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(values[0])
    firsts: list[int] = []
    for sequence in values:
        first_of: dict[Hashable, int] = {}
        firsts += [first_of.setdefault(value, place) for place, value in enumerate(sequence)]
    places = np.tile(np.arange(n), len(values))
    graph = coo_matrix((np.ones(len(firsts)), (firsts, places)), shape=(n, n))
    component = connected_components(graph, directed=False)[1] if n else np.zeros(0, dtype=np.int64)
    _, first, number = np.unique(component, return_index=True, return_inverse=True)
    return torch.from_numpy(first[number].astype(np.int64))


def text_key(text: str) -> str:
    """What texts have in common that differ in case, spaces and Unicode form alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
