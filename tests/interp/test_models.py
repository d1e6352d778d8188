from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snmf_interp import LanguageModel, gguf_models, load_model, steer

from .conftest import FAMILIES, VOCABULARY, make_network, make_tokenizer

Maker = Callable[..., LanguageModel]
PATHS = {
    "gpt2": "transformer.h.2.mlp.c_proj.input",
    "gpt_neox": "gpt_neox.layers.2.mlp.dense_4h_to_h.input",
    "opt": "model.decoder.layers.2.fc2.input",
    "phi": "model.layers.2.mlp.fc2.input",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_down_projection(family: str, make_model: Maker) -> None:
    model = make_model(family)
    assert (model.n_layers, model.d_model) == (3, 16)
    assert [model.d_mlp(layer) for layer in range(3)] == [24, 24, 24]
    assert model.down_weight(1).shape == (16, 24)
    assert model.hook_name(2) == "blocks.2.mlp.hook_post"
    path = PATHS.get(family, "model.layers.2.mlp.down_proj.input")
    assert model.hf_hook_name(2) == path
    assert model.model.get_submodule(path.removesuffix(".input")) is model.down_projection(2)
    # Its weight is the matrix that the module applies, whichever way round the module keeps it.
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    bias = model.down_bias(2)
    expected = x @ model.down_weight(2).T + (0 if bias is None else bias)
    torch.testing.assert_close(model.down_projection(2)(x), expected)
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_lens_is_the_models_own_head(family: str, make_model: Maker) -> None:
    """On the residual stream in front of the final norm the lens gives the model's logits."""
    model = make_model(family)
    seen: list[torch.Tensor] = []
    handle = model.final_norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model.model(torch.tensor([[1, 4, 6, 8]])).logits[0]
    handle.remove()
    lens = model.logit_lens(seen[0][0])
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    if cap:
        lens = cap * torch.tanh(lens / cap)
    torch.testing.assert_close(lens, logits)


def test_text_part_of_a_multimodal_model() -> None:
    import transformers as hf

    text = make_network("gemma3").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    config = hf.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = LanguageModel(hf.Gemma3ForConditionalGeneration(config), make_tokenizer())
    assert model.hf_hook_name(1).endswith("language_model.layers.1.mlp.down_proj.input")
    assert model.n_layers == 3
    assert model.max_positions == 64


def test_experts_are_refused_with_what_was_looked_for() -> None:
    import transformers as hf

    config = hf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"MixtralForCausalLM.*experts.*mlp\.down_proj"):
        LanguageModel(hf.MixtralForCausalLM(config), make_tokenizer())


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Linear has no MLP down projection.*transformer\.h\.N\.mlp\.c_proj"
    ):
        LanguageModel(torch.nn.Linear(2, 2), make_tokenizer())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0-2,4", [0, 1, 2, 4]),
        (" 4 , 0 - 1 ", [0, 1, 4]),
        ("3", [3]),
        ("all", [0, 1, 2, 3, 4]),
        (2, [2]),
        ([4, 1, 1], [1, 4]),
        (["blocks.3.mlp.hook_post", "model.layers.1.mlp.down_proj.input", "0"], [0, 1, 3]),
        ("blocks.0.mlp.hook_post,model.layers.4.mlp.down_proj", [0, 4]),
    ],
)
def test_layers(layers: Any, expected: list[int], make_model: Maker) -> None:
    assert make_model(layers=5).parse_layers(layers) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ("5", r"layer 5 is outside tiny-llama, which has layers 0-4"),
        ("3-1", r"runs backwards; write it as '1-3'"),
        ("two", r"cannot read 'two'.*'0-3,6'.*blocks\.0"),
        ("blocks.9.mlp.hook_post", "layer 9 is outside"),
        ("blocks.1.mlp.hook_pre", "cannot read"),
        ("transformer.h.1.mlp.c_proj.input", "cannot read"),
    ],
)
def test_layers_refused(layers: Any, message: str, make_model: Maker) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(layers=5).parse_layers(layers)


class TestStartToken:
    def test_the_tokenizers_own(self, make_model: Maker) -> None:
        model = make_model(add_bos=True)
        assert model.start_token_id == 1
        assert model.encode("the cat") == [1, 4, 6]
        assert model.encode("the cat", max_tokens=2) == [1, 4]

    def test_declared_when_there_is_nothing_better(self, make_model: Maker) -> None:
        assert make_model(add_bos=False).start_token_id == 1

    def test_document_separator_before_declared(self) -> None:
        """SmolLM2's case: the declared BOS is a chat marker that no pretraining document began with."""
        tokenizer = make_tokenizer(add_bos=False)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
        network = make_network("llama")
        network.resize_token_embeddings(len(tokenizer))
        model = LanguageModel(network, tokenizer)
        assert model.start_token_id == len(VOCABULARY)
        assert len(VOCABULARY) in model.special_ids

    def test_chosen(self, make_model: Maker) -> None:
        assert make_model(start_token=None).encode("the cat") == [4, 6]
        assert make_model(start_token="<eos>").encode("the cat") == [2, 4, 6]
        assert make_model(start_token=3).start_token_id == 3
        with pytest.raises(ValueError, match="'nope' is not in the vocabulary"):
            make_model(start_token="nope")
        with pytest.raises(ValueError, match="outside the vocabulary"):
            make_model(start_token=1000)


def test_half_of_a_surrogate_pair_is_no_text(make_model: Maker) -> None:
    model = make_model()
    assert model.encode("the \ud83d cat") == model.encode("the \ufffd cat")


def test_fingerprint_tells_weights_apart(make_model: Maker) -> None:
    one, two = make_model(), make_model()
    assert one.fingerprint() == two.fingerprint()
    with torch.no_grad():
        two.model.lm_head.weight[0, 0] += 1
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint() != make_model("mistral").fingerprint()


class TestLoading:
    def test_local_folder(self, tmp_path: Path, make_model: Maker) -> None:
        model = make_model()
        model.model.save_pretrained(tmp_path)
        model.tokenizer.save_pretrained(tmp_path)
        loaded = load_model(tmp_path, device="cpu")
        assert loaded.fingerprint() == model.fingerprint()
        assert loaded.source == {"kind": "folder", "path": str(tmp_path)}
        half = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "model.gguf", "a/b/c"])
    def test_missing_path(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_model(name)

    def test_other_file(self, tmp_path: Path) -> None:
        (tmp_path / "weights.bin").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"not a \.gguf file"):
            load_model(tmp_path / "weights.bin")

    def test_damaged_gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SNMF_CACHE", str(tmp_path / "cache"))
        (tmp_path / "broken.gguf").write_bytes(b"this is not a model")
        with pytest.raises(ValueError, match="cannot read the GGUF file of 'broken'"):
            load_model(tmp_path / "broken.gguf")
        # Neither half a conversion nor scratch is left to be taken for a model later.
        assert list((tmp_path / "cache" / "models").iterdir()) == []

    def test_folder_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
        with pytest.raises(ValueError, match=r"cannot load .* as a causal language model"):
            load_model(tmp_path)

    def test_dtype(self) -> None:
        with pytest.raises(ValueError, match="dtype: wanted"):
            load_model("smollm2-135m", dtype=torch.int8)

    @pytest.mark.parametrize(("name", "command"), [(n, c) for n, (_, c) in gguf_models.BUNDLED.items()])
    def test_missing_package(self, name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        with pytest.raises(ModuleNotFoundError, match=command):
            load_model(name)


class TestConversionCache:
    @pytest.fixture
    def converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Maker) -> list[Path]:
        """Replace the reading of GGUF by that of a tiny model; the list grows with each conversion."""
        import transformers as hf

        monkeypatch.setenv("SNMF_CACHE", str(tmp_path / "cache"))
        calls: list[Path] = []
        model = make_model()

        def read(source: Path, **_options: Any) -> Any:
            calls.append(source)
            return model.model

        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", read)
        monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *_a, **_k: model.tokenizer)
        return calls

    def test_converted_once(self, tmp_path: Path, converted: list[Path]) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"one")
        first, sha256 = gguf_models.converted_folder(file)
        again, _ = gguf_models.converted_folder(file)
        assert first == again
        assert first.parent == tmp_path / "cache" / "models"
        assert sha256[:12] in first.name
        assert (first / "config.json").is_file()
        assert len(converted) == 1

    def test_changed_file_and_new_transformers(
        self, tmp_path: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"one")
        folders = {gguf_models.converted_folder(file)[0]}
        file.write_bytes(b"two")
        folders.add(gguf_models.converted_folder(file)[0])
        monkeypatch.setattr("transformers.__version__", "99.1.0")
        folders.add(gguf_models.converted_folder(file)[0])
        assert len(folders) == len(converted) == 3

    def test_killed_conversion_is_not_taken_for_a_model(
        self, tmp_path: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"one")
        save = type(make_network("llama")).save_pretrained

        def killed(self: Any, folder: Path, **options: Any) -> None:
            save(self, folder, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(make_network("llama")), "save_pretrained", killed)
            with pytest.raises(KeyboardInterrupt):
                gguf_models.converted_folder(file)
        folder, _ = gguf_models.converted_folder(file)
        assert (folder / "tokenizer.json").is_file()
        assert len(converted) == 2


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "gpt2"])
def test_output_weight_is_what_neurons_add_to_the_residual_stream(make_model: Maker, family: str) -> None:
    """Against the change of a block's output; Gemma's norm behind the MLP has a gain that turns the direction."""
    model = make_model(family)
    norm = model.output_norm(1)
    assert (norm is not None) == family.startswith("gemma")
    generator = torch.Generator().manual_seed(0)
    if norm is not None:
        with torch.no_grad():
            norm.weight.copy_(3 * torch.randn(16, generator=generator))
    ids = torch.randint(4, 20, (1, 9), generator=generator)
    z = torch.randn(24, generator=generator)
    seen: list[torch.Tensor] = []
    handle = model.block(1).register_forward_hook(
        lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).double())
    )
    written: list[torch.Tensor] = []
    inner = model.down_projection(1).register_forward_hook(lambda _, __, output: written.append(output))
    with torch.no_grad():
        model.model(ids)
        with steer(model, {1: z}, strength=1e-2):
            model.model(ids)
    handle.remove()
    inner.remove()
    change = (seen[1] - seen[0])[0]

    def agreement(weight: torch.Tensor) -> float:
        direction = (weight @ z).double()
        return float(torch.nn.functional.cosine_similarity(change, direction[None]).mean())

    wanted = model.output_weight(1).double() @ z.double()
    if norm is None:
        assert torch.equal(model.output_weight(1), model.down_weight(1))
        assert agreement(model.output_weight(1)) > 0.999
        return
    assert agreement(model.output_weight(1)) > agreement(model.down_weight(1)) + 0.1
    # What is left of the difference is what lies along all that the MLP writes, which a norm takes away.
    (raw,) = written[0].double()
    along = (raw @ (model.down_weight(1).double() @ z.double())) / raw.square().sum(1)
    rest = wanted - along[:, None] * norm(raw.float()).double() * raw.square().mean(1, keepdim=True).sqrt()
    assert float(torch.nn.functional.cosine_similarity(change, rest).min()) > 0.999
