"""The file in which a fit is kept while it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import read_bundle, write_bundle
from ._version import __version__

_FORMAT, _FORMAT_VERSION = "snmf_kernels.checkpoint", 1
_SIGN = "sign of "
# Options that may differ: they only say when to stop.
_FREE = ("max_iter", "tol", "patience")


class Checkpoint:
    """A file with the state of a fit, of which ``read`` makes sure that it is of this one.

    Args:
        path: the file.
        options: the options of the fit, plain JSON values.
        signs: by what else the fit is recognised, up to rounding; tensors by what they are of, for the messages.
    """

    def __init__(
        self, path: str | os.PathLike[str], options: dict[str, Any], signs: dict[str, Tensor]
    ) -> None:
        self._path = Path(path)
        if self._path.is_dir():
            raise ValueError(
                f"checkpoint: wanted a file name, got the folder {self._path}; add a name such as 'fit.ckpt'"
            )
        self._options = {name: value for name, value in options.items() if name not in _FREE}
        self._signs = {name: sign.cpu().double() for name, sign in signs.items()}

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The kept tensors and numbers; None if there is no file.

        Raises:
            ValueError: the file is of another fit, of another version, or damaged.
        """
        if not self._path.exists():
            return None
        header, tensors = read_bundle(
            self._path, "snmf_kernels", self._check, "delete it to begin the fit anew"
        )
        signs = {name: tensors.pop(_SIGN + name, None) for name in self._signs}
        for name, sign in self._signs.items():
            there = signs[name]
            # Sums in another order have other last digits.
            if (
                there is None
                or there.shape != sign.shape
                or not torch.allclose(there, sign, rtol=1e-4, atol=0)
            ):
                raise ValueError(
                    f"checkpoint: {self._path} is of a fit of another {name}; give another file, or delete it to "
                    "begin anew"
                )
        return tensors, header["numbers"]

    def _check(self, header: dict[str, Any], _: dict[str, Tensor]) -> None:
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"checkpoint: {self._path} holds {header.get('format')!r}, wanted {_FORMAT!r}; give another file"
            )
        if header.get("format_version") != _FORMAT_VERSION or header.get("snmf_kernels") != __version__:
            raise ValueError(
                f"checkpoint: {self._path} was written by snmf-kernels {header.get('snmf_kernels')}, this is "
                f"{__version__}, whose fit may take other steps; delete it to begin anew"
            )
        there = header.get("options", {})
        for name in {**there, **self._options}:
            if there.get(name) != self._options.get(name):
                raise ValueError(
                    f"checkpoint: {self._path} was begun with {name} = {there.get(name)!r}, not "
                    f"{self._options.get(name)!r}; give the same options, another file, or delete it to begin anew"
                )

    def write(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Replaces the file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "snmf_kernels": __version__,
            "options": self._options,
            "numbers": numbers,
        }
        write_bundle(
            self._path,
            "snmf_kernels",
            header,
            tensors | {_SIGN + name: sign for name, sign in self._signs.items()},
        )

    def remove(self) -> None:
        """Deletes the file: the fit has ended."""
        self._path.unlink(missing_ok=True)
