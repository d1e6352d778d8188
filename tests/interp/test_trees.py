from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from snmf_interp import (
    Description,
    Hierarchy,
    LanguageModel,
    Sample,
    Tree,
    build_tree,
    fit_hierarchy,
    overlap,
)
from snmf_interp import hierarchy as hierarchy_module
from snmf_interp.cli import app
from snmf_interp.levels import Level
from snmf_interp.runs import Run

Maker = Callable[..., LanguageModel]

NASTY = '</script><img onerror="x">&\\N "]; x -> y [label="\n\x1b[31m\u202e'


def by_hand() -> Hierarchy:
    """Five features, three above them, one above those; all of unit norm on tokens and in Z."""
    Y1 = torch.tensor([[0.1, 0.8, 0.0, 0.14, 0.0], [0.0, 0.7, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]])
    # Norms of effective coefficients are those of the rows of Y, for the rows of Y_0 are orthonormal.
    Y2 = torch.tensor([[0.5, 1.0, 0.4]])
    Y0 = torch.eye(5, 8)
    Y0[4] = 0

    def level(Z: torch.Tensor, Y: torch.Tensor) -> Level:
        return Level(Z=Z, Y=Y, keep=0.5, relative_error=0.5, relative_loss=0.5, start_loss=0.5)

    levels = (level(torch.eye(6, 5), Y0), level(torch.eye(6, 3), Y1), level(torch.eye(6, 1), Y2))
    return Hierarchy(levels, None, (), 0, None, {"backend": "auto"})


class TestTree:
    def test_links_above_the_threshold(self) -> None:
        """Relative to the child's strongest link: 0.14 is too little and 0.1 is not, though the same parent has both.

        The dead feature has no node; 0/1 is shared.
        """
        tree = build_tree(by_hand())
        assert sorted(tree.nodes) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0)]
        children = {place: [index for index, _ in node.children] for place, node in tree.nodes.items()}
        assert children[1, 0] == [1, 0]
        assert children[1, 1] == [2, 1]
        assert children[1, 2] == [3]
        assert tree.nodes[0, 1].parents == (0, 1)
        assert tree.roots == ((2, 0),)
        assert tree.leaves((1, 1)) == {1, 2}
        assert tree.leaves((2, 0)) == {0, 1, 2, 3}
        weights = [weight for _, weight in tree.nodes[1, 0].children]
        assert weights[1] / weights[0] == pytest.approx(0.125)
        assert [index for index, _ in build_tree(by_hand(), threshold=0.1).nodes[1, 0].children] == [1, 3, 0]

    def test_only_the_strongest_children(self) -> None:
        tree = build_tree(by_hand(), most=1)
        assert [index for index, _ in tree.nodes[1, 1].children] == [2]
        assert tree.nodes[0, 1].parents == (0,)
        assert tree.nodes[0, 0].parents == ()
        assert tree.nodes[2, 0].children[0][0] == 1
        # What has no parent is a root as well, after the coarsest level.
        assert tree.roots[0] == (2, 0)
        assert set(tree.roots) == {(2, 0), (1, 0), (1, 2), (0, 0)}

    def test_energy_is_a_share(self) -> None:
        tree = build_tree(by_hand())
        for level in range(3):
            shares = [node.energy for (of, _), node in tree.nodes.items() if of == level]
            assert sum(shares) == pytest.approx(1)

    @pytest.mark.parametrize("options", [{"threshold": -0.1}, {"threshold": 1.5}, {"most": 0}])
    def test_arguments_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: wanted"):
            build_tree(by_hand(), **options)


def described() -> Tree:
    texts = {
        (2, 0): Description(NASTY, ("day", NASTY), NASTY, 0.5, (NASTY,), (NASTY,), (("on ", NASTY, ""),)),
        (0, 1): Description("Monday", ("Monday", " ", "")),
    }
    return build_tree(by_hand(), descriptions=texts)


class TestExport:
    def test_json(self, tmp_path: Path) -> None:
        described().write(tmp_path / "t.json")
        content = json.loads((tmp_path / "t.json").read_text())
        assert content["roots"] == ["2/0"]
        assert [node["id"] for node in content["nodes"]].count("0/1") == 1
        assert {(link["parent"], link["child"]) for link in content["links"]} >= {
            ("1/0", "0/1"),
            ("1/1", "0/1"),
        }
        top = next(node for node in content["nodes"] if node["id"] == "2/0")
        assert (top["name"], top["concept"], top["words"]) == (NASTY, NASTY, ["day", NASTY])

    def test_graphml(self, tmp_path: Path) -> None:
        described().write(tmp_path / "t.graphml")
        space = "{http://graphml.graphdrawing.org/xmlns}"
        graph = ElementTree.parse(tmp_path / "t.graphml").getroot().find(f"{space}graph")
        assert graph is not None
        nodes = {node.get("id"): node for node in graph.findall(f"{space}node")}
        assert len(nodes) == 8
        label = next(data for data in nodes["2/0"] if data.get("key") == "name").text
        assert label is not None
        assert "</script><img onerror=" in label
        assert "\\u001b" in label
        edges = [(edge.get("source"), edge.get("target")) for edge in graph.findall(f"{space}edge")]
        assert len(edges) == len(set(edges)) == 8
        networkx = pytest.importorskip("networkx")
        read = networkx.read_graphml(tmp_path / "t.graphml")
        assert networkx.is_directed_acyclic_graph(read)
        assert read.nodes["1/0"]["level"] == 1
        assert read.edges["2/0", "1/1"]["weight"] > 0

    def test_dot(self, tmp_path: Path) -> None:
        """Outside its quoted strings the file holds nothing but its own words, whatever the labels are."""
        described().write(tmp_path / "t.dot")
        text = (tmp_path / "t.dot").read_text()
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
        assert all(ord(character) >= 32 for string in strings for character in string)
        assert any('<img onerror=\\"x\\">' in string for string in strings)
        # Of Graphviz's escapes only the line break that separates the lines is left.
        assert all(set(re.findall(r"\\(.)", string)) <= {"n", "\\", '"'} for string in strings)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "S", text)
        rest = re.sub(r"\S+|\s+", lambda m: "" if m[0].isspace() else f"{m[0]} ", outside)
        pattern = r"(S \[label=S\]; |S -> S \[link=[\d.e-]+, penwidth=[\d.]+\]; )*"
        assert re.fullmatch(rf"digraph hierarchy \{{ rankdir=LR; node \[shape=box\]; {pattern}\}} ", rest)

    def test_other_endings_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"wanted a name that ends in \.json, \.graphml or \.dot"):
            described().write(tmp_path / "t.svg")
        assert not list(tmp_path.iterdir())

    def test_text(self) -> None:
        """A shared child is shown in full once; control characters do not reach the terminal; markup is text."""
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        tree = build_tree(by_hand(), descriptions={(0, 1): Description("[red]Monday", (), NASTY, 0.25)})
        console.print(tree.to_text())
        text = console.export_text()
        lines = [line for line in text.splitlines() if "0/1" in line]
        assert len(lines) == 2
        assert "↑" not in lines[0]
        assert "↑" in lines[1]
        assert "\x1b" not in text
        assert "\\u001b" in text
        assert text.startswith("2/0")


class TestOverlap:
    def test_against_counting(self) -> None:
        generator = torch.Generator().manual_seed(0)
        Z = torch.randn(30, 7, generator=generator) * (torch.rand(30, 7, generator=generator) < 0.3)
        Z[:, 5] = 0
        found = overlap(Z)
        supports = [set(column.nonzero()[:, 0].tolist()) for column in Z.T]
        for i, one in enumerate(supports):
            for j, other in enumerate(supports):
                assert int(found.shared[i, j]) == len(one & other)
                assert float(found.expected[i, j]) == pytest.approx(len(one) * len(other) / 30)
                union = len(one | other)
                assert float(found.jaccard[i, j]) == pytest.approx(len(one & other) / union if union else 0)
        assert bool(found.z_score.isfinite().all())
        assert bool((found.p_value[5] == 1).all())

    def test_chance_is_that_of_random_supports(self) -> None:
        d, sizes, shared, draws = 40, (12, 9), 5, 20_000
        Z = torch.zeros(d, 2)
        Z[: sizes[0], 0] = 1
        Z[sizes[0] - shared : sizes[0] - shared + sizes[1], 1] = -1
        found = overlap(Z)
        places = torch.rand(draws, d, generator=torch.Generator().manual_seed(0)).argsort(1)[:, : sizes[1]]
        drawn = (places < sizes[0]).sum(1).double()
        assert float(found.shared[0, 1]) == shared
        assert float(found.expected[0, 1]) == pytest.approx(float(drawn.mean()), rel=0.02)
        assert float(found.z_score[0, 1]) == pytest.approx(
            float((shared - drawn.mean()) / drawn.std()), rel=0.05
        )
        assert float(found.p_value[0, 1]) == pytest.approx(float((drawn >= shared).double().mean()), abs=0.01)

    def test_order_puts_groups_together(self) -> None:
        Z = torch.zeros(40, 12)
        for feature in range(12):
            group = feature % 3
            Z[group * 10 : group * 10 + 6, feature] = 1
            Z[30 + feature % 10, feature] = 1
        order = overlap(Z).order
        assert sorted(order.tolist()) == list(range(12))
        groups = (order % 3).tolist()
        assert sum(a != b for a, b in itertools.pairwise(groups)) == 2

    @pytest.mark.parametrize("k", [1, 2])
    def test_few_features(self, k: int) -> None:
        assert overlap(torch.ones(4, k)).order.tolist() == list(range(k))

    @pytest.mark.parametrize("Z", [torch.ones(3), torch.ones(0, 3)])
    def test_no_features(self, Z: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="Z: wanted a matrix"):
            overlap(Z)


@pytest.fixture
def run(tmp_path: Path, make_model: Maker, samples: list[Sample]) -> Path:
    folder = tmp_path / "model"
    model = make_model()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    from snmf_interp import load_model

    Run.collect(tmp_path / "run", load_model(folder), samples, "0,2")
    return tmp_path / "run"


def snmf(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class TestRun:
    OPTIONS = ("--layers", 2, "--levels", "6,3,2", "--keep", 0.2)

    def test_command(self, run: Path, tmp_path: Path) -> None:
        exports = [tmp_path / name for name in ("t.json", "t.dot", "t.graphml")]
        asked = [part for path in exports for part in ("--export", path)]
        result = snmf("tree", run, *self.OPTIONS, *asked)
        assert result.exit_code == 0, result.output
        assert "layer 2: levels of 6, 3, 2 features" in result.stdout
        assert "level 1: 3 features, relative error" in result.stdout
        assert len(re.findall(r"level \d: .*, L0 \d+\n", result.stdout)) == result.stdout.count("  level ")
        assert re.search(r"^2/\d .*\n[├└]── 1/\d ", result.stdout, re.MULTILINE)
        content = json.loads(exports[0].read_text())
        assert content["sizes"] == [6, 3, 2]
        assert all(node["words"] and node["contexts"][0][1] for node in content["nodes"])
        assert all(node["name"] for node in content["nodes"] if node["words"])
        assert all(path.is_file() for path in exports)
        folder = run / "layer_2" / "tree"
        kept = ["descriptions.json", "hierarchy.safetensors", "manifest.json"]
        assert sorted(p.name for p in folder.iterdir()) == kept
        again = snmf("tree", run, *self.OPTIONS, "--top", 1)
        assert "kept from before" in again.stdout
        assert "1 more of level 2" in again.stdout

    def test_other_options_need_overwrite(self, run: Path) -> None:
        assert snmf("tree", run, *self.OPTIONS, "--bare").exit_code == 0
        result = snmf("tree", run, *self.OPTIONS, "--bare", "--seed", 1)
        assert result.exit_code == 2
        assert "was made with seed = 0, not 1; use --overwrite" in " ".join(result.stderr.split())
        (run / "layer_2" / "tree" / "descriptions.json").write_text("of the old one")
        assert snmf("tree", run, *self.OPTIONS, "--bare", "--seed", 1, "--overwrite").exit_code == 0
        assert not (run / "layer_2" / "tree" / "descriptions.json").exists()

    def test_begins_with_the_runs_features(self, run: Path) -> None:
        assert snmf("fit", run, "--layers", 2, "--k", 6, "--keep", 0.2, "--seed", 5).exit_code == 0
        result = snmf("tree", run, *self.OPTIONS, "--bare", "--joint", "none")
        assert "on the features of snmf fit" in result.stdout
        hierarchy = Hierarchy.load(run / "layer_2" / "tree" / "hierarchy.safetensors")
        assert torch.allclose(hierarchy.levels[0].Z, torch.as_tensor(Run.open(run).factors(2).Z), rtol=1e-5)
        # Features that have been fitted anew since are other features.
        assert snmf("fit", run, "--layers", 2, "--k", 6, "--keep", 0.2, "--overwrite").exit_code == 0
        assert "made with base" in snmf("tree", run, *self.OPTIONS, "--bare", "--joint", "none").stderr

    def test_goes_on_where_it_was_cut_short(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = Run.open(run)
        options: dict[str, Any] = {"keep": 0.2}
        real = hierarchy_module.finetune

        def killed(*_args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(hierarchy_module, "finetune", killed)
        with pytest.raises(KeyboardInterrupt):
            opened.hierarchy(2, [6, 3, 2], **options)
        folder = run / "layer_2" / "tree"
        assert (folder / "checkpoint" / "level_2.safetensors").is_file()
        monkeypatch.setattr(hierarchy_module, "finetune", real)
        monkeypatch.setattr("snmf_kernels.fit", killed)
        hierarchy, record = opened.hierarchy(2, [6, 3, 2], **options)
        monkeypatch.undo()
        assert not record["reused"]
        assert record["seconds"] is None
        assert not (folder / "checkpoint").exists()
        expected = fit_hierarchy(opened.store().layer(2).T, [6, 3, 2], **options)
        assert all(
            torch.equal(a.Z, b.Z) and torch.equal(a.Y, b.Y)
            for a, b in zip(hierarchy.levels, expected.levels, strict=True)
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--layers", 1), "1 was not collected; this run has 0, 2"),
            (("--layers", 2, "--levels", "6,x"), "--levels: wanted falling numbers"),
            (("--layers", 2, "--levels", "3,6"), "error: --levels: wanted falling numbers"),
            (("--layers", 2, "--joint", "some"), "--joint: wanted all, top or none"),
            (("--layers", 2, "--neuron-scale", "x"), "--neuron-scale: wanted rms or none"),
            (("--layers", 2, "--export", "t.svg"), "wanted a name that ends in .json"),
            (("--layers", 2, "--levels", "3,2", "--threshold", 2), "threshold: wanted a share"),
        ],
    )  # fmt: skip
    def test_bad_input_is_one_line(self, run: Path, arguments: tuple[Any, ...], message: str) -> None:
        result = snmf("tree", run, "--bare", *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
        assert "Traceback" not in result.output

    def test_descriptions_are_read_again(self, run: Path) -> None:
        opened = Run.open(run)
        with pytest.raises(FileNotFoundError):
            opened.descriptions(2, lambda: pytest.fail("loaded the model"))
        opened.hierarchy(2, [6, 3], keep=0.2)
        found = opened.descriptions(2, opened.load_model())
        assert set(found) == {(level, index) for level, k in enumerate((6, 3)) for index in range(k)}
        assert opened.descriptions(2, lambda: pytest.fail("loaded the model")) == found
        path = run / "layer_2" / "tree" / "descriptions.json"
        path.write_text(json.dumps({"format": 2, "descriptions": [{}]}))
        with pytest.raises(ValueError, match="is damaged"):
            opened.descriptions(2, lambda: pytest.fail("loaded the model"))


def test_description_of_a_feature() -> None:
    from snmf_interp.effects import WordEffects
    from snmf_interp.features import Feature, TokenInContext

    token = TokenInContext("on ", "Monday", " we", False, False, 3, "a", 1, "days", 2.0, 0.5)
    feature = Feature(
        layer=0, index=1, tokens=(token,), promoted=(), suppressed=(), distinctive=((" Friday", 3.0),), neurons=(),
        n_neurons=2, n_firing=2, firing_share=0.2, n_strong=1, strong_share=0.1, energy=0.2, distinct_tokens=1.0,
        name="weekdays", named_by="a model", concept="days", concept_precision=0.75, chance_precision=0.3,
        word_clarity=0.5, clarity=0.75,
    )  # fmt: skip
    contexts = (("on ", "Monday", " we"),)
    assert Description.of(feature) == Description(
        "weekdays", ("Monday",), "days", 0.75, (), (" Friday",), contexts
    )
    assert Description.of(dataclasses.replace(feature, concept=None)).precision is None
    # A logit lens that disagrees with what was measured is left out.
    effects = WordEffects(((" wasp", 1.0),), (), 1.0, 0.25, True, 0.5, 0.1)
    measured = dataclasses.replace(feature, effects=effects, lens_agreement=0.1)
    assert (Description.of(measured).raised, Description.of(measured).lens) == ((" wasp",), ())
