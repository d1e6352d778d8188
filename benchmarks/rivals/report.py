"""SNMF beside other methods on both bundled models: one table from the reports of ``snmf eval``.

The commands, fixed before they were run (layers at a third, two thirds and nine tenths of the depth; eight of the 59
concepts that have words, drawn by the seed; seed 1, since seed 0 had served to try things out):

    snmf eval smollm2-135m --layers 10,20,27 --against diffmeans,sae,neuron,random,permuted --one-sign --seed 1 \\
        --out benchmarks/data/eval-smollm2-135m
    snmf eval gemma-3-270m --layers 6,12,16 --against diffmeans,sae,neuron,random,permuted --one-sign --seed 1 \\
        --report-samples 4 --concepts cities,metals,sport_ball_games,source_code,school \\
        --out benchmarks/data/eval-gemma-3-270m

On Gemma an attempt took 80 s, and there was time for the first five of the same eight concepts.

At which scales, sizes and options SNMF does better is asked of the next token alone, which takes 8 s an attempt; every
setting that was tried is in the table:

    snmf eval smollm2-135m --next-token --layers 10,20,27 --concepts 16 --one-sign --seed 1 \\
        --against diffmeans,sae,neuron,random,snmf-raw,snmf-sparse,snmf-norefit \\
        --out benchmarks/data/options-smollm2-135m-k100
    snmf eval smollm2-135m --next-token --layers 10,20,27 --concepts 16 --one-sign --seed 1 --k 400 \\
        --against sae,snmf-raw,snmf-norefit,random --out benchmarks/data/options-smollm2-135m-k400

    python benchmarks/rivals/report.py collect      # takes reports and figures of these runs into this folder
    python benchmarks/rivals/report.py table        # table.md from them
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
MODELS = ("smollm2-135m", "gemma-3-270m")
OPTIONS = ("smollm2-135m-k100", "smollm2-135m-k400")
# The divergence at which settings are compared.
TARGET = 0.25


def collect() -> None:
    for run, name in (
        *((f"eval-{model}", model) for model in MODELS),
        *((f"options-{setting}",) * 2 for setting in OPTIONS),
    ):
        folder = DATA / run / "eval"
        if not folder.is_dir():  # measured before, and kept here
            continue
        shutil.copy(folder / "report.json", HERE / f"{name}.json")
        shutil.copy(folder / "figure.png", HERE / f"{name}.png")


def interval(value: dict[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return ""
    shown = f"{value['value']:.2f}"
    return shown if value["low"] is None else f"{shown} ({value['low']:.2f} to {value['high']:.2f})"


def immediate(rows: list[dict[str, Any]]) -> list[str]:
    """A method a line, a divergence a column."""
    targets = sorted({row["target"] for row in rows})
    at = {(row["method"], row["target"]): row for row in rows}
    lines = [
        "",
        "**Next token, all layers**, by divergence aimed at",
        "",
        f"| method | {' | '.join(f'{target:g}' for target in targets)} | other concepts |",
        f"|{'---|' * (len(targets) + 2)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        shifts = [interval(at[method, target]["shift"]) for target in targets]
        lines.append(f"| {method} | {' | '.join(shifts)} | {interval(at[method, targets[-1]]['others'])} |")
    return lines


def options() -> list[str]:
    """Detection and next token of every setting, layer by layer."""
    reports = {name: json.loads((HERE / f"options-{name}.json").read_text()) for name in OPTIONS}
    first = next(iter(reports.values()))
    layers = list(first["detection"])
    lines = [
        "",
        f"## Scales, sizes and options, {first['model']}",
        "",
        f"Steered to: {', '.join(first['concepts'])}. Next token: the rise of their words at {TARGET:g} nats.",
        "",
        f"| k | method | {' | '.join(f'AUROC {layer}' for layer in layers)} | "
        f"{' | '.join(f'next token {layer}' for layer in layers)} | all layers | ahead |",
        f"|{'---|' * (2 * len(layers) + 4)}",
    ]
    for report in reports.values():
        for method in dict.fromkeys(row["method"] for row in report["immediate"]["all"]):
            detected = [
                row["auroc"]
                for layer in layers
                for row in report["detection"][layer]
                if row["method"] == method
            ]
            moved = [
                row
                for rows in (
                    *(report["immediate"]["layers"][layer] for layer in layers),
                    report["immediate"]["all"],
                )
                for row in rows
                if row["method"] == method and row["target"] == TARGET
            ]
            cells = [
                str(report["plan"]["k"]),
                method,
                *map(interval, detected),
                *(interval(row["shift"]) for row in moved),
                interval(moved[-1]["lead"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table() -> str:
    lines = [
        "# SNMF beside other methods",
        "",
        "Means over concepts with 95 % intervals. Detection: held-out AUROC of the direction that detects a concept "
        "best on the training half. Steering: score (0 to 2, harmonic mean of concept and fluency) above that of "
        "unsteered text, on prompts that nothing was chosen on; *other* is the control, the same texts as texts on "
        "other concepts. "
        "*Ahead*: SNMF minus the method, paired by concept. Next token: by how much the logits of the concept's words "
        "rise above those of words that were as likely, under the same directions, on the same prompts.",
    ]
    for model in MODELS:
        report = json.loads((HERE / f"{model}.json").read_text())
        steering = report["steering"]["words"]
        lines += ["", f"## {model}", "", f"Steered to: {', '.join(report['concepts'])}."]
        for layer, rows in [*report["detection"].items(), ("all", [])]:
            steered = {
                row["method"]: row
                for row in (steering["all"] if layer == "all" else steering["layers"][layer])
            }
            detected = {row["method"]: row for row in rows}
            title = "All layers" if layer == "all" else f"Layer {layer}"
            pairs = next(iter(steered.values()))["n"]
            lines += [
                "",
                f"**{title}**, {pairs} pairs of concept and layer steered",
                "",
                "| method | AUROC | hard negatives | ahead | steering | other | concept, fluency | KL | ahead |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for method in dict.fromkeys([*detected, *steered]):
                found, moved = detected.get(method), steered.get(method)
                cells = [
                    method,
                    *(interval(found[name]) if found else "" for name in ("auroc", "hard_auroc", "lead")),
                    interval(moved["gain"]) if moved else "",
                    interval(moved["permuted"]) if moved else "",
                    f"{moved['concept']:.2f}, {moved['fluency']:.2f}" if moved else "",
                    f"{moved['kl']:.2f}" if moved else "",
                    interval(moved["lead"]) if moved else "",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines += immediate(report["immediate"]["all"])
    lines += options()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["collect", "table"])
    if parser.parse_args().what == "collect":
        collect()
        return
    (HERE / "table.md").write_text(table(), encoding="utf-8")
    sys.stdout.write(table())


if __name__ == "__main__":
    main()
