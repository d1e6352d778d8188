"""Steered and unsteered texts that are kept on disk, so that none is written twice."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .generation import Continuation
from .runs import versions
from .steering_protocol import Protocol, SteeringRecord, Unsteered, record_from_json, unsteered

if TYPE_CHECKING:
    from .models import LanguageModel

FORMAT = 1


def open_plan(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> None:
    """Begin a comparison in a folder, or go on with it: ``plan.json`` says what shapes its numbers.

    What is None there has not been decided yet, and may be now.

    Raises:
        ValueError: the folder has a comparison of another plan.
    """
    # Two commands may begin at once: the second then finds the plan of the first.
    with files.locked(folder.parent) if files.is_writable(folder) else contextlib.nullcontext():
        _write_plan(folder, wanted, overwrite=overwrite)


def _write_plan(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> None:
    wanted = json.loads(json.dumps(wanted)) | {"format": FORMAT}
    there: dict[str, Any] = {}
    if (folder / "plan.json").is_file():
        # Earlier versions divided equal texts like others.
        there = {"equal_texts": 0} | files.read_versioned(folder / "plan.json", FORMAT)
        settled = {name: value for name, value in there.items() if value is not None}
        differing = [name for name in wanted if settled.get(name, wanted[name]) != wanted[name]]
        if differing and not overwrite:
            name = differing[0]
            raise ValueError(
                f"{folder} has a comparison with {name} = {there.get(name)}, not {wanted[name]}; use --overwrite "
                "(overwrite=True) to replace it, or another run folder"
            )
        if differing:
            shutil.rmtree(folder)
            there = {}
    with files.keeping("plans", folder):
        files.write_json(folder / "plan.json", wanted | {"versions": there.get("versions", versions())})


def kept_unsteered(path: Path, model: LanguageModel, protocol: Protocol) -> Unsteered:
    """The texts that the model writes without steering, made if they are not there."""
    if not path.is_file():
        files.write_json(path, {"format": FORMAT} | asdict(unsteered(model, protocol)))
    there = files.read_versioned(path, FORMAT)
    return Unsteered(
        *(
            tuple(Continuation(one["prompt"], one["text"], tuple(one["token_ids"])) for one in there[half])
            for half in ("choosing", "reporting")
        )
    )


def kept_attempt(
    path: Path, is_done: Callable[[SteeringRecord], bool], make: Callable[[], SteeringRecord]
) -> SteeringRecord:
    """An attempt to steer, made if it is not there or not done."""
    if path.is_file():
        record = record_from_json(files.read_json(path))
        if is_done(record):
            return record
    record = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, asdict(record))
    return record
