"""A short run of every GPU kernel, for compute-sanitizer."""

import torch

from snmf_kernels import ops

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    Z = torch.randn(301, 37, device="cuda", dtype=dtype)
    A = torch.randn(301, 130, device="cuda", dtype=dtype)
    Y = torch.rand(37, 130, device="cuda", dtype=dtype)
    ops.winner_take_all(Z, 7, backend="triton")
    ops.multiplicative_update(Y, Z.T @ A, Z.T @ Z, sweeps=2, backend="triton")
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
torch.cuda.synchronize()
print("done")
