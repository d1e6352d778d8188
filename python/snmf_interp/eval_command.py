"""``snmf eval`` and ``snmf detect``: a run's features against other methods, on equal terms."""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

from . import llm_options, terminal, trial_tables
from .arguments import DeviceOption, RevisionOption, RunArgument, RunModelOption, TrustOption, fit_settings
from .label_eval_command import evaluate_labels
from .llm_options import (
    BaseUrlOption,
    ConcurrencyOption,
    LlmOption,
    LocalOption,
    ParameterOption,
    TimeoutOption,
)

if TYPE_CHECKING:
    from .detecting import DetectionSummary
    from .judging import Qualification
    from .models import LanguageModel
    from .rivals import Plan, Trial
    from .runs import Run
    from .steering_protocol import SteeringRecord
    from .text_scoring import Scorer

AgainstOption = Annotated[
    str,
    typer.Option(
        help="Rivals: diffmeans, sae (trained here; needs the sae extra), neuron, random, permuted, and other "
        "fits: snmf-raw, snmf-norefit, snmf-sparse, snmf-paper."
    ),
]
SaeOption = Annotated[
    str | None,
    typer.Option(
        help="A published autoencoder too: RELEASE/SAE_ID of SAELens, or a folder; {layer} is filled in."
    ),
]
KOption = Annotated[
    int | None,
    typer.Option(
        help="Features, and latents of the autoencoder. Other options of the fit are the run's too.",
        show_default="the run's, else 100",
    ),
]
NeuronScaleOption = Annotated[
    str | None, typer.Option(help="Of SNMF: rms or none.", show_default="the run's, else rms")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a comparison made with other options.")
]


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|DIR", help="A model, or a run's folder with labelled texts.")
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            help="Such as 10,20.",
            show_default="a run's own; of a model those at a third, two thirds and nine tenths",
        ),
    ] = None,
    k: KOption = None,
    against: AgainstOption = "diffmeans,neuron,random",
    concepts: Annotated[
        str,
        typer.Option(help="How many concepts to steer to, drawn at random; or their labels; or 0, or all."),
    ] = "8",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Instead: steer a run's own features to their labels of this source (see snmf label), as in the "
            "paper; --concepts says how many of a layer's clearest. Needs a judge.",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="For a MODEL: labelled texts, as for snmf collect.", show_default="concepts"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="For a MODEL: the run's folder.", show_default="results/MODEL-eval")
    ] = None,
    sae: SaeOption = None,
    neuron_scale: NeuronScaleOption = None,
    both_signs: Annotated[
        bool,
        typer.Option(
            "--both-signs",
            help="Besides, let each method but DiffMeans turn its directions round where that raises the concept's "
            "words more, as in the paper. The negative of a feature is not that feature.",
        ),
    ] = False,
    next_token: Annotated[
        bool,
        typer.Option(
            "--next-token",
            help="Write no texts: say what the directions do to the next token alone, in a fraction of the time.",
        ),
    ] = False,
    samples: Annotated[
        int, typer.Option(help="Texts of each of 4 choosing prompts, at each of 7 divergences.")
    ] = 2,
    report_samples: Annotated[int, typer.Option(help="Texts of each of 4 reporting prompts.")] = 8,
    candidates: Annotated[int, typer.Option(help="Detectors of a concept that are tried.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a text.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the division of texts, the fits and the samples.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option("--model", help="A judge behind an OpenAI-compatible endpoint; it must qualify first."),
    ] = None,
    base_url: BaseUrlOption = None,
    local: LocalOption = None,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 600.0,
    parameter: ParameterOption = None,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    model_dtype: Annotated[
        str | None, typer.Option(help="For a MODEL: float32, bfloat16 or float16.", show_default="float32")
    ] = None,
    run_model: RunModelOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare SNMF with other methods: how well their directions detect concepts, and how well they steer.

    Everything is fitted and matched on half of the texts and scored on the other half. To steer, each method's best
    detectors of a concept are added to the neurons' activations, as strongly as moves the next-token distribution by
    seven divergences; what is chosen is chosen on four prompts and reported on four others. A text scores 0 to 2, the
    harmonic mean of concept and fluency: by words, and by a judge where one is given. Without sampling, the same
    directions are measured by what they do to the logits of the concept's words, beside words that were as likely.

    With --labels the paper's own test of each layer's clearest features: towards the label that a model gave them,
    beside DiffMeans of sentences written from the label and random groups of as many neurons.

    Writes DIR/eval/report.json and figure.png, with --labels in DIR/eval-labels. The same command goes on where it was
    stopped.
    """
    from . import files
    from .rivals import Plan, Trial
    from .runs import ACTIVATIONS, Run, versions
    from .steering_protocol import Protocol

    protocol = Protocol(
        samples=samples,
        report_samples=report_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        candidates=candidates,
    )
    there = Run.open(target) if (Path(target) / ACTIVATIONS).is_dir() else None
    # A run's own features are not fitted anew.
    fitted = [] if there is None or labels is not None else there.parse_layers(layers)
    k, options = _fit(there, fitted, k, neuron_scale)
    plan = Plan(k=k, against=_names(against), sae=sae, fit=options, seed=seed, protocol=protocol)
    _check_installed(plan)
    opened, model = _opened(
        target, layers, texts, out, model_dtype, device, revision, trust_remote_code, run_model
    )
    if labels is not None:
        if not concepts.isdigit() or not int(concepts):
            raise ValueError(f"--concepts: with --labels wanted how many features, got {concepts!r}")
        evaluate_labels(
            terminal.console(),
            opened,
            model,
            opened.parse_layers(layers) if layers is not None else opened.fitted,
            labels,
            int(concepts),
            protocol,
            llm_options.chosen(
                opened.answers, judge, base_url, local, concurrency, timeout, parameter, device
            ),
            both_signs=both_signs,
            seed=seed,
            overwrite=overwrite,
            as_json=as_json,
        )
        return
    trial = Trial.open(opened, model, plan, overwrite=overwrite)
    chosen = opened.parse_layers(layers)
    wanted = _concepts(concepts, trial, seed)
    screen = terminal.console()
    llm = llm_options.chosen(opened.answers, judge, base_url, local, concurrency, timeout, parameter, device)
    scorers, qualification = _scorers(trial, llm) if wanted and not next_token else ([], None)
    detection = _detect(screen, trial, chosen, 1, quiet=as_json)
    records = _steer(trial, chosen, scorers, wanted, both_signs)
    with terminal.waiting("reading the next token under each direction"):
        effects = trial.immediate(records)
    from . import trial_report

    report = trial_report.as_json(
        detection,
        records,
        effects,
        [scorer.name for scorer in scorers],
        {
            "model": model.name,
            "weights": opened.config["model"]["weights"],
            "texts": opened.config["texts"],
            "against": list(plan.against),
            "plan": asdict(plan),
            "concepts": list(wanted),
            "scorers": {scorer.name: scorer.identity for scorer in scorers},
            "qualification": None if qualification is None else asdict(qualification),
            "versions": versions(),
            "notes": _notes(detection, seed),
        },
    )
    files.write_json(trial.folder / "report.json", report)
    figure = trial.folder / "figure.png"
    title = f"{model.name}, k = {k}, {len(wanted)} concepts steered to"
    trial_report.draw(figure, detection, records, effects, scorers[-1].name if scorers else None, title)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    for choice in (False, True):
        own, own_effects = trial_report.of_signs(records, effects, choice)
        how = ", the better of both signs" if choice else ""
        for scorer in scorers if own else ():
            trial_tables.show_steering(
                screen, f"Steering at {{}}, scored by {scorer.name}{how}", own, scorer.name
            )
        if at_once := trial_report.summarise_immediate(own, own_effects):
            title = f"Next token under the same directions{how}, layers {', '.join(map(str, chosen))}"
            trial_tables.show_immediate(screen, title, at_once, protocol.screen_kl)
    screen.print(Text(f"\nAll of it: {trial.folder / 'report.json'}, {figure}", style="dim"), soft_wrap=True)


def detect(
    run: RunArgument,
    layers: Annotated[
        str | None, typer.Option(help="Such as 4-6,12.", show_default="all that were collected")
    ] = None,
    k: KOption = None,
    against: AgainstOption = "diffmeans,neuron,random,permuted",
    sae: SaeOption = None,
    neuron_scale: NeuronScaleOption = None,
    seed: Annotated[int, typer.Option(help="Of the division of texts and the fits.")] = 0,
    repeats: Annotated[
        int,
        typer.Option(
            help="Divisions of the texts, each with its own starts of the fits, by this seed and the next ones. "
            "Intervals of 1 are over concepts alone."
        ),
    ] = 5,
    model: LlmOption = None,
    base_url: BaseUrlOption = None,
    local: LocalOption = None,
    top: Annotated[
        int, typer.Option(help="With a language model: how many of the clearest features it labels.")
    ] = 50,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 600.0,
    parameter: ParameterOption = None,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    run_model: RunModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Say how well features detect concepts in texts that they were not fitted on, beside other methods and chance.

    Features are fitted on half of the run's labelled texts, each concept is matched to its best feature there, and
    scored on the other half: against all other texts, and against those that share its words. This is repeated with
    other divisions of the texts and other starts of the fits, the same for all methods; intervals are over concepts and
    repetitions. What is finished is kept in DIR/eval: the same command goes on where it was stopped, and more --repeats
    add to what is there.

    With --model, --base-url or --local also as in the paper: a language model names the features of the run's own
    fit, writes five sentences that should activate each and five that should not, and each feature must tell them.
    """
    from . import files
    from .rivals import Plan, Trial
    from .runs import Run

    opened = Run.open(run)
    chosen = opened.parse_layers(layers)
    if top < 1:
        raise ValueError(f"--top: wanted at least 1, got {top}")
    if repeats < 1:
        raise ValueError(f"--repeats: wanted at least 1, got {repeats}")
    if model is not None or base_url is not None or local is not None:
        # Before anything is fitted with options that may not be those of the fit to come.
        _check_fitted(opened, chosen)
    k, options = _fit(opened, chosen, k, neuron_scale)
    plan = Plan(k=k, against=_names(against), sae=sae, fit=options, seed=seed)
    _check_installed(plan)
    loaded = terminal.loader(opened, device, model=run_model)()
    trial = Trial.open(opened, loaded, plan, steering=False, overwrite=overwrite)
    screen = terminal.console()
    llm = llm_options.chosen(opened.answers, model, base_url, local, concurrency, timeout, parameter, device)
    detection = _detect(screen, trial, chosen, repeats, quiet=as_json)
    written = _written(opened, loaded, chosen, llm, top) if llm is not None else {}
    if as_json:
        content = {
            "seeds": [seed + number for number in range(repeats)],
            "layers": {str(number): [asdict(row) for row in rows] for number, rows in detection.items()},
            "sentences": {str(number): row for number, row in written.items()},
            "notes": _notes(detection, seed),
        }
        typer.echo(json.dumps(files.finite(content), ensure_ascii=False))
        return
    for number, row in written.items():
        trial_tables.show_sentences(screen, number, row)


def _opened(
    target: str,
    layers: str | None,
    texts: str | None,
    out: Path | None,
    dtype: str | None,
    device: str | None,
    revision: str | None,
    trusted: bool,
    run_model: str | None,
) -> tuple[Run, LanguageModel]:
    """The run, collected if it is not there, and its model."""
    from .runs import ACTIVATIONS, Run

    if (Path(target) / ACTIVATIONS).is_dir():
        given = {"--model-dtype": dtype, "--out": out, "--texts": texts, "--revision": revision}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{wrong[0]}: {target} is a run, whose model and texts are settled; leave it out, or give a model"
            )
        opened = Run.open(target)
        return opened, terminal.loader(opened, device, trusted, run_model)()
    if run_model is not None:
        raise ValueError(f"--run-model: {target} is no run, but the model itself; leave it out")
    from .rivals import collect_run

    model = terminal.load_model(
        target, dtype or "float32", device, revision=revision, trust_remote_code=trusted
    )
    if layers is None:
        depths = (model.n_layers // 3, 2 * model.n_layers // 3, 9 * model.n_layers // 10)
        layers = ",".join(map(str, sorted(set(depths))))
    folder = out or Path("results") / f"{Path(target).name}-eval"
    terminal.work_in(folder)
    return collect_run(folder, model, layers, texts or "concepts"), model


def _check_installed(plan: Plan) -> None:
    """What is missing is said before anything is computed."""
    from .autoencoders import import_sae_lens

    if "sae" in plan.against or plan.sae is not None:
        import_sae_lens()


def _check_fitted(run: Run, layers: Sequence[int]) -> None:
    if missing := [layer for layer in layers if not run.is_fitted(layer)]:
        raise FileNotFoundError(
            "sentences are written for the features of a run's own fit: "
            f"`snmf fit {shlex.quote(str(run.path))} --layers {missing[0]}`"
        )


def _names(against: str) -> tuple[str, ...]:
    return tuple(name for part in against.split(",") if (name := part.strip()))


def _fit(
    run: Run | None, layers: Sequence[int], k: int | None, neuron_scale: str | None
) -> tuple[int, dict[str, Any]]:
    """The number of features, and options of the fit that are not the solver's own."""
    if neuron_scale not in (None, "rms", "none"):
        raise ValueError(f"--neuron-scale: wanted rms or none, got {neuron_scale!r}")
    given: dict[str, Any] = {} if k is None else {"k": k}
    if neuron_scale is not None:
        given["neuron_scale"] = None if neuron_scale == "none" else neuron_scale
    options: dict[str, Any] = {"k": 100, "neuron_scale": "rms"}
    options |= ({} if run is None else fit_settings(run, layers, given)) | given
    if options["neuron_scale"] == "rms":
        # What a plan says of its own accord.
        del options["neuron_scale"]
    return options.pop("k"), options


def _concepts(given: str, trial: Trial, seed: int) -> tuple[str, ...]:
    """The concepts to steer to."""
    if given == "all":
        return tuple(sorted(trial.words))
    if not given.isdigit():
        names = _names(given)
        if unknown := [name for name in names if name not in trial.words]:
            if unknown[0] in trial.labels:
                raise ValueError(f"--concepts: got {unknown[0]!r}, but {_scorable(trial)}")
            known = _listed(sorted(trial.words))
            raise ValueError(f"--concepts: no text has the label {unknown[0]!r}; wanted some of {known}")
        return names
    count = int(given)
    if count > len(trial.words):
        raise ValueError(f"--concepts: wanted at most {len(trial.words)}, got {count}; {_scorable(trial)}")
    return tuple(random.Random(seed).sample(sorted(trial.words), count))


def _scorable(trial: Trial) -> str:
    """Which concepts have words to score text by, why the others have none, and what to do."""
    from .rivals import LEAST_WORDS

    lacking = sorted({label for label in trial.labels if label is not None} - trial.words.keys())
    why, remedy = (
        ("for the bundled list of words leaves them out", "Ask")
        if trial.has_bundled_words
        else (
            f"for fewer than {LEAST_WORDS} words set their training texts apart from the others",
            "Collect more texts with these labels, or ask",
        )
    )
    cannot = f"; not for {_listed(lacking)}, {why}" if lacking else ""
    return (
        f"there are words to score text by for {_listed(sorted(trial.words))}{cannot}. {remedy} for fewer or other "
        "concepts; --concepts 0 measures detection alone"
    )


def _listed(names: Sequence[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest


def _scorers(trial: Trial, llm: Any) -> tuple[list[Scorer], Qualification | None]:
    """Words, and the judge if there is one that qualifies, with how it did."""
    from .text_scoring import JudgeScorer, WordScorer

    with terminal.waiting("writing without steering"):
        scorers: list[Scorer] = [WordScorer(trial.model, trial.words, trial.plain.choosing)]
    if llm is None:
        return scorers, None
    qualification = llm_options.qualified(llm)
    return [*scorers, JudgeScorer(llm)], qualification


def _detect(
    screen: Console, trial: Trial, layers: Sequence[int], repeats: int, *, quiet: bool
) -> dict[int, list[DetectionSummary]]:
    from .detecting import summarise

    found = {}
    for layer in layers:
        rows = []
        with terminal.waiting(f"layer {layer}: fitting and detecting") as say:
            for number in range(repeats):
                if number:
                    say(f"layer {layer}: fitting and detecting, repetition {number + 1} of {repeats}")
                # The fits of a repetition go with it.
                rows.append(trial.repetition(number).detect(layer))
        found[layer] = summarise(*rows)
        if not quiet:
            trial_tables.show_detection(screen, trial, layer, found[layer])
    return found


def _notes(detection: Mapping[int, Sequence[DetectionSummary]], seed: int) -> dict[str, Any]:
    """What a reader of the numbers of detection must know, for JSON."""
    from .detecting import detected_note, interval_note

    repeats = len(next(iter(detection.values()))[0].repetitions)
    return {
        "intervals": interval_note(range(seed, seed + repeats)),
        "detected": {str(layer): detected_note(rows) for layer, rows in detection.items()},
    }


def _steer(
    trial: Trial,
    layers: Sequence[int],
    scorers: Sequence[Scorer],
    concepts: Sequence[str],
    both_signs: bool,
) -> list[SteeringRecord]:
    """Concept by concept over all layers, so that what there is after a while is about whole concepts."""
    if not concepts:
        return []
    records = []
    choices = (False, True) if both_signs else (False,)
    total = len(concepts) * len(layers) * len(trial.rivals(layers[0])) * len(choices)
    with tqdm(total=total, unit="try", desc="steering", disable=not sys.stderr.isatty(), leave=False) as bar:

        def begin(layer: int) -> Callable[[str, str], None]:
            return lambda method, concept: bar.set_postfix_str(f"layer {layer}, {method}, {concept}")

        for concept, layer, choice in product(concepts, layers, choices):
            for record in trial.steer(layer, scorers, (concept,), both_signs=choice, before=begin(layer)):
                records.append(record)
                bar.update()
    return records


def _written(
    run: Run, model: LanguageModel, layers: Sequence[int], llm: Any, top: int
) -> dict[int, dict[str, Any]]:
    """The paper's test with written sentences, for each factorised layer."""
    from .features import by_clarity
    from .labels import label_features, made_by, write_labels
    from .sentences import detect_sentences, write_sentences

    found = {}
    for layer in layers:
        features = sorted(run.features(layer, model), key=by_clarity)
        labels = label_features(features[:top], llm, sides=("input",))
        write_labels(run.labels_folder(layer), labels, made_by(llm, run.features_path(layer)))
        named = [one for one in labels if one.text is not None]
        if not named:
            raise RuntimeError(f"{llm.name} named none of the {len(labels)} features of layer {layer}")
        sentences = write_sentences(named, llm)
        result = detect_sentences(run.factors(layer), model, layer, sentences, scoring="cosine")
        found[layer] = {
            "by": llm.name,
            "asked": len(labels),
            "of": len(features),
            "no_label": sum(one.is_missing for one in labels),
            "no_concept": len(labels) - len(named) - sum(one.is_missing for one in labels),
            "no_sentences": len(named) - len(result.index),
            "features": len(result.index),
            "share_above_zero": result.share_above_zero,
            "interval": list(result.interval),
            "random_above_zero": result.random_above_zero,
            "scores": dict(zip(map(str, result.index.tolist()), result.scores.tolist(), strict=True)),
            "sentences": [asdict(one) for one in sentences],
        }
    return found
