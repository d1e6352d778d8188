"""A short run of every GPU kernel, for compute-sanitizer."""

import itertools

import torch

from snmf_kernels import _triton, ops
from snmf_kernels.sparse import Supports

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    Z = torch.randn(301, 37, device="cuda", dtype=dtype)
    A = torch.randn(301, 130, device="cuda", dtype=dtype)
    Y = torch.rand(37, 130, device="cuda", dtype=dtype)
    ops.winner_take_all(Z, 7, backend="triton")
    ops.multiplicative_update(Y, Z.T @ A, Z.T @ Z, sweeps=2, backend="triton")
    ops.coordinate_descent(Y, Z.T @ A, Z.T @ Z, sweeps=2, backend="triton")
    kept = ops.winner_take_all(Z, 7, backend="triton")
    ops.column_descent(kept, Y @ A.T, Y @ Y.T, sweeps=2, backend="triton")
    _triton.copy_if(torch.ones((), dtype=torch.bool, device="cuda"), Y, torch.empty_like(Y))
    for read in (A, A.T.contiguous().T, A.bfloat16(), A.bfloat16().T.contiguous().T):
        ops.sparse_product(kept, read, backend="triton")
        for products, multiplicative in (("kept", False), ("all", True)):
            ops.coefficient_pass(
                Y, kept, read, Z.T @ Z, sweeps=2, products=products, multiplicative=multiplicative,
                measure=not multiplicative, residual=True, backend="triton",
            )  # fmt: skip
    for batch, k, m in ((9, 5, 3), (3, 33, 40), (2, 70, 70)):
        factor = torch.randn(batch, k, k, device="cuda", dtype=dtype)
        X, info = ops.ridge_solve(
            factor @ factor.mT,
            torch.randn(batch, k, m, device="cuda", dtype=dtype),
            ridge=0.1,
            backend="cuda",
        )
        assert not info.any()
        assert bool(X.isfinite().all())
        # None of these has a factor before its third ridge.
        X, info = ops.ridge_solve(
            -2 * torch.eye(k, device="cuda", dtype=dtype).expand(batch, -1, -1),
            torch.ones(batch, k, m, device="cuda", dtype=dtype),
            ridge=0.1,
            escalations=3,
            backend="cuda",
        )
        assert info.tolist() == [-2] * batch
        assert bool((X * 8 - 1 < 1e-5).all())
    # Systems for a warp, for blocks of each size, and beyond shared memory, one with a twin in it.
    sizes = [0, 1, 5, 32, 33, 64, 65, 128, 129, 200, 380, 3, 40, 400]
    factor = torch.randn(400, 420, device="cuda", dtype=dtype) / 20
    G = factor @ factor.T
    G[399], G[:, 399] = G[0].clone(), G[:, 0].clone()
    G[399, 399] = G[0, 0] - 1
    supports = Supports(
        torch.tensor([0, *itertools.accumulate(sizes)], device="cuda"),
        torch.cat([torch.arange(size) for size in sizes]).cuda(),
        len(sizes),
    )
    right = torch.ones(sum(sizes), device="cuda", dtype=dtype)
    X, info = ops.support_solve(G, supports, right, ridge=0.1, escalations=4, backend="cuda")
    assert info.tolist()[:-1] == [0] * (len(sizes) - 1)
    assert int(info[-1]) < 0
    assert bool(X.isfinite().all())
    X, info = ops.support_solve(G, supports, right, ridge=0.1, backend="cuda")
    assert info.tolist() == [0] * (len(sizes) - 1) + [400]
    assert bool(X[-400:].isnan().all())
torch.cuda.synchronize()
print("done")
