from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from snmf_interp import Intervention, LanguageModel, generate, generation, hooks, steer

from .conftest import make_network, make_tokenizer

Maker = Callable[..., LanguageModel]
PROMPTS = ["the cat", "on Monday the big dog", "a"]
FAMILIES = ("llama", "gpt2", "opt", "gemma3", "gpt_neox")


def vector() -> torch.Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(0))


def ids(found: Any) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in row] for row in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_their_batch(family: str, make_model: Maker) -> None:
    """Left padding, the batch's size and the other rows make no difference, steered or not."""
    model = make_model(family)
    options: dict[str, Any] = {"samples": 3, "max_new_tokens": 6, "seed": 4}
    together = generate(model, PROMPTS, **options)
    assert [len(row) for row in together] == [3, 3, 3]
    assert ids(generate(model, PROMPTS, **options, batch_size=2)) == ids(together)
    assert ids(generate(model, PROMPTS[0], **options)) == ids(together[:1])
    with steer(model, {1: vector()}, strength=4.0):
        steered = generate(model, PROMPTS, **options)
        assert ids(generate(model, PROMPTS, **options, batch_size=4)) == ids(steered)
    assert ids(steered) != ids(together)
    assert ids(generate(model, PROMPTS, **options)) == ids(together)


def test_samples_differ_and_seeds_repeat(make_model: Maker) -> None:
    model = make_model()
    found = ids(generate(model, "the cat", samples=8, max_new_tokens=6, temperature=3.0))[0]
    assert len(set(found)) > 4
    assert ids(generate(model, "the cat", samples=8, max_new_tokens=6, temperature=3.0))[0] == found
    assert ids(generate(model, "the cat", samples=8, max_new_tokens=6, temperature=3.0, seed=1))[0] != found
    # The first samples of many are those of few.
    assert ids(generate(model, "the cat", samples=2, max_new_tokens=6, temperature=3.0))[0] == found[:2]


def test_no_global_generator_is_touched(make_model: Maker) -> None:
    model = make_model()
    before = torch.get_rng_state()
    first = generate(model, "the cat", samples=2, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert generate(model, "the cat", samples=2, max_new_tokens=4) == first


def test_no_steering_gives_the_same_text(make_model: Maker) -> None:
    """The noise is that of the unsteered call: at strength 0 so are the texts."""
    model = make_model()
    plain = generate(model, PROMPTS, samples=2, max_new_tokens=8)
    with steer(model, {1: vector()}, strength=0.0):
        assert generate(model, PROMPTS, samples=2, max_new_tokens=8) == plain


def test_greedy_is_the_likeliest_token(make_model: Maker) -> None:
    model = make_model()
    with steer(model, {1: Intervention(vector(), "clamp", 3.0)}):
        ((first, second),) = generate(model, "the cat", samples=2, max_new_tokens=5, temperature=0.0)
        whole = torch.tensor([[*model.encode("the cat"), *first.token_ids]])
        steps = hooks.forward(model, whole, torch.ones_like(whole)).logits[0].argmax(-1)
    assert first == second
    start = len(model.encode("the cat"))
    assert tuple(steps[start - 1 : -1].tolist()) == first.token_ids


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 5), (2, 1.0, 2), (0, 0.6, 2), (1, 0.5, 1)])
def test_frequencies_are_the_softmax(top_k: int, top_p: float, kept: int) -> None:
    """Gumbel noise samples the distribution that the options describe."""
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.8])
    rows = [(0, sample) for sample in range(4000)]
    sampler = generation._Sampler(rows, 3, 2.0 if top_p == 1 else 1.0, top_k, top_p)
    drawn = sampler(torch.zeros(len(rows), 1, dtype=torch.long), scores.expand(len(rows), -1)).argmax(-1)
    p = (scores / (2.0 if top_p == 1 else 1.0)).softmax(0)
    p[p.argsort(descending=True)[kept:]] = 0
    p /= p.sum()
    share = drawn.bincount(minlength=5) / len(rows)
    # Four standard errors.
    assert (share - p).abs().max() < 4 * (0.25 / len(rows)) ** 0.5
    assert not share[p == 0].any()


def test_end_of_text(make_model: Maker) -> None:
    """A row ends with its end-of-text token while others go on; the text has no special token."""
    model = make_model()
    found = [
        one for row in generate(model, PROMPTS, samples=20, max_new_tokens=12, temperature=5.0) for one in row
    ]
    ended = [one for one in found if 2 in one.token_ids]
    assert 0 < len(ended) < len(found)
    for one in found:
        assert one.token_ids.index(2) == len(one.token_ids) - 1 if one in ended else len(one.token_ids) == 12
        assert "<" not in one.text.replace("<unk>", "")
    assert {one.prompt for one in found} == set(PROMPTS)


def test_the_models_own_sampling_options_are_not_used(make_model: Maker, caplog: Any) -> None:
    import transformers as hf

    expected = generate(make_model(), "the cat", samples=3, max_new_tokens=6)
    model = make_model()
    model.model.generation_config = hf.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.3, repetition_penalty=5.0, num_return_sequences=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    assert generate(model, "the cat", samples=3, max_new_tokens=6) == expected
    assert not caplog.records


def test_special_tokens_of_the_start(make_model: Maker) -> None:
    """Prompts stand behind the start token, as everywhere in this package; without one a text must not be empty."""
    seen: list[torch.Tensor] = []
    model = make_model(start_token="<eos>")
    handle = model.model.get_input_embeddings().register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    generate(model, ["the cat", ""], max_new_tokens=1)
    handle.remove()
    assert seen[0].tolist() == [[2, 4, 6], [0, 0, 2]]
    with pytest.raises(ValueError, match="'' has no token"):
        generate(make_model(start_token=None), "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: wanted at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: wanted at least 1"),
        ({"batch_size": 0}, "batch_size: wanted at least 1"),
        ({"temperature": -1.0}, "temperature: wanted at least 0"),
        ({"temperature": float("nan")}, "temperature: wanted at least 0"),
        ({"top_k": -1}, "top_k: wanted at least 0"),
        ({"top_p": 0.0}, "top_p: wanted a share"),
    ],
)
def test_errors(options: dict[str, Any], message: str, make_model: Maker) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(), "the cat", **options)


def test_model_without_pad_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = LanguageModel(make_network("llama"), tokenizer)
    with_pad = LanguageModel(make_network("llama"), make_tokenizer())
    assert generate(model, PROMPTS, max_new_tokens=4) == generate(with_pad, PROMPTS, max_new_tokens=4)


def test_the_space_behind_the_prompt_is_kept(make_model: Maker) -> None:
    """Prompt and text together are what the model wrote, also where decoding drops a leading space."""
    model = make_model()
    (row,) = generate(model, ["the cat"], samples=3, max_new_tokens=5)
    for one in row:
        words = [model.token_text(i) for i in one.token_ids if i not in model.special_ids]
        assert (one.prompt + one.text).split() == ["the", "cat", *words]
