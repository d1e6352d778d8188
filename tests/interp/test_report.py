"""The report page as data and text; test_report_page.py opens it in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snmf_interp import LanguageModel, Sample, write_report
from snmf_interp.features import write_features
from snmf_interp.labels import Label, write_labels
from snmf_interp.report import MAX_BYTES, island
from snmf_interp.runs import Run

from .test_cli import fitted, model_folder, snmf, texts  # noqa: F401  # fixtures

Maker = Callable[..., LanguageModel]
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028\u202e&lt;"
TREE = {
    "format": "snmf_interp.tree",
    "version": 2,
    "sizes": [2, 1],
    "threshold": 0.15,
    "most": 4,
    "roots": ["1/0"],
    "nodes": [
        {"id": "0/0", "level": 0, "index": 0, "energy": 0.4, "name": HOSTILE, "words": [HOSTILE]},
        {"id": "0/1", "level": 0, "index": 1, "energy": 0.6},
        {"id": "1/0", "level": 1, "index": 0, "energy": 1.0},
    ],
    "links": [
        {"parent": "1/0", "child": "0/0", "weight": 2.0},
        {"parent": "1/0", "child": "0/1", "weight": 1.0},
    ],
}


def steered(feature: int | None = 1, text: str = " the cat") -> dict[str, Any]:
    """What ``snmf steer --json`` prints."""
    one = [{"prompt": "I think", "text": text, "token_ids": [4, 6]}]
    solved = {"target": 0.25, "sign": 1, "strength": 8.0, "kl": 0.25, "reached": True}
    groups = [{"mode": "add", "strength": 8.0, "solved": solved, "continuations": one}]
    return {"layer": 0, "feature": feature, "unsteered": one, "steered": groups}


class Parsed(HTMLParser):
    """The page as a parser sees it: tags with attributes, and the text of scripts, styles and the rest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag in ("script", "style"):
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.blocks[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.blocks[1])
        return found


@pytest.fixture
def model(make_model: Maker) -> LanguageModel:
    return make_model()


@pytest.fixture
def run(tmp_path: Path, model: LanguageModel, samples: list[Sample]) -> Run:
    made = Run.collect(tmp_path / "run", model, samples, "0-1")
    list(made.fit(made.layers, 5, keep=0.2, max_iter=10))
    return made


def written(run: Run, model: LanguageModel | None, **options: Any) -> Parsed:
    path = run.path / "report.html"
    assert write_report(run, path, model=model, **options).path == path
    return Parsed(path.read_text(encoding="utf-8"))


@settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.lists(st.dictionaries(st.text(), st.text())))
def test_island_holds_any_text(data: Any) -> None:
    text = island(data)
    assert json.loads(text) == data
    text.encode("utf-8")
    assert not set("<>&\u2028\u2029") & set(text)


def test_island_holds_half_characters_and_no_nan() -> None:
    assert json.loads(island("a\ud800b")) == "a\ud800b"
    with pytest.raises(ValueError, match="JSON"):
        island([float("nan")])


def test_page_is_self_contained_and_its_policy_allows_its_own_blocks_alone(
    run: Run, model: LanguageModel
) -> None:
    page = written(run, model)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    style, _, script = page.blocks
    for kind, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
        assert (attributes.get("href") or "#").startswith("#")
    own = "".join((Path(__file__).parents[2] / "python/snmf_interp/page/js").joinpath("main.js").read_text())
    assert own in script
    # Text reaches the page as text nodes alone.
    ours = script[script.index("(() => {\n") :]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|fetch\(|import\(", ours
    )
    assert "Permission is hereby granted" in script


def test_ids_that_repeat(tmp_path: Path, model: LanguageModel) -> None:
    """As document ids do: a context is found in its own text."""
    lines = [
        "The cat sat",
        "Monday the cat ran on the big red mat and the rug",
        "sun",
        "one two three , a dog .",
    ]
    samples = [Sample(f"doc{i // 2}", text, "xy"[i // 2]) for i, text in enumerate(lines)]
    run = Run.collect(tmp_path / "run", model, samples, "0", sink_threshold=None)
    list(run.fit([0], 3, max_iter=5, keep=0.2))
    contexts = [c for row in written(run, model).data["layers"][0]["features"] for c in row["contexts"]]
    assert contexts
    corpus = run.store().corpus
    for context in contexts:
        tokens = corpus.tokens_of(corpus.sample_ids.index(context["sample"]))
        spelled = "".join(context["pieces"])
        assert (
            context["pieces"][context["at"]].strip() == model.token_text(tokens[context["position"]]).strip()
        )
        assert spelled.strip() in lines[corpus.sample_ids.index(context["sample"])] or "<unk>" in spelled


def test_hostile_texts_stay_data(run: Run, model: LanguageModel) -> None:
    features = run.features(0, model)
    token = dataclasses.replace(
        features[0].tokens[0], before=HOSTILE, token=HOSTILE, after=HOSTILE, label=HOSTILE
    )
    features[0] = dataclasses.replace(
        features[0],
        tokens=(token, *features[0].tokens[1:]),
        promoted=((HOSTILE, 1.0),),
        concept=HOSTILE,
        name=HOSTILE,
    )
    write_features(run.features_path(0), features)
    labels = [Label(0, 0, "input", HOSTILE, True, HOSTILE)]
    write_labels(run.labels_folder(0), labels, {"source": HOSTILE})
    plain = written(run, model)
    run.config["model"]["name"] = HOSTILE
    page = written(
        run,
        model,
        title=HOSTILE,
        layers=[0],
        hierarchy={0: TREE},
        steering=[steered(text=HOSTILE)],
    )
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script", "script"]
    assert len(page.tags) <= len(plain.tags)
    assert page.text.count(HOSTILE) == 3  # the title, the heading, the model's name
    first = page.data["layers"][0]["features"][0]
    assert first["concept"] == first["lens"]["promoted"][0][0] == first["labels"][0]["text"] == HOSTILE
    assert first["name"] == HOSTILE
    # The pieces of these tokens are not those of the text: it stands as it was described.
    assert first["contexts"][0]["pieces"] == [HOSTILE] * 3
    assert first["contexts"][0]["shade"][1] != "0"
    assert page.data["steering"][0]["prompts"][0]["texts"][1] == {
        "setting": "add +8, KL 0.25",
        "text": HOSTILE,
    }


def test_contexts_are_shaded_by_strength(run: Run, model: LanguageModel) -> None:
    data = written(run, model).data
    store = run.store()
    places = store.places(1).tolist()
    factors = run.factors(1)
    strength = factors.Y * factors.Z.norm(dim=0)[:, None]
    features = run.features(1, model)
    checked = 0
    for row, feature in zip(data["layers"][1]["features"], features, strict=True):
        for context, token in zip(row["contexts"], feature.tokens, strict=True):
            pieces, at = context["pieces"], context["at"]
            assert "".join(pieces[:at]) == token.before
            assert pieces[at] == token.token
            assert "".join(pieces[at + 1 :]) == token.after
            start = int(store.corpus.offsets[store.corpus.sample_ids.index(token.sample)])
            # The start token is special and has no piece, so that the first one is at position 1.
            for i, shade in enumerate(context["shade"]):
                place = start + 1 + i
                own = float(strength[feature.index, places.index(place)] / strength[feature.index].max())
                assert int(shade, 16) == pytest.approx(15 * own, abs=0.501)
                checked += own > 0.1
    assert checked > 20
    # Where the pieces are not the text, the text as it was described stands, and the token alone is shaded.
    spoilt = json.loads((run.path / "tokens.json").read_text())
    spoilt["texts"] = dict.fromkeys(spoilt["texts"], "x")
    (run.path / "tokens.json").write_text(json.dumps(spoilt))
    context = written(run, None).data["layers"][1]["features"][0]["contexts"][0]
    token = features[0].tokens[0]
    assert context["pieces"] == [token.before, token.token, token.after]
    assert context["shade"] == "0f0"


def test_tokens_that_were_left_out_are_marked(
    tmp_path: Path, make_model: Maker, samples: list[Sample]
) -> None:
    # Without a start token the first position is a word, which is left out of the fit.
    model = make_model("gpt2", add_bos=False, start_token=None)
    run = Run.collect(tmp_path / "run", model, samples, "0")
    list(run.fit([0], 3, keep=0.2, max_iter=5))
    contexts = [c for f in written(run, model).data["layers"][0]["features"] for c in f["contexts"]]
    assert {context["shade"][0] for context in contexts} == {"-"}
    assert not any("-" in context["shade"][1:] for context in contexts)


def test_layer_holds_its_neurons_overlap_and_histogram(run: Run, model: LanguageModel) -> None:
    labels = [
        Label(0, 2, "input", "days", True, "some/model"),
        Label(0, 2, "output", None, False, "some/model", reason="r" * 999),
    ]
    write_labels(run.labels_folder(0), labels, {"source": "some/model"})
    assert snmf("label", run.path, "--layers", 0).exit_code in (0, 2)
    layer = written(run, model, layers=[0]).data["layers"][0]
    factors = run.factors(0)
    strength = factors.Y * factors.Z.norm(dim=0)[:, None]
    supports = [set(torch.nonzero(z).squeeze(1).tolist()) for z in factors.Z.T]
    assert layer["width"] == 24
    assert layer["tokens"] == factors.Y.shape[1]
    for feature in layer["features"]:
        i = feature["index"]
        assert {neuron for neuron, _ in feature["neurons"]} == supports[i]
        weights = [abs(weight) for _, weight in feature["neurons"]]
        assert weights == sorted(weights, reverse=True)
        assert sum(w * w for w in weights) == pytest.approx(1 if supports[i] else 0, abs=1e-3)
        counts = feature["strengths"]["counts"]
        assert sum(counts) == feature["strengths"]["positive"] == int((strength[i] > 0).sum())
        assert feature["strengths"]["max"] == pytest.approx(float(strength[i].max()), rel=1e-3)
    overlap = layer["overlap"]
    assert sorted(overlap["order"]) == overlap["features"] == [0, 1, 2, 3, 4]
    for i, row in enumerate(overlap["shared"]):
        assert row == [len(supports[i] & supports[j]) for j in range(i, 5)]
    found = [label for label in layer["features"][2]["labels"] if label["source"] == "some/model"]
    assert [label["text"] for label in found] == ["days", None]
    assert found[1]["reason"] == "r" * 200


def test_dead_features_and_layers_without_pairs(
    tmp_path: Path, model: LanguageModel, samples: list[Sample]
) -> None:
    run = Run.collect(tmp_path / "run", model, samples, "0")
    list(run.fit([0], 2, keep=0.2, max_iter=5))
    factors = run.factors(0)
    Z, Y = factors.Z.clone(), factors.Y.clone()
    Z[:, 1], Y[1] = 0, 0
    dataclasses.replace(factors, Z=Z, Y=Y, dead_features=torch.tensor([1])).save(
        run.path / "layer_0" / "factors.safetensors"
    )
    layer = written(run, model).data["layers"][0]
    assert [feature["dead"] for feature in layer["features"]] == [False, True]
    assert layer["features"][1]["strengths"] == {"max": 0.0, "positive": 0, "counts": []}
    assert layer["features"][1]["contexts"] == layer["features"][1]["neurons"] == []
    assert layer["overlap"]["shared"][1] == [0]


def test_size_is_kept_by_dropping_the_weakest_contexts(run: Run, model: LanguageModel) -> None:
    path = run.path / "report.html"
    whole = write_report(run, path, model=model)
    assert whole.size == path.stat().st_size < MAX_BYTES
    assert whole.features == 10
    assert whole.cut == ()
    limit = whole.size - 2000
    cut = write_report(run, path, model=model, max_bytes=limit)
    assert cut.size == path.stat().st_size <= limit
    page = Parsed(path.read_text(encoding="utf-8"))
    kept = max(len(feature["contexts"]) for layer in page.data["layers"] for feature in layer["features"])
    assert 1 <= kept < 12
    assert f"the {kept} strongest are kept" in cut.cut[0]
    assert cut.cut[0] in page.text
    first = page.data["layers"][0]["features"][0]
    assert [c["strength"] for c in first["contexts"]] == [
        pytest.approx(token.strength, rel=1e-3) for token in run.features(0, model)[0].tokens[:kept]
    ]
    # Not one context more would have fitted: one of each feature is at least 100 bytes.
    assert limit - cut.size < 2000
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"10 features with one context each take .* choose fewer layers"):
        write_report(run, path, model=model, max_bytes=1000)
    assert path.read_bytes() == before
    assert list(run.path.glob(".*.tmp")) == []


def test_second_report_needs_no_model_and_its_page_is_the_same(run: Run, model: LanguageModel) -> None:
    first = write_report(run, run.path / "a.html", model=model)
    again = write_report(run, run.path / "b.html", model=lambda: pytest.fail("loaded the model"))
    assert first.path.read_bytes() == again.path.read_bytes()


def test_facts(run: Run, model: LanguageModel) -> None:
    text = " ".join(written(run, model, layers=[1]).text.split())
    record = run.record(1)
    for fact in (
        "tiny-llama",
        f"torch {torch.__version__}",
        f"{record['relative_error']:.4f}",
        record["stop_reason"],
        "12 at the first position",
        "blocks.1.mlp.hook_post",
        "max_iter 10",
    ):
        assert fact in text
    assert "Layer 0" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": None}, "NoneType"),
        ({"roots": ["9/9"]}, "names a node '9/9'"),
        ({"links": [{"parent": "0/0", "child": "1/0", "weight": 1}]}, "a child stands above its parent"),
        ({"links": [{"parent": "0/0", "child": "0/0", "weight": 1}]}, "a child stands above its parent"),
    ],
)
def test_a_hierarchy_that_is_none(
    run: Run, model: LanguageModel, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(run, run.path / "r.html", model=model, hierarchy={0: TREE | change})
    with pytest.raises(ValueError, match="layer 7 is not in this report"):
        write_report(run, run.path / "r.html", model=model, hierarchy={7: TREE})
    without = {name: value for name, value in TREE.items() if name != "sizes"}
    with pytest.raises(ValueError, match="it has no 'sizes'"):
        write_report(run, run.path / "r.html", model=model, hierarchy={0: without})


def test_tree_of_the_run(run: Run, model: LanguageModel) -> None:
    """What snmf tree has kept is on the page without being asked for, until its features are replaced."""
    assert run.tree(0) is None
    k = run.factors(0).k
    options = run.record(0)["solver_options"]
    run.hierarchy(0, [k, 1], keep=options["keep"], neuron_scale=options["neuron_scale"])
    tree = written(run, model).data["layers"][0]["tree"]
    assert tree["sizes"] == [k, 1]
    assert "words" not in tree["nodes"][0]
    run.descriptions(0, model)
    described = written(run, model).data["layers"][0]["tree"]
    assert any(node.get("words") for node in described["nodes"])
    # A tree that is given goes before it.
    assert written(run, model, hierarchy={0: TREE}).data["layers"][0]["tree"]["sizes"] == [2, 1]
    unfinished = run.path / "layer_0" / "tree" / "hierarchy.safetensors"
    held = unfinished.read_bytes()
    unfinished.unlink()
    assert run.tree(0) is None
    unfinished.write_bytes(held)
    assert run.tree(0) is not None
    list(run.fit([0], k, overwrite=True, seed=9))
    assert run.tree(0) is None


def test_steering_records(run: Run, model: LanguageModel) -> None:
    ablated = steered(feature=2)
    ablated["steered"][0] |= {"mode": "ablate", "strength": None, "solved": None}
    # A vector's texts belong to no feature.
    data = written(run, model, steering=[steered(), steered(feature=None), ablated]).data
    assert [(row["layer"], row["feature"]) for row in data["steering"]] == [(0, 1), (0, 2)]
    assert [t["setting"] for t in data["steering"][1]["prompts"][0]["texts"]] == ["unsteered", "ablate"]
    with pytest.raises(ValueError, match="snmf steer"):
        write_report(run, run.path / "r.html", model=model, steering=[{"feature": 1}])


def test_command(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    (tmp_path / "steer.jsonl").write_text(json.dumps(steered(text="\u2028"), ensure_ascii=False) + "\n")
    target = tmp_path / "pages" / "page.html"
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))
    result = snmf(
        *("report", fitted, "-o", target, "--layers", "0", "--open"),
        *("--tree", f"0={tmp_path / 'tree.json'}", "--steering", tmp_path / "steer.jsonl"),
    )
    assert result.exit_code == 0, result.output
    assert "✓ 3 features in" in result.stdout
    assert opened == [target.resolve().as_uri()]
    data = Parsed(target.read_text(encoding="utf-8")).data
    assert [layer["layer"] for layer in data["layers"]] == [0]
    assert data["layers"][0]["tree"]["roots"] == ["1/0"]
    assert data["steering"][0]["prompts"][0]["texts"][0]["text"] == "\u2028"
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert "open it by hand" not in result.stderr
    assert "by hand" in snmf("report", fitted, "-o", target, "--open").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "7"), "7 was not collected"),
        (("--tree", "tree.json"), "wanted LAYER=FILE"),
        (("--tree", "0=nowhere.json"), "nowhere.json"),
        (("--steering", "bad.jsonl"), "not what `snmf steer --json` prints"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    fitted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{")
    result = snmf("report", fitted, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_command_without_factors(tmp_path: Path, model_folder: Path, texts: Path) -> None:  # noqa: F811
    run = tmp_path / "bare"
    assert snmf("collect", model_folder, texts, "--layers", "0", "--out", run).exit_code == 0
    assert "has no factorised layer yet" in snmf("report", run).stderr
    assert "not factorised yet" in snmf("report", run, "--layers", "0").stderr
