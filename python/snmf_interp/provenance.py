"""Where features come from: their neurons, the features of a neuron, what two features share, and their nearest kin.

    feature_neurons(factors, 12, output_weight=model.output_weight(8))
    NeuronIndex.of({8: factors}).uses(8, 1017)
    pair_overlap(factors, 12, 40).p_value
    nearest_by_direction({8: factors, 23: later}, {8: model.output_weight(8), 23: …}, 8, 12)

Neurons of one layer are the same neurons in every run of a model, so features of one layer compare by Z. Neurons of
different layers have nothing in common: there, features compare by the residual direction ``W z`` that they
write, or by the tokens that they are used on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from scipy.stats import hypergeom
from torch import Tensor

from .similarity import as_double, correlations, cosines

if TYPE_CHECKING:
    import snmf_kernels

    from .store import ActivationStore


@dataclass(frozen=True)
class NeuronPart:
    """What one neuron has in a feature.

    Attributes:
        neuron: its number.
        weight: ``z_i / ‖z‖``; the squares of a feature's weights add up to 1.
        share: ``z_i² / ‖z‖²``.
        written: the share of the residual direction ``f = W z`` that it writes, ``⟨z_i w_i, f⟩ / ‖f‖²`` with
            ``w_i`` its column of W (:meth:`LanguageModel.output_weight`). Shares add up to 1; one below 0 writes
            against the others. None without W.
    """

    neuron: int
    weight: float
    share: float
    written: float | None


@dataclass(frozen=True)
class FeatureNeurons:
    """A feature's exact neurons.

    Attributes:
        feature: its number.
        norm: ``‖z‖`` in the units of the activations.
        neurons: all neurons with a weight, by falling ``|weight|``, ties by number.
    """

    feature: int
    norm: float
    neurons: tuple[NeuronPart, ...]

    @property
    def effective_neurons(self) -> float:
        """``1 / Σ share²``: how many neurons of equal weight would be as concentrated. 0 for a dead feature."""
        concentration = sum(part.share**2 for part in self.neurons)
        return 1 / concentration if concentration else 0.0


@dataclass(frozen=True)
class Use:
    """A feature's use of a neuron.

    Attributes:
        layer, feature: which feature.
        weight, share: as in :class:`NeuronPart`.
        rank: 1 if the feature has no neuron of larger weight.
        explained: the share of what all features together give to this neuron over the tokens of the fit,
            ``⟨z_i y, â⟩ / ‖â‖²`` with ``â [n]`` the neuron's row of ``Z Y``. Shares add up to 1.
    """

    layer: int
    feature: int
    weight: float
    share: float
    rank: int
    explained: float


@dataclass(frozen=True, eq=False)
class NeuronIndex:
    """Which features use a neuron, of one layer or several. Make one with :meth:`of`.

    Attributes:
        factors: a factorisation for each layer.
    """

    factors: Mapping[int, snmf_kernels.Factorization]

    @classmethod
    def of(cls, factors: Mapping[int, snmf_kernels.Factorization]) -> NeuronIndex:
        """An index of ``{layer: factorisation}``.

        Raises:
            ValueError: no layer.
        """
        if not factors:
            raise ValueError("factors: wanted at least one layer, got none")
        return cls(dict(factors))

    def uses(self, layer: int, neuron: int) -> tuple[Use, ...]:
        """The features of ``layer`` that use ``neuron``, by falling ``|weight|``, ties by number.

        Raises:
            ValueError: no such layer or neuron.
        """
        offsets, members = self._by_neuron[self._known(layer)]
        factors = self.factors[layer]
        _check_index("neuron", neuron, int(factors.Z.shape[0]))
        features = members[int(offsets[neuron]) : int(offsets[neuron + 1])]
        Z, Y = _factor(factors.Z)[:, features], _factor(factors.Y)[features].double()
        Z = Z.double()
        row = Z[neuron]
        gram = Y @ Y.T
        explained = row * (gram @ row)
        total = float(explained.sum())
        weights = row / Z.norm(dim=0)
        ranks = (Z.abs() > row.abs()).sum(0) + 1
        found = [
            Use(
                layer=layer,
                feature=int(feature),
                weight=float(weights[i]),
                share=float(weights[i]) ** 2,
                rank=int(ranks[i]),
                explained=float(explained[i]) / total if total else 0.0,
            )
            for i, feature in enumerate(features)
        ]
        return tuple(sorted(found, key=lambda use: (-abs(use.weight), use.feature)))

    def counts(self, layer: int) -> Tensor:
        """How many features of ``layer`` use each neuron, ``[d]`` int64."""
        return self._by_neuron[self._known(layer)][0].diff()

    @cached_property
    def _by_neuron(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each layer, where each neuron's features begin, ``[d + 1]``, and the features."""
        index = {}
        for layer, factors in self.factors.items():
            Z = _factor(factors.Z)
            # Row by row, so by neuron.
            neurons, features = Z.nonzero(as_tuple=True)
            index[layer] = (torch.searchsorted(neurons, torch.arange(len(Z) + 1)), features)
        return index

    def _known(self, layer: int) -> int:
        if layer not in self.factors:
            have = ", ".join(map(str, self.factors))
            raise ValueError(f"layer {layer} is not in this index; it has {have}")
        return layer


@dataclass(frozen=True)
class SharedNeuron:
    """A neuron that two features have in common, with its weight ``z_i / ‖z‖`` in each."""

    neuron: int
    first_weight: float
    second_weight: float


@dataclass(frozen=True)
class PairOverlap:
    """What two features of one layer have in common.

    Attributes:
        first, second: the features.
        sizes: how many neurons each has.
        shared: the neurons in both, by falling product of ``|weight|``.
        expected: how many random supports of these sizes share on average, ``s₁ s₂ / d``.
        p_value: the chance that random supports of these sizes share as many or more (hypergeometric). Neurons that
            are in more features than others, as loud ones are in unscaled fits, make it too small.
        jaccard: shared neurons as a share of those in either; 0 for two empty supports.
        cosine: of the two columns of Z.
        direction_cosine: of the residual directions ``W z``; None without W.
        correlation: of the two rows of Y over the tokens of the fit.
    """

    first: int
    second: int
    sizes: tuple[int, int]
    shared: tuple[SharedNeuron, ...]
    expected: float
    p_value: float
    jaccard: float
    cosine: float
    direction_cosine: float | None
    correlation: float


@dataclass(frozen=True)
class Neighbour:
    """A feature that is near another; ``similarity`` is what the search ranked by, in [-1, 1]."""

    layer: int
    feature: int
    similarity: float


def feature_neurons(
    factors: snmf_kernels.Factorization, feature: int, *, output_weight: Tensor | None = None
) -> FeatureNeurons:
    """A feature's neurons with their weights and shares.

    Args:
        factors: of a layer.
        feature: a column of Z.
        output_weight: ``W [d_model, d]`` of that layer, see :meth:`LanguageModel.output_weight`, for the shares of
            the residual direction.

    Raises:
        ValueError: no such feature, or weights of another width.
    """
    z = _column(factors, feature)
    norm = float(z.norm())
    neurons = z.nonzero().squeeze(1)
    weights = z[neurons] / norm if norm else z[neurons]
    written: Sequence[float | None] = [None] * len(neurons)
    if output_weight is not None:
        _check_width(output_weight, len(z))
        parts = as_double(output_weight[:, neurons.to(output_weight.device)]) * z[neurons]
        direction = parts.sum(1)
        # A direction that the neurons cancel to nothing has no shares.
        size = float(direction.square().sum())
        written = (direction @ parts / size).tolist() if size else [None] * len(neurons)
    rows = [
        NeuronPart(neuron, weight, weight**2, part)
        for neuron, weight, part in zip(neurons.tolist(), weights.tolist(), written, strict=True)
    ]
    return FeatureNeurons(
        feature, norm, tuple(sorted(rows, key=lambda part: (-abs(part.weight), part.neuron)))
    )


def pair_overlap(
    factors: snmf_kernels.Factorization, first: int, second: int, *, output_weight: Tensor | None = None
) -> PairOverlap:
    """What two features of one layer have in common.

    Args:
        factors: of a layer.
        first, second: columns of Z.
        output_weight: ``W [d_model, d]`` of that layer (:meth:`LanguageModel.output_weight`), for the cosine of the
            residual directions.

    Raises:
        ValueError: no such feature, or weights of another width.
    """
    one, two = _column(factors, first), _column(factors, second)
    d = len(one)
    both = (one != 0) & (two != 0)
    sizes = int((one != 0).sum()), int((two != 0).sum())
    count = int(both.sum())
    direction = None
    if output_weight is not None:
        _check_width(output_weight, d)
        written = directions(torch.stack([one, two], 1), output_weight)
        direction = float(cosines(written[:, :1], written[:, 1:]))
    Y = _factor(factors.Y)
    neurons = both.nonzero().squeeze(1)
    weights = zip(
        neurons.tolist(), (one / one.norm())[both].tolist(), (two / two.norm())[both].tolist(), strict=True
    )
    shared = [SharedNeuron(*row) for row in weights]
    return PairOverlap(
        first=first,
        second=second,
        sizes=sizes,
        shared=tuple(
            sorted(shared, key=lambda row: (-abs(row.first_weight * row.second_weight), row.neuron))
        ),
        expected=sizes[0] * sizes[1] / d,
        p_value=float(hypergeom.sf(count - 1, d, sizes[0], sizes[1])),
        jaccard=count / max(sum(sizes) - count, 1),
        cosine=float(cosines(one[:, None], two[:, None])),
        direction_cosine=direction,
        correlation=float(correlations(Y[first : first + 1], Y[second : second + 1])),
    )


def directions(Z: Tensor, output_weight: Tensor) -> Tensor:
    """The residual directions ``W Z [d_model, k]``, float64, of ``Z [d, k]``."""
    return as_double(output_weight) @ as_double(Z)


def nearest_by_neurons(
    factors: snmf_kernels.Factorization,
    feature: int,
    others: Mapping[int, snmf_kernels.Factorization],
    *,
    layer: int,
    count: int = 5,
) -> list[Neighbour]:
    """The features of another run, seed or k of the same layer whose columns of Z have the largest cosine.

    Args:
        factors: of ``layer``; ``feature`` is one of its columns.
        others: ``{layer: factorisation}`` of the other run; only ``layer`` is looked at. The same run is welcome:
            the feature itself is left out where the factorisation is the same object.
        layer: the layer.
        count: how many, largest first.

    Raises:
        ValueError: no such feature, or the other run has no such layer or other neurons in it.
    """
    z = _column(factors, feature)
    if layer not in others:
        have = ", ".join(map(str, others)) or "none"
        raise ValueError(
            f"others: wanted layer {layer}, got {have}; neurons of different layers do not compare"
        )
    other = others[layer]
    if other.Z.shape[0] != len(z):
        raise ValueError(f"others: wanted features of {len(z)} neurons, got {other.Z.shape[0]}")
    found = {layer: cosines(z[:, None], _factor(other.Z))[0]}
    return _best(found, count, _itself({layer: factors}, others, layer, feature))


def nearest_by_direction(
    factors: Mapping[int, snmf_kernels.Factorization],
    output_weights: Mapping[int, Tensor],
    layer: int,
    feature: int,
    *,
    others: Mapping[int, snmf_kernels.Factorization] | None = None,
    count: int = 5,
) -> list[Neighbour]:
    """The features of all layers whose residual direction ``W z`` has the largest cosine with a feature's.

    Args:
        factors: ``{layer: factorisation}``.
        output_weights: ``W [d_model, d]`` of each of these layers, see :meth:`LanguageModel.output_weight`.
        layer, feature: the feature; itself left out.
        others: factorisations to search, of another run of the same model; by default ``factors``.
        count: how many, largest first.

    Raises:
        ValueError: no such layer or feature, or weights are missing or of another width.
    """
    _check_layer(factors, layer)
    z = _column(factors[layer], feature)[:, None]
    searched = others if others is not None else factors
    for number, of_layer in {**searched, layer: factors[layer]}.items():
        if number not in output_weights:
            raise ValueError(f"output_weights: layer {number} is missing")
        _check_width(output_weights[number], int(of_layer.Z.shape[0]))
    wanted = directions(z, output_weights[layer])
    found = {
        number: cosines(wanted, directions(_factor(of_layer.Z), output_weights[number]))[0]
        for number, of_layer in searched.items()
    }
    return _best(found, count, _itself(factors, searched, layer, feature))


def nearest_by_coefficients(
    factors: Mapping[int, snmf_kernels.Factorization],
    store: ActivationStore,
    layer: int,
    feature: int,
    *,
    others: Mapping[int, snmf_kernels.Factorization] | None = None,
    other_store: ActivationStore | None = None,
    count: int = 5,
) -> list[Neighbour]:
    """The features used on the same tokens: the largest correlation of rows of Y.

    Layers may have left out different tokens as attention sinks: the correlation is over those that both have.

    Args:
        factors: ``{layer: factorisation}`` of ``store.layer(layer).T``.
        store: the activations that were factorised.
        layer, feature: the feature; itself left out.
        others: factorisations to search; by default ``factors``.
        other_store: the activations of ``others``, of the same texts; by default ``store``.
        count: how many, largest first.

    Raises:
        ValueError: no such layer or feature, factors that are not of the store, or stores of different tokens.
    """
    _check_layer(factors, layer)
    _column(factors[layer], feature)
    searched, there = others if others is not None else factors, other_store or store
    if not torch.equal(store.corpus.ids, there.corpus.ids) or not torch.equal(
        store.corpus.offsets, there.corpus.offsets
    ):
        raise ValueError("other_store: wanted the same tokens as store has; collect the same texts")
    places = _places(store, factors[layer], layer)
    row = _factor(factors[layer].Y)[feature : feature + 1]
    found = {}
    for number, of_layer in searched.items():
        here, in_other = common_tokens(places, _places(there, of_layer, number))
        found[number] = correlations(row[:, here], _factor(of_layer.Y)[:, in_other])[0]
    return _best(found, count, _itself(factors, searched, layer, feature))


def common_tokens(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the places that both have stand in each; places as :meth:`ActivationStore.places` gives them, ascending.

    Returns:
        Indices into ``first [n]`` and into ``second [m]``, of equal length.
    """
    return torch.isin(first, second).nonzero().squeeze(1), torch.isin(second, first).nonzero().squeeze(1)


def _best(found: Mapping[int, Tensor], count: int, left_out: set[tuple[int, int]]) -> list[Neighbour]:
    """Largest first, ties by layer and number."""
    if count < 1:
        raise ValueError(f"count: wanted at least 1, got {count}")
    rows = [
        Neighbour(layer, feature, value)
        for layer, values in found.items()
        for feature, value in enumerate(values.tolist())
        if (layer, feature) not in left_out
    ]
    return sorted(rows, key=lambda row: (-row.similarity, row.layer, row.feature))[:count]


def _itself(
    factors: Mapping[int, object], searched: Mapping[int, object], layer: int, feature: int
) -> set[tuple[int, int]]:
    """The feature, to be left out, where its own factorisation is among those that are searched."""
    return {(layer, feature)} if searched.get(layer) is factors[layer] else set()


def _places(store: ActivationStore, factors: snmf_kernels.Factorization, layer: int) -> Tensor:
    places = store.places(layer)
    if len(places) != factors.Y.shape[1]:
        raise ValueError(
            f"factors: wanted Y with {len(places)} columns for layer {layer} of this store, got {factors.Y.shape[1]}"
        )
    return places


def _factor(array: object) -> Tensor:
    return torch.as_tensor(array).cpu()


def _column(factors: snmf_kernels.Factorization, feature: int) -> Tensor:
    _check_index("feature", feature, int(factors.Z.shape[1]))
    return as_double(factors.Z[:, feature])


def _check_index(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name}: there are {name}s 0-{count - 1}, got {value}")


def _check_layer(factors: Mapping[int, object], layer: int) -> None:
    if layer not in factors:
        raise ValueError(f"layer {layer} is not among the factors: {', '.join(map(str, factors)) or 'none'}")


def _check_width(output_weight: Tensor, d: int) -> None:
    if output_weight.ndim != 2 or output_weight.shape[1] != d:
        raise ValueError(f"output_weight: wanted [d_model, {d}], got {list(output_weight.shape)}")
