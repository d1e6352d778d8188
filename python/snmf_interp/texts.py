"""Reading texts: plain text, JSONL, CSV, JSON, Python lists and dictionaries, and the bundled corpus."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import numbers
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Each is a corpus in snmf_interp.data; see _bundled.
BUNDLED = ("concepts", "word-groups")
_WANTED = "a string, or an object with 'text' (or 'prompt') and optionally 'label'"
_COLUMNS = ("text", "prompt", "label", "id")
# What str makes of a missing value: of a float and of those of pandas.
_MISSING = ("", "nan", "NaN", "<NA>", "NaT")
# By their first bytes: what is unpacked (patterns), and what is not read and how it can be.
_COMPRESSED = (".gz", ".bz2", ".xz")
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\x1f\x8b": gzip.decompress,
    rb"BZh[1-9]1AY&SY": bz2.decompress,
    rb"\xfd7zXZ\x00": lzma.decompress,
}
_TABLE = "write it as JSON lines: `pandas.{}(…).to_json('texts.jsonl', orient='records', lines=True)`"
_ARROW = "write it as JSON lines: `datasets.Dataset.from_file(…).to_json('texts.jsonl')`"
_UNREAD = {
    b"PAR1": ("a Parquet file", _TABLE.format("read_parquet")),
    b"ARROW1\0": ("an Arrow file", _TABLE.format("read_feather")),
    b"\xff\xff\xff\xff": ("an Arrow stream", _ARROW),
    b"PK\3\4": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "unpack it first: `unzstd`"),
    b"SQLite format 3\0": ("an SQLite database", "export the table as CSV"),
    b"%PDF-": ("a PDF", "extract its text first: `pdftotext`"),
}
# Bytes that are looked through for zeros, which no text has.
_SNIFFED = 8192


@dataclass(frozen=True)
class Sample:
    """One text. ``id`` names its origin (``weekdays/3``, ``notes.txt:12``), ``label`` its concept."""

    id: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class _Read:
    """A sample as it was read, with the place where it stood; its text may be empty."""

    place: str
    sample: Sample
    # Whether half of a surrogate pair was replaced in its text.
    mended: bool = False


def read_texts(
    source: str | Path | Mapping[str, Iterable[str]] | Iterable[str | Sample | Mapping[str, Any]],
    *,
    chunk: int | None = None,
) -> list[Sample]:
    """Read samples.

    Labels lose the spaces around them; one that is empty, null or NaN is none. Empty texts are left out. Half of a
    surrogate pair, which no tokenizer takes, becomes U+FFFD. An id that repeats gets a number. All but the first is
    counted in the log.

    Args:
        source: ``"concepts"`` or ``"word-groups"`` (the bundled corpora), a file, ``{label: [texts]}``, columns
            ``{"text": [...], "label": [...]}``, or a list of strings, objects or samples. ``.jsonl``/``.ndjson``,
            ``.csv``/``.tsv`` and ``.json`` files hold ``text`` (or ``prompt``) and optionally ``label`` and ``id``; a
            ``.json`` file may hold anything that ``source`` may be, or one object a line. Any other file is plain
            text, one sample a line, blank lines skipped. All may be compressed by gzip, bzip2 or xz.
        chunk: read a plain-text file as one text and cut it into pieces of this many words.

    Returns:
        The samples in their order; never empty, and no id twice.

    Raises:
        FileNotFoundError: no such file (and no bundled corpus of that name).
        ValueError: what was read is not as above; the message names file, line, what was wanted and what
            came.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: wanted a number of words, at least 1, got {chunk}")
    if isinstance(source, str) and source in BUNDLED:
        return _bundled(source)
    if isinstance(source, str | Path):
        read, where = _from_file(Path(source).expanduser(), chunk), str(source)
    else:
        read, where = _given(source)
    kept = [one for one in read if one.sample.text.strip()]
    if not kept:
        raise ValueError(f"{where} holds no text{', only empty ones' if read else ''}")
    if len(kept) < len(read):
        first = next(one.place for one in read if not one.sample.text.strip())
        logger.warning("%s: %d empty texts left out, the first at %s", where, len(read) - len(kept), first)
    return _finished(kept, where)


def as_samples(
    items: Mapping[str, Iterable[str]] | Iterable[str | Sample | Mapping[str, Any]],
) -> list[Sample]:
    """What :func:`read_texts` makes of such objects, but one sample for each of them: empty texts stay.

    Raises:
        ValueError: a single text or a path was given, or what :func:`read_texts` refuses.
    """
    if isinstance(items, str | bytes | Path):
        raise ValueError(
            f"samples: wanted a list of texts, got {_shown(items)}; give [text], or read_texts(path) for a file"
        )
    return _finished(*_given(items))


def digest(samples: Iterable[Sample]) -> str:
    """A short hash of ids, texts and labels."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(repr((sample.id, sample.text, sample.label)).encode())
    return total.hexdigest()[:16]


def label_name(value: Any) -> str | None:
    """A label as it is kept: without spaces around it, single ones inside; None for what stands for no label.

    Raises:
        ValueError: it is neither a string nor a number.
    """
    if value is None or str(value) in _MISSING:
        return None
    if not isinstance(value, str | numbers.Number):
        raise ValueError(f"wanted a string or a number as label, got {_shown(value)}")
    return " ".join(whole_text(str(value)).split()) or None


def whole_text(text: str) -> str:
    """``text`` as any tokenizer takes it: surrogates that form a pair are joined, others become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finished(read: Sequence[_Read], where: str) -> list[Sample]:
    """The samples, none with the id of another; what was changed is said."""
    if mended := [one.place for one in read if one.mended]:
        logger.warning(
            "%s: halves of surrogate pairs replaced by U+FFFD in %d texts, the first at %s",
            where, len(mended), mended[0],
        )  # fmt: skip
    samples = [one.sample for one in read]
    taken = {sample.id for sample in samples}
    if len(taken) == len(samples):
        return samples
    seen: set[str] = set()
    renamed: list[str] = []
    for i, sample in enumerate(samples):
        if sample.id in seen:
            fresh = (f"{sample.id}#{number}" for number in itertools.count(2))
            samples[i] = replace(sample, id=next(name for name in fresh if name not in taken))
            renamed.append(samples[i].id)
            taken.add(samples[i].id)
        seen.add(samples[i].id)
    logger.warning("%s: %d ids occur before; they are numbered, such as %r", where, len(renamed), renamed[0])
    return samples


def _bundled(name: str) -> list[Sample]:
    if name == "word-groups":
        from .word_groups import group_sentences

        return [sentence.sample for sentence in group_sentences()]
    text = resources.files("snmf_interp.data").joinpath("concepts.json").read_text(encoding="utf-8")
    return _finished(_from_mapping(json.loads(text), name), name)


def _from_file(path: Path, chunk: int | None) -> list[_Read]:
    text = _decoded(path)
    # rows.jsonl.gz holds what rows.jsonl does.
    kind = Path(path.stem if path.suffix.lower() in _COMPRESSED else path.name).suffix.lower()
    if chunk is not None and kind in (".jsonl", ".ndjson", ".csv", ".tsv", ".json"):
        raise ValueError(f"chunk cuts plain text; {path} is {kind}, whose samples are already apart")
    if kind in (".csv", ".tsv"):
        return _from_csv(text, path, "\t" if kind == ".tsv" else ",")
    if kind in (".json", ".jsonl", ".ndjson"):
        return _from_json(text, path, lines=kind != ".json")
    if chunk is not None:
        words = list(re.finditer(r"\S+\s*", text))
        groups = (words[i : i + chunk] for i in range(0, len(words), chunk))
        return [
            _Read(f"piece {i}", Sample(f"{path.name}#{i}", text[g[0].start() : g[-1].end()].strip()))
            for i, g in enumerate(groups)
        ]
    # Only "\n" ends a line: str.splitlines would also cut at form feeds and Unicode separators inside a text.
    lines = enumerate(text.split("\n"), start=1)
    return [_Read(f"line {n}", Sample(f"{path.name}:{n}", line.strip())) for n, line in lines if line.strip()]


def _decoded(path: Path) -> str:
    """The text of a file, unpacked, its line ends "\\n"."""
    if path.is_dir():
        saved = any(
            (path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")
        )
        raise ValueError(
            f"{path} is a folder{' of datasets.save_to_disk' if saved else ''}, which is not read; wanted a file"
            + (": `datasets.load_from_disk(…).to_json('texts.jsonl')` writes one" if saved else "")
        )
    if not (path.is_file() or path.is_fifo()):
        known = ", ".join(repr(name) for name in BUNDLED)
        raise FileNotFoundError(
            f"texts {str(path)!r}: there is no such file, and no bundled corpus of that name ({known})"
        )
    data = path.read_bytes()
    for magic, unpack in _UNPACK.items():
        if re.match(magic, data):
            try:
                data = unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"{path} cannot be unpacked: it is damaged ({error})") from error
            break
    for magic, (what, remedy) in _UNREAD.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is {what}, which is not read; {remedy}")
    if b"\0" in data[:_SNIFFED]:
        raise ValueError(
            f"{path} is no UTF-8 text (it holds zero bytes); wanted plain text, JSON lines, CSV or JSON, in UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_json(text: str, path: Path, *, lines: bool) -> list[_Read]:
    """Either kind of file under either name: one document, or a value a line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if lines or error.msg == "Extra data":
            return _from_lines(text, path)
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from error
    if isinstance(content, list):
        return _from_items(content, f"{path}, ", lambda i: f"{path.name}#{i}")
    if isinstance(content, dict) and (not lines or all(isinstance(v, list | dict) for v in content.values())):
        return _from_mapping(content, str(path), f"{path.name}#")
    if lines:
        return _from_lines(text, path)
    raise ValueError(f"{path}: wanted {{label: [texts]}} or a list, got {type(content).__name__}")


def _from_lines(text: str, path: Path) -> list[_Read]:
    read = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); wanted {_WANTED}") from error
        read.append(_sample(item, f"{path}, ", f"line {number}", f"{path.name}:{number}"))
    return read


def _from_csv(text: str, path: Path, delimiter: str) -> list[_Read]:
    read: list[_Read] = []
    with _long_cells(len(text)):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            begin = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                last = rows.line_num
                place = f"line {last}" if last == begin else f"lines {begin} to {last}"
                raise ValueError(
                    f"{path}, {place}: {error}; a cell with quotes is quoted, and quotes in it are doubled"
                ) from error
            if names is None:
                names = [name.strip() for name in row or []]
                if not {"text", "prompt"} & set(names):
                    got = ", ".join(map(repr, names)) or "nothing"
                    raise ValueError(
                        f"{path}, line 1: wanted a header with a column 'text' (or 'prompt'), got {got}"
                    )
                continue
            if row is None:
                return read
            if len(row) > len(names):
                raise ValueError(
                    f"{path}, line {begin}: more cells than columns; quote texts that hold {delimiter!r}"
                )
            if row:
                item = dict.fromkeys(names) | dict(zip(names, row, strict=False))
                read.append(_sample(item, f"{path}, ", f"line {begin}", f"{path.name}:{rows.line_num}"))


@contextmanager
def _long_cells(most: int) -> Iterator[None]:
    """Let the csv module read cells of any length: its limit is one for the whole process."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, most))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _given(source: Any) -> tuple[list[_Read], str]:
    """Samples of an object in memory, and what to call it."""
    if isinstance(source, Mapping):
        return _from_mapping(source, "the dictionary"), "the dictionary"
    if hasattr(source, "columns"):
        raise ValueError(
            f"wanted rows of texts, got a {type(source).__name__}, which would give its columns; give "
            "frame.to_dict('records')"
        )
    if not isinstance(source, Iterable):
        raise ValueError(f"wanted a list of texts, a dictionary or a file, got {_shown(source)}")
    return _from_items(source, "", str), "the list"


def _from_items(items: Iterable[Any], where: str, name: Callable[[int], str]) -> list[_Read]:
    return [_sample(item, where, f"item {i}", name(i)) for i, item in enumerate(items)]


def _from_mapping(content: Mapping[Any, Any], where: str, prefix: str = "") -> list[_Read]:
    """Of ``{label: [texts]}``, of columns, or of one object; rows without a label have ids of prefix and number."""
    if isinstance(content.get("text", content.get("prompt")), str):
        return [_sample(content, f"{where}: ", "its text", f"{prefix}0")]
    # Generators can be read once.
    content = {
        name: list(values)
        if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
        else values
        for name, values in content.items()
    }
    columns = _columns(content, where)
    if columns is not None:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return _from_items(rows, f"{where}, ", lambda i: f"{prefix}{i}")
    read = []
    for label, texts in content.items():
        if not isinstance(texts, list):
            raise ValueError(f"{where}, label {label!r}: wanted a list of texts, got {_shown(texts)}")
        for i, text in enumerate(texts):
            place = f"label {label!r}, item {i}"
            if not (isinstance(text, str) or text is None or str(text) in _MISSING):
                raise ValueError(f"{where}, {place}: wanted a text, got {_shown(text)}")
            name = label_name(label)
            read.append(
                _sample({"text": text, "label": label}, f"{where}, ", place, f"{name or 'unlabelled'}/{i}")
            )
    return read


def _columns(content: Mapping[Any, Any], where: str) -> dict[str, list[Any]] | None:
    """The columns that a dictionary holds, by name; None where its names are labels."""
    if not {"text", "prompt"} & set(content):
        return None
    # pandas writes a column as {row: value}.
    lists = {
        name: list(values.values()) if isinstance(values, Mapping) else values
        for name, values in content.items()
        if isinstance(values, list | Mapping)
    }
    lengths = {name: len(values) for name, values in lists.items()}
    known = {name: lengths[name] for name in _COLUMNS if name in lengths}
    if len(set(lengths.values())) > 1 and not {"label", "id"} & set(known):
        return None
    if len(set(known.values())) > 1:
        counts = ", ".join(f"{count} of {name!r}" for name, count in known.items())
        raise ValueError(f"{where}: wanted columns of one length, got {counts}")
    return {name: lists[name] for name in known}


def _sample(item: Any, where: str, place: str, id: str) -> _Read:
    if isinstance(item, Sample):
        item = {"text": item.text, "label": item.label, "id": item.id}
    elif isinstance(item, str) or item is None or (not isinstance(item, Mapping) and str(item) in _MISSING):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}{place}: wanted {_WANTED}, got {_shown(item)}")
    if "text" not in item and "prompt" not in item:
        keys = ", ".join(map(repr, item)) or "no keys"
        raise ValueError(f"{where}{place}: wanted {_WANTED}, got an object with {keys}")
    given = [item[name] for name in ("text", "prompt") if name in item]
    text = next((one for one in given if isinstance(one, str) or not _is_missing(one)), "")
    if not isinstance(text, str):
        raise ValueError(f"{where}{place}: wanted {_WANTED}, got {_shown(text)} as its text")
    try:
        label = label_name(item.get("label"))
    except ValueError as error:
        raise ValueError(f"{where}{place}: {error}") from error
    whole, own = whole_text(text), item.get("id")
    name = None if _is_missing(own) else whole_text(str(own)).strip()
    return _Read(place, Sample(name or id, whole, label), whole != text)


def _is_missing(value: Any) -> bool:
    return value is None or str(value) in _MISSING


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'…' if len(text) > 40 else ''}"
