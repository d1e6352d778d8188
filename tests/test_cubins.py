"""What the device code that lies in the module needs, architecture by architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from snmf_kernels import _backends

# Of each kernel the threads of its largest block, and whether its factor lies in shared memory.
KERNELS = {
    "ridge_kernel WarpGroup": (128, True),
    "ridge_kernel BlockGroup": (512, True),
    "support_warp_kernel": (128, True),
    "support_block_kernel shared": (512, True),
    "support_block_kernel global": (1024, False),
}
# Blocks of the largest size that a multiprocessor with its 65536 registers must be able to hold.
BLOCKS = {128: 8, 512: 2, 1024: 1}
# The system's part of the shared memory of a block.
RESERVED = {"sm_80": 0, "sm_90": 1024}


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def kernel_of(symbol: str) -> tuple[str, str]:
    """(type, name as in KERNELS) of a mangled symbol."""
    name, arguments = re.search(r"\d+([a-z_]+_kernel)I(.*?)EE?v", symbol).groups()
    if name == "ridge_kernel":
        name += " " + re.search(r"[A-Z][a-z]+Group", arguments)[0]
    elif name == "support_block_kernel":
        name += " shared" if "Lb1" in arguments else " global"
    return {"f": "float", "d": "double"}[arguments[0]], name


@pytest.fixture(scope="module")
def dump():
    """Runs cuobjdump on the module with these options."""
    module = _backends.compiled_module()
    assert not isinstance(module, str), module
    if module.build_info()["cuda"] is None:
        pytest.skip("this build has no CUDA code")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither CUDA's nor triton's")

    def run(*options: str) -> str:
        return subprocess.run(
            [tool, *options, module.__file__], capture_output=True, text=True, check=True
        ).stdout

    return run


def by_architecture(printed: str, heading: str) -> dict[str, str]:
    """The parts of the output, by architecture."""
    parts = re.split(rf"^\s*{heading} (sm_\d+)$", printed, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_resources(dump):
    found = by_architecture(dump("--dump-resource-usage"), "arch =")
    built = _backends.compiled_module().build_info()["cuda_architectures"]
    assert set(found) == set(re.findall(r"sm_\d+", built))
    for architecture, text in found.items():
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        assert {kernel_of(row[0]) for row in rows} == {
            (dtype, name) for dtype in ("float", "double") for name in KERNELS
        }
        for symbol, *numbers in rows:
            dtype, name = kernel_of(symbol)
            registers, stack, shared, local = map(int, numbers)
            where = f"{name}, {dtype}, {architecture}"
            threads, _ = KERNELS[name]
            assert registers * threads * BLOCKS[threads] <= 65536, f"{where}: {registers} registers"
            assert stack == local == 0, f"{where}: stack {stack}, local {local}"
            # What is asked for at launch, up to all there is, comes on top.
            assert shared == RESERVED.get(architecture, shared), f"{where}: {shared} bytes of shared memory"


def test_memory_instructions(dump):
    """Shared memory is known as such when compiling: no generic accesses, no detour through local memory."""
    for architecture, text in by_architecture(dump("-sass"), "code for").items():
        functions = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
        for symbol, code in zip(functions[1::2], functions[2::2], strict=True):
            dtype, name = kernel_of(symbol)
            where = f"{name}, {dtype}, {architecture}"
            used = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]+)", code, re.MULTILINE))
            assert {"LDG", "STG"} <= used, where
            assert not used & {"LD", "ST", "LDL", "STL"}, f"{where}: {used & {'LD', 'ST', 'LDL', 'STL'}}"
            assert (used >= {"LDS", "STS"}) == KERNELS[name][1], where
            # One barrier for a block, none where warps work alone.
            assert ("BAR" in used) == ("Block" in name or "block" in name), where
            # float64 arithmetic where it is promised, and only there (float32 division does without).
            assert ("DFMA" in used) == (dtype == "double"), where


def test_the_latest_is_there_as_ptx(dump):
    built = _backends.compiled_module().build_info()["cuda_architectures"]
    newest = re.search(r"compute_(\d+)$", built)[1]
    assert re.findall(r"\.(sm_\d+)\.ptx", dump("--list-ptx")) == [f"sm_{newest}"]
