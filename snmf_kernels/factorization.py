"""The result of ``fit``: factors, how they came about, coefficients for new data, and a file format."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _backends, _checks
from ._data import DataMatrix, as_matrix, as_weights, precise_dtype, relative
from ._files import read_bundle, write_bundle
from ._precision import product_precision
from ._problem import Problem, kept_count, kkt_residual
from ._scope import computing
from ._version import __version__
from .sparse import SparseColumns

_FORMAT = "snmf_kernels.factorization"
_FORMAT_VERSION = 1
_TENSORS = ("indices", "values", "Y", "loss_history", "dead_features")
_OPTIONAL = ("neuron_scale", "token_weights")
_REMEDY = "fit again or take another copy"

Array = Tensor | np.ndarray


class StopReason(enum.Enum):
    """Why ``fit`` stopped; the value says what that means and what to do about it."""

    CONVERGED = "converged: the loss has not fallen by more than tol within the last patience iterations"
    MAX_ITER = (
        "max_iter reached while the loss was still falling: raise max_iter if you need the last percents"
    )
    EXACT = (
        "the loss is down to the rounding error of its own computation: the data is reproduced as well as this dtype "
        "can tell (a smaller k may do as well; dtype=torch.float64 resolves more)"
    )
    CALLBACK = "the callback asked to stop"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Coefficients of new activations on fixed features.

    Attributes:
        Y: non-negative coefficients ``[k, m]``.
        kkt_residual: distance from optimality, ``‖min(Y, (ZᵀZ Y − ZᵀA) / diag(ZᵀZ))‖ / ‖Y‖`` (Frobenius
            norms): the length of one projected Newton step in each coordinate, relative to Y. Zero at the
            optimum.
        relative_error: ``‖A − Z Y‖² / ‖A‖²`` of the new activations.
    """

    Y: Array
    kkt_residual: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What can be shown about a factorisation; all in the units that ``fit`` minimised in (scaled neurons).

    Attributes:
        kkt_residual: distance of Y from the optimum on this Z, as in :class:`Encoding`.
        swap_residual: the largest share of ``‖A − Z Y‖²`` that choosing one column of Z anew, support and values, would
            save with all else as it is, whatever the penalties. 0: no single column can be improved.
        relative_loss: ``‖A − Z Y‖² / ‖A‖²``.
        lower_bound: ``Σ_{i>k} σ_i² / ‖A‖²`` with the singular values of A: no matrix of rank k, sparse or not, has a
            smaller relative loss (Eckart & Young 1936). None if it was not asked for.
    """

    kkt_residual: float
    swap_residual: float
    relative_loss: float
    lower_bound: float | None

    @property
    def gap(self) -> float | None:
        """By which share the loss exceeds the lower bound; None without one, infinite where the bound is zero."""
        if self.lower_bound is None:
            return None
        if self.lower_bound == 0:
            return 0.0 if self.relative_loss == 0 else math.inf
        return self.relative_loss / self.lower_bound - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Factorization:
    """``A [d, n] ≈ Z [d, k] Y [k, n]`` with ``Y >= 0`` and Z sparse by column.

    Attributes:
        Z: features (neuron groups) in the units of A, ``[d, k]``; at most ``ceil(keep·d)`` non-zeros in each column.
        Y: non-negative coefficients ``[k, n]``.
        relative_error: ``‖A − Z Y‖² / ‖A‖²``, computed from the residual itself, in the units of A: of all tokens
            alike, or weighted as ``token_weights`` of ``fit`` were given. Clipped weights do not count in it.
        clipped_error: the same where a token whose norm is over five times a typical one (the root mean square over
            the 90 % of smallest norm) counts as a typical one: an error that a few far-out tokens (attention sinks) do
            not decide. It is ``relative_error`` where there are none; None in files of versions that did not measure
            it.
        loss_history: the objective after each iteration, a tuple of floats. It is ``‖A − Z Y‖²``, of
            ``diag(1/s) A`` where a neuron scale s was asked for; taken from Gram matrices, so that its
            rounding error is about 1e-7 ``‖A‖²`` in float32. With penalties they are included. All but ``solver="mu"``
            add an entry for the sweeps over Y that follow the last iteration.
        n_iter: iterations run.
        stop_reason: why the loop stopped, a :class:`StopReason`.
        backend: what ran it.
        dead_features: indices of features with a zero column of Z or a zero row of Y, ascending.
        neuron_scale: the scale s ``[d]`` by which neurons were divided, or None.
        options: the options of ``fit``, as plain JSON values.
        token_weights: the weights of the tokens' squared residuals in the objective ``[n]``, given or clipped; None for
            ones.
    """

    Z: Array
    Y: Array
    relative_error: float
    loss_history: tuple[float, ...]
    n_iter: int
    stop_reason: StopReason
    backend: str
    dead_features: Array
    neuron_scale: Array | None
    options: Mapping[str, Any]
    clipped_error: float | None = None
    token_weights: Array | None = None

    @property
    def k(self) -> int:
        """Number of features."""
        return int(self.Z.shape[1])

    @property
    def W_dec(self) -> Array:
        """The features one to a row, ``[k, d]``, as sparse-autoencoder code expects them; a view of Z."""
        return self.Z.T

    @property
    def feature_acts(self) -> Array:
        """The coefficients one token to a row, ``[n, k]``, as sparse-autoencoder code expects them; a view of Y."""
        return self.Y.T

    def __repr__(self) -> str:
        d, k = self.Z.shape
        clipped = ""
        if self.clipped_error is not None and self.clipped_error != self.relative_error:
            clipped = f"clipped_error={self.clipped_error:.4g}, "
        return (
            f"Factorization(d={d}, k={k}, n={self.Y.shape[1]}, relative_error={self.relative_error:.4g}, {clipped}"
            f"n_iter={self.n_iter}, stop_reason={self.stop_reason.name}, backend={self.backend!r}, "
            f"dead_features={len(self.dead_features)})"
        )

    def encode(self, A: Any, *, tol: float = 1e-4, max_sweeps: int = 1000, backend: str = "auto") -> Encoding:
        """Coefficients of new activations: the non-negative least squares problem against Z.

        Minimises what ``fit`` minimised: with a neuron scale, the residual of the scaled neurons. By coordinate
        descent; where features are so nearly dependent that this would take longer, by exchanging active sets first
        (Kim & Park 2011), which is exact.

        Args:
            A: activations ``[d, m]``, as for ``fit``.
            tol: wanted KKT residual (see :class:`Encoding`).
            max_sweeps: bound on the sweeps of coordinate descent; the residual that was reached is reported either way.
            backend: as for ``fit``.

        Returns:
            An :class:`Encoding`, its Y numpy where A is numpy, else a tensor on A's device.
        """
        matrix = as_matrix("A", A)
        Z = _tensor(self.Z)
        if matrix.shape[0] != Z.shape[0]:
            raise ValueError(
                f"A: wanted {Z.shape[0]} rows (neurons), as Z has, got shape {tuple(matrix.shape)}"
            )
        if not _checks.number("tol", tol) > 0:
            raise ValueError(f"tol: wanted a number > 0, got {tol}")
        max_sweeps = _checks.integer("max_sweeps", max_sweeps, 1)
        Z = Z.to(matrix.device)
        kernels = _backends.choose_all(matrix.device, Z.dtype, backend)
        with product_precision(matrix.device), computing():
            problem, features = self._problem(DataMatrix(matrix, Z.dtype, kernels))
            Y, residual, measured = problem.solve_coefficients(features, tol, max_sweeps)
        return Encoding(
            Y=Y.numpy() if isinstance(A, np.ndarray) else Y,
            kkt_residual=residual,
            relative_error=relative(float(measured.residual), float(measured.data)),
        )

    def certificate(self, A: Any, *, bound: bool = True, backend: str = "auto") -> Certificate:
        """How far this is from what can be shown to be optimal, for the activations it was fitted on.

        Args:
            A: as it was given to ``fit``. Tokens are weighted as they were there.
            bound: whether to compute the lower bound, which takes all eigenvalues of the smaller Gram matrix of A in
                float64: seconds for 2,000 neurons, minutes and 1.6 GB for 14,000.
            backend: as for ``fit``.

        Returns:
            A :class:`Certificate`.
        """
        matrix = as_matrix("A", A)
        wanted = (self.Z.shape[0], self.Y.shape[1])
        if tuple(matrix.shape) != wanted:
            raise ValueError(f"A: wanted the activations of the fit, {wanted}, got {tuple(matrix.shape)}")
        if self.token_weights is None and self.options.get("weighted"):
            raise ValueError(
                "token_weights: the fit had some, and the version that wrote this file did not keep them; fit again"
            )
        Y, Z = _tensor(self.Y).to(matrix.device), _tensor(self.Z).to(matrix.device)
        weights = as_weights(self.token_weights, matrix, Z.dtype)
        kernels = _backends.choose_all(matrix.device, Z.dtype, backend)
        with product_precision(matrix.device), computing():
            data = DataMatrix(matrix, Z.dtype, kernels, weights)
            problem, features = self._problem(data)
            ZtZ = problem.gram(features)
            measured = problem.update_coefficients(features, ZtZ, Y, 0, out=torch.empty_like(Y), measure=True)
            squared_norm = float(data.squared_norm())
            # From the residual, and from sums in float64: what is left of a good fit is lost in those of float32.
            loss = float(data.squared_residual(features, Y, precise_dtype(Y.device)))
            precise = Y.to(precise_dtype(Y.device))
            AYt, YYt = data.times_coefficients(precise), data.gram_of_coefficients(precise)
            gains = _gains_of_choosing_anew(features, AYt, YYt, problem.count)[
                self.options.get("n_fixed", 0) :
            ]
            tail = data.tail_energy(self.k) if bound else None
        return Certificate(
            kkt_residual=kkt_residual(measured),
            # The gain is of sums as large as A, the loss is not.
            swap_residual=min(1.0, relative(float(gains.max()), loss)),
            relative_loss=relative(loss, squared_norm),
            lower_bound=None if tail is None else relative(tail, squared_norm),
        )

    def _problem(self, data: DataMatrix) -> tuple[Problem, SparseColumns]:
        """What ``fit`` minimised, on other data, and the features in its units."""
        features = sparse_features(_tensor(self.Z).to(data.device))
        if self.neuron_scale is not None:
            data.divide_neurons(_tensor(self.neuron_scale).to(data.device))
        elif self.options.get("unit", 1.0) != 1:
            data.divide(self.options["unit"])
        if data.scale is not None:
            features = features.scaled_rows(1 / data.scale)
        problem = Problem(
            data,
            count=kept_count(self.options["keep"], data.d),
            ridge=self.options.get("ridge", 0.0),
            threshold=self.options.get("l1_threshold", 0.0),
            l2=self.options.get("l2", 0.0),
            max_active=self.options.get("max_active") or 0,
        )
        return problem, features

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (the factors) with a JSON header (everything else, versions, a checksum).

        The file is written under a temporary name and renamed: a file of that name is replaced whole or not at all.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(
                f"path: wanted a file name, got the folder {path}; add a name such as 'factors.safetensors'"
            )
        sparse = sparse_features(_tensor(self.Z).cpu())
        tensors = {
            "indices": sparse.indices,
            "values": sparse.values,
            "Y": _tensor(self.Y),
            "loss_history": torch.tensor(self.loss_history, dtype=torch.float64, device="cpu"),
            "dead_features": _tensor(self.dead_features),
        }
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                tensors[name] = _tensor(value)
        header = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "snmf_kernels": __version__,
            "torch": torch.__version__,
            "d": int(self.Z.shape[0]),
            "relative_error": self.relative_error,
            "clipped_error": self.clipped_error,
            "n_iter": self.n_iter,
            "stop_reason": self.stop_reason.name,
            "backend": self.backend,
            "options": dict(self.options),
        }
        write_bundle(path, "snmf_kernels", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factorization:
        """Reads a file of ``save``; the factors are CPU tensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of ``save``, damaged, or of a newer format.
        """
        path = Path(path)

        def check(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            if header.get("format") != _FORMAT:
                raise ValueError(f"path: {path} holds {header.get('format')!r}, wanted {_FORMAT!r}")
            version = header.get("format_version")
            if not isinstance(version, int):
                raise ValueError(f"path: {path} names no format version; it is damaged: {_REMEDY}")
            if version > _FORMAT_VERSION:
                raise ValueError(
                    f"path: {path} has format {version}, this version reads up to {_FORMAT_VERSION}; "
                    f"upgrade snmf-kernels (the file was written by {header.get('snmf_kernels')})"
                )
            missing = [name for name in _TENSORS if name not in tensors]
            if missing:
                raise ValueError(f"path: {path} lacks {', '.join(missing)}; it is damaged: {_REMEDY}")

        header, tensors = read_bundle(path, "snmf_kernels", check, _REMEDY)
        return cls(
            Z=SparseColumns(tensors["indices"], tensors["values"], header["d"]).to_dense(),
            Y=tensors["Y"],
            relative_error=header["relative_error"],
            loss_history=tuple(tensors["loss_history"].tolist()),
            n_iter=header["n_iter"],
            stop_reason=StopReason[header["stop_reason"]],
            backend=header["backend"],
            dead_features=tensors["dead_features"],
            options=header["options"],
            clipped_error=header.get("clipped_error"),
            **{name: tensors.get(name) for name in _OPTIONAL},
        )


def sparse_features(Z: Tensor) -> SparseColumns:
    """Z in sparse form, with as many entries to a column as the fullest one has."""
    count = max(1, int((Z != 0).sum(0).max()))
    select = _backends.choose("winner_take_all", Z.device, Z.dtype).function
    return select(Z, count)


def _gains_of_choosing_anew(Z: SparseColumns, AYt: Tensor, YYt: Tensor, count: int) -> Tensor:
    """By how much the loss falls when each column of Z by itself is replaced by the best one, ``[k]``."""
    dense = Z.to_dense().T.to(AYt.dtype)
    energy = torch.diagonal(YYt)
    used = energy > 0
    rest = AYt - YYt @ dense + energy[:, None] * dense
    best = rest.square().topk(count, dim=1).values.sum(1) / torch.where(used, energy, 1)
    now = 2 * (rest * dense).sum(1) - energy * dense.square().sum(1)
    return torch.where(used, best - now, 0).clamp(min=0)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array
