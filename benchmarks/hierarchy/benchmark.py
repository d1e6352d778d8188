"""Joint fine-tuning of a hierarchy: `snmf_interp.joint.finetune` against Adam over dense residuals.

Both begin with the same recursive fit of the bundled model's activations, in the same units, and minimise the same
loss: of the coarsest level alone ("top", the paper's) or of all levels ("all"). The baseline is plain: automatic
differentiation of the dense residual, coefficients clamped at zero and features masked to their supports after each
step, products in their cheapest order, the best learning rate of a grid, rows of effective coefficients at unit root
mean square (which suits steps of one size).

    python benchmarks/hierarchy/benchmark.py quick     one case, small: a minute
    python benchmarks/hierarchy/benchmark.py measure   all cases, into results.json
    python benchmarks/hierarchy/benchmark.py report    table.md from results.json
    python benchmarks/hierarchy/benchmark.py options   what the options of fit_hierarchy do, printed
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import described, facts  # noqa: E402  # after the path
from real_activations import activations, store  # noqa: E402

import snmf_kernels  # noqa: E402
from snmf_interp import JointOptions, files, fit_hierarchy  # noqa: E402
from snmf_interp.concepts import average_precision, text_scores  # noqa: E402
from snmf_interp.joint import JointIteration, Levels, Tokens, finetune  # noqa: E402
from snmf_kernels import ops  # noqa: E402

CASES = [("smollm2-135m", layer, "top") for layer in (10, 29, 0)] + [("smollm2-135m", 10, "all")]
SIZES = [400, 200, 100, 50]
RATES = [3e-2, 1e-1, 3e-1]
ITERATIONS = 80
# The share of Adam's gain that counts as near its best loss.
NEAR = 0.95


class AdamLoop:
    """Adam over all factors of a hierarchy, ``Σ_l ½‖A − Z_l Y_l ⋯ Y_0‖²`` of the counted levels, A in scaled units."""

    def __init__(
        self, A: Tensor, Z: Sequence[Tensor], Y: Sequence[Tensor], counted: Sequence[int], rate: float
    ) -> None:
        self.A, self.counted = A, counted
        self.Z = {level: Z[level].clone().requires_grad_() for level in counted}
        self.masks = {level: (Z[level] != 0).to(A.dtype) for level in counted}
        self.Y = [y.clone().requires_grad_() for y in Y]
        self.adam = torch.optim.Adam([*self.Z.values(), *self.Y], lr=rate)

    def step(self) -> float:
        """One iteration; the loss (without the ½) before it."""
        self.adam.zero_grad(set_to_none=True)
        C, loss = self.Y[0], torch.zeros((), dtype=self.A.dtype)
        for level in range(len(self.Y)):
            C = self.Y[level] @ C if level else C
            if level in self.counted:
                loss = loss + 0.5 * (self.A - self.Z[level] @ C).square().sum()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            for level, z in self.Z.items():
                z.mul_(self.masks[level])
            for y in self.Y:
                y.clamp_(min=0)
        return 2 * float(loss.detach())


def start_of(A: Tensor, sizes: Sequence[int], keep: float = 0.01) -> tuple[Tokens, Levels, list[int]]:
    """The recursive fit, as both sides begin with it: features and coefficients so that rows of C_l have unit RMS."""
    hierarchy = fit_hierarchy(A, sizes, keep=keep, joint=None)
    assert hierarchy.neuron_scale is not None
    features, coefficients, below = [], [], torch.ones(())
    for number, level in enumerate(hierarchy.levels):
        scale = hierarchy.coefficients(number).square().mean(1).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        features.append(level.Z / hierarchy.neuron_scale[:, None] * scale)
        coefficients.append((level.Y * below if number else level.Y) / scale[:, None])
        below = scale
    count = max(1, int((features[0] != 0).sum(0).max()))
    levels = Levels(
        tuple(ops.winner_take_all(Z.double(), count) for Z in features),
        (coefficients[0].contiguous(), *(Y.double() for Y in coefficients[1:])),
    )
    return Tokens(A, hierarchy.neuron_scale, torch.float32), levels, [count] * len(sizes)


@dataclass
class Curve:
    """Losses after each iteration, and seconds until then: on the clock, and of all cores together."""

    losses: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    def first(self, loss: float, seconds: str) -> float:
        """When ``loss`` is reached; NaN if never."""
        pairs = zip(getattr(self, seconds), self.losses, strict=True)
        return next((t for t, value in pairs if value <= loss), float("nan"))


def adam_curve(scaled: Tensor, start: Levels, counted: Sequence[int], rate: float, iterations: int) -> Curve:
    """Of the loop; the median iteration counts for all, so that a busy machine's outliers do not."""
    Z = [z.to_dense().float() for z in start.Z]
    loop = AdamLoop(scaled, Z, [y.float() for y in start.Y], counted, rate)
    losses, clock, cores = [], [], []
    for _ in range(iterations):
        began = time.perf_counter(), time.process_time()
        losses.append(loop.step())
        clock.append(time.perf_counter() - began[0])
        cores.append(time.process_time() - began[1])
    # The loss that an iteration gives is that after the iterations before it.
    each = statistics.median(clock), statistics.median(cores)
    return Curve(losses, *([one * i for i in range(iterations)] for one in each))


def joint_curve(tokens: Tokens, start: Levels, counts: Sequence[int], which: str) -> Curve:
    """Of :func:`snmf_interp.joint.finetune`, from the call on."""
    curve = Curve()

    def note(state: JointIteration) -> None:
        curve.losses.append(state.losses[-1])
        curve.clock.append(time.perf_counter() - began[0])
        curve.cores.append(time.process_time() - began[1])

    began = time.perf_counter(), time.process_time()
    finetune(tokens, start, counts, JointOptions(which), note)
    return curve


def compare(adam: Curve, joint: Curve) -> dict[str, float]:
    """How much sooner the joint fine-tuning has Adam's best loss, and ``NEAR`` of what Adam gains, than Adam has."""
    best = min(adam.losses)
    near = adam.losses[0] - NEAR * (adam.losses[0] - best)
    return {
        "adam_seconds": adam.first(best, "clock"),
        "joint_seconds": joint.first(best, "clock"),
        "best": adam.first(best, "clock") / joint.first(best, "clock"),
        "best_cores": adam.first(best, "cores") / joint.first(best, "cores"),
        "near": adam.first(near, "clock") / joint.first(near, "clock"),
        "final": min(joint.losses) / best,
    }


def measure(
    model: str,
    layer: int,
    which: str,
    sizes: Sequence[int],
    rates: Sequence[float],
    iterations: int,
    repeats: int,
) -> dict[str, Any]:
    A = activations(model, layer)
    tokens, start, counts = start_of(A, sizes)
    assert tokens.scale is not None
    scaled = (A / tokens.scale.float()[:, None]).contiguous()
    counted = JointOptions(which).counted(len(sizes))
    joint = [joint_curve(tokens, start, counts, which) for _ in range(repeats)]
    by_rate = {rate: adam_curve(scaled, start, counted, rate, iterations) for rate in rates}
    joint += [joint_curve(tokens, start, counts, which) for _ in range(repeats)]
    rate = min(by_rate, key=lambda rate: min(by_rate[rate].losses))
    adam = by_rate[rate]
    middle = Curve(
        joint[0].losses,
        *(
            [statistics.median(times) for times in zip(*(getattr(c, kind) for c in joint), strict=True)]
            for kind in ("clock", "cores")
        ),
    )
    norm = tokens.squared_norm * len(counted)
    return (
        {
            "model": model,
            "layer": layer,
            "levels": which,
            "sizes": list(sizes),
            "tokens": A.shape[1],
            "rate": rate,
            "best_by_rate": {str(rate): min(curve.losses) / norm for rate, curve in by_rate.items()},
            "adam": relative(adam, norm),
            "joint": relative(middle, norm),
        }
        | compare(adam, middle)
        | facts()
    )


def relative(curve: Curve, norm: float) -> dict[str, list[float]]:
    return {"losses": [loss / norm for loss in curve.losses], "clock": curve.clock, "cores": curve.cores}


def table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    lines = [
        f"Levels of {', '.join(map(str, first['sizes']))} features, 1 % of neurons kept. {described(rows)}. "
        "Losses relative to ‖A‖² and the number of levels that count. *Times sooner*: until Adam's best loss of "
        f"{len(first['adam']['losses'])} iterations at its best rate, by the clock and by the time of all cores, which "
        f"a busy machine does not change; *near*: until {NEAR:.0%} of what Adam gains.",
        "",
        "| layer | levels that count | Adam: rate, best loss, s | joint: final loss, s to Adam's best | times sooner "
        "| by time of all cores | near |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']}, {row['layer']} | {row['levels']} | {row['rate']:g}, {min(row['adam']['losses']):.4f}, "
        f"{row['adam_seconds']:.1f} | {min(row['joint']['losses']):.4f}, {row['joint_seconds']:.2f} | "
        f"**{row['best']:.0f}** | {row['best_cores']:.0f} | {row['near']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def compare_options(model: str, layer: int) -> None:
    """Each level's relative loss, and the mean over concepts of the best feature's average precision."""
    A, tokens = activations(model, layer), store(model)
    labels, text_of = tokens.corpus.labels, tokens.samples(layer)

    def precision(Y: Tensor) -> str:
        found = average_precision(text_scores(Y.float(), text_of, len(labels)), labels)[1]
        return f"{float(found.amax(0).mean()):.3f}"

    fits = [snmf_kernels.fit(A, k) for k in SIZES]
    print(f"{model}, layer {layer}; {SIZES}; four fits:", *(precision(fit.Y) for fit in fits), flush=True)
    paper = {"feature_norm": "energy", "link_penalty": 0.0}
    top = {"joint": JointOptions("top")}
    for options in (
        {},
        {"joint": None},
        top,
        {"link_penalty": 0.0},
        {"feature_norm": "energy"},
        paper,
        paper | top,
    ):
        found = fit_hierarchy(A, SIZES, base=fits[0], **options)
        losses = (f"{level.relative_loss:.3f}" for level in found.levels)
        print(
            options,
            "losses",
            *losses,
            "precision",
            *map(precision, map(found.coefficients, range(4))),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["quick", "measure", "report", "options"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    if arguments.what == "quick":
        print(table([measure("smollm2-135m", 10, "top", [100, 50, 25], [3e-3, 1e-2], 40, 1)]))
        return
    if arguments.what == "options":
        for model, layer in (("smollm2-135m", 10), ("gemma-3-270m", 8)):
            compare_options(model, layer)
        return
    if arguments.what == "measure":
        done = {(row["model"], row["layer"], row["levels"]) for row in rows}
        for case in itertools.filterfalse(done.__contains__, CASES):
            rows.append(measure(*case, SIZES, RATES, ITERATIONS, 2))
            files.write_json(path, {"rows": rows})
            print(table(rows[-1:]), flush=True)
    (HERE / "table.md").write_text(table(rows))


if __name__ == "__main__":
    main()
