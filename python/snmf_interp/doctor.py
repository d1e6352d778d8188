"""Is what we capture what the model computes? Checks with measured numbers, for any model, in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import hooks
from .models import LanguageModel
from .texts import read_texts

# Largest deviation relative to the largest value, by the dtype the model runs in. Measured on the bundled models:
# 0 for the projection; between padding sides 2e-6 in float32, 3e-3 in float16 and 2e-2 in bfloat16.
_PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A working model is well below guessing, which costs ln(vocabulary). Measured on the default sentences, as a
# share of that: 0.41 for SmolLM2 and 0.34 for Gemma; 0.74 for Gemma without its BOS.
_SANE_LOSS = 0.6


@dataclass(frozen=True)
class Check:
    """One finding: what was checked, whether it holds, and the measured number."""

    name: str
    passed: bool
    measured: str


def check_model(model: LanguageModel, texts: Sequence[str] | None = None) -> Iterator[Check]:
    """Check that captures are right and harmless.

    Args:
        model: the model.
        texts: a few plain sentences of different lengths; by default 24 of the bundled corpus.

    Yields:
        A :class:`Check` each, as soon as it is known.

    Raises:
        ValueError: a weight is not finite, or a text has a token that the model has no embedding for.
    """
    if (wrong := model.not_finite()) is not None:
        raise ValueError(f"model: {wrong}")
    if texts is None:
        texts = [sample.text for sample in read_texts("concepts")[::36]]
    ids = [model.encode(text) for text in texts]
    yield _projection(model, ids)
    yield _padding(model, ids)
    yield _restored(model, ids)
    yield _early_stop(model, ids)
    yield _loss(model, texts)


def _projection(model: LanguageModel, ids: list[list[int]]) -> Check:
    outputs: dict[int, Tensor] = {}
    layers = range(model.n_layers)
    handles = [
        model.down_projection(layer).register_forward_hook(
            lambda _m, _i, out, layer=layer: outputs.__setitem__(layer, out)
        )
        for layer in layers
    ]
    try:
        with hooks.capture(model, layers) as captured:
            hooks.forward(model, *_batch(model, ids[:8], "right"))
    finally:
        for handle in handles:
            handle.remove()
    worst, where = 0.0, 0
    for layer in layers:
        bias = model.down_bias(layer)
        with torch.inference_mode():
            product = captured[layer] @ model.down_weight(layer).T + (0 if bias is None else bias)
            deviation = _deviation(product, outputs[layer])
        if not deviation <= worst:
            worst, where = deviation, layer
    return Check(
        "captured activations × W_down = the down projection's output",
        worst <= _PRODUCT_TOLERANCE[model.dtype],
        f"largest deviation {worst:.1e} of the largest output, all {model.n_layers} layers (worst: {where})",
    )


def _padding(model: LanguageModel, ids: list[list[int]]) -> Check:
    layers = range(model.n_layers)
    real: dict[str, list[Tensor]] = {}
    for side in ("left", "right"):
        tokens, mask = _batch(model, ids[:8], side)
        with hooks.capture(model, layers) as captured:
            hooks.forward(model, tokens, mask)
        real[side] = [
            captured[layer].cpu().reshape(-1, model.d_mlp(layer))[mask.flatten().bool()] for layer in layers
        ]
    worst = max(_deviation(a, b) for a, b in zip(real["left"], real["right"], strict=True))
    return Check(
        "padding on the left or on the right gives the same activations",
        worst <= _PADDING_TOLERANCE[model.dtype],
        f"largest deviation {worst:.1e} of the layer's largest activation",
    )


def _restored(model: LanguageModel, ids: list[list[int]]) -> Check:
    batch = _batch(model, ids[:4], "right")
    hooks_before, before = _n_hooks(model), hooks.forward(model, *batch).logits
    with hooks.capture(model, range(model.n_layers)):
        hooks.forward(model, *batch)
    with hooks.capture(model, [0], stop_early=True):
        hooks.forward(model, *batch)
    try:
        with hooks.capture(model, [0]):
            raise _DeliberateError
    except _DeliberateError:
        pass
    same = torch.equal(before, hooks.forward(model, *batch).logits)
    left = _n_hooks(model) - hooks_before
    return Check(
        "the model is as before: after a capture, an early stop and an exception",
        same and left == 0,
        f"logits {'equal to the bit' if same else 'differ'}, {left} hooks left behind",
    )


def _early_stop(model: LanguageModel, ids: list[list[int]]) -> Check:
    batch = _batch(model, ids[:4], "right")
    layer = model.n_layers // 2
    values = []
    for stop in (False, True):
        with hooks.capture(model, [0, layer], stop_early=stop) as captured:
            hooks.forward(model, *batch)
        values.append(captured)
    same = all(torch.equal(values[0][i], values[1][i]) for i in (0, layer))
    return Check(
        "stopping after the last wanted layer does not change what is captured",
        same,
        f"layers 0 and {layer} {'equal to the bit' if same else 'differ'}",
    )


def _loss(model: LanguageModel, texts: Sequence[str]) -> Check:
    start = model.start_token_id
    bare = [model.encode(text)[start is not None :] for text in texts]
    bare = [ids for ids in bare if len(ids) > 1]
    without = _mean_loss(model, bare, skip=0)
    loss = without if start is None else _mean_loss(model, [[start, *ids] for ids in bare], skip=1)
    limit = _SANE_LOSS * math.log(len(model.tokenizer))
    name = "no start token" if start is None else repr(model.tokenizer.convert_ids_to_tokens([start])[0])
    # A start token may cost a little on a model that is indifferent to it; more means that it is the wrong
    # one.
    return Check(
        f"the model predicts plain English behind {name}",
        loss < limit and loss <= without + 0.1,
        f"mean next-token loss {loss:.2f} (without it {without:.2f}; sane is below {limit:.2f})",
    )


def _mean_loss(model: LanguageModel, ids: list[list[int]], skip: int) -> float:
    """Mean loss per token; ``skip`` first predictions of each text are left out, for equal targets."""
    total, count = 0.0, 0
    for i in range(0, len(ids), 8):
        tokens, mask = _batch(model, ids[i : i + 8], "right")
        logits = hooks.forward(model, tokens, mask).logits[:, skip:-1].float().cpu()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, skip + 1 :], reduction="none"
        )
        counted = mask[:, skip + 1 :].bool()
        total += float(losses[counted].double().sum())
        count += int(counted.sum())
    return total / max(count, 1)


class _DeliberateError(Exception):
    """Raised to see that hooks go when a block fails."""


def _batch(model: LanguageModel, ids: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor]:
    return hooks.pad(ids, side=side, pad_id=model.pad_id)


def _deviation(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest value; infinite when something is not a number."""
    value = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf


def _n_hooks(model: LanguageModel) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.modules()
    )
