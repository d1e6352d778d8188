"""What the logit lens and measured effects say of features, layer by layer, on both bundled models.

    python benchmarks/effects/experiment.py     # results.json and table.md; half an hour on one core

For each layer the default fit of the bundled corpus, k = 100, and 30 of its features, drawn by a seed. Each is added at
0.25 nats behind eight prompts, and behind eight others: what is measured must be found again there. The logit lens is
compared with both halves together. *Own concept*: of the drawn features whose concept has words (a label of the corpus
that they rank better than chance, in the list behind ``snmf eval``), for how many one of the ten words listed is among
the concept's words, by the measured effects, by the lens, and by chance: the same lists with another such feature's
concept.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import described, facts
from real_activations import FOLDER

import snmf_kernels
from snmf_interp import Feature, describe, load_model
from snmf_interp.effects import KL, PROMPTS, Effects, lens_logits, measure_effects, rank_correlation
from snmf_interp.files import write_json
from snmf_interp.rivals import bundled_words, collect_run

HERE = Path(__file__).parent
LAYERS = {"smollm2-135m": (2, 5, 8, 11, 14, 17, 20, 23, 27), "gemma-3-270m": (3, 6, 9, 12, 14, 16)}
K, DRAWN, LISTED, TOP = 100, 30, 10, 100


def excess(effects: Effects) -> torch.Tensor:
    return torch.stack([effects.excess(index) for index in effects.index.tolist()])


def own_words(
    features: list[Feature], lists: list[list[str]], words: dict[str, set[str]]
) -> tuple[int, int, float | None]:
    """Features with a concept that has words; how many list one of them; and by chance, None of a single concept."""
    known = [i for i, feature in enumerate(features) if feature.concept in words]
    said = [{word.strip().casefold() for word in one} for one in lists]
    hits = sum(bool(said[i] & words[str(features[i].concept)]) for i in known)
    pairs = [
        bool(said[i] & words[str(features[j].concept)])
        for i in known
        for j in known
        if features[i].concept != features[j].concept
    ]
    return len(known), hits, len(known) * sum(pairs) / len(pairs) if pairs else None


def measure(model_name: str, layers: tuple[int, ...]) -> list[dict[str, Any]]:
    model = load_model(model_name)
    run = collect_run(FOLDER / f"effects-{model_name}", model, ",".join(map(str, layers)))
    store = run.store()
    words = {name: {word.casefold() for word in own} for name, own in bundled_words().items()}
    rows = []
    for layer in layers:
        factors = snmf_kernels.fit(store.layer(layer).float().T, K, seed=0)
        drawn = torch.randperm(K, generator=torch.Generator().manual_seed(0))[:DRAWN].sort().values.tolist()
        features = describe(factors, store, model, layer, indices=drawn)
        started = time.perf_counter()
        whole = measure_effects(model, layer, factors, drawn)
        seconds = time.perf_counter() - started
        halves = [measure_effects(model, layer, factors, drawn, prompts=PROMPTS[at::2]) for at in (0, 1)]
        above = [excess(half) for half in halves]
        again = [
            len(set(first.topk(LISTED).indices.tolist()) & set(second.topk(TOP).indices.tolist()))
            for first, second in zip(*above, strict=True)
        ]
        measured = [[word for word, _ in whole.words(model, index, LISTED).raised] for index in drawn]
        lens = [[word for word, _ in feature.distinctive] for feature in features]
        logits = lens_logits(model, layer, torch.as_tensor(factors.Z)).double()
        best = ((logits - logits.mean(0)) / logits.std(0).clamp_min(1e-6))[drawn].topk(LISTED).indices
        raised = whole.change.gather(1, best) > 0
        known, hits, chance = own_words(features, measured, words)
        _, lens_hits, lens_chance = own_words(features, lens, words)
        rows.append(
            {
                "model": model_name,
                "layer": layer,
                "reached": float(whole.reached.float().mean()),
                "lens": whole.agreement,
                "lens_raised": float(raised.float().mean()),
                "halves": float(whole.repeatability.median()),
                "halves_excess": float(rank_correlation(*above).median()),
                "again": sum(again) / len(again),
                "known": known,
                "hits": hits,
                "hits_by_chance": chance,
                "lens_hits": lens_hits,
                "lens_hits_by_chance": lens_chance,
                "seconds": round(seconds, 1),
            }
            | facts()
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Default fits, k = {K}, of the bundled corpus; {DRAWN} features a layer, at {KL:g} nats. {described(rows)}.",
        "",
        "Rank correlations are medians over features. *Again*: of the ten words listed by eight prompts how many are "
        f"among the {TOP} first by eight others (of a vocabulary of 49,152 and 262,144: by chance 0.02 and 0.004).",
        "",
        "| model, layer | lens and effects, rank correlation | of the lens's ten words, raised | effects of two halves "
        "of the prompts, rank correlation | the same above random groups | ten words found again | own concept: "
        "effects (chance) | own concept: lens (chance) | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row['model']}, {row['layer']}",
            f"{row['lens']:.2f}",
            f"{row['lens_raised']:.0%}",
            f"{row['halves']:.2f}",
            f"{row['halves_excess']:.2f}",
            f"{row['again']:.1f}",
            f"{row['hits']} of {row['known']} ({shown(row['hits_by_chance'])})",
            f"{row['lens_hits']} of {row['known']} ({shown(row['lens_hits_by_chance'])})",
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [row for model, layers in LAYERS.items() for row in measure(model, layers)]
    write_json(HERE / "results.json", {"k": K, "drawn": DRAWN, "kl": KL, "rows": rows})
    (HERE / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
