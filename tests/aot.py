"""Compiles every Triton kernel and configuration ahead of time and prints what each needs, one JSON line per kernel.

Run as a program: ``python tests/aot.py [words of names]``, or ``ones`` to compile for sizes of 1 instead. Kernels that
were imported for interpretation cannot be compiled, so the tests start this in a process without
``TRITON_INTERPRET``. No GPU is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snmf_kernels._triton import coefficients, configs, launch, products, selection, tile_pass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
ALIGNED = 16


@dataclass(frozen=True)
class Case:
    """One kernel with the arguments of a launch on torch's allocations whose sizes divide by 16, except ``odd``."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    odd: tuple[str, ...]
    options: dict[str, int]

    def source(self) -> ASTSource:
        names = self.kernel.arg_names
        signature = {
            name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names
        }
        aligned = [
            name for name in names if name not in (*self.constants, *self.odd) and signature[name] != "fp32"
        ]
        return ASTSource(
            self.kernel,
            signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", ALIGNED]] for name in aligned},
        )


def of_ones(case: Case) -> Case:
    """The case where every size and stride is 1, which a launch specialises as a constant."""
    fixed = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    sizes = [
        name
        for name in case.kernel.arg_names
        if not (name in case.constants or name in fixed or name in case.types)
    ]
    return dataclasses.replace(case, constants=case.constants | dict.fromkeys(sizes, 1))


def options(config: Any) -> dict[str, int]:
    of_config = {name: getattr(config, name) for name in ("num_warps", "num_stages") if hasattr(config, name)}
    return launch.OPTIONS | of_config


def blocks(config: Any, **others: Any) -> dict[str, Any]:
    """The fields of a configuration as a kernel names them."""
    fields = {name.upper(): value for name, value in vars(config).items() if name.startswith("block_")}
    return fields | others


def pointers(element: str, *names: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{element}" for name in names}


def update_cases() -> Iterator[Case]:
    for (dtype, large), config in configs.UPDATE.items():
        yield Case(
            f"multiplicative_update-{ELEMENT[dtype]}-{'large' if large else 'small'}",
            coefficients.multiplicative_update_kernel,
            pointers(ELEMENT[dtype], "y", "p", "q", "out"),
            blocks(config, EPS=1e-6, PRECISION=config.precision),
            ("k",),
            options(config),
        )
    for dtype, config in configs.DESCENT.items():
        yield Case(
            f"coordinate_descent-{ELEMENT[dtype]}",
            coefficients.coordinate_descent_kernel,
            pointers(ELEMENT[dtype], "y", "p", "q"),
            blocks(config, PRECISION=config.precision),
            ("k", "sweeps"),
            options(config),
        )


def select_cases() -> Iterator[Case]:
    """Of the longest column that is searched in registers, and of a longer one."""
    for dtype, (suffix, times) in itertools.product((torch.float32, torch.float64), (("", 1), ("-long", 2))):
        element, select, columns = ELEMENT[dtype], configs.SELECT[dtype], configs.COLUMNS[dtype]
        yield Case(
            f"winner_take_all-{element}{suffix}",
            selection.winner_take_all_kernel,
            pointers(element, "z", "value") | pointers("i64", "index"),
            # A stride of 1 is specialised as a constant in a launch.
            {"row_stride": 1, **selection.search_of(select, times * select.whole, dtype)},
            ("count",),
            options(select),
        )
        yield Case(
            f"column_descent-{element}{suffix}",
            selection.column_descent_kernel,
            pointers(element, "value", "dense", "q", "residual", "hint", "column", "change")
            | pointers("i64", "index")
            | pointers("i32", "row"),
            {
                **selection.search_of(columns, times * columns.whole, dtype),
                "GROUP": selection.GROUP,
                "BLOCK_C": columns.block_c,
                "BLOCK_K": columns.block_k,
            },
            ("k", "count", "sweeps"),
            options(columns),
        )


WORKING = (torch.float32, torch.float64)
# Of a matrix stored neuron by neuron, and token by token: a stride of 1 is a constant in a launch.
LAYOUTS = {"": "a_column", "-token_major": "a_row"}


def dense_cases() -> Iterator[Case]:
    tables = (
        ("product", products.dense_product_kernel, configs.PRODUCT, {}, ("z", "out")),
        (
            "accumulate",
            products.accumulate_kernel,
            configs.ACCUMULATE,
            {"WEIGHTED": True},
            ("y", "weight", "out"),
        ),
    )
    for (name, kernel, table, flags, working), (layout, one) in itertools.product(tables, LAYOUTS.items()):
        for (dtype, kind), config in table.items():
            element = "bf16" if kind == "bf16" else ELEMENT[dtype]
            in_parts = config.how == "parts"
            dot = {
                "PART": tl.bfloat16 if in_parts else None,
                "PRECISION": "ieee" if in_parts else config.how,
            }
            suffix = "-tf32" if kind == "tf32" else ""
            yield Case(
                f"{name}-{ELEMENT[dtype]}-{element}{suffix}{layout}",
                kernel,
                pointers(ELEMENT[dtype], *working) | pointers(element, "a"),
                blocks(config, **dot, **flags, **{one: 1}),
                ("k",),
                options(config),
            )


def gather_cases() -> Iterator[Case]:
    for dtype, element in ((torch.float32, "bf16"), (torch.float32, "fp32"), (torch.float64, "fp64")):
        config, working = configs.GATHER[dtype], ELEMENT[dtype]
        yield Case(
            f"gather-{working}-{element}",
            products.gather_product_kernel,
            pointers(working, "value", "out") | pointers(element, "a") | pointers("i64", "index"),
            blocks(config, a_column=1),
            ("k", "count"),
            options(config),
        )
        yield Case(
            f"accumulate_kept-{working}-{element}",
            products.accumulate_kept_kernel,
            pointers(working, "y", "weight", "out") | pointers(element, "a") | pointers("i64", "index"),
            blocks(config, WEIGHTED=True, a_column=1),
            ("k", "count"),
            options(config),
        )


def pass_cases() -> Iterator[Case]:
    for (dtype, multiplicative), config in configs.PASS.sweeps.items():
        yield Case(
            f"sweep-{ELEMENT[dtype]}-{'multiplicative' if multiplicative else 'descent'}",
            tile_pass.sweep_kernel,
            pointers(ELEMENT[dtype], "y", "out", "spare", "parts", "q", "scale", "shift", "weight")
            | pointers("fp64", "sums")
            | {"tol": "fp32"},
            blocks(
                config, MULTIPLICATIVE=multiplicative, EPS=1e-6, SCALED=True, SHIFTED=True, WEIGHTED=True,
                MEASURE=not multiplicative, PRECISION=config.precision,
            ),
            ("k", "splits", "sweeps", "sums_ptr", "sums_stride"),
            options(config),
        )  # fmt: skip
    for dtype, config in configs.RESIDUAL.items():
        # In float32 the loads of a bfloat16 A.
        element = "bf16" if dtype == torch.float32 else "fp64"
        yield Case(
            f"residual-{ELEMENT[dtype]}-{element}",
            tile_pass.residual_kernel,
            pointers(ELEMENT[dtype], "z", "y", "weight") | pointers(element, "a") | pointers("fp64", "sums"),
            blocks(config, WEIGHTED=True, a_column=1),
            ("k", "sums_ptr", "sums_stride"),
            options(config),
        )


def copy_cases() -> Iterator[Case]:
    for dtype in WORKING:
        yield Case(
            f"copy_if-{ELEMENT[dtype]}",
            launch.copy_if_kernel,
            pointers("u1", "flag") | pointers(ELEMENT[dtype], "source", "target"),
            {"BLOCK": configs.COPY.block, "source_column": 1, "target_column": 1},
            ("flag_ptr",),
            options(configs.COPY),
        )


def ragged_cases() -> Iterator[Case]:
    """The float32 kernels that read rows of Y or A, for sizes that 16 does not divide: no row is aligned."""
    for case in itertools.chain(update_cases(), dense_cases(), pass_cases()):
        if "-fp32" in case.name and not case.name.startswith("residual"):
            sizes = [name for name in case.kernel.arg_names if not name.endswith("_ptr")]
            yield dataclasses.replace(case, name=f"{case.name}-ragged", odd=(*case.odd, *sizes))


CASES = (update_cases, select_cases, dense_cases, gather_cases, pass_cases, copy_cases, ragged_cases)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "scalar_spills": 0}


def amd_resources(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    # Scalar registers are spilled to lanes of vector registers, not to memory.
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
    }


def main() -> None:
    wanted = sys.argv[1:]
    if wanted == ["ones"]:
        for case in itertools.chain.from_iterable(cases() for cases in CASES):
            triton.compile(of_ones(case).source(), target=TARGETS["sm_90"], options=case.options)
            print(json.dumps({"kernel": case.name, "target": "ones"}), flush=True)
        return
    for case in itertools.chain.from_iterable(cases() for cases in CASES):
        for target_name, target in TARGETS.items():
            if wanted and not all(word in f"{case.name}-{target_name}" for word in wanted):
                continue
            start = time.perf_counter()
            compiled = triton.compile(case.source(), target=target, options=case.options)
            seconds = time.perf_counter() - start
            if target.backend == "cuda":
                resources = nvidia_resources(compiled.asm["cubin"])
                code = compiled.asm["ptx"]
                wide = re.findall(
                    r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v4\.f32|v2\.f64)|cp\.async\S* .*, 0x10", code
                )
                products_of = re.findall(r"\b(?:wgmma\.)?(?:mma|mma_async|tcgen05\.mma)\.\S*", code)
                sums = [1 + (wide == "x2") for wide in re.findall(r"\badd(?:\.rn)?\.f32(x2)?\b", code)]
            else:
                resources = amd_resources(compiled.asm["amdgcn"])
                code = compiled.asm["amdgcn"]
                wide = re.findall(r"(?:global|buffer)_load_(?:lds_)?dwordx4", code)
                products_of = re.findall(r"v_s?mfma_\S*", code)
                sums = [1 + wide.startswith("pk") for wide in re.findall(r"\bv_(add_f32|pk_add_f32)", code)]
            row = {
                "kernel": case.name,
                "target": target_name,
                "shared": compiled.metadata.shared,
                **resources,
                "wide_loads": len(wide),
                # Instructions that multiply in fewer bits than float32 has; those of float64, and AMD's of float32,
                # round as multiply-adds do.
                "reduced": sum(bool(re.search(r"tf32|xf32|bf16|f16", opcode)) for opcode in products_of),
                "opcodes": sorted(set(products_of)),
                # Additions of two float32s.
                "additions": sum(sums),
                "seconds": round(seconds, 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
