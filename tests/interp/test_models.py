from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


class Wrapper(torch.nn.Module):
    """What peft's PeftModel is to a model: its parts lie deeper, and it can be merged."""

    def __init__(self, network: torch.nn.Module, *, merges: bool) -> None:
        super().__init__()
        self.inner = network
        if merges:
            self.merge_and_unload = lambda: network


class Adapted(torch.nn.Module):
    """What peft puts in the place of a layer."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


class TestWrapped:
    def test_adapters_are_to_be_merged(self) -> None:
        network = make_network("llama")
        with pytest.raises(ValueError, match=r"merge it first: model\.merge_and_unload\(\)"):
            LanguageModel(Wrapper(network, merges=True), make_tokenizer())
        mlp = network.model.layers[1].mlp
        mlp.down_proj = Adapted(mlp.down_proj)
        with pytest.raises(
            ValueError, match=r"has an adapter at model\.layers\.1\.mlp\.down_proj; merge it first"
        ):
            LanguageModel(network, make_tokenizer())

    def test_the_model_inside_is_named(self) -> None:
        wrapped = Wrapper(make_network("gpt2"), merges=False)
        with pytest.raises(ValueError, match="wraps a GPT2LMHeadModel; give that: its part 'inner'"):
            LanguageModel(wrapped, make_tokenizer())

    def test_a_compiled_model_has_the_same_fingerprint(self, make_model: Maker) -> None:
        compiled = LanguageModel(torch.compile(make_network("llama")), make_tokenizer())
        assert compiled.fingerprint() == make_model().fingerprint()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a checkpoint of one file."""
    from safetensors.torch import load, save_file

    weights = load((folder / "model.safetensors").read_bytes())
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


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

    @pytest.fixture
    def folder(self, tmp_path: Path, make_model: Maker) -> Path:
        folder = tmp_path / "model"
        model = make_model()
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "missing", [["model.layers.1.mlp.down_proj.weight"], ["lm_head.weight", "model.norm.weight"]]
    )
    def test_missing_weights_are_refused(self, folder: Path, missing: list[str]) -> None:
        """Transformers would draw them at random."""
        change_weights(folder, lambda weights: [weights.pop(name) for name in missing])
        with pytest.raises(
            ValueError, match=f"its checkpoint lacks {len(missing)} weights?: {', '.join(missing)}"
        ):
            load_model(folder)

    def test_weights_of_another_shape_are_refused(self, folder: Path) -> None:
        def cut(weights: dict[str, torch.Tensor]) -> None:
            weights["model.norm.weight"] = weights["model.norm.weight"][:8].clone()

        change_weights(folder, cut)
        with pytest.raises(ValueError, match=r"1 weight: model\.norm\.weight \(8 there, 16 wanted\)"):
            load_model(folder)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tied_heads_are_not_missing(self, tmp_path: Path, family: str, make_model: Maker) -> None:
        model = make_model(family)
        model.model.save_pretrained(tmp_path)
        model.tokenizer.save_pretrained(tmp_path)
        assert load_model(tmp_path).fingerprint() == model.fingerprint()

    def test_unused_weights_are_said(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        change_weights(folder, lambda weights: weights.update(extra=torch.ones(2)))
        load_model(folder)
        assert "has weights that its model does not use: 1 weight: extra" in caplog.text

    @pytest.mark.parametrize("harm", ["cut", "empty", "text"])
    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_damaged_weights_are_named(self, folder: Path, make_model: Maker, harm: str, name: str) -> None:
        if name.endswith(".bin"):
            (folder / "model.safetensors").unlink()
            torch.save(make_model().model.state_dict(), folder / name)
            assert load_model(folder).fingerprint() == make_model().fingerprint()
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-60], "empty": b"", "text": b"version https://git-lfs"}[harm])
        with pytest.raises(ValueError, match=rf"model {str(folder)!r}: {path} is damaged or incomplete"):
            load_model(folder)

    @pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
    def test_weights_that_are_not_finite(self, folder: Path, value: float, kind: str) -> None:
        change_weights(folder, lambda weights: weights["lm_head.weight"][0].fill_(value))
        with pytest.raises(
            ValueError, match=rf"the weight lm_head\.weight has {kind}; the checkpoint is damaged"
        ):
            load_model(folder)

    def test_weights_beyond_float16(self, folder: Path) -> None:
        change_weights(folder, lambda weights: weights["lm_head.weight"][0].fill_(1e6))
        assert load_model(folder).dtype == torch.float32
        with pytest.raises(
            ValueError, match="values that float16 cannot hold; load it in bfloat16 or float32"
        ):
            load_model(folder, dtype=torch.float16)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
    def test_folder_without_tokenizer(self, tmp_path: Path, family: str, make_model: Maker) -> None:
        """For some families transformers makes an empty one."""
        make_model(family).model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"there is no tokenizer in .*tokenizer\.save_pretrained"):
            load_model(tmp_path)

    def test_damaged_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match=f"the tokenizer in {folder} cannot be read"):
            load_model(folder)

    def test_code_of_its_own(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=r"has code of its own, .*--trust-remote-code.*SNMF_TRUST_REMOTE_CODE"
        ):
            load_model(folder)

    def test_folder_of_an_adapter(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"is an adapter, not a model; merge it first"):
            load_model(folder)

    def test_a_folder_that_was_mistyped_is_not_asked_from_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            "huggingface_hub.get_hf_file_metadata", lambda *_a, **_k: pytest.fail("asked the Hub")
        )
        (tmp_path / "models").mkdir()
        for name in ("models/nope", "nope/"):
            with pytest.raises(FileNotFoundError, match=r"there is no such file|has no folder .nope."):
                load_model(name)

    @pytest.mark.parametrize(
        ("status", "local"), [(None, True), (503, True), (404, False), (401, False), (200, False)]
    )
    def test_a_hub_that_does_not_answer_is_asked_once(
        self, monkeypatch: pytest.MonkeyPatch, status: int | None, local: bool
    ) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        asked: list[str] = []

        def ask(url: str, **_options: Any) -> None:
            asked.append(url)
            if status is None:
                raise ConnectionError("no route to host")
            if status != 200:
                answer = HfHubHTTPError.__new__(HfHubHTTPError)
                answer.response = SimpleNamespace(status_code=status)
                raise answer

        options: list[dict[str, Any]] = []

        def read(*_args: Any, **given: Any) -> None:
            options.append(given)
            raise OSError("not here")

        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
        wanted = "the Hub could not be reached" if local else "not here"
        with pytest.raises(
            ValueError, match=f"cannot load 'nobody/nothing' as a causal language model: {wanted}"
        ):
            load_model("nobody/nothing")
        assert len(asked) == 1
        assert [given["local_files_only"] for given in options] == [local]

    def test_dtype(self) -> None:
        with pytest.raises(ValueError, match="dtype: wanted"):
            load_model("smollm2-135m", dtype=torch.int8)

    @pytest.mark.parametrize(("name", "command"), [(n, c) for n, (_, c) in gguf_models.BUNDLED.items()])
    def test_missing_package(self, name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        with pytest.raises(ModuleNotFoundError, match=command):
            load_model(name)


def failing(*_args: Any, **_options: Any) -> None:
    raise OSError("a library says no more")


class TestConversionCache:
    @pytest.fixture
    def converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Maker) -> list[Path]:
        """Replace the reading of GGUF by that of a tiny model; the list grows with each conversion."""
        import transformers as hf

        monkeypatch.setenv("SNMF_CACHE", str(tmp_path / "cache"))
        calls: list[Path] = []
        model = make_model()

        def read(source: Path, **_options: Any) -> tuple[Any, dict[str, set[str]]]:
            calls.append(source)
            return model.model, {"missing_keys": set(), "unexpected_keys": set()}

        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", read)
        monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *_a, **_k: model.tokenizer)
        monkeypatch.setattr(gguf_models, "_quantisation", lambda path: f"of {path.read_bytes().decode()}")
        return calls

    def test_converted_once(self, tmp_path: Path, converted: list[Path]) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"one")
        first, facts = gguf_models.converted_folder(file)
        again, same = gguf_models.converted_folder(file)
        assert (first, facts) == (again, same)
        assert (facts["file"], facts["quantisation"]) == ("m.gguf", "of one")
        assert first.parent == tmp_path / "cache" / "models"
        assert facts["sha256"][:12] in first.name
        assert (first / "config.json").is_file()
        assert len(converted) == 1

    def test_quantisation_is_read_from_the_file(self, tmp_path: Path) -> None:
        """An older conversion did not say it: the file is asked."""
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        halves = np.zeros((3, 32), dtype=np.float16)
        writer.add_tensor("a", halves)
        packed = gguf.quantize(np.ones((1, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("b", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert gguf_models._quantisation(tmp_path / "m.gguf") == "F16 75 %, Q8_0 25 %"

    def test_missing_weights_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Maker
    ) -> None:
        import transformers as hf

        monkeypatch.setenv("SNMF_CACHE", str(tmp_path / "cache"))
        found = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": set[str]()}
        monkeypatch.setattr(
            hf.AutoModelForCausalLM, "from_pretrained", lambda *_a, **_k: (make_model().model, found)
        )
        (tmp_path / "m.gguf").write_bytes(b"one")
        with pytest.raises(
            ValueError, match=r"model 'm': its checkpoint lacks 1 weight: model\.norm\.weight"
        ):
            load_model(tmp_path / "m.gguf")
        assert list((tmp_path / "cache" / "models").iterdir()) == []

    def test_a_damaged_conversion(self, tmp_path: Path, converted: list[Path]) -> None:
        (tmp_path / "m.gguf").write_bytes(b"one")
        folder, _ = gguf_models.converted_folder(tmp_path / "m.gguf")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_models, "read_network", failing)
            (folder / "model.safetensors").write_bytes(b"")
            with pytest.raises(ValueError, match="delete its folder, and it is converted again"):
                load_model(tmp_path / "m.gguf")

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
