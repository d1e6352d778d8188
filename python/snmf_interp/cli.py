"""The ``snmf`` command. Commands that need torch or transformers import them: help comes at once."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar, cast, get_args, get_type_hints

import typer
from rich.logging import RichHandler
from rich.text import Text

from . import (
    compare_command,
    core_command,
    eval_command,
    label_command,
    provenance_command,
    report_command,
    stability_command,
    terminal,
    tree_command,
)
from .arguments import (
    DeviceOption,
    LayersOption,
    ModelArgument,
    ModelDtypeOption,
    MovedModelOption,
    RevisionOption,
    RunArgument,
    StartOption,
    TrustOption,
    fitted_layers,
    one_layer,
)

if TYPE_CHECKING:
    from .features import Feature
    from .models import LanguageModel

app = typer.Typer(
    name="snmf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Take the MLPs of a language model apart into groups of neurons that people can read.\n\n"
    "Start with [bold]snmf demo[/bold]; for a model of your own: collect, then fit, then features and label.",
)

Function = TypeVar("Function", bound=Callable[..., Any])
_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snmf {importlib.metadata.version('snmf-kernels')}")
        raise typer.Exit


@app.callback()
def _main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log messages.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit."),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    handler: logging.Handler = RichHandler(
        console=terminal.errors(), show_time=False, show_path=False, show_level=debug, rich_tracebacks=False
    )
    if not terminal.errors().is_terminal:
        # A message stays on its line, whose end nobody sees.
        handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s",
        handlers=[handler],
        force=True,
    )
    logging.getLogger("snmf_interp").setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        # Those of openai name the addresses that are asked, with the keys that may stand in them.
        for noisy in ("urllib3", "filelock", "httpx", "httpx2", "httpcore", "httpcore2", "openai", "torch"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


class _Command(typer.core.TyperCommand):
    """A command that knows an option by its former name too, which its help does not show."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of the library."""
        known = [
            f"--layers{arg.removeprefix('--layer')}" if arg.partition("=")[0] == "--layer" else arg
            for arg in args
        ]
        return super().parse_args(ctx, known)


def _command(name: str, **renamed: str) -> Callable[[Function], Function]:
    """Register a command whose errors are one line on stderr.

    The exit code is 2 for bad input, 1 for a failure, 130 for Ctrl-C.

    Args:
        name: of the command.
        renamed: arguments of Python functions that the command has under another name: ``{"sizes": "--levels"}``.
    """

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            terminal.work_in(None)
            try:
                function(*args, **kwargs)
            except (typer.Exit, typer.Abort):
                raise
            except KeyboardInterrupt:
                terminal.errors().print(Text(f"\nstopped. {_saved(kwargs)}"), soft_wrap=True)
                raise typer.Exit(130) from None
            except Exception as error:
                if _debug:
                    raise
                bad_input = isinstance(error, ValueError | TypeError | FileNotFoundError | ImportError)
                message = _as_typed(" ".join(str(error).split()), function, renamed) or type(error).__name__
                kind = "error" if bad_input else f"error: {type(error).__name__}"
                terminal.errors().print(Text.assemble((f"{kind}: ", "bold red"), message), soft_wrap=True)
                if not bad_input:
                    terminal.errors().print(Text("`snmf --debug …` shows where it happened", style="dim"))
                raise typer.Exit(2 if bad_input else 1) from error

        return cast(
            Function, app.command(name, cls=_Command, help=_flowing(inspect.getdoc(function) or ""))(guarded)
        )

    return register


def _as_typed(message: str, command: Callable[..., Any], renamed: Mapping[str, str]) -> str:
    """A message that begins with an argument's name, with that of the option by which it was given."""
    name, colon, rest = message.partition(":")
    options = dict(renamed)
    for parameter, hint in get_type_hints(command, include_extras=True).items():
        for option in (one for one in get_args(hint) if isinstance(one, typer.models.OptionInfo)):
            named = [part for part in option.param_decls or () if part.startswith("--")]
            typed = named[0].split("/")[0] if named else f"--{parameter.replace('_', '-')}"
            options.setdefault(typed.removeprefix("--").replace("-", "_"), typed)
    return f"{options[name]}:{rest}" if colon and name in options else message


def _flowing(text: str) -> str:
    """A docstring whose paragraphs are of one line each: how they are broken is up to the terminal."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _saved(arguments: dict[str, Any]) -> str:
    """What a run that was interrupted has kept, and how to go on."""
    target = arguments.get("target")
    named = (
        arguments.get("out") or arguments.get("run") or (target if target and Path(target).is_dir() else None)
    )
    if terminal.working_folder() is None and named is None:
        return "Nothing was to be saved."
    folder = terminal.working_folder() or Path(str(named))
    kept = [
        (len(list(folder.glob(pattern))), what)
        for pattern, what in (
            ("activations/shard-*.safetensors", "finished shard{} of activations"),
            ("layer_*/factors.safetensors", "factorised layer{}"),
            ("eval/layer_*/steering/*/*.json", "finished attempt{} to steer"),
            ("eval-labels/layer_*/*/*.json", "finished attempt{} to steer to a label"),
        )
    ]
    if not kept[0][0]:
        return "Nothing was saved yet; the same command starts afresh."
    counted = " and ".join(f"{count} {what.format('s'[: count != 1])}" for count, what in kept if count)
    return f"{folder} keeps {counted}; what else was finished is kept too, and the same command goes on from there."


@_command("collect")
def collect(
    model: ModelArgument,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="TEXTS",
            help="concepts (the bundled corpus), a text file (one sample a line), or .jsonl/.csv/.json with "
            "text or prompt and optionally label; also compressed, as .jsonl.gz. Empty texts are left out.",
        ),
    ],
    layers: Annotated[
        str, typer.Option(help="Such as 4-6,12 or all, or hook names: blocks.6.mlp.hook_post.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run. A collection cut short there is resumed.")],
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Cut longer texts to this many tokens.")] = 512,
    chunk: Annotated[
        int | None, typer.Option(help="Read a text file whole and cut it every so many words.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Stored precision: float32, bfloat16 or float16.", show_default="the model's"),
    ] = None,
    sink_threshold: Annotated[
        float,
        typer.Option(help="Leave out tokens whose activation norm exceeds this many medians; 0 keeps them."),
    ] = 5.0,
    padding_side: Annotated[str, typer.Option(help="right or left; the result is the same.")] = "right",
    shard_tokens: Annotated[
        int | None, typer.Option(help="Tokens per shard.", show_default="about 128 MB a shard")
    ] = None,
    model_dtype: ModelDtypeOption = "float32",
    device: DeviceOption = None,
    start_token: StartOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Run MODEL over TEXTS and keep the hidden activations of its MLPs.

    All layers are collected in one pass. Padding, the first position, special tokens and attention sinks are
    left out, and the counts are reported. Interrupt it whenever you like: the same command resumes.
    """
    from .runs import Run
    from .texts import read_texts

    samples = read_texts(texts, chunk=chunk)
    loaded = terminal.load_model(model, model_dtype, device, start_token, revision, trust_remote_code)
    started = time.perf_counter()
    run = Run.collect(
        out,
        loaded,
        samples,
        layers,
        texts=texts,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=dtype,
        sink_threshold=sink_threshold or None,
        padding_side=padding_side,
        shard_tokens=shard_tokens,
    )
    screen = terminal.console()
    terminal.done(
        screen,
        f"activations of layers {', '.join(map(str, run.layers))} in {out}",
        time.perf_counter() - started,
    )
    terminal.counts(screen, run)
    screen.print(Text(f"\nNext: {terminal.command()} fit {shlex.quote(str(out))} --k 100"), soft_wrap=True)


@_command("fit")
def fit(
    run: RunArgument,
    k: Annotated[
        str, typer.Option(help="Features per layer, or auto: the number that several starts agree on.")
    ] = "100",
    k_candidates: Annotated[
        str | None,
        typer.Option(
            help="For --k auto, such as 25,50,100.", show_default="doubling up to 400, fewer for few tokens"
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 4-6,12.", show_default="all that were collected")
    ] = None,
    keep: Annotated[float, typer.Option(help="Fraction of neurons that a feature keeps.")] = 0.01,
    neuron_scale: Annotated[
        str,
        typer.Option(
            help="rms divides each neuron by its RMS first, so that no few neurons decide; or none.",
            show_default="rms, and none for --solver mu",
        ),
    ] = "auto",
    solver: Annotated[str, typer.Option(help="auto, or mu: the paper's iteration.")] = "auto",
    refit: Annotated[
        str | None,
        typer.Option(
            help="late, always or never: whether supports are chosen anew for a smaller loss. "
            "Those of never detect and steer better.",
            show_default="late",
        ),
    ] = None,
    init: Annotated[
        str, typer.Option(help="kmeans, random or svd.", show_default="kmeans, and random for --solver mu")
    ] = "auto",
    max_iter: Annotated[
        int | None, typer.Option(help="Most iterations.", show_default="the solver's")
    ] = None,
    tol: Annotated[
        float | None, typer.Option(help="Relative gain that counts as progress.", show_default="the solver's")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Iterations without progress before it stops.", show_default="the solver's"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random start.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cuda.", show_default="cpu")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, cpp, triton, cuda or torch.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace fits made with other options.")
    ] = False,
) -> None:
    """Factorise the activations of a run, layer by layer. Layers that are finished already are kept.

    With --k auto each candidate is fitted from five starts on 80 % of the texts, and the largest k is chosen whose
    features are found again as surely as those of any; the table goes into DIR/layer_N/fit.json.
    """
    from .runs import Run

    sizes = stability_command.Sizes.of(k, k_candidates)
    opened = Run.open(run)
    wanted = opened.parse_layers(layers)
    screen = terminal.console()
    choices: dict[str, bool | str] = {"late": "late", "always": True, "never": False}
    if refit is not None and refit not in choices:
        raise ValueError(f"--refit: wanted {', '.join(choices)}, got {refit!r}")
    # What is not given is the solver's to choose.
    limits: dict[str, Any] = {
        "max_iter": max_iter,
        "tol": tol,
        "patience": patience,
        "device": device,
        "refit": None if refit is None else choices[refit],
    }
    options: dict[str, Any] = {
        "keep": keep,
        "neuron_scale": None if neuron_scale == "none" else neuron_scale,
        "solver": solver,
        "init": init,
        "seed": seed,
        "backend": backend,
        **{name: value for name, value in limits.items() if value is not None},
    }
    if sizes.k is None:
        for layer in wanted:
            stability_command.fit_chosen(screen, opened, layer, sizes, options, overwrite=overwrite)
    else:
        records = opened.fit(wanted, sizes.k, overwrite=overwrite, progress=sys.stderr.isatty(), **options)
        for layer, record in records:
            terminal.fitted(screen, layer, record)
    screen.print(
        Text(f"\nNext: {terminal.command()} features {shlex.quote(str(run))} --layers {wanted[0]}"),
        soft_wrap=True,
    )


@_command("features")
def features(
    run: RunArgument,
    layers: LayersOption = None,
    feature: Annotated[int | None, typer.Option(help="Show one feature of one layer in full.")] = None,
    top: Annotated[int, typer.Option(help="Features to list per layer.")] = 10,
    sort: Annotated[str, typer.Option(help="clarity, energy or index.")] = "clarity",
    concept: Annotated[
        str | None, typer.Option(help="Only features whose best concept is this label.")
    ] = None,
    contexts: Annotated[int, typer.Option(help="Contexts per feature.")] = 3,
    effects: Annotated[
        bool | None,
        typer.Option(
            "--effects/--no-effects",
            help="Measure what every feature of the layer does to the next word, or measure nothing.",
            show_default="those that are shown; with --json, nothing",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line instead of a table.")
    ] = False,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Show what the features of a factorised run stand for.

    Each has its strongest tokens in context, the words that rise when it is added (→, measured at a divergence of 0.25
    nats behind sixteen prompts), its neurons, and how much of the data it explains. The first call describes all
    features (which needs the model) and keeps them in DIR/layer_N/features.jsonl; what was measured is kept beside it.
    """
    import json
    from dataclasses import asdict

    from . import show
    from .features import by_clarity
    from .runs import Run

    keys: dict[str, Callable[[Feature], Any]] = {
        "clarity": by_clarity,
        "energy": lambda f: (-f.energy, f.index),
        "index": lambda f: f.index,
    }
    if sort not in keys:
        raise ValueError(f"--sort: wanted clarity, energy or index, got {sort!r}")
    opened = Run.open(run)
    chosen = fitted_layers(opened, layers) if feature is None else [one_layer(opened, layers)]
    screen = terminal.console()
    load = terminal.loader(opened, device, model=run_model)
    for number in chosen:

        def wanted(described: list[Feature], number: int = number) -> list[Feature]:
            if feature is not None:
                if not 0 <= feature < len(described):
                    raise ValueError(
                        f"--feature: layer {number} has features 0-{len(described) - 1}, got {feature}"
                    )
                return [described[feature]]
            if concept is not None:
                described = _of_concept(described, concept, number)
            return sorted(described, key=keys[sort])[: None if as_json else top]

        def measured(described: list[Feature], choose: Any = wanted) -> list[Feature]:
            if effects:
                return described
            return [] if effects is False or as_json else choose(described)

        every = terminal.with_effects_of(opened, number, load, measured)
        found = wanted(every)
        if as_json:
            for row in found:
                typer.echo(json.dumps(asdict(row), ensure_ascii=False))
        elif feature is not None:
            screen.print(show.feature_page(found[0], screen.width, marks=not screen.is_terminal))
        else:
            screen.print(Text(f"\nLayer {number}, {len(every)} features by {sort}\n", style="bold"))
            screen.print(
                show.feature_table(found, screen.width, marks=not screen.is_terminal, contexts=contexts)
            )
            screen.print(show.table_notes(found, opened.mean_active(number), opened.model_facts))


def _of_concept(features: list[Feature], concept: str, layer: int) -> list[Feature]:
    from .texts import label_name

    # Runs of earlier versions have labels as they were written.
    wanted = label_name(concept)
    named = [
        feature
        for feature in features
        if feature.concept is not None and label_name(feature.concept) == wanted
    ]
    if not named:
        there = ", ".join(sorted({feature.concept for feature in features if feature.concept}))
        raise ValueError(
            f"--concept: no feature of layer {layer} has {concept!r} as its best concept; "
            f"there are {there or 'none that a feature ranks better than chance'}"
        )
    return named


@_command("steer", targets="--kl")
def steer(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A run with a factorised layer; or a model, to steer by --vector or --neurons.",
        ),
    ],
    layers: Annotated[
        str | None,
        typer.Option(help="Which layer; one.", show_default="a run's only one; a MODEL has none"),
    ] = None,
    feature: Annotated[int | None, typer.Option(help="Which feature of the run.")] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Any direction over the layer's neurons, a .npy file.")
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(help="Such as 3,17-20: these neurons; with --feature or --vector, its part on them."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; may be given several times.", show_default="I think that, as in the paper"
        ),
    ] = None,
    kl: Annotated[
        list[float] | None,
        typer.Option(
            help="How far the next-token distribution is to move, in nats; may be given several times.",
            show_default="0.25",
        ),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Instead of --kl, in units of activation; may be given several times."),
    ] = None,
    negative: Annotated[bool, typer.Option("--negative", help="Steer the other way.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Steer both ways.")] = False,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Instead of adding it: take away what the feature contributes (as encode finds it beside the others); "
            "of a vector the projection on it; of neurons all.",
        ),
    ] = False,
    clamp: Annotated[
        float | None,
        typer.Option(
            help="Instead of adding it: hold the feature's strength at this value, as tables show it; of a vector the "
            "projection on it; of neurons their activations."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation.")] = 50,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest token.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of this total probability; 1 for all.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    model_dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision a MODEL runs in: float32, bfloat16 or float16.",
            show_default="float32; a run's own",
        ),
    ] = None,
    run_model: MovedModelOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show what the model writes with a feature turned up, down or off, beside what it writes without.

    At every position the feature's direction is added to the neurons' activations, as strongly as moves the
    next-token distribution by --kl. Where no strength does, the table says so and shows the strongest effect.
    Steered and unsteered texts meet the same chance: they differ only as far as the predictions do.
    """
    import json

    from . import steer_command
    from .runs import ACTIVATIONS, Run

    opened = Run.open(target) if (Path(target) / ACTIVATIONS).is_dir() else None
    request = steer_command.Request(
        steer_command.layer_of(target, opened, layers),
        feature,
        vector,
        neurons,
        tuple(kl or ()),
        tuple(strength or ()),
        negative,
        both,
        ablate,
        clamp,
    )
    settled = {"--model-dtype": model_dtype, "--revision": revision}
    if opened is not None and (given := [name for name, value in settled.items() if value is not None]):
        raise ValueError(f"{given[0]}: a run's model is loaded as it was collected")
    if opened is None and run_model is not None:
        raise ValueError(f"--run-model: {target} is no run, but the model itself; leave it out")

    def load() -> LanguageModel:
        if opened is None:
            return terminal.load_model(
                target,
                model_dtype or "float32",
                device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        return terminal.loader(opened, device, trust_remote_code, run_model)()

    result = steer_command.run(
        terminal.console(),
        request,
        opened,
        load,
        prompt or ["I think that"],
        quiet=as_json,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))


_command("label")(label_command.label)
_command("detect")(eval_command.detect)
_command("eval")(eval_command.evaluate)
_command("report")(report_command.report)


_command("tree", most="--children")(tree_command.tree)

_command("core", n_random="--random", n_controls="--controls", count="--controls")(core_command.core)
_command("neuron")(provenance_command.neuron)
_command("overlap")(provenance_command.overlap)
_command("nearest", count="--top")(provenance_command.nearest)
_command("stability", count="--seeds")(stability_command.stability)
_command("compare", n_tokens="--contexts", described="--top")(compare_command.compare)


@_command("demo")
def demo(
    model: Annotated[str, typer.Option(help="smollm2-135m or gemma-3-270m.")] = "smollm2-135m",
    out: Annotated[
        Path, typer.Option(help="The results go into a folder of the model's name in here.")
    ] = Path("results"),
    top: Annotated[int, typer.Option(help="Features to show per layer.")] = 6,
) -> None:
    """The whole story on a small real model: collect, factorise, and read what groups of neurons stand for.

    Needs no account and no GPU. A few minutes the first time, most of it the model; seconds when run again.
    """
    from . import demo as story

    story.run(terminal.console(), model, out, top)


@_command("doctor")
def doctor(
    model: ModelArgument,
    model_dtype: ModelDtypeOption = "float32",
    device: DeviceOption = None,
    start_token: StartOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check that what is captured from MODEL is what MODEL computes, and that MODEL is left as it was.

    Each check is a line with its measured number. The exit code is 1 when one fails.
    """
    loaded = terminal.load_model(model, model_dtype, device, start_token, revision, trust_remote_code)
    from .doctor import check_model

    screen = terminal.console()
    screen.print(
        Text.assemble(
            (loaded.name, "bold"),
            f"  {type(loaded.model).__name__}, {loaded.n_layers} layers, {loaded.d_mlp(0)} neurons, "
            f"width {loaded.d_model}\n"
            f"  site {loaded.hf_hook_name(0).replace('.0.', '.N.', 1)}",
        )
    )
    failed = 0
    for check in check_model(loaded):
        failed += not check.passed
        mark = ("✓ ", "bold green") if check.passed else ("✗ ", "bold red")
        screen.print(Text.assemble(mark, check.name, (f"\n  {check.measured}", "dim")))
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of ``snmf``. ``--debug`` may stand anywhere.

    A reader who has enough (``| head``) ends the command without a word, with the exit code of the shell's own tools.
    """
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    out, errors = terminal.Pipe(sys.stdout), terminal.Pipe(sys.stderr)
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, errors)):
        try:
            app(arguments)
        finally:
            # Little output is still to be written, and then the reader may have gone.
            out.flush()


if __name__ == "__main__":
    main()
