"""Non-negative least squares by exchanging active sets, where coordinate descent would take hundreds of sweeps.

Features that are nearly dependent let coordinate descent crawl, yet leave most tokens with few coefficients at zero.
Which those are is what block principal pivoting (Portugal, Júdice & Vicente 1994; for many right-hand sides Kim & Park
2011) finds in a handful of rounds, each a small system for each token: ragged sizes, which ``support_solve`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._data import precise_dtype, rounding
from ._scope import interruptible
from .sparse import Supports

# So often all infeasible coefficients are exchanged although their number has not fallen; after that the last one only,
# which cannot cycle.
_PATIENCE = 3
# Rounds after which a token is given up. Nearly all take fewer than ten.
_ROUNDS = 50
# A Gram matrix of unit features with a pivot below so many rounding errors is taken to be singular. Then it gets a
# ridge, at least this one, and no less than what it was rounded by, which may have made it indefinite, and which
# coefficients that cancel each other would grow by. They are off their optimum by as much, in the units of the KKT
# residual.
_SINGULAR, _RIDGE = 1e5, 1e-9
# Below this share of a token's largest coefficient (gradient), a wrong sign is rounding; or so many rounding errors
# over the least pivot, by which they grow.
_ROUNDING, _GROWN = 1e-10, 10
# Multiply-adds of sweeps of coordinate descent in the time that one of a small float64 factorisation takes, and the
# rounds a token takes, on two CPUs (benchmarks/scaling, ``encode``).
_DEARER, _USUAL_ROUNDS = 7, 4
# Tokens that are swept in the time of one.
_SIDE_BY_SIDE = 16


def price_in_sweeps(ZtZ: Tensor, Y: Tensor, tokens: int) -> float:
    """About how many sweeps of coordinate descent cost what pivoting costs, for so many tokens like those of Y."""
    k = len(ZtZ)
    zeros = (Y <= 0).sum(0)
    size = torch.minimum(zeros, k - zeros).to(precise_dtype(Y.device))
    shared = _DEARER * k**3 / max(tokens, _SIDE_BY_SIDE)
    by_token = _USUAL_ROUNDS * (_DEARER * float((size**3).mean()) / 3 + 2 * k * k) + shared
    return by_token / max(int((ZtZ != 0).sum()), 1)


def _inverse(factor: Tensor) -> Tensor:
    """The inverse of the matrix with this Cholesky factor."""
    return interruptible(len(factor), lambda: torch.cholesky_inverse(factor))


class Pivoting:
    """The minimiser over ``Y >= 0`` of ``⟨Y, G Y⟩ − 2⟨P, Y⟩`` for fixed G.

    Args:
        G: ``[k, k]``, symmetric. Features whose diagonal entry is zero stay at zero.
        support_solve: the operation, on G's device.
        dtype: that of the computation.

    Attributes:
        possible: False if G is singular to working precision in spite of a small ridge; nothing is solved then.
    """

    def __init__(self, G: Tensor, support_solve: Callable[..., Any], dtype: torch.dtype) -> None:
        self._solve = support_solve
        diagonal = torch.diagonal(G)
        self._living = (diagonal > 0).nonzero()[:, 0]
        self._scale = diagonal[self._living].to(dtype).sqrt()
        living = G[self._living[:, None], self._living].to(dtype)
        living /= self._scale[:, None] * self._scale
        least, self.possible = _SINGULAR * torch.finfo(dtype).eps, False
        for ridge in (0.0, max(_RIDGE, rounding(G.dtype))) if len(living) else ():
            self._G = living + ridge * torch.eye(len(living), dtype=dtype, device=G.device)
            factor, info = interruptible(len(living), lambda: torch.linalg.cholesky_ex(self._G))
            pivot = float(torch.diagonal(factor).square().min()) if int(info) == 0 else 0.0
            if pivot > least:
                self.possible = True
                self._inverse = _inverse(factor)
                self._sign_limit = max(_ROUNDING, _GROWN * torch.finfo(dtype).eps / pivot)
                break

    def solve(self, P: Tensor) -> Tensor:
        """The optimal coefficients ``[k, m]`` for ``P [k, m]``; zeros for a token that took too many rounds."""
        solution = torch.zeros_like(P)
        if not self.possible:
            return solution
        # Tokens are rows from here on, which are chosen and dropped much faster than columns.
        p = self._G.new_empty(P.shape[1], len(self._living)).copy_(self._of_living(P).T).div_(self._scale)
        result = torch.zeros_like(p)
        unbounded = p @ self._inverse
        zero = unbounded < 0
        limits = -self._sign_limit * torch.stack([unbounded.abs().amax(1), p.abs().amax(1)])[:, :, None]
        left = torch.arange(len(p), device=p.device)
        fewest = torch.full_like(left, p.shape[1] + 1)
        patience = torch.full_like(left, _PATIENCE)
        for _ in range(_ROUNDS):
            x, wrong = self._round(zero, p, unbounded, limits)
            unfinished = wrong.any(1)
            done, again = (~unfinished).nonzero()[:, 0], unfinished.nonzero()[:, 0]
            result[left[done]] = x[done]
            if not len(again):
                break
            left, p, unbounded, limits = left[again], p[again], unbounded[again], limits[:, again]
            zero, wrong, fewest, patience = zero[again], wrong[again], fewest[again], patience[again]
            count = wrong.sum(1)
            patience = torch.where(count < fewest, _PATIENCE, patience - 1)
            fewest = torch.minimum(fewest, count)
            stuck = (patience < 0).nonzero()[:, 0]
            if len(stuck):
                wrong[stuck] &= wrong[stuck].flip(1).cumsum(1).flip(1) == 1  # the last one only
            zero ^= wrong
        # NaN is where rounding has left a system without a factor.
        solution[self._living] = result.div_(self._scale).clamp_(min=0).nan_to_num_(0.0).T.to(P.dtype)
        return solution

    def _of_living(self, P: Tensor) -> Tensor:
        return P if len(self._living) == len(P) else P[self._living]

    def _round(self, zero: Tensor, p: Tensor, unbounded: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """The minimiser with these coefficients at zero, and where its sign or that of its gradient is wrong."""
        if 2 * int(zero.sum()) <= zero.numel():
            # What it takes to push them to zero, from the inverse: systems of as many unknowns as zeros.
            force = self._on(zero, self._inverse, unbounded)
            x = torch.addmm(unbounded, force, self._inverse, alpha=-1).masked_fill_(zero, 0)
            gradient = force.neg_()
        else:
            x = self._on(~zero, self._G, p)
            gradient = torch.addmm(p, x, self._G, beta=-1).masked_fill_(~zero, 0)
        # Each of both is zero where the other is not.
        return x, (x < limits[0]) | (gradient < limits[1])

    def _on(self, chosen: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        """Of each token the solution of the part of a system that it has chosen, zero elsewhere."""
        offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
        torch.cumsum(chosen.sum(1), 0, out=offsets[1:])
        places = chosen.flatten().nonzero()[:, 0]
        supports = Supports(offsets, places % chosen.shape[1], len(chosen))
        values, _ = self._solve(matrix, supports, right.flatten()[places], 0.0)
        spread = torch.zeros_like(right)
        spread.view(-1)[places] = values
        return spread
