"""A run as one HTML file that opens from disk and asks for nothing: features, neurons, overlaps, a hierarchy, facts.

What a model or a text wrote is not trusted. It stands in the page as data, in a block that no parser takes for
markup or code, and reaches the screen as text nodes alone; the page's policy allows its one script and its one style,
by hash, and no request. Template, style and scripts lie in ``page/``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .report_data import check_tree, layer_data, steering_data

if TYPE_CHECKING:
    from .models import LanguageModel
    from .runs import Run

# Most bytes of a page: mail and chat take it, and a phone opens it.
MAX_BYTES = 10_000_000
_SCRIPTS = ("dom", "data", "theme", "charts", "list", "feature", "overlap", "neurons", "tree", "main")
# What could end the data block, or begin a comment in it; line ends of old scripts; halves of characters, which
# UTF-8 has no place for. JSON reads the escapes as the same text.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Report:
    """A written page: its path, its size in bytes, how many features, and what was left out to keep it small."""

    path: Path
    size: int
    features: int
    cut: tuple[str, ...]


def write_report(
    run: Run,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    model: LanguageModel | Callable[[], LanguageModel] | None = None,
    hierarchy: Mapping[int, Mapping[str, Any]] | None = None,
    steering: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
    max_bytes: int = MAX_BYTES,
    before_layer: Callable[[int], None] | None = None,
) -> Report:
    """Write a run's report.

    Args:
        run: with a factorised layer.
        path: of the HTML file; it is replaced when the new one is whole.
        layers: which; by default all factorised ones.
        model: what the run was collected from, or what loads it; by default :meth:`Run.load_model`. It is needed once:
            what it says about the features is kept in the run.
        hierarchy: per layer what ``Tree.to_json`` gives; of other layers the hierarchy that ``snmf tree`` has kept in
            the run is shown.
        steering: what ``snmf steer --json`` printed, for features.
        title: by default the model's name and the run's folder.
        max_bytes: of the file. Of each feature as many contexts are kept as fit, strongest first.
        before_layer: called with each layer that is going to be described.

    Raises:
        FileNotFoundError: no layer is factorised, or not one of ``layers``.
        ValueError: an argument does not fit the run, or the page does not fit ``max_bytes`` with one context a feature.
    """
    from .labels import read_sources

    chosen = run.fitted if layers is None else list(layers)
    if not chosen:
        raise FileNotFoundError(
            f"{run.path} has no factorised layer yet: `snmf fit {shlex.quote(str(run.path))}`"
        )
    trees = dict(hierarchy or {})
    if outside := sorted(set(trees) - set(chosen)):
        raise ValueError(f"hierarchy: layer {outside[0]} is not in this report; it has {chosen}")
    for tree in trees.values():
        check_tree(tree)
    load = run.load_model if model is None else model
    store = run.store()
    content = []
    for layer in chosen:
        factors = run.factors(layer)
        if before_layer:
            before_layer(layer)
        features = run.features(layer, load)
        labels = read_sources(run.labels_folder(layer))
        texts = run.token_texts(load)
        if layer not in trees and (kept := run.tree(layer)) is not None:
            trees[layer] = kept.to_json()
        content.append(layer_data(layer, features, factors, store, texts, labels, trees.get(layer)))
    name = run.config["model"]["name"]
    data = {"layers": content, "steering": steering_data(steering)}
    page, cut = _fitted(data, title or f"{name} · {run.path.resolve().name}", _facts(run, chosen), max_bytes)
    target = Path(path)
    files.write_text(target, page)
    return Report(target, len(page.encode()), sum(len(layer["features"]) for layer in content), cut)


def render(
    data: Mapping[str, Any], title: str, facts: Sequence[Mapping[str, Any]], cut: Sequence[str]
) -> str:
    """The page around its data."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from .runs import versions

    style = _part("vendor/uPlot.min.css") + "\n" + _part("style.css")
    own = "".join(_part(f"js/{name}.js") for name in _SCRIPTS)
    licence = "".join(f" * {line}\n" for line in _part("vendor/uPlot.LICENSE").splitlines())
    library = f"/*! uPlot\n{licence} */\n{_part('vendor/uPlot.iife.min.js')}"
    script = f'{library}\n(() => {{\n"use strict";\n{own}}})();\n'
    allowed = f"script-src {_hash(script)}; style-src {_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_part("page.html.j2")).render(
        title=title,
        facts=facts,
        cut=cut,
        first_layer=data["layers"][0]["layer"],
        generator=f"snmf-kernels {versions().get('snmf-kernels', '')}".strip(),
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
        island=Markup(island(data)),
    )


def island(data: Any) -> str:
    """JSON that may stand in a ``<script type="application/json">``, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _fitted(
    data: dict[str, Any], title: str, facts: list[dict[str, Any]], max_bytes: int
) -> tuple[str, tuple[str, ...]]:
    """The page with as many contexts of each feature as fit, and what was left out."""
    features = [feature for layer in data["layers"] for feature in layer["features"]]
    every = [feature["contexts"] for feature in features]
    most = max(map(len, every), default=0)
    cut = tuple(
        f"Layer {layer['layer']}: the overlap shows the {len(layer['overlap']['features'])} features of most energy."
        for layer in data["layers"]
        if len(layer["overlap"]["features"]) < len(layer["features"])
    )
    cut += tuple(
        f"Layer {layer['layer']}: {layer['neurons_cut']}" for layer in data["layers"] if layer["neurons_cut"]
    )

    def noted(count: int) -> tuple[str, ...]:
        note = f"Of each feature’s contexts (up to {most}) the {count} strongest are kept, to stay under "
        return (*cut, f"{note}{max_bytes / 1e6:g} MB.") if count < most else cut

    def with_contexts(count: int) -> str:
        for feature, contexts in zip(features, every, strict=True):
            feature["contexts"] = contexts[:count]
        return render(data, title, facts, noted(count))

    # Bytes that the contexts of each rank take, with the comma between them.
    ranks = [sum(len(island(c[rank]).encode()) + 1 for c in every if rank < len(c)) for rank in range(most)]
    rest = len(with_contexts(0).encode())
    count = most
    while count > 1 and rest + sum(ranks[:count]) > max_bytes:
        count -= 1
    page = with_contexts(count)
    if len(page.encode()) > max_bytes:
        raise ValueError(
            f"{len(features)} features with one context each take {len(page.encode()) / 1e6:.1f} MB, more than "
            f"{max_bytes / 1e6:g} MB; choose fewer layers"
        )
    return page, noted(count)


def _facts(run: Run, layers: Sequence[int]) -> list[dict[str, Any]]:
    """The run's record, in groups of names and values."""
    config = run.config
    model, counts, collect = config["model"], config["counts"], config["collect"]
    groups = [
        {
            "title": "Model and texts",
            "rows": [
                ("model", model["name"]),
                ("class", model["class"]),
                *(
                    (title, model[name])
                    for name, title in (
                        ("file", "file"),
                        ("quantisation", "weights quantised"),
                        ("kind", "kind"),
                        ("path", "path"),
                        ("revision", "revision"),
                        ("weights", "weights (hash)"),
                    )
                    if model.get(name)
                ),
                ("precision", f"run in {collect['model_dtype']}, stored in {collect['dtype']}"),
                (
                    "texts",
                    f"{config['texts']['source'] or 'given in Python'}, {config['texts']['samples']:,} samples",
                ),
                ("versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())),
            ],
        },
        {
            "title": "Tokens",
            "rows": [
                ("in all", f"{counts['tokens']:,}"),
                (
                    "left out",
                    f"{counts['first_position']:,} at the first position, {counts['special']:,} special",
                ),
                ("texts cut", f"{counts['samples_cut']:,}, to {collect['max_tokens']} tokens"),
            ],
        },
    ]
    for layer in layers:
        record = run.record(layer)
        options = record["solver_options"]
        shown = (
            "solver",
            "init",
            "refit",
            "l1",
            "l2",
            "max_active",
            "max_iter",
            "tol",
            "patience",
            "seed",
            "dtype",
        )
        groups.append(
            {
                "title": f"Layer {layer}",
                "rows": [
                    ("site", " = ".join(config["hook_names"][str(layer)])),
                    (
                        "tokens",
                        f"{counts['kept'][str(layer)]:,}, without {counts['sinks'][str(layer)]:,} attention sinks",
                    ),
                    ("features", f"{options['k']}, {len(record['dead_features'])} dead"),
                    ("L0", f"{run.mean_active(layer):.1f} features fire on a token, on average"),
                    ("neurons kept", f"{options['keep']:.3g} of all, a feature"),
                    ("neuron scale", str(options["neuron_scale"] or "none")),
                    ("relative error", f"{record['relative_error']:.4f} (‖A − ZY‖² / ‖A‖²)"),
                    (
                        "stopped",
                        f"after {record['n_iter']} iterations, {record['seconds']} s on {record['backend']}",
                    ),
                    ("because", record["stop_reason"]),
                    ("options", ", ".join(f"{name} {options[name]}" for name in shown if name in options)),
                ],
            }
        )
    return groups


def _part(name: str) -> str:
    return (importlib.resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of an inline block in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
