from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import snmf_kernels
from snmf_interp import LanguageModel, Sample, collect, load_model
from snmf_interp.features import read_features
from snmf_interp.refits import other_starts
from snmf_interp.runs import CONFIG, Run

from .conftest import contents, refuse_writing

Maker = Callable[..., LanguageModel]


@pytest.fixture
def run(tmp_path: Path, make_model: Maker, samples: list[Sample]) -> Run:
    return Run.collect(tmp_path / "run", make_model(), samples, "0,2", texts="here", batch_size=4)


def fit(run: Run, layers: Any, k: int = 4, **options: Any) -> dict[int, dict[str, Any]]:
    return dict(run.fit(layers, k, max_iter=5, **options))


def test_config_says_how_it_was_made(run: Run) -> None:
    config = json.loads((run.path / CONFIG).read_text())
    assert config["model"]["name"] == "tiny-llama"
    assert len(config["model"]["weights"]) == 16
    assert config["texts"]["source"] == "here"
    assert config["hook_names"]["2"] == ["blocks.2.mlp.hook_post", "model.layers.2.mlp.down_proj.input"]
    assert config["counts"]["first_position"] == 12
    assert config["collect"]["batch_size"] == 4
    assert "torch" in config["versions"]


def test_fit_and_features(run: Run, make_model: Maker) -> None:
    records = fit(run, [0, 2], seed=3)
    assert [records[layer]["reused"] for layer in (0, 2)] == [False, False]
    assert Run.open(run.path).fitted == [0, 2]
    factors = run.factors(2)
    expected = snmf_kernels.fit(run.store().layer(2).T, 4, max_iter=5, seed=3)
    assert torch.equal(torch.as_tensor(factors.Z), torch.as_tensor(expected.Z))
    assert Run.open(run.path).record(2)["options"] == {"k": 4, "max_iter": 5, "seed": 3}
    features = run.features(2, make_model())
    assert [feature.index for feature in features] == [0, 1, 2, 3]
    # Described once; read afterwards, without a model.
    assert run.features(2, lambda: pytest.fail("loaded the model")) == features


def test_finished_layers_are_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(run, [0])
    real, fitted = snmf_kernels.fit, []
    monkeypatch.setattr(snmf_kernels, "fit", lambda A, k, **o: (fitted.append(k), real(A, k, **o))[1])
    records = dict(Run.open(run.path).fit([0, 2], 4, max_iter=5))
    assert fitted == [4]
    assert (records[0]["reused"], records[2]["reused"]) == (True, False)


def test_other_options_need_overwrite(run: Run, make_model: Maker) -> None:
    fit(run, [0])
    run.features(0, make_model())
    with pytest.raises(ValueError, match=r"layer 0 of .* was factorised with k = 4, not 3; use --overwrite"):
        fit(run, [0], 3)
    fit(run, [0], 3, overwrite=True)
    assert len(run.features(0, make_model())) == 3


def killed(*_args: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


def test_killed_while_fitting_again(run: Run, make_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new factors are there, the old ones stand with their record and features."""
    before = fit(run, [0])[0]["options"]
    features = run.features(0, make_model())
    monkeypatch.setattr(snmf_kernels, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(run, [0], 3, overwrite=True)
    again = Run.open(run.path)
    assert again.fitted == [0]
    assert again.record(0)["options"] == before
    assert again.features(0, make_model()) == features


def test_killed_while_saving_again(run: Run, make_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the old factors and the new ones, neither the old record nor the old features stand."""
    fit(run, [0])
    run.features(0, make_model())
    with monkeypatch.context() as patch:
        patch.setattr(snmf_kernels.Factorization, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(run, [0], 3, overwrite=True)
    again = Run.open(run.path)
    assert again.fitted == []
    assert not again.features_path(0).exists()
    fit(again, [0], 3)
    assert again.fitted == [0]


def test_other_weights_are_refused(run: Run, make_model: Maker) -> None:
    fit(run, [0])
    with pytest.raises(ValueError, match="weights of 'tiny-mistral' are not those"):
        run.features(0, make_model("mistral"))


def test_a_model_that_was_moved(tmp_path: Path, make_model: Maker, samples: list[Sample]) -> None:
    for name, family in (("there", "llama"), ("other", "mistral")):
        made = make_model(family)
        made.model.save_pretrained(tmp_path / name)
        made.tokenizer.save_pretrained(tmp_path / name)
    run = Run.collect(tmp_path / "run", load_model(tmp_path / "there"), samples, "0", texts="here")
    (tmp_path / "there").rename(tmp_path / "here")
    with pytest.raises(
        FileNotFoundError, match=rf"is no longer at {tmp_path / 'there'}; say .*--run-model PATH"
    ):
        run.load_model()
    assert run.load_model(model=tmp_path / "here").fingerprint() == run.config["model"]["weights"]
    with pytest.raises(ValueError, match=r"the weights of .* are not those"):
        run.load_model(model=tmp_path / "other")


def test_a_model_that_was_given_in_python(run: Run, tmp_path: Path, make_model: Maker) -> None:
    with pytest.raises(ValueError, match=r"\('tiny-llama'\) was given in Python.*--run-model"):
        run.load_model()
    made = make_model()
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    assert run.load_model(model=tmp_path / "model").fingerprint() == made.fingerprint()


def test_a_folder_that_is_no_run(tmp_path: Path, make_model: Maker) -> None:
    make_model().model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"is a model's folder: .* make a run with `snmf collect MODEL TEXTS"
    ):
        Run.open(tmp_path / "model")
    (tmp_path / CONFIG).write_text('{"name": "something else"}')
    with pytest.raises(ValueError, match=r"is no run: its config\.json is not of `snmf collect`"):
        Run.open(tmp_path)


def test_what_is_not_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; make it with `snmf collect"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no activations"):
        Run.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"layer 2 of .* is not factorised yet: `snmf fit"):
        run.factors(2)
    (run.path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Run.open(run.path)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [0, 2]), ("all", [0, 2]), ("2", [2]), ("2,0-0", [0, 2]), ("blocks.2.mlp.hook_post", [2])],
)
def test_layers(run: Run, layers: str | None, expected: list[int]) -> None:
    assert run.parse_layers(layers) == expected


@pytest.mark.parametrize("layers", [2, [2], "2", ["blocks.2.mlp.hook_post"], (layer for layer in (2,))])
def test_layers_to_fit_as_they_come(run: Run, layers: Any) -> None:
    assert list(fit(run, layers)) == [2]
    assert Run.open(run.path).fitted == [2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-2", "1 was not collected; this run has 0, 2"),
        ("x", "cannot read 'x'"),
        ("1-", "cannot read"),
        (",", "no layer"),
    ],
)
def test_layers_refused(run: Run, layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.parse_layers(layers)


class TestCautions:
    """What a newcomer's first texts are warned of, before the fit and in one line."""

    def run_of(
        self, make_model: Maker, path: Path, labels: list[str | None], text: str = "the cat on a mat"
    ) -> Run:
        words = ("Monday", "dog", "rain", "sun", "red", "blue", "Tuesday", "fast", "big", "small")
        samples = [
            Sample(str(i), f"{words[i % 10]} {words[i // 10 % 10]} {text}", label)
            for i, label in enumerate(labels)
        ]
        return Run.collect(path, make_model(), samples, "0", sink_threshold=None)

    def test_enough(self, make_model: Maker, tmp_path: Path) -> None:
        run = self.run_of(make_model, tmp_path, ["a", "b"] * 40)
        assert run.cautions(20, [0]) == []

    def test_few_tokens(self, make_model: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        run = self.run_of(make_model, tmp_path, [None] * 40)
        (caution,) = run.cautions(100, [0])
        assert "280 tokens are few for 100 features" in caution
        assert "at most 28 features" in caution
        list(run.fit([0], 30, max_iter=2))
        (record,) = [one for one in caplog.records if one.name == "snmf_interp.runs"]
        assert "280 tokens are few for 30 features" in record.message
        assert "\n" not in record.message
        # What is kept is not warned of again.
        list(run.fit([0], 30, max_iter=2))
        assert len([one for one in caplog.records if one.name == "snmf_interp.runs"]) == 1

    def test_few_texts_and_useless_labels(self, make_model: Maker, tmp_path: Path) -> None:
        few = self.run_of(make_model, tmp_path / "few", ["a", "b"] * 5)
        assert "10 different texts are few" in few.cautions(2, [0])[0]
        one = self.run_of(make_model, tmp_path / "one", ["x"] * 40)
        assert one.cautions(2, [0]) == [
            "all labelled texts have the label 'x': no feature gets a concept from it"
        ]
        each = self.run_of(make_model, tmp_path / "each", [f"label {i}" for i in range(40)])
        assert "every text has a label of its own" in each.cautions(2, [0])[0]


def test_features_of_an_older_version_are_described_anew(run: Run, make_model: Maker) -> None:
    """Their words are of another logit lens."""
    fit(run, [0], 3)
    features = run.features(0, make_model())
    path = run.features_path(0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    older = [
        {name: value for name, value in row.items() if name != "version"} | {"promoted": []} for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    with pytest.raises(ValueError, match="has features of version 1, not 3"):
        read_features(path)
    assert run.features(0, make_model()) == features
    assert read_features(path) == features


def same(one: snmf_kernels.Factorization, two: snmf_kernels.Factorization) -> bool:
    return torch.equal(torch.as_tensor(one.Z), torch.as_tensor(two.Z))


class TestSeveralCommandsAtOnce:
    def test_each_keeps_its_layer(self, run: Run) -> None:
        """Both have read the run before either writes to it."""
        one, two = Run.open(run.path), Run.open(run.path)
        fit(one, [0])
        fit(two, [2], 3)
        two.note(2, "remark", "two")
        one.note(0, "remark", "one")
        again = Run.open(run.path)
        assert again.fitted == one.fitted == two.fitted == [0, 2]
        assert [again.record(layer)["options"]["k"] for layer in (0, 2)] == [4, 3]
        assert [again.record(layer)["remark"] for layer in (0, 2)] == ["one", "two"]

    def test_notes_of_one_layer(self, run: Run) -> None:
        fit(run, [0])
        one, two = Run.open(run.path), Run.open(run.path)
        one.note(0, "first", 1)
        two.note(0, "second", 2)
        record = Run.open(run.path).record(0)
        assert (record["first"], record["second"]) == (1, 2)

    @pytest.mark.parametrize(("k", "kept"), [(4, True), (3, False)])
    def test_the_same_layer(self, run: Run, monkeypatch: pytest.MonkeyPatch, k: int, kept: bool) -> None:
        """A layer that another command has finished meanwhile stays as it is."""
        real, other = snmf_kernels.fit, Run.open(run.path)

        def meanwhile(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(snmf_kernels, "fit", real)
            fit(other, [0], k)
            return real(*args, **options)

        monkeypatch.setattr(snmf_kernels, "fit", meanwhile)
        if kept:
            assert fit(run, [0])[0]["reused"]
        else:
            with pytest.raises(ValueError, match="was factorised with k = 3, not 4"):
                fit(run, [0])
        assert Run.open(run.path).record(0)["options"]["k"] == run.factors(0).k == k

    def test_features_of_factors_that_were_replaced_are_not_kept(
        self, run: Run, make_model: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from snmf_interp import features

        fit(run, [0])
        real, model = features.describe, make_model()

        def meanwhile(*args: Any, **options: Any) -> Any:
            fit(Run.open(run.path), [0], 3, overwrite=True)
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(features, "describe", meanwhile)
            assert len(run.features(0, model)) == 4
        assert not run.features_path(0).exists()
        assert len(run.features(0, model)) == 3

    def test_processes(self, run: Run) -> None:
        """Four processes that all add to one record, again and again."""
        fit(run, [0])
        program = (
            "import sys; from snmf_interp.runs import Run\n"
            "run = Run.open(sys.argv[1])\n"
            "for i in range(4): run.note(0, f'{sys.argv[2]}/{i}', i)"
        )
        children = [
            subprocess.Popen([sys.executable, "-c", program, str(run.path), str(number)])
            for number in range(4)
        ]
        assert [child.wait() for child in children] == [0, 0, 0, 0]
        noted = [name for name in run.record(0) if "/" in name]
        assert len(noted) == 16

    def test_one_tree(self, run: Run) -> None:
        """The second command waits for the first, and then has its tree."""
        program = (
            "import sys; from snmf_interp.runs import Run\n"
            "_, record = Run.open(sys.argv[1]).hierarchy(0, [4, 2], keep=0.2)\n"
            "print(record['reused'])"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        assert sorted(child.communicate()[0] for child in children) == ["False\n", "True\n"]
        assert not (run.path / "layer_0" / "tree" / "checkpoint").exists()


def as_older(run: Run) -> None:
    """Write the run as versions did that kept the records of all layers in config.json."""
    config = json.loads((run.path / CONFIG).read_text())
    config["layers"] = {str(layer): run.record(layer) for layer in run.fitted}
    for layer in run.fitted:
        (run.path / f"layer_{layer}" / "fit.json").unlink()
    (run.path / CONFIG).write_text(json.dumps(config))


def test_a_run_of_an_older_version(run: Run, make_model: Maker, samples: list[Sample]) -> None:
    fit(run, [0, 2])
    records = {layer: run.record(layer) for layer in (0, 2)}
    as_older(run)
    older = Run.open(run.path)
    assert older.fitted == [0, 2]
    assert {layer: older.record(layer) for layer in (0, 2)} == records
    assert fit(older, [0])[0]["reused"]
    fit(older, [0], 3, overwrite=True)
    assert older.record(2) == Run.open(run.path).record(2) == records[2]
    assert Run.open(run.path).record(0)["options"]["k"] == 3
    as_older(run)
    Run.collect(run.path, make_model(), samples, "0,2", texts="here", batch_size=4)
    assert Run.open(run.path).fitted == [0, 2]


def test_an_older_record_does_not_outlive_its_factors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(run, [0, 2])
    as_older(run)
    with monkeypatch.context() as patch:
        patch.setattr(snmf_kernels.Factorization, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(Run.open(run.path), [0], 3, overwrite=True)
    assert Run.open(run.path).fitted == [2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


class TestDamage:
    """The command that made a file makes it again."""

    def test_factors(self, run: Run) -> None:
        fit(run, [0])
        whole = run.factors(0)
        cut(run.factors_path(0))
        with pytest.raises(ValueError, match="is damaged"):
            run.factors(0)
        assert not fit(run, [0])[0]["reused"]
        assert same(run.factors(0), whole)

    def test_tree(self, run: Run) -> None:
        whole, _ = run.hierarchy(0, [4, 2], keep=0.2)
        cut(run.path / "layer_0" / "tree" / "hierarchy.safetensors")
        again, record = run.hierarchy(0, [4, 2], keep=0.2)
        assert not record["reused"]
        assert torch.equal(again.levels[1].Y, whole.levels[1].Y)

    def test_other_starts(self, run: Run) -> None:
        fit(run, [0])
        whole = other_starts(run, 0, 2)[1]
        cut(run.path / "layer_0" / "starts" / "seed_1.safetensors")
        assert same(other_starts(run, 0, 2)[1], whole)

    @pytest.mark.parametrize("damaged", [CONFIG, "activations/plan.json"])
    def test_records(self, run: Run, make_model: Maker, samples: list[Sample], damaged: str) -> None:
        """What the message advises is what helps: deleting the file."""
        fit(run, [0])
        config = json.loads((run.path / CONFIG).read_text())
        (run.path / damaged).write_text("{")
        arguments = (run.path, make_model(), samples, "0,2")
        if damaged != CONFIG:
            with pytest.raises(ValueError, match="delete it to start afresh"):
                Run.collect(*arguments, texts="here", batch_size=4)
            (run.path / damaged).unlink()
        Run.collect(*arguments, texts="here", batch_size=4)
        again = Run.open(run.path)
        assert again.fitted == [0]
        assert json.loads((run.path / CONFIG).read_text()) == config


def test_shards_without_a_plan_are_not_taken_for_those_of_another(
    run: Run, make_model: Maker, samples: list[Sample]
) -> None:
    (run.path / "activations" / "plan.json").unlink()
    other = make_model("mistral")
    Run.collect(run.path, other, samples, "0,2", texts="here", batch_size=4)
    expected = collect(other, samples, "0,2", batch_size=4)
    assert torch.equal(Run.open(run.path).store().layer(2), expected.layer(2))


class TestReadOnly:
    """A run that may not be written to: everything is shown, and what could not be kept is said once."""

    @pytest.fixture
    def read_only(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
        fit(run, [0])
        refuse_writing(monkeypatch, run.path)
        return run

    def test_what_is_found_is_shown(
        self, read_only: Run, make_model: Maker, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = make_model()
        before = contents(read_only.path)
        for _ in range(2):
            assert len(read_only.features(0, model)) == 4
        assert read_only.words(model)["the"] > 0
        assert read_only.token_texts(model)[6] == "cat"
        assert len(other_starts(read_only, 0, 3)) == 3
        hierarchy, record = read_only.hierarchy(0, [4, 2], keep=0.2)
        assert not record["reused"]
        assert len(read_only.descriptions(0, model, hierarchy)) == 6
        assert contents(read_only.path) == before
        for what in ("features", "counts of words", "texts of tokens", "fits from other starts"):
            assert caplog.text.count(f"{what} could not be kept in {read_only.path}: Read-only") == 1
        assert "the hierarchy is not kept" in caplog.text

    def test_what_is_not_only_for_later_fails(self, read_only: Run) -> None:
        with pytest.raises(OSError, match="Read-only"):
            fit(read_only, [2])
