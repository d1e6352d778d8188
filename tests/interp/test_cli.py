from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import rich_utils
from typer.testing import CliRunner

import snmf_kernels
from snmf_interp import LanguageModel, doctor, files, foreign_bars, show, terminal
from snmf_interp.cli import app, main

from .conftest import contents, refuse_writing
from .test_models import change_weights

Maker = Callable[..., LanguageModel]


@pytest.fixture
def model_folder(tmp_path: Path, make_model: Maker) -> Path:
    folder = tmp_path / "model"
    model = make_model()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.json"
    path.write_text(
        json.dumps({"days": ["Monday and Tuesday", "on Friday"], "cats": ["the cat sat", "a cat ran ."]})
    )
    return path


def snmf(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def fitted(model_folder: Path, texts: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    assert snmf("collect", model_folder, texts, "--layers", "0-1", "--out", run).exit_code == 0
    assert snmf("fit", run, "--k", 3, "--max-iter", 5).exit_code == 0
    return run


def test_collect_fit_features(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = snmf("collect", model_folder, texts, "--layers", "0-1", "--out", run)
    assert result.exit_code == 0, result.output
    assert "layers 0, 1" in result.stdout
    assert "12 tokens of 4 texts; left out: 4 at the first position; 0 special" in " ".join(
        result.stdout.split()
    )
    result = snmf("fit", run, "--k", 3, "--max-iter", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("3 features, relative error") == 2
    assert "kept from before" in snmf("fit", run, "--k", 3, "--max-iter", 5).stdout
    result = snmf("features", run, "--layers", 1)
    assert result.exit_code == 0, result.output
    assert "Layer 1, 3 features by clarity" in result.stdout
    assert "‹" in result.stdout
    assert "→" in result.stdout
    rows = [json.loads(line) for line in snmf("features", run, "--layers", 1, "--json").stdout.splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2]
    assert [row["clarity"] for row in rows] == sorted((row["clarity"] for row in rows), reverse=True)
    page = snmf("features", run, "--layers", 1, "--feature", 2)
    assert page.exit_code == 0
    assert "layer 1, feature 2" in page.stdout
    assert "suppresses" in page.stdout
    assert "Layer 0" in snmf("features", run, "--sort", "energy").stdout


def test_labels_and_equal_texts(model_folder: Path, tmp_path: Path) -> None:
    """Labels are found without the spaces that they were written with, and what was left out is said."""
    path, run = tmp_path / "texts.json", tmp_path / "run"
    texts = {
        " the days": ["on Monday the cat", "On  Monday the cat", "Friday", ""],
        "pets": ["a dog", "the cat"],
    }
    path.write_text(json.dumps(texts))
    result = snmf("collect", model_folder, path, "--layers", "0", "--out", run)
    assert result.exit_code == 0, result.output
    assert "1 empty texts left out" in " ".join(result.stderr.split())
    assert "1 texts equal one before, but for case and spaces" in " ".join(result.stdout.split())
    assert snmf("fit", run, "--k", 3, "--max-iter", 5).exit_code == 0
    assert snmf("features", run, "--layers", 0).exit_code == 0
    described = run / "layer_0" / "features.jsonl"
    # As though one ranked a label of these few texts better than chance, and a run of an earlier version had kept it.
    described.write_text(described.read_text().replace('"concept": null', '"concept": " the days"', 1))
    concept = "the days"
    result = snmf("features", run, "--layers", 0, "--json", "--concept", f"  {concept} ")
    assert result.exit_code == 0, result.output
    assert {json.loads(line)["concept"].strip() for line in result.stdout.splitlines()} == {concept}


def test_bad_input_is_one_line_and_exit_code_2(
    fitted: Path, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    for arguments, message in (
        (("collect", "./nowhere", texts, "--layers", "0", "--out", out), "model './nowhere': there is no"),
        (("collect", model_folder, "nowhere.txt", "--layers", "0", "--out", out), "texts 'nowhere.txt'"),
        (("collect", model_folder, texts, "--layers", "0-9", "--out", out), "layer 9 is outside"),
        (("collect", model_folder, texts, "--layers", "0", "--out", fitted), "differs in layers"),
        (("collect", model_folder, texts, "--layers", "0", "--out", out, "--model-dtype", "x"), "--model-d"),
        (("fit", out), "there is no such folder"),
        (("fit", fitted, "--k", 4, "--max-iter", 5), "was factorised with k = 3, not 4"),
        (("fit", fitted, "--layers", "7"), "7 was not collected"),
        (("features", fitted, "--sort", "colour"), "wanted clarity, energy or index"),
        (("features", fitted, "--feature", "1"), "has layers 0, 1: say which"),
        (("features", fitted, "--layers", "1", "--feature", "3"), "features 0-2, got 3"),
        (("features", fitted, "--layers", "1", "--concept", "x"), "no feature of layer 1 has 'x'"),
        (("demo", "--model", "gpt2"), "the demo knows smollm2-135m and gemma-3-270m"),
    ):  # fmt: skip
        result = snmf(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output


def test_failure_is_exit_code_1(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("the card\nis on fire")

    monkeypatch.setattr(snmf_kernels, "fit", fail)
    result = snmf("fit", fitted, "--k", 5, "--overwrite")
    assert result.exit_code == 1
    assert "error: RuntimeError: the card is on fire" in result.stderr
    assert "--debug" in result.stderr
    result = snmf("--debug", "fit", fitted, "--k", 5, "--overwrite")
    assert isinstance(result.exception, RuntimeError)


def test_a_model_that_was_moved(fitted: Path, model_folder: Path, tmp_path: Path) -> None:
    """Every command that loads the model of a run takes its new place."""
    moved = tmp_path / "moved"
    model_folder.rename(moved)
    page = tmp_path / "page.html"
    short = ("--strength", 1, "--max-new-tokens", 2, "--samples", 1)
    for option, arguments in (
        ("--model", ("steer", fitted, "--layer", 1, "--feature", 0, *short)),
        ("--model", ("features", fitted, "--layer", 1)),
        ("--model", ("neuron", fitted, 0, "--layer", 1)),
        ("--model", ("overlap", fitted, 0, 1, "--layer", 1)),
        ("--model", ("nearest", fitted, 0, "--layer", 1, "--by", "direction")),
        ("--model", ("stability", fitted, "--layer", 1, "--seeds", 2)),
        ("--model", ("report", fitted, "-o", page)),
        ("--model", ("tree", fitted, "--layer", 1, "--levels", "3,2")),
        ("--run-model", ("label", fitted, "--layer", 1)),
        ("--run-model", ("detect", fitted, "--layer", 1, "--k", 3)),
        ("--run-model", ("compare", fitted, moved, "--layer", 1)),
        ("--run-model", ("eval", fitted, "--layers", 1, "--k", 3, "--concepts", 0, "--next-token")),
    ):
        for made in ("features.jsonl", "tree/descriptions.json"):
            (fitted / "layer_1" / made).unlink(missing_ok=True)
        for made in ("words.json", "tokens.json"):
            (fitted / made).unlink(missing_ok=True)
        refused = snmf(*arguments)
        said = " ".join(refused.stderr.split())
        assert refused.exit_code == 2 or arguments[0] == "neuron", (arguments, refused.output)
        assert "--run-model PATH" in said or arguments[0] == "neuron", (arguments, said)
        for name in {option, "--run-model"}:
            result = snmf(*arguments, name, moved)
            assert result.exit_code == 0, (arguments, result.output)


def test_a_model_that_lacks_weights(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    change_weights(model_folder, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    for arguments in (
        ("collect", model_folder, texts, "--layers", "0", "--out", tmp_path / "x"),
        ("doctor", model_folder),
    ):
        result = snmf(*arguments)
        assert result.exit_code == 2
        assert "lacks 1 weight: model.layers.1.mlp.down_proj.weight" in " ".join(result.stderr.split())
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_run_that_may_not_be_written_to(
    fitted: Path, model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(fitted)
    refuse_writing(monkeypatch, fitted)
    page = tmp_path / "page.html"
    for arguments, said in (
        (("features", fitted, "--layer", 1), "features could not be kept in"),
        (("label", fitted, "--layer", 1), "features could not be kept in"),
        (("report", fitted, "-o", page), "features could not be kept in"),
        (("tree", fitted, "--layer", 1, "--levels", "3,2"), "the hierarchy is not kept"),
        (("stability", fitted, "--layer", 1, "--seeds", 2), "fits from other starts could not be kept"),
        (("detect", fitted, "--layer", 1, "--k", 3), "fits could not be kept in"),
        (("compare", fitted, model_folder, "--layer", 1), "are held in memory and not kept"),
        (("overlap", fitted, 0, 1, "--layer", 1), "features could not be kept in"),
        (("steer", fitted, "--layer", 1, "--feature", 0, "--strength", 1, "--max-new-tokens", 2), ""),
    ):
        files._not_kept.cache_clear()
        result = snmf(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
        assert said in " ".join(result.stderr.split()), (arguments, result.stderr)
    assert page.is_file()
    assert contents(fitted) == before


def test_compare_counts_changes_by_size(fitted: Path, model_folder: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(model_folder, tuned)
    change_weights(tuned, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].mul_(1.5))
    same = snmf("compare", fitted, model_folder, "--layers", 0)
    assert same.exit_code == 0, same.output
    assert "0 of 3 features changed by 0.2 sd or more" in same.stdout
    assert "significant, of any size: 0" in same.stdout
    assert "no feature is used differently on any token" in same.stdout
    rows = [
        json.loads(snmf("compare", fitted, tuned, "--layers", 0, "--json", *option).stdout)
        for option in ((), ("--min-change", 0), ("--min-change", 1e6))
    ]
    assert [row["min_change"] for row in rows] == [0.2, 0, 1e6]
    sizes = sorted(abs(change["standardised"]) for change in rows[0]["changes"])
    assert sizes[0] > 0
    for row in rows:
        sure = [change for change in row["changes"] if change["q_value"] < 0.05]
        assert row["n_significant"] == len(sure)
        assert row["n_changed"] == sum(abs(change["standardised"]) >= row["min_change"] for change in sure)
        assert row["median_size"] == sizes[1]
    for wrong in ("-1", "nan"):
        refused = snmf("compare", fitted, tuned, "--min-change", wrong)
        assert refused.exit_code == 2
        assert "--min-change: wanted 0 or more standard deviations" in refused.stderr


def test_interrupt_says_what_is_kept(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snmf_kernels, "fit", interrupted)
    result = snmf("fit", fitted, "--k", 5, "--layers", "1", "--overwrite")
    assert result.exit_code == 130
    message = " ".join(result.stderr.split())
    assert "keeps 1 finished shard of activations and 2 factorised layers;" in message
    assert "the same command goes on from there" in message


def test_doctor_on_a_random_model(model_folder: Path) -> None:
    """Everything holds but the prediction of English: a random model fails that one, and so the command."""
    result = snmf("doctor", model_folder)
    assert result.exit_code == 1
    assert result.stdout.count("✓") == 4
    assert result.stdout.count("✗") == 1
    assert "✗ the model predicts plain English behind '<bos>'" in result.stdout


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "phi"])
def test_doctor_finds_nothing(family: str, make_model: Maker) -> None:
    *checks, _ = doctor.check_model(
        make_model(family), ["the cat sat on the rug .", "one red dog", "sun and rain"]
    )
    assert len(checks) == 4
    assert all(check.passed for check in checks), checks


def test_doctor_finds_faults(make_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat sat on the rug .", "one red dog", "sun and rain"]
    model = make_model()
    # A hook that alters what the projection gives: the output is no longer the product.
    handle = model.down_projection(1).register_forward_hook(lambda _m, _i, out: out * 1.01)
    wrong = [check.passed for check in doctor.check_model(model, texts)]
    handle.remove()
    assert wrong[:4] == [False, True, True, True]
    # A mask that is not passed on: padding on the left is then seen by every token.
    forward = doctor.hooks.forward
    with monkeypatch.context() as patch:
        patch.setattr(doctor.hooks, "forward", lambda m, ids, mask: forward(m, ids, torch.ones_like(mask)))
        assert [check.passed for check in doctor.check_model(model, texts)][:4] == [True, False, True, True]


@pytest.mark.parametrize(("word", "peak"), [("word", "Monday"), ("天气很好", "苹果")])
def test_long_contexts_keep_the_token_in_view(word: str, peak: str) -> None:
    from rich.cells import cell_len

    from snmf_interp.features import TokenInContext

    for n_before in (0, 3, 30):
        for n_after in (0, 3, 30):
            for width in (20, 47, 80):
                token = TokenInContext(
                    f"{word} " * n_before + "the",
                    f" {peak}",
                    " more" * n_after,
                    True,
                    True,
                    0,
                    "0",
                    5,
                    None,
                    1.0,
                    1.0,
                )
                line = show.context_line(token, width, marks=True).plain
                assert f"‹{peak}›" in line
                assert cell_len(line) <= width


class TestProcess:
    """The real command in a process of its own."""

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snmf_interp.cli", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ.copy(), **options
        )

    def test_help_comes_without_torch(self) -> None:
        program = (
            "import sys, snmf_interp.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"
        started = time.perf_counter()
        shown = self.run("--help")
        assert shown.returncode == 0
        # Generous: it takes 0.2 s when nothing else runs, and loading torch alone takes longer than this
        # under load.
        assert time.perf_counter() - started < 10
        for command in (
            "collect", "fit", "features", "label", "steer", "tree", "neuron", "overlap", "nearest", "stability",
            "compare", "core", "detect", "eval", "report", "demo", "doctor",
        ):  # fmt: skip
            assert command in shown.stdout
            one = self.run(command, "--help")
            assert one.returncode == 0
            assert "Usage: " in one.stdout

    def test_error(self, tmp_path: Path) -> None:
        result = self.run("fit", str(tmp_path / "nowhere"))
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        debugged = self.run("fit", str(tmp_path / "nowhere"), "--debug")
        assert debugged.returncode == 1
        assert "Traceback" in debugged.stderr


def test_debug_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["snmf", "fit", str(tmp_path / "nowhere"), "--debug"])
    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize("on_path", [True, False])
def test_hints_name_a_command_that_the_shell_finds(tmp_path, monkeypatch, on_path):
    program = tmp_path / "bin" / "snmf"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", str(program.parent) if on_path else "/nonexistent")
    assert terminal.command() == ("snmf" if on_path else "bin/snmf")


class TestReader:
    """What reads the output may have enough before it is at its end: ``| head``."""

    def command(self, *arguments: Any, lines: int) -> tuple[int, str]:
        """The exit code, and what was said on stderr, where so many lines are read."""
        run = [sys.executable, "-m", "snmf_interp.cli", *map(str, arguments)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in range(lines):
                process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read()
        return process.returncode, said

    @pytest.mark.parametrize(
        "command",
        [
            ("features", "--json"),
            ("features",),
            ("label", "--json"),
            ("neuron", "0", "--layers", "1"),
            ("--help",),
        ],
    )
    def test_no_reader_is_no_failure(self, fitted: Path, command: tuple[str, ...]) -> None:
        first, *rest = command
        arguments = command if first == "--help" else (first, fitted, *rest)
        assert self.command(*arguments, lines=0) == (141, "")

    def test_one_line_is_enough(self, fitted: Path) -> None:
        snmf("features", fitted)
        code, said = self.command("features", fitted, "--json", lines=1)
        assert code in (0, 141)
        assert said == ""

    def test_another_pipe_that_breaks_is_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, fitted: Path
    ) -> None:
        def fail(*_args: Any, **_options: Any) -> None:
            raise BrokenPipeError("another one")

        monkeypatch.setattr(snmf_kernels, "fit", fail)
        result = snmf("fit", fitted, "--k", 2, "--overwrite")
        assert result.exit_code == 1
        assert "error: BrokenPipeError: another one" in result.stderr


def test_version() -> None:
    result = snmf("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("snmf 0.")


def test_suggested_commands_can_be_pasted(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """A path with spaces, brackets and quotes comes back as it was, when a shell reads the suggestion."""
    folder = tmp_path / "my run [x] 'y' $HOME"
    said = snmf("collect", model_folder, texts, "--layers", "0", "--out", folder).stdout
    assert shlex.split(said.rpartition("Next: ")[2])[:3] == ["snmf", "fit", str(folder)]
    for arguments in (("features", folder), ("label", folder), ("report", folder), ("nearest", folder, 0)):
        refused = " ".join(
            snmf(*arguments, *(["--layers", "0"] * (arguments[0] == "nearest"))).stderr.split()
        )
        assert shlex.split(refused.split("`")[1])[:3] == ["snmf", "fit", str(folder)], refused
    said = snmf("fit", folder, "--k", 2, "--max-iter", 5).stdout
    assert shlex.split(said.rpartition("Next: ")[2])[:3] == ["snmf", "features", str(folder)]
    refused = snmf("fit", tmp_path / "no such").stderr
    assert shlex.split(refused.split("`")[1]) == [
        "snmf", "collect", "MODEL", "TEXTS", "--out", str(tmp_path / "no such"),
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [1, 12, 30])
def test_narrow_terminals(fitted: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are narrower than any table; each command that shows one still shows it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    for arguments in (
        ("features", fitted),
        ("features", fitted, "--layers", 1, "--feature", 0),
        ("label", fitted),
        ("stability", fitted, "--layers", 1, "--seeds", 2),
        ("neuron", fitted, 0, "--layers", 1),
        ("neuron", fitted, "--feature", 0, "--layers", 1),
        ("overlap", fitted, 0, 1, "--layers", 1),
        ("nearest", fitted, 0, "--layers", 1),
        ("steer", fitted, "--layers", 1, "--feature", 0, "--strength", 1, "--both", "--max-new-tokens", 3),
        ("tree", fitted, "--layers", 1, "--levels", "3,2"),
        ("compare", fitted, fitted.parent / "model"),
    ):
        result = snmf(*arguments)
        assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["fit", "core", "eval", "tree", "features", "nearest"])
def test_help_is_broken_by_the_terminal_alone(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", columns)
    lines = snmf(command, "--help").stdout.split("\n")
    text = lines[2 : next(i for i, line in enumerate(lines) if "Arguments" in line)]
    for line, following in itertools.pairwise(line.strip() for line in text):
        # No line could have had the next one's first word.
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > columns - 4, line


def test_bars_of_other_libraries_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    with foreign_bars.silenced():
        assert list(tqdm(range(3), desc="converting")) == [0, 1, 2]
        with tqdm(total=1, desc="our own", disable=False):
            pass
    assert "converting" not in capsys.readouterr().err
    list(tqdm(range(3), desc="afterwards"))
    assert "afterwards" in capsys.readouterr().err


def test_errors_name_the_option_as_it_is_typed(fitted: Path) -> None:
    for arguments, message in (
        (("tree", fitted, "--layers", 1, "--levels", "2,3"), "error: --levels: "),
        (("tree", fitted, "--layers", 0, "--bare", "--children", 0), "error: --children: "),
        (("fit", fitted, "--layers", "7"), "error: --layers: 7 was not collected"),
        (("stability", fitted, "--layers", 1, "--seeds", 1), "error: --seeds: "),
        (("nearest", fitted, 0, "--layers", 1, "--top", 0), "error: --top: "),
        (("detect", fitted, "--against", "x"), "error: --against: "),
        (("steer", fitted, "--layers", 1, "--feature", 0, "--kl", "-1"), "error: --kl: "),
        (("fit", fitted, "--k", 2, "--keep", 2, "--overwrite"), "error: --keep: "),
    ):
        result = snmf(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        # Before it there may be a warning, on a line of its own.
        assert result.stderr.splitlines()[-1].startswith(message), (arguments, result.stderr)


class TestLayers:
    def test_a_run_with_one_layer_needs_none(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        run = tmp_path / "one"
        assert snmf("collect", model_folder, texts, "--layers", "1", "--out", run).exit_code == 0
        assert snmf("fit", run, "--k", 3, "--max-iter", 5).exit_code == 0
        for arguments in (
            ("features", run), ("features", run, "--feature", 0), ("label", run), ("compare", run, model_folder),
            ("stability", run, "--seeds", 2), ("neuron", run, 0), ("overlap", run, 0, 1), ("nearest", run, 0),
            ("tree", run, "--bare"),
            ("steer", run, "--feature", 0, "--strength", 1, "--samples", 1, "--max-new-tokens", 2),
            ("report", run, "-o", tmp_path / "page.html"),
        ):  # fmt: skip
            result = snmf(*arguments)
            assert result.exit_code == 0, (arguments, result.output)

    @pytest.mark.parametrize("option", ["--layers=0-1", "--layer=0,1"])
    def test_several_are_shown_one_after_another(self, fitted: Path, option: str) -> None:
        for command in ("features", "label", "stability"):
            result = snmf(command, fitted, option, "--json")
            assert result.exit_code == 0, result.output
            assert {json.loads(line)["layer"] for line in result.stdout.splitlines()} == {0, 1}, command

    def test_commands_that_take_one_say_so(self, fitted: Path) -> None:
        for command in (
            ("neuron", 0), ("overlap", 0, 1), ("nearest", 0), ("tree",), ("features", "--feature", 0),
            ("steer", "--feature", 0),
        ):  # fmt: skip
            name, *rest = command
            for given, message in (
                ([], f"error: --layers: {fitted} has layers 0, 1: say which\n"),
                (["--layers", "0-1"], "error: --layers: wanted one layer, got 0, 1\n"),
            ):
                result = snmf(name, fitted, *rest, *given)
                assert result.exit_code == 2, (command, result.output)
                assert result.stderr == message, command

    def test_the_former_name_works_and_is_not_shown(self, fitted: Path) -> None:
        assert (
            snmf("neuron", fitted, 0, "--layer", 1).stdout == snmf("neuron", fitted, 0, "--layers", 1).stdout
        )
        assert "--layer " not in snmf("neuron", "--help").stdout


def test_what_fits_anew_takes_the_settings_of_the_run(
    model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--max-iter", 5, "--keep", 0.2, "--refit", "never", "--neuron-scale", "none", "--seed", 3)
    assert snmf("collect", model_folder, texts, "--layers", "0-1", "--out", run).exit_code == 0
    assert snmf("fit", run, "--k", 2, *options).exit_code == 0
    settings = {"max_iter": 5, "keep": 0.2, "refit": False, "neuron_scale": None}
    for given, k, changed in (
        ((), 2, {}),
        (("--k", 3), 3, {}),
        (("--neuron-scale", "rms"), 2, {"neuron_scale": "rms"}),
    ):
        result = snmf("detect", run, "--against", "neuron", "--overwrite", *given)
        assert result.exit_code == 0, result.output
        plan = json.loads((run / "eval" / "plan.json").read_text())
        assert plan["k"] == k
        assert {"neuron_scale": "rms"} | plan["fit"] == settings | changed
        assert snmf_kernels.Factorization.load(run / "eval" / "layer_1" / "snmf.safetensors").k == k
    tree = snmf("tree", run, "--layers", 1, "--bare")
    assert "levels of 2, 1 features on the features of snmf fit" in " ".join(tree.stdout.split()), tree.output
    # Layers that differ: one of them, or what they differ in.
    assert snmf("fit", run, "--layers", 1, "--k", 3, *options, "--overwrite").exit_code == 0
    refused = snmf("detect", run, "--against", "neuron", "--overwrite")
    assert refused.exit_code == 2
    assert "layers 0 and 1 of" in refused.stderr
    assert "factorised with k = 2 and 3; give one of them, or --k" in refused.stderr
    for given in (("--layers", 1), ("--k", 2)):
        assert snmf("detect", run, "--against", "neuron", "--overwrite", *given).exit_code == 0
