"""The activations as the solver sees them: products with ``A`` in any dtype and layout, without copying it whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._backends import Kernels
from ._checks import dtype_name
from ._scope import interruptible
from .reference import dense_product, short_parts, token_blocks, without_subnormals
from .sparse import PassResult, SparseColumns

# Magnitudes whose squares, and sums of many of them, stay far inside the range of the dtype. Where the largest of A
# lies outside, squares are formed in float64, and a fit that divides no neurons divides A by a power of two. Beyond the
# wider bounds products leave the range all the same.
_SAFE = {torch.float32: (2.0**-30, 2.0**45), torch.float64: (2.0**-400, 2.0**400)}
_BOUNDS = {torch.float32: (2.0**-110, 2.0**118), torch.float64: (2.0**-480, 2.0**480)}
# Elements of A that are converted to float64 at a time for a Gram matrix: wide blocks, whose products are fast.
_GRAM_ELEMENTS = {"cpu": 1 << 22}
# Gram matrices of at least so many rows are computed as their upper blocks only.
_BLOCKED_GRAM, _GRAM_BLOCK = 192, 96
# Tokens whose coefficients are weighed at a time.
_WEIGHED_TOKENS = 1 << 12
# Tokens that are searched for subnormal numbers.
_SUBNORMAL_SAMPLE = 64
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
    if not array.flags.writeable:
        # A memmap opened for reading, say. Nothing here writes to it, and torch need not warn that one could.
        array = np.asarray(_Writable(array))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(
            f"{name}: wanted dtype float16, bfloat16, float32 or float64, got {array.dtype}"
        ) from error


class _Writable:
    """The memory of an array, without its mark that it is read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        interface = dict(array.__array_interface__)
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def as_weights(token_weights: Any, matrix: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Token weights as ``[n]`` of the working dtype beside the matrix, or None."""
    if token_weights is None:
        return None
    if not isinstance(token_weights, Tensor | np.ndarray | Sequence) or isinstance(token_weights, str):
        raise TypeError(
            "token_weights: wanted a tensor or array of one number for each token, 'clip' or None, "
            f"got {token_weights!r}"
        )
    weights = torch.as_tensor(token_weights)
    if weights.shape != matrix.shape[1:]:
        raise ValueError(
            f"token_weights: wanted one for each of the {matrix.shape[1]} tokens, got shape {tuple(weights.shape)}"
        )
    weights = weights.detach().to(matrix.device)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("token_weights: wanted finite numbers >= 0, got others; use 0 to leave a token out")
    if not bool((weights > 0).any()):
        raise ValueError("token_weights: wanted at least one above 0, got zeros only")
    largest = float(weights.max())
    if not 2.0**-40 <= largest <= 2.0**40:
        raise ValueError(
            f"token_weights: wanted a largest weight between 1e-12 and 1e12, got {largest:.3g}; only their ratios "
            "matter, so divide them by the largest"
        )
    return weights.to(dtype)


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
        # A power of two near the largest value of A, if its squares leave the range of the dtype; and one that all of A
        # is divided by.
        self.magnitude = self.unit = 1.0
        self._clipped = False
        # Whether A has so many subnormal numbers that torch's products shall see zeros in their place.
        self._flushes = False
        self._inverse_scale: Tensor | None = None
        self._squared_norm: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

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

    def divide_neurons(self, scale: Tensor) -> None:
        """From now on stand for ``diag(1/scale) A``."""
        self.scale = scale
        self._inverse_scale = 1 / scale
        self._squared_norm = None

    def divide(self, unit: float) -> None:
        """From now on stand for ``A / unit``, which is no neuron scale: see ``neuron_scale``."""
        self.unit = unit
        self.divide_neurons(torch.full((self.d,), unit, dtype=self.dtype, device=self.device))

    @property
    def neuron_scale(self) -> Tensor | None:
        """The scale of each neuron, or None where all have the same."""
        return self.scale if self.unit == 1 else None

    def clip_tokens(self, weights: Tensor) -> None:
        """From now on weigh the tokens' squared residuals so that loud tokens count as smaller ones."""
        self.token_weights, self._clipped = weights.to(self.dtype), True
        self._squared_norm = self._rows = None

    def squared_norm(self) -> Tensor:
        """``‖A‖²_F`` of the matrix this stands for, tokens weighted; a tensor without dimensions."""
        if self._squared_norm is None:
            squares, _ = self.row_statistics()
            inverse = self._inverse_scale
            weighted = squares if inverse is None else squares * inverse.to(squares.dtype).square()
            self._squared_norm = weighted.sum()
        return self._squared_norm

    def row_statistics(self) -> tuple[Tensor, Tensor]:
        """Of each neuron the sums of its squares and of its magnitudes ``[d]``, tokens weighted, in A as it lies.

        Raises:
            ValueError: A is not finite, or beyond what the working dtype can multiply.
        """
        if self._rows is None:
            self._flushes = self._has_subnormals()
            squares, magnitudes = self._row_statistics()
            low, high = _SAFE[self.dtype]
            if self.magnitude == 1 and not low <= math.sqrt(float(squares.max())) <= high:
                self.magnitude = self._find_magnitude()
                squares, magnitudes = self._row_statistics()
            if not math.isfinite(float(squares.sum())):
                self._refuse_non_finite()
            self._rows = squares, magnitudes
        return self._rows

    def _row_statistics(self) -> tuple[Tensor, Tensor]:
        """The same, unchecked: sums of blocks in float64."""
        precise = precise_dtype(self.device)
        squares, magnitudes = torch.zeros(2, self.d, dtype=precise, device=self.device)
        weights = self.token_weights
        # A clipped token is a smaller one; a weight that was given says how often a token counts.
        counts = weights if weights is None or not self._clipped else weights.sqrt()
        for tokens, block in self._blocks():
            if weights is None or counts is None:
                squares += block.square().sum(1)
                magnitudes += block.abs().sum(1)
            else:
                squares += block.square() @ weights[tokens].to(block.dtype)
                magnitudes += block.abs() @ counts[tokens].to(block.dtype)
        return squares, magnitudes

    def token_squares(self) -> tuple[Tensor, Tensor]:
        """Of each token the squared norm in the matrix this stands for, and in A as it lies, ``[n]`` each.

        Token weights do not count. ``row_statistics`` must have been asked for before.
        """
        dtype = self._squares_dtype
        of_rows = torch.ones(2, self.d, dtype=dtype, device=self.device)
        if self._inverse_scale is not None:
            of_rows[0] = self._inverse_scale.to(dtype).square()
        squares = torch.empty(2, self.n, dtype=dtype, device=self.device)
        for tokens, block in self._blocks():
            squares[:, tokens] = of_rows @ block.square()
        return squares[0], squares[1]

    @property
    def _squares_dtype(self) -> torch.dtype:
        """In which squares of A neither vanish nor overflow."""
        return self.dtype if self.magnitude == 1 else precise_dtype(self.device)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of A in a dtype that can square them, not to be written to."""
        for tokens, block in self._raw_blocks():
            values = block.to(self.dtype)
            if self._flushes:
                values = without_subnormals(values)
            yield tokens, values.to(self._squares_dtype)

    def _has_subnormals(self) -> bool:
        """Whether a thousandth of a sample of A are subnormal numbers, with which a CPU's operations are slow."""
        if self.device.type != "cpu":
            return False
        sample = self.A[:, :: -(-self.n // _SUBNORMAL_SAMPLE)].to(self.dtype).abs()
        few = (sample > 0) & (sample < torch.finfo(self.dtype).tiny)
        return int(few.sum()) * 1000 > sample.numel()

    def _find_magnitude(self) -> float:
        """The power of two below the largest magnitude in A, 1 for an all-zero A."""
        largest = torch.stack([block.abs().amax() for _, block in self._raw_blocks()]).amax()
        top = float(largest)
        if not math.isfinite(top):
            self._refuse_non_finite()
        if top == 0:
            return 1.0
        low, high = _BOUNDS[self.dtype]
        if not low <= top <= high:
            small = top < low
            raise ValueError(
                f"A: its values are too {'small' if small else 'large'} for {dtype_name(self.dtype)}, in which their "
                f"products {'vanish' if small else 'overflow'} (the largest magnitude is {top:.3g}); multiply A by a "
                "constant that brings it near 1"
            )
        return 2.0 ** math.floor(math.log2(top))

    def columns(self, tokens: Tensor, neurons: slice = slice(None)) -> Tensor:
        """A copy of the columns of some tokens, converted and scaled, ``[d, len(tokens)]``; or some neurons of them."""
        A = self.A[neurons]
        # index_select along the dimension that is not contiguous copies the whole matrix first.
        neuron_major = A.stride(1) == 1
        chosen = A.index_select(1, tokens) if neuron_major else A.T.index_select(0, tokens).T
        chosen = chosen.to(self.dtype)
        return chosen if self._inverse_scale is None else chosen.mul_(self._inverse_scale[neurons, None])

    def times(self, right: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(A diag(weights) right)ᵀ`` for ``right [n, r]``, as ``[r, d]``: a feature's neurons lie together."""
        product = dense_product(right.T, self.A, weights, flush=self._flushes)
        return product if self._inverse_scale is None else product.mul_(self._inverse_scale)

    def transposed_times(self, left: Tensor) -> Tensor:
        """``leftᵀ A`` for ``left [d, r]``, as ``[r, n]``."""
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
        k, n = Y.shape
        weights = self.token_weights
        # On a CPU the upper blocks of a large one only.
        block = _GRAM_BLOCK if k >= _BLOCKED_GRAM and self.device.type == "cpu" else k
        parts = short_parts(n, k * block, self.device)
        if weights is None and block == k and len(parts) == 1:
            return Y @ Y.T
        if weights is not None and n > _WEIGHED_TOKENS:
            # Coefficients that are weighed take a copy, which should be small beside them.
            width = min(_WEIGHED_TOKENS, parts[0].stop)
            parts = [slice(first, min(first + width, n)) for first in range(0, n, width)]
        gram = torch.empty(k, k, dtype=Y.dtype, device=self.device)
        for start in range(0, k, block):
            rows = slice(start, start + block)
            for tokens in parts:
                left = Y[rows, tokens] if weights is None else Y[rows, tokens] * weights[tokens]
                if tokens.start == 0:
                    torch.mm(left, Y[start:, tokens].T, out=gram[rows, start:])
                else:
                    gram[rows, start:].addmm_(left, Y[start:, tokens].T)
            if block < k:
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

        With ``residual``, that of ``A − Z Y`` in the original units is measured as well. ``token_weights`` among the
        options are instead of those of this matrix.
        """
        options.setdefault("token_weights", self.token_weights)
        result: PassResult = self.kernels.coefficient_pass(
            Y,
            self._for_raw(Z),
            self.A,
            ZtZ,
            sweeps,
            residual_values=self.unscaled(Z).values if residual else None,
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

    def squared_residual(self, Z: SparseColumns, Y: Tensor, dtype: torch.dtype) -> Tensor:
        """``‖A − Z Y‖²`` of the matrix this stands for and Z in its units, tokens weighted, from the residual.

        The residual is formed in ``dtype``; its squares are added up in float64 where there is one.
        """
        total = torch.zeros((), dtype=precise_dtype(self.device), device=self.device)
        dense = Z.to_dense().to(dtype)
        for tokens, block in self._raw_blocks():
            left = self.scaled(block.to(dtype)) - dense @ Y[:, tokens].to(dtype)
            squares = left.square_().sum(0, dtype=total.dtype)
            total += (squares if self.token_weights is None else squares * self.token_weights[tokens]).sum()
        return total

    def tail_energy(self, k: int) -> float:
        """``Σ_{i>k} σ_i²``, of the singular values of the matrix this stands for, tokens weighted."""
        precise = precise_dtype(self.device)
        smaller = self.d <= self.n
        side = self.d if smaller else self.n
        if k >= side:
            return 0.0
        gram = torch.zeros(side, side, dtype=precise, device=self.device)
        scale = None if self._inverse_scale is None else self._inverse_scale.to(precise)
        roots = None if self.token_weights is None else self.token_weights.to(precise).sqrt()
        # Over the tokens, or over the neurons where they are more: each entry of A is converted once.
        for part in token_blocks(self.A if smaller else self.A.T, _GRAM_ELEMENTS):
            block = (self.A[:, part] if smaller else self.A[part]).to(precise, copy=True)
            if scale is not None:
                block *= (scale if smaller else scale[part])[:, None]
            if roots is not None:
                block *= roots[part] if smaller else roots
            gram.addmm_(block, block.T) if smaller else gram.addmm_(block.T, block)
        # Ascending; rounding leaves those of a singular matrix a little below zero.
        values = interruptible(side, lambda: torch.linalg.eigvalsh(gram))
        return float(values[: side - k].clamp(min=0).sum())

    def unscaled(self, Z: SparseColumns) -> SparseColumns:
        """Z in the units of A."""
        return Z if self.scale is None else Z.scaled_rows(self.scale)

    def scaled(self, Z: Tensor) -> Tensor:
        """A dense ``[d, r]`` in the units of A, in scaled ones."""
        return Z if self._inverse_scale is None else Z * self._inverse_scale[:, None]

    def _for_raw(self, Z: SparseColumns) -> SparseColumns:
        """Z whose products with A as it lies are those of Z with the matrix this stands for."""
        return Z if self._inverse_scale is None else Z.scaled_rows(self._inverse_scale)

    def _raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for tokens in token_blocks(self.A):
            yield tokens, self.A[:, tokens]

    def _refuse_non_finite(self) -> None:
        count, first = 0, None
        for tokens, block in self._raw_blocks():
            bad = ~block.isfinite()
            found = int(bad.sum())
            if found and first is None:
                row, column = (int(i) for i in bad.nonzero()[0])
                first = (row, tokens.start + column, float(block[row, column]))
            count += found
        assert first is not None, "sums of squares overflow although all values are far below the bound"
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
