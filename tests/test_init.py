"""Starting points."""

from __future__ import annotations

import pytest
import torch
from problems import assert_near, planted

from snmf_kernels import _backends, fit
from snmf_kernels._data import DataMatrix
from snmf_kernels._outliers import scale_and_clip
from snmf_kernels.init import FLOOR, INITS, kmeans_centroids, kmeans_init, random_init, svd_init


def data_of(A, scaled=False):
    matrix = DataMatrix(A, A.dtype, _backends.choose_all(A.device, A.dtype))
    if scaled:
        scale_and_clip(matrix, scale=True, clip=False)
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
    Y = svd_init(matrix, 5, generator())
    _, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    # √Σ Vᵀ up to sign.
    signs = (Y * Vh[:5]).sum(1).sign()
    wanted = (S[:5].sqrt()[:, None] * Vh[:5] * signs[:, None]).clamp(min=FLOOR)
    assert torch.allclose(Y, wanted, atol=1e-6 * float(S[0].sqrt()))


def test_kmeans_finds_separated_clusters():
    centres = 10 * torch.randn(30, 6, generator=generator(3))
    labels = torch.randint(6, (300,), generator=generator(4))
    A = centres[:, labels] + 0.01 * torch.randn(30, 300, generator=generator(5))
    Y = kmeans_init(data_of(A), 6, generator())
    found = Y.argmax(0)
    # The same partition under other names.
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 6
    assert sorted(Y.unique().tolist()) == pytest.approx([FLOOR, 1.0])


def test_kmeans_leaves_no_feature_unused():
    # Two directions for four clusters; the zero tokens have none at all.
    A = torch.zeros(4, 20)
    A[:, 7] = 5.0
    A[1, 11:] = -2.0
    Y = kmeans_init(data_of(A), 4, generator())
    assert bool((Y == 1).any(1).all())
    assert bool((Y == 1).any(0).all())


def test_kmeans_looks_at_directions():
    # Two directions at many lengths: Euclidean clusters would cut them by length.
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).T
    label = torch.arange(200) % 2
    A = directions[:, label] * torch.logspace(-2, 2, 200)
    Y = kmeans_init(data_of(A), 2, generator())
    assert len({(int(a), int(b)) for a, b in zip(Y.argmax(0), label, strict=True)}) == 2


def test_svd_takes_the_sign_that_loses_less():
    A = planted(60, 100, 4, keep=0.2, noise=0.1)[0]
    starts = [svd_init(data_of(sign * A), 4, generator()) for sign in (1, -1)]
    assert torch.allclose(*starts, atol=1e-4)
    _, _, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = torch.maximum(Vh[:4].clamp(min=0).norm(dim=1), Vh[:4].clamp(max=0).norm(dim=1))
    shares = (starts[0] / starts[0].norm(dim=1, keepdim=True) * Vh[:4]).sum(1).abs()
    assert torch.allclose(shares, kept, atol=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_starts_are_floored_and_reproducible(init):
    A = planted(40, 70, 5, keep=0.2, noise=0.5)[0]
    Y = INITS[init](data_of(A), 5, generator(9))
    assert Y.shape == (5, 70)
    assert float(Y.min()) >= FLOOR * 0.999
    assert torch.equal(Y, INITS[init](data_of(A), 5, generator(9)))


def test_random_start_is_the_same_in_both_dtypes():
    A = torch.randn(10, 12, generator=generator())
    single, double = (
        random_init(data_of(A), 3, generator(1)),
        random_init(data_of(A.double()), 3, generator(1)),
    )
    assert torch.equal(single.double(), double)


def test_svd_starts_nearer_than_random():
    A, _, _ = planted(200, 1000, 6, keep=0.05, noise=0.05)
    losses = {
        init: fit(A, 6, keep=0.05, init=init, solver="mu", max_iter=5, tol=0).loss_history[-1]
        for init in ("svd", "random")
    }
    assert losses["svd"] < losses["random"]


def test_kmeans_of_a_wide_layer_finds_separated_clusters():
    """Of so many neurons, blocks of some decide which tokens belong together."""
    d, n, k = 6000, 1200, 12
    directions = torch.randn(d, k, generator=generator(3))
    belongs = torch.randint(0, k, (n,), generator=generator(4))
    A = directions[:, belongs] * (1 + torch.rand(n, generator=generator(5)))
    A = A + torch.randn(d, n, generator=generator(6))
    for layout in (A, A.T.contiguous().T):
        centroids = kmeans_centroids(data_of(layout), k, generator())
        assert torch.allclose(centroids.norm(dim=0), torch.ones(k), atol=1e-5)
        cosines = (directions / directions.norm(dim=0)).T @ centroids
        assert sorted(cosines.argmax(0).tolist()) == list(range(k))
        assert bool((cosines.max(0).values > 0.9).all())


def test_kmeans_of_a_wide_layer_with_more_clusters_than_tokens():
    A = torch.randn(5000, 7, generator=generator(1))
    centroids = kmeans_centroids(data_of(A), 9, generator())
    assert centroids.shape == (5000, 7)
    assert_near(centroids.sort(1).values, (A / A.norm(dim=0)).sort(1).values, 1e-5)


def test_large_random_starts_are_drawn_row_by_row(monkeypatch):
    monkeypatch.setattr("snmf_kernels.init._DRAWN_AT_ONCE", 100)
    Y = random_init(data_of(torch.rand(9, 40)), 5, generator())
    assert Y.shape == (5, 40)
    assert len(Y.unique()) > 195
    assert torch.equal(Y, random_init(data_of(torch.rand(9, 40)), 5, generator()))
