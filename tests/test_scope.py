"""Forked children, Ctrl-C, and the state of torch around a fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from problems import planted

from snmf_kernels import FitManyInterrupted, _backends, _scope, fit, fit_many, ops, reference
from snmf_kernels._data import DataMatrix
from snmf_kernels.reference import short_parts


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_fits_on_one_thread():
    printed = run_python("""
        import logging, multiprocessing, sys, torch
        from snmf_kernels import fit, ops
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        torch.set_num_threads(2)
        A = torch.rand(512, 3000, generator=torch.Generator().manual_seed(0))
        before = fit(A, 20, max_iter=5)  # torch and the kernels have threads now

        def work(queue):
            after = fit(A, 20, max_iter=5)
            code = after.encode(A[:, :50])
            ops.winner_take_all(A, 20)
            queue.put((torch.get_num_threads(), after.relative_error, code.relative_error))

        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            sys.exit("the child hangs")
        threads, error, of_code = queue.get()
        assert threads == 1 and torch.get_num_threads() == 2
        assert abs(error - before.relative_error) < 1e-3, (error, before)
        print(0 < of_code < 1)
    """)
    assert "this process was forked" in printed
    assert printed.endswith("True\n")


@pytest.mark.parametrize("call", ["fit", "fit_many", "encode"])
def test_results_made_in_inference_mode_can_meet_autograd(call):
    with torch.inference_mode():
        A = planted(60, 100, 4, keep=0.1, noise=0.3)[0] * 1.0
        result = fit(A, 4, keep=0.1, max_iter=3) if call != "fit_many" else fit_many([A], 4, keep=0.1)[0]
        tensors = [result.Z, result.Y] if call != "encode" else [result.encode(A).Y]
        assert torch.is_inference_mode_enabled()
    for tensor in tensors:
        weight = torch.ones_like(tensor, requires_grad=True)
        (weight * tensor).sum().backward()
        assert torch.equal(weight.grad, tensor)
    with torch.enable_grad():
        assert not fit(A.clone().requires_grad_(), 4, keep=0.1, max_iter=1).Z.requires_grad


def slow_calls():
    generator = torch.Generator().manual_seed(0)
    k = 1200
    Y = torch.rand(k, 2000, generator=generator)
    ZtA = torch.randn(k, 2000, generator=generator)
    G = torch.randn(k, 2 * k, generator=generator)
    G = G @ G.T / k + torch.eye(k)
    dense = torch.randn(1000, k, generator=generator)
    Z = ops.winner_take_all(dense, 50)
    A = torch.rand(1000, 2000, generator=generator)
    return {
        "coordinate_descent": lambda times: ops.coordinate_descent(Y, ZtA, G, sweeps=4 * times),
        "multiplicative_update": lambda times: ops.multiplicative_update(Y, ZtA, G, sweeps=4 * times),
        "coefficient_pass": lambda times: ops.coefficient_pass(Y, Z, A, G, sweeps=4 * times),
        "column_descent": lambda times: ops.column_descent(Z, dense.T.contiguous(), G, sweeps=10 * times),
        "sparse_product": lambda times: ops.sparse_product(Z, A.repeat(1, 12 * times)),
        "winner_take_all": lambda times: ops.winner_take_all(dense.repeat(1, 8 * times), 50),
        "ridge_solve": lambda times: ops.ridge_solve(
            G[None, :600, :600].repeat(4 * times, 1, 1).contiguous(), torch.ones(4 * times, 600, 20)
        ),
    }


SLOW = tuple(slow_calls())


def interrupted_after(seconds, call):
    """How long a call goes on that hears of Ctrl-C so long after its start."""
    # Another signal, which no tool around the tests waits for.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    started = time.perf_counter()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.perf_counter() - started
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def duration_of(call, *arguments):
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
@pytest.mark.parametrize("name", SLOW)
def test_ctrl_c_is_heard_inside_a_kernel(name):
    call = slow_calls()[name]
    times = 1
    while (whole := duration_of(call, times)) < 0.8:
        times *= 2
    # A kernel that does not hear takes the whole time in every try, whatever else the machine does.
    taken = min(interrupted_after(0.1 * whole, lambda: call(times)) for _ in range(3))
    assert taken < 0.6 * whole, f"{taken:.2f} of {whole:.2f} s"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_ctrl_c_is_heard_during_a_factorisation():
    generator = torch.Generator().manual_seed(0)
    G = torch.eye(2600).double() + 1e-3 * torch.rand(2600, 2600, generator=generator).double()
    values = []

    def call():
        values.append(_scope.interruptible(len(G), lambda: torch.linalg.eigvalsh(G)))

    whole = duration_of(call)
    assert torch.equal(values[0], torch.linalg.eigvalsh(G))
    before = set(threading.enumerate())
    interrupted_after(0.05 * whole, call)
    (worker,) = set(threading.enumerate()) - before
    assert worker.daemon, "LAPACK goes on, but nobody waits for it, nor does the end of the process"
    assert len(values) == 1
    worker.join()

    def fails():
        raise ArithmeticError("inside")

    with pytest.raises(ArithmeticError, match="inside"):
        _scope.interruptible(5000, fails)


@pytest.mark.parametrize("weights", [None, torch.linspace(0, 2, 700)])
def test_long_products_are_cut(monkeypatch, weights):
    generator = torch.Generator().manual_seed(0)
    A, Y = torch.rand(30, 700, generator=generator), torch.rand(210, 700, generator=generator)
    wanted = reference.dense_product(Y, A, weights)
    monkeypatch.setattr("snmf_kernels.reference._PRODUCT_WORK", 210 * 30 * 64)
    assert len(short_parts(700, 210 * 30, A.device)) == 11
    assert torch.allclose(reference.dense_product(Y, A, weights), wanted, rtol=1e-5)
    data = DataMatrix(A, torch.float32, _backends.choose_all(A.device, torch.float32))
    for rows in (3, 100, 210):
        assert torch.allclose(data.gram_of_coefficients(Y[:rows]), Y[:rows] @ Y[:rows].T, rtol=1e-5)


def test_a_pass_says_how_far_it_is():
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(600, 20_000, generator=generator)
    shares = []
    token = _scope.pass_listener.set(shares.append)
    try:
        Z = ops.winner_take_all(torch.randn(600, 400, generator=generator), 20)
        G = (Z.to_dense().T @ Z.to_dense()).contiguous()
        while len(shares) < 3:
            shares.clear()
            ops.coefficient_pass(torch.zeros(400, A.shape[1]), Z, A, G, sweeps=20)
            A = A.repeat(1, 2)
    finally:
        _scope.pass_listener.reset(token)
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1


def test_an_exception_of_a_listener_ends_a_pass():
    generator = torch.Generator().manual_seed(0)
    Z = ops.winner_take_all(torch.randn(600, 400, generator=generator), 20)
    G = (Z.to_dense().T @ Z.to_dense()).contiguous()

    def listener(share):
        raise ArithmeticError("heard")

    token = _scope.pass_listener.set(listener)
    try:
        with pytest.raises(ArithmeticError, match="heard"):
            ops.coefficient_pass(torch.zeros(400, 200_000), Z, torch.rand(600, 200_000), G, sweeps=20)
    finally:
        _scope.pass_listener.reset(token)


def test_fit_many_keeps_what_was_finished_on_ctrl_c():
    A = planted(60, 100, 4, keep=0.1, noise=0.3)[0]
    seen = []

    def callback(number, state):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(FitManyInterrupted, match="2 of 4 members had finished") as raised:
        fit_many(
            [A, A, A, A], 4, keep=0.1, seed=[0, 1, 2, 3], callback=callback,
            on_result=lambda number, result: seen.append((number, result)),
        )  # fmt: skip
    results = raised.value.results
    assert isinstance(raised.value, KeyboardInterrupt)
    assert results[2:] == [None, None]
    assert seen == list(enumerate(results[:2]))
    for seed in (0, 1):
        assert torch.equal(results[seed].Z, fit(A, 4, keep=0.1, seed=seed).Z)
