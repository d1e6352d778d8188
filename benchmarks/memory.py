"""Peak memory of ``fit`` in a process of its own: resident, since allocations of torch and MKL are not Python's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux only
_MEASURE = """
import sys, torch, snmf_kernels
d, n, k = map(int, sys.argv[1:4])
storage, dtype = sys.argv[4:]
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
# Code, thread pools and buffers that do not depend on the problem are there before.
snmf_kernels.fit(torch.rand(300, 64).T, 5, max_iter=8)
before = kilobytes("VmRSS")
if storage == "strided":  # every second token of twice as many
    A = torch.empty(2 * n, d).normal_()[::2].T
elif storage == "strided both ways":  # every second neuron of twice as many
    A = torch.empty(n, 2 * d).normal_()[:, ::2].T
else:
    A = torch.empty(n, d).normal_().to(getattr(torch, dtype)).T
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
snmf_kernels.fit(A, k)
print(1024 * (kilobytes("VmHWM") - before), A.untyped_storage().nbytes() + 4 * k * n)
"""


def peak_memory(
    d: int, n: int, k: int, storage: str = "token-major", dtype: str = "float32"
) -> tuple[int, float]:
    """Bytes at the peak, the data included, and their ratio to those of the data and Y."""
    arguments = [str(value) for value in (d, n, k, storage, dtype)]
    printed = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True
    ).stdout
    peak, held = map(int, printed.split())
    return peak, peak / held
