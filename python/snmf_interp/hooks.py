"""Reading a model's hidden MLP activations during a forward pass, and leaving the model as it was.

Hooks belong to the model, not to a thread: while one thread is in a block of :func:`capture` or
:func:`snmf_interp.steer`, forward passes of the same model in other threads meet the same hooks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .models import LanguageModel


class _StopForwardError(BaseException):
    """Ends a forward pass from inside. No Exception, so that no ``except Exception`` swallows it."""


@contextlib.contextmanager
def capture(
    model: LanguageModel, layers: Sequence[int], *, stop_early: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Inside the block, each forward pass puts the input of every named layer's down projection into the
    mapping.

    Args:
        model: the model to watch.
        layers: layer numbers.
        stop_early: end the forward at the last of ``layers``. The block then ends with it too: put one call
            into the block.

    Yields:
        ``{layer: [..., d_mlp]}``, filled by the forward: the model's own tensors, not copies, in the shape
        that the model gives them (OPT flattens ``[b, t, d_mlp]`` to ``[b * t, d_mlp]``).

    The hooks are removed when the block is left, by an exception too. A compiled model runs eagerly inside it. Passes
    of the same model in other threads would be captured, and stopped, too: let one thread at a time use a model.
    """
    captured: dict[int, Tensor] = {}
    stop = _StopForwardError()

    def watch(layer: int, last: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured[layer] = inputs[0].detach()
            if last:
                raise stop

        return hook

    deepest = max(layers)
    handles = []
    try:
        for layer in layers:
            hook = watch(layer, stop_early and layer == deepest)
            handles.append(model.down_projection(layer).register_forward_pre_hook(hook))
        with without_compiled_code():
            yield captured
    except _StopForwardError as caught:
        # Blocks may be nested: another block's stop is not ours to end.
        if caught is not stop:
            raise
    finally:
        for handle in handles:
            handle.remove()


def without_compiled_code() -> contextlib.AbstractContextManager[Any]:
    """Inside the block, hooks run in modules that ``torch.compile`` compiled before the hooks were added.

    Dynamo does not look for such hooks; so compiled code of this process runs eagerly instead.
    """
    return torch.compiler.set_stance("force_eager")


def pad(sequences: Sequence[Sequence[int]], *, side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (1 = real), both int64 ``[b, t]``, padded on ``"left"`` or ``"right"``."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        first = length - len(sequence) if side == "left" else 0
        ids[row, first : first + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, first : first + len(sequence)] = 1
    return ids, mask


def forward(
    model: LanguageModel, input_ids: Tensor, attention_mask: Tensor, *, last_only: bool = False
) -> Any:
    """One forward pass without cache or gradients; texts count from position 0 wherever padding is.

    With ``last_only``, models that can spare the logits of all positions but the last do so.
    """
    inputs: dict[str, Any] = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
    }
    parameters = inspect.signature(model.model.forward).parameters
    if "position_ids" in parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    if last_only and "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = 1
    faster = contiguous_unembedding(model) if last_only else contextlib.nullcontext()
    with torch.inference_mode(), faster:
        return model.model(**inputs, use_cache=False)


@contextlib.contextmanager
def contiguous_unembedding(model: LanguageModel) -> Iterator[None]:
    """Inside the block, the unembedding gets its input in one piece; the numbers are the same.

    Models hand over a slice of the hidden states, the last position of each row. On a CPU torch's linear layer then
    multiplies row by row: at 112 rows and width 640 its rate fell from 100 to 6.5 GFLOPS in float32, from 400 to
    0.2 in bfloat16 (torch 2.13), and the unembedding took most of the time of a decoding step.
    """

    def whole(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    handle = model.unembedding.register_forward_pre_hook(whole)
    try:
        yield
    finally:
        handle.remove()
