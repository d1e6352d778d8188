"""Writing files so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_HEADER = "snmf_interp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, which takes its place when the block ends well, else goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checked = {**header, "sha256": _checksum(header, stored)}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata={_HEADER: json.dumps(checked)})


def read_bundle(path: Path, wanted: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of :func:`write_bundle`: its header, and its tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, no such file as ``wanted`` names, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            # Copies, for they begin where torch's own tensors do: on some processors the bits of products depend on it,
            # and what goes on from a file shall end as what was never stopped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} is damaged or no safetensors file ({error})") from error
    if not isinstance(header, dict) or header.get("format") != wanted:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"path: {path} holds {found!r}, wanted {wanted!r}")
    if not isinstance(header.get("version"), int) or header["version"] > version:
        raise ValueError(
            f"path: {path} has version {header.get('version')!r}, this package reads up to {version}; upgrade it"
        )
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise ValueError(f"path: {path} does not match its checksum; it is damaged: make it again")
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


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
