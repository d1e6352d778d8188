"""A hierarchy as a graph that people can read: which features of a level are made of which of the level below."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from . import files
from .features import visible

if TYPE_CHECKING:
    from rich.tree import Tree as TextTree

    from .features import Feature
    from .levels import Hierarchy
    from .models import LanguageModel
    from .store import ActivationStore

_FORMAT = "snmf_interp.tree"
# Of exported trees. 2: nodes have names, and concepts above chance alone.
VERSION = 2
# Of what a description says; another's is written anew.
_DESCRIBED = 2

Place = tuple[int, int]


@dataclass(frozen=True)
class Description:
    """What a node stands for.

    Attributes:
        name: what it is called, see :attr:`snmf_interp.Feature.name`.
        words: the words around its strongest tokens, strongest first.
        concept: the label of the texts that it ranks best, where it does so better than chance.
        precision: the average precision with which it does, on the texts that the fit saw.
        raised: the tokens that it makes likelier, measured; empty where that has not been done.
        lens: the tokens that it makes likelier by the logit lens; empty where that disagrees with measured effects.
        contexts: its strongest tokens, strongest first, as text before, token, and text after.
    """

    name: str
    words: tuple[str, ...] = ()
    concept: str | None = None
    precision: float | None = None
    raised: tuple[str, ...] = ()
    lens: tuple[str, ...] = ()
    contexts: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def of(cls, feature: Feature, contexts: int = 5) -> Description:
        """From a described feature."""
        effects = feature.effects
        return cls(
            name=feature.name,
            words=tuple(word for word, _ in feature.words),
            concept=feature.concept,
            precision=feature.concept_precision if feature.concept is not None else None,
            raised=() if effects is None else tuple(word for word, _ in effects.raised),
            lens=tuple(word for word, _ in feature.distinctive) if feature.lens_holds else (),
            contexts=tuple((token.before, token.token, token.after) for token in feature.tokens[:contexts]),
        )


@dataclass(frozen=True)
class Node:
    """A feature of a level.

    Attributes:
        level, index: its place.
        children: ``(index, weight)`` of features of the level below, strongest first; weights as in
            :meth:`snmf_interp.Hierarchy.links`.
        parents: indices of features of the level above that have it as a child, ascending.
        energy: ``‖z‖²‖c‖²`` as a share of its sum over the level, c being its row of effective coefficients.
        description: what it stands for, or None.
    """

    level: int
    index: int
    children: tuple[tuple[int, float], ...]
    parents: tuple[int, ...]
    energy: float
    description: Description | None = None

    @property
    def name(self) -> str:
        """``level/index``."""
        return f"{self.level}/{self.index}"


@dataclass(frozen=True)
class Tree:
    """The features of a hierarchy and the links that are kept: a directed graph without cycles, not a tree in the
    strict sense, for a feature may have several parents.

    Attributes:
        nodes: by ``(level, index)``, all features that are not dead.
        sizes: features of each level, finest first.
        threshold, most: see :func:`build_tree`.
    """

    nodes: Mapping[Place, Node]
    sizes: tuple[int, ...]
    threshold: float
    most: int
    _roots: tuple[Place, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        top = len(self.sizes) - 1
        order = sorted(
            (place for place, node in self.nodes.items() if place[0] == top or not node.parents),
            key=lambda place: (-place[0], -self.nodes[place].energy, place[1]),
        )
        object.__setattr__(self, "_roots", tuple(order))

    @property
    def roots(self) -> tuple[Place, ...]:
        """Nodes without a parent: the coarsest level by falling energy, then what no feature above has as a child."""
        return self._roots

    def links(self) -> Iterator[tuple[Node, Node, float]]:
        """Each link once: parent, child, weight."""
        for node in self.nodes.values():
            for index, weight in node.children:
                yield node, self.nodes[node.level - 1, index], weight

    def leaves(self, place: Place) -> set[int]:
        """Features of level 0 that a node leads to."""
        found = {place}
        for _ in range(place[0]):
            found = {(level - 1, index) for level, i in found for index, _ in self.nodes[level, i].children}
        return {index for _, index in found}

    def to_json(self) -> dict[str, Any]:
        """JSON values: nodes and links in lists, shared children once."""
        return {
            "format": _FORMAT,
            "version": VERSION,
            "sizes": list(self.sizes),
            "threshold": self.threshold,
            "most": self.most,
            "roots": [self.nodes[place].name for place in self.roots],
            "nodes": [
                {"id": node.name, "level": node.level, "index": node.index, "energy": node.energy}
                | _described(node.description)
                for node in self.nodes.values()
            ],
            "links": [
                {"parent": parent.name, "child": child.name, "weight": weight}
                for parent, child, weight in self.links()
            ],
        }

    def to_graphml(self) -> str:
        """GraphML, as Gephi, yEd and networkx read it. Characters that XML has no place for are spelled out."""
        root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
        for name, kind in (
            ("level", "int"),
            ("index", "int"),
            ("energy", "double"),
            ("name", "string"),
            ("words", "string"),
            ("concept", "string"),
            ("precision", "double"),
            ("raised", "string"),
            ("lens", "string"),
        ):
            _element(root, "key", id=name, **{"for": "node", "attr.name": name, "attr.type": kind})
        _element(root, "key", id="weight", **{"for": "edge", "attr.name": "weight", "attr.type": "double"})
        graph = _element(root, "graph", id="hierarchy", edgedefault="directed")
        for node in self.nodes.values():
            element = _element(graph, "node", id=node.name)
            values = {"level": node.level, "index": node.index, "energy": node.energy}
            for name, value in (values | _described(node.description)).items():
                # Contexts are for JSON: a graph's tools show attributes in a column each.
                if value is not None and name != "contexts":
                    text = ", ".join(map(visible, value)) if isinstance(value, list) else visible(str(value))
                    _element(element, "data", key=name).text = text
        for parent, child, weight in self.links():
            edge = _element(graph, "edge", source=parent.name, target=child.name)
            _element(edge, "data", key="weight").text = repr(weight)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def to_dot(self) -> str:
        """Graphviz DOT, coarse features left. Text is quoted: no label can end its string or name another escape."""
        lines = ["digraph hierarchy {", "  rankdir=LR;", "  node [shape=box];"]
        for node in self.nodes.values():
            label = [node.name]
            if node.description is not None:
                label.append(node.description.name)
                if node.description.concept:
                    label.append(node.description.concept)
            text = "\\n".join(_quotable(line) for line in label)
            lines.append(f'  "{node.name}" [label="{text}"];')
        strongest = {
            parent.name: max(weight for _, weight in parent.children) for parent, _, _ in self.links()
        }
        for parent, child, weight in self.links():
            width = 0.5 + 2.5 * weight / strongest[parent.name] if strongest[parent.name] else 0.5
            lines.append(f'  "{parent.name}" -> "{child.name}" [link={weight:.6g}, penwidth={width:.2f}];')
        return "\n".join([*lines, "}"]) + "\n"

    def to_text(self, roots: Sequence[Place] | None = None) -> TextTree:
        """For a terminal, with each child's share in the weights of its siblings.

        A child of several parents is shown with its own children under the first, then with an arrow only.

        Args:
            roots: where to begin; by default every root of the coarsest level.
        """
        from rich.text import Text
        from rich.tree import Tree as TextTree

        top = len(self.sizes) - 1
        chosen = [place for place in self.roots if place[0] == top] if roots is None else list(roots)
        shown: set[Place] = set()
        whole = TextTree("", hide_root=True)

        def add(branch: TextTree, place: Place, weight: float | None) -> None:
            node = self.nodes[place]
            line = Text.assemble((node.name, "bold"), overflow="ellipsis", no_wrap=True)
            if place in shown:
                line.append(" ↑")
            if weight is not None:
                line.append(f" {weight:.0%}", style="dim")
            if node.description is not None:
                line.append(f"  {visible(node.description.name)}", style="green")
                if node.description.concept:
                    line.append(f"  {visible(node.description.concept).replace('_', ' ')}", style="cyan")
                    line.append(f" {node.description.precision:.2f}", style="dim")
            if place in shown:
                branch.add(line)
                return
            shown.add(place)
            below = branch.add(line)
            total = sum(w for _, w in node.children) or 1.0
            for index, w in node.children:
                add(below, (place[0] - 1, index), w / total)

        for place in chosen:
            add(whole, place, None)
        return whole

    def write(self, path: str | Path) -> None:
        """Write ``.json``, ``.graphml`` or ``.dot`` by the ending of ``path``; the file appears when it is whole."""
        path = Path(path)
        kind = export_format(path)
        if kind == "json":
            text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        else:
            text = self.to_graphml() if kind == "graphml" else self.to_dot()
        files.write_text(path, text)


def export_format(path: str | Path) -> str:
    """``json``, ``graphml`` or ``dot``, by the ending of a name.

    Raises:
        ValueError: another ending.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("json", "graphml", "dot"):
        raise ValueError(f"path: wanted a name that ends in .json, .graphml or .dot, got {str(path)!r}")
    return kind


def build_tree(
    hierarchy: Hierarchy,
    *,
    threshold: float = 0.15,
    most: int = 4,
    descriptions: Mapping[Place, Description] | None = None,
) -> Tree:
    """The tree of a hierarchy.

    A link from p to c is kept if its weight is at least ``threshold`` times that of the child's strongest link (the
    maximum of its column of Y), and if it is among the ``most`` strongest of the parent's, of equal ones the lower
    children. Dead features have no node.

    Args:
        hierarchy: see there for the weights of links.
        threshold: 0.15 in the paper.
        most: children of a node; 4 in the paper.
        descriptions: of nodes, by ``(level, index)``; see :func:`describe_levels`.

    Raises:
        ValueError: ``threshold`` is outside [0, 1], or ``most`` below 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: wanted a share from 0 to 1, got {threshold}")
    if not most >= 1:
        raise ValueError(f"most: wanted at least 1, got {most}")
    descriptions = descriptions or {}
    children: dict[Place, tuple[tuple[int, float], ...]] = {}
    parents: dict[Place, list[int]] = {}
    for level in range(1, len(hierarchy.levels)):
        weights = hierarchy.links(level).double().cpu()
        kept = (weights >= threshold * weights.amax(0)) & (weights > 0)
        values, order = weights.where(kept, 0).sort(dim=1, descending=True, stable=True)
        for parent, (row, places) in enumerate(
            zip(values[:, :most].tolist(), order[:, :most].tolist(), strict=True)
        ):
            links = tuple((child, weight) for child, weight in zip(places, row, strict=True) if weight > 0)
            children[level, parent] = links
            for child, _ in links:
                parents.setdefault((level - 1, child), []).append(parent)
    nodes = {}
    for level, found in enumerate(hierarchy.levels):
        Z, C = found.Z.double(), hierarchy.coefficients(level).double()
        energies = (Z.square().sum(0) * C.square().sum(1)).cpu()
        energies /= energies.sum().clamp_min(1e-300)
        for index, energy in enumerate(energies.tolist()):
            place = (level, index)
            if energy > 0 or children.get(place) or parents.get(place):
                nodes[place] = Node(
                    level,
                    index,
                    children.get(place, ()),
                    tuple(parents.get(place, ())),
                    energy,
                    descriptions.get(place),
                )
    return Tree(nodes, hierarchy.sizes, threshold, most)


def describe_levels(
    hierarchy: Hierarchy, store: ActivationStore, model: LanguageModel, layer: int, **options: Any
) -> dict[Place, Description]:
    """Descriptions of all features of all levels, from each level's effective coefficients on the tokens.

    Args:
        hierarchy: of ``store.layer(layer).T``.
        store, model, layer, options: see :func:`snmf_interp.describe`.
    """
    from .features import describe

    return {
        (level, feature.index): Description.of(feature)
        for level in range(len(hierarchy.levels))
        for feature in describe(hierarchy.factorization(level), store, model, layer, **options)
    }


def write_descriptions(path: Path, descriptions: Mapping[Place, Description]) -> None:
    """Write descriptions as JSON; the file appears when it is whole."""
    rows = [
        {"level": level, "index": index} | _described(description)
        for (level, index), description in descriptions.items()
    ]
    files.write_json(path, {"format": _DESCRIBED, "descriptions": rows})


def read_descriptions(path: Path) -> dict[Place, Description] | None:
    """Read what :func:`write_descriptions` wrote; None where another version did, whose words are not these.

    Raises:
        ValueError: the file is damaged.
    """
    content = files.read_json(path)
    if content.get("format") != _DESCRIBED:
        return None
    try:
        return {
            (row["level"], row["index"]): Description(
                row["name"],
                tuple(row["words"]),
                row["concept"],
                row["precision"],
                tuple(row["raised"]),
                tuple(row["lens"]),
                tuple((before, token, after) for before, token, after in row["contexts"]),
            )
            for row in content["descriptions"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it written again") from error


def _described(description: Description | None) -> dict[str, Any]:
    if description is None:
        return {}
    return {
        "name": description.name,
        "words": list(description.words),
        "concept": description.concept,
        "precision": description.precision,
        "raised": list(description.raised),
        "lens": list(description.lens),
        "contexts": [list(context) for context in description.contexts],
    }


def _element(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, attributes)


def _quotable(text: str) -> str:
    """``text`` inside a quoted DOT string."""
    return visible(text).replace("\\", "\\\\").replace('"', '\\"')
