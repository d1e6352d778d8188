"""What a few loud tokens and neurons without content do to a fit on real activations.

    python benchmarks/outliers/experiment.py run      # results.json and table.md; 20 minutes on two cores

*Tokens*: 1 % of the tokens of a layer are made 10, 50 or 200 times as large as the mean one, in four ways. Table: by
how much the squared error on the other tokens exceeds that of a fit without them, each neuron divided by its root mean
square on these, with clipped weights (the default) and with equal ones; mean over starts, and the largest.

*Neurons*: 200 neurons are added. Table: how many of 100 features have more than half of their energy in them, by start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import facts
from real_activations import activations

import snmf_kernels
from snmf_interp.files import write_json

HERE = Path(__file__).parent
CASES = (("smollm2-135m", 10), ("gemma-3-270m", 8))
K, STARTS = 100, range(4)
WEIGHTS = {"clipped": "clip", "equal": None}


def loud(A: Tensor, tokens: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """A with some tokens made loud."""
    d, norm = len(A), A.norm(dim=0).mean()
    for times in (10, 50, 200):
        for kind in ("themselves", "one direction", "directions", "three neurons"):
            changed = A.clone()
            if kind == "themselves":
                changed[:, tokens] *= times
            else:
                columns = len(tokens) if kind == "directions" else 1
                made = torch.randn(d, columns, generator=generator)
                if kind == "three neurons":
                    made[torch.randperm(d, generator=generator)[3:]] = 0
                changed[:, tokens] = times * norm * made / made.norm(dim=0)
            yield f"{kind}, {times} times", changed


def junk(n: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Neurons that say next to nothing."""
    yield "amplitude 1e-6", 1e-6 * torch.randn(200, n, generator=generator)
    yield "amplitude 1e-6, one sign", 1e-6 * torch.rand(200, n, generator=generator)
    for count in (1, 5):
        neurons = torch.zeros(200, n)
        for neuron in neurons:
            neuron[torch.randint(n, (count,), generator=generator)] = 1.0
        yield f"fire on {count} token{'s'[: count > 1]}", neurons


def run() -> list[dict[str, Any]]:
    rows = []
    for model, layer in CASES:
        A = activations(model, layer).contiguous()
        generator = torch.Generator().manual_seed(0)
        n = A.shape[1]
        bad = torch.randperm(n, generator=generator)[: n // 100]
        others = torch.ones(n, dtype=torch.bool).index_fill(0, bad, False)
        scale = A[:, others].square().mean(1).sqrt()[:, None]

        def error(
            B: Tensor, start: int, weights: str | None, others: Tensor = others, scale: Tensor = scale
        ) -> float:
            result = snmf_kernels.fit(B, K, seed=start, token_weights=weights)
            left = ((B - result.Z @ result.Y)[:, others] / scale).square().sum()
            return float(left / (B[:, others] / scale).square().sum())

        base = [error(A, start, "clip") for start in STARTS]
        for kind, B in loud(A, bad, generator):
            for name, weights in WEIGHTS.items():
                excess = [error(B, start, weights) / base[start] - 1 for start in STARTS]
                rows.append({"model": model, "layer": layer, "loud": kind, "weights": name, "excess": excess})
                print(json.dumps(rows[-1]), flush=True)
        for kind, neurons in junk(n, generator):
            owned = []
            for start in STARTS:
                result = snmf_kernels.fit(torch.cat([A, neurons]), K, seed=start)
                energy = (result.Z / result.neuron_scale[:, None]).square()
                owned.append(int((energy[len(A) :].sum(0) > energy.sum(0) / 2).sum()))
            rows.append({"model": model, "layer": layer, "junk": kind, "owned": owned})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = [f"{model} {layer}" for model, layer in CASES]
    lines = [f"k = {K}, {len(STARTS)} starts. Excess error on the other tokens, mean (largest):", ""]
    columns = [f"{head}, {name}" for head in heads for name in WEIGHTS]
    lines += [f"| loud tokens | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind in dict.fromkeys(row["loud"] for row in rows if "loud" in row):
        cells = [
            f"{statistics.mean(row['excess']):+.1%} ({max(row['excess']):+.1%})"
            for row in rows
            if row.get("loud") == kind
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", f"Features of {K} that 200 added neurons own:", ""]
    lines += [f"| neurons | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for kind in dict.fromkeys(row["junk"] for row in rows if "junk" in row):
        cells = [", ".join(map(str, row["owned"])) for row in rows if row.get("junk") == kind]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    if parser.parse_args().what == "run":
        warnings.simplefilter("ignore", snmf_kernels.OutlierWarning)
        write_json(HERE / "results.json", {"machine": facts(), "rows": run()})
    rows = json.loads((HERE / "results.json").read_text())["rows"]
    (HERE / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
