from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from snmf_interp import core_command
from snmf_interp.cli import app
from snmf_interp.core import assign_features
from snmf_interp.evaluation import split_texts
from snmf_interp.runs import Run

TINY = ("--layers", 1, "--k", 8, "--min-precision", 0, "--controls", 3, "--random", 4)


def snmf(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .conftest import make_network, make_tokenizer

    folder = tmp_path_factory.mktemp("core") / "tiny"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(model_folder: Path) -> Path:
    folder = model_folder.parent / "out"
    result = snmf("core", model_folder, *TINY, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_page(model_folder: Path, out: Path) -> None:
    result = snmf("core", model_folder, *TINY, "--out", out)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "8 features: weekdays" in shown
    assert "or more of 3 features" in shown
    assert "exclusive: " in shown
    assert "4 sets of the same size" in shown
    # The tokenizer knows three of the seven days.
    assert shown.count("left out") == 4
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json(model_folder: Path, out: Path) -> None:
    """It says what the table says; half of the sentences choose the features."""
    result = snmf("core", model_folder, *TINY, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    table = found["table"]
    assert found["layer"] == table["layer"] == 1
    assert table["words"] == ["Monday", "Tuesday", "Friday"]
    assert list(table["sets"]["members"]) == table["words"]
    run = Run.open(out / "tiny-layer-1")
    Z = run.factors(1).Z
    core = (
        ((Z[:, list(table["sets"]["members"].values())] != 0).sum(1) >= table["sets"]["m"])
        .nonzero()
        .flatten()
    )
    assert list(table["sets"]["core"]) == core.tolist()
    for effect in table["exclusive"]:
        assert effect["random"]["count"] == 4
        assert effect["p_value"] in (0.2, 0.4, 0.6, 0.8, 1.0)
    from snmf_interp.concepts import text_scores

    store = run.store()
    first = [i for i, id in enumerate(store.corpus.sample_ids) if int(id.rpartition("-")[2]) % 2 == 0]
    scores = text_scores(run.factors(1).Y, store.samples(1), len(store.corpus.labels))[:, first]
    words = found["options"]["words"]
    again = assign_features(scores, [store.corpus.labels[i] for i in first], words)
    assert found["assignment"]["features"] == list(again.features)
    assert len(found["assignment"]["held_out"]) == 7


def test_kept(model_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command shows what is there; other options are measured."""
    first = snmf("core", model_folder, *TINY, "--out", out, "--json").stdout
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return measured(*arguments)

    measured = core_command._measured
    monkeypatch.setattr(core_command, "_measured", counted)
    assert snmf("core", model_folder, *TINY, "--out", out, "--json").stdout == first
    assert snmf("core", out / "tiny-layer-1", *TINY, "--json").stdout == first
    assert not calls
    other = snmf("core", out / "tiny-layer-1", *TINY, "--json", "--kl", 0.1, "--concepts", "one,two,three")
    assert other.exit_code == 2, other.output
    other = snmf("core", out / "tiny-layer-1", *TINY, "--json", "--kl", 0.1, "--concepts", "two,three")
    assert other.exit_code == 0, other.output
    assert json.loads(other.stdout)["table"]["target"] == 0.1
    assert len(calls) == 2


def test_equal_texts_are_on_one_side(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, run = tmp_path / "texts.json", tmp_path / "run"
    once = {
        word: [f"{a} {word} {b}" for a in ("the", "a") for b in ("cat", "dog", "mat")]
        for word in ("one", "two")
    }
    texts.write_text(
        json.dumps({word: [*own, *(text.replace(" ", "  ") for text in own)] for word, own in once.items()})
    )
    assert snmf("collect", model_folder, texts, "--layers", "1", "--out", run).exit_code == 0
    groups: list[Any] = []

    def split(labels: Any, **options: Any) -> Any:
        groups.append(options["groups"].tolist())
        return split_texts(labels, **options)

    monkeypatch.setattr("snmf_interp.evaluation.split_texts", split)
    result = snmf("core", run, *TINY, "--concepts", "one,two")
    assert result.exit_code == 0, result.output
    assert groups == [[*range(6), *range(6), *range(12, 18), *range(12, 18)]]


def test_too_few_words(model_folder: Path, out: Path) -> None:
    result = snmf("core", out / "tiny-layer-1", *TINY[:4], "--min-precision", 1.1)
    assert result.exit_code == 0, result.output
    assert "no group to test" in " ".join(result.stdout.split())


def test_errors(model_folder: Path, out: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"days": ["on Monday", "on Friday"], "cats": ["the cat", "a cat ran"]}))
    other = tmp_path / "run"
    assert snmf("collect", model_folder, texts, "--layers", "0-1", "--out", other).exit_code == 0
    for arguments, message in (
        ((model_folder,), "--layers: say which layer of"),
        ((model_folder, "--layers", 1, "--concepts", "days"), "wanted one of weekdays, months"),
        (
            (model_folder, "--layers", 1, "--neuron-scale", "log"),
            "--neuron-scale: wanted rms or none, got 'log'",
        ),
        ((model_folder, "--layers", 9, "--out", tmp_path), "layer 9 is outside"),
        ((other,), "has layers 0, 1: say which"),
        ((other, "--layers", 2), "2 was not collected"),
        ((other, "--layers", 1, "--k", 3), "no text of"),
        ((tmp_path / "nowhere", "--layers", 1), "nowhere"),
        ((out / "tiny-layer-1", *TINY, "--kl", 0), "kl: wanted a divergence above 0"),
        ((out / "tiny-layer-1", *TINY, "--m", 9), "m: wanted 2 to 3"),
    ):
        result = snmf("core", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
