"""The sparse form of the features that winner-take-all leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseColumns:
    """A matrix ``Z [d, k]`` that keeps the same number of entries in each column.

    Attributes:
        indices: rows of the kept entries, ``int64 [k, count]``, ascending in each row.
        values: the kept entries, ``[k, count]``. An entry may be zero, where a column has fewer non-zeros.
        d: number of rows of the matrix.
    """

    indices: Tensor
    values: Tensor
    d: int

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

    def scaled_rows(self, scale: Tensor) -> SparseColumns:
        """``diag(scale) Z`` for ``scale [d]``."""
        return SparseColumns(self.indices, self.values * scale[self.indices], self.d)

    def scaled_columns(self, scale: Tensor) -> SparseColumns:
        """``Z diag(scale)`` for ``scale [k]``."""
        return SparseColumns(self.indices, self.values * scale[:, None], self.d)

    def gather(self, transposed: Tensor) -> Tensor:
        """Entries of ``transposed [k, d]`` at the kept places, ``[k, count]``."""
        return transposed.gather(1, self.indices)

    def to_dense(self) -> Tensor:
        """The matrix ``Z [d, k]``, a transposed view of ``[k, d]`` storage: a feature's neurons lie together."""
        dense = torch.zeros(self.k, self.d, dtype=self.values.dtype, device=self.values.device)
        return dense.scatter_(1, self.indices, self.values).T
