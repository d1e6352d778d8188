"""What all launchers share, and the kernel that belongs to none of them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COPY

# Of every launch. A multiply-add rounds once; Triton 3.10 no longer makes them unless asked to.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def copy_if_kernel(  # type: ignore[no-untyped-def]  # typed at the launch
    flag_ptr, source_ptr, target_ptr, columns, source_row, source_column, target_row, target_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """target = source, a block of one row to a program, if the flag is set."""
    if tl.load(flag_ptr).to(tl.int32) == 0:
        return
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    places = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + row * source_row + places * source_column, mask=places < columns)
    tl.store(target_ptr + row * target_row + places * target_column, values, mask=places < columns)


def copy_if(flag: Tensor, source: Tensor, target: Tensor) -> None:
    rows, columns = target.shape
    if rows == 0 or columns == 0:
        return
    with device_of(target):
        copy_if_kernel[(rows * triton.cdiv(columns, COPY.block),)](
            flag, source, target, columns, *source.stride(), *target.stride(),
            BLOCK=COPY.block, num_warps=COPY.num_warps, **OPTIONS,
        )  # fmt: skip
