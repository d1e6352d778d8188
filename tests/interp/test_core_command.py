from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from snmf_interp import core_command
from snmf_interp.cli import app
from snmf_interp.core import assign_features, holm
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
    assert "exclusive sets " in shown
    assert "Random sets: 4 for each set" in shown
    assert "none is below 1/5 = 0.2" in shown
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
    questions = {"core": table["core_minimum_p"], "exclusive": table["exclusive_p"]}
    tested = {name: p for name, p in questions.items() if p is not None}
    assert found["corrected"]["questions"] == dict(zip(tested, holm(list(tested.values())), strict=True))
    assert found["corrected"]["sets"].keys() == {effect["name"] for effect in table["exclusive"]}
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


@pytest.fixture
def shown_as(model_folder: Path, out: Path) -> Iterator[Any]:
    """What the command shows where every exclusive set raises all words, its own by so much more than the others."""
    path = next((out / "tiny-layer-1").rglob("weekdays.json"))
    before = path.read_text()

    def show(more: float, p: float, random_more: float = 0.0) -> str:
        content = json.loads(before)
        table = content["table"]
        effect = table["exclusive"][0]
        table["exclusive"] = []
        for word in table["words"]:
            shifts = {other: 1.0 + more * (other == word) for other in table["words"]}
            random = effect["random"] | {"statistics": [random_more] * 4, "rises": [1.0, 1.0, 1.0, -1.0]}
            table["exclusive"].append(
                effect | {"name": word, "shifts": shifts, "statistic": more, "random": random, "p_value": p}
            )
        table["exclusive_statistic"], table["exclusive_p"] = more, p
        content["corrected"]["questions"]["exclusive"] = p
        content["corrected"]["sets"] = dict.fromkeys(table["words"], min(3 * p, 1.0))
        path.write_text(json.dumps(content))
        result = snmf("core", model_folder, *TINY, "--out", out)
        assert result.exit_code == 0, result.output
        return result.stdout

    yield show
    path.write_text(before)


def test_raising_the_own_word_as_all_others_is_no_finding(shown_as: Any) -> None:
    shown = shown_as(-0.02, 0.475, 0.1)
    answer = (
        "exclusive sets do not raise their own word above the other members: by -0.02 on average, p = 0.47"
    )
    # That all raise their own word, which random sets do too, comes after the answer.
    assert shown.index(answer) < shown.index("raised at all: 3 of 3, and 75% of their random sets")
    assert "above the other members: 0 of 3, and 100% of their random sets" in shown
    assert "do not surely raise their own word" in shown_as(0.3, 0.2)
    assert "exclusive sets raise their own word above the other members: by +0.30" in shown_as(0.3, 0.02)


@pytest.mark.parametrize(("value", "width"), [(1.25, 80), (-10.25, 100)])
def test_twelve_words_fit(value: float, width: int) -> None:
    words = [f"word{i}" for i in range(12)]
    effect = {"name": "September", "shifts": dict.fromkeys(words, value)}
    console = Console(file=StringIO(), width=width)
    console.print(core_command._shifts({"words": words, "core": None, "exclusive": [effect]}))
    shown = console.file.getvalue()
    assert shown.count(f"{value:+.1f}") == 12
    assert "September" in shown


def test_results_of_another_format_are_measured_anew(model_folder: Path, out: Path) -> None:
    path = next((out / "tiny-layer-1").rglob("weekdays.json"))
    before = path.read_text()
    path.write_text(json.dumps({"format": 1, "options": json.loads(before)["options"]}))
    result = snmf("core", model_folder, *TINY, "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text()) == json.loads(before)


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
