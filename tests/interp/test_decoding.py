"""Tokens as text where tokens are bytes: the smallest byte-level and byte-fallback tokenizers there are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import snmf_kernels
from snmf_interp import LanguageModel, Sample, collect, describe, words
from snmf_interp.decoding import MARK, split_text, token_bytes, token_text
from snmf_interp.labels import question
from snmf_interp.report_data import layer_data

TEXTS = {
    "Russian": "Привет, мир! Это тест.",
    "Chinese": "我喜欢吃苹果，你呢？",
    "Hindi": "बारिश हुई और हिन्दी में लिखा",
    "Persian": "می\u200cخواهم بروم",
    "emoji": "so much ❤️ 👍🏽 and 👨\u200d👩\u200d👧 in 🇩🇪!",
    "a mark of its own": f"this {MARK} was lost",
    "numbers": "in 1710, 5 €",
}
KINDS = ("byte-level", "byte fallback")


def make_tokenizer(kind: str) -> Any:
    """Every byte is a token; with fallback also ASCII letters, " m", one Russian letter and the mark itself."""
    if kind == "byte-level":
        vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        # Two bytes of which neither is a whole character: the end of one and the beginning of the next.
        bridge = ["Ł", "Ð"]  # 0x81 0xD0, inside "сп" and the like
        vocabulary |= {"".join(bridge): len(vocabulary)}
        inner = Tokenizer(models.BPE(vocabulary, [tuple(bridge)]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
    else:
        known = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *map(chr, range(33, 127)), "▁m"]
        known += ["р", MARK]
        inner = Tokenizer(
            models.BPE(
                {piece: i for i, piece in enumerate(known)},
                [("▁", "m")],
                unk_token="<unk>",
                byte_fallback=True,
            )
        )
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
class TestAnyScript:
    def test_the_whole_text_is_as_it_was_written(self, kind: str, name: str) -> None:
        tokenizer, text = make_tokenizer(kind), TEXTS[name]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == text
        at = 0
        for place, token in enumerate(ids):
            before, own, after = split_text(tokenizer, ids[:place], token, ids[place + 1 :])
            assert before + own + after == text
            # The token's own bytes are within what is shown of it, and what is shown moves on with it.
            first, last = len(before.encode()), len((before + own).encode())
            assert first <= at
            at += len(token_bytes(tokenizer, token))
            assert at <= last
            assert MARK not in own or name == "a mark of its own"

    def test_a_window_shows_a_part_of_the_text(self, kind: str, name: str) -> None:
        """Characters that it cuts are left out; none is shown in pieces."""
        tokenizer, text = make_tokenizer(kind), TEXTS[name]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for width in (3, 5, 8):
            for place, token in enumerate(ids):
                window = ids[max(0, place - width) : place], token, ids[place + 1 : place + 1 + width]
                assert "".join(split_text(tokenizer, *window)) in text

    def test_a_piece_alone_is_one_mark(self, kind: str, name: str) -> None:
        tokenizer = make_tokenizer(kind)
        for token in tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"]:
            shown = token_text(tokenizer, token)
            assert shown == token_bytes(tokenizer, token).decode(errors="ignore") or shown == MARK
            assert split_text(tokenizer, [], token, []) == ("", shown, "")


def test_what_modifies_a_character_is_shown_with_it() -> None:
    tokenizer = make_tokenizer("byte fallback")
    for text, modifier in (("a ❤️ b", "️"), ("a 👍🏽 b", "🏽"), ("a ही b", "ी"), ("a e\u0301 b", "\u0301")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        place = len(tokenizer(text[: text.index(modifier)], add_special_tokens=False)["input_ids"])
        before, own, after = split_text(tokenizer, ids[:place], ids[place], ids[place + 1 :])
        assert (before, own, after) == ("a ", text[2:-2], " b")


@pytest.mark.parametrize("kind", KINDS)
def test_features_labels_and_page_hold_no_bytes(kind: str) -> None:
    """From a model to everything that is shown of it."""
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LanguageModel(LlamaForCausalLM(config), tokenizer)
    store = collect(model, [Sample(name, text, name) for name, text in TEXTS.items()], "1")
    factors = snmf_kernels.fit(store.layer(1).T.float(), 6, keep=0.2, max_iter=20)
    features = describe(factors, store, model, 1)
    texts = {i: model.token_text(i) for i in store.corpus.ids.unique().tolist() if i not in model.special_ids}
    page = layer_data(1, features, factors, store, texts)
    for feature, row in zip(features, page["features"], strict=True):
        for token, context in zip(feature.tokens, row["contexts"], strict=True):
            whole = token.before + token.token + token.after
            assert whole in TEXTS[token.sample]
            assert "".join(context["pieces"]) == whole
        # Read as JSON, in which the page and a language model get them.
        asked = "".join(str(question(feature, side)) for side in ("input", "output"))
        for shown in (json.dumps(row, ensure_ascii=False), asked, "".join(word for word, _ in feature.words)):
            assert not [letter for letter in "ĠĊðŁÐÑàäĥ" if letter in shown]
            assert "<0x" not in shown


def test_words_of_scripts_with_vowel_signs() -> None:
    assert words.split_words("बारिश हुई, 👍🏽 می\u200cخواهم don't") == [
        "बारिश", "हुई", ",", "👍🏽", "می\u200cخواهم", "don't",
    ]  # fmt: skip
    assert words.is_letters("बारिश")
    assert not words.is_letters("a1")
    assert not words.is_letters(MARK)
