"""The result of ``fit``: factors, how they came about, coefficients for new data, and a file format."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import _backends, _checks
from ._data import DataMatrix, as_matrix, full_precision, relative
from ._version import __version__
from .sparse import SparseColumns

_FORMAT = "snmf_kernels.factorization"
_FORMAT_VERSION = 1
_TENSORS = ("indices", "values", "Y", "loss_history", "dead_features")

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


@dataclasses.dataclass(frozen=True, eq=False)
class Factorization:
    """``A [d, n] ≈ Z [d, k] Y [k, n]`` with ``Y >= 0`` and Z sparse by column.

    Attributes:
        Z: features (neuron groups) in the units of A, ``[d, k]``; at most ``ceil(keep·d)`` non-zeros in each column.
        Y: non-negative coefficients ``[k, n]``.
        relative_error: ``‖A − Z Y‖² / ‖A‖²``, computed from the residual itself, in the units of A.
        loss_history: the objective after each iteration, a tuple of floats. It is ``‖A − Z Y‖²``, of
            ``diag(1/s) A`` where a neuron scale s was asked for; taken from Gram matrices, so that its
            rounding error is about 1e-7 ``‖A‖²`` in float32.
        n_iter: iterations run.
        stop_reason: why the loop stopped, a :class:`StopReason`.
        backend: what ran it.
        dead_features: indices of features with a zero column of Z or a zero row of Y, ascending.
        neuron_scale: the scale s ``[d]`` by which neurons were divided, or None.
        options: the options of ``fit``, as plain JSON values.
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
        return (
            f"Factorization(d={d}, k={k}, n={self.Y.shape[1]}, relative_error={self.relative_error:.4g}, "
            f"n_iter={self.n_iter}, stop_reason={self.stop_reason.name}, backend={self.backend!r}, "
            f"dead_features={len(self.dead_features)})"
        )

    def encode(self, A: Any, *, tol: float = 1e-4, max_sweeps: int = 1000, backend: str = "auto") -> Encoding:
        """Coefficients of new activations: the non-negative least squares problem against Z, by coordinate descent.

        Minimises what ``fit`` minimised: with a neuron scale, the residual of the scaled neurons.

        Args:
            A: activations ``[d, m]``, as for ``fit``.
            tol: wanted KKT residual (see :class:`Encoding`).
            max_sweeps: bound on the sweeps; the residual that was reached is reported either way.
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
        with full_precision(matrix.device):
            data = DataMatrix(matrix, Z.dtype, kernels)
            sparse = _sparse_features(Z)
            if self.neuron_scale is not None:
                scale = _tensor(self.neuron_scale).to(matrix.device)
                data.divide_neurons(scale)
                sparse = sparse.scaled_rows(1 / scale)
            Y, residual = solve_coefficients(data, sparse, tol, max_sweeps)
            error = float(data.unscaled_residual_row_squares(Z, Y).sum())
        return Encoding(
            Y=Y.numpy() if isinstance(A, np.ndarray) else Y,
            kkt_residual=residual,
            relative_error=relative(error, float(data.row_squares.sum())),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (the factors) with a JSON header (everything else, versions, a checksum).

        The file is written under a temporary name and renamed: a file of that name is replaced whole or not at all.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(
                f"path: wanted a file name, got the folder {path}; add a name such as 'factors.safetensors'"
            )
        sparse = _sparse_features(_tensor(self.Z).cpu())
        tensors = {
            "indices": sparse.indices,
            "values": sparse.values,
            "Y": _tensor(self.Y).cpu().contiguous(),
            "loss_history": torch.tensor(self.loss_history, dtype=torch.float64, device="cpu"),
            "dead_features": _tensor(self.dead_features).cpu(),
        }
        if self.neuron_scale is not None:
            tensors["neuron_scale"] = _tensor(self.neuron_scale).cpu()
        header = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "snmf_kernels": __version__,
            "torch": torch.__version__,
            "d": int(self.Z.shape[0]),
            "relative_error": self.relative_error,
            "n_iter": self.n_iter,
            "stop_reason": self.stop_reason.name,
            "backend": self.backend,
            "options": dict(self.options),
        }
        header["sha256"] = _checksum(header, tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            save_file(tensors, temporary, metadata={"snmf_kernels": json.dumps(header)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factorization:
        """Reads a file of ``save``; the factors are CPU tensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of ``save``, damaged, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except SafetensorError as error:
            raise ValueError(
                f"path: {path} is damaged or no safetensors file ({error}); fit again or take another copy"
            ) from error
        if "snmf_kernels" not in metadata:
            raise ValueError(
                f"path: {path} was not written by Factorization.save (it has no snmf_kernels header)"
            )
        try:
            header = json.loads(metadata["snmf_kernels"])
        except json.JSONDecodeError as error:
            raise _damaged(path, f"has an unreadable header ({error})") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            found = header.get("format") if isinstance(header, dict) else header
            raise ValueError(f"path: {path} holds {found!r}, wanted {_FORMAT!r}")
        version = header.get("format_version")
        if not isinstance(version, int):
            raise _damaged(path, "names no format version")
        if version > _FORMAT_VERSION:
            raise ValueError(
                f"path: {path} has format {version}, this version reads up to {_FORMAT_VERSION}; "
                f"upgrade snmf-kernels (the file was written by {header.get('snmf_kernels')})"
            )
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise _damaged(path, f"lacks {', '.join(missing)}")
        if _checksum(header, tensors) != header.get("sha256"):
            raise _damaged(path, "does not match its checksum")
        return cls(
            Z=SparseColumns(tensors["indices"], tensors["values"], header["d"]).to_dense(),
            Y=tensors["Y"],
            relative_error=header["relative_error"],
            loss_history=tuple(tensors["loss_history"].tolist()),
            n_iter=header["n_iter"],
            stop_reason=StopReason[header["stop_reason"]],
            backend=header["backend"],
            dead_features=tensors["dead_features"],
            neuron_scale=tensors.get("neuron_scale"),
            options=header["options"],
        )


def _sparse_features(Z: Tensor) -> SparseColumns:
    """Z in sparse form, with as many entries to a column as the fullest one has."""
    count = max(1, int((Z != 0).sum(0).max()))
    select = _backends.choose("winner_take_all", Z.device, Z.dtype).function
    return select(Z, count)


def solve_coefficients(
    data: DataMatrix, Z: SparseColumns, tol: float, max_sweeps: int
) -> tuple[Tensor, float]:
    """Non-negative least squares of ``data`` on the columns of Z: ``(Y [k, n], KKT residual)``.

    Coordinate descent in rounds, until the residual is at most ``tol`` or ``max_sweeps`` are done.
    """
    kernels = data.kernels
    ZtA = data.sparse_transposed_times(Z)
    ZtZ = kernels.sparse_product(Z, Z.to_dense())
    if not bool(ZtA.sum().isfinite()):
        raise FloatingPointError(
            f"A: its products with Z are not finite in {str(ZtA.dtype).removeprefix('torch.')}; "
            "divide A by its largest magnitude, or fit with dtype=torch.float64"
        )
    Y = torch.zeros_like(ZtA)
    sweeps, residual = 0, torch.inf
    while sweeps < max_sweeps and residual > tol:
        # Rounds grow, so that looking at the residual stays a small part of the work.
        round_ = min(max(5, sweeps), max_sweeps - sweeps)
        Y = kernels.coordinate_descent(Y, ZtA, ZtZ, round_)
        sweeps += round_
        residual = kkt_residual(Y, ZtA, ZtZ)
    return Y, residual


def kkt_residual(Y: Tensor, ZtA: Tensor, ZtZ: Tensor) -> float:
    """``‖min(Y, (ZtZ Y − ZtA) / diag(ZtZ))‖ / ‖Y‖``, features with a zero column left out.

    Zero where Y = 0 is the optimum.
    """
    diagonal = torch.diagonal(ZtZ)
    alive = diagonal > 0
    step = torch.addmm(ZtA[alive], ZtZ[alive], Y, beta=-1) / diagonal[alive, None]
    violation = float(torch.minimum(Y[alive], step).norm())
    # Written so that NaN is passed on.
    return 0.0 if violation == 0 else violation / max(float(Y.norm()), torch.finfo(Y.dtype).tiny)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"path: {path} {what}; it is damaged: fit again or take another copy")


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header (but for the checksum itself) and of all tensors."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
