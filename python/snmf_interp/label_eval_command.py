"""``snmf eval RUN --labels SOURCE``: a run's own features, steered towards their labels as in the paper."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

from . import llm_options, trial_tables

if TYPE_CHECKING:
    from .labels import Label
    from .llm import LocalModel, OpenAIModel
    from .models import LanguageModel
    from .runs import Run
    from .steering_protocol import Protocol, SteeringRecord


def evaluate_labels(
    screen: Console,
    run: Run,
    model: LanguageModel,
    layers: Sequence[int],
    source: str,
    count: int,
    protocol: Protocol,
    llm: OpenAIModel | LocalModel | None,
    *,
    both_signs: bool,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Steer the clearest labelled features of each layer, and print and keep how the judge finds the texts.

    Args:
        screen: for the tables.
        run: with features and labels.
        model: the model that it is of.
        layers: which.
        source: of the labels: a model's name, or ``"words"``.
        count: how many features of a layer.
        protocol: what is written.
        llm: the judge, who also writes the sentences for DiffMeans.
        both_signs: whether features and random groups are tried turned round too.
        seed: of the random groups.
        overwrite: replace a test with other options.
        as_json: print the JSON instead of tables.

    Raises:
        ValueError: there is no judge, or it does not qualify.
        FileNotFoundError: a layer has no such labels.
    """
    from . import files, trial_report
    from .label_trial import LabelTrial
    from .runs import versions
    from .sentences import write_sentences
    from .text_scoring import JudgeScorer

    if llm is None:
        raise ValueError(
            "--labels: a label is judged by a language model; give --model, --base-url or --local"
        )
    if not layers:
        raise FileNotFoundError(
            f"{run.path} has no factorised layer yet: `snmf fit {shlex.quote(str(run.path))}`"
        )
    labels = {layer: _clearest(run, model, layer, source, count) for layer in layers}
    qualification = llm_options.qualified(llm)
    trial = LabelTrial.open(run, model, protocol, seed=seed, overwrite=overwrite)
    records: list[SteeringRecord] = []
    choices = (False, True) if both_signs else (False,)
    total = len(choices) * sum(len({one.text for one in own}) for own in labels.values())
    with tqdm(
        total=total, unit="label", desc="steering", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for layer, own in labels.items():
            sentences = write_sentences(own, llm)
            for choice in choices:
                scorers = [JudgeScorer(llm)]
                for record in trial.steer(layer, own, scorers, sentences=sentences, both_signs=choice):
                    records.append(record)
                    bar.set_postfix_str(f"layer {layer}, {record.method}, {record.concept}")
                    bar.update(record.method == "snmf")
    facts: dict[str, Any] = {
        "model": model.name,
        "weights": run.config["model"]["weights"],
        "labels": source,
        "plan": {"protocol": asdict(protocol), "seed": seed, "features": count},
        "scorers": {"judge": JudgeScorer(llm).identity},
        "qualification": asdict(qualification),
        "versions": versions(),
    }
    nothing: list[tuple[()]] = [() for _ in records]
    report = trial_report.as_json({}, records, nothing, ["judge"], facts)
    files.write_json(trial.folder / "report.json", report)
    figure = trial.folder / "figure.png"
    trial_report.draw(
        figure, {}, records, nothing, "judge", f"{model.name}, clearest features steered to their labels"
    )
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    trial_tables.show_steering(
        screen, f"The clearest features of {{}} steered to their labels by {source}", records, "judge"
    )
    screen.print(Text(f"\nAll of it: {trial.folder / 'report.json'}, {figure}", style="dim"), soft_wrap=True)


def _clearest(run: Run, model: LanguageModel, layer: int, source: str, count: int) -> list[Label]:
    """The labels of the features that have one, clearest features first."""
    from .labels import read_labels

    clarity = {feature.index: feature.clarity for feature in run.features(layer, model)}
    there = [one for one in read_labels(run.labels_folder(layer), source) if one.side == "input"]
    named = sorted(
        (one for one in there if one.text is not None), key=lambda one: (-clarity[one.index], one.index)
    )
    if not named:
        raise FileNotFoundError(
            f"--labels: layer {layer} of {run.path} has no input-side labels by {source!r}; "
            f"`snmf label {shlex.quote(str(run.path))}` makes some"
        )
    return named[:count]
