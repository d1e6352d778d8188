"""Time of a pass of ``fit`` over d, n and k, beside the dense product ``A Yᵀ`` that it cannot do without.

    python benchmarks/scaling/benchmark.py run       # fills results.json; a run that was cut short goes on
    python benchmarks/scaling/benchmark.py report    # table.md and figure.png

A pass is one iteration in the exploring phase (dense product, least squares, winner-take-all, sweeps over Y, Gram
matrix): the difference of two fits that differ in ``max_iter``. The floor is ``Y @ A.T`` by torch in the same
process. Also: the speed of ``Factorization.encode``, on these activations and on real ones, whose features are less
orthogonal and need more sweeps, and peak memory of ``fit`` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import described, facts
from memory import peak_memory
from published import synthetic_activations
from real_activations import activations

import snmf_kernels
from snmf_interp.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
D, N, K = (1024, 4096, 14_336), (5000, 20_000, 80_000), (50, 200, 1000)
ENCODED = (("smollm2-135m", 10), ("smollm2-135m", 29), ("gemma-3-270m", 8))
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "refit=True, neuron_scale=None": {"refit": True, "neuron_scale": None},
}
PASSES = 3
MEMORY = [
    (1536, 14_500, 100),
    (4096, 20_000, 100),
    (14_336, 20_000, 200),
    (1536, 80_000, 400),
    (1536, 14_500, 400),
]


def seconds(function: Any, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(A: torch.Tensor, k: int) -> dict[str, float]:
    """Seconds of a pass and of the dense product, by turns."""
    Y = torch.rand(k, A.shape[1])

    def iterate(count: int) -> None:
        options = {"refit": False, "tol": 0.0, "patience": 1000, "max_iter": count, "init": (None, Y)}
        snmf_kernels.fit(A, k, **options)

    iterate(1)
    passes, floors = [], []
    for _ in range(3):
        floors.append(seconds(lambda: Y @ A.T, repeats=2))
        short = seconds(lambda: iterate(1), repeats=1)
        passes.append((seconds(lambda: iterate(1 + PASSES), repeats=1) - short) / PASSES)
    return {"pass": statistics.median(passes), "dense_product": statistics.median(floors)}


def encode_speeds(k: int = 100) -> list[dict[str, Any]]:
    data = {"synthetic": synthetic_activations(2048, 40_000)} | {
        f"{model} {layer}": activations(model, layer) for model, layer in ENCODED
    }
    rows = []
    for name, A in data.items():
        for setting, options in SETTINGS.items():
            factors = snmf_kernels.fit(A[:, :10_000], k, **options)
            spent = seconds(lambda A=A, factors=factors: factors.encode(A))
            rows.append(
                {"data": name, "setting": setting, "d": A.shape[0], "k": k, "n": A.shape[1]}
                | {"tokens_per_second": A.shape[1] / spent, "kkt_residual": factors.encode(A).kkt_residual}
                | facts()
            )
            print(rows[-1], flush=True)
    return rows


def run() -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"passes": []}
    if "encode" not in stored:
        stored["encode"] = encode_speeds()
    if "memory" not in stored:
        stored["memory"] = []
        for d, n, k in MEMORY:
            peak, ratio = peak_memory(d, n, k)
            stored["memory"].append({"d": d, "n": n, "k": k, "peak_bytes": peak, "ratio": ratio} | facts())
        print(stored["memory"], flush=True)
    write_json(RESULTS, stored)
    done = {(row["d"], row["n"], row["k"]) for row in stored["passes"]}
    for d in D:
        for n in N:
            if all((d, n, k) in done for k in K):
                continue
            A = synthetic_activations(d, n)
            for k in K:
                if (d, n, k) not in done:
                    stored["passes"].append({"d": d, "n": n, "k": k} | measure(A, k) | facts())
                    print(stored["passes"][-1], flush=True)
                    write_json(RESULTS, stored)


def table(stored: dict[str, Any]) -> str:
    lines = [
        "float32, token-major synthetic activations, 1 % kept.",
        "",
        f"Passes: {described(stored['passes'])}.",
        "",
        "| d | n | k | pass ms | `A Yᵀ` ms | pass / product | pass ns / (n d) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in stored["passes"]:
        spent, floor = row["pass"], row["dense_product"]
        sizes = f"{row['d']:,} | {row['n']:,} | {row['k']:,}"
        times = f"{1e3 * spent:.1f} | {1e3 * floor:.1f} | {spent / floor:.2f}"
        lines += [f"| {sizes} | {times} | {1e9 * spent / (row['n'] * row['d']):.3f} |"]
    lines += [
        "",
        f"`encode`: {described(stored['encode'])}.",
        "",
        "| activations | d | k | features of | tokens a second | KKT residual |",
        "|---|---|---|---|---|---|",
    ]
    for row in stored["encode"]:
        sizes = f"{row['data']} | {row['d']:,} | {row['k']:,} | {row['setting']}"
        lines += [f"| {sizes} | {row['tokens_per_second']:,.0f} | {row['kkt_residual']:.1e} |"]
    lines += ["", "| d | n | k | peak of `fit`, A included, MB | over A + Y |", "|---|---|---|---|---|"]
    for row in stored["memory"]:
        sizes = f"{row['d']:,} | {row['n']:,} | {row['k']:,}"
        lines += [f"| {sizes} | {row['peak_bytes'] / 1e6:.0f} | {row['ratio']:.3f} |"]
    return "\n".join(lines) + "\n"


def figure(stored: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for d, marker in zip(D, "o^s", strict=True):
        for k, colour in zip(K, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            rows = [r for r in stored["passes"] if (r["d"], r["k"]) == (d, k)]
            label = f"d = {d:,}, k = {k:,}"
            left.loglog(
                [r["n"] for r in rows],
                [1e3 * r["pass"] for r in rows],
                marker=marker,
                color=colour,
                label=label,
            )
            ratio = [r["pass"] / r["dense_product"] for r in rows]
            right.semilogx([r["n"] for r in rows], ratio, marker=marker, color=colour, label=label)
    left.set(xlabel="tokens n", ylabel="ms a pass", title="a pass of fit (exploring)")
    right.axhline(2, color="tab:red", lw=0.8)
    right.set(
        xlabel="tokens n", ylabel="pass / dense product A Yᵀ", title="against the floor", ylim=(0, None)
    )
    for ax in (left, right):
        ax.set_xticks(N, [f"{n:,}" for n in N])
        ax.minorticks_off()
    fig.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    if parser.parse_args().what == "run":
        run()
    stored = json.loads(RESULTS.read_text())
    stored["passes"].sort(key=lambda row: (row["d"], row["n"], row["k"]))
    (HERE / "table.md").write_text(table(stored))
    figure(stored, HERE / "figure.png")
    print(table(stored))


if __name__ == "__main__":
    main()
