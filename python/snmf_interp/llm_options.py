"""The options of commands that ask a language model. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import terminal

if TYPE_CHECKING:
    from .judging import Qualification
    from .llm import LocalModel, OpenAIModel

LlmOption = Annotated[
    str | None,
    typer.Option(
        help="A model behind an OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY.",
        show_default="SNMF_LLM_MODEL, where --base-url is given",
    ),
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        help="The endpoint, such as http://localhost:8000/v1.", show_default="OPENAI_BASE_URL, else OpenAI's"
    ),
]
LocalOption = Annotated[
    str | None, typer.Option(help="A Hugging Face chat model to ask in this process instead.")
]
ConcurrencyOption = Annotated[int, typer.Option(help="Most requests under way at once.")]
TimeoutOption = Annotated[float, typer.Option(help="Seconds that an endpoint has for one answer.")]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A field of every request, such as temperature=1; =null leaves a default out. With --local: max_tokens."
    ),
]


def chosen(
    cache: Path,
    model: str | None,
    base_url: str | None,
    local: str | None,
    concurrency: int,
    timeout: float,
    parameter: list[str] | None,
    device: str | None,
) -> OpenAIModel | LocalModel | None:
    """The language model that the options name, or None.

    Args:
        cache: where its answers are kept.
        model, base_url, local, concurrency, timeout, parameter, device: as on the command line.

    Raises:
        ValueError: options that contradict each other.
    """
    from .endpoint_keys import Secrets, keys_in
    from .llm import LocalModel, OpenAIModel

    parameters = _parameters(parameter)
    if parameters and model is None and base_url is None and local is None:
        raise ValueError(
            "--parameter is a field of requests to a language model; it needs --model, --base-url or --local"
        )
    if local is not None:
        if model is not None or base_url is not None:
            raise ValueError(
                "--local: a model in this process has no --model or --base-url; give one of them"
            )
        length = parameters.pop("max_tokens", None)
        if parameters or not (length is None or isinstance(length, int)):
            raise ValueError(
                "--parameter: a model in this process takes max_tokens=NUMBER alone, got "
                f"{Secrets(keys_in(_parameters(parameter))).hide(', '.join(parameter or []))}"
            )
        with terminal.waiting(f"loading {local}"):
            return LocalModel.load(local, device=device, cache=cache, max_tokens=length)
    if model is None and base_url is None:
        return None
    return OpenAIModel(
        model,
        base_url=base_url,
        cache=cache,
        concurrency=concurrency,
        timeout=timeout,
        parameters=parameters,
    )


def qualified(llm: OpenAIModel | LocalModel) -> Qualification:
    """How a judge did on texts of known scores.

    Raises:
        ValueError: it does not qualify.
    """
    from .judging import qualify

    with terminal.waiting(f"asking {llm.name} to judge texts of known scores"):
        found = qualify(llm)
    found.check()
    return found


def _parameters(given: list[str] | None) -> dict[str, Any]:
    """``["temperature=1", "top_p=null"]`` as a dictionary; what is not JSON is text."""
    parameters: dict[str, Any] = {}
    for part in given or []:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"--parameter: wanted name=value, got {part!r}")
        try:
            parameters[name] = json.loads(value)
        except json.JSONDecodeError:
            parameters[name] = value
    return parameters
