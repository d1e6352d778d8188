"""A model whose MLP is known: a group of neurons for each concept, which its words switch on and which writes them."""

from __future__ import annotations

from typing import Any

import torch

from snmf_interp import LanguageModel, Sample

from .conftest import VOCABULARY, make_tokenizer

CONCEPTS = {
    "days": ("Monday", "Tuesday", "Friday"),
    "colours": ("red", "blue", "green"),
    "weather": ("rain", "sun", "fast"),
}
FILLERS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "rug", "and", "not", "big")
GROUP, ANSWERING, WIDTH = 4, 96, 960
# Neurons of each concept; others answer to fillers at random, most to nothing.
NEURONS = {name: list(range(GROUP * i, GROUP * (i + 1))) for i, name in enumerate(CONCEPTS)}


def planted_model() -> LanguageModel:
    """One block without attention; the residual stream is one-hot over the vocabulary."""
    import transformers as hf

    size = len(VOCABULARY)
    config = hf.LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    network: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    block = network.model.layers[0]
    fillers = torch.tensor([VOCABULARY.index(word) for word in FILLERS])
    with torch.no_grad():
        network.model.embed_tokens.weight.copy_(torch.eye(size))
        block.self_attn.o_proj.weight.zero_()
        gate, up = torch.zeros(WIDTH, size), torch.zeros(WIDTH, size)
        down = 0.02 * torch.randn(size, WIDTH, generator=generator)
        for name, words in CONCEPTS.items():
            tokens = torch.tensor([VOCABULARY.index(word) for word in words])
            for neuron in NEURONS[name]:
                gate[neuron] = -1.0
                gate[neuron, tokens] = up[neuron, tokens] = 0.6 + 0.2 * torch.rand(3, generator=generator)
                down[tokens, neuron] = 0.2
        for neuron in range(GROUP * len(CONCEPTS), ANSWERING):
            some = fillers[torch.randperm(len(fillers), generator=generator)[:3]]
            gate[neuron, some] = up[neuron, some] = 0.4 * torch.rand(3, generator=generator)
        block.mlp.gate_proj.weight.copy_(gate)
        block.mlp.up_proj.weight.copy_(up)
        block.mlp.down_proj.weight.copy_(down)
        network.lm_head.weight.copy_(0.7 * torch.eye(size))
        # It never ends or leaves the text.
        network.lm_head.weight[:4] = -1.0
    return LanguageModel(network.eval(), make_tokenizer(), name="planted")


def planted_samples(count: int = 36, *, seed: int = 0) -> list[Sample]:
    """Texts of fillers with two different words of their concept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: tuple[str, ...], number: int) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=generator)[:number].tolist()]

    samples = []
    for name, words in CONCEPTS.items():
        for i in range(count):
            text = [*draw(FILLERS, 6), *draw(words, 2)]
            order = torch.randperm(len(text), generator=generator).tolist()
            samples.append(Sample(f"{name}/{i}", " ".join(text[j] for j in order), name))
    return samples
