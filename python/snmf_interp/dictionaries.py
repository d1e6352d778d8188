"""Rivals on equal terms: sets of directions over a layer's neurons that score texts and can be steered by.

    A, text_of = store.layer(12), store.samples(12)
    rivals = [
        features(factors),                                            # SNMF
        difference_of_means(A, text_of, labels, train),               # DiffMeans: supervised
        NeuronDictionary(A.shape[1]),                                 # every single neuron and its negative
        random_groups(factors, seed=0),                               # chance
    ]
    scores = rivals[0].scores(A, text_of, len(labels))                # [m, n_texts]
    direction = rivals[0].direction(7)                                # [d_mlp]

A sparse autoencoder joins them as :class:`snmf_interp.autoencoders.AutoencoderDictionary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .concepts import text_maxima

if TYPE_CHECKING:
    import snmf_kernels

# Tokens projected at once: bounds the float32 copy of [tokens, neurons].
_TOKENS = 4096


class Dictionary(Protocol):
    """m directions over d neurons, each of which also scores texts.

    Attributes:
        name: of the method, such as ``"snmf"``.
        size: m.
        concepts: where each direction was made for one concept, their names, ``[m]``; else None, and a concept
            may choose among all.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def concepts(self) -> tuple[str, ...] | None: ...

    def scores(self, activations: Tensor, text_of: Tensor, n_texts: int) -> Tensor:
        """How much each text has of each direction, its largest token counting: ``[m, n_texts]``, floating.

        Args:
            activations: ``[n, d]``, tokens × neurons.
            text_of: which text each token belongs to, ``[n]`` int64.
            n_texts: how many texts there are; one without tokens scores 0.
        """
        ...

    def direction(self, index: int) -> Tensor:
        """One direction, ``[d]`` float32; its length means nothing."""
        ...


@dataclass(frozen=True, eq=False)
class ProjectionDictionary:
    """Any vectors; a token's score is the cosine of its activations with the vector.

    Attributes:
        name: of the method.
        vectors: ``[m, d]`` float32, those that are added when steering.
        concepts: see :class:`Dictionary`.
        scale: ``[d]``: what activations and vectors are divided by before they are compared, as a fit with a
            neuron scale sees both. None for nothing.
        floor: whether cosines below 0 count as 0.
    """

    name: str
    vectors: Tensor
    concepts: tuple[str, ...] | None = None
    scale: Tensor | None = None
    floor: bool = False

    @property
    def size(self) -> int:
        return len(self.vectors)

    def scores(self, activations: Tensor, text_of: Tensor, n_texts: int) -> Tensor:
        scale = torch.ones(()) if self.scale is None else self.scale
        unit = _unit(self.vectors / scale)
        cosines = (unit @ _unit(part.cpu().float() / scale).T for part in activations.split(_TOKENS))
        found = text_maxima(cosines, text_of, n_texts)
        return found.clamp_min(0) if self.floor else found

    def direction(self, index: int) -> Tensor:
        return self.vectors[index]


@dataclass(frozen=True)
class NeuronDictionary:
    """Every single neuron and its negative: direction ``2 i`` is neuron i, ``2 i + 1`` its negative.

    Attributes:
        width: d.
    """

    width: int
    name: str = "neuron"
    concepts: None = None

    @property
    def size(self) -> int:
        return 2 * self.width

    def scores(self, activations: Tensor, text_of: Tensor, n_texts: int) -> Tensor:
        rows = (part.cpu().T for part in activations.split(_TOKENS))
        return text_maxima((torch.stack([part, -part], 1).flatten(0, 1) for part in rows), text_of, n_texts)

    def direction(self, index: int) -> Tensor:
        vector = torch.zeros(self.width)
        vector[index // 2] = 1 - 2 * (index % 2)
        return vector


def features(factors: snmf_kernels.Factorization, name: str = "snmf") -> ProjectionDictionary:
    """The features of a factorisation; as in the paper a token's score is its similarity with a column of Z.

    Both are taken in the units that the fit saw, and similarities below 0 count as 0.
    """
    Z = torch.as_tensor(factors.Z).cpu().float()
    scale = None if factors.neuron_scale is None else torch.as_tensor(factors.neuron_scale).cpu().float()
    return ProjectionDictionary(name, Z.T.contiguous(), scale=scale, floor=True)


def difference_of_means(
    activations: Tensor,
    text_of: Tensor,
    labels: Sequence[str | None],
    train: Tensor,
    *,
    scale: Tensor | None = None,
) -> ProjectionDictionary:
    """DiffMeans: for each concept the mean activations of its training texts minus those of the others'.

    The supervised baseline of the paper: ``mean(activating) − mean(neutral)`` over tokens, where the neutral
    texts are the labelled training texts of all other concepts.

    Args:
        activations: ``[n, d]``, tokens × neurons.
        text_of: which text each token belongs to, ``[n]`` int64.
        labels: the label of each text; texts without one are left out.
        train: which texts may be used, ``[n_texts]`` bool.
        scale: ``[d]``: the units in which texts are scored, see :class:`ProjectionDictionary`; the vectors are the
            same. Those of the factorisation that it is compared with detect far better than none: held-out AUROC
            .923 and .809 at layer 10 of SmolLM2-135M.

    Returns:
        A direction for each label that has tokens in the training texts, in alphabetical order.

    Raises:
        ValueError: fewer than two labels have.
    """
    usable = [label if chosen else None for label, chosen in zip(labels, train.tolist(), strict=True)]
    names = sorted({usable[text] for text in text_of.unique().tolist()} - {None}, key=str)
    if len(names) < 2:
        raise ValueError(f"labels: wanted training texts of at least two labels, got {len(names)}")
    number = {name: i for i, name in enumerate(names)}
    label_of = torch.tensor([number.get(label, len(names)) for label in usable])[text_of]
    sums = torch.zeros(len(names) + 1, activations.shape[1], dtype=torch.float64)
    for part, which in zip(activations.split(_TOKENS), label_of.split(_TOKENS), strict=True):
        sums.index_add_(0, which, part.cpu().double())
    counts = label_of.bincount(minlength=len(names) + 1).double()[:-1, None]
    sums = sums[:-1]
    vectors = sums / counts - (sums.sum(0) - sums) / (counts.sum() - counts)
    return ProjectionDictionary("diffmeans", vectors.float(), tuple(map(str, names)), scale)


def random_groups(factors: snmf_kernels.Factorization, *, seed: int = 0) -> ProjectionDictionary:
    """Chance: as many random groups of as many neurons as a factorisation has features.

    For each column of Z a direction with its number of non-zeros, at neurons drawn uniformly, with standard
    normal values, in the units that the fit saw: multiplied by the neuron scale where there is one, as Z is.
    A token's score is its cosine with it in those units, cut at 0, as a feature's is.

    Args:
        factors: what to imitate.
        seed: of neurons and values.
    """
    sizes = (torch.as_tensor(factors.Z).cpu() != 0).sum(0)
    scale = None if factors.neuron_scale is None else torch.as_tensor(factors.neuron_scale).cpu().float()
    return ProjectionDictionary("random", _random_vectors(factors, sizes, seed), scale=scale, floor=True)


def random_group_vectors(factors: snmf_kernels.Factorization, count: int, *, seed: int = 0) -> Tensor:
    """Vectors as those of :func:`random_groups`, as many as wanted, ``[count, d]`` float32.

    Args:
        factors: what to imitate: sizes are those of its features in turn, without dead ones.
        count: how many.
        seed: of neurons and values.

    Raises:
        ValueError: every feature is dead.
    """
    sizes = (torch.as_tensor(factors.Z).cpu() != 0).sum(0)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        raise ValueError("factors: every feature is dead: there are no groups to imitate")
    return _random_vectors(factors, sizes[torch.arange(count) % len(sizes)], seed)


def _random_vectors(factors: snmf_kernels.Factorization, sizes: Tensor, seed: int) -> Tensor:
    """Vectors with so many non-zeros each, ``[len(sizes), d]`` float32, in the units that Z is in."""
    shape = (factors.Z.shape[0], len(sizes))
    generator = torch.Generator().manual_seed(seed)
    # Each column of the argsort is a permutation: so many of its entries are below the column's count.
    support = torch.rand(shape, generator=generator).argsort(0) < sizes
    vectors = (torch.randn(shape, generator=generator) * support).T.contiguous()
    if factors.neuron_scale is None:
        return vectors
    return vectors * torch.as_tensor(factors.neuron_scale).cpu().float()


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
