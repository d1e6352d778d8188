"""What ``fit`` minimises, and the step for Y at fixed Z, which ``Factorization.encode`` shares."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ._checks import dtype_name
from ._data import DataMatrix, precise_dtype, relative, rounding
from ._pivoting import Pivoting, price_in_sweeps
from .sparse import PassResult, SparseColumns

# How sparse the coefficients are, and so what pivoting costs, is told from about so many tokens after so many sweeps.
_SAMPLE, _SAMPLE_SWEEPS = 128, 10
# Entries of Y that are solved at a time, in float64.
_PIVOT_ELEMENTS = 1 << 17


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised over a sparse Z and Y >= 0:

        ‖A − Z Y‖² + 2 threshold Σ_it ‖z_i‖ y_it + l2 Σ_it (‖z_i‖ y_it)²

    by steps for Y that see all of it, and steps for Z that do not see the threshold's term. The penalties are on the
    contributions ``‖z_i‖ y_it`` of features to tokens, which no scaling between a column of Z and its row of Y changes.
    With token weights, each token's terms are weighted.

    Attributes:
        data: the (scaled) activations.
        count: how many neurons a free feature keeps.
        ridge: λ of the least-squares step for Z.
        threshold, l2: see above.
        max_active: at most so many features to a token; 0, or as many as there are, for any number.
        fixed: features that stay as they are, in scaled units; the first rows of Y are theirs.
    """

    data: DataMatrix
    count: int
    ridge: float
    threshold: float = 0.0
    l2: float = 0.0
    max_active: int = 0
    fixed: SparseColumns | None = None

    @property
    def n_fixed(self) -> int:
        """How many features are fixed."""
        return 0 if self.fixed is None else self.fixed.k

    def all_features(self, free: SparseColumns) -> SparseColumns:
        """Fixed and free features together."""
        return free if self.fixed is None else self.fixed.joined(free)

    def gram(self, Z: SparseColumns) -> Tensor:
        """``ZᵀZ [k, k]``."""
        gram: Tensor = self.data.kernels.sparse_product(Z, Z.to_dense())
        return gram

    def penalised(self, gram: Tensor) -> Tensor:
        """``ZᵀZ`` for the step for Y, or ``Y Yᵀ`` for that for Z, with what l2 adds: a ridge by feature."""
        return gram + torch.diag(self.l2 * torch.diagonal(gram)) if self.l2 else gram

    def update_coefficients(
        self, Z: SparseColumns, ZtZ: Tensor, Y: Tensor, sweeps: int, **options: Any
    ) -> PassResult:
        """Coordinate descent over Y for fixed Z; see ``reference.coefficient_pass`` for the options."""
        norms = torch.diagonal(ZtZ).clamp(min=0).sqrt()
        return self.data.coefficient_pass(
            Z,
            self.penalised(ZtZ),
            Y,
            sweeps,
            shift=self.threshold * norms if self.threshold else None,
            feature_norms=norms,
            max_active=self.max_active,
            **options,
        )

    def loss(self, result: PassResult, ZtZ: Tensor, YYt: Tensor) -> Tensor:
        """The objective from a pass's sums and Gram matrices: ``‖A‖² − 2⟨ZtA − shift, Y⟩ + ⟨ZtZ + penalty, Y Yᵀ⟩``.

        Near an optimum for Y the terms that hold it are at most ``3 ‖A‖²`` together, but for features that cancel each
        other. What larger ones leave of each other may be rounding alone; the loss is said to be no less than that.
        """
        products = ZtZ.to(precise_dtype(ZtZ.device), copy=True).mul_(YYt)
        l2_term = self.l2 * torch.diagonal(products).sum()
        whole, crossed = self.data.squared_norm(), 2 * result.dot
        loss = whole + products.sum() + l2_term - crossed
        terms = products.abs_().sum() + l2_term + crossed.abs()
        bounded = torch.maximum(loss, rounding(self.data.dtype) * (terms - 3 * whole).clamp(min=0))
        return bounded * self.data.unit**2

    def loss_of_residual(self, Z: SparseColumns, ZtZ: Tensor, Y: Tensor, YYt: Tensor) -> Tensor:
        """The same objective with ``‖A − ZY‖²`` from the residual itself, which no cancellation blurs."""
        energies = torch.diagonal(ZtZ).to(precise_dtype(ZtZ.device)).clamp(min=0)
        loss = self.data.squared_residual(Z, Y, self.data.dtype)
        if self.l2:
            loss = loss + self.l2 * (energies * torch.diagonal(YYt)).sum()
        if self.threshold:
            weights = self.data.token_weights
            used = Y.sum(1, dtype=energies.dtype) if weights is None else (Y @ weights).to(energies.dtype)
            loss = loss + 2 * self.threshold * (energies.sqrt() * used).sum()
        return loss * self.data.unit**2

    def error(self, Z: SparseColumns, Y: Tensor, weights: Tensor | None) -> float:
        """``‖A − ZY‖² / ‖A‖²`` in the original units with these token weights, from the residual itself."""
        measured = self.data.coefficient_pass(
            Z,
            torch.eye(Z.k, dtype=Y.dtype, device=Y.device),
            Y,
            0,
            out=Y,
            residual=True,
            token_weights=weights,
        )
        return relative(float(measured.residual), float(measured.data))

    def measure(self, Z: SparseColumns, Y: Tensor, products: str | None = None) -> tuple[PassResult, Tensor]:
        """A pass without a sweep on all features Z, and the objective."""
        ZtZ = self.gram(Z)
        result = self.update_coefficients(Z, ZtZ, Y, 0, out=Y, products=products)
        return result, self.loss(result, ZtZ, self.data.gram_of_coefficients(Y))

    def solve_coefficients(
        self, Z: SparseColumns, tol: float, max_sweeps: int
    ) -> tuple[Tensor, float, PassResult]:
        """The optimal Y for fixed Z, its KKT residual, and the pass that measured it.

        Coordinate descent until the KKT residual (see ``Encoding``) is at most ``tol`` or ``max_sweeps`` are done: from
        zero, or where that would cost more, from what exchanging active sets gives.
        """
        data = self.data
        ZtZ = self.gram(Z)
        Y = torch.zeros(Z.k, data.n, dtype=data.dtype, device=data.device)
        sweeps_left, sweep_tol = max_sweeps, tol
        if self._converges_slowly(Z, ZtZ, tol, max_sweeps):
            self._pivot(Z, ZtZ, out=Y)
        while True:
            result = self.update_coefficients(
                Z, ZtZ, Y, sweeps_left, out=Y, tol=sweep_tol, measure=True, residual=True
            )
            if not math.isfinite(float(result.dot) + float(result.data)):
                data.squared_norm()  # which says where A is not finite
                raise FloatingPointError(
                    f"A: its products with Z are not finite in {dtype_name(data.dtype)}; "
                    "divide A by its largest magnitude, or fit with dtype=torch.float64"
                )
            residual = kkt_residual(result)
            sweeps_left -= int(result.sweeps)
            if residual <= tol or sweeps_left <= 0:
                return Y, residual, result
            # A sweep changes a token by about what it is from its optimum, where convergence is slow by less.
            sweep_tol /= 4

    def _converges_slowly(self, Z: SparseColumns, ZtZ: Tensor, tol: float, max_sweeps: int) -> bool:
        """Whether sweeps that cost what pivoting costs leave a few of the tokens further than ``tol`` from optimal."""
        if 0 < self.max_active < Z.k:
            return False  # which features a token uses is not a question of signs then
        G = self.penalised(ZtZ)
        P = self._products(Z, ZtZ, slice(None, None, max(1, self.data.n // _SAMPLE)))
        Y = torch.zeros_like(P)
        diagonal = torch.diagonal(G)[:, None]
        most, done, sweeps = float(max_sweeps), 0, _SAMPLE_SWEEPS
        while done < most:
            Y = self.data.kernels.coordinate_descent(Y, P, G, sweeps)
            step = torch.minimum(Y, (G @ Y - P) / diagonal)[diagonal[:, 0] > 0]
            if not bool(step.norm() > tol * Y.norm()):
                return False
            if not done:
                most = min(most, price_in_sweeps(G, Y, self.data.n))
            done += sweeps
            sweeps = done  # twice as many each time
        return most < max_sweeps

    def _pivot(self, Z: SparseColumns, ZtZ: Tensor, out: Tensor) -> None:
        """The optimal Y by exchanging active sets; zero for what is singular or does not end."""
        pivoting = Pivoting(self.penalised(ZtZ), self.data.kernels.support_solve, precise_dtype(out.device))
        if not pivoting.possible:
            return
        width = max(1, _PIVOT_ELEMENTS // Z.k)
        for start in range(0, self.data.n, width):
            tokens = slice(start, start + width)
            out[:, tokens] = pivoting.solve(self._products(Z, ZtZ, tokens))

    def _products(self, Z: SparseColumns, ZtZ: Tensor, tokens: slice) -> Tensor:
        """``ZᵀA`` of some tokens, less what the threshold takes of it."""
        P = self.data.sparse_product(Z, tokens)
        if self.threshold:
            P -= self.threshold * torch.diagonal(ZtZ).clamp(min=0).sqrt()[:, None]
        return P


def kept_count(keep: float, d: int) -> int:
    """``ceil(keep·d)`` of the decimal fraction that was written: 0.07 of 100 neurons is 7, not 8."""
    return math.ceil(Fraction(repr(keep)) * d)


def kkt_residual(measured: PassResult) -> float:
    """``‖min(Y, (ZtZ Y − ZtA) / diag(ZtZ))‖ / ‖Y‖``; zero where Y = 0 is the optimum."""
    violation = math.sqrt(float(measured.violation))
    # Written so that NaN is passed on.
    return 0.0 if violation == 0 else violation / max(math.sqrt(float(measured.squared_norm)), 1e-300)
