"""Tiny random models of each family, made from configurations: nothing is downloaded."""

from __future__ import annotations

import errno
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from typing import Any

import pytest
import torch

from snmf_interp import LanguageModel, Sample

# fmt: off
WORDS = [
    "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "rug", "Monday", "Tuesday", "Friday", "red", "blue",
    "green", "one", "two", "three", "rain", "sun", ".", ",", "big", "small", "and", "not", "fast", "slow",
]
# fmt: on
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
FAMILIES = ("gpt2", "llama", "gemma2", "gemma3", "qwen2", "gpt_neox", "opt", "phi", "mistral", "qwen3")


def make_tokenizer(*, add_bos: bool = True) -> Any:
    """A word-level tokenizer over :data:`VOCABULARY`; with ``add_bos`` it adds ``<bos>`` by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_network(family: str, *, layers: int = 3) -> Any:
    """A random causal LM of ``family`` with 3 layers, width 16 and 24 neurons, the same on every call."""
    import transformers as hf

    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    if family == "gpt2":
        config: Any = hf.GPT2Config(
            vocab_size=len(VOCABULARY), n_embd=16, n_inner=24, n_layer=layers, n_head=2, n_positions=64
        )
    elif family == "opt":
        sizes.pop("intermediate_size")
        config = hf.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16)
    else:
        names = {
            "llama": "LlamaConfig",
            "mistral": "MistralConfig",
            "gemma2": "Gemma2Config",
            "gemma3": "Gemma3TextConfig",
            "qwen2": "Qwen2Config",
            "qwen3": "Qwen3Config",
            "gpt_neox": "GPTNeoXConfig",
            "phi": "PhiConfig",
        }
        extra = grouped if family not in ("gpt_neox", "phi") else {}
        config = getattr(hf, names[family])(**sizes, **extra)
    network = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Initial weights are tiny: at this scale differences in position or padding would drown in rounding.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return network.eval()


def refuse_writing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make everything below a folder answer as a read-only file system does, also to root."""
    real_open, real_mkdir, real_access = os.open, os.mkdir, os.access

    def inside(path: Any) -> bool:
        return isinstance(path, str | Path) and Path(path).absolute().is_relative_to(folder.absolute())

    def refuse(path: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def guarded_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and inside(path):
            refuse(path)
        return real_open(path, flags, *args, **options)

    def guarded_mkdir(path: Any, *args: Any, **options: Any) -> None:
        # As the system does for one that is there.
        if inside(path) and not Path(path).exists():
            refuse(path)
        real_mkdir(path, *args, **options)

    def guarded_access(path: Any, mode: int, **options: Any) -> bool:
        return not (mode & os.W_OK and inside(path)) and real_access(path, mode, **options)

    monkeypatch.setattr(os, "open", guarded_open)
    monkeypatch.setattr(os, "mkdir", guarded_mkdir)
    monkeypatch.setattr(os, "access", guarded_access)


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder but locks."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    """``make_model(family)`` -> LanguageModel."""

    def make(
        family: str = "llama", *, add_bos: bool = True, layers: int = 3, **options: Any
    ) -> LanguageModel:
        network = make_network(family, layers=layers)
        return LanguageModel(network, make_tokenizer(add_bos=add_bos), name=f"tiny-{family}", **options)

    return make


@pytest.fixture
def samples() -> list[Sample]:
    """Twelve texts of different lengths in three concepts."""
    texts = {
        "days": ["on Monday the cat ran", "Friday and Tuesday", "not on Tuesday , on Friday .", "Monday"],
        "colours": ["a red rug", "the blue dog sat on the green mat .", "red and blue", "one green cat"],
        "weather": [
            "the rain and the sun",
            "sun .",
            "a slow rain , a fast rain , and not one big sun",
            "rain",
        ],
    }
    return [
        Sample(f"{label}/{i}", text, label) for label, rows in texts.items() for i, text in enumerate(rows)
    ]
