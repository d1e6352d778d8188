from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import snmf_kernels
from snmf_interp import LanguageModel, Sample, collect, compare_stores
from snmf_interp.compare import Difference, compare

from .conftest import VOCABULARY, WORDS, make_network, make_tokenizer

Maker = Callable[..., LanguageModel]
LAYER = 1


@pytest.fixture
def texts() -> list[Sample]:
    """Forty texts of random words."""
    generator = np.random.default_rng(0)
    return [
        Sample(f"{i}", " ".join(generator.choice(WORDS, size=int(generator.integers(4, 12)))))
        for i in range(40)
    ]


@pytest.fixture
def factors(make_model: Maker, texts: list[Sample]) -> snmf_kernels.Factorization:
    store = collect(make_model(), texts, LAYER)
    return snmf_kernels.fit(store.layer(LAYER).T, 6, keep=0.25, neuron_scale=None, seed=0)


def pushed(model: LanguageModel, direction: torch.Tensor) -> LanguageModel:
    """The model with a direction added to the neurons of :data:`LAYER` at every token."""
    model.down_projection(LAYER).register_forward_pre_hook(lambda _module, inputs: (inputs[0] + direction,))
    return model


def of_feature(difference: Difference, feature: int) -> Any:
    return next(change for change in difference.changes if change.feature == feature)


@pytest.mark.parametrize("feature", range(6))
def test_the_pushed_feature_ranks_first(
    feature: int, make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    z = torch.as_tensor(factors.Z)[:, feature]
    strength = 2 * float(torch.as_tensor(factors.Y)[feature].std() * z.norm())
    other = pushed(make_model(), strength * z / z.norm())
    found = compare(factors, make_model(), other, texts, LAYER)
    first = found.changes[0]
    assert first.feature == feature
    assert first.q_value < 0.001
    assert first.difference.low > 0
    assert first.difference.low <= first.difference.value <= first.difference.high
    assert first.difference.value == pytest.approx(strength, rel=0.3)
    assert first.second - first.first == pytest.approx(first.difference.value)
    assert first in found.significant()
    # What was added lies on the basis, so that it covers the other model no worse.
    assert found.residual_change.value < 0.01
    assert len(first.tokens) == 5
    assert len({row.token.sample for row in first.tokens}) == 5
    assert all(row.second > row.first for row in first.tokens)
    sizes = [abs(row.second - row.first) for row in first.tokens]
    assert sizes == sorted(sizes, reverse=True)
    # The other way round the sign turns.
    back = of_feature(compare(factors, other, make_model(), texts, LAYER), feature)
    assert back.difference.value == pytest.approx(-first.difference.value)


def test_the_same_checkpoint_shows_nothing(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    found = compare(factors, make_model(), make_model(), texts, LAYER)
    assert found.significant() == []
    assert all(change.p_value == change.q_value == 1 for change in found.changes)
    assert all(change.standardised == 0 and change.tokens == () for change in found.changes)
    assert found.first_residual == found.second_residual
    assert (found.residual_change.low, found.residual_change.high) == (0, 0)


def test_a_sure_change_that_is_small_does_not_count_as_changed(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    """A push of a hundredth of its spread is alike in all texts, and so significant; it is small all the same."""
    z = torch.as_tensor(factors.Z)[:, 2]
    spread = float(torch.as_tensor(factors.Y)[2].std() * z.norm())
    small, large = (
        compare(factors, make_model(), pushed(make_model(), size * spread * z / z.norm()), texts, LAYER)
        for size in (0.02, 2)
    )
    assert 2 in {change.feature for change in small.significant()}
    assert small.changed(0.2) == []
    assert small.median_size < 0.02
    assert 2 in {change.feature for change in large.changed(0.2)}
    assert large.median_size == pytest.approx(
        float(np.median([abs(change.standardised) for change in large.changes]))
    )
    # Significant ones alone, of either sign.
    assert small.changed(0) == small.significant()
    back = compare(factors, pushed(make_model(), 2 * spread * z / z.norm()), make_model(), texts, LAYER)
    assert of_feature(back, 2) in back.changed(0.2)
    with pytest.raises(ValueError, match="by: wanted 0 or more"):
        small.changed(-1)


def test_equal_texts_count_once(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    z = torch.as_tensor(factors.Z)[:, 0]
    spread = float(torch.as_tensor(factors.Y)[0].std() * z.norm())
    generator = np.random.default_rng(1)
    few = [Sample(f"{i}", " ".join(generator.choice(WORDS, size=6))) for i in range(8)]
    copies = [Sample(f"{sample.id}/{n}", sample.text.replace(" ", "  ")) for n in range(9) for sample in few]
    once, often = (
        compare(
            factors,
            make_model(),
            pushed(make_model(), 0.1 * spread * z / z.norm()),
            samples,
            LAYER,
            sink_threshold=None,
        )
        for samples in (few, few + copies)
    )
    assert (once.n_texts, once.n_equal) == (8, 0)
    assert (often.n_texts, often.n_equal) == (8, 72)
    for change in once.changes:
        again = of_feature(often, change.feature)
        assert again.p_value == pytest.approx(change.p_value, rel=1e-2, abs=1e-9)
        assert again.difference.low == pytest.approx(change.difference.low, rel=1e-2, abs=1e-9)
        assert len({token.token.sample.partition("/")[0] for token in again.tokens}) == len(again.tokens)
    with pytest.raises(ValueError, match="at least two texts that are not equal"):
        compare(factors, make_model(), make_model(), [few[0], copies[0]], LAYER)


def test_noise_alone_is_seldom_significant(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    """Changes that are as often up as down: of 20 checkpoints with 6 features, hardly any is called changed."""
    n_found = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other = make_model()
        handle = other.down_projection(LAYER).register_forward_pre_hook(
            lambda _module, inputs, generator=generator: (
                inputs[0] * (1 + 0.02 * torch.randn(inputs[0].shape, generator=generator)),
            )
        )
        n_found += bool(compare(factors, make_model(), other, texts, LAYER, resamples=50).significant())
        handle.remove()
    assert n_found <= 4


def test_what_the_basis_lacks_shows_in_the_residual(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    Z = torch.as_tensor(factors.Z).double()
    outside = torch.randn(len(Z), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outside -= Z @ torch.linalg.lstsq(Z, outside[:, None]).solution[:, 0]
    scale = collect(make_model(), texts, LAYER).layer(LAYER).norm(dim=1).mean()
    other = pushed(make_model(), (scale * outside / outside.norm()).float())
    found = compare(factors, make_model(), other, texts, LAYER, sink_threshold=None)
    assert found.second_residual > found.first_residual + 0.1
    assert found.residual_change.low > 0.1


def test_numbers_by_hand(make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization) -> None:
    z = torch.as_tensor(factors.Z)[:, 0]
    one, two = make_model(), pushed(make_model(), 0.5 * z / z.norm())
    stores = [collect(model, texts, LAYER, sink_threshold=None) for model in (one, two)]
    found = compare_stores(factors, *stores, one, LAYER)
    text_of = stores[0].samples(LAYER)
    norms = torch.as_tensor(factors.Z).norm(dim=0)
    values = [torch.as_tensor(factors.encode(s.layer(LAYER).T, tol=1e-7).Y) * norms[:, None] for s in stores]
    change = found.changes[2]
    a, b = (v[change.feature].double() for v in values)
    means = [float(torch.stack([v[text_of == t].mean() for t in range(40)]).mean()) for v in (a, b)]
    assert [change.first, change.second] == pytest.approx(means, rel=1e-3)
    spread = math.sqrt(float(a.var() + b.var()) / 2)
    assert change.standardised == pytest.approx((means[1] - means[0]) / spread, rel=1e-2)
    assert change.correlation == pytest.approx(float(np.corrcoef(a, b)[0, 1]), rel=1e-3)
    assert found.n_tokens == len(text_of)
    assert found.n_left_out == 0
    assert found.first_residual == pytest.approx(
        float(
            (stores[0].layer(LAYER).T - torch.as_tensor(factors.Z) @ (values[0] / norms[:, None]))
            .square()
            .sum()
            / stores[0].layer(LAYER).square().sum()
        ),
        rel=1e-3,
    )


def test_sinks_of_either_are_left_out(
    make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
) -> None:
    z = torch.as_tensor(factors.Z)[:, 0]
    stores = [
        collect(model, texts, LAYER, sink_threshold=1.1)
        for model in (make_model(), pushed(make_model(), z / z.norm()))
    ]
    places = [set(store.places(LAYER).tolist()) for store in stores]
    found = compare_stores(factors, *stores, make_model(), LAYER)
    assert found.n_tokens == len(places[0] & places[1])
    assert found.n_left_out == len(places[0] ^ places[1]) > 0


class TestAlignment:
    def other_words(self) -> LanguageModel:
        tokenizer = make_tokenizer()
        vocabulary = tokenizer.get_vocab()
        assert vocabulary["cat"] != vocabulary["dog"]
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        names = {**vocabulary, "cat": vocabulary["dog"], "dog": vocabulary["cat"]}
        inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", VOCABULARY.index("<bos>"))]
        )
        swapped = PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
        return LanguageModel(make_network("llama"), swapped, name="swapped")

    def test_other_tokens_are_refused(self, make_model: Maker, factors: snmf_kernels.Factorization) -> None:
        samples = [Sample("same", "the sun ."), Sample("pets", "the cat sat")]
        with pytest.raises(ValueError, match=r"text 'pets': token 2 is 6 in 'tiny-llama' and 7 in 'swapped'"):
            compare(factors, make_model(), self.other_words(), samples, LAYER)
        stores = [collect(model, samples, LAYER) for model in (make_model(), self.other_words())]
        with pytest.raises(ValueError, match="the tokens of first, got others in text 'pets'"):
            compare_stores(factors, *stores, make_model(), LAYER)

    def test_another_start_token_is_refused(
        self, make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
    ) -> None:
        with pytest.raises(ValueError, match="make different tokens of text '0'"):
            compare(factors, make_model(), make_model(start_token="<eos>"), texts, LAYER)

    def test_other_texts_are_refused(
        self, make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
    ) -> None:
        model = make_model()
        with pytest.raises(ValueError, match="wanted the texts of first"):
            compare_stores(
                factors, collect(model, texts, LAYER), collect(model, texts[1:], LAYER), model, LAYER
            )

    def test_other_widths_and_too_few_texts(
        self, make_model: Maker, texts: list[Sample], factors: snmf_kernels.Factorization
    ) -> None:
        narrow = snmf_kernels.fit(torch.rand(10, 20), 2, max_iter=2)
        with pytest.raises(ValueError, match="wanted Z with 24 rows for layer 1, got 10"):
            compare(narrow, make_model(), make_model(), texts, LAYER)
        with pytest.raises(ValueError, match="at least two texts"):
            compare(factors, make_model(), make_model(), texts[:1], LAYER)
