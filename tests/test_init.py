"""Starting points."""

from __future__ import annotations

import pytest
import torch
from problems import planted

from snmf_kernels import _backends, fit
from snmf_kernels._data import DataMatrix
from snmf_kernels.init import FLOOR, INITS, kmeans_init, random_init, svd_init


def data_of(A, scaled=False):
    matrix = DataMatrix(A, A.dtype, _backends.choose_all(A.device, A.dtype))
    if scaled:
        matrix.scale_neurons()
    return matrix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scaled", [False, True])
def test_svd_matches_the_exact_one(scaled):
    left, right = (
        torch.randn(80, 12, generator=generator(1)).double(),
        torch.randn(12, 200, generator=generator(2)).double(),
    )
    A = left @ torch.diag(2.0 ** -torch.arange(12)).double() @ right  # a spectrum that decays
    matrix = data_of(A, scaled)
    exact = A if matrix.scale is None else A / matrix.scale[:, None]
    Z, Y = svd_init(matrix, 5, generator())
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    # Z = U √Σ up to sign, and the same signs in Y.
    signs = (Z * U[:, :5]).sum(0).sign()
    assert torch.allclose(Z, U[:, :5] * S[:5].sqrt() * signs, atol=1e-6 * float(S[0].sqrt()))
    wanted = (S[:5].sqrt()[:, None] * Vh[:5] * signs[:, None]).clamp(min=FLOOR)
    assert torch.allclose(Y, wanted, atol=1e-6 * float(S[0].sqrt()))


def test_kmeans_finds_separated_clusters():
    centres = 10 * torch.randn(30, 6, generator=generator(3))
    labels = torch.randint(6, (300,), generator=generator(4))
    A = centres[:, labels] + 0.01 * torch.randn(30, 300, generator=generator(5))
    Z, Y = kmeans_init(data_of(A), 6, generator())
    found = Y.argmax(0)
    # The same partition under other names.
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 6
    assert torch.allclose(Z[:, found], centres[:, labels], atol=0.02)
    assert sorted(Y.unique().tolist()) == pytest.approx([FLOOR, 1.0])


def test_kmeans_reseeds_empty_clusters():
    # Two distinct tokens, one of them 19 times: k-means++ can seed only two different centroids, yet no
    # cluster may stay empty.
    A = torch.zeros(4, 20)
    A[:, 7] = 5.0
    _, Y = kmeans_init(data_of(A), 4, generator())
    assert torch.bincount(Y.argmax(0), minlength=4).min() >= 1


def test_svd_takes_the_sign_that_loses_less():
    A = planted(60, 100, 4, keep=0.2, noise=0.1)[0]
    starts = [svd_init(data_of(sign * A), 4, generator())[1] for sign in (1, -1)]
    assert torch.allclose(*starts, atol=1e-4)
    _, _, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = torch.maximum(Vh[:4].clamp(min=0).norm(dim=1), Vh[:4].clamp(max=0).norm(dim=1))
    shares = (starts[0] / starts[0].norm(dim=1, keepdim=True) * Vh[:4]).sum(1).abs()
    assert torch.allclose(shares, kept, atol=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_starts_are_floored_and_reproducible(init):
    A = planted(40, 70, 5, keep=0.2, noise=0.5)[0]
    Z, Y = INITS[init](data_of(A), 5, generator(9))
    again = INITS[init](data_of(A), 5, generator(9))
    assert Z.shape == (40, 5)
    assert Y.shape == (5, 70)
    assert float(Y.min()) >= FLOOR * 0.999
    assert torch.equal(Z, again[0])
    assert torch.equal(Y, again[1])


def test_random_start_is_the_same_in_both_dtypes():
    A = torch.randn(10, 12, generator=generator())
    single, double = (
        random_init(data_of(A), 3, generator(1)),
        random_init(data_of(A.double()), 3, generator(1)),
    )
    assert torch.equal(single[1].double(), double[1])


def test_good_starts_need_fewer_iterations_than_random():
    A, _, _ = planted(200, 1000, 6, keep=0.05, noise=0.05)
    losses = {
        init: fit(A, 6, keep=0.05, init=init, solver="mu", max_iter=5, tol=0).loss_history[-1]
        for init in INITS
    }
    assert losses["svd"] < losses["random"]
    assert losses["kmeans"] < losses["random"]
