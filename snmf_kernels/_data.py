"""The activations as the solver sees them: products with ``A`` in any dtype and layout, without copying it whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._backends import Kernels
from .sparse import SparseColumns

# Elements of A that are converted at a time where A is not in the working dtype.
_BLOCK_ELEMENTS = 1 << 22
# Elements that are squared at a time in float64: on a CPU these temporaries should stay in cache (four times faster
# than blocks of the size above), on a GPU each block costs a few launches.
_SQUARE_ELEMENTS = {"cpu": 1 << 20}
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
            f"got {str(value.dtype).removeprefix('torch.')}; convert it with {name}.float() or {name}.astype('float32')"
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


class DataMatrix:
    """``A [d, n]``, or ``diag(1/scale) A`` with a scale for each neuron, and the products that the solver needs.

    Args:
        A: the activations as ``as_matrix`` returns them, on the device of the computation.
        dtype: the working dtype, float32 or float64.
        kernels: functions that run on that device.
    """

    def __init__(self, A: Tensor, dtype: torch.dtype, kernels: Kernels) -> None:
        self.A = A
        self.dtype = dtype
        self.kernels = kernels
        self.scale: Tensor | None = None
        self._inverse_scale: Tensor | None = None
        self.row_squares = self._row_squares()

    @property
    def d(self) -> int:
        """Number of neurons."""
        return self.A.shape[0]

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.A.shape[1]

    @property
    def device(self) -> torch.device:
        """Where A lies."""
        return self.A.device

    def scale_neurons(self) -> None:
        """From now on stand for ``diag(1/s) A`` with s the root mean square of each neuron (1 where it is zero)."""
        rms = (self.row_squares / self.n).sqrt().to(self.dtype)
        # The inverse of a subnormal number is infinite.
        self.divide_neurons(torch.where(rms >= torch.finfo(self.dtype).tiny, rms, 1))

    def divide_neurons(self, scale: Tensor) -> None:
        """From now on stand for ``diag(1/scale) A``."""
        self.scale = scale
        self._inverse_scale = 1 / scale

    def squared_norm(self) -> float:
        """``‖A‖²_F`` of the matrix this stands for."""
        return float((self.row_squares * self._row_weights()).sum())

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Tokens in blocks, converted to the working dtype and scaled."""
        for tokens, block in self._raw_blocks():
            converted = block.to(self.dtype)
            yield (
                tokens,
                converted if self._inverse_scale is None else converted * self._inverse_scale[:, None],
            )

    def columns(self, tokens: Tensor) -> Tensor:
        """The columns of some tokens, converted and scaled, ``[d, len(tokens)]``."""
        chosen = self.A.index_select(1, tokens).to(self.dtype)
        return chosen if self._inverse_scale is None else chosen * self._inverse_scale[:, None]

    def times(self, right: Tensor) -> Tensor:
        """``(A right)ᵀ`` for ``right [n, r]``, as ``[r, d]``: a feature's neurons lie together."""
        if self.A.dtype == self.dtype:
            product = right.T @ self.A.T
        else:
            product = torch.zeros(right.shape[1], self.d, dtype=self.dtype, device=self.device)
            for tokens, block in self._raw_blocks():
                product.addmm_(right[tokens].T, block.to(self.dtype).T)
        return product if self._inverse_scale is None else product.mul_(self._inverse_scale)

    def transposed_times(self, left: Tensor) -> Tensor:
        """``leftᵀ A`` for ``left [d, r]``, as ``[r, n]``."""
        if self._inverse_scale is not None:
            left = left * self._inverse_scale[:, None]
        if self.A.dtype == self.dtype:
            return left.T @ self.A
        product = torch.empty(left.shape[1], self.n, dtype=self.dtype, device=self.device)
        for tokens, block in self._raw_blocks():
            product[:, tokens] = left.T @ block.to(self.dtype)
        return product

    def sparse_transposed_times(self, Z: SparseColumns) -> Tensor:
        """``ZᵀA [k, n]`` for sparse Z."""
        if self.A.dtype != self.dtype and self.kernels.backend != "cpp":
            return self.transposed_times(Z.to_dense())
        # The compiled product converts as it reads.
        scaled = Z if self._inverse_scale is None else Z.scaled_rows(self._inverse_scale)
        return self.kernels.sparse_product(scaled, self.A)

    def unscaled_residual_row_squares(self, Z: Tensor, Y: Tensor) -> Tensor:
        """Squared norms ``[d]`` of the rows of ``A − Z Y`` in the units of A, whatever the neuron scale."""
        squares = torch.zeros_like(self.row_squares)
        for tokens, block in self._raw_blocks(self._square_elements):
            residual = torch.addmm(block.to(self.dtype), Z, Y[:, tokens], alpha=-1)
            squares += residual.to(squares.dtype).square().sum(1)
        return squares

    def _row_weights(self) -> Tensor | float:
        return 1.0 if self._inverse_scale is None else self._inverse_scale.to(self.row_squares.dtype).square()

    @property
    def _square_elements(self) -> int:
        return _SQUARE_ELEMENTS.get(self.device.type, _BLOCK_ELEMENTS)

    def _raw_blocks(self, elements: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        width = max(1, (elements or _BLOCK_ELEMENTS) // self.d)
        for start in range(0, self.n, width):
            tokens = slice(start, min(start + width, self.n))
            yield tokens, self.A[:, tokens]

    def _row_squares(self) -> Tensor:
        squares = torch.zeros(self.d, dtype=_accumulator(self.device), device=self.device)
        for _, block in self._raw_blocks(self._square_elements):
            squares += block.to(squares.dtype).square().sum(1)
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


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps a surrounding ``torch.autocast`` from rounding the solver's products."""
    return torch.autocast(device.type, enabled=False)


def _accumulator(device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def relative(loss: float, squared_norm: float) -> float:
    """``loss / ‖A‖²``, with 0 / 0 = 0 for an all-zero matrix."""
    if squared_norm > 0:
        return loss / squared_norm
    return 0.0 if loss == 0 else math.inf
