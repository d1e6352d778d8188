"""Arguments and options that several commands of ``snmf`` take. Imports no torch."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .runs import Run

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m or gemma-3-270m (bundled), a .gguf file, a local folder, or a Hub id.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder, made by snmf collect.")]
LayersOption = Annotated[
    str | None, typer.Option(help="Such as 4-6,12.", show_default="every factorised one")
]
OneLayerOption = Annotated[
    str | None, typer.Option("--layers", help="Which layer; one.", show_default="the run's only one")
]
_MOVED = "Where the run's model is now, if it is not where it was; it must have the same weights."
MovedModelOption = Annotated[
    str | None,
    typer.Option(
        "--run-model", "--model", metavar="PATH|NAME", help=_MOVED, show_default="where it was collected from"
    ),
]
# Of commands whose --model is a language model that is asked.
RunModelOption = Annotated[
    str | None,
    typer.Option("--run-model", metavar="PATH|NAME", help=_MOVED, show_default="where it was collected from"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, …", show_default="cuda when there is one, else cpu")
]
ModelDtypeOption = Annotated[
    str, typer.Option(help="Precision the model runs in: float32, bfloat16 or float16.")
]
StartOption = Annotated[
    str, typer.Option(help="Token in front of every text: auto, none, or a token such as '<|endoftext|>'.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        envvar="SNMF_TRUST_REMOTE_CODE",
        help="Let the Hub repository run its own code. Commands on a run of such a model have no option for "
        "it: set the variable to 1.",
    ),
]


def fitted_layers(run: Run, layers: str | None) -> list[int]:
    """The layers that ``--layers`` names, by default every factorised one.

    Raises:
        FileNotFoundError: none is factorised.
        ValueError: a part of ``layers`` cannot be read, or was not collected.
    """
    if layers is not None:
        return run.parse_layers(layers)
    if not run.fitted:
        raise FileNotFoundError(
            f"{run.path} has no factorised layer yet: `snmf fit {shlex.quote(str(run.path))}`"
        )
    return run.fitted


def one_layer(run: Run, layers: str | None) -> int:
    """The layer that ``--layers`` names for a command that takes one, by default a run's only one.

    Raises:
        ValueError: it names several, or none while the run has several; a part cannot be read, or was not collected.
    """
    chosen = run.parse_layers(layers) if layers is not None else run.fitted or run.layers
    if len(chosen) > 1:
        have = ", ".join(map(str, chosen))
        what = (
            f"{run.path} has layers {have}: say which" if layers is None else f"wanted one layer, got {have}"
        )
        raise ValueError(f"--layers: {what}")
    return chosen[0]


def fit_settings(run: Run, layers: Sequence[int], given: Collection[str] = ()) -> dict[str, Any]:
    """``k`` and the other options of :func:`snmf_kernels.fit` by which layers of a run were factorised.

    Args:
        run: a run.
        layers: which; those that are not factorised say nothing.
        given: names of options that are settled, in which the layers may differ.

    Returns:
        Options that are not the solver's own, without the given ones, the seed, and where it was computed; none where
        no layer is factorised.

    Raises:
        ValueError: the layers were not factorised alike.
    """
    import snmf_kernels

    own = {
        name: parameter.default for name, parameter in inspect.signature(snmf_kernels.fit).parameters.items()
    }
    left_out = {"seed", "device", "backend", *given}
    found: dict[int, dict[str, Any]] = {}
    for layer in (layer for layer in layers if run.is_fitted(layer)):
        record = run.record(layer)
        # "auto" is different things to different solvers.
        options = record["options"] | {"neuron_scale": record["solver_options"]["neuron_scale"]}
        found[layer] = {
            name: value
            for name, value in options.items()
            if name not in left_out and own.get(name, ...) != value
        }
    if not found:
        return {}
    first, settings = next(iter(found.items()))
    for layer, other in found.items():
        for name in sorted({*settings, *other}):
            if settings.get(name) != other.get(name):
                raise ValueError(
                    f"--layers: layers {first} and {layer} of {run.path} were factorised with {name} = "
                    f"{settings.get(name)} and {other.get(name)}; give one of them"
                    f"{', or --k' if name == 'k' else ''}"
                )
    return settings
