"""Writing files so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from snmf_kernels import _files
from snmf_kernels._files import replacing

_HEADER = "snmf_interp"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Half of a pair of surrogates, which has none, is written as its escape, which JSON reads."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary)


def write_bundle(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file with a JSON header, which :func:`read_bundle` checks.

    Args:
        path: the file.
        header: JSON values; its ``format`` and ``version`` say what the file is.
        tensors: the rest.
    """
    _files.write_bundle(path, _HEADER, header, tensors)


def read_bundle(path: Path, wanted: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of :func:`write_bundle`: its header, and its tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, no such file as ``wanted`` names, or of a newer version.
    """

    def check(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if header.get("format") != wanted:
            raise ValueError(f"path: {path} holds {header.get('format')!r}, wanted {wanted!r}")
        if not isinstance(header.get("version"), int) or header["version"] > version:
            raise ValueError(
                f"path: {path} has version {header.get('version')!r}, this package reads up to {version}; upgrade it"
            )

    return _files.read_bundle(path, _HEADER, check, "make it again")


def read_versioned(path: Path, wanted: int) -> dict[str, Any]:
    """Read a JSON object whose ``format`` is ``wanted``.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    content = read_json(path)
    if content.get("format") != wanted:
        raise ValueError(
            f"{path.parent} has format {content.get('format')!r}; this version reads format {wanted}"
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to start afresh") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: wanted a JSON object, got {type(content).__name__}")
    return content


def finite(value: Any) -> Any:
    """A copy of nested mappings and lists with None in place of NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
