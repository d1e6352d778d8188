"""What each default of ``fit`` is worth: features as detectors of held-out concepts, and the loss.

    python benchmarks/defaults/experiment.py run       # fills results.json; a run that was cut short goes on
    python benchmarks/defaults/experiment.py report    # table.md and figure.png from it

For each of six layers and five seeds the 864 labelled texts are split in two halves. A setting is fitted on the tokens
of one half, each of 72 concepts is matched to its best feature there, and scored on the other half
(``snmf_interp.evaluation``). A seed decides the split and the start; all settings share them.

How long ``fit`` may explore from clusters of tokens before it chooses columns anew is decided at k = 400: at k = 100 an
iteration soon gains too little to go on, but for Gemma's layer 0 and neurons as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import commit
from real_activations import CASES, activations, store

import snmf_kernels
import snmf_kernels._loop
from snmf_interp.evaluation import best_neurons, evaluate_features, permuted_labels, split_texts
from snmf_interp.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
K, SEEDS = 100, range(5)
PAPER = {"solver": "mu", "max_iter": 1000, "tol": 0.0, "patience": 1000}
# Constants of the iterations (snmf_kernels._loop) that are no options.
CONSTANTS: dict[str, dict[str, Any]] = {
    "EXPLORE_GAIN=1e-3": {"EXPLORE_GAIN": 1e-3},
    "EXPLORE_GAIN=5e-3": {"EXPLORE_GAIN": 5e-3},
    "LATE_GAIN=0.01": {"LATE_GAIN": 0.01},
    "LATE_GAIN=0.05": {"LATE_GAIN": 0.05},
    "FROZEN=1": {"FROZEN": 1},
    "FROZEN=4": {"FROZEN": 4},
    "COLUMN_SWEEPS=3": {"COLUMN_SWEEPS": 3},
}
# The first row of each group is the default; the others differ from it in what they name.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "refit=False": {"refit": False},
    "refit=True": {"refit": True},
    "token_weights=None": {"token_weights": None},
    "neuron_scale=None": {"neuron_scale": None},
    "refit=True, neuron_scale=None": {"refit": True, "neuron_scale": None},
    "init='random'": {"init": "random"},
    "init='svd'": {"init": "svd"},
    "init='random', exploring at most 6 times": {"init": "random"},
    "init='svd', exploring at most 6 times": {"init": "svd"},
    "sweeps=3": {"sweeps": 3},
    "sweeps=30": {"sweeps": 30},
    "tol=1e-2": {"tol": 1e-2},
    "tol=1e-4": {"tol": 1e-4},
    **{name: {} for name in CONSTANTS},
    "patience=8": {"patience": 8},
    "paper, 1000 iterations": PAPER,
    "paper, neuron_scale='rms'": PAPER | {"neuron_scale": "rms"},
    "paper, neuron_scale='rms', init='kmeans'": PAPER | {"neuron_scale": "rms", "init": "kmeans"},
}
CONTROLS = ("best single neurons", "permuted labels")
EXPLORING_K = 400
EXPLORING = {f"exploring at most {most} times": most for most in (12, 8, 6, 4)}
# What a setting changes in the iterations (snmf_kernels._loop) beside its options.
PATCHES: dict[str, dict[str, Any]] = CONSTANTS | {
    name: {"EXPLORE_MOST": dict.fromkeys(snmf_kernels._loop.EXPLORE_MOST, EXPLORING.get(name, 6))}
    for name in (*SETTINGS, *EXPLORING)
    if "exploring at most" in name
}


def measure(model: str, layer: int, seed: int, name: str) -> dict[str, Any]:
    A, text_of = activations(model, layer), store(model).samples(layer)
    labels = store(model).corpus.labels
    train = split_texts(labels, seed=seed)
    row: dict[str, Any] = {"model": model, "layer": layer, "seed": seed, "setting": name, "commit": commit()}
    if name == "best single neurons":
        found = best_neurons(A.T, text_of, labels, train)
    else:
        started = time.perf_counter()
        k = EXPLORING_K if name in EXPLORING else K
        with mock.patch.dict(vars(snmf_kernels._loop), PATCHES.get(name, {})):
            factors = snmf_kernels.fit(A[:, train[text_of]], k, seed=seed, **SETTINGS.get(name, {}))
        row["seconds"] = time.perf_counter() - started
        score = permuted_labels if name == "permuted labels" else evaluate_features
        found = score(factors, A.T, text_of, labels, train)
        scale = 1.0 if factors.neuron_scale is None else factors.neuron_scale[:, None]
        weights = 1.0 if factors.token_weights is None else factors.token_weights
        energy = float(((A[:, train[text_of]] / scale).double().square().sum(0) * weights).sum())
        row |= {
            "k": k,
            "loss": min(factors.loss_history) / energy,
            "relative_error": factors.relative_error,
            "n_iter": factors.n_iter,
            "dead": len(factors.dead_features),
            "active": float((factors.Y > 0).float().mean()),
        }
    return row | {
        "auroc": found.mean_auroc,
        "probe": found.mean_probe_accuracy,
        "above_95": found.share_above(0.95),
    }


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def run(threads: int) -> None:
    torch.set_num_threads(threads)
    rows = read()
    done = {(row["model"], row["layer"], row["seed"], row["setting"]) for row in rows}
    versions = {"snmf_kernels": snmf_kernels.__version__, "torch": torch.__version__}
    # The slow settings last, seed by seed, so that an early stop leaves whole seeds.
    paper = [name for name in SETTINGS if name.startswith("paper")]
    quick = [name for name in (*SETTINGS, *CONTROLS) if name not in paper]
    for names in (quick, list(EXPLORING), *([name] for name in reversed(paper))):
        for seed in SEEDS:
            for model, layer in CASES:
                for name in names:
                    if (model, layer, seed, name) in done:
                        continue
                    rows.append(measure(model, layer, seed, name))
                    write_json(RESULTS, {"versions": versions, "k": K, "rows": rows})
                    print(json.dumps(rows[-1]), flush=True)


def values_of(rows: list[dict[str, Any]], name: str, key: str) -> list[list[float]]:
    """Of each case the values of all seeds."""
    chosen = [row for row in rows if row["setting"] == name and key in row]
    return [[r[key] for r in chosen if (r["model"], r["layer"]) == case] for case in CASES]


def means(rows: list[dict[str, Any]], name: str, key: str) -> list[float]:
    """Of each case the mean over seeds."""
    return [statistics.mean(values) if values else float("nan") for values in values_of(rows, name, key)]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"1 % kept, fitted on half of the texts and scored on the other, mean over {len({r['seed'] for r in rows})} "
        "seeds. Columns by layer: mean ± standard deviation over seeds.",
    ]
    measured = {row["setting"] for row in rows}
    for k, every in ((K, (*SETTINGS, *CONTROLS)), (EXPLORING_K, tuple(EXPLORING))):
        names = tuple(name for name in every if name in measured)
        lines += ["", f"k = {k}, held-out AUROC by layer, and means over layers:", "", *lines_of(rows, names)]
        lines += ["", f"k = {k}, balanced accuracy of the one-sparse probe by layer:", ""]
        lines += by_layer(rows, names, "probe")
    lines += [
        "",
        "The loss is that of the (scaled) data that was fitted, so it compares settings of one neuron scale only; "
        "seconds are for orientation (shared machine, `--threads`).",
    ]
    return "\n".join(lines) + "\n"


def lines_of(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[str]:
    head, rule, *lines = by_layer(rows, names, "auroc")
    head += " mean AUROC | mean probe | share > 0.95 | loss / ‖A‖² | seconds |"
    for i, name in enumerate(names):
        for key, digits in (("auroc", 4), ("probe", 4), ("above_95", 3), ("loss", 4), ("seconds", 2)):
            mean = statistics.mean(means(rows, name, key))
            lines[i] += "  |" if mean != mean else f" {mean:.{digits}f} |"
    return [head, rule + "---|" * 5, *lines]


def by_layer(rows: list[dict[str, Any]], names: tuple[str, ...], key: str) -> list[str]:
    short = {"smollm2-135m": "SmolLM2", "gemma-3-270m": "Gemma"}
    heads = [f"{short[model]} {layer}" for model, layer in CASES]
    lines = [f"| setting | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in names:
        cells = [
            f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else float('nan'):.3f}"
            for values in values_of(rows, name, key)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    names = [n for n in (*SETTINGS, *CONTROLS) if any(r["setting"] == n for r in rows)]
    for ax, key, title in (
        (axes[0], "auroc", "held-out AUROC"),
        (axes[1], "probe", "one-sparse probe, balanced accuracy"),
    ):
        for place, name in enumerate(names):
            for values in values_of(rows, name, key):
                ax.plot(values, [place] * len(values), ".", color="0.7", markersize=4, zorder=1)
            layers = means(rows, name, key)
            ax.plot(layers, [place] * len(layers), "o", color="tab:blue", markersize=5, zorder=2)
            red = {"color": "tab:red", "markersize": 18, "markeredgewidth": 2.5, "zorder": 3}
            ax.plot(statistics.mean(layers), place, "|", **red)
        ax.set_title(title)
        ax.grid(axis="x", alpha=0.4)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    fig.suptitle("grey: one seed and layer · blue: a layer's mean · red: mean over six layers")
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.threads)
    rows = read()
    (HERE / "table.md").write_text(table(rows))
    figure(rows, HERE / "figure.png")
    print(table(rows))


if __name__ == "__main__":
    main()
