"""`snmf neuron | overlap | nearest | stability | compare`, and `snmf fit --k auto`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import snmf_kernels
from snmf_interp import LanguageModel, NeuronIndex
from snmf_interp.cli import app
from snmf_interp.features import Feature
from snmf_interp.runs import Run

from .test_models import change_weights

Maker = Callable[..., LanguageModel]
TEXTS = {
    # Square brackets are rich's markup: they must come out as they went in.
    "[red]days": ["Monday and Tuesday", "on Friday the cat ran", "not on Monday", "Tuesday and Friday"],
    "cats": ["the cat sat", "a cat ran .", "a big cat on a mat", "the small cat"],
    "weather": ["rain and sun", "the rain .", "a slow rain", "sun , not rain"],
}


@pytest.fixture
def model_folder(tmp_path: Path, make_model: Maker) -> Path:
    folder = tmp_path / "model"
    model = make_model()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Path:
    texts, run = tmp_path / "texts.json", tmp_path / "run"
    texts.write_text(json.dumps(TEXTS))
    assert snmf("collect", model_folder, texts, "--layers", "0-1", "--out", run).exit_code == 0
    assert snmf("fit", run, "--k", 4, "--keep", 0.2, "--max-iter", 5).exit_code == 0
    return run


def snmf(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shown(*arguments: Any) -> str:
    result = snmf(*arguments)
    assert result.exit_code == 0, result.output
    text: str = result.stdout
    return text


def rows(*arguments: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shown(*arguments, "--json").splitlines()]


def test_neuron(run: Path) -> None:
    factors = Run.open(run).factors(1)
    Z = torch.as_tensor(factors.Z)
    used = int((Z != 0).sum(1).argmax())
    expected = NeuronIndex.of({1: factors}).uses(1, used)
    found = rows("neuron", run, used, "--layers", 1)
    assert [row["feature"] for row in found] == [use.feature for use in expected]
    page = shown("neuron", run, used, "--layers", 1)
    assert f"neuron {used}: in {len(expected)} of 4 features" in page
    unused = (Z == 0).all(1).nonzero()
    if len(unused):
        assert "in 0 of 4 features" in shown("neuron", run, int(unused[0]), "--layers", 1)


def test_neurons_of_a_feature(run: Path) -> None:
    z = torch.as_tensor(Run.open(run).factors(1).Z)[:, 2]
    found = rows("neuron", run, "--layers", 1, "--feature", 2, "--direction")
    assert {row["neuron"] for row in found} == set(z.nonzero().squeeze(1).tolist())
    assert sum(row["written"] for row in found) == pytest.approx(1)
    assert all(row["features"] >= 1 for row in found)
    page = shown("neuron", run, "--layers", 1, "--feature", 2, "--direction", "--top", 2)
    assert "of what " in page
    assert f"{len(found)} neurons, {len(found) - 2} not shown" in page
    assert "of what " not in shown("neuron", run, "--layers", 1, "--feature", 2)


def test_overlap(run: Path) -> None:
    [pair] = rows("overlap", run, 0, 3, "--layers", 0)
    Z = torch.as_tensor(Run.open(run).factors(0).Z)
    assert len(pair["shared"]) == int(((Z[:, 0] != 0) & (Z[:, 3] != 0)).sum())
    assert pair["direction_cosine"] is None
    page = shown("overlap", run, 0, 3, "--layers", 0, "--direction")
    assert "shared neurons" in page
    assert "of what " in page


def test_nearest(run: Path, tmp_path: Path) -> None:
    found = rows("nearest", run, 1, "--layers", 0)
    assert {row["layer"] for row in found} == {0, 1}
    assert (0, 1) not in {(row["layer"], row["feature"]) for row in found}
    assert {row["layer"] for row in rows("nearest", run, 1, "--layers", 0, "--among", "1")} == {1}
    assert {row["layer"] for row in rows("nearest", run, 1, "--layers", 0, "--by", "neurons")} == {0}
    assert len(rows("nearest", run, 1, "--layers", 0, "--by", "direction")) == 7
    assert "correlation over tokens" in shown("nearest", run, 1, "--layers", 0)
    # In a copy of the run the nearest feature is the feature itself, however one looks.
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for by in ("tokens", "direction", "neurons"):
        best = rows("nearest", run, 1, "--layers", 0, "--by", by, "--other", copy)[0]
        assert (best["layer"], best["feature"]) == (0, 1)
        assert best["similarity"] == pytest.approx(1)
    assert f"nearest in {copy.name}" in "".join(
        shown("nearest", run, 1, "--layers", 0, "--other", copy)
        .replace(str(copy.parent) + "/", "")
        .splitlines()
    )


def test_stability(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [report] = rows("stability", run, "--layers", 0, "--seeds", 3)
    assert report["seeds"] == [0, 1, 2]
    assert len(report["recurrence"]) == 4
    assert {path.name for path in (run / "layer_0" / "starts").iterdir()} == {
        "seed_1.safetensors",
        "seed_2.safetensors",
    }
    monkeypatch.setattr(snmf_kernels, "fit_many", lambda *_a, **_o: pytest.fail("fitted again"))
    page = shown("stability", run, "--layers", 0, "--seeds", 3, "--top", 2)
    assert "4 features from 3 starts" in page
    assert "found again least" in page


def test_fit_auto(run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = tmp_path / "fresh"
    assert (
        snmf("collect", model_folder, tmp_path / "texts.json", "--layers", "0", "--out", fresh).exit_code == 0
    )
    arguments = ("fit", fresh, "--k", "auto", "--k-candidates", "2,3", "--keep", 0.2, "--max-iter", 5)
    page = shown(*arguments)
    assert "← chosen" in page
    record = Run.open(fresh).record(0)
    assert [row["k"] for row in record["k_choice"]["evidence"]] == [2, 3]
    assert record["options"]["k"] == record["k_choice"]["k"] == Run.open(fresh).factors(0).k
    monkeypatch.setattr(snmf_kernels, "fit_many", lambda *_a, **_o: pytest.fail("fitted again"))
    again = shown(*arguments)
    assert "← chosen" in again
    assert "kept from before" in again
    refused = snmf("fit", fresh, "--k", "auto", "--keep", 0.3)
    assert refused.exit_code == 2
    assert "was factorised with keep = 0.2, not 0.3" in " ".join(refused.stderr.split())
    given = snmf("fit", run, "--k", "auto")
    assert given.exit_code == 2
    assert "was factorised with k = 4, which was given" in " ".join(given.stderr.split())


def test_compare(run: Path, model_folder: Path, tmp_path: Path, make_model: Maker) -> None:
    same = shown("compare", run, model_folder, "--layers", 1)
    assert "0 of 4 features changed" in same
    tuned = tmp_path / "tuned"
    model = make_model()
    with torch.no_grad():
        model.model.model.layers[1].mlp.up_proj.weight[:] *= -1
    model.model.save_pretrained(tuned)
    model.tokenizer.save_pretrained(tuned)
    page = shown("compare", run, tuned)
    assert page.count("residual on the basis") == 2
    assert "Layer 0" in page
    [difference] = rows("compare", run, tuned, "--layers", 1)
    assert difference["second_residual"] > difference["first_residual"]
    assert {change["feature"] for change in difference["changes"]} == {0, 1, 2, 3}
    # Kept for later: one folder for each checkpoint.
    kept = list((run / "compare").iterdir())
    assert len(kept) == 2
    assert all((folder / "layer_1.json").is_file() for folder in kept)


def test_compare_of_moved_texts(run: Path, model_folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "texts.json"
    moved = there.rename(tmp_path / "elsewhere.json")
    gone = snmf("compare", run, model_folder)
    assert gone.exit_code == 2
    assert "there is no such file" in gone.stderr
    assert shown("compare", run, model_folder, "--texts", moved)
    moved.write_text(json.dumps(TEXTS | {"more": ["a dog"]}))
    changed = snmf("compare", run, model_folder, "--texts", moved)
    assert changed.exit_code == 2
    assert "are not those that" in " ".join(changed.stderr.split())


def test_text_is_no_markup(run: Path) -> None:
    features = Run.open(run).features(1, lambda: Run.open(run).load_model())
    days = next((feature.index for feature in features if feature.concept == "[red]days"), None)
    path = Run.open(run).features_path(1)
    if days is None:
        days = 0
        path.write_text(path.read_text().replace('"concept": null', '"concept": "[red]days-"', 1))
    assert "[red]days" in shown("overlap", run, days, (days + 1) % 4, "--layers", 1)
    assert "[red]days" in shown("stability", run, "--layers", 1, "--seeds", 2)
    assert "[red]days" in shown("neuron", run, "--feature", days, "--layers", 1)
    assert "[red]days" in shown("nearest", run, days, "--layers", 1)


def test_bad_input_is_one_line_and_exit_code_2(run: Path, model_folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("neuron", run, "--layers", 1), "give a NEURON or --feature"),
        (("neuron", run, 3, "--feature", 1, "--layers", 1), "not both"),
        (("neuron", run, 99, "--layers", 1), "there are neurons 0-23, got 99"),
        (("neuron", run, 3, "--layers", 2), "--layers: 2 was not collected"),
        (("neuron", run, "--feature", 4, "--layers", 1), "there are features 0-3, got 4"),
        (("overlap", run, 0, 9, "--layers", 1), "there are features 0-3, got 9"),
        (("nearest", run, 0, "--layers", 1, "--by", "x"), "--by: wanted tokens, direction or neurons"),
        (("nearest", run, 9, "--layers", 1), "there are features 0-3, got 9"),
        (("nearest", run, 0, "--layers", 1, "--other", tmp_path / "x"), "there is no such folder"),
        (("nearest", run, 0, "--layers", 1, "--among", "5"), "--among: 5 was not collected"),
        (("stability", run, "--layers", 1, "--seeds", 1), "seeds: wanted at least 2"),
        (("stability", run, "--layers", 1, "--threshold", 2), "threshold: wanted a cosine"),
        (("stability", run, "--layers", 7), "--layers: 7 was not collected"),
        (("fit", run, "--k", "many"), "--k: wanted a number of features, at least 1, or auto, got 'many'"),
        (("fit", run, "--k", "0"), "--k: wanted a number"),
        (("fit", run, "--k", "4", "--k-candidates", "2"), "there is nothing to choose"),
        (("fit", run, "--k", "auto", "--k-candidates", "2,x"), "--k-candidates: wanted numbers"),
        (("compare", run, "./nowhere"), "model './nowhere': there is no"),
        (("compare", run, model_folder, "--layers", "7"), "--layers: 7 was not collected"),
    ):  # fmt: skip
        result = snmf(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("named", [True, False])
def test_features_are_called_the_same_everywhere(
    run: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """By name, then the concept where there is one."""
    real = Run.features

    def called(self: Run, *arguments: Any, **options: Any) -> list[Feature]:
        return [
            replace(
                feature,
                name=f"name{feature.index}",
                concept=f"some_concept{feature.index}" if named else None,
                concept_precision=0.75 if named else 0.0,
            )
            for feature in real(self, *arguments, **options)
        ]

    monkeypatch.setattr(Run, "features", called)
    used = int((torch.as_tensor(Run.open(run).factors(1).Z) != 0).sum(1).argmax())
    assert snmf("features", run).exit_code == 0
    live = next(f.index for f in Run.open(run).features(1, lambda: pytest.fail("loaded")) if f.tokens)
    tuned = model_folder.parent / "tuned"
    shutil.copytree(model_folder, tuned)
    change_weights(tuned, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].mul_(1.5))
    for command in (
        ("nearest", run, live, "--layers", 1),
        ("overlap", run, live, live, "--layers", 1),
        ("neuron", run, "--feature", live, "--layers", 1),
        ("neuron", run, used, "--layers", 1),
        ("stability", run, "--layers", 1, "--seeds", 2),
        ("compare", run, tuned, "--layers", 1),
    ):
        page = shown(*command)
        assert re.search(r"name\d  some concept\d 0\.75  · " if named else r"name\d  · ", page), (
            command,
            page,
        )
