"""What a measurement ran on, to be kept beside it: times of different machines or code are no series."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import snmf_kernels

FACTS = ("processor", "threads", "torch", "snmf_kernels", "commit")


def facts() -> dict[str, Any]:
    """Processor, threads, versions, and the commit of the checkout (with + where it has changes of its own)."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "snmf_kernels": snmf_kernels.__version__,
        "commit": commit(),
    }


def processor() -> str:
    """The name that Linux has for it; family and model too, since virtual machines give many the same name."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    kind = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    return " ".join([found.get("model name", "unknown"), *kind])


@cache
def commit() -> str:
    """The commit of this checkout when it was first asked for, as the code was loaded; "unknown" outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Of the code: results are being written meanwhile.
        changed = git("status", "--porcelain", "--untracked-files=no", "snmf_kernels", "csrc", "python")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def described(rows: Iterable[Mapping[str, Any]]) -> str:
    """The machines of some rows in words; more than one where the rows must not be compared with each other."""
    kinds = {tuple((name, row.get(name, "unknown")) for name in FACTS) for row in rows}
    return "; ".join(
        "{processor}, {threads} threads, torch {torch}, commit {commit}".format(**dict(kind))
        for kind in sorted(kinds, key=str)
    )
