from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import snmf_kernels
from snmf_interp import LanguageModel, Sample
from snmf_interp.features import read_features
from snmf_interp.runs import CONFIG, Run

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
    assert json.loads((run.path / CONFIG).read_text())["layers"]["2"]["options"] == {
        "k": 4,
        "max_iter": 5,
        "seed": 3,
    }
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
    assert again.config["layers"]["0"]["options"] == before
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
