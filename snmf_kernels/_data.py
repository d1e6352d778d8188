"""The activations as the solver sees them: products with ``A`` in any dtype and layout, without copying it whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._backends import Kernels
from ._checks import dtype_name
from .reference import dense_product, token_blocks
from .sparse import PassResult, SparseColumns

# Elements of A that are squared in float64 at a time.
_SQUARE_ELEMENTS = {"cpu": 1 << 16}
# Gram matrices of at least so many rows are computed as their upper blocks only.
_BLOCKED_GRAM, _GRAM_BLOCK = 192, 96
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_matrix(name: str, value: Any) -> Tensor:
    """``value`` (torch or numpy, memmaps too) as a real floating matrix that shares its memory wherever possible.

    Raises:
        TypeError: neither a torch tensor nor a numpy array, or not of a real floating dtype.
        ValueError: not two-dimensional, or empty.
    """
    if isinstance(value, np.ndarray):
        value = _from_numpy(name, value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a torch tensor or a numpy array, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: wanted dtype float16, bfloat16, float32 or float64, "
            f"got {dtype_name(value.dtype)}; convert it with {name}.float() or {name}.astype('float32')"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: wanted a dense tensor, got layout {value.layout}; convert it with {name}.to_dense()"
        )
    if value.ndim != 2:
        raise ValueError(f"{name}: wanted a matrix [d, n] (neurons x tokens), got shape {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name}: wanted at least one row and one column, got shape {tuple(value.shape)}")
    # A lazily negated view has the wrong sign in its memory.
    return value.detach().resolve_neg()


def _from_numpy(name: str, array: np.ndarray) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: wanted a plain array, got a masked one; fill it ({name}.filled(0)) or drop the masked tokens"
        )
    if array.dtype.name == "bfloat16":  # ml_dtypes; numpy itself has none, and torch does not take it
        return _from_numpy(name, array.view(np.int16)).view(torch.bfloat16)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)  # torch has no such strides
    try:
        with warnings.catch_warnings():
            # A memmap opened for reading: nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(
            f"{name}: wanted dtype float16, bfloat16, float32 or float64, got {array.dtype}"
        ) from error


def as_weights(token_weights: Any, matrix: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Token weights as ``[n]`` of the working dtype beside the matrix, or None."""
    if token_weights is None:
        return None
    weights = torch.as_tensor(token_weights)
    if weights.shape != matrix.shape[1:]:
        raise ValueError(
            f"token_weights: wanted one for each of the {matrix.shape[1]} tokens, got shape {tuple(weights.shape)}"
        )
    weights = weights.detach().to(matrix.device, dtype)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("token_weights: wanted finite numbers >= 0, got others; use 0 to leave a token out")
    if not bool((weights > 0).any()):
        raise ValueError("token_weights: wanted at least one above 0, got zeros only")
    return weights


class DataMatrix:
    """``A [d, n]``, or ``diag(1/scale) A`` with a scale for each neuron, and the products that the solver needs.

    Args:
        A: the activations as ``as_matrix`` returns them, on the device of the computation.
        dtype: the working dtype, float32 or float64.
        kernels: functions that run on that device.
        token_weights: ``[n]`` in that dtype and on that device, non-negative, or None for ones.
    """

    def __init__(
        self, A: Tensor, dtype: torch.dtype, kernels: Kernels, token_weights: Tensor | None = None
    ) -> None:
        self.A = A
        self.dtype = dtype
        self.kernels = kernels
        self.token_weights = token_weights
        self.scale: Tensor | None = None
        self._inverse_scale: Tensor | None = None

    @property
    def d(self) -> int:
        """Number of neurons."""
        return self.A.shape[0]

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.A.shape[1]

    @property
    def total_weight(self) -> float:
        """Number of tokens, each counted by its weight."""
        return float(self.n) if self.token_weights is None else float(self.token_weights.sum())

    @property
    def device(self) -> torch.device:
        """Where A lies."""
        return self.A.device

    def scale_neurons(self) -> None:
        """From now on stand for ``diag(1/s) A`` with s the root mean square of each neuron (1 where it is zero)."""
        rms = (self.row_squares / self.total_weight).sqrt().to(self.dtype)
        # The inverse of a subnormal number is infinite.
        self.divide_neurons(torch.where(rms >= torch.finfo(self.dtype).tiny, rms, 1))

    def divide_neurons(self, scale: Tensor) -> None:
        """From now on stand for ``diag(1/scale) A``."""
        self.scale = scale
        self._inverse_scale = 1 / scale

    def squared_norm(self) -> Tensor:
        """``‖A‖²_F`` of the matrix this stands for, tokens weighted; a tensor without dimensions."""
        return (self.row_squares * self._row_weights()).sum()

    def columns(self, tokens: Tensor) -> Tensor:
        """A copy of the columns of some tokens, converted and scaled, ``[d, len(tokens)]``."""
        # torch gathers rows that lie together much faster than columns that do not, and copies all of a matrix first
        # whose columns it is to gather where its rows do not lie together.
        neuron_major = self.A.stride(1) == 1
        chosen = self.A.index_select(1, tokens) if neuron_major else self.A.T.index_select(0, tokens).T
        chosen = chosen.to(self.dtype)
        return chosen if self._inverse_scale is None else chosen.mul_(self._inverse_scale[:, None])

    def times(self, right: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(A diag(weights) right)ᵀ`` for ``right [n, r]``, as ``[r, d]``: a feature's neurons lie together."""
        product = dense_product(right.T, self.A, weights)
        return product if self._inverse_scale is None else product.mul_(self._inverse_scale)

    def transposed_times(self, left: Tensor) -> Tensor:
        """``leftᵀ A`` for ``left [d, r]``, as ``[r, n]``."""
        if self.A.dtype == self.dtype and 1 in self.A.stride():
            return self.scaled(left).T @ self.A
        product = torch.empty(left.shape[1], self.n, dtype=self.dtype, device=self.device)
        for tokens, block in self.transposed_times_blocks(left):
            product[:, tokens] = block
        return product

    def transposed_times_blocks(self, left: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """``leftᵀ A`` in blocks of tokens."""
        # Scaling the smaller matrix leaves A as it lies.
        left = self.scaled(left)
        for tokens, block in self._raw_blocks():
            yield tokens, left.T @ block.to(self.dtype)

    def times_coefficients(self, Y: Tensor) -> Tensor:
        """``(A diag(w) Yᵀ)ᵀ`` for ``Y [k, n]`` and the token weights w, as ``[k, d]``."""
        return self.times(Y.T, self.token_weights)

    def gram_of_coefficients(self, Y: Tensor) -> Tensor:
        """``Y diag(w) Yᵀ [k, k]`` for the token weights w."""
        if self.token_weights is not None:
            gram = torch.zeros(len(Y), len(Y), dtype=Y.dtype, device=self.device)
            for tokens, _ in self._raw_blocks():
                gram.addmm_(Y[:, tokens] * self.token_weights[tokens], Y[:, tokens].T)
            return gram
        if len(Y) < _BLOCKED_GRAM or self.device.type != "cpu":
            return Y @ Y.T
        gram = torch.empty(len(Y), len(Y), dtype=Y.dtype)
        for start in range(0, len(Y), _GRAM_BLOCK):
            rows = slice(start, start + _GRAM_BLOCK)
            torch.mm(Y[rows], Y[start:].T, out=gram[rows, start:])
            gram[start:, rows] = gram[rows, start:].T
        return gram

    def coefficient_pass(
        self,
        Z: SparseColumns,
        ZtZ: Tensor,
        Y: Tensor,
        sweeps: int,
        *,
        residual: bool = False,
        products: str | None = None,
        **options: Any,
    ) -> PassResult:
        """``reference.coefficient_pass`` on these activations, for Z and ``AYt`` in their (scaled) units.

        With ``residual``, that of ``A − Z Y`` in the original units is measured as well.
        """
        result: PassResult = self.kernels.coefficient_pass(
            Y,
            self._for_raw(Z),
            self.A,
            ZtZ,
            sweeps,
            residual_values=self.unscaled(Z).values if residual else None,
            token_weights=self.token_weights,
            products=products,
            **options,
        )
        if result.AYt is None or self._inverse_scale is None:
            return result
        inverse = self._inverse_scale
        return result._replace(AYt=result.AYt * (inverse[Z.indices] if products == "kept" else inverse))

    def sparse_product(self, Z: SparseColumns, tokens: slice) -> Tensor:
        """``ZᵀA`` of some tokens, ``[k, their number]``."""
        product: Tensor = self.kernels.sparse_product(self._for_raw(Z), self.A[:, tokens])
        return product

    def squared_residual(self, Z: SparseColumns, Y: Tensor) -> float:
        """``‖A − Z Y‖²`` of the matrix this stands for and Z in its units, tokens weighted, from the residual."""
        precise = precise_dtype(self.device)
        total = torch.zeros((), dtype=precise, device=self.device)
        dense = Z.to_dense().to(precise)
        for tokens, block in self._raw_blocks():
            left = self.scaled(block.to(precise)) - dense @ Y[:, tokens].to(precise)
            squares = left.square_().sum(0)
            total += (squares if self.token_weights is None else squares * self.token_weights[tokens]).sum()
        return float(total)

    def tail_energy(self, k: int) -> float:
        """``Σ_{i>k} σ_i²``, of the singular values of the matrix this stands for, tokens weighted."""
        precise = precise_dtype(self.device)
        smaller = self.d <= self.n
        side = self.d if smaller else self.n
        if k >= side:
            return 0.0
        gram = torch.zeros(side, side, dtype=precise, device=self.device)
        scale = None if self._inverse_scale is None else self._inverse_scale.to(precise)[:, None]
        roots = None if self.token_weights is None else self.token_weights.to(precise).sqrt()

        def converted(tokens: slice, block: Tensor) -> Tensor:
            block = block.to(precise) if scale is None else block.to(precise) * scale
            return block if roots is None else block * roots[tokens]

        for tokens, block in self._raw_blocks():
            left = converted(tokens, block)
            if smaller:
                gram.addmm_(left, left.T)
                continue
            for others, other in self._raw_blocks():
                gram[tokens, others] = left.T @ converted(others, other)
        # Ascending; rounding leaves those of a singular matrix a little below zero.
        return float(torch.linalg.eigvalsh(gram)[: side - k].clamp(min=0).sum())

    def unscaled(self, Z: SparseColumns) -> SparseColumns:
        """Z in the units of A."""
        return Z if self.scale is None else Z.scaled_rows(self.scale)

    def scaled(self, Z: Tensor) -> Tensor:
        """A dense ``[d, r]`` in the units of A, in scaled ones."""
        return Z if self._inverse_scale is None else Z * self._inverse_scale[:, None]

    def _for_raw(self, Z: SparseColumns) -> SparseColumns:
        """Z whose products with A as it lies are those of Z with the matrix this stands for."""
        return Z if self._inverse_scale is None else Z.scaled_rows(self._inverse_scale)

    def _row_weights(self) -> Tensor | float:
        return 1.0 if self._inverse_scale is None else self._inverse_scale.to(self.row_squares.dtype).square()

    def _raw_blocks(self, elements: dict[str, int] | None = None) -> Iterator[tuple[slice, Tensor]]:
        for tokens in token_blocks(self.A, elements):
            yield tokens, self.A[:, tokens]

    @cached_property
    def row_squares(self) -> Tensor:
        """The squares of each neuron's activations together, ``[d]``, tokens weighted, of A as it lies.

        Raises:
            ValueError: A is not finite.
        """
        squares = torch.zeros(self.d, dtype=precise_dtype(self.device), device=self.device)
        for tokens, block in self._raw_blocks(_SQUARE_ELEMENTS):
            squared = block.to(squares.dtype, copy=True).square_()
            weights = None if self.token_weights is None else self.token_weights[tokens].to(squares.dtype)
            squares += squared.sum(1) if weights is None else squared @ weights
        if not bool(squares.sum().isfinite()):
            self._refuse_non_finite()
        return squares

    def _refuse_non_finite(self) -> None:
        count, first = 0, None
        for tokens, block in self._raw_blocks():
            bad = ~block.isfinite()
            found = int(bad.sum())
            if found and first is None:
                row, column = (int(i) for i in bad.nonzero()[0])
                first = (row, tokens.start + column, float(block[row, column]))
            count += found
        if first is None:
            raise ValueError(
                "A: the squares of its values overflow; divide it by its largest magnitude first"
            )
        raise ValueError(
            f"A: wanted finite values, got {count} of {self.A.numel()} NaN or infinite, the first ({first[2]}) "
            f"at neuron {first[0]}, token {first[1]}; drop those tokens or replace the values"
        )


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no more: for sums over all data, and for solves."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounding(dtype: torch.dtype) -> float:
    """Which share of their size sums of entries in this dtype may be off by."""
    return 8 * torch.finfo(dtype).eps


def relative(loss: float, squared_norm: float) -> float:
    """``loss / ‖A‖²``, with 0 / 0 = 0 for an all-zero matrix."""
    if squared_norm > 0:
        return loss / squared_norm
    return 0.0 if loss == 0 else math.inf
