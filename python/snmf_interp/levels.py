"""A hierarchy of features: what :func:`snmf_interp.fit_hierarchy` returns, and its file."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import snmf_kernels
from snmf_kernels import Encoding, Factorization, SparseColumns, StopReason, ops

from . import files

_FORMAT, _VERSION = "snmf_interp.hierarchy", 1


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a hierarchy.

    Attributes:
        Z: features in the units of A, ``[d, k_l]``, at most ``ceil(keep·d)`` non-zeros in each column.
        Y: non-negative: ``Y_0 [k_0, n]`` on tokens, else ``Y_l [k_l, k_{l−1}]`` on the features of the level below.
        keep: the fraction of neurons that a feature keeps.
        relative_error: ``‖A − Z_l Y_l ⋯ Y_0‖² / ‖A‖²``, in the units of A: of what this level makes of the tokens.
        relative_loss: the same where neurons are divided by ``Hierarchy.neuron_scale``, the units of the fit.
        start_loss: ``relative_loss`` of the recursion alone, before fine-tuning. It may exceed 1.
    """

    Z: Tensor
    Y: Tensor
    keep: float
    relative_error: float
    relative_loss: float
    start_loss: float

    @property
    def k(self) -> int:
        """Number of features."""
        return int(self.Z.shape[1])


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Features of features: ``A ≈ Z_l Y_l ⋯ Y_1 Y_0`` at each level l, level 0 being the finest.

    Attributes:
        levels: from the finest to the coarsest.
        neuron_scale: the scale ``[d]`` by which neurons were divided in all that was minimised, or None.
        loss_history: the joint loss, relative to ``‖A‖²`` and the number of levels that count, before fine-tuning
            (with features fitted to their coefficients) and after each of its iterations: never rising.
        rejected: steps of fine-tuning that would have raised the loss, and were taken back.
        stop_reason: why fine-tuning stopped; None if there was none.
        options: those of :func:`fit_hierarchy`, as plain JSON values.
    """

    levels: tuple[Level, ...]
    neuron_scale: Tensor | None
    loss_history: tuple[float, ...]
    rejected: int
    stop_reason: StopReason | None
    options: Mapping[str, Any]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of features of each level."""
        return tuple(level.k for level in self.levels)

    def coefficients(self, level: int) -> Tensor:
        """Effective coefficients of a level on tokens, ``C_l = Y_l ⋯ Y_0 [k_l, n]``."""
        product = self.levels[0].Y
        for upper in self.levels[1 : self._number(level) + 1]:
            product = upper.Y @ product
        return product

    def links(self, level: int) -> Tensor:
        """Weights of the links from the features of a level >= 1 to those of the level below, ``[k_l, k_{l−1}]``.

        ``Y_l[p, c] ‖z_p‖ ‖C_c‖``, norms of features in the units of the fit and of rows of effective coefficients,
        relative to the largest of all: how much parent p makes of the tokens by way of child c. No scaling between a
        column of Z and its coefficients changes it.
        """
        if self._number(level) == 0:
            raise ValueError("level: wanted 1 or more, got 0: the finest level has no children")
        upper = self.levels[level]
        Z = upper.Z if self.neuron_scale is None else upper.Z / self.neuron_scale[:, None]
        weights = upper.Y * Z.norm(dim=0)[:, None] * self.coefficients(level - 1).norm(dim=1)
        return weights / weights.max().clamp_min(torch.finfo(weights.dtype).tiny)

    def factorization(self, level: int) -> Factorization:
        """A level by itself, ``A ≈ Z_l C_l``, for all that takes a factorisation: describing, encoding, evaluating."""
        found = self.levels[self._number(level)]
        Y = self.coefficients(level)
        return Factorization(
            Z=found.Z,
            Y=Y,
            relative_error=found.relative_error,
            loss_history=self.loss_history,
            n_iter=max(0, len(self.loss_history) - 1),
            stop_reason=self.stop_reason or StopReason.MAX_ITER,
            backend=str(self.options["backend"]),
            dead_features=((found.Z == 0).all(0) | ~(Y > 0).any(1)).nonzero()[:, 0],
            neuron_scale=self.neuron_scale,
            options={
                "k": found.k,
                "keep": found.keep,
                "ridge": 0.0,
                "hierarchy": list(self.sizes),
                "level": level,
            },
        )

    def encode(self, A: Tensor | np.ndarray, level: int, **options: Any) -> Encoding:
        """Coefficients of other tokens on the features of a level.

        The non-negative least squares solution on Z_l itself, not by way of the levels below: what the level can say of
        the tokens at best, and unique where its features are independent.

        Args:
            A: activations ``[d, m]``.
            level: the level.
            options: ``tol``, ``max_sweeps`` and ``backend`` of :meth:`snmf_kernels.Factorization.encode`.
        """
        return self.factorization(level).encode(A, **options)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header and a checksum; it appears when it is whole."""
        tensors = {"loss_history": torch.tensor(self.loss_history, dtype=torch.float64)}
        if self.neuron_scale is not None:
            tensors["neuron_scale"] = self.neuron_scale
        for number, level in enumerate(self.levels):
            sparse = ops.winner_take_all(level.Z, max(1, int((level.Z != 0).sum(0).max())))
            tensors |= {f"indices.{number}": sparse.indices, f"values.{number}": sparse.values}
            tensors[f"Y.{number}"] = level.Y
        numbers_of = ("keep", "relative_error", "relative_loss", "start_loss")
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "snmf_kernels": snmf_kernels.__version__,
            "d": int(self.levels[0].Z.shape[0]),
            "levels": [{name: getattr(level, name) for name in numbers_of} for level in self.levels],
            "rejected": self.rejected,
            "stop_reason": self.stop_reason.name if self.stop_reason else None,
            "options": dict(self.options),
        }
        files.write_bundle(Path(path), header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Hierarchy:
        """Read a file of :meth:`save`; all tensors are on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of ``save``, damaged, or of a newer version.
        """
        header, tensors = files.read_bundle(Path(path), _FORMAT, _VERSION)
        levels = [
            Level(
                Z=SparseColumns(tensors[f"indices.{i}"], tensors[f"values.{i}"], header["d"]).to_dense(),
                Y=tensors[f"Y.{i}"],
                **facts,
            )
            for i, facts in enumerate(header["levels"])
        ]
        return cls(
            levels=tuple(levels),
            neuron_scale=tensors.get("neuron_scale"),
            loss_history=tuple(tensors["loss_history"].tolist()),
            rejected=header["rejected"],
            stop_reason=StopReason[header["stop_reason"]] if header["stop_reason"] else None,
            options=header["options"],
        )

    def _number(self, level: int) -> int:
        number = operator.index(level)
        if not 0 <= number < len(self.levels):
            raise ValueError(f"level: there are levels 0-{len(self.levels) - 1}, got {level}")
        return number
