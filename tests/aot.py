"""Compiles every Triton kernel and configuration ahead of time and prints what each needs, one JSON line per kernel.

Run as a program (``python tests/aot.py``): kernels that were imported for interpretation cannot be compiled,
so the tests start this in a process without ``TRITON_INTERPRET``. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snmf_kernels import _triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENT = {torch.float32: "fp32", torch.float64: "fp64"}


def update_sources():
    for (dtype, large), config in _triton.UPDATE_CONFIGS.items():
        pointer = f"*{ELEMENT[dtype]}"
        signature = {
            "y_ptr": pointer, "p_ptr": pointer, "q_ptr": pointer, "out_ptr": pointer, "k": "i32", "n": "i32",
            "y_stride": "i32", "p_stride": "i32", "out_stride": "i32", "eps": "fp32",
            "BLOCK_K": "constexpr", "BLOCK_J": "constexpr", "BLOCK_N": "constexpr", "PRECISION": "constexpr",
        }  # fmt: skip
        constants = {
            "BLOCK_K": config.block_k, "BLOCK_J": config.block_j, "BLOCK_N": config.block_n,
            "PRECISION": config.precision,
        }  # fmt: skip
        # What a launch on torch's allocations with n divisible by 16 is specialised to: k need not be.
        aligned = ("y_ptr", "p_ptr", "q_ptr", "out_ptr", "n", "y_stride", "p_stride", "out_stride")
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        name = f"multiplicative_update-{ELEMENT[dtype]}-{'large' if large else 'small'}"
        yield name, _triton.multiplicative_update_kernel, signature, constants, aligned, options


def select_sources():
    for dtype in ELEMENT:
        signature = {
            "z_ptr": f"*{ELEMENT[dtype]}", "index_ptr": "*i64", "value_ptr": f"*{ELEMENT[dtype]}",
            "d": "i32", "count": "i32", "row_stride": "constexpr", "column_stride": "i32",
            "BITS": "constexpr", "BLOCK": "constexpr",
        }  # fmt: skip
        # A stride of 1 is specialised as a constant in a launch.
        constants = {
            "row_stride": 1,
            "BITS": 63 if dtype == torch.float64 else 31,
            "BLOCK": _triton.SELECT_BLOCK,
        }
        aligned = ("z_ptr", "index_ptr", "value_ptr", "d", "column_stride")
        yield (
            f"winner_take_all-{ELEMENT[dtype]}", _triton.winner_take_all_kernel, signature, constants, aligned,
            {"num_warps": _triton.SELECT_WARPS},
        )  # fmt: skip


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def amd_resources(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return {"registers": number("vgpr_count"), "stack": number("private_segment_fixed_size") + spills}


def main() -> None:
    wanted = sys.argv[1:]
    for name, kernel, signature, constants, aligned, options in (*update_sources(), *select_sources()):
        for target_name, target in TARGETS.items():
            if wanted and not any(word in f"{name}-{target_name}" for word in wanted):
                continue
            position = {argument: (i,) for i, argument in enumerate(signature)}
            source = ASTSource(
                kernel,
                signature,
                constexprs={position[key]: value for key, value in constants.items()},
                attrs={position[argument]: [["tt.divisibility", 16]] for argument in aligned},
            )
            compiled = triton.compile(source, target=target, options=options)
            if target.backend == "cuda":
                resources = nvidia_resources(compiled.asm["cubin"])
                resources["wide_loads"] = len(
                    re.findall(r"ld\.global\S*\.v[24]|cp\.async\S* .*, 0x10", compiled.asm["ptx"])
                )
            else:
                resources = amd_resources(compiled.asm["amdgcn"])
                resources["wide_loads"] = len(
                    re.findall(r"(?:global|buffer)_load_dwordx[24]", compiled.asm["amdgcn"])
                )
            row = {"kernel": name, "target": target_name, "shared": compiled.metadata.shared, **resources}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
