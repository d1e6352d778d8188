"""``snmf eval`` and ``snmf detect`` at the command line, on the planted model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snmf_interp import eval_command, label_trial, rivals
from snmf_interp.judging import gold_set

from .endpoint import Reply, completion, serve
from .planted_model import CONCEPTS, planted_model, planted_samples
from .test_cli import snmf

SHORT = (
    "--k", 12, "--samples", 1, "--report-samples", 2, "--max-new-tokens", 8, "--candidates", 2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SNMF_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model as a folder, and its texts beside it."""
    path = tmp_path_factory.mktemp("planted")
    model = planted_model()
    model.model.save_pretrained(path / "model")
    model.tokenizer.save_pretrained(path / "model")
    texts: dict[str, list[str]] = {}
    for sample in planted_samples():
        texts.setdefault(str(sample.label), []).append(sample.text)
    (path / "texts.json").write_text(json.dumps(texts))
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    result = snmf(
        "eval", folder / "model", "--texts", folder / "texts.json", "--layers", "0", "--out", folder / "run",
        "--concepts", "days,weather", "--against", "diffmeans,random,permuted", *SHORT,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Detection at layer 0" in result.stdout
    assert "intervals are over concepts alone" in " ".join(result.stdout.split())
    assert "Steering at layer 0, scored by words" in result.stdout
    assert "2 pairs of concept and layer" in result.stdout
    assert "Next token under the same directions" in result.stdout
    return folder / "run"


def test_what_is_written(run: Path) -> None:
    report = json.loads((run / "eval" / "report.json").read_text())
    assert [row["method"] for row in report["detection"]["0"]] == ["snmf", "diffmeans", "random", "permuted"]
    assert [row["method"] for row in report["steering"]["words"]["all"]] == ["snmf", "diffmeans", "random"]
    assert len(report["pairs"]) == 6
    assert {row["n"] for row in report["immediate"]["layers"]["0"]} == {2}
    assert report["plan"]["protocol"]["report_samples"] == 2
    assert report["concepts"] == ["days", "weather"]
    assert (run / "eval" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_it_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = rivals.steer_concept

    def counted(*args: Any, **options: Any) -> Any:
        made.append(f"{args[2].name} {args[4]}")
        return real(*args, **options)

    monkeypatch.setattr(rivals, "steer_concept", counted)
    result = snmf(
        "eval", run, "--concepts", "days,weather", "--against", "diffmeans,neuron", *SHORT, "--json"
    )
    assert result.exit_code == 0, result.output
    assert made == ["neuron days", "neuron weather"]
    report = json.loads(result.stdout)
    assert [row["method"] for row in report["detection"]["0"]] == ["snmf", "diffmeans", "neuron"]


def test_the_next_token_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is written; the strengths are those of a run that writes some, and that may follow."""
    monkeypatch.setattr(rivals, "steer_concept", lambda *_, **__: pytest.fail("texts were written"))
    run = tmp_path / "run"
    options = ("--layers", "0", "--texts", folder / "texts.json", "--out", run, "--against", "random", *SHORT)
    result = snmf("eval", folder / "model", *options, "--concepts", "all", "--next-token")
    assert result.exit_code == 0, result.output
    assert "Next token under the same directions" in result.stdout
    assert "Steering at layer" not in result.stdout
    assert not (run / "eval" / "unsteered.json").exists()
    report = json.loads((run / "eval" / "report.json").read_text())
    assert report["concepts"] == sorted(CONCEPTS)
    assert report["steering"] == {}
    rows = {(row["method"], row["target"]): row for row in report["immediate"]["all"]}
    assert rows["snmf", 0.5]["shift"]["value"] > rows["random", 0.5]["shift"]["value"]
    assert (run / "eval" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.undo()
    whole = snmf("eval", run, "--against", "random", *SHORT, "--concepts", "days", "--json")
    assert whole.exit_code == 0, whole.output
    pairs = json.loads(whole.stdout)["pairs"]
    assert all(pair["results"]["words"]["gain"] is not None for pair in pairs)
    before = [pair["immediate"] for pair in report["pairs"] if pair["concept"] == "days"]
    assert [[effect["kl"] for effect in pair["immediate"]] for pair in pairs] == [
        [pytest.approx(effect["kl"]) for effect in effects] for effects in before
    ]


def test_interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where hours of work lie, though no option names the folder."""
    real, made = rivals.steer_concept, []

    def interrupted(*args: Any, **options: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(args[4])
        return real(*args, **options)

    monkeypatch.setattr(rivals, "steer_concept", interrupted)
    monkeypatch.chdir(tmp_path)
    options = (
        "--texts", folder / "texts.json", "--layers", "0", "--concepts", "days", "--against", "random", *SHORT,
    )  # fmt: skip
    result = snmf("eval", folder / "model", *options)
    assert result.exit_code == 130
    message = " ".join(result.stderr.split())
    assert (
        "results/model-eval keeps 1 finished shard of activations and 1 finished attempt to steer;" in message
    )
    assert "the same command goes on from there" in message
    monkeypatch.setattr(
        rivals, "steer_concept", lambda *args, **options: made.append("again") or real(*args, **options)
    )
    assert snmf("eval", folder / "model", *options).exit_code == 0
    assert made == ["days", "again"]


def test_other_options_are_refused(run: Path) -> None:
    result = snmf("eval", run, "--concepts", "days", *SHORT, "--seed", 1)
    assert result.exit_code == 2
    assert "seed = 0, not 1" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concepts", "ships"), "no text has the label 'ships'; wanted some of "),
        (("--concepts", "9"), "--concepts: wanted at most 3, got 9; there are words to score text by for "),
        (("--against", "magic"), "against: wanted some of"),
        (("--neuron-scale", "max"), "--neuron-scale: wanted rms or none"),
        (("--model-dtype", "float32"), "--model-dtype: "),
        (("--texts", "concepts"), "is a run, whose model and texts are settled"),
        (("--revision", "main"), "--revision: "),
    ],
)
def test_bad_options(run: Path, options: tuple[str, str], message: str) -> None:
    result = snmf("eval", run, *SHORT, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("bundled", "why", "what_to_do"),
    [
        (False, "fewer than 3 words set their training texts apart", "Collect more texts with these labels"),
        (True, "the bundled list of words leaves them out", "Ask for fewer or other concepts"),
    ],
)
@pytest.mark.parametrize("given", ["3", "birds"])
def test_concepts_without_words(given: str, bundled: bool, why: str, what_to_do: str) -> None:
    """What can be asked for, what cannot, and why."""
    trial: Any = SimpleNamespace(
        words={"days": ("Monday",), "cats": ("purr",)},
        labels=["birds", "days", "cats", "birds", None],
        has_bundled_words=bundled,
    )
    with pytest.raises(ValueError, match="--concepts: ") as error:
        eval_command._concepts(given, trial, 0)
    message = str(error.value)
    assert "words to score text by for cats, days; not for birds, " in message
    assert why in message
    assert what_to_do in message
    assert "\n" not in message


def test_a_judge(run: Path) -> None:
    pytest.importorskip("openai")
    gold = {item.text: item for item in gold_set()}

    def answer(body: dict[str, Any], _earlier: int) -> Reply:
        question = body["messages"][0]["content"]
        fluency = "fluen" in question.lower() and "concept" not in question.lower()
        known = next(
            (item for text, item in gold.items() if json.dumps(text)[1:-1] in question or text in question),
            None,
        )
        if known is not None:
            scores = known.fluency_scores if fluency else known.concept_scores
            return completion(json.dumps({"score": scores[0]}))
        days = sum(word in question for word in CONCEPTS["days"])
        return completion(json.dumps({"score": 2 if fluency else min(days, 2)}))

    with serve(answer) as endpoint:
        result = snmf(
            "eval", run, "--concepts", "days", "--against", "diffmeans", *SHORT, "--model", "scripted",
            "--base-url", endpoint.url,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "scored by judge" in result.stdout
    report = json.loads((run / "eval" / "report.json").read_text())
    rows = {row["method"]: row for row in report["steering"]["judge"]["all"]}
    assert rows["snmf"]["gain"]["value"] is not None
    assert rows["snmf"]["missing"] == 0
    assert report["scorers"]["judge"].startswith("judge 1, scripted")
    assert report["qualification"]["failures"] == []

    def strict(body: dict[str, Any], earlier: int) -> Reply:
        reply = answer(body, earlier)
        question = body["messages"][0]["content"]
        return reply if any(text in question for text in gold) else completion('{"score": 0}')

    with serve(strict) as endpoint:
        again = snmf(
            "eval", run, "--concepts", "days", "--against", "diffmeans", *SHORT, "--model", "strict",
            "--base-url", endpoint.url,
        )  # fmt: skip
    assert again.exit_code == 0, again.output
    other = json.loads((run / "eval" / "report.json").read_text())
    assert {row["concept"] for row in other["steering"]["judge"]["all"]} == {0.0}, "the first judge's scores"
    # Its scores are there beside those by words.
    assert set(report["steering"]) == {"words", "judge"}


def test_a_judge_that_does_not_qualify(run: Path) -> None:
    pytest.importorskip("openai")
    with serve(lambda _body, _earlier: completion('{"score": 2}')) as endpoint:
        result = snmf(
            "eval", run, "--concepts", "days", "--against", "diffmeans", *SHORT, "--model", "generous",
            "--base-url", endpoint.url,
        )  # fmt: skip
    assert result.exit_code == 2
    assert "does not qualify as a judge" in " ".join(result.output.split())


class TestLabels:
    """The paper's test: features that a model has named, steered towards what it named them."""

    @pytest.fixture(scope="class")
    @classmethod
    def labelled(cls, folder: Path) -> Path:
        pytest.importorskip("openai")
        run = folder / "labelled"
        for arguments in (
            ("collect", folder / "model", folder / "texts.json", "--layers", "0", "--out", run),
            ("fit", run, "--k", 12, "--keep", 0.00417),
        ):
            assert snmf(*arguments).exit_code == 0
        with serve(cls.answer) as endpoint:
            made = snmf("label", run, "--side", "input", "--model", "scripted", "--base-url", endpoint.url)
        assert made.exit_code == 0, made.output
        return run

    @staticmethod
    def answer(body: dict[str, Any], _earlier: int) -> Reply:
        """Names features by the concept whose words they have most of, writes of it, and judges by its words."""
        question = body["messages"][0]["content"]
        asked = {
            tag: found[1]
            for tag in ("places", "concept", "text")
            if (found := re.search(rf"<{tag}>\n(.*?)\n</{tag}>", question, re.DOTALL))
        }
        if "places" in asked:
            counts = {
                name: sum(
                    asked["places"].count(f"⟦{word}") + asked["places"].count(f"⟦ {word}") for word in words
                )
                for name, words in CONCEPTS.items()
            }
            best = max(counts, key=lambda name: counts[name])
            return completion(json.dumps({"label": best if counts[best] > 5 else None}))
        gold = next(
            (item for item in gold_set() if json.dumps(item.text, ensure_ascii=False) == asked.get("text")),
            None,
        )
        if gold is not None:
            scores = gold.concept_scores if "concept" in asked else gold.fluency_scores
            return completion(json.dumps({"score": scores[0]}))
        if "concept" not in asked:
            return completion('{"score": 2}')
        words = CONCEPTS[json.loads(asked["concept"])]
        if "text" in asked:
            return completion(
                json.dumps({"score": min(2, sum(word in asked["text"].split() for word in words))})
            )
        sentences = {
            "activating": [
                *(f"the cat {word} {word}" for word in words),
                *(f"a dog {word}" for word in words),
            ][:5],
            "neutral": [f"the {word} sat" for word in ("mat", "rug", "cat", "dog", "big mat")],
        }
        return completion(json.dumps(sentences))

    def test_what_is_said_and_kept(self, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options = (
            "--labels", "scripted", "--concepts", "9", "--samples", 1, "--report-samples", 2, "--max-new-tokens", 8,
            "--model", "scripted",
        )  # fmt: skip
        with serve(self.answer) as endpoint:
            result = snmf("eval", labelled, *options, "--base-url", endpoint.url)
            assert result.exit_code == 0, result.output
            assert "The clearest features of layer 0 steered to their labels by scripted" in result.stdout
            report = json.loads((labelled / "eval-labels" / "report.json").read_text())
            rows = {row["method"]: row for row in report["steering"]["judge"]["all"]}
            assert list(rows) == ["snmf", "diffmeans", "random"]
            # Each label once, whatever number of features has it.
            assert rows["snmf"]["n"] == len({pair["concept"] for pair in report["pairs"]}) <= 3
            assert rows["snmf"]["gain"]["value"] > rows["random"]["gain"]["value"]
            assert report["qualification"]["failures"] == []
            assert (labelled / "eval-labels" / "figure.png").read_bytes()[:4] == b"\x89PNG"
            # The same command does nothing twice; other options are another test.
            real = label_trial.steer_concept
            monkeypatch.setattr(label_trial, "steer_concept", lambda *_, **__: pytest.fail("done again"))
            again = snmf("eval", labelled, *options, "--base-url", endpoint.url, "--json")
            assert again.exit_code == 0, again.output
            assert json.loads(again.stdout)["pairs"] == report["pairs"]
            # A feature that has been fitted anew is another direction.
            kept = next((labelled / "eval-labels" / "layer_0" / "snmf").glob("*.json"))
            record = json.loads(kept.read_text())
            kept.write_text(json.dumps(record | {"made_by": record["made_by"] | {"direction": "another"}}))
            made: list[str] = []
            monkeypatch.setattr(
                label_trial,
                "steer_concept",
                lambda *args, **options: made.append(args[4]) or real(*args, **options),
            )
            assert snmf("eval", labelled, *options, "--base-url", endpoint.url).exit_code == 0
            assert made == [record["concept"]]
            other = snmf("eval", labelled, *options, "--seed", 1, "--base-url", endpoint.url)
            assert other.exit_code == 2
            assert "use --overwrite" in " ".join(other.output.split())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--labels", "scripted"), "--labels: a label is judged by a language model"),
            (
                ("--labels", "nobody", "--model", "x", "--base-url", "http://127.0.0.1:9/v1"),
                "no input-side labels by",
            ),
            (("--labels", "scripted", "--concepts", "days"), "--concepts: with --labels wanted how many"),
        ],
    )
    def test_bad_options(self, labelled: Path, options: tuple[str, ...], message: str) -> None:
        result = snmf("eval", labelled, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


class TestDetect:
    def test_tables_and_json(self, folder: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        made = snmf("collect", folder / "model", folder / "texts.json", "--layers", "0", "--out", run)
        assert made.exit_code == 0, made.output
        result = snmf("detect", run, "--k", 12)
        assert result.exit_code == 0, result.output
        for name in ("snmf", "diffmeans", "neuron", "random", "permuted", "hard AUROC"):
            assert name in result.stdout
        found = json.loads(snmf("detect", run, "--k", 12, "--json").stdout)
        rows = {row["method"]: row for row in found["layers"]["0"]}
        assert rows["snmf"]["auroc"]["value"] > 0.6
        assert found["sentences"] == {}
        assert found["seeds"] == [0, 1, 2, 3, 4]
        assert {len(row["repetitions"]) for row in rows.values()} == {5}
        for row in rows.values():
            means = [row["concepts"][name]["auroc"] for name in sorted(CONCEPTS)]
            assert sum(means) / len(means) == pytest.approx(row["auroc"]["value"])
        # What says little is marked, with what chance reaches of it.
        chance = f"random groups of neurons pass it for {rows['random']['detected']['value']:.0%} of the concepts here"
        for text in (result.stdout, found["notes"]["detected"]["0"]):
            assert f"uninformative: {chance}" in " ".join(text.split())
        for text in (result.stdout, found["notes"]["intervals"]):
            assert "concepts and 5 divisions of the texts" in " ".join(text.split())

    def test_one_repetition(self, folder: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        snmf("collect", folder / "model", folder / "texts.json", "--layers", "0", "--out", run)
        result = snmf("detect", run, "--k", 12, "--repeats", 1, "--against", "diffmeans")
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert "95 % intervals are over concepts alone" in text
        assert "uninformative: random groups of neurons pass it for 58 to 85 %" in text
        assert not list((run / "eval").glob("seed-*"))
        wrong = snmf("detect", run, "--k", 12, "--repeats", 0)
        assert wrong.exit_code == 2
        assert "--repeats: wanted at least 1, got 0" in wrong.output

    def test_it_goes_on(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also with more repetitions than before, and the result is that of a run that was not interrupted."""
        run, other = tmp_path / "run", tmp_path / "other"
        for path in (run, other):
            snmf("collect", folder / "model", folder / "texts.json", "--layers", "0", "--out", path)
        real, made = rivals.detect_concepts, []

        def counted(rival: Any, *args: Any, **options: Any) -> Any:
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(rival.name)
            return real(rival, *args, **options)

        options = ("--k", 12, "--against", "diffmeans")
        monkeypatch.setattr(rivals, "detect_concepts", counted)
        assert snmf("detect", run, *options, "--repeats", 2).exit_code == 130
        made.clear()
        again = snmf("detect", run, *options, "--repeats", 2, "--json")
        assert again.exit_code == 0, again.output
        # The first was finished, the second was not.
        assert made == ["snmf", "diffmeans"]
        made.clear()
        more = snmf("detect", run, *options, "--repeats", 3, "--json")
        assert made == ["snmf", "diffmeans"]
        made.clear()
        monkeypatch.setattr(rivals, "detect_concepts", real)
        whole = snmf("detect", other, *options, "--repeats", 3, "--json")
        assert json.loads(more.stdout) == json.loads(whole.stdout)
        assert json.loads(again.stdout)["seeds"] == [0, 1]

    def test_sentences(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("openai")
        run = tmp_path / "run"
        snmf("collect", folder / "model", folder / "texts.json", "--layers", "0", "--out", run)

        def answer(body: dict[str, Any], _earlier: int) -> Reply:
            question = body["messages"][0]["content"]
            if "neutral" in question:
                sentences = {
                    "activating": [
                        f"{where} {day}" for where in ("on", "not on") for day in CONCEPTS["days"]
                    ][:5],
                    "neutral": [f"the {word} sat" for word in ("mat", "rug", "cat", "dog", "big mat")],
                }
                return completion(json.dumps(sentences))
            if "Monday" not in question and "red" in question:
                return completion("well, hard to say")
            return completion('{"label": "days"}' if "Monday" in question else '{"label": null}')

        with serve(answer) as endpoint:
            options = (
                "--k",
                12,
                "--against",
                "random",
                "--repeats",
                1,
                "--model",
                "scripted",
                "--base-url",
                endpoint.url,
            )
            early = snmf("detect", run, *options)
            assert early.exit_code == 2
            assert "snmf fit" in early.output
            assert snmf("fit", run, "--k", 12, "--keep", 0.00417).exit_code == 0
            result = snmf("detect", run, *options)
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert re.search(
            r"S_CD is above 0 for \d+% .* random groups of as many neurons.*: \d+%\), which is uninf", text
        )
        assert "without an answer to the question for a label" in " ".join(result.stdout.split())
        with serve(answer) as endpoint:
            options = (*options[:-1], endpoint.url, "--top", 9, "--json")
            row = json.loads(snmf("detect", run, *options).stdout)["sentences"]["0"]
        assert (row["asked"], row["of"]) == (9, 12)
        assert row["no_label"] > 0
        assert row["features"] + row["no_label"] + row["no_concept"] + row["no_sentences"] == 9
        assert row["features"] == len(row["scores"]) > 0
        assert 0 <= row["random_above_zero"] <= 1
        labels = [
            json.loads(line)
            for line in (run / "layer_0" / "labels" / "scripted.jsonl").read_text().splitlines()
        ]
        assert {label["text"] for label in labels} == {"days", None}
