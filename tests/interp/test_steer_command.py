from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from snmf_interp import LanguageModel, generate, load_model, steer, steer_command
from snmf_interp.cli import app
from snmf_interp.effects import WordEffects
from snmf_interp.generation import Continuation
from snmf_interp.runs import Run

Maker = Callable[..., LanguageModel]


def snmf(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and a run on it whose layer 1 is factorised."""
    from .conftest import make_network, make_tokenizer

    root = tmp_path_factory.mktemp("steer")
    make_network("llama").save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    texts = root / "texts.json"
    texts.write_text(
        json.dumps({"days": ["Monday and Tuesday", "on Friday"], "cats": ["the cat sat", "a cat ran ."]})
    )
    assert snmf("collect", root / "model", texts, "--layers", "0-1", "--out", root / "run").exit_code == 0
    assert snmf("fit", root / "run", "--k", 3, "--max-iter", 5, "--layers", 1).exit_code == 0
    return root / "model", root / "run"


@pytest.fixture
def model_folder(folders: tuple[Path, Path]) -> Path:
    return folders[0]


@pytest.fixture
def run(folders: tuple[Path, Path]) -> Path:
    return folders[1]


SHORT = ("--samples", 2, "--max-new-tokens", 5, "--prompt", "the cat")


def test_side_by_side(run: Path) -> None:
    result = snmf("steer", run, "--layers", 1, "--feature", 2, "--both", "--kl", 0.05, "--kl", 99, *SHORT)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "layer 1, feature 2" in shown
    assert "2 samples of at most 5 tokens, temperature 1, top-p 0.9, seed 0" in shown
    assert result.stdout.count("the cat …") == 2
    assert result.stdout.count("\nunsteered ") == 2
    assert shown.count("strength +") == 2
    assert shown.count("strength −") == 2
    assert "KL 0.05" in shown
    assert shown.count("99 not reached: at most this") == 2
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json_is_what_python_gives(run: Path, model_folder: Path) -> None:
    result = snmf("steer", run, "--layers", 1, "--feature", 2, "--both", "--kl", 0.05, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["layer"], found["feature"], found["site"]) == (1, 2, "blocks.1.mlp.hook_post")
    described = Run.open(run).features(1, lambda: pytest.fail("described a moment ago"))[2]
    assert (found["name"], found["concept"]) == (described.name, described.concept)
    model = load_model(model_folder, device="cpu")
    z = Run.open(run).factors(1).Z[:, 2]
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 5, "top_p": 0.9}
    plain = generate(model, "the cat", **options)[0]
    assert [one["text"] for one in found["unsteered"]] == [one.text for one in plain]
    assert [one["solved"]["sign"] for one in found["steered"]] == [1, -1]
    for one in found["steered"]:
        assert one["solved"]["reached"]
        assert 0.05 <= one["solved"]["kl"] <= 0.0511
        with steer(model, {1: z}, strength=one["strength"]):
            texts = generate(model, "the cat", **options)[0]
        assert [entry["text"] for entry in one["continuations"]] == [text.text for text in texts]


def test_ways(run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Each combination that the command line offers reaches the intervention that it names."""
    np.save(tmp_path / "v.npy", np.arange(24.0))
    feature, vector = ("--feature", 2), ("--vector", tmp_path / "v.npy")
    for target, what, how, mode, strengths in (
        (run, feature, ("--strength", 8), "add", [8]),
        (run, feature, ("--strength", 8, "--strength", 3, "--both"), "add", [8, -8, 3, -3]),
        (run, feature, ("--strength", -8), "add", [-8]),
        (run, feature, ("--strength", 8, "--negative", "--neurons", "0-23"), "add", [-8]),
        (run, feature, ("--ablate",), "ablate", [None]),
        (run, feature, ("--clamp", 2.5), "clamp", [2.5]),
        (run, vector, ("--ablate",), "ablate", [None]),
        (model_folder, vector, ("--strength", 1), "add", [1]),
        (model_folder, ("--neurons", "3, 17-20"), ("--ablate",), "ablate", [None]),
        (model_folder, ("--neurons", "3,17-20"), ("--strength", 2), "add", [2]),
    ):
        result = snmf("steer", target, "--layers", 1, *what, *how, *SHORT, "--json")
        assert result.exit_code == 0, (how, result.output)
        found = json.loads(result.stdout)
        assert [one["mode"] for one in found["steered"]] == [mode] * len(strengths), how
        assert [one["strength"] for one in found["steered"]] == strengths, how
        assert all(one["solved"] is None for one in found["steered"])
        if what[0] == "--neurons":
            assert found["neurons"] == [3, 17, 18, 19, 20]
    page = snmf("steer", model_folder, "--layers", 1, "--neurons", "3", "--clamp", -2, *SHORT)
    assert "layer 1, neurons 3" in page.stdout
    assert "clamped to −2" in page.stdout


def test_errors(run: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"not numbers")
    np.save(tmp_path / "wide.npy", np.ones(5))
    one = ("--layers", 1, "--feature", 2)
    for arguments, message in (
        ((run, "--layers", 1), "give --feature, --vector or --neurons"),
        ((run, *one, "--vector", "v.npy"), "--feature and --vector: give one of them"),
        ((run, *one, "--kl", 0.1, "--strength", 1), "--kl and --strength: give one of them"),
        ((run, *one, "--ablate", "--clamp", 1), "--ablate and --clamp: give one of them"),
        ((run, *one, "--both", "--negative"), "--negative and --both: give one of them"),
        ((run, *one, "--ablate", "--both"), "--ablate has no sign: leave out --both"),
        ((run, *one, "--kl", 0), "wanted divergences above 0"),
        ((run, *one, "--samples", 0), "samples: wanted at least 1"),
        ((run, *one, "--model-dtype", "float16"), "loaded as it was collected"),
        ((run, *one, "--neurons", "24"), "wanted numbers and ranges among 0-23, got '24'"),
        ((run, *one, "--neurons", "x"), "got 'x'"),
        ((run, *one, "--neurons", ","), "names no neuron"),
        ((run, *one, "--neurons", "5-3"), "got '5-3'"),
        ((run, "--layers", 1, "--feature", 3), "layer 1 has features 0-2, got 3"),
        ((run, "--layers", 0, "--feature", 1), "layer 0 of"),
        ((run, "--layers", 9, "--neurons", 1, "--ablate"), "layer 9 is outside"),
        ((model_folder, *one), "features are those of a run"),
        ((tmp_path / "nowhere", "--layers", 1, "--neurons", 1), "no such file or folder"),
        ((model_folder, "--layers", 1, "--vector", tmp_path / "v.npy"), "is not a .npy file of numbers"),
        ((model_folder, "--layers", 1, "--vector", tmp_path / "no.npy"), "no.npy"),
        ((model_folder, "--layers", 1, "--vector", tmp_path / "wide.npy"), "wanted 24 entries"),
    ):
        result = snmf("steer", *arguments, "--max-new-tokens", 1)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_a_model_is_not_markup(
    terminal: bool, run: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Rich's markup nor an escape sequence in a continuation or a prompt reaches the terminal."""
    evil = "[red]loud[/red] [/] \x1b[31mred\x1b[0m \x07 [link=x]y"

    def fake(_model: Any, prompts: Any, **_options: Any) -> Any:
        return [[Continuation(prompt, evil, (1,))] for prompt in prompts]

    monkeypatch.setattr(steer_command, "generate", fake)
    screen = Console(record=True, width=100, force_terminal=terminal, color_system=None, file=io.StringIO())
    opened = Run.open(run)
    request = steer_command.Request(1, 2, None, None, (), (3.0,), False, False, False, None)
    steer_command.run(
        screen, request, opened, lambda: opened.load_model(device="cpu"), [evil], quiet=False,
        samples=1, max_new_tokens=1, temperature=1.0, top_p=1.0, seed=0,
    )  # fmt: skip
    shown = screen.export_text(styles=False)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert shown.count("[red]loud[/red]") == 3
    assert shown.count("\\u001b[31mred") == 3


def test_own_words_are_marked(make_model: Maker, run: Path) -> None:
    feature = Run.open(run).features(1, lambda: Run.open(run).load_model(device="cpu"))[0]
    words = ["Monday"]
    effects = WordEffects(((" Monday", 1.0), (" with", 0.9), (" of", 0.8)), (), 1.0, 0.25, True, 0.5, 0.5)
    feature = replace(feature, tokens=(), effects=effects)
    own = steer_command._own_words(feature)
    assert own is not None
    # Function words are in every text.
    assert steer_command._text(Continuation("", "with", ()), own, marks=True).plain == "with"
    text = steer_command._text(Continuation("", f"x {words[0].upper()} {words[0]}x", ()), own, marks=True)
    assert text.plain == f"x ‹{words[0].upper()}› {words[0]}x"
    assert steer_command._text(Continuation("", " ", ()), own, marks=True).plain == "(it ends the text here)"
