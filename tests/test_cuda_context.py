"""The module's own CUDA runtime works in torch's context, on torch's memory and streams.

It is linked statically, whatever runtime torch brings along. The GPU suite runs this first: if it fails, nothing else
that the suite finds means much.
"""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from conftest import GPU

from snmf_kernels import _backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def solves():
    """The CUDA launchers, whose kernels are loaded already: loading one may wait for the device."""
    reason = _backends.refusal("cuda", torch.device("cuda", 0), torch.float64)
    assert reason is None, reason
    from snmf_kernels import _cuda

    _cuda.ridge_solve(*systems())
    torch.cuda.synchronize()
    return _cuda


def systems(k=40):
    """(G, B) of 3 systems that are twice the identity."""
    G = 2 * torch.eye(k, dtype=torch.float64, device="cuda").expand(3, -1, -1).contiguous()
    return G, torch.arange(3.0 * k * 5, dtype=torch.float64, device="cuda").view(3, k, 5)


def current_context(driver):
    context = ctypes.c_void_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


def test_one_context(solves):
    driver = ctypes.CDLL("libcuda.so.1")
    before = current_context(driver)
    X, info = solves.ridge_solve(*systems(), 2.0)
    assert torch.equal(X, systems()[1] / 4)
    assert info.tolist() == [0, 0, 0]
    assert current_context(driver) == before
    primary = ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), torch.cuda.current_device()) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(torch.cuda.current_device()) == 0
    assert before == primary.value


def test_the_same_devices():
    assert _backends.compiled_module().cuda_device_count() == torch.cuda.device_count()


def test_work_is_ordered_on_the_current_stream_and_the_host_goes_on(solves):
    good, B = systems()
    stream = torch.cuda.Stream()
    G = torch.full_like(good, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # What lies before comes late, and what follows would be early if the kernel were anywhere but in between.
        torch.cuda._sleep(500_000_000)
        G.copy_(good)
        X, info = solves.ridge_solve(G, B, 2.0)
        doubled = 2 * X
        G.fill_(torch.nan)
        assert not stream.query(), "the host waited for the device, or nothing was to be waited for"
    stream.synchronize()
    assert torch.equal(doubled, B / 2)
    assert info.tolist() == [0, 0, 0]


def test_another_thread_has_the_same_context(solves):
    found = []

    def work():
        found.append(solves.ridge_solve(*systems(), 2.0)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0], systems()[1] / 4)


def test_an_error_stays_where_it_was_made(solves):
    module = _backends.compiled_module()
    with pytest.raises(RuntimeError, match="does not fit shared memory"):
        module.cuda_ridge_solve("float64", 0, 0, 0, 0, 1, 5000, 1, 1.0, 0, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA device 99"):
        module.cuda_ridge_solve("float64", 0, 0, 0, 0, 1, 5, 1, 1.0, 0, 0.0, 99, 0)
    assert float(torch.ones(5, device="cuda").sum()) == 5
    assert torch.equal(solves.ridge_solve(*systems(), 2.0)[0], systems()[1] / 4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_current_device_stays(solves):
    G, B = (tensor.to("cuda:1") for tensor in systems())
    X, _ = solves.ridge_solve(G, B, 2.0)
    assert torch.equal(X, B / 4)
    assert torch.cuda.current_device() == 0
