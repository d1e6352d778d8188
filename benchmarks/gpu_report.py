"""GPU figures: each stage appends to one JSON file as it ends, and a short table is printed last.

    python benchmarks/gpu_report.py --out DIR [--stages floors,update,select,solve,fit,tune]

Times are medians of device events after a warm-up, with the spread (10th and 90th percentile).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
import traceback
from pathlib import Path

import torch
from published import PublishedLoop, synthetic_activations

import snmf_kernels
from snmf_kernels import _backends, _triton, ops, reference


def milliseconds(run, repeat=20, warmup=3):
    """(median, 10th, 90th percentile) of device time per call."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10]


def row(name, run, **facts):
    median, low, high = milliseconds(run)
    return {"name": name, "ms": median, "ms_p10": low, "ms_p90": high, **facts}


def error_of(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def floors():
    """Measured bandwidth and matrix rates of this device."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = row("copy 2 GiB", lambda: target.copy_(source))
    copy["TB_per_s"] = 2 * source.nbytes / copy["ms"] / 1e9
    yield copy
    del source, target
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        product = row(f"matmul 8192 {dtype}{' tf32' if tf32 else ''}", lambda left=left, right=right: left @ right)
        product["TFLOP_per_s"] = 2 * 8192**3 / product["ms"] / 1e9
        yield product
    torch.backends.cuda.matmul.allow_tf32 = False


def update_problem(k, n):
    generator = torch.Generator("cuda").manual_seed(0)
    Z = torch.randn(2000, k, device="cuda", generator=generator)
    Z *= torch.rand(2000, k, device="cuda", generator=generator) < 0.05
    Y = torch.rand(k, n, device="cuda", generator=generator)
    return Y, torch.randn(k, n, device="cuda", generator=generator), Z.T @ Z


def update():
    """The fused Y update against the torch expression."""
    for k, n in itertools.product((50, 100, 200, 400, 1000), (7500, 100_000)):
        Y, P, Q = update_problem(k, n)
        wanted = reference.multiplicative_update(Y.double(), P.double(), Q.double())
        plain = row("torch", lambda: reference.multiplicative_update(Y, P, Q))
        fused = row("triton", lambda: _triton.multiplicative_update(Y, P, Q))
        yield {
            "name": f"update k={k} n={n}", "torch_ms": plain["ms"], "triton_ms": fused["ms"], "speedup": plain["ms"] / fused["ms"],
            "TFLOP_per_s": 4 * k * k * n / fused["ms"] / 1e9,
            "error": error_of(_triton.multiplicative_update(Y, P, Q), wanted),
            "torch_error": error_of(reference.multiplicative_update(Y, P, Q), wanted),
        }  # fmt: skip


def tune():
    """Every sensible configuration of the update kernel; the best ones go into UPDATE_CONFIGS by hand."""
    shapes = [(100, 7500), (100, 100_000), (400, 7500), (400, 100_000), (1000, 50_000)]
    problems = {shape: update_problem(*shape) for shape in shapes}
    committed = dict(_triton.UPDATE_CONFIGS)
    tiles = [
        (32, 16, 64, 4, 2), (32, 32, 64, 4, 2), (32, 16, 128, 4, 2), (64, 16, 64, 4, 2), (64, 16, 64, 4, 3), (64, 32, 64, 4, 2),
        (64, 16, 128, 8, 2), (64, 16, 128, 8, 3), (64, 32, 64, 8, 3), (64, 32, 128, 8, 2), (128, 16, 64, 8, 3), (128, 16, 128, 8, 3),
        (128, 32, 64, 8, 2),
    ]  # fmt: skip
    for precision, tile in itertools.product(("ieee", "tf32x3"), tiles):
        config = _triton.UpdateConfig(*tile, precision)
        for key in committed:
            _triton.UPDATE_CONFIGS[key] = config
        result = {"name": f"{precision} {tile}"}
        for shape, (Y, P, Q) in problems.items():
            result[f"k={shape[0]} n={shape[1]}"] = milliseconds(
                lambda Y=Y, P=P, Q=Q: _triton.multiplicative_update(Y, P, Q), repeat=7, warmup=2
            )[0]
        yield result
    _triton.UPDATE_CONFIGS.update(committed)


def select():
    """Winner-take-all against torch.topk, over blocks and warps."""
    for d, k in ((1536, 100), (14336, 100), (14336, 400), (14336, 1000)):
        count = -(-d // 100)
        Z = torch.randn(k, d, device="cuda").T
        plain = row("topk", lambda: Z.abs().topk(count, dim=0))
        wanted = reference.winner_take_all(Z, count)
        committed = _triton.SELECT_BLOCK, _triton.SELECT_WARPS
        for block, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (16384, 8), (16384, 16)):
            _triton.SELECT_BLOCK, _triton.SELECT_WARPS = block, warps
            fused = row("triton", lambda: _triton.winner_take_all(Z, count))
            got = _triton.winner_take_all(Z, count)
            yield {
                "name": f"select d={d} k={k} block={block} warps={warps}", "topk_ms": plain["ms"], "triton_ms": fused["ms"],
                "speedup": plain["ms"] / fused["ms"], "equal": bool(torch.equal(got.indices, wanted.indices)),
            }  # fmt: skip
        _triton.SELECT_BLOCK, _triton.SELECT_WARPS = committed


def solve():
    """Batched regularised solves against torch.linalg."""
    shapes = [(10_000, 8, 1), (10_000, 32, 1), (4096, 64, 4), (1024, 128, 8), (256, 200, 1), (1, 100, 14336), (1, 200, 14336)]
    for (batch, k, m), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        factor = torch.randn(batch, k, k, device="cuda", dtype=dtype)
        G, B = factor @ factor.mT / k, torch.randn(batch, k, m, device="cuda", dtype=dtype)
        facts = {"name": f"solve {str(dtype)[6:]} batch={batch} k={k} m={m}"}
        facts["torch_ms"] = row("torch", lambda: reference.ridge_solve(G, B, 0.1))["ms"]
        if _backends.refusal("cuda", B.device, dtype, "ridge_solve", k):
            yield {**facts, "cuda_ms": None}
            continue
        facts["cuda_ms"] = row("cuda", lambda: ops.ridge_solve(G, B, ridge=0.1, backend="cuda"))["ms"]
        facts["speedup"] = facts["torch_ms"] / facts["cuda_ms"]
        exact = torch.linalg.solve(G.double() + 0.1 * torch.eye(k, device="cuda", dtype=torch.float64), B.double())
        facts["error"] = error_of(ops.ridge_solve(G, B, ridge=0.1, backend="cuda")[0], exact)
        facts["torch_error"] = error_of(reference.ridge_solve(G, B, 0.1)[0], exact)
        yield facts


def fit():
    """Per iteration and to the same loss against the published loop on this GPU."""
    for (n, k), dtype in itertools.product(((7500, 100), (7500, 400), (100_000, 100), (100_000, 400)), (torch.float32, torch.bfloat16)):
        A = synthetic_activations(14336, n, device="cuda", dtype=dtype)
        full = A.float()
        baseline_iterations = 200 if n < 50_000 else 60
        loop = PublishedLoop(full, k)
        for _ in range(3):
            loop.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        best = min(loop.step() for _ in range(baseline_iterations))
        torch.cuda.synchronize()
        published = time.perf_counter() - start
        norm = float(full.double().square().sum())
        del loop
        torch.cuda.empty_cache()
        del full
        for solver in ("mu", "auto"):
            snmf_kernels.fit(A, k, solver=solver, max_iter=3, patience=1000, tol=0)
            reached = {}
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()

            def watch(state, start=start, reached=reached, best=best):
                if "s" not in reached and state.loss <= best:
                    reached.update(s=time.perf_counter() - start, n_iter=state.n_iter)

            result = snmf_kernels.fit(A, k, solver=solver, max_iter=baseline_iterations, patience=1000, tol=0, callback=watch)
            torch.cuda.synchronize()
            mine = time.perf_counter() - start
            yield {
                "name": f"fit {solver} d=14336 n={n} k={k} {str(dtype)[6:]}",
                "published_ms_per_iteration": 1e3 * published / baseline_iterations,
                "ms_per_iteration": 1e3 * mine / result.n_iter,
                "speedup_per_iteration": published / baseline_iterations / (mine / result.n_iter),
                "published_loss": best / norm, "loss": min(result.loss_history) / norm,
                "to_published_loss_s": reached.get("s"), "to_published_loss_iterations": reached.get("n_iter"),
                "published_s": published,
                "speedup_to_loss": published / reached["s"] if reached else None,
                "peak_over_A_and_Y": torch.cuda.max_memory_allocated() / (A.nbytes + result.Y.nbytes),
                "backend": result.backend,
            }  # fmt: skip
            del result
        del A
        torch.cuda.empty_cache()


STAGES = {"floors": floors, "update": update, "select": select, "solve": solve, "fit": fit, "tune": tune}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu.json"
    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "triton": __import__("triton").__version__, "snmf_kernels": snmf_kernels.__version__,
        "build": _backends.compiled_module().build_info(), "stages": {},
    }  # fmt: skip
    for name in arguments.stages.split(","):
        rows = report["stages"][name] = []
        start = time.perf_counter()
        try:
            for result in STAGES[name]():
                rows.append(result)
                path.write_text(json.dumps(report, indent=1))
                print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in result.items()}), flush=True)
        except Exception:  # a failed stage is reported in the file and must not cost the others
            rows.append({"failed": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
