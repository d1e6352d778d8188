"""Activations of a corpus, on disk in shards or in memory, read as ``[tokens, neurons]`` per layer.

A store on disk is a folder:

    plan.json            what is collected: every option that shapes the numbers, and the samples of each shard
    tokens.safetensors   ids of all tokens of all samples, one after another, and where each sample begins
    samples.jsonl        id and label of each sample, and the first sample that has the same text
    shard-00000.safetensors …   per layer the activations, token-major; each token's place among all tokens; norms
    manifest.json        written last: counts, and each layer's limit above which a token is a sink

Shards hold every token that is text by its id and position. Whether a token is a *sink* depends on the median
norm over the whole corpus, so sinks are left out on reading: a run that was resumed gives the same bits as
one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .equal_texts import first_equal

FORMAT = 1
MANIFEST, PLAN, TOKENS, SAMPLES = "manifest.json", "plan.json", "tokens.safetensors", "samples.jsonl"
# Files with the names of :func:`shard_name`.
SHARDS = "shard-*.safetensors"


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


@dataclass(frozen=True)
class Corpus:
    """The tokens of all samples, one after another: sample ``i`` is ``ids[offsets[i]:offsets[i+1]]``."""

    ids: Tensor
    offsets: Tensor
    sample_ids: list[str]
    labels: list[str | None]
    same_as: list[int] | None = None

    @cached_property
    def groups(self) -> Tensor:
        """For each sample the first one of the same text, ``[n_samples]`` int64: see :func:`text_groups`.

        Texts that are the same as far as they were collected count as the same too.
        """
        tokens = [tuple(self.tokens_of(sample)) for sample in range(len(self.sample_ids))]
        return first_equal(tokens, *([] if self.same_as is None else [self.same_as]))

    @property
    def n_equal(self) -> int:
        """How many samples have the text of one before them."""
        return len(self.groups) - len(self.groups.unique())

    @cached_property
    def sample_of(self) -> Tensor:
        """Which sample each token belongs to, ``[T]``."""
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.offsets.diff())

    def tokens_of(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        first, end = int(self.offsets[sample]), int(self.offsets[sample + 1])
        ids: list[int] = self.ids[first:end].tolist()
        return ids

    def context(self, place: int, window: int) -> tuple[list[int], int, list[int]]:
        """Ids before, at and after a token, at most ``window`` on each side and never past its sample."""
        sample = int(self.sample_of[place])
        first, end = int(self.offsets[sample]), int(self.offsets[sample + 1])
        before: list[int] = self.ids[max(first, place - window) : place].tolist()
        after: list[int] = self.ids[place + 1 : min(end, place + 1 + window)].tolist()
        return before, int(self.ids[place]), after

    def save(self, folder: Path) -> None:
        """Write tokens.safetensors and samples.jsonl."""
        files.write_tensors(folder / TOKENS, {"ids": self.ids, "offsets": self.offsets})
        rows = (
            {"id": id, "label": label, "same_as": first}
            for id, label, first in zip(self.sample_ids, self.labels, self.groups.tolist(), strict=True)
        )
        files.write_text(
            folder / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: a file is missing or damaged.
        """
        tensors = read_tensors(folder / TOKENS)
        check_tensors(folder / TOKENS, ("ids", "offsets"))
        path = folder / SAMPLES
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            ids, labels = [row["id"] for row in rows], [row["label"] for row in rows]
            # Earlier versions wrote no "same_as".
            same_as = [row["same_as"] for row in rows] if all("same_as" in row for row in rows) else None
            if len(rows) != len(tensors["offsets"]) - 1:
                raise ValueError(f"{len(rows)} samples of {len(tensors['offsets']) - 1}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        return cls(tensors["ids"], tensors["offsets"], ids, labels, same_as)


@dataclass(frozen=True)
class ActivationStore:
    """Hidden MLP activations of a corpus. Get one from :func:`snmf_interp.collect` or :meth:`open`.

    A *place* is a token's index among all tokens of the corpus; :meth:`places` has those of the rows of
    :meth:`layer`.
    """

    corpus: Corpus
    plan: dict[str, Any]
    manifest: dict[str, Any]
    path: Path | None = None
    _shards: Sequence[Mapping[str, Tensor]] = field(default=(), repr=False)

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open a finished store.

        Of the activations themselves, checksums are compared when a layer is read.

        Raises:
            FileNotFoundError: there is no store, or its collection has not finished.
            ValueError: a file is missing, damaged or of another format.
        """
        folder = Path(path)
        if not (folder / PLAN).is_file():
            raise FileNotFoundError(
                f"{folder} holds no activations; collect them first (`snmf collect MODEL TEXTS --out DIR`)"
            )
        plan = files.read_versioned(folder / PLAN, FORMAT)
        if not (folder / MANIFEST).is_file():
            done = sum((folder / shard_name(i)).is_file() for i in range(len(plan["shards"])))
            raise FileNotFoundError(
                f"{folder} is unfinished ({done} of {len(plan['shards'])} shards); "
                "run the same collect command again to resume"
            )
        paths = [folder / shard_name(i) for i in range(len(plan["shards"]))]
        shards = [read_tensors(path) for path in paths]
        for shard in paths:
            check_tensors(shard, ("places", "norms"))
        return cls(Corpus.load(folder), plan, files.read_json(folder / MANIFEST), folder, shards)

    def check(self) -> None:
        """Compare all activations with their checksums: 0.3 s a GB, beside reading them.

        Raises:
            ValueError: a shard is damaged (the message names it).
        """
        for layer in self.layers:
            self._check_shards(layer)

    @property
    def layers(self) -> list[int]:
        """The layers that were collected."""
        return [int(layer) for layer in self.plan["options"]["layers"]]

    @property
    def counts(self) -> dict[str, Any]:
        """How many tokens were kept and left out, by reason; sinks and kept tokens per layer."""
        counts: dict[str, Any] = self.manifest["counts"]
        return counts

    def layer(self, layer: int) -> Tensor:
        """Activations ``[n, d_mlp]`` in the stored dtype, sinks left out, samples in their order.

        A view of the mapped file when there is one shard and no sink; else one copy of the wanted rows, shard
        by shard. Checksums are compared when a process first reads a layer, which takes 0.3 s a GB.

        Raises:
            ValueError: the layer was not collected, or a shard is damaged (the message names it).
        """
        self._check(layer)
        self._check_shards(layer)
        name = f"layer_{layer}"
        if len(self._shards) == 1 and bool(self._kept(layer).all()):
            return self._shards[0][name]
        kept = self._kept(layer).split([len(shard["places"]) for shard in self._shards])
        first = self._shards[0][name]
        rows = torch.empty(int(self._kept(layer).sum()), first.shape[1], dtype=first.dtype)
        start = 0
        for shard, keep in zip(self._shards, kept, strict=True):
            where = keep.nonzero().squeeze(1)
            torch.index_select(shard[name], 0, where, out=rows[start : start + len(where)])
            start += len(where)
        return rows

    def places(self, layer: int) -> Tensor:
        """Where each row of :meth:`layer` stands among all tokens of the corpus, ``[n]`` int64."""
        self._check(layer)
        return torch.cat([shard["places"] for shard in self._shards])[self._kept(layer)]

    def tokens(self, layer: int) -> Tensor:
        """Token id of each row of :meth:`layer`, ``[n]``."""
        return self.corpus.ids[self.places(layer)]

    def samples(self, layer: int) -> Tensor:
        """Sample index of each row of :meth:`layer`, ``[n]``."""
        return self.corpus.sample_of[self.places(layer)]

    def positions(self, layer: int) -> Tensor:
        """Position of each row of :meth:`layer` in its sample, ``[n]``; 0 is the start token."""
        places = self.places(layer)
        return places - self.corpus.offsets[self.corpus.sample_of[places]]

    def _kept(self, layer: int) -> Tensor:
        row = self.layers.index(layer)
        norms = torch.cat([shard["norms"][row] for shard in self._shards])
        return norms <= self.manifest["layers"][str(layer)]["norm_limit"]

    def _check_shards(self, layer: int) -> None:
        if self.path is not None:
            for index in range(len(self._shards)):
                check_tensors(self.path / shard_name(index), (f"layer_{layer}",))

    def _check(self, layer: int) -> None:
        if layer not in self.layers:
            have = ", ".join(map(str, self.layers))
            raise ValueError(f"layer {layer!r} was not collected; this store has {have}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped rather than read.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def check_tensors(path: Path, names: Iterable[str]) -> None:
    """Compare tensors with their checksums; see :func:`snmf_interp.files.check_tensors`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        files.check_tensors(path, names)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: Exception) -> ValueError:
    what = " ".join(str(reason).split())
    return ValueError(
        f"{path} is missing or damaged ({what}); run the same command that collected it again, which mends it"
    )
