"""The published loop as a baseline: the five steps of the paper in plain torch, as its description and costs have them.

Dense throughout: Z is stored dense, Q⁺ and Q⁻ are multiplied apart, the loss is that of the dense residual,
and it is fetched in every iteration for the patience test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class PublishedLoop:
    """State of the loop on ``A [d, n]`` (float32 or float64, any device).

    ``step()`` runs one iteration and returns its loss.
    """

    def __init__(self, A: Tensor, k: int, keep: float = 0.01, ridge: float = 1e-6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.A = A
        self.count = math.ceil(keep * A.shape[0])
        self.ridge = ridge * torch.eye(k, dtype=A.dtype, device=A.device)
        self.Y = torch.rand(k, A.shape[1], generator=generator).clamp(min=1e-6).to(A)
        self.Z = torch.zeros(A.shape[0], k, dtype=A.dtype, device=A.device)

    def step(self) -> float:
        A, Y = self.A, self.Y
        Z = A @ Y.T @ torch.linalg.inv(Y @ Y.T + self.ridge)
        kept = Z.abs().topk(self.count, dim=0).indices
        Z = torch.zeros_like(Z).scatter_(0, kept, Z.gather(0, kept))
        norms = Y.norm(dim=1).clamp(min=1e-12)
        Y = Y / norms[:, None]
        Z = Z * norms
        P, Q = Z.T @ A, Z.T @ Z
        P_plus, P_minus = (P.abs() + P) / 2, (P.abs() - P) / 2
        Q_plus, Q_minus = (Q.abs() + Q) / 2, (Q.abs() - Q) / 2
        Y = Y * torch.sqrt((P_plus + Q_minus @ Y) / (P_minus + Q_plus @ Y + 1e-6))
        self.Z, self.Y = Z, Y
        return float((A - Z @ Y).square().sum())


def synthetic_activations(
    d: int, n: int, *, seed: int = 0, device: str = "cpu", dtype=torch.float32
) -> Tensor:
    """Activations ``[d, n]`` with a realistic spectrum: sparse and heavy-tailed by neuron, low rank plus noise.

    A view of token-major storage, as hooks deliver them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rank = 256
    used = torch.rand(d, rank, generator=generator, device=device) < 0.05
    neurons = torch.randn(d, rank, generator=generator, device=device) * used
    loudness = torch.exp(0.8 * torch.randn(d, 1, generator=generator, device=device))
    topics = torch.relu(torch.randn(n, rank, generator=generator, device=device) - 1.0)
    acts = topics @ (neurons * loudness).T
    acts += 0.1 * acts.std() * torch.randn(n, d, generator=generator, device=device)
    return acts.to(dtype).T
