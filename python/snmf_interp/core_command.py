"""``snmf core``: what the features of a group of words share, what each has alone, and what both do to the words."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import terminal
from .arguments import DeviceOption, MovedModelOption, one_layer

if TYPE_CHECKING:
    from .group_effects import InterventionTable
    from .models import LanguageModel
    from .runs import Run

# 2: what random sets do to each word.
FORMAT = 2
# Where most weekdays have a feature and share neurons at k = 400, on one half of the sentences (benchmarks/core).
LAYERS = {"smollm2-135m": 0, "gemma-3-270m": 3}
K = 400
# A corrected p-value up to which something is said to be so.
_LEVEL = 0.05


def core(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run's folder, collected from word-groups or from texts labelled with the words; or a model, which "
            "is then collected and fitted.",
        ),
    ],
    concepts: Annotated[
        str,
        typer.Option(help="weekdays, months, seasons, numbers or family; or words such as cat,dog,horse."),
    ] = "weekdays",
    layers: Annotated[
        str | None,
        typer.Option(help="Which layer; one.", show_default="the run's only one; of a bundled model one"),
    ] = None,
    k: Annotated[int, typer.Option(help="Features to fit; a run that is fitted has its own.")] = K,
    neuron_scale: Annotated[
        str, typer.Option(help="For the fit: none, with which features share more neurons, or rms.")
    ] = "none",
    m: Annotated[
        int | None,
        typer.Option(
            help="Core neurons are those in so many of the features.",
            show_default="the fewest that chance does not reach",
        ),
    ] = None,
    min_precision: Annotated[
        float, typer.Option(help="Leave out words whose feature has a lower average precision.")
    ] = 0.5,
    kl: Annotated[float, typer.Option(help="Steer to this divergence of the next token, in nats.")] = 0.25,
    random: Annotated[
        int,
        typer.Option(
            help="Random sets for each set. No p-value is below 1/(this + 1), before it is corrected."
        ),
    ] = 99,
    controls: Annotated[int, typer.Option(help="Frequency-matched words for each word.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the random sets.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Where a model's run goes: into a folder of its name in here.")
    ] = Path("results/core"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Core and exclusive neurons of a group of words: do they raise all of them, and each its own?

    Each word gets the feature that detects its sentences best, of one half of the corpus. Core neurons are in
    several of these features, exclusive ones in one alone. Each set, and random sets of the same size and weights,
    is steered to the same divergence; what is shown is the change of each word's logit, relative to words that
    were as likely before. The core is to raise all members, and an exclusive set its own word above the other
    members: most sets raise most of the words a little, random ones too.

    `snmf core smollm2-135m --concepts weekdays` works as it stands, in a few minutes. The same command shows a finished
    table again.
    """
    from .word_groups import groups

    known = groups()
    words = known.get(concepts) or [word.strip() for word in concepts.split(",") if word.strip()]
    if concepts not in known and len(words) < 2:
        raise ValueError(
            f"--concepts: wanted one of {', '.join(known)}, or words such as cat,dog, got {concepts!r}"
        )
    if neuron_scale not in ("rms", "none"):
        raise ValueError(f"--neuron-scale: wanted rms or none, got {neuron_scale!r}")
    screen = Console(quiet=True) if as_json else terminal.console()
    opened, layer, load = _opened(screen, target, layers, out, device, run_model)
    if not opened.is_fitted(layer):
        scale = None if neuron_scale == "none" else neuron_scale
        with terminal.waiting(f"fitting layer {layer}"):
            for number, record in opened.fit([layer], k, neuron_scale=scale):
                terminal.fitted(screen, number, record)
    options = {
        "concepts": concepts, "words": words, "m": m, "min_precision": min_precision, "kl": kl, "random": random,
        "controls": controls, "seed": seed, "fit": opened.record(layer)["options"],
        "relative_error": opened.record(layer)["relative_error"],
        "equal_texts": opened.store().corpus.n_equal,
    }  # fmt: skip
    result = _kept(opened, layer, concepts, options)
    if result is None:
        result = {"format": FORMAT, "options": options, **_measured(opened, layer, options, load, known)}
        from . import files

        with files.keeping("tables", opened.path):
            files.write_json(_path(opened, layer, concepts), result)
    if as_json:
        typer.echo(json.dumps({"layer": layer, **result}, ensure_ascii=False))
    else:
        _show(screen, opened.config["model"]["name"], layer, result)


def _opened(
    screen: Console, target: str, layers: str | None, out: Path, device: str | None, run_model: str | None
) -> tuple[Run, int, Callable[[], LanguageModel]]:
    """The run, made if ``target`` is a model; its layer; and what loads the model."""
    from .runs import ACTIVATIONS, CONFIG, Run
    from .texts import digest, read_texts
    from .word_groups import NAME

    folder = Path(target)
    if (folder / CONFIG).is_file() and (folder / ACTIVATIONS).is_dir():
        opened = Run.open(folder)
        return opened, one_layer(opened, layers), terminal.loader(opened, device, model=run_model)
    if run_model is not None:
        raise ValueError(f"--run-model: {target} is no run, but the model itself; leave it out")
    if layers is None and target not in LAYERS:
        raise ValueError(f"--layers: say which layer of {target!r}; only the bundled models have one picked")
    if layers is not None and not layers.isdigit():
        raise ValueError(f"--layers: wanted the number of one layer, got {layers!r}")
    chosen = LAYERS[target] if layers is None else int(layers)
    folder = out / f"{Path(target).name}-layer-{chosen}"
    terminal.work_in(folder)
    samples = read_texts(NAME)
    if (folder / CONFIG).is_file():
        opened = Run.open(folder)
        # Another model of the same name is told by its weights when it is loaded.
        if opened.config["texts"]["digest"] == digest(samples) and opened.is_whole:
            return (
                opened,
                chosen,
                terminal.loader(opened, device, model=target if Path(target).exists() else None),
            )

    @functools.cache
    def load() -> LanguageModel:
        return terminal.load_model(target, device=device)

    opened = Run.collect(folder, load(), samples, [chosen], texts=NAME)
    terminal.counts(screen, opened)
    return opened, chosen, load


def _measured(
    run: Run,
    layer: int,
    options: dict[str, Any],
    load: Callable[[], LanguageModel],
    known: dict[str, list[str]],
) -> dict[str, Any]:
    import torch

    from .concepts import average_precision, text_scores
    from .core import assign_features
    from .evaluation import split_texts
    from .group_effects import intervention_table
    from .word_groups import half_of
    from .word_meter import is_single_token

    store, factors, words = run.store(), run.factors(layer), options["words"]
    labels = store.corpus.labels
    if missing := [word for word in words if word not in labels]:
        raise ValueError(
            f"--concepts: no text of {run.path} has the label {missing[0]!r}; collect the run from texts that are "
            "labelled with the words, such as word-groups"
        )
    halves = [half_of(id) for id in store.corpus.sample_ids]
    train = (
        split_texts(labels, groups=store.corpus.groups)
        if None in halves
        else torch.tensor([half == 0 for half in halves], dtype=torch.bool)
    )
    scores = text_scores(torch.as_tensor(factors.Y), store.samples(layer), len(labels))
    found = assign_features(scores[:, train], [labels[i] for i in train.nonzero().squeeze(1).tolist()], words)
    names, precision = average_precision(
        scores[list(found.features)][:, ~train], [labels[i] for i in (~train).nonzero().squeeze(1).tolist()]
    )
    held_out = [float(precision[i, names.index(w)]) if w in names else None for i, w in enumerate(words)]
    model = load()
    members = {
        word: feature
        for word, feature in found.members(options["min_precision"]).items()
        if is_single_token(model, word)
    }
    result: dict[str, Any] = {
        "assignment": asdict(found) | {"held_out": held_out},
        "table": None,
        "corrected": None,
    }
    if len(members) < 2:
        return result
    others = {
        name: fitting
        for name, group in known.items()
        if not set(group) & set(words) and (fitting := [w for w in group if is_single_token(model, w)])
    }
    with terminal.waiting(f"steering layer {layer} with {len(members) + 1} sets and random ones"):
        table = intervention_table(
            model,
            layer,
            torch.as_tensor(factors.Z),
            members,
            words=[word for word in words if is_single_token(model, word)],
            related=others,
            m=options["m"],
            kl=options["kl"],
            n_random=options["random"],
            n_controls=options["controls"],
            seed=options["seed"],
        )
    return result | {"table": table.as_dict(), "corrected": _corrected(table)}


def _corrected(table: InterventionTable) -> dict[str, Any]:
    """p-values after Holm: of the two questions together, and of the exclusive sets one by one.

    What has no p-value has no entry.
    """
    from .core import holm

    def holm_of(p_values: Mapping[str, float | None]) -> dict[str, float]:
        tested = {name: p for name, p in p_values.items() if p is not None}
        return dict(zip(tested, holm(list(tested.values())), strict=True))

    return {
        "questions": holm_of({"core": table.core_minimum_p, "exclusive": table.exclusive_p}),
        "sets": holm_of({effect.name: effect.p_value for effect in table.exclusive}),
    }


def _path(run: Run, layer: int, concepts: str) -> Path:
    from .word_groups import groups

    name = concepts if concepts in groups() else "words"
    return run.core_folder(layer) / f"{name}.json"


def _kept(run: Run, layer: int, concepts: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call with the same options found, or None."""
    from . import files

    path = _path(run, layer, concepts)
    if not path.is_file():
        return None
    there = files.read_json(path)
    return there if (there.get("format"), there.get("options")) == (FORMAT, options) else None


def _show(screen: Console, model: str, layer: int, result: dict[str, Any]) -> None:
    from .features import visible

    options, assignment, table = result["options"], result["assignment"], result["table"]
    screen.print(
        Text(
            f"\nLayer {layer} of {visible(model)}, {options['fit']['k']} features: {options['concepts']}\n",
            style="bold",
        )
    )
    screen.print(_features(assignment, options["min_precision"], table))
    if table is None:
        line = (
            f"fewer than two words have a feature with an average precision of {options['min_precision']:g}"
        )
        screen.print(Text(f"\n{line}: no group to test (--min-precision, --k, --layers)", style="yellow"))
        return
    sets = table["sets"]
    screen.print(
        Text(
            f"\ncore: in {sets['m']} or more of {len(sets['members'])} features: {len(sets['core'])} neurons "
            f"({sets['expected_core']:.2g} by chance)\n"
        )
    )
    screen.print(_shifts(table))
    if table["exclusive"]:
        screen.print()
        screen.print(_exclusive(table, result["corrected"]["sets"]))
    screen.print()
    for line, style in _verdicts(table, result["corrected"]["questions"]):
        screen.print(Text(line, style=style), soft_wrap=True)
    screen.print(Text(f"\n{_legend(options, table)}", style="dim"))


def _legend(options: dict[str, Any], table: dict[str, Any]) -> str:
    sentences = [
        f"The first table has the change of each word's logit, less that of {options['controls']} words that were as "
        f"likely before, in nats; it is the mean over {len(table['prompts'])} prompts, at a KL divergence of "
        f"{table['target']:g}.",
        "Above others: the own word's change less the mean of the other members'.",
    ]
    if count := options["random"]:
        sentences += [
            f"Random sets: {count} for each set, with its size and weights on other neurons; the values are their "
            "means.",
            "p: the share of random sets, this one counted in, that do as well; corrected (Holm) for the number of "
            f"answers in bold, and of exclusive sets in the table. Before that none is below 1/{count + 1} = "
            f"{1 / (count + 1):.2g} (--random).",
        ]
    return " ".join(sentences)


def _features(assignment: dict[str, Any], least: float, table: dict[str, Any] | None) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("word")
    for name in ("feature", "AP, chosen on", "AP, other half", "exclusive neurons"):
        shown.add_column(name, justify="right")
    exclusive = table["sets"]["exclusive"] if table else {}
    rows = (assignment[name] for name in ("words", "features", "precision", "held_out"))
    for word, feature, precision, held_out in zip(*rows, strict=True):
        shown.add_row(
            Text(word),
            str(feature),
            f"{precision:.2f}",
            "" if held_out is None else f"{held_out:.2f}",
            str(len(exclusive[word])) if word in exclusive else "left out",
            style="" if precision >= least else "dim",
        )
    return shown


def _shifts(table: dict[str, Any]) -> Table:
    """What each set does to each word."""
    # Twelve words fit into 80 columns without more space between them.
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
    shown.add_column("steered by", no_wrap=True)
    for word in table["words"]:
        shown.add_column(word[:3] if len(table["words"]) > 4 else word, justify="right", no_wrap=True)
    for effect in _effects(table):
        cells = []
        for word in table["words"]:
            bold = effect["name"] in (word, "core")
            cells.append(Text(f"{effect['shifts'][word]:+.1f}", style="bold" if bold else ""))
        shown.add_row(Text(effect["name"]), *cells)
    return shown


def _exclusive(table: dict[str, Any], corrected: dict[str, float]) -> Table:
    """Whether each exclusive set raises its own word above the other members."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("exclusive", no_wrap=True)
    names = ["neurons", "own word", "above others", *(["random sets", "p"] if corrected else [])]
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for effect in table["exclusive"]:
        cells = [
            f"{len(effect['neurons'])}",
            f"{effect['shifts'][effect['name']]:+.2f}",
            f"{effect['statistic']:+.2f}",
        ]
        if corrected:
            cells += [f"{_mean(effect['random']['statistics']):+.2f}", f"{corrected[effect['name']]:.2f}"]
        shown.add_row(Text(effect["name"]), *cells)
    return shown


def _effects(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [effect for effect in (table["core"], *table["exclusive"]) if effect is not None]


def _verdicts(table: dict[str, Any], corrected: dict[str, float]) -> list[tuple[str, str]]:
    """The answers to both questions, each with what else to know of it."""
    lines = _core_verdict(table, corrected.get("core"))
    if table["exclusive"]:
        lines += _exclusive_verdict(table, corrected.get("exclusive"))
    if short := [effect["name"] for effect in _effects(table) if not effect["reached"]]:
        lines.append((f"KL {table['target']:g} is not reached by {', '.join(short)}: not comparable", "red"))
    return lines


def _core_verdict(table: dict[str, Any], p: float | None) -> list[tuple[str, str]]:
    core, least = table["core"], table["core_minimum"]
    if core is None:
        return [("the core is empty, or its weights cancel", "yellow")]
    n = len(table["sets"]["members"])
    if least <= 0:
        answer = f"the core does not raise all {n} members"
    elif p is None or p <= _LEVEL:
        answer = f"the core raises all {n} members"
    else:
        answer = f"the core raises all {n} members, but not surely more than random sets do"
    lines = [(f"{answer}: the least by {least:+.2f}{_p(p)}", "bold")]
    mean = f"  by {core['statistic']:+.2f} on average"
    if (random := core["random"]) is not None:
        all_raised = sum(value > 0 for value in random["rises"])
        mean += f"; random sets by {_mean(random['statistics']):+.2f}, and {all_raised} of {random['count']} raise all"
    lines.append((mean, ""))
    if core["related"]:
        others = ", ".join(f"{name} {value:+.2f}" for name, value in core["related"].items())
        lines.append((f"  other groups under it: {others}", ""))
    return lines


def _exclusive_verdict(table: dict[str, Any], p: float | None) -> list[tuple[str, str]]:
    effects, value = table["exclusive"], table["exclusive_statistic"]
    n = len(effects)
    above = "raise their own word above the other members"
    if value <= 0:
        answer = f"exclusive sets do not {above}"
    elif p is None or p <= _LEVEL:
        answer = f"exclusive sets {above}"
    else:
        answer = f"exclusive sets do not surely {above}"
    lines = [(f"{answer}: by {value:+.2f} on average{_p(p)}", "bold")]
    higher = f"  above the other members: {sum(effect['statistic'] > 0 for effect in effects)} of {n}"
    raised = f"  raised at all: {sum(effect['shifts'][effect['name']] > 0 for effect in effects)} of {n}"
    if p is not None:
        randoms = [effect["random"] for effect in effects]
        of_random = {
            name: _mean([value > 0 for random in randoms for value in random[name]])
            for name in ("statistics", "rises")
        }
        higher += f", and {of_random['statistics']:.0%} of their random sets"
        raised += f", and {of_random['rises']:.0%} of their random sets"
    return [*lines, (higher, ""), (raised, "")]


def _p(p: float | None) -> str:
    return "" if p is None else f", p = {p:.2g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
