"""Every operation of the solver in plain torch: the mathematical documentation, and the oracle of the tests.

Each function has the name and the signature of the fast ones in ``_cpp``, ``_triton`` and ``_cuda``. They run wherever
torch runs, in any floating dtype, and are also the ``torch`` backend.

Notation: activations ``A [d, n]``, features ``Z [d, k]``, coefficients ``Y [k, n] >= 0``, ``ZtA = ZᵀA [k, n]``,
``ZtZ = ZᵀZ [k, k]``; ``x⁺ = max(x, 0)``, ``x⁻ = max(−x, 0)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse import SparseColumns


def multiplicative_update(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, eps: float = 1e-6, sweeps: int = 1) -> Tensor:
    """Multiplicative sweeps over Y for fixed Z (Ding, Li & Jordan 2010, equation 7).

    ``Y ← Y ∘ sqrt( (ZtA⁺ + ZtZ⁻ Y) / (ZtA⁻ + ZtZ⁺ Y + eps) )``, all entries from the old Y, ``sweeps`` times. It keeps
    Y non-negative, and for ``eps = 0`` no sweep raises ``‖A − Z Y‖²``.
    """
    positive, negative = ZtZ.clamp(min=0), (-ZtZ).clamp(min=0)
    above, below = ZtA.clamp(min=0), (-ZtA).clamp(min=0)
    for _ in range(sweeps):
        Y = Y * torch.sqrt((above + negative @ Y) / (below + positive @ Y + eps))
    return Y


def coordinate_descent(Y: Tensor, ZtA: Tensor, ZtZ: Tensor, sweeps: int = 1) -> Tensor:
    """Sweeps of cyclic coordinate descent over Y for fixed Z (hierarchical alternating least squares).

    Feature after feature, ``y_i ← max(0, (ZtA_i − Σ_{j≠i} ZtZ_ij y_j) / ZtZ_ii)``: the exact minimiser over
    row i, so that no step raises ``‖A − Z Y‖²``. Rows of a zero feature (``ZtZ_ii = 0``) become zero.
    """
    Y = Y.clone()
    diagonal = torch.diagonal(ZtZ)
    off_diagonal = ZtZ - torch.diag(diagonal)
    for _ in range(sweeps):
        for i in range(Y.shape[0]):
            best = (ZtA[i] - off_diagonal[i] @ Y) / diagonal[i]
            Y[i] = torch.where(diagonal[i] > 0, best.clamp(min=0), 0)
    return Y


def winner_take_all(Z: Tensor, count: int) -> SparseColumns:
    """Keeps the ``count`` entries of largest magnitude in each column of ``Z [d, k]``; of equal ones the lower rows."""
    columns = Z.T
    # A stable descending sort leaves equal magnitudes in the order of their rows.
    order = columns.abs().sort(dim=1, descending=True, stable=True).indices
    indices = order[:, :count].sort(dim=1).values
    return SparseColumns(indices, columns.gather(1, indices), Z.shape[0])


def sparse_product(Z: SparseColumns, A: Tensor) -> Tensor:
    """``ZᵀA [k, n]`` for a sparse Z and ``A [d, n]`` of any floating dtype, in the dtype of Z."""
    return Z.to_dense().T @ A.to(Z.values.dtype)


def ridge_solve(G: Tensor, B: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Solves ``(G_b + ridge I) X_b = B_b`` for a batch of symmetric positive definite systems by Cholesky factors.

    Args:
        G: ``[batch, k, k]``, of which the lower triangles are read.
        B: ``[batch, k, m]``.

    Returns:
        ``X [batch, k, m]`` and ``info [batch]`` (int32): 0, or the 1-based index of the pivot that was not
        positive; that system's X is NaN then.
    """
    lower = G.tril() + ridge * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    factor, info = torch.linalg.cholesky_ex(lower)
    X = torch.cholesky_solve(B, factor)
    return torch.where((info == 0)[:, None, None], X, torch.nan), info.to(torch.int32)
