"""What word labels are worth, and how many features another start finds too, on both bundled models.

    python benchmarks/labels/experiment.py     # results.json and table.md; minutes

For each layer the default fit of the bundled corpus, k = 100. A feature's concept is the label that it ranks best,
where it does so better than chance. A label by words names it if one of its words is among the words by which text is
told to be about that concept (the list behind ``snmf eval``: 59 of the 72 concepts have some); chance is the share of
pairs of a feature's words with another feature's concept that do. Features recur if another start has one of cosine
0.7 or more; chance as ``snmf stability`` has it, neurons as common and loud as they are and only the groups broken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import described, facts
from real_activations import FOLDER

import snmf_kernels
from snmf_interp import describe, load_model
from snmf_interp.files import write_json
from snmf_interp.labels import label_features
from snmf_interp.rivals import bundled_words, collect_run
from snmf_interp.stability import stability_of
from snmf_interp.words import corpus_words, split_words

HERE = Path(__file__).parent
LAYERS = {"smollm2-135m": (10, 20, 27), "gemma-3-270m": (6, 12, 16)}
K, SEEDS = 100, range(5)


def measure(model_name: str, layers: tuple[int, ...]) -> list[dict[str, Any]]:
    model = load_model(model_name)
    run = collect_run(FOLDER / f"labels-{model_name}", model, ",".join(map(str, layers)))
    store = run.store()
    corpus = corpus_words(store, model)
    words = {name: {word.casefold() for word in own} for name, own in bundled_words().items()}
    rows = []
    for layer in layers:
        fits = [snmf_kernels.fit(store.layer(layer).float().T, K, seed=seed) for seed in SEEDS]
        features = describe(fits[0], store, model, layer)
        labels = label_features(features, sides=("input",), corpus=corpus)
        said = [set(map(str.casefold, split_words(label.text or ""))) for label in labels]
        concepts = [feature.concept for feature in features]
        known = [i for i, concept in enumerate(concepts) if concept in words]
        named = [i for i in known if said[i] & words[str(concepts[i])]]
        clear = [i for i in known if features[i].concept_precision >= 0.3]
        pairs = [
            bool(said[i] & words[str(concepts[j])])
            for i in known
            for j in known
            if concepts[i] != concepts[j]
        ]
        report = stability_of(fits)
        rows.append(
            {
                "model": model_name,
                "layer": layer,
                "with_words": len(known),
                "named": len(named),
                "by_chance": len(known) * sum(pairs) / len(pairs),
                "clear": len(clear),
                "clear_named": len(set(clear) & set(named)),
                "recurring": report.mean_recurrence,
                "recurring_by_chance": report.chance.features,
                "dead": report.dead[0],
            }
            | facts()
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Default fits, k = {K}, of the bundled corpus; {len(SEEDS)} starts. {described(rows)}.",
        "",
        "| model, layer | features whose concept has words | of these named by their words | by chance "
        "| average precision of 0.3 or more | of these named | found again by another start | by chance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row['model']}, {row['layer']}",
            *(str(row[name]) for name in ("with_words", "named")),
            f"{row['by_chance']:.1f}",
            *(str(row[name]) for name in ("clear", "clear_named")),
            f"{row['recurring']:.0%}",
            f"{row['recurring_by_chance']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [row for model, layers in LAYERS.items() for row in measure(model, layers)]
    write_json(HERE / "results.json", {"k": K, "seeds": list(SEEDS), "rows": rows})
    (HERE / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
