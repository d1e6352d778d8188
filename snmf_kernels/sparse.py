"""The sparse form of the features that winner-take-all leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseColumns:
    """A matrix ``Z [d, k]`` that keeps the same number of entries in each column.

    Attributes:
        indices: rows of the kept entries, ``int64 [k, count]``, ascending in each row.
        values: the kept entries, ``[k, count]``. An entry may be zero, where a column has fewer non-zeros.
        d: number of rows of the matrix.
        starts: where columns have different numbers of entries, ``int64 [k + 1]``: column i has its first
            ``starts[i + 1] - starts[i]``, and the others are zeros that fill it up. None: ``count`` each.
    """

    indices: Tensor
    values: Tensor
    d: int
    starts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int64 or self.indices.ndim != 2:
            raise ValueError(
                f"indices: wanted an int64 matrix [k, count], got {self.indices.dtype} "
                f"of shape {tuple(self.indices.shape)}"
            )
        if self.values.shape != self.indices.shape or self.values.device != self.indices.device:
            raise ValueError(
                f"values: wanted shape {tuple(self.indices.shape)} on {self.indices.device} to go with indices, "
                f"got {tuple(self.values.shape)} on {self.values.device}"
            )

    @property
    def k(self) -> int:
        """Number of columns."""
        return self.indices.shape[0]

    def copied(self) -> SparseColumns:
        """The same in memory of its own."""
        return SparseColumns(self.indices.clone(), self.values.clone(), self.d, self.starts)

    def scaled_rows(self, scale: Tensor) -> SparseColumns:
        """``diag(scale) Z`` for ``scale [d]``."""
        return SparseColumns(self.indices, self.values * scale[self.indices], self.d, self.starts)

    def scaled_columns(self, scale: Tensor) -> SparseColumns:
        """``Z diag(scale)`` for ``scale [k]``."""
        return SparseColumns(self.indices, self.values * scale[:, None], self.d, self.starts)

    def gather(self, transposed: Tensor) -> Tensor:
        """Entries of ``transposed [k, d]`` at the kept places, ``[k, count]``."""
        return transposed.gather(1, self.indices)

    def to_dense(self) -> Tensor:
        """The matrix ``Z [d, k]``, a transposed view of ``[k, d]`` storage: a feature's neurons lie together."""
        dense = torch.zeros(self.k, self.d, dtype=self.values.dtype, device=self.values.device)
        # Added, for a column that was filled up names a row twice.
        return dense.scatter_add_(1, self.indices, self.values).T

    def joined(self, other: SparseColumns) -> SparseColumns:
        """The columns of both, those of ``other`` last. Shorter ones are filled up with explicit zeros at their end."""
        counts = self.indices.shape[1], other.indices.shape[1]
        left, right = self._filled(max(counts)), other._filled(max(counts))
        starts = None
        if counts[0] != counts[1]:
            steps = torch.arange(max(self.k, other.k) + 1, device=self.indices.device)
            starts = torch.cat(
                [steps[: self.k] * counts[0], self.k * counts[0] + steps[: other.k + 1] * counts[1]]
            )
        return SparseColumns(
            torch.cat([left.indices, right.indices]), torch.cat([left.values, right.values]), self.d, starts
        )

    def _filled(self, count: int) -> SparseColumns:
        missing = count - self.indices.shape[1]
        if not missing:
            return self
        # A row that a column keeps already will do: the added value is zero.
        indices = torch.cat([self.indices, self.indices[:, -1:].expand(-1, missing)], 1)
        return SparseColumns(
            indices, torch.cat([self.values, self.values.new_zeros(self.k, missing)], 1), self.d
        )

    def supports(self) -> tuple[Supports, Tensor]:
        """The kept entries by neuron instead of by feature, and the order ``[k * count]`` that puts them so."""
        rows, order = self.indices.flatten().sort(stable=True)
        # Not by bincount, which waits for a GPU to say how many there are.
        offsets = torch.searchsorted(rows, torch.arange(self.d + 1, device=rows.device))
        return Supports(offsets, order // self.indices.shape[1], self.d), order


@dataclass(frozen=True)
class Supports:
    """Which features each neuron belongs to.

    Attributes:
        offsets: ``int64 [d + 1]``; those of neuron r are ``members[offsets[r]:offsets[r + 1]]``.
        members: features, ``int64``, each at most once to a neuron.
        d: number of neurons.
    """

    offsets: Tensor
    members: Tensor
    d: int


class PassResult(NamedTuple):
    """What a pass over the activations gives beside the new coefficients.

    The numbers are tensors without dimensions where Y is, so that a GPU need not be waited for: float64 (float32
    where the device has no more), ``sweeps`` int64.

    Attributes:
        AYt: ``(A Yᵀ)ᵀ``, tokens weighted: its entries at the kept places of Z, ``[k, count]``, all of it, ``[k, d]``,
            or None, as was asked for.
        dot: ``⟨ZᵀA − shift, Y⟩``, tokens weighted.
        violation: ``‖min(Y, (ZtZ Y − ZtA + shift) / diag(ZtZ))‖²`` over living features; 0 if not asked for.
        squared_norm: ``‖Y‖²``.
        residual, data: ``‖A − Z Y‖²`` and ``‖A‖²``, tokens weighted, if the residual was asked for; else 0.
        sweeps: the most sweeps that a token took.
    """

    AYt: Tensor | None
    dot: Tensor
    violation: Tensor
    squared_norm: Tensor
    residual: Tensor
    data: Tensor
    sweeps: Tensor

    @classmethod
    def of_sums(cls, AYt: Tensor | None, sums: Tensor) -> PassResult:
        """From the numbers as one tensor ``[6]``."""
        dot, violation, squared_norm, residual, data, most_sweeps = sums.unbind()
        return cls(AYt, dot, violation, squared_norm, residual, data, most_sweeps.long())
