"""Writing files so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snmf_kernels import _files
from snmf_kernels._files import replacing

logger = logging.getLogger(__name__)

_HEADER, _REMEDY = "snmf_interp", "make it again"
# In a safetensors file: the CRC-32 of each tensor's bytes, as JSON. It takes 0.3 s a GB, and SHA-256 three times as
# much; it is to find damage, not forgery.
_CHECKSUMS = "crc32"
# A place that cannot be written, for whatever reason, and not a fault of what is written.
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Inside the block, of all processes that lock this folder by this name, this one alone is in its block.

    For files that are read, changed and written as one step. The lock goes with the process that holds it.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / name):
        yield


@contextlib.contextmanager
def keeping(what: str, place: Path) -> Iterator[None]:
    """A block that only writes down what can be found again: where that is impossible, the log says so, once.

    Args:
        what: is written, in the plural.
        place: where.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _not_kept(what, place, os.strerror(error.errno))


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the nearest one above it that is there."""
    return folder.is_dir() and os.access(folder, os.W_OK) if folder.exists() else is_writable(folder.parent)


@functools.cache
def _not_kept(what: str, place: Path, reason: str) -> None:
    logger.warning("%s could not be kept in %s: %s", what, place, reason)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Half of a pair of surrogates, which has none, is written as its escape, which JSON reads."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, with a checksum of each tensor for :func:`check_tensors`."""
    from safetensors.torch import save_file

    checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={_CHECKSUMS: json.dumps(checksums, sort_keys=True)})


def check_tensors(path: Path, names: Iterable[str]) -> None:
    """Compare tensors of a file of :func:`write_tensors` with their checksums, each once while the file is the same.

    A file of an older version has no checksums, and passes.

    Raises:
        ValueError: a tensor is not as it was written, or is missing.
    """
    state = path.stat()
    for name in names:
        _check_tensor(path.resolve(), name, (state.st_ino, state.st_mtime_ns, state.st_size))


@functools.cache
def _check_tensor(path: Path, name: str, _state: tuple[int, int, int]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _CHECKSUMS not in metadata:
            return
        wanted = json.loads(metadata[_CHECKSUMS]).get(name)
        if name not in file.keys() or _crc32(file.get_tensor(name)) != wanted:  # noqa: SIM118 - it is not a dict
            raise ValueError(f"{name} does not match its checksum")


def _crc32(tensor: Tensor) -> int:
    """Of the bytes of a tensor on the CPU, which are not copied."""
    if not tensor.numel():
        return 0
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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

    return _files.read_bundle(
        path, _HEADER, lambda header, _: _check_header(path, header, wanted, version), _REMEDY
    )


def read_header(path: Path, wanted: str, version: int) -> dict[str, Any]:
    """The header alone of such a file, without reading its tensors; the errors are those of :func:`read_bundle`."""
    header = _files.read_header(path, _HEADER, _REMEDY)
    _check_header(path, header, wanted, version)
    return header


def _check_header(path: Path, header: dict[str, Any], wanted: str, version: int) -> None:
    if header.get("format") != wanted:
        raise ValueError(f"path: {path} holds {header.get('format')!r}, wanted {wanted!r}")
    if not isinstance(header.get("version"), int) or header["version"] > version:
        raise ValueError(
            f"path: {path} has version {header.get('version')!r}, this package reads up to {version}; upgrade it"
        )


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
