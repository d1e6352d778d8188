"""Peak memory of ``fit``, in a process of its own: resident, since allocations of torch and MKL are not Python's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, torch, snmf_kernels
storage, dtype = sys.argv[1:]
d, n, k = 1536, 14_500, 100
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
# Code, thread pools and buffers that do not depend on the problem are there before.
snmf_kernels.fit(torch.rand(300, 64).T, 5, max_iter=8)
before = kilobytes("VmRSS")
A = torch.empty(n, d).normal_().to(getattr(torch, dtype)).T
if storage == "strided":  # every second token of a wider matrix
    A = torch.empty(2 * n, d).normal_()[::2].T
data = A.untyped_storage().nbytes()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
snmf_kernels.fit(A, k)
print((1024 * (kilobytes("VmHWM") - before)) / (data + 4 * k * n))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("storage", "dtype"), [("token-major", "float32"), ("strided", "float32"), ("token-major", "bfloat16")]
)
def test_a_fit_holds_the_data_the_coefficients_and_a_tenth(storage, dtype):
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, storage, dtype], capture_output=True, text=True, check=True
    )
    # Measured: 1.06 to 1.085, 1.04 and 1.18, for the working set does not shrink with the bytes of A.
    assert float(printed.stdout) < (1.1 if dtype == "float32" else 1.25)
