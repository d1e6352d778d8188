"""Continuing prompts, reproducibly, under whatever interventions are in force.

plain = generate(model, "I think that", samples=3)
with steer(model, {23: direction}, strength=12.0):
    steered = generate(model, "I think that", samples=3)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import hooks

if TYPE_CHECKING:
    from .models import LanguageModel

# Tokens among which a nucleus is looked for first.
_NUCLEUS = 256


@dataclass(frozen=True)
class Continuation:
    """One sampled continuation: its prompt, its text without special tokens, and all of its token ids.

    The ids end with the end-of-text token when the model wrote one.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]


def generate(
    model: LanguageModel,
    prompts: str | Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    batch_size: int = 32,
) -> list[list[Continuation]]:
    """Sample continuations with ``model.model.generate`` and its KV cache.

    Prompts are encoded behind the start token (:attr:`LanguageModel.start_token_id`) and padded on the left.

    Sampling is by Gumbel noise: the token of largest ``logit / temperature + noise``, which has the same
    distribution as a draw from the softmax. The noise comes from a generator for each row, seeded by ``seed``,
    the number of the prompt and that of the sample. So no global random state is read or changed; a row does not
    depend on what else is in its batch, beyond rounding; and a steered call with the same seed meets the same
    noise as an unsteered one, so that their texts differ no more than their predictions make them.

    What the model's own ``generation_config`` says about sampling and penalties is not used.

    Args:
        model: the model.
        prompts: one text, or several.
        samples: continuations of each.
        max_new_tokens: length of a continuation, unless the model ends it before.
        temperature: 0 takes the likeliest token; every sample is then the same.
        top_k: sample among this many likeliest tokens; 0 for all.
        top_p: sample among the fewest likeliest tokens that have this probability together.
        seed: of the noise.
        streams: for each prompt the number that its noise is drawn by, by default its place: prompts of the same
            number meet the same noise.
        batch_size: rows generated together.

    Returns:
        For each prompt, its ``samples`` continuations.

    Raises:
        ValueError: an argument is out of range, or a prompt has no token in a model without a start token.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: wanted at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: wanted at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: wanted a share above 0 and up to 1, got {top_p}")
    encoded = [model.encode(text) for text in texts]
    if not all(encoded):
        raise ValueError(f"prompts: {texts[encoded.index([])]!r} has no token, and the model no start token")
    if streams is not None and len(streams) != len(texts):
        raise ValueError(f"streams: wanted one for each of {len(texts)} prompts, got {len(streams)}")
    noise = range(len(texts)) if streams is None else streams
    rows = [(prompt, sample) for prompt in range(len(texts)) for sample in range(samples)]
    found: list[list[Continuation]] = [[] for _ in texts]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        ids, mask = hooks.pad([encoded[prompt] for prompt, _ in batch], side="left", pad_id=model.pad_id)
        sampler = _Sampler(
            [(noise[prompt], sample) for prompt, sample in batch], seed, temperature, top_k, top_p
        )
        for (prompt, _), new in zip(batch, _continue(model, ids, mask, sampler, max_new_tokens), strict=True):
            found[prompt].append(Continuation(texts[prompt], _text(model, encoded[prompt], new), tuple(new)))
    return found


def _text(model: LanguageModel, before: Sequence[int], new: Sequence[int]) -> str:
    """``new`` as text behind ``before``: some tokenizers drop the space at the beginning of what they decode."""

    def decode(ids: Sequence[int]) -> str:
        text: str = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    opening, whole = decode(before), decode([*before, *new])
    return whole[len(opening) :] if whole.startswith(opening) else decode(new)


def _continue(
    model: LanguageModel, ids: Tensor, mask: Tensor, sampler: _Sampler, max_new_tokens: int
) -> list[list[int]]:
    """The new tokens of each row, up to and with its end-of-text token."""
    from transformers import GenerationConfig, LogitsProcessorList

    own = model.model.generation_config
    stops = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    # Every choice is stated, for what a configuration leaves out is taken from the model's own.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        return_dict_in_generate=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=model.pad_id,
    )
    with torch.inference_mode(), hooks.contiguous_unembedding(model):
        output = model.model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )
    continued = []
    for new in output[:, ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        continued.append(new[:end])
    return continued


class _Sampler:
    """A logits processor whose largest output is a sample."""

    def __init__(
        self, rows: Sequence[tuple[int, int]], seed: int, temperature: float, top_k: int, top_p: float
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generators = [_generator(seed, *row) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.temperature:
            return scores
        scores = scores.float() / self.temperature
        # One number for each token of the vocabulary, whichever may be sampled: a token's noise is its own.
        uniform = torch.empty(scores.shape)
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        uniform = uniform.to(scores.device)
        if not self.top_k and self.top_p == 1:
            return scores + _gumbel(uniform)
        chosen = torch.full_like(scores, -math.inf)
        for rows, values, tokens in _likeliest(scores, self.top_k, self.top_p):
            noisy = values + _gumbel(uniform[rows].gather(1, tokens))
            chosen[rows] = chosen[rows].scatter_(1, tokens, noisy)
        return chosen


def _likeliest(scores: Tensor, top_k: int, top_p: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which tokens may be sampled: rows ``[r]``, and their scores and tokens ``[r, m]``, −inf for those left out.

    A sort of the vocabulary would take most of the time of a step. The nucleus is nearly always small, so it is
    looked for among few tokens first, and among more only in rows where these do not reach ``top_p``.
    """
    vocabulary = scores.shape[1]
    rows = torch.arange(len(scores), device=scores.device)
    count = min(top_k or _NUCLEUS, vocabulary)
    total = scores.logsumexp(1, keepdim=True)
    while len(rows):
        values, tokens = scores[rows].topk(count)
        if top_p == 1:
            yield rows, values, tokens
            return
        # With top_k, shares of what it leaves.
        shares = (values - (values.logsumexp(1, keepdim=True) if top_k else total[rows])).exp()
        reached = shares.cumsum(1)
        done = reached[:, -1] >= top_p
        if top_k or count == vocabulary:
            done[:] = True
        yield rows[done], values.masked_fill(reached - shares >= top_p, -math.inf)[done], tokens[done]
        rows, count = rows[~done], min(8 * count, vocabulary)


def _gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers, multiples of 2⁻²⁴ from 0 up to 1; each stands for the middle of its step."""
    return -(-(uniform.double() + 2**-25).log()).log().float()


def _generator(*numbers: int) -> torch.Generator:
    """A generator for these numbers, unrelated to that of any others."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
