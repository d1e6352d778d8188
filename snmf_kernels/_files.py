"""Writing files so that no reader, and no run that was killed, ever meets half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name, whose content takes the place of ``path`` when the block ends well, else goes.

    A regular file is replaced whole or not at all, also over a power cut, with the permissions that the umask gives; a
    link stays one. What is no regular file (a FIFO, a terminal, ``/dev/stdout``) is written into.
    """
    stream = path.exists() and (
        not path.is_file() or path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
    )
    if stream:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "content"
            yield temporary
            with temporary.open("rb") as content, path.open("wb") as target:
                shutil.copyfileobj(content, target)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        # Libraries that write a file of their own and rename it give it other permissions.
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bundle(path: Path, key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file with a JSON header, of which ``read_bundle`` checks a checksum.

    Args:
        path: the file.
        key: the header's name in the file.
        header: JSON values.
        tensors: the rest.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checked = {**header, "sha256": _checksum(header, stored)}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata={key: json.dumps(checked)})


def read_bundle(
    path: Path, key: str, check: Callable[[dict[str, Any], dict[str, Tensor]], None], remedy: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, on the CPU, of a file of ``write_bundle``.

    Args:
        path: the file.
        key: as it was written.
        check: raises ValueError where header or tensors are none that the caller reads; asked before the checksum.
        remedy: what to do about a damaged file, for the messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or not such a file.
    """
    header, tensors = _read(path, key, remedy, with_tensors=True)
    check(header, tensors)
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise ValueError(f"path: {path} does not match its checksum; it is damaged: {remedy}")
    return header, tensors


def read_header(path: Path, key: str, remedy: str) -> dict[str, Any]:
    """The header alone of a file of ``write_bundle``, whose tensors are not read and whose checksum is not compared.

    Args and errors are those of :func:`read_bundle`.
    """
    header, _ = _read(path, key, remedy, with_tensors=False)
    header.pop("sha256", None)
    return header


def _read(
    path: Path, key: str, remedy: str, *, with_tensors: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, for they begin where torch's own tensors do: on some processors the bits of products depend on
            # it, and what goes on from a file shall end as what was never stopped.
            for name in file.keys() if with_tensors else ():  # not a mapping
                tensors[name] = file.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"path: {path} is damaged or no safetensors file ({error}); {remedy}") from error
    if key not in metadata:
        raise ValueError(f"path: {path} has no {key} header, so it is none of this package's files")
    try:
        header = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"path: {path} has an unreadable header ({error}); it is damaged: {remedy}"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"path: {path} holds {header!r}, wanted a header of names and values; {remedy}")
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and of all tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # No copy of the bytes; a flat view, since memory without elements has no other.
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk, where the file system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
