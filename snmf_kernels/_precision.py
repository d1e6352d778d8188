"""Whether float32 products on CUDA may round to 11 bits (TF32): torch's setting, one for the whole process.

Torch's own products and the Triton kernels follow it; a fit sets it for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MATMUL = torch.backends.cuda.matmul
# Since 2.9 torch has a new name for it, and refuses a mixture of both. Without and with TF32.
_NAME, _VALUES = (
    ("fp32_precision", ("ieee", "tf32"))
    if hasattr(_MATMUL, "fp32_precision")
    else ("allow_tf32", (False, True))
)


def tf32_allowed() -> bool:
    """Whether the setting allows TF32 now."""
    return bool(getattr(_MATMUL, _NAME) == _VALUES[True])


@contextmanager
def product_precision(device: torch.device, allow_tf32: bool = False) -> Iterator[None]:
    """Inside the block TF32 is allowed or not, and a surrounding ``torch.autocast`` rounds no product; then all is
    as it was."""
    wanted = _VALUES[allow_tf32]
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or getattr(_MATMUL, _NAME) == wanted:
            yield
            return
        before = getattr(_MATMUL, _NAME)
        setattr(_MATMUL, _NAME, wanted)
        try:
            yield
        finally:
            setattr(_MATMUL, _NAME, before)
