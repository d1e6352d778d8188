"""Arguments and options that several commands of ``snmf`` take. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m or gemma-3-270m (bundled), a .gguf file, a local folder, or a Hub id.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder, made by snmf collect.")]
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
        help="Let the Hub repository run its own code. Commands on a run of such a model ask for the variable too.",
    ),
]
