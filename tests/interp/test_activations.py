from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snmf_interp import (
    ActivationStore,
    LanguageModel,
    Sample,
    activations,
    collect,
    doctor,
    files,
    generate,
    hooks,
)
from snmf_interp.store import MANIFEST, PLAN, shard_name

from .conftest import FAMILIES, VOCABULARY

Maker = Callable[..., LanguageModel]


def own_activations(model: LanguageModel, text: str, layer: int) -> torch.Tensor:
    """The down projection's input ``[t, d_mlp]`` for one text alone, by an independent forward hook."""
    seen: list[torch.Tensor] = []
    handle = model.down_projection(layer).register_forward_hook(
        lambda _m, inputs, _out: seen.append(inputs[0].clone())
    )
    with torch.no_grad():
        model.model(torch.tensor([model.encode(text)]))
    handle.remove()
    return seen[0].reshape(-1, model.d_mlp(layer))


def same_bits(one: ActivationStore, two: ActivationStore) -> bool:
    return all(
        torch.equal(one.layer(layer), two.layer(layer)) and torch.equal(one.places(layer), two.places(layer))
        for layer in one.layers
    ) and (one.manifest == two.manifest)


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_bit_exact_one_text_at_a_time(
        self, family: str, make_model: Maker, samples: list[Sample]
    ) -> None:
        model = make_model(family)
        store = collect(model, samples, "all", batch_size=1, sink_threshold=None)
        for layer in range(3):
            expected = [own_activations(model, sample.text, layer)[1:] for sample in samples]
            assert torch.equal(store.layer(layer), torch.cat(expected))

    def test_batches_in_either_padding(self, family: str, make_model: Maker, samples: list[Sample]) -> None:
        """Measured on CPU: at most 7.3e-7 of the largest activation (qwen2), the same on either side."""
        model = make_model(family)
        alone = collect(model, samples, "all", batch_size=1, sink_threshold=None)
        for side in ("left", "right"):
            padded = collect(model, samples, "all", batch_size=5, padding_side=side, sink_threshold=None)
            assert padded.counts["padding"] > 0
            for layer in range(3):
                assert torch.equal(padded.tokens(layer), alone.tokens(layer))
                scale = float(alone.layer(layer).abs().max())
                torch.testing.assert_close(padded.layer(layer), alone.layer(layer), rtol=0, atol=5e-6 * scale)

    def test_one_pass_is_one_by_one(self, family: str, make_model: Maker, samples: list[Sample]) -> None:
        model = make_model(family)
        together = collect(model, samples, "0,2", sink_threshold=None)
        for layer in (0, 2):
            assert torch.equal(
                together.layer(layer), collect(model, samples, layer, sink_threshold=None).layer(layer)
            )


class TestCapture:
    def test_is_the_models_tensor(self, make_model: Maker) -> None:
        model = make_model("gemma2")
        ids = torch.tensor([[1, 4, 6, 8]])
        with hooks.capture(model, [0, 2]) as captured:
            hooks.forward(model, ids, torch.ones_like(ids))
        assert sorted(captured) == [0, 2]
        assert captured[2].shape == (1, 4, 24)

    def test_stops_after_the_last_wanted_layer(self, make_model: Maker) -> None:
        model = make_model()
        ids = torch.tensor([[1, 4, 6, 8]])
        ran: list[str] = []
        handles = [
            model.down_projection(1).register_forward_hook(lambda *_: ran.append("projection 1")),
            model.down_projection(0).register_forward_hook(lambda *_: ran.append("projection 0")),
        ]
        with hooks.capture(model, [0, 1], stop_early=True) as stopped:
            hooks.forward(model, ids, torch.ones_like(ids))
        assert ran == ["projection 0"]
        with hooks.capture(model, [0, 1]) as full:
            hooks.forward(model, ids, torch.ones_like(ids))
        for handle in handles:
            handle.remove()
        assert all(torch.equal(stopped[layer], full[layer]) for layer in (0, 1))

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_leaves_the_model_as_it_was(self, make_model: Maker, error: type[BaseException] | None) -> None:
        model = make_model()
        ids = torch.tensor([[1, 4, 6, 8]])
        before = hooks.forward(model, ids, torch.ones_like(ids)).logits
        if error is None:
            with hooks.capture(model, [0, 1], stop_early=True):
                hooks.forward(model, ids, torch.ones_like(ids))
        else:
            with pytest.raises(error), hooks.capture(model, [0, 1]):
                raise error
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.model.modules())
        assert torch.equal(hooks.forward(model, ids, torch.ones_like(ids)).logits, before)

    def test_anothers_stop_passes_through(self, make_model: Maker) -> None:
        """An outer block's stop must end the outer block and not be mistaken for one's own."""
        model = make_model()
        ids = torch.tensor([[1, 4]])
        reached = False
        with hooks.capture(model, [0], stop_early=True):
            with hooks.capture(model, [2], stop_early=True):
                hooks.forward(model, ids, torch.ones_like(ids))
            reached = True
        assert not reached

    def test_padding(self) -> None:
        ids, mask = hooks.pad([[5, 6, 7], [8]], side="left", pad_id=9)
        assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
        assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
        ids, mask = hooks.pad([[5, 6, 7], [8]], side="right", pad_id=9)
        assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
        assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


class TestMasks:
    def test_first_position_and_specials_inside(self, make_model: Maker) -> None:
        """A BOS inside the text is left out by its id; the one in front by its place."""
        texts = [Sample("0", "the cat <bos> ran <eos>"), Sample("1", "<pad> dog sat")]
        store = collect(make_model(), texts, 1, sink_threshold=None)
        assert store.tokens(1).tolist() == [4, 6, 9, 7, 8]
        assert store.positions(1).tolist() == [1, 2, 4, 2, 3]
        assert store.samples(1).tolist() == [0, 0, 0, 1, 1]
        assert (store.counts["first_position"], store.counts["special"]) == (2, 3)
        assert store.counts["kept"] == {"1": 5}

    def test_first_position_without_a_start_token(self, make_model: Maker) -> None:
        store = collect(make_model(start_token=None), [Sample("0", "the cat ran")], 1, sink_threshold=None)
        assert store.tokens(1).tolist() == [6, 9]

    def test_first_position_with_an_ordinary_start_token(self, make_model: Maker) -> None:
        store = collect(make_model(start_token="the"), [Sample("0", "the cat")], 1, sink_threshold=None)
        assert store.tokens(1).tolist() == [4, 6]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_that_is_also_a_word(self, side: Any, make_model: Maker, samples: list[Sample]) -> None:
        """Padding is known by its place, so a word that serves as padding id is kept where it is text."""
        model = make_model()
        plain = collect(model, samples, 1, padding_side=side, sink_threshold=None)
        model.tokenizer.pad_token = "cat"
        model._specials = frozenset({0, 1, 2, 3})
        padded = collect(model, samples, 1, padding_side=side, sink_threshold=None)
        assert torch.equal(plain.places(1), padded.places(1))
        assert 6 in padded.tokens(1)

    def test_planted_sink(self, make_model: Maker, samples: list[Sample]) -> None:
        """The word 'rain' made enormous at layer 1 is left out there, and only there."""
        model = make_model()
        everything = collect(model, samples, "0,1", sink_threshold=None)
        rain = int(model.tokenizer.convert_tokens_to_ids("rain"))

        def enlarge(module: Any, inputs: Any) -> Any:
            return (torch.where(current["ids"].eq(rain)[..., None], inputs[0] * 1000, inputs[0]),)

        current: dict[str, torch.Tensor] = {}
        pad = hooks.pad

        def remember(*args: Any, **kwargs: Any) -> Any:
            current["ids"], mask = pad(*args, **kwargs)
            return current["ids"], mask

        handle = model.down_projection(1).register_forward_pre_hook(enlarge)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hooks, "pad", remember)
            store = collect(model, samples, "0,1", sink_threshold=50)
        handle.remove()
        n_rain = int((everything.tokens(1) == rain).sum())
        assert n_rain == 4
        assert store.counts["sinks"] == {"0": 0, "1": n_rain}
        assert rain not in store.tokens(1)
        assert torch.equal(store.layer(0), everything.layer(0))
        assert torch.equal(store.layer(1), everything.layer(1)[everything.tokens(1) != rain])

    def test_long_texts_are_cut(self, make_model: Maker, samples: list[Sample]) -> None:
        store = collect(make_model(), samples, 0, max_tokens=3, sink_threshold=None)
        assert store.positions(0).max() == 2
        assert store.counts["samples_cut"] == sum(len(sample.text.split()) > 2 for sample in samples)
        # The model's own limit holds where none is given.
        long = collect(make_model(), [Sample("0", "cat " * 100)], 0, max_tokens=None, sink_threshold=None)
        assert len(long.tokens(0)) == 63

    def test_nothing_left(self, make_model: Maker) -> None:
        with pytest.raises(ValueError, match="no token is left"):
            collect(make_model(), [Sample("0", "<bos> <eos>")], 0)


class TestStore:
    def test_same_on_disk_and_in_memory(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample]
    ) -> None:
        model = make_model()
        memory = collect(model, samples, "0,2", shard_tokens=10)
        disk = collect(model, samples, "0,2", shard_tokens=10, out=tmp_path)
        assert same_bits(memory, disk)
        assert same_bits(ActivationStore.open(tmp_path), disk)
        assert disk.plan["hook_names"]["2"] == [
            "blocks.2.mlp.hook_post",
            "model.layers.2.mlp.down_proj.input",
        ]
        assert disk.corpus.labels == [sample.label for sample in samples]
        assert disk.corpus.sample_ids == [sample.id for sample in samples]

    def test_order_is_that_of_the_samples(self, make_model: Maker, samples: list[Sample]) -> None:
        """However texts share batches and shards, row i is text i's token."""
        model = make_model()
        expected = [i for sample in samples for i in model.encode(sample.text)[1:]]
        for shard_tokens in (1, 10, 1000):
            store = collect(model, samples, 0, batch_size=4, shard_tokens=shard_tokens, sink_threshold=None)
            assert store.tokens(0).tolist() == expected
            assert store.samples(0).tolist() == sorted(store.samples(0).tolist())

    def test_equal_texts_are_grouped(self, tmp_path: Path, make_model: Maker) -> None:
        """Also those that are equal as far as they are collected."""
        texts = ["the cat", "The  cat", "a dog ran on the mat", "a dog ran on the rug", "sun"]
        for out in (None, tmp_path / "store"):
            store = collect(make_model(), texts, 0, out=out, max_tokens=5)
            assert store.corpus.groups.tolist() == [0, 0, 2, 2, 4]
            assert store.counts["samples_equal"] == store.corpus.n_equal == 2
        # What earlier versions wrote does not say which texts were the same; their tokens do.
        path = tmp_path / "store" / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"id": row["id"], "label": row["label"]}) + "\n" for row in rows))
        assert ActivationStore.open(tmp_path / "store").corpus.groups.tolist() == [0, 1, 2, 2, 4]

    def test_texts_as_they_come(self, make_model: Maker) -> None:
        """Each object is a sample, also where its text is empty."""
        model = make_model()
        store = collect(model, ["the cat", "", {"text": "a dog", "label": " pets "}, Sample("0", "sun")], [0])
        assert store.corpus.sample_ids == ["0", "1", "2", "0#2"]
        assert store.corpus.labels == [None, None, "pets", None]
        assert store.samples(0).unique().tolist() == [0, 2, 3]
        assert collect(model, (text for text in ["the cat"]), 0).corpus.tokens_of(
            0
        ) == store.corpus.tokens_of(0)
        assert collect(model, {"days": ["on Monday"]}, 0).corpus.labels == ["days"]

    @pytest.mark.parametrize(
        "given", ["the cat", Path("texts.txt"), b"the cat", 3, [3], ["the cat", ["a dog"]]]
    )
    def test_no_list_of_texts(self, given: Any, make_model: Maker) -> None:
        with pytest.raises(ValueError, match=r"wanted a (list of texts|string)"):
            collect(make_model(), given, 0)

    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"model: wanted a LanguageModel, .*got str"):
            collect("smollm2-135m", ["the cat"], 0)  # type: ignore[arg-type]

    def test_context(self, make_model: Maker) -> None:
        texts = [Sample("0", "the cat"), Sample("1", "one two three the dog")]
        store = collect(make_model(), texts, 0, sink_threshold=None)
        place = int(store.places(0)[4])
        three = store.corpus.context(place, 2)
        assert three == ([19, 20], 21, [4, 7])
        assert store.corpus.context(int(store.places(0)[1]), 5) == ([1, 4], 6, [])

    def test_stored_dtype(self, tmp_path: Path, make_model: Maker, samples: list[Sample]) -> None:
        model = make_model()
        exact = collect(model, samples, 1, sink_threshold=None).layer(1)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
            store = collect(model, samples, 1, dtype=name, out=tmp_path / name, sink_threshold=None)
            assert torch.equal(store.layer(1), exact.to(dtype))

    def test_overflow_is_told(self, make_model: Maker, samples: list[Sample]) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.model.layers[1].mlp.up_proj.weight.mul_(1e8)
        with pytest.raises(ValueError, match=r"dtype: layer 1 has activations up to .* beyond float16"):
            collect(model, samples, 1, dtype="float16")
        with torch.no_grad():
            model.model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
        with pytest.raises(
            ValueError, match="the model itself overflows in float32; its weights are damaged"
        ):
            collect(model, samples, 1)

    @pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("-inf", "infinite values")])
    def test_a_weight_that_is_not_finite_is_named(
        self, make_model: Maker, samples: list[Sample], value: str, kind: str
    ) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.model.layers[1].mlp.up_proj.weight[3, 4] = float(value)
        message = rf"layer 1 has .* not finite: the weight model\.layers\.1\.mlp\.up_proj\.weight has {kind}"
        with pytest.raises(ValueError, match=message):
            collect(model, samples, 1)

    def test_padding_that_has_no_embedding(self, make_model: Maker, samples: list[Sample]) -> None:
        """Padding is masked: any id will do for it."""
        expected = collect(make_model(), samples, "0,2")
        model = make_model()
        model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert model.tokenizer.pad_token_id == len(VOCABULARY)
        assert model.pad_id == 0
        found = collect(model, samples, "0,2")
        assert torch.equal(found.layer(2), expected.layer(2))
        assert generate(model, ["the cat", "rain"], max_new_tokens=2)

    def test_a_token_that_has_no_embedding_is_named(self, make_model: Maker, samples: list[Sample]) -> None:
        model = make_model()
        model.tokenizer.add_tokens(["zebra"])
        message = "the token 'zebra' has the id 32, and the model has embeddings for 32 ids"
        with pytest.raises(ValueError, match=message):
            collect(model, [*samples, Sample("z", "the zebra sat", None)], 0)
        with pytest.raises(ValueError, match=message):
            generate(model, "the zebra")
        with pytest.raises(ValueError, match=message):
            list(doctor.check_model(model, ["the zebra sat", "one red dog"]))

    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
    def test_offloaded_weights_are_refused(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], how: str
    ) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = make_model()
        place = (str(tmp_path),) if how == "disk_offload" else ()
        getattr(accelerate, how)(model.model, *place, execution_device=torch.device("cpu"))
        for use in (
            lambda: collect(model, samples, 0),
            lambda: model.output_weight(0),
            lambda: generate(model, "the cat"),
            lambda: model.logit_lens(torch.ones(1, 16)),
        ):
            with pytest.raises(ValueError, match=r"is offloaded.*load the model on one device"):
                use()

    def test_layer_that_was_not_collected(self, make_model: Maker, samples: list[Sample]) -> None:
        with pytest.raises(ValueError, match="layer 1 was not collected; this store has 0, 2"):
            collect(make_model(), samples, "0,2").layer(1)

    def test_open_says_what_is_missing(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample]
    ) -> None:
        with pytest.raises(FileNotFoundError, match="holds no activations"):
            ActivationStore.open(tmp_path)
        collect(make_model(), samples, 0, out=tmp_path, shard_tokens=10)
        shard = tmp_path / shard_name(1)
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-10])
        with pytest.raises(ValueError, match=f"{shard.name} is missing or damaged"):
            ActivationStore.open(tmp_path)
        shard.write_bytes(whole)
        (tmp_path / MANIFEST).unlink()
        with pytest.raises(FileNotFoundError, match=r"unfinished \(6 of 6 shards\)"):
            ActivationStore.open(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
            ({"max_tokens": 1}, "max_tokens: wanted at least 2"),
            ({"sink_threshold": 1.0}, "sink_threshold: wanted more than 1"),
            ({"padding_side": "both"}, "padding_side: wanted 'left' or 'right'"),
            ({"dtype": "int8"}, "dtype: wanted one of float32, float16, bfloat16"),
            ({"shard_tokens": 0}, "shard_tokens: wanted at least 1"),
        ],
    )
    def test_options_refused(
        self, options: dict[str, Any], message: str, make_model: Maker, samples: list[Sample]
    ) -> None:
        with pytest.raises(ValueError, match=message):
            collect(make_model(), samples, 0, **options)
        with pytest.raises(ValueError, match="samples is empty"):
            collect(make_model(), [], 0)


def counting(compute: Callable[..., Any], begins: list[int]) -> Callable[..., Any]:
    """``compute``, noting the first sample of each shard that it is asked for."""

    def counted(run: Any, begin: int, end: int, bar: Any) -> Any:
        begins.append(begin)
        return compute(run, begin, end, bar)

    return counted


class TestResume:
    OPTIONS: dict[str, Any] = {"shard_tokens": 10, "batch_size": 3}  # noqa: RUF012 - never changed

    def test_killed_at_every_write(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that dies at any write, before or after it takes effect, is finished to the same bits."""
        model = make_model()
        whole = collect(model, samples, "0,2", out=tmp_path / "whole", **self.OPTIONS)
        n_shards = len(whole.plan["shards"])
        assert n_shards == 6
        replace = Path.replace
        # Tokens, samples, plan, each shard, manifest.
        for dies_at in range(3 + n_shards + 1):
            for after in (False, True):
                folder = tmp_path / f"{dies_at}-{after}"
                writes = 0

                def replace_or_die(
                    self: Path, target: Path, dies_at: int = dies_at, after: bool = after
                ) -> Path:
                    nonlocal writes
                    writes += 1
                    if writes == dies_at + 1:
                        if after:
                            replace(self, target)
                        raise KeyboardInterrupt
                    return replace(self, target)

                with monkeypatch.context() as patch:
                    patch.setattr(Path, "replace", replace_or_die)
                    with pytest.raises(KeyboardInterrupt):
                        collect(model, samples, "0,2", out=folder, **self.OPTIONS)
                computed: list[int] = []
                with monkeypatch.context() as patch:
                    patch.setattr(activations._Run, "_compute", counting(activations._Run._compute, computed))
                    resumed = collect(model, samples, "0,2", out=folder, **self.OPTIONS)
                assert same_bits(resumed, whole)
                finished = max(0, min(dies_at + after - 3, n_shards))
                assert len(computed) == n_shards - finished
                assert not list(folder.glob(".*.tmp"))

    def test_damaged_shard_is_computed_again(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = make_model()
        whole = collect(model, samples, "0,2", **self.OPTIONS)
        collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS)
        (tmp_path / MANIFEST).unlink()
        (tmp_path / shard_name(2)).write_bytes(b"nonsense")
        assert same_bits(collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS), whole)
        assert "shard-00002.safetensors is damaged" in caplog.text

    @pytest.mark.parametrize("harm", ["missing", "cut", "flipped"])
    @pytest.mark.parametrize("name", [shard_name(2), "tokens.safetensors", "samples.jsonl", MANIFEST])
    def test_finished_store_is_mended(
        self,
        tmp_path: Path,
        make_model: Maker,
        samples: list[Sample],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        harm: str,
    ) -> None:
        """Only what is missing or damaged is computed again, by the same call."""
        model = make_model()
        whole = collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        path = tmp_path / name
        if harm == "missing":
            path.unlink()
        else:
            damaged = bytearray(before[name])
            # The last byte of the last tensor, or of the text.
            damaged[-3] ^= 0xFF
            path.write_bytes(damaged if harm == "flipped" else damaged[:-3])
        computed: list[int] = []
        monkeypatch.setattr(activations._Run, "_compute", counting(activations._Run._compute, computed))
        assert same_bits(collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS), whole)
        assert computed == ([whole.plan["shards"][2][0]] if name == shard_name(2) else [])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("tensor", ["layer_0", "layer_2", "places", "norms"])
    def test_a_changed_byte_is_found_when_it_is_read(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], tensor: str
    ) -> None:
        collect(make_model(), samples, "0,2", out=tmp_path, **self.OPTIONS)
        path = tmp_path / shard_name(1)
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        content[8 + length + header[tensor]["data_offsets"][0]] ^= 1
        path.write_bytes(content)
        if tensor in ("places", "norms"):
            with pytest.raises(
                ValueError, match=rf"{path.name} is missing or damaged \({tensor} does not match"
            ):
                ActivationStore.open(tmp_path)
            return
        store = ActivationStore.open(tmp_path)
        other = {"layer_0": 2, "layer_2": 0}[tensor]
        assert len(store.layer(other))
        with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged \({tensor} does not match"):
            store.layer(2 - other)

    def test_a_store_without_checksums_is_read(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample]
    ) -> None:
        """As older versions wrote it."""
        from safetensors.torch import load_file, save_file

        model = make_model()
        whole = collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS)
        for path in tmp_path.glob("*.safetensors"):
            save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path)
        assert same_bits(ActivationStore.open(tmp_path), whole)
        assert same_bits(collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS), whole)

    def test_another_collection_that_began_meanwhile_stands(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_model()
        tokenise = activations._tokenise

        def meanwhile(*args: Any) -> Any:
            monkeypatch.setattr(activations, "_tokenise", tokenise)
            collect(model, samples, "1", out=tmp_path, **self.OPTIONS)
            return tokenise(*args)

        monkeypatch.setattr(activations, "_tokenise", meanwhile)
        with pytest.raises(ValueError, match=r"differs in layers \(\[1\] there, \[0, 2\] now\)"):
            collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS)
        expected = collect(model, samples, "1", **self.OPTIONS)
        assert torch.equal(ActivationStore.open(tmp_path).layer(1), expected.layer(1))

    def test_finished_store_needs_no_pass(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_model()
        first = collect(model, samples, 0, out=tmp_path)
        monkeypatch.setattr(hooks, "forward", lambda *_: pytest.fail("ran the model"))
        assert same_bits(collect(model, samples, 0, out=tmp_path), first)

    def test_other_options_are_refused(
        self, tmp_path: Path, make_model: Maker, samples: list[Sample]
    ) -> None:
        model = make_model()
        collect(model, samples, "0,2", out=tmp_path, **self.OPTIONS)
        plan = (tmp_path / PLAN).read_bytes()
        for change, message in (
            ({"layers": "0-2"}, r"layers \(\[0, 2\] there, \[0, 1, 2\] now\)"),
            ({"batch_size": 4}, r"batch_size \(3 there, 4 now\)"),
            ({"dtype": "bfloat16"}, r"dtype \('float32' there, 'bfloat16' now\)"),
            ({"max_tokens": 7}, r"max_tokens \(64 there, 7 now\)"),
            ({"sink_threshold": None}, r"sink_threshold \(5.0 there, None now\)"),
            ({"padding_side": "left"}, "padding_side"),
            ({"samples": samples[1:]}, "differs in the texts;"),
            ({"model": make_model("mistral")}, "differs in the model's weights;"),
            ({"model": make_model(start_token="<eos>")}, r"start_token \(1 there, 2 now\)"),
        ):
            arguments = {"model": model, "samples": samples, "layers": "0,2", **self.OPTIONS, **change}
            with pytest.raises(ValueError, match=message):
                collect(**arguments, out=tmp_path)
        assert (tmp_path / PLAN).read_bytes() == plan

    @pytest.mark.slow
    def test_killed_process(self, tmp_path: Path, make_model: Maker, samples: list[Sample]) -> None:
        """The same with a real SIGKILL in the middle of the third shard."""
        model = make_model()
        whole = collect(model, samples, "0,2", **self.OPTIONS)
        program = f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from tests.interp.conftest import make_network, make_tokenizer
            from snmf_interp import LanguageModel, Sample, activations, collect
            compute = activations._Run._compute
            def slow(run, begin, end, bar):
                if begin >= run.plan["shards"][2][0]:
                    print("third", flush=True)
                    time.sleep(60)
                return compute(run, begin, end, bar)
            activations._Run._compute = slow
            samples = [Sample(*row) for row in {[(s.id, s.text, s.label) for s in samples]!r}]
            model = LanguageModel(make_network("llama"), make_tokenizer(), name="tiny-llama")
            collect(model, samples, "0,2", out={str(tmp_path / "run")!r}, shard_tokens=10, batch_size=3)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "third\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert len(list((tmp_path / "run").glob("shard-*"))) == 2
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("shard-*")}
        time.sleep(0.01)
        resumed = collect(model, samples, "0,2", out=tmp_path / "run", **self.OPTIONS)
        assert same_bits(resumed, whole)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_replacing_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
