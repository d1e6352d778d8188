"""Collecting hidden MLP activations: several layers in one pass, resumable, without structure tokens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from . import files, hooks
from .equal_texts import text_groups
from .models import LanguageModel
from .store import (
    FORMAT,
    MANIFEST,
    PLAN,
    SHARDS,
    ActivationStore,
    Corpus,
    check_tensors,
    read_tensors,
    shard_name,
)
from .texts import Sample, as_samples, digest

logger = logging.getLogger(__name__)

# A token is a sink at a layer when the norm of its activations exceeds this many medians. Measured on the
# bundled corpus: of the layers looked at, most have no token or a handful above 5 (Gemma layers 1, 3, 12;
# SmolLM2 28, 29). SmolLM2 layers 2, 9 and 10 have 998, 612 and 513 of 14,760, nearly all the word " the",
# with 93, 68 and 50 % of the layer's energy. In layers 9 and 10 norms run on without a gap from 3 to 9
# medians: there 5 is a choice, not a border.
SINK_THRESHOLD = 5.0
# A shard is what a killed run loses at most, and what is held in memory before it is written.
_SHARD_BYTES = 128 << 20
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Options:
    """Everything that shapes the numbers in a store: a folder is resumed only when all of it is the same."""

    weights: str
    model_dtype: str
    device: str
    start_token: int | None
    texts: str
    layers: list[int]
    dtype: str
    batch_size: int
    max_tokens: int | None
    padding_side: str
    shard_tokens: int
    sink_threshold: float | None


def collect(
    model: LanguageModel,
    samples: Iterable[Sample | str | Mapping[str, Any]] | Mapping[str, Iterable[str]],
    layers: str | int | Iterable[int | str],
    *,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_tokens: int | None = 512,
    dtype: torch.dtype | str | None = None,
    sink_threshold: float | None = SINK_THRESHOLD,
    padding_side: Literal["left", "right"] = "right",
    shard_tokens: int | None = None,
    progress: bool | None = None,
) -> ActivationStore:
    """Run ``model`` over ``samples`` and keep the input of the down projection of every layer in ``layers``.

    Left out are: padding; the first position of every text, whatever stands there (the start token or, in a
    model without one, the first token, which then takes its part as attention sink); special tokens inside a
    text, by id; and sinks, by norm. ``store.counts`` says how many of each.

    Args:
        model: from :func:`snmf_interp.load_model`.
        samples: from :func:`snmf_interp.read_texts`, or objects as it takes them; each is one sample, also where its
            text is empty.
        layers: see :meth:`LanguageModel.parse_layers`.
        out: folder of the store; None keeps it in memory. A folder in which the same collection was cut short
            is resumed: its finished shards are kept, and the result is the same to the bit. Of a finished store all
            checksums are compared (0.3 s a GB), and what is missing or damaged is computed again.
        batch_size: texts per forward pass. Texts of like length share a pass; the order of the results is
            that of ``samples``.
        max_tokens: longer texts are cut to this many tokens, the start token included; None for the model's
            own limit.
        dtype: of the stored activations: a torch dtype or its name; by default the model's, which loses
            nothing.
        sink_threshold: leave out tokens whose activation norm at a layer exceeds this many times the median
            norm over all text tokens there; None keeps them.
        padding_side: ``"right"`` or ``"left"``; makes no difference beyond rounding.
        shard_tokens: tokens per shard; by default about 128 MB per shard.
        progress: show a bar on stderr; by default when it is a terminal.

    Raises:
        TypeError: ``model`` is not a :class:`LanguageModel`.
        ValueError: an argument is out of range or no list of texts, ``out`` holds another collection (the message
            names what differs), or the activations are not finite in the stored dtype.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(
            f"model: wanted a LanguageModel, such as load_model('smollm2-135m'), got {type(model).__name__}"
        )
    texts = as_samples(samples)
    if not texts:
        raise ValueError("samples is empty; give at least one text")
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"max_tokens: wanted at least 2 (the first position is never kept), got {max_tokens}"
        )
    if sink_threshold is not None and not sink_threshold > 1:
        raise ValueError(
            f"sink_threshold: wanted more than 1 (times the median norm) or None, got {sink_threshold}"
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: wanted 'left' or 'right', got {padding_side!r}")
    if shard_tokens is not None and shard_tokens < 1:
        raise ValueError(f"shard_tokens: wanted at least 1, got {shard_tokens}")
    stored = _dtype(dtype if dtype is not None else model.dtype)
    wanted = model.parse_layers(layers)
    if shard_tokens is None:
        bytes_per_token = sum(model.d_mlp(layer) for layer in wanted) * stored.itemsize
        shard_tokens = max(1024, _SHARD_BYTES // bytes_per_token)
    limits = [n for n in (max_tokens, model.max_positions) if n is not None]
    options = _Options(
        weights=model.fingerprint(),
        model_dtype=_name(model.dtype),
        device=model.device.type,
        start_token=model.start_token_id,
        texts=digest(texts),
        layers=wanted,
        dtype=_name(stored),
        batch_size=batch_size,
        max_tokens=min(limits, default=None),
        padding_side=padding_side,
        shard_tokens=shard_tokens,
        sink_threshold=sink_threshold,
    )
    folder = None if out is None else Path(out)
    if folder is not None and (folder / PLAN).is_file():
        _refuse_other(folder, options)
        if (folder / MANIFEST).is_file() and (finished := _whole(folder)) is not None:
            return finished
    corpus, n_cut = _tokenise(model, texts, options.max_tokens)
    plan = {
        "format": FORMAT,
        "model": {"name": model.name, "class": type(model.model).__name__, **model.source},
        "hook_names": {str(layer): [model.hook_name(layer), model.hf_hook_name(layer)] for layer in wanted},
        "d_mlp": {str(layer): model.d_mlp(layer) for layer in wanted},
        "options": asdict(options),
        "special_ids": sorted(model.special_ids),
        "shards": _split(corpus, shard_tokens),
    }
    if folder is not None:
        _begin(folder, corpus, plan, options)
    run = _Run(model, corpus, plan, options, stored)
    shards = run.shards(folder, progress)
    manifest = _finalise(run, shards, n_cut)
    if folder is None:
        return ActivationStore(corpus, plan, manifest, None, shards)
    files.write_json(folder / MANIFEST, manifest)
    return ActivationStore.open(folder)


class _Run:
    """The shards of one collection."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        plan: dict[str, Any],
        options: _Options,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.corpus, self.plan, self.options, self.dtype = model, corpus, plan, options, dtype
        lengths = corpus.offsets.diff()
        position = torch.arange(len(corpus.ids)) - torch.repeat_interleave(corpus.offsets[:-1], lengths)
        special = torch.isin(corpus.ids, torch.tensor(plan["special_ids"], dtype=corpus.ids.dtype))
        self.first = position == 0
        self.special = special & ~self.first
        self.text = ~(self.first | special)
        self.lengths: list[int] = lengths.tolist()

    def shards(self, folder: Path | None, progress: bool | None) -> list[Mapping[str, Tensor]]:
        """All shards in order, those that ``folder`` already holds taken from there."""
        show = sys.stderr.isatty() if progress is None else progress
        shards: list[Mapping[str, Tensor]] = []
        with tqdm(
            total=len(self.corpus.ids),
            unit="tok",
            unit_scale=True,
            desc="collecting",
            disable=not show,
            leave=False,
        ) as bar:
            for index, (begin, end) in enumerate(self.plan["shards"]):
                path = None if folder is None else folder / shard_name(index)
                shard = None if path is None else self._finished(path, begin, end)
                if shard is None:
                    bar.unpause()
                    shard = self._compute(begin, end, bar)
                    if path is not None:
                        files.write_tensors(path, shard)
                        # From here on the mapped file serves, and the memory is free for the next shard.
                        shard = read_tensors(path)
                else:
                    bar.update(sum(self.lengths[begin:end]))
                shards.append(shard)
        return shards

    def _finished(self, path: Path, begin: int, end: int) -> Mapping[str, Tensor] | None:
        """A shard of an earlier run, or None when it is not there or not whole."""
        if not path.is_file():
            return None
        names = ("places", "norms", *(f"layer_{layer}" for layer in self.options.layers))
        try:
            shard = read_tensors(path)
            check_tensors(path, names)
        except ValueError:
            logger.warning("%s is damaged and is computed again", path)
            return None
        return shard if torch.equal(shard.get("places", torch.empty(0)), self._places(begin, end)) else None

    def _places(self, begin: int, end: int) -> Tensor:
        first, last = int(self.corpus.offsets[begin]), int(self.corpus.offsets[end])
        return self.text[first:last].nonzero().squeeze(1) + first

    def batches(self, begin: int, end: int) -> list[list[int]]:
        """Samples of a shard in batches of like length, longest first: memory runs out early if at all."""
        order = sorted(range(begin, end), key=lambda sample: -self.lengths[sample])
        order = [sample for sample in order if self.lengths[sample]]
        size = self.options.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _compute(self, begin: int, end: int, bar: Any) -> dict[str, Tensor]:
        places = self._places(begin, end)
        layers = self.options.layers
        rows = {
            layer: torch.empty(len(places), self.model.d_mlp(layer), dtype=self.dtype) for layer in layers
        }
        norms = torch.empty(len(layers), len(places))
        # Where each token's row is in this shard: the number of text tokens before it.
        origin = int(self.corpus.offsets[begin])
        row_of = self.text[origin : int(self.corpus.offsets[end])].cumsum(0) - 1
        for batch in self.batches(begin, end):
            ids, mask = hooks.pad(
                [self.corpus.tokens_of(sample) for sample in batch],
                side=self.options.padding_side,
                pad_id=self.model.pad_id,
            )
            with hooks.capture(self.model, layers, stop_early=True) as captured:
                hooks.forward(self.model, ids, mask)
            real = mask.bool()
            # Boolean indexing walks the batch row by row, so these are the tokens' places in the same order.
            token = torch.cat([torch.arange(*self.corpus.offsets[s : s + 2].tolist()) for s in batch])
            text = self.text[token]
            target = row_of[token[text] - origin]
            for i, layer in enumerate(layers):
                # Some models (OPT) flatten the batch in front of the projection.
                values = captured[layer].cpu().reshape(-1, captured[layer].shape[-1])[real.flatten()][text]
                rows[layer][target] = self._stored(values, layer)
                norms[i, target] = values.float().norm(dim=1)
            bar.update(len(token))
        return {f"layer_{layer}": rows[layer] for layer in layers} | {"places": places, "norms": norms}

    def _stored(self, values: Tensor, layer: int) -> Tensor:
        stored = values.to(self.dtype)
        if not bool(stored.isfinite().all()):
            if bool(values.isfinite().all()):
                largest = float(values.abs().max())
                raise ValueError(
                    f"dtype: layer {layer} has activations up to {largest:.3g}, beyond {self.options.dtype}; "
                    "use bfloat16 or float32"
                )
            if (wrong := self.model.not_finite()) is not None:
                raise ValueError(f"layer {layer} has activations that are not finite: {wrong}")
            remedy = (
                "load it in bfloat16 or float32"
                if self.options.model_dtype == "float16"
                else "its weights are damaged, or not of this architecture"
            )
            raise ValueError(
                f"layer {layer} has activations that are not finite: the model itself overflows in "
                f"{self.options.model_dtype}; {remedy}"
            )
        return stored

    def n_padding(self) -> int:
        """Padding positions that the passes compute and nobody keeps."""
        batches = [batch for begin, end in self.plan["shards"] for batch in self.batches(begin, end)]
        lengths = [[self.lengths[sample] for sample in batch] for batch in batches]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)


def _tokenise(model: LanguageModel, samples: Sequence[Sample], max_tokens: int | None) -> tuple[Corpus, int]:
    """The corpus of all tokens, and how many samples were cut."""
    encoded = [model.encode(sample.text) for sample in samples]
    cut = [ids[:max_tokens] for ids in encoded]
    offsets = torch.tensor([0, *map(len, cut)]).cumsum(0)
    ids = torch.tensor([id for ids in cut for id in ids], dtype=torch.int64)
    corpus = Corpus(
        ids,
        offsets,
        [sample.id for sample in samples],
        [sample.label for sample in samples],
        text_groups([sample.text for sample in samples]).tolist(),
    )
    return corpus, sum(len(a) > len(b) for a, b in zip(encoded, cut, strict=True))


def _split(corpus: Corpus, shard_tokens: int) -> list[list[int]]:
    """Ranges of samples with about ``shard_tokens`` tokens each."""
    shards, begin, tokens = [], 0, 0
    lengths = corpus.offsets.diff().tolist()
    for sample, length in enumerate(lengths):
        tokens += length
        if tokens >= shard_tokens or sample == len(lengths) - 1:
            shards.append([begin, sample + 1])
            begin, tokens = sample + 1, 0
    return shards


def _finalise(run: _Run, shards: Sequence[Mapping[str, Tensor]], n_cut: int) -> dict[str, Any]:
    n_text = int(run.text.sum())
    if n_text == 0:
        raise ValueError(
            "no token is left: every text is at most one token long, or holds special tokens only"
        )
    norms = torch.cat([shard["norms"] for shard in shards], dim=1)
    threshold = run.options.sink_threshold
    per_layer = {}
    for row, layer in enumerate(run.options.layers):
        median = float(norms[row].median())
        # A median of 0 (an MLP that is silent on most tokens) says nothing about what is large.
        limit = median * threshold if threshold is not None and median > 0 else float("inf")
        n_sinks = int((norms[row] > limit).sum())
        per_layer[str(layer)] = {
            "median_norm": median,
            # JSON has no infinity; float32's largest number is above every norm.
            "norm_limit": min(limit, torch.finfo(torch.float32).max),
            "sinks": n_sinks,
            "kept": n_text - n_sinks,
        }
    counts = {
        "samples": len(run.lengths),
        "samples_cut": n_cut,
        "samples_equal": run.corpus.n_equal,
        "tokens": len(run.corpus.ids),
        "first_position": int(run.first.sum()),
        "special": int(run.special.sum()),
        "padding": run.n_padding(),
        "sinks": {layer: values["sinks"] for layer, values in per_layer.items()},
        "kept": {layer: values["kept"] for layer, values in per_layer.items()},
    }
    return {"format": FORMAT, "counts": counts, "layers": per_layer}


def _whole(folder: Path) -> ActivationStore | None:
    """A finished store, or None where something of it is missing or damaged."""
    try:
        store = ActivationStore.open(folder)
        store.check()
    except ValueError:
        logger.warning("%s is incomplete or damaged; what is missing is computed again", folder)
        return None
    return store


def _begin(folder: Path, corpus: Corpus, plan: dict[str, Any], options: _Options) -> None:
    """Write the plan and the tokens of a collection where they are not there, or not whole.

    Raises:
        ValueError: another process has begun another collection there.
    """
    with files.locked(folder):
        if (folder / PLAN).is_file():
            _refuse_other(folder, options)
            try:
                Corpus.load(folder)
            except ValueError:
                corpus.save(folder)
            return
        # Nothing says what shards without a plan are of.
        for path in (folder / MANIFEST, *folder.glob(SHARDS)):
            path.unlink(missing_ok=True)
        corpus.save(folder)
        files.write_json(folder / PLAN, plan)


def _refuse_other(folder: Path, options: _Options) -> None:
    there = files.read_json(folder / PLAN).get("options", {})
    for name, value in asdict(options).items():
        if there.get(name) == value:
            continue
        what = {"weights": "the model's weights", "texts": "the texts"}.get(name, name)
        values = "" if what != name else f" ({there.get(name)!r} there, {value!r} now)"
        raise ValueError(
            f"{folder} holds a collection that differs in {what}{values}; "
            "use another folder, or delete that one"
        )


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"dtype: wanted one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
