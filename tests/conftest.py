"""Where the kernels run, and memory that is never clean by chance."""

from __future__ import annotations

import os

import pytest
import torch

# Seconds for a slow test, whose fixtures may compile for minutes; pyproject.toml has the limit of the others.
SLOW_LIMIT = 900
GPU = torch.cuda.is_available()
if not GPU:
    # Before the first import of triton: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from snmf_kernels import _backends  # noqa: E402  # after the environment


def runs_here(operation: str, **limits: int) -> list:
    """(backend, device) pairs that can run an operation on this machine, as parameters.

    ``limits`` are what ``refusal`` asks for besides: pairs that refuse those are left out.
    """
    pairs = [("torch", "cpu"), ("cpp", "cpu")]
    pairs += [("torch", "cuda"), ("triton", "cuda"), ("cuda", "cuda")] if GPU else [("triton", "cpu")]
    return [
        pytest.param(
            backend, device, id=f"{backend}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else []
        )
        for backend, device in pairs
        if operation in _backends.PROVIDES[backend]
        and (
            not limits
            or _backends.refusal(backend, torch.device(device), torch.float32, operation, **limits) is None
        )
    ]


def interpreted(backend: str, device: str) -> bool:
    """Whether every instruction of a kernel takes microseconds."""
    return backend == "triton" and device == "cpu"


def pytest_itemcollected(item: pytest.Item) -> None:
    """``slow_where(condition)``: slow for those parameters of a test of which the condition holds.

    Slow tests have more time, where pytest-timeout is there to watch it.
    """
    for mark in item.iter_markers("slow_where"):
        if mark.args[0](**item.callspec.params):
            item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("slow") and item.config.pluginmanager.hasplugin("timeout"):
        item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """``torch.empty`` gives NaN (or a large integer): an output that a kernel forgets to write shows."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return (
            tensor.fill_(torch.iinfo(tensor.dtype).max)
            if tensor.dtype in (torch.int32, torch.int64)
            else tensor
        )

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(real_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(real_empty_like(*args, **kwargs)))


@pytest.fixture
def level(request):
    """Runs a test at one instruction level of the CPU kernels, and puts the former one back."""
    module = _backends.compiled_module()
    info = module.build_info()
    names = info["levels"].split(",")
    if request.param not in names:
        pytest.skip(f"this processor has no {request.param}")
    module.set_level(request.param)
    yield request.param
    module.set_level(info["level"])
