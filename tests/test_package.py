"""The package as a whole: imports, backends, processes, the diagnostic page."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import snmf_kernels
from snmf_kernels import _backends

CPU = torch.device("cpu")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "SNMF_CPU_ISA")
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment, timeout=120
    )


def test_import_is_light_and_silent():
    code = (
        "import sys, snmf_kernels, torch\n"
        "snmf_kernels.fit(torch.rand(20, 30), 3, keep=0.2, max_iter=2).encode(torch.rand(20, 5))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers', 'scipy')])"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_diagnostic_page():
    run = subprocess.run([sys.executable, "-m", "snmf_kernels"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for line in (
        f"snmf-kernels  {snmf_kernels.__version__}",
        f"torch         {torch.__version__}",
        "compiler",
        "CPU levels",
        "threads",
    ):
        assert line in run.stdout
    for name in _backends.BACKENDS:
        assert name in run.stdout


def test_the_extension_is_of_this_version():
    assert _backends.compiled_module().build_info()["version"] == snmf_kernels.__version__


def test_level_cap():
    code = "from snmf_kernels import _C; print(_C.build_info()['level'])"
    assert python(code, SNMF_CPU_ISA="v2").stdout.strip() in ("v2", "baseline")
    refused = python(code, SNMF_CPU_ISA="avx9")
    assert "SNMF_CPU_ISA: wanted one of v2, v3, v4, got 'avx9'" in refused.stderr
    with pytest.raises(ValueError, match="level: wanted one of"):
        _backends.compiled_module().set_level("v9")


@pytest.fixture
def without_extension(tmp_path):
    """Environment of a process in which _C cannot be imported, wherever it may lie."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['snmf_kernels._C'] = None\n")
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])])}


def test_a_missing_extension_is_explained(without_extension):
    code = (
        "import snmf_kernels, torch\n"
        "print(snmf_kernels.fit(torch.rand(20, 30), 3, keep=0.2, max_iter=2).backend)\n"
        "snmf_kernels.fit(torch.rand(20, 30), 3, backend='cpp')"
    )
    run = python(code, **without_extension)
    assert run.stdout.strip() == "torch", "auto falls back"
    assert "backend: 'cpp' cannot run here: snmf_kernels._C cannot be imported" in run.stderr
    assert "pip install -e ." in run.stderr


def test_a_missing_extension_is_warned_of_once(without_extension, tmp_path):
    script = tmp_path / "importer.py"
    script.write_text(
        "import torch\nimport snmf_kernels\nimport snmf_kernels.ops\nfrom snmf_kernels import fit\n"
    )
    run = python(f"import runpy; runpy.run_path({str(script)!r})", **without_extension)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Warning") == 1, run.stderr
    assert f"{script}:2: RuntimeWarning: {_backends.WITHOUT_EXTENSION}: snmf_kernels._C cannot" in run.stderr
    # The page has it in rows of its own instead.
    page = subprocess.run(
        [sys.executable, "-m", "snmf_kernels"],
        capture_output=True, text=True, timeout=120, env=os.environ | without_extension,
    )  # fmt: skip
    assert page.returncode == 0, page.stderr
    assert page.stderr == ""
    assert re.search(r"^  extension +snmf_kernels\._C cannot be imported", page.stdout, re.MULTILINE)
    assert f"  speed         {_backends.WITHOUT_EXTENSION}\n" in page.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kernels_do_not_hang_in_a_forked_child():
    # Ours: torch's own parallel operations do, in a child of a process that has used them.
    code = (
        "import os, torch, snmf_kernels\n"
        "torch.set_num_threads(2)\n"
        "A = torch.rand(200, 500)\n"
        "wanted = snmf_kernels.ops.winner_take_all(A, 3, backend='cpp')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    got = snmf_kernels.ops.winner_take_all(A, 3, backend='cpp')\n"
        "    os._exit(0 if torch.equal(got.indices, wanted.indices) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    run = python(code)
    assert run.stdout.strip() == "0", run.stderr


def test_kernels_release_the_gil():
    import threading
    import time

    Y, P, Q = torch.rand(300, 20_000), torch.randn(300, 20_000), torch.randn(300, 300)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(None)
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    snmf_kernels.ops.multiplicative_update(Y, P, Q, sweeps=10, backend="cpp")
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during > 5


def test_choice_of_backend():
    assert _backends.choose("multiplicative_update", CPU, torch.float32).backend == "cpp"
    assert _backends.choose("multiplicative_update", torch.device("meta"), torch.float32).backend == "torch"
    assert (
        _backends.refusal("cpp", torch.device("mps"), torch.float32)
        == "it runs on the CPU, the tensors are on mps"
    )
    assert "float32 or float64, not bfloat16" in _backends.refusal("cpp", CPU, torch.bfloat16)
    assert "it has no ridge_solve" in _backends.refusal("triton", CPU, torch.float32, "ridge_solve")
    assert set(_backends.report()) == set(_backends.BACKENDS)


def test_a_named_backend_must_run_something(monkeypatch):
    real = _backends.refusal
    monkeypatch.setattr(
        _backends,
        "refusal",
        lambda backend, device, dtype, operation=None, k=None, *limits: (
            ("too large" if operation else None)
            if backend == "cuda"
            else real(backend, device, dtype, operation, k, *limits)
        ),
    )
    with pytest.raises(snmf_kernels.BackendError, match="'cuda' cannot run ridge_solve here: too large"):
        _backends.choose_all(CPU, torch.float32, "cuda", 400)


def test_interpreted_triton_is_never_chosen_by_itself():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off")
    assert _backends.choose_all(CPU, torch.float32).backend == "cpp"
    kernels = _backends.choose_all(CPU, torch.float32, "triton")
    assert kernels.backend == "triton"
    assert kernels.multiplicative_update.__module__ == "snmf_kernels._triton.coefficients"
    assert kernels.ridge_solve.__module__ == "snmf_kernels.reference"


@pytest.mark.parametrize("operation", _backends.OPERATIONS)
def test_every_backend_has_what_it_says_it_provides(operation):
    import importlib
    import inspect

    wanted = inspect.signature(getattr(snmf_kernels.reference, operation))
    for backend in _backends.BACKENDS:
        if operation in _backends.PROVIDES[backend]:
            module = importlib.import_module(f"snmf_kernels.{_backends._MODULES[backend]}")
            assert inspect.signature(getattr(module, operation)) == wanted, backend
