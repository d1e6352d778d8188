"""How much sooner ``fit`` reaches the loss that the published loop has after 1,000 iterations, on real activations.

    python benchmarks/time_to_loss/benchmark.py quick    # one layer, 300 iterations, two minutes
    python benchmarks/time_to_loss/benchmark.py curves   # hours: losses of the published loop by iteration, resumable
    python benchmarks/time_to_loss/benchmark.py time     # minutes, on a quiet machine: seconds of both, resumable
    python benchmarks/time_to_loss/benchmark.py report   # table.md and figure.png

Both sides see the same masked tokens, the same neuron scale, the same number of threads and the same process. Two
settings are timed: the default of ``fit`` (neuron_scale="rms") and the one for the smallest loss (refit=True,
neuron_scale=None), each against the published loop on data of its scale.

The losses of the published loop, which do not depend on the machine's load, are recorded once, and its time is the
number of iterations times the median seconds of one of the first, measured around the fits. That is in its favour:
coefficients that multiplicative updates let shrink for ever become subnormal numbers after a hundred iterations or so,
and the processor takes several times as long for products with them. ``quick`` runs it and gives its real time as well.
Three ratios are given. The loop's loss may rise again after its best: *first* is to the iteration that first reached
its best loss within the 1,000, *whole* to all 1,000, which it took to know. And it comes near its best long before:
*near* is the time of the loop over that of ``fit`` until 1 % above that best.
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
from published import PublishedLoop
from real_activations import CASES, activations

import snmf_kernels
from snmf_interp.files import write_json

HERE = Path(__file__).parent
CURVES, TIMES = HERE / "curves", HERE / "times"
ITERATIONS, QUICK_ITERATIONS = 1000, 300
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "reconstruct": {"refit": True, "neuron_scale": None},
}
SCALE = {"default": "rms", "reconstruct": "raw"}
TARGET = {100: 300, 400: 100}


def name_of(model: str, layer: int, k: int, scale: str, seed: int) -> str:
    return f"{model}-{layer}-k{k}-{scale}-s{seed}"


def data_of(model: str, layer: int, scale: str) -> torch.Tensor:
    """The activations, divided by each neuron's root mean square where the scale is "rms"."""
    A = activations(model, layer)
    if scale == "raw":
        return A
    rms = A.square().mean(1).sqrt()
    return (A.T / torch.where(rms > 0, rms, 1)).T


def curve(
    model: str, layer: int, k: int, scale: str, seed: int, source: str, iterations: int
) -> dict[str, Any]:
    """Losses by iteration, and the seconds that the published loop took if it was run itself."""
    A = data_of(model, layer, scale)
    if source == "mu":
        options = {"solver": "mu", "tol": 0.0, "max_iter": iterations, "patience": iterations}
        return {"losses": list(snmf_kernels.fit(A, k, seed=seed, **options).loss_history)}
    loop = PublishedLoop(A, k, seed=seed)
    started = time.perf_counter()
    losses = [loop.step() for _ in range(iterations)]
    return {"losses": losses, "seconds": time.perf_counter() - started}


def cases(ks: list[int], seeds: list[int]) -> list[tuple[str, int, int, str, int]]:
    return [
        (model, layer, k, scale, seed)
        for seed in seeds
        for k in ks
        for scale in ("rms", "raw")
        for model, layer in CASES
    ]


def record_curves(ks: list[int], seeds: list[int], source: str) -> None:
    for case in cases(ks, seeds):
        path = CURVES / f"{name_of(*case)}.json"
        if path.is_file() and (source == "mu" or json.loads(path.read_text())["source"] == source):
            continue
        found = curve(*case, source=source, iterations=ITERATIONS)
        losses = found["losses"]
        write_json(path, {"source": source, "n": activations(*case[:2]).shape[1]} | found)
        print(
            path.stem,
            f"{source}: best {min(losses):.6g} at iteration {losses.index(min(losses)) + 1}",
            flush=True,
        )


def timed_fit(A: torch.Tensor, k: int, seed: int, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds and losses after each iteration."""
    seconds: list[float] = []
    losses: list[float] = []
    started = time.perf_counter()

    def note(state: snmf_kernels.IterationState) -> None:
        seconds.append(time.perf_counter() - started)
        losses.append(state.loss)

    snmf_kernels.fit(A, k, seed=seed, callback=note, **options)
    return seconds, losses


def measure(case: tuple[str, int, int, str, int], setting: str, iterations: int = 8) -> dict[str, Any]:
    model, layer, k, scale, seed = case
    A = activations(model, layer)
    scaled = data_of(model, layer, scale)
    loop = PublishedLoop(scaled, k, seed=seed)
    loop.step()
    timed_fit(A, k, seed, SETTINGS[setting])  # warms up
    per_iteration, fits = [], []
    # By turns, so that both sides see the same machine.
    for _ in range(3):
        for _ in range(max(1, iterations // 3)):
            started = time.perf_counter()
            loop.step()
            per_iteration.append(time.perf_counter() - started)
        fits.append(timed_fit(A, k, seed, SETTINGS[setting]))
    seconds = [statistics.median(times) for times in zip(*(s for s, _ in fits), strict=True)]
    return {
        "seconds_per_published_iteration": statistics.median(per_iteration),
        "seconds": seconds,
        "losses": fits[0][1],
        **facts(),
    }


def compare(published: list[float], measured: dict[str, Any]) -> dict[str, float]:
    """Ratios of the published loop's time to that of ``fit`` for its best loss, and of the final losses."""
    best = min(published)
    per_iteration = measured["seconds_per_published_iteration"]
    reached = [t for t, loss in zip(measured["seconds"], measured["losses"], strict=True) if loss <= best]
    seconds = reached[0] if reached else float("nan")
    near = 1.01 * best
    loop_near = next(i + 1 for i, loss in enumerate(published) if loss <= near) * per_iteration
    fit_near = [t for t, loss in zip(measured["seconds"], measured["losses"], strict=True) if loss <= near]
    return {
        "fit_seconds": seconds,
        "published_seconds": per_iteration * len(published),
        "first": (published.index(best) + 1) * per_iteration / seconds,
        "whole": len(published) * per_iteration / seconds,
        "near": loop_near / fit_near[0] if fit_near else float("nan"),
        "final": min(measured["losses"]) / best,
    }


def time_all(ks: list[int], seeds: list[int], again: bool) -> None:
    for case in cases(ks, seeds):
        setting = "default" if case[3] == "rms" else "reconstruct"
        path = TIMES / f"{name_of(*case)}.json"
        if not (CURVES / path.name).is_file():
            print(f"{path.stem}: no curve yet, so nothing to time", flush=True)
            continue
        if path.is_file() and not again:
            continue
        write_json(path, measure(case, setting))
        print(path.stem, flush=True)


def collected() -> list[dict[str, Any]]:
    rows = []
    for path in sorted(TIMES.glob("*.json")):
        if not (CURVES / path.name).is_file():
            continue
        model, layer, k, scale, seed = path.stem.rsplit("-", 4)
        stored, measured = json.loads((CURVES / path.name).read_text()), json.loads(path.read_text())
        row = {"model": model, "layer": int(layer), "k": int(k[1:]), "scale": scale, "seed": int(seed[1:])}
        rows.append(
            row
            | {"source": stored["source"], "curve": stored["losses"]}
            | measured
            | compare(stored["losses"], measured)
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{described(rows)}; 1 % kept. Seconds until "
        f"the best loss of {ITERATIONS:,} published iterations. *First*: against the iteration that first reached it; "
        f"*whole*: against all {ITERATIONS:,}; *near*: both until 1 % above that best. Final: "
        "`fit`'s final loss over that best. Loop: losses by the published "
        "loop itself, or by "
        '`solver="mu"`, the same steps (tests hold them equal to 1e-5 after 50 iterations).',
        "",
    ]
    for setting, scale in SCALE.items():
        for k in sorted({r["k"] for r in rows}):
            group = [r for r in rows if r["scale"] == scale and r["k"] == k]
            if not group:
                continue
            first, whole, near, final = (
                [r[key] for r in group] for key in ("first", "whole", "near", "final")
            )
            lines += [
                f"**{setting}, k = {k}** (target {TARGET[k]}): first, median **{statistics.median(first):.0f}**, "
                f"worst {min(first):.0f}; whole, median **{statistics.median(whole):.0f}**, worst {min(whole):.0f}; "
                f"near, median {statistics.median(near):.0f}, worst {min(near):.0f}; "
                f"final loss, median {statistics.median(final):.3f}, worst {max(final):.3f}; {len(group)} cases",
                "",
                "| model, layer, seed | loop | published s (its best at iteration) | fit s | first | whole | near "
                "| final |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for r in group:
                at = r["curve"].index(min(r["curve"])) + 1
                lines.append(
                    f"| {r['model']}, {r['layer']}, {r['seed']} | {r['source']} | "
                    f"{r['published_seconds']:.0f} ({at}) | "
                    f"{r['fit_seconds']:.2f} | {r['first']:.0f} | {r['whole']:.0f} | "
                    f"{r['near']:.0f} | {r['final']:.3f} |"
                )
            lines.append("")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [
        (s, k)
        for s in SCALE
        for k in sorted({r["k"] for r in rows})
        if any(r["k"] == k and r["scale"] == SCALE[s] for r in rows)
    ]
    fig, axes = plt.subplots(
        len(groups),
        len(CASES),
        figsize=(3 * len(CASES), 2.6 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    for line, (setting, k) in enumerate(groups):
        for ax, (model, layer) in zip(axes[line], CASES, strict=True):
            chosen = [
                r
                for r in rows
                if (r["model"], r["layer"], r["k"], r["scale"]) == (model, layer, k, SCALE[setting])
            ]
            for r in chosen:
                per = r["seconds_per_published_iteration"]
                best = min(r["curve"])
                ax.plot(
                    [per * (i + 1) for i in range(len(r["curve"]))],
                    [v / best for v in r["curve"]],
                    color="tab:gray",
                    lw=1,
                )
                ax.plot(
                    r["seconds"], [v / best for v in r["losses"]], color="tab:blue", marker=".", ms=3, lw=1
                )
            if not chosen:
                ax.set_axis_off()
                continue
            ax.axhline(1, color="tab:red", lw=0.6)
            ax.set_xscale("log")
            ax.set_ylim(min([0.97, *(r["final"] * 0.98 for r in chosen)]), 1.25)
            ax.set_title(f"{model.split('-')[0]} {layer}, k = {k}, {setting}", fontsize=8)
            ax.tick_params(labelsize=7)
    fig.supxlabel("seconds")
    fig.supylabel("loss / best loss of the published loop")
    fig.suptitle("grey: published loop · blue: fit · one line a seed")
    fig.savefig(path, dpi=90)


def quick() -> None:
    model, layer = CASES[0]
    for setting, scale in SCALE.items():
        case = (model, layer, 100, scale, 0)
        measured = measure(case, setting)
        published = curve(*case, source="published", iterations=QUICK_ITERATIONS)
        found = compare(published["losses"], measured)
        print(
            f"{model} layer {layer}, k = 100, {setting}: {QUICK_ITERATIONS} published iterations "
            f"{found['published_seconds']:.1f} s at the speed of the first, really {published['seconds']:.1f} s; "
            f"fit has their best loss after {found['fit_seconds']:.2f} s: {found['whole']:.0f} times sooner "
            f"({found['first']:.0f} against the iteration that first reached it); "
            f"final loss {found['final']:.3f} of it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["quick", "curves", "time", "report"])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--source", choices=["published", "mu"], default="published")
    parser.add_argument("--again", action="store_true", help="time cases anew that have been timed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "quick":
        return quick()
    if arguments.what == "curves":
        return record_curves(arguments.k, arguments.seeds, arguments.source)
    if arguments.what == "time":
        time_all(arguments.k, arguments.seeds, arguments.again)
    rows = collected()
    text = table(rows)
    (HERE / "table.md").write_text(text)
    figure(rows, HERE / "figure.png")
    print(text)
    return None


if __name__ == "__main__":
    main()
