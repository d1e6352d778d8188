from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snmf_interp.runs import Run

from .endpoint import Reply, completion, serve
from .test_cli import fitted, model_folder, snmf, texts  # noqa: F401  # fixtures


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SNMF_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def rows(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_words(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    result = snmf("label", fitted)
    assert result.exit_code == 0, result.output
    assert "fires on" in result.stdout
    assert "makes likelier" in result.stdout
    said = " ".join(result.stdout.split())
    clear = [row["clear"] for row in rows(snmf("label", fitted, "--layers", 1, "--side", "input", "--json"))]
    assert f"✓ layer 1: {sum(clear)} of 3 features have a clear name by words for what they fire on" in said
    # The other side has no names by words, and none that could fail.
    assert "not clear" not in said
    assert "of 3 features have a list of words for what they make likelier (0 measured" in said
    manifest = json.loads((fitted / "layer_1" / "labels" / "words.json").read_text())["counts"]
    assert manifest["input"] == {"clear": sum(clear), "not clear": 3 - sum(clear), "missing": 0}
    assert manifest["output"].keys() == {"lists", "empty"}
    assert sum(manifest["output"].values()) == 3
    kept = rows(snmf("label", fitted, "--layers", 1, "--json"))
    assert [(row["index"], row["side"]) for row in kept].count((2, "output")) == 1
    assert len((fitted / "layer_1" / "labels" / "words.jsonl").read_text().splitlines()) == 6
    # Features and words are there: neither the model nor its tokenizer is needed again.
    monkeypatch.setattr(Run, "load_model", lambda *_a, **_o: pytest.fail("loaded the model"))
    one = snmf("label", fitted, "--layers", 1, "--side", "input", "--top", 1)
    assert "of 1 feature has a clear name by words for what they fire on" in " ".join(one.stdout.split())
    assert "makes likelier" not in one.stdout


def test_labels_do_not_outlive_their_factors(fitted: Path) -> None:  # noqa: F811
    assert snmf("label", fitted).exit_code == 0
    assert snmf("fit", fitted, "--k", 2, "--max-iter", 5, "--layers", "1", "--overwrite").exit_code == 0
    assert not (fitted / "layer_1" / "labels").exists()
    assert (fitted / "layer_0" / "labels" / "words.jsonl").is_file()


def test_endpoint_and_resume(fitted: Path) -> None:  # noqa: F811
    pytest.importorskip("openai")
    broken = True

    def answer(body: dict[str, Any], _earlier: int) -> Reply:
        if "<likelier>" in body["messages"][0]["content"]:
            return completion('{"label": null}')
        if broken:
            return 400, {}, {"error": {"message": "too long"}}
        return completion('{"label": "days [bold]of[/bold] the week"}')

    with serve(answer) as endpoint:
        command = ("label", fitted, "--layers", 1, "--model", "big/model", "--base-url", endpoint.url,
                   "--parameter", "top_p=0.5", "--parameter", "temperature=null")  # fmt: skip
        first = snmf(*command)
        assert first.exit_code == 0, first.output
        assert "no clear concept" in first.stdout
        assert "missing: BadRequestError" in " ".join(first.stdout.split())
        assert "3 of 6 answers are missing, most often: BadRequestError" in " ".join(first.stderr.split())
        assert "6 questions asked, 3 of them without answer" in " ".join(first.stdout.split())
        assert endpoint.received[0]["top_p"] == 0.5
        assert "temperature" not in endpoint.received[0]
        broken, sent = False, len(endpoint.received)
        second = snmf(*command)
        assert "days [bold]of[/bold] the week" in " ".join(second.stdout.split())
        assert second.stderr == ""
        assert len(endpoint.received) == sent + 3
        labels = rows(snmf(*command, "--json"))
        assert len(endpoint.received) == sent + 3
        assert [row["clear"] for row in labels] == [True, False] * 3
        assert {row["source"] for row in labels} == {"big/model"}
    (manifest,) = (fitted / "layer_1" / "labels").glob("big_model-*.json")
    record = json.loads(manifest.read_text())
    assert record["parameters"] == {"top_p": 0.5, "temperature": None}
    assert record["counts"]["input"] == {"clear": 3, "not clear": 0, "missing": 0}
    # Words of the same run stand beside it.
    assert snmf("label", fitted, "--layers", 1).exit_code == 0
    assert len(list((fitted / "layer_1" / "labels").glob("*.jsonl"))) == 2


def test_garbage_of_a_local_model_is_missing(fitted: Path, model_folder: Path) -> None:  # noqa: F811
    """A tiny random model writes nonsense, or cannot take the question: no label comes of it."""
    result = snmf("label", fitted, "--layers", 1, "--side", "input", "--local", model_folder)
    assert result.exit_code == 1
    assert "3 of 3 answers are missing" in " ".join(result.stderr.split())
    assert result.stderr.startswith("error: RuntimeError")
    said = " ".join(result.stdout.split())
    assert "0 of 3 features have a name by" in said
    assert "for what they fire on, 3 missing" in said


def test_bad_input_is_one_line_and_exit_code_2(fitted: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("openai")
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no such folder"),
        ((fitted, "--side", "top"), "--side: wanted input, output or both, got 'top'"),
        ((fitted, "--top", "0"), "--top: wanted at least 1, got 0"),
        ((fitted, "--layers", "7"), "--layers: 7 was not collected"),
        ((fitted, "--model", "gpt"), "OPENAI_API_KEY is not set"),
        ((fitted, "--base-url", "http://127.0.0.1:9/v1"), "set SNMF_LLM_MODEL"),
        ((fitted, "--model", "gpt", "--local", "x"), "--local: a model in this process"),
        ((fitted, "--parameter", "top_p=1"), "--parameter is a field of requests"),
        ((fitted, "--parameter", "top_p=1", "--local", "x"), "takes max_tokens=NUMBER alone, got top_p=1"),
        ((fitted, "--local", "./nowhere"), "model './nowhere': there is no"),
        ((fitted, "--parameter", "top_p", "--model", "gpt"), "--parameter: wanted name=value, got 'top_p'"),
        ((fitted, "--model", "gpt", "--base-url", "http://127.0.0.1:9/v1", "--concurrency", "0"), "concurrency"),
    ):  # fmt: skip
        result = snmf("label", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert result.stderr.count("\n") == 1


def test_a_refusing_endpoint_is_one_line(fitted: Path) -> None:  # noqa: F811
    pytest.importorskip("openai")
    with serve(lambda body, earlier: (401, {}, {"error": {"message": "bad key"}})) as endpoint:
        result = snmf("label", fitted, "--model", "m", "--base-url", endpoint.url)
    assert result.exit_code == 2
    assert "bad key" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("end", ["", "\r", "\u2026"])
def test_a_key_is_in_no_file_and_no_output(
    fitted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    pytest.importorskip("openai")
    key = "sk-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key + end)
    page = tmp_path / "page.html"
    with serve(lambda body, earlier: (400, {}, {"error": {"message": f"not for Bearer {key}"}})) as endpoint:
        label = snmf("label", fitted, "--layers", 1, "--model", "m", "--base-url", endpoint.url)
        debugged = snmf("--debug", "label", fitted, "--layers", 1, "--model", "m", "--base-url", endpoint.url)
    assert label.exit_code == (2 if end == "\u2026" else 1)
    assert ("OPENAI_API_KEY: wanted printable" if end == "\u2026" else "not for Bearer ***") in label.stderr
    report = snmf("report", fitted, "-o", page)
    assert report.exit_code == 0, report.output
    texts = [label.output, debugged.output, str(debugged.exception), page.read_text(encoding="utf-8")]  # noqa: F811
    texts += [path.read_text(encoding="utf-8") for path in fitted.rglob("*.json*")]
    assert not [text for text in texts if key in text]
