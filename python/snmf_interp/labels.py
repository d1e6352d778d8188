"""Naming features: by their distinctive words, or by a language model that reads their tokens in context.

    label_features(features, corpus=corpus_words(store, model))    # words alone, the same on every machine
    label_features(features, OpenAIModel("gpt-4o-mini"))           # as in the paper, with a model

The *input side* is what a feature fires on, the *output side* what it makes likelier. "No clear concept" is an
answer of its own; a failed one is missing. Labels stand in a run as ``layer_6/labels/<source>.jsonl``, beside
a manifest that says how they were made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, prompts, words
from .answers import Request, ask_json
from .features import WORDS
from .runs import versions

if TYPE_CHECKING:
    from .answers import ChatModel
    from .features import Feature, TokenInContext

FORMAT = 1
SIDES = ("input", "output")
# Words alone: by how many standard deviations the strongest must stand out for the label to count as clear. Chance
# passes it about as seldom in small corpora: 4.5, 3.2 and 2.3 % of 600 draws of 25 random tokens, with the strengths of
# features, from the bundled corpus, its half and its quarter. What is found needs texts, for a concept of few has few
# words: 63, 39 and 24 of 100 features of SmolLM2-135M's layer 23 fitted there (82 at layer 8 of the whole).
_CLEAR = 3.5
# Characters of a label, and tokens of the answer that holds it: models that think first need more, which is a
# parameter of theirs.
_LONGEST, _ANSWER = 120, 100
_UNCLEAR = frozenset({"", "none", "null", "n/a", "unclear", "no clear concept", "no concept"})


@dataclass(frozen=True)
class Label:
    """A feature's name, from one side.

    Attributes:
        layer, index: the feature.
        side: ``"input"`` or ``"output"``.
        text: the label. None when there is no clear concept (``reason`` is None then), or it is missing.
        clear: whether it names one thing. What a model names is clear; words are when they stand out more than
            chance would have it. Of the output side words alone cannot tell: the text is a list of words, which is
            neither clear nor unclear (:attr:`is_list`), and this is False.
        source: ``"words"`` or the model's name.
        reason: why the label is missing: what failed.
        raw: what the model wrote.
    """

    layer: int
    index: int
    side: str
    text: str | None
    clear: bool
    source: str
    reason: str | None = None
    raw: str | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.clear:
            raise ValueError("a label without text is not clear")
        if self.text is not None and self.reason is not None:
            raise ValueError("a label with a text has no reason to be missing")

    @property
    def is_missing(self) -> bool:
        """Whether there is no answer, which is not the same as no clear concept."""
        return self.reason is not None

    @property
    def is_list(self) -> bool:
        """Whether the text is no name but a list: the words that a feature makes likelier, found by words alone."""
        return self.side == "output" and self.source == WORDS


def label_features(
    features: Sequence[Feature],
    llm: ChatModel | None = None,
    *,
    sides: Iterable[str] = SIDES,
    corpus: Mapping[str, float] | None = None,
    shown: int = 10,
) -> list[Label]:
    """Name features.

    Args:
        features: of :func:`snmf_interp.describe`.
        llm: who names them; None for their distinctive words (:mod:`snmf_interp.words`).
        sides: ``"input"``, ``"output"`` or both.
        corpus: counts of the corpus's words (:func:`snmf_interp.words.corpus_words`), which words alone are
            compared with; by default those of all contexts of ``features`` together.
        shown: how many tokens in context a model is shown (10 in the paper).

    Returns:
        A label for each feature and side, in this order. A feature without tokens, or of which it is not known
        what it makes likelier (neither measured effects nor a logit lens that agrees with them), has no clear
        concept on that side; no model is asked.

    Raises:
        ValueError: a side that is none, or ``shown`` below 1.
    """
    wanted = tuple(sides)
    if unknown := [side for side in wanted if side not in SIDES]:
        raise ValueError(f"sides: wanted 'input' and 'output', got {unknown[0]!r}")
    if shown < 1:
        raise ValueError(f"shown: wanted at least 1, got {shown}")
    if llm is None:
        counts = corpus if corpus is not None else _context_words(features)
        return [_from_words(feature, side, counts) for feature in features for side in wanted]
    places = [(feature, side) for feature in features for side in wanted]
    questions = [question(feature, side, shown=shown) for feature, side in places]
    answers = iter(ask_json(llm, [request for request in questions if request is not None], parse_label))
    labels = []
    for (feature, side), request in zip(places, questions, strict=True):
        if request is None:
            labels.append(Label(feature.layer, feature.index, side, None, False, llm.name))
            continue
        answer = next(answers)
        text = (answer.value or "") or None
        labels.append(
            Label(feature.layer, feature.index, side, text, text is not None, llm.name, answer.reason, answer.raw)
        )  # fmt: skip
    return labels


def question(feature: Feature, side: str, *, shown: int = 10) -> Request | None:
    """What a model is asked about a side of a feature; None where there is nothing to show."""
    if side == "input":
        if not feature.tokens:
            return None
        places = [_marked(token) for token in feature.tokens[:shown]]
        return Request.of(prompts.INPUT.substitute(places=prompts.quote(places)), max_tokens=_ANSWER)
    effects = feature.effects
    if effects is not None:
        raised, lowered = effects.raised, effects.lowered
    elif feature.lens_holds:
        raised, lowered = feature.promoted, feature.suppressed
    else:
        return None
    if not raised:
        return None
    lists = {
        name: prompts.quote([token for token, _ in pairs])
        for name, pairs in (("raised", raised), ("lowered", lowered))
    }
    return Request.of(prompts.OUTPUT.substitute(lists), max_tokens=_ANSWER)


def parse_label(answer: Mapping[str, Any]) -> str:
    """The label in a model's answer; empty for no clear concept.

    Raises:
        ValueError: it is not ``{"label": …}`` with a short text or null.
    """
    if "label" not in answer:
        raise ValueError('wanted an object with "label"')
    label = answer["label"]
    if label is None:
        return ""
    if not isinstance(label, str):
        raise ValueError(f"wanted a text or null as label, got {type(label).__name__}")
    text = " ".join(label.split()).strip(" .\"'")
    if text.casefold() in _UNCLEAR:
        return ""
    if len(text) > _LONGEST:
        raise ValueError(f"wanted a label of at most {_LONGEST} characters, got {len(text)}")
    if "…" in text and len(text) < 4:
        raise ValueError("wanted a label, got the pattern")
    return text


def write_labels(folder: Path, labels: Sequence[Label], record: Mapping[str, Any]) -> list[Label]:
    """Keep labels of one source, with those that are there already and were made the same way.

    Several processes may do so at once.

    Args:
        folder: ``layer_6/labels`` of a run.
        labels: all of one source.
        record: how they were made (:func:`made_by`). Labels made otherwise are replaced as a whole.

    Returns:
        All labels of the source, by index and side.
    """
    # Beside the folder, which goes when the layer is fitted anew.
    with files.locked(folder.parent):
        return _written(folder, labels, record)


def _written(folder: Path, labels: Sequence[Label], record: Mapping[str, Any]) -> list[Label]:
    (source,) = {label.source for label in labels}
    path = labels_path(folder, source)
    there = files.read_versioned(_record_path(path), FORMAT) if _record_path(path).is_file() else {}
    kept: dict[tuple[int, str], Label] = {}
    if {name: there.get(name) for name in record} == json.loads(json.dumps(record)):
        kept = {(label.index, label.side): label for label in read_labels(folder, source)}
    else:
        # Labels must never stand under another's record.
        path.unlink(missing_ok=True)
    kept |= {(label.index, label.side): label for label in labels}
    every = [kept[key] for key in sorted(kept)]
    counts = {side: count_labels([label for label in every if label.side == side]) for side in SIDES}
    files.write_json(
        _record_path(path),
        {"format": FORMAT, **record, "counts": counts, "versions": versions()},
    )
    files.write_text(path, "".join(json.dumps(asdict(n), ensure_ascii=False) + "\n" for n in every))
    return every


def count_labels(labels: Sequence[Label]) -> dict[str, int]:
    """How many labels of one source and side are clear, not clear, and missing; of lists, how many have words."""
    if labels and labels[0].is_list:
        listed = sum(label.text is not None for label in labels)
        return {"lists": listed, "empty": len(labels) - listed}
    return {
        "clear": sum(label.clear for label in labels),
        "not clear": sum(not (label.clear or label.is_missing) for label in labels),
        "missing": sum(label.is_missing for label in labels),
    }


def read_labels(folder: Path, source: str) -> list[Label]:
    """Labels of one source that :func:`write_labels` kept; none if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = labels_path(folder, source)
    return _read(path) if path.is_file() else []


def read_sources(folder: Path) -> list[Label]:
    """Labels of every source in a folder, models first.

    Raises:
        ValueError: a file is damaged.
    """
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stem == WORDS, path.name))
    return [label for path in paths for label in _read(path)]


def _read(path: Path) -> list[Label]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [Label(**json.loads(line)) for line in lines if line]
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it written again") from error


def made_by(llm: ChatModel | None, features: Path, *, shown: int = 10) -> dict[str, Any]:
    """The record of how labels are made: the model, its parameters, the prompts, and which features."""
    record: dict[str, Any] = {
        "source": WORDS if llm is None else llm.name,
        "features": hashlib.sha256(features.read_bytes()).hexdigest()[:16],
    }
    if llm is None:
        return record | {"method": f"log-odds {words.VERSION}"}
    return record | {
        "parameters": getattr(llm, "parameters", {}),
        "prompts": {"input": prompts.digest(prompts.INPUT), "output": prompts.digest(prompts.OUTPUT)},
        "shown": shown,
    }


def labels_path(folder: Path, source: str) -> Path:
    """The file of a source's labels: its name, made fit for a file system, and told apart by a hash."""
    name = re.sub(r"[^\w.-]+", "_", source).strip("._")
    if name != source:
        name = f"{name[:80]}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return folder / f"{name}.jsonl"


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _from_words(feature: Feature, side: str, corpus: Mapping[str, float]) -> Label:
    if side == "input":
        found = words.input_words(feature, corpus)
        at = ", ".join(word.text for word in found if word.peak)
        near = ", ".join(word.text for word in found if not word.peak)
        text = "; ".join(filter(None, [at, f"near {near}" if near else ""]))
        clear = max((word.z for word in found), default=0.0) >= _CLEAR
    else:
        found = words.output_words(feature, corpus)
        text, clear = ", ".join(word.text for word in found), False
    return Label(feature.layer, feature.index, side, text or None, clear, WORDS)


def _context_words(features: Sequence[Feature]) -> Counter[str]:
    """Words of all contexts, each place once."""
    seen = {
        (token.sample, token.position): token.before + token.token + token.after
        for feature in features
        for token in feature.tokens
    }
    return words.count_words(seen.values())


def _marked(token: TokenInContext) -> str:
    """A token in its context, marked, without its leading space."""
    before, text, after = map(prompts.unmarked, (token.before, token.token, token.after))
    bare = text.lstrip(" ")
    opening, closing = prompts.MARKS[0], prompts.MARKS[1]
    return (
        ("…" if token.cut_before else "")
        + before
        + text[: len(text) - len(bare)]
        + opening
        + bare
        + closing
        + after
        + ("…" if token.cut_after else "")
    )
