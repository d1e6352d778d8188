"""Reading texts: plain text, JSONL, CSV, JSON, Python lists and dictionaries, and the bundled corpus."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

# Each is a corpus in snmf_interp.data; see _bundled.
BUNDLED = ("concepts", "word-groups")
_WANTED = "a string, or an object with 'text' (or 'prompt') and optionally 'label'"


@dataclass(frozen=True)
class Sample:
    """One text. ``id`` names its origin (``weekdays/3``, ``notes.txt:12``), ``label`` its concept."""

    id: str
    text: str
    label: str | None = None


def read_texts(
    source: str | Path | Mapping[str, Iterable[str]] | Iterable[str | Sample | Mapping[str, Any]],
    *,
    chunk: int | None = None,
) -> list[Sample]:
    """Read samples.

    Args:
        source: ``"concepts"`` or ``"word-groups"`` (the bundled corpora), a file, ``{label: [texts]}``, or a list of
            strings, objects or samples. ``.jsonl``/``.ndjson``, ``.csv``/``.tsv`` and ``.json`` files hold ``text``
            (or ``prompt``) and optionally ``label``; a ``.json`` file may also hold ``{label: [texts]}`` or a
            list of strings. Any other file is plain text, one sample a line, blank lines skipped.
        chunk: read a plain-text file as one text and cut it into pieces of this many words.

    Returns:
        The samples in their order; never empty.

    Raises:
        FileNotFoundError: no such file (and no bundled corpus of that name).
        ValueError: what was read is not as above; the message names file, line, what was wanted and what
            came.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: wanted a number of words, at least 1, got {chunk}")
    if isinstance(source, str) and source in BUNDLED:
        samples, where = _bundled(source), f"the bundled corpus {source!r}"
    elif isinstance(source, str | Path):
        samples, where = _from_file(Path(source).expanduser(), chunk), str(source)
    elif isinstance(source, Mapping):
        samples, where = _from_labelled(source, "the dictionary"), "the dictionary"
    else:
        samples = [_sample(item, f"item {i}", str(i)) for i, item in enumerate(source)]
        where = "the list"
    if not samples:
        raise ValueError(f"{where} holds no text")
    return samples


def digest(samples: Iterable[Sample]) -> str:
    """A short hash of ids, texts and labels."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(repr((sample.id, sample.text, sample.label)).encode())
    return total.hexdigest()[:16]


def _bundled(name: str) -> list[Sample]:
    if name == "word-groups":
        from .word_groups import group_sentences

        return [sentence.sample for sentence in group_sentences()]
    text = resources.files("snmf_interp.data").joinpath("concepts.json").read_text(encoding="utf-8")
    return _from_json(text, name)


def _from_file(path: Path, chunk: int | None) -> list[Sample]:
    if not path.is_file():
        known = ", ".join(repr(name) for name in BUNDLED)
        raise FileNotFoundError(
            f"texts {str(path)!r}: there is no such file, and no bundled corpus of that name ({known})"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error
    kind = path.suffix.lower()
    if chunk is not None and kind in (".jsonl", ".ndjson", ".csv", ".tsv", ".json"):
        raise ValueError(f"chunk cuts plain text; {path} is {kind}, whose samples are already apart")
    if kind in (".jsonl", ".ndjson"):
        return _from_jsonl(text, path)
    if kind in (".csv", ".tsv"):
        return _from_csv(text, path, "\t" if kind == ".tsv" else ",")
    if kind == ".json":
        return _from_json(text, str(path))
    if chunk is not None:
        words = list(re.finditer(r"\S+\s*", text))
        groups = (words[i : i + chunk] for i in range(0, len(words), chunk))
        return [
            Sample(f"{path.name}#{i}", text[g[0].start() : g[-1].end()].strip()) for i, g in enumerate(groups)
        ]
    # Only "\n" ends a line: str.splitlines would also cut at form feeds and Unicode separators inside a text.
    lines = enumerate(text.split("\n"), start=1)
    return [Sample(f"{path.name}:{n}", line.strip()) for n, line in lines if line.strip()]


def _from_jsonl(text: str, path: Path) -> list[Sample]:
    samples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); wanted {_WANTED}") from error
        samples.append(_sample(item, f"{path}, line {number}", f"{path.name}:{number}"))
    return samples


def _from_csv(text: str, path: Path, delimiter: str) -> list[Sample]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = rows.fieldnames or []
    if not {"text", "prompt"} & set(names):
        got = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"{path}, line 1: wanted a header with a column 'text' (or 'prompt'), got {got}")
    samples = []
    try:
        for row in rows:
            if None in row:
                raise ValueError(
                    f"{path}, line {rows.line_num}: more cells than columns; "
                    f"quote texts that hold {delimiter!r}"
                )
            samples.append(_sample(row, f"{path}, line {rows.line_num}", f"{path.name}:{rows.line_num}"))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    return samples


def _from_json(text: str, where: str) -> list[Sample]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from error
    if isinstance(content, dict):
        return _from_labelled(content, where)
    if isinstance(content, list):
        return [
            _sample(item, f"{where}, item {i}", f"{Path(where).name}#{i}") for i, item in enumerate(content)
        ]
    raise ValueError(f"{where}: wanted {{label: [texts]}} or a list, got {type(content).__name__}")


def _from_labelled(content: Mapping[str, Any], where: str) -> list[Sample]:
    samples = []
    for label, texts in content.items():
        if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
            raise ValueError(f"{where}, label {label!r}: wanted a list of texts, got {_shown(texts)}")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}, label {label!r}, item {i}: wanted a text, got {_shown(text)}")
            samples.append(Sample(f"{label}/{i}", text, str(label)))
    return samples


def _sample(item: Any, where: str, id: str) -> Sample:
    if isinstance(item, Sample):
        return item
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: wanted {_WANTED}, got {_shown(item)}")
    text = item.get("text", item.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(map(repr, item)) or "no keys"
        got = f"an object with {keys}" if text is None else f"{_shown(text)} as its text"
        raise ValueError(f"{where}: wanted {_WANTED}, got {got}")
    label = item.get("label")
    return Sample(str(item.get("id", id)), text, None if label in (None, "") else str(label))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'…' if len(text) > 40 else ''}"
