from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snmf_interp import Sample, read_texts
from snmf_interp.texts import digest


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode())
    return path


def test_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path, "notes.txt", "\ufefffirst line\n\n   \nthird\x0cpage\r\n")
    assert read_texts(path) == [Sample("notes.txt:1", "first line"), Sample("notes.txt:4", "third\x0cpage")]
    assert read_texts(str(path)) == read_texts(path)


def test_chunks(tmp_path: Path) -> None:
    path = write(tmp_path, "book.md", "one two\n\nthree  four five")
    assert [sample.text for sample in read_texts(path, chunk=2)] == ["one two", "three  four", "five"]


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "x"},
        {"prompt": "b", "id": 7, "label": ""},
        "c",
        {"text": "d", "label": 3},
    ]
    path = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_texts(path) == [
        Sample("rows.jsonl:1", "a", "x"),
        Sample("7", "b"),
        Sample("rows.jsonl:3", "c"),
        Sample("rows.jsonl:4", "d", "3"),
    ]


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_csv(suffix: str, comma: str, tmp_path: Path) -> None:
    content = f'label{comma}text\nx{comma}"a{comma} ""b""\nsecond line"\n{comma}c\n'
    path = write(tmp_path, f"rows.{suffix}", content)
    assert [(s.text, s.label) for s in read_texts(path)] == [(f'a{comma} "b"\nsecond line', "x"), ("c", None)]


@pytest.mark.parametrize("content", [{"x": ["a", "b"], "y": ["c"]}, [{"text": "a", "label": "x"}, "b"]])
def test_json(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.json", json.dumps(content))
    samples = read_texts(path)
    assert (samples[0].text, samples[0].label) == ("a", "x")
    # The same object in memory reads the same.
    assert [(s.text, s.label) for s in read_texts(content)] == [(s.text, s.label) for s in samples]


def test_bundled_corpus() -> None:
    samples = read_texts("concepts")
    labels = {sample.label for sample in samples}
    assert len(labels) >= 60
    assert all(sum(sample.label == label for sample in samples) >= 10 for label in labels)
    assert len({sample.id for sample in samples}) == len({sample.text for sample in samples}) == len(samples)


def test_digest_sees_everything() -> None:
    base = [Sample("1", "a", "x"), Sample("2", "b")]
    others = [
        [Sample("1", "a", "x"), Sample("2", "c")],
        [Sample("1", "a"), Sample("2", "b")],
        [Sample("0", "a", "x"), Sample("2", "b")],
        base[::-1],
        base[:1],
    ]
    assert len({digest(samples) for samples in [base, *others]}) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            r"a\.jsonl, line 2: not JSON .*wanted a string, or an object",
        ),
        (
            "a.jsonl",
            '{"label": "x"}',
            r"a\.jsonl, line 1: wanted .*'text' \(or 'prompt'\).*got an object with 'label'",
        ),
        ("a.jsonl", '{"text": 5}', r"line 1: .*got int 5 as its text"),
        ("a.jsonl", '\n{"text": "  "}', r"a\.jsonl holds no text, only empty ones"),
        ("a.jsonl", "[1]", r"a\.jsonl, item 0: .*got int 1"),
        ("a.jsonl", "[1]\n[2]", r"line 1: .*got list \[1\]"),
        (
            "a.jsonl",
            '{"text": "a", "label": ["x"]}',
            r"line 1: wanted a string or a number as label, got list",
        ),
        ("a.csv", "label,body\nx,a\n", r"a\.csv, line 1: wanted a header .*got 'label', 'body'"),
        ("a.csv", "text\na\nb,c\n", r"a\.csv, line 3: more cells than columns"),
        ("a.csv", "text,label\n,x\n", r"a\.csv holds no text, only empty ones"),
        ("a.csv", 'text\nb\n"a\n', r"a\.csv, line 3: unexpected end of data"),
        ("a.csv", 'text,label\n"he said "hi" to me",a\n', r"a\.csv, line 2: .*quotes in it are doubled"),
        ("a.csv", 'text\n"one\ntwo"\n"he "is"\n', r"a\.csv, line 4: "),
        ("a.csv", 'text\n"he\nis"\n"one\nhe "is"\n', r"a\.csv, lines 4 to 5: "),
        ("a.json", '{"x": ["a"],\n "y": }', r"a\.json, line 2, column 7: not JSON"),
        ("a.json", '{"x": "a"}', r"label 'x': wanted a list of texts, got str 'a'"),
        ("a.json", '{"x": ["a", 4]}', r"label 'x', item 1: wanted a text, got int 4"),
        ("a.json", "[1]", r"item 0: wanted"),
        (
            "a.json",
            '{"text": ["a", "b"], "label": ["x"]}',
            r"columns of one length, got 2 of 'text', 1 of 'label'",
        ),
        ("a.json", '{"text": "a"}\n{"text": ', r"a\.json, line 2: not JSON"),
        ("a.json", "3", r"wanted \{label: \[texts\]\} or a list, got int"),
        ("a.txt", " \n\n", r"a\.txt holds no text"),
        ("a.jsonl", "", "holds no text"),
    ],
)
def test_bad_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts(write(tmp_path, name, content))


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.txt': there is no such file.*'concepts'"):
        read_texts("nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text \(byte 3\)"):
        read_texts(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="chunk: wanted"):
        read_texts("concepts", chunk=0)
    with pytest.raises(ValueError, match="chunk cuts plain text"):
        read_texts(write(tmp_path, "a.csv", "text\na\n"), chunk=3)
    with pytest.raises(ValueError, match=r"item 1: wanted .* got int 3"):
        read_texts(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="the list holds no text"):
        read_texts([])
    with pytest.raises(ValueError, match="wanted a list of texts, a dictionary or a file, got int 3"):
        read_texts(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"text": ["a", "b"], "label": ["x", None]}, [("a", "x"), ("b", None)]),
        ({"label": ["x", "y"], "prompt": ["a", "b"], "length": [1, 1]}, [("a", "x"), ("b", "y")]),
        ({"text": ["a", "b"]}, [("a", None), ("b", None)]),
        ({"text": ["a", "b"], "source": ["s", "t"]}, [("a", None), ("b", None)]),
        # As pandas writes a frame by default.
        ({"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}, [("a", "x"), ("b", "y")]),
        ({"text": "a", "label": "x"}, [("a", "x")]),
        # Names of different lengths are labels, also where one of them is "text".
        ({"text": ["a", "b"], "speech": ["c"]}, [("a", "text"), ("b", "text"), ("c", "speech")]),
    ],
)
def test_columns(columns: Any, wanted: list[tuple[str, str | None]], tmp_path: Path) -> None:
    """Columns are no labels: a concept "label" would have the labels for its texts."""
    for source in (columns, write(tmp_path, "rows.json", json.dumps(columns))):
        assert [(s.text, s.label) for s in read_texts(source)] == wanted


def test_a_data_frame_is_no_list_of_its_columns() -> None:
    class DataFrame:
        columns = ("text", "label")

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    with pytest.raises(ValueError, match=r"a DataFrame, .*frame\.to_dict\('records'\)"):
        read_texts(DataFrame())  # type: ignore[arg-type]


class Missing:
    """As pandas.NA: comparing it says nothing."""

    def __repr__(self) -> str:
        return "<NA>"

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("missing", [math.nan, np.float32("nan"), None, "", "  ", "nan", "NaN", Missing()])
def test_missing_labels_and_ids(missing: Any) -> None:
    samples = read_texts([{"text": "a", "label": missing, "id": missing}, Sample(missing, "b", missing)])
    assert samples == [Sample("0", "a"), Sample("1", "b")]
    assert read_texts({missing: ["a"]} if missing.__hash__ else {None: ["a"]})[0].label is None  # type: ignore[dict-item]


def test_missing_labels_in_files(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": NaN, "id": null}\n{"text": "b", "label": null, "id": NaN}\n'
    assert read_texts(write(tmp_path, "r.jsonl", rows)) == [
        Sample("r.jsonl:1", "a"),
        Sample("r.jsonl:2", "b"),
    ]
    path = write(tmp_path, "r.csv", "text,label\na,nan\nb,\nc,none\nd\n")
    assert [sample.label for sample in read_texts(path)] == [None, None, "none", None]


def test_labels_lose_their_spaces(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": " active  verbs\n"}, {"text": "b", "label": "active verbs"}]
    wanted = ["active verbs"] * 2
    assert [s.label for s in read_texts(rows)] == wanted
    assert [s.label for s in read_texts({" active verbs": ["a"], "active verbs\u00a0": ["b"]})] == wanted
    path = write(tmp_path, "r.csv", "text, label\na, active verbs\nb,active verbs \n")
    assert [s.label for s in read_texts(path)] == wanted


def test_empty_texts_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "r.csv": "text,label\na,x\n,y\n  ,y\nb,x\n",
        "r.jsonl": '{"text": "a", "label": "x"}\n{"text": ""}\n{"text": null}\n{"text": "b", "label": "x"}\n',
        "r.json": '{"x": ["a", "", null, "b"]}',
    }
    places = {"r.csv": "line 3", "r.jsonl": "line 2", "r.json": "label 'x', item 1"}
    for name, content in files.items():
        caplog.clear()
        assert [(s.text, s.label) for s in read_texts(write(tmp_path, name, content))] == [
            ("a", "x"),
            ("b", "x"),
        ]
        assert f"2 empty texts left out, the first at {places[name]}" in caplog.text
    assert [s.text for s in read_texts(["a", None, math.nan, "b"])] == ["a", "b"]  # type: ignore[list-item]
    assert [s.text for s in read_texts([{"text": None, "prompt": "a"}])] == ["a"]


def test_ids_that_repeat_are_numbered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "id,text\ndoc,a\ndoc,b\ndoc#2,c\ndoc,d\n,e\n"
    path = write(tmp_path, "r.csv", content)
    assert [s.id for s in read_texts(path)] == ["doc", "doc#3", "doc#2", "doc#4", "r.csv:6"]
    assert "2 ids occur before" in caplog.text
    samples = read_texts([Sample("doc", "a"), Sample("doc", "b")])
    assert [sample.id for sample in samples] == ["doc", "doc#2"]
    assert read_texts(samples) == samples


def test_halves_of_surrogate_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = r'{"text": "a\ud83d b", "label": "\ude02x"}' + "\n" + r'{"text": "\ud83d\ude02"}'
    samples = read_texts(write(tmp_path, "r.jsonl", content))
    assert [(s.text, s.label) for s in samples] == [("a\ufffd b", "\ufffdx"), ("😂", None)]
    assert "replaced by U+FFFD in 1 texts, the first at line 1" in caplog.text


def test_long_cells(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "a" * (before + 1)
    assert read_texts(write(tmp_path, "r.csv", f"text\n{text}\n"))[0].text == text
    assert csv.field_size_limit() == before


def test_lines_and_documents_under_either_name(tmp_path: Path) -> None:
    lines = '{"text": "a", "label": "x"}\n{"text": "b"}\n'
    array = json.dumps([{"text": "a", "label": "x"}, {"text": "b"}], indent=1)
    wanted = [("a", "x"), ("b", None)]
    for name in ("r.json", "r.jsonl", "r.ndjson"):
        for content in (lines, array, array.replace("\n", "")):
            assert [(s.text, s.label) for s in read_texts(write(tmp_path, name, content))] == wanted
        labelled = json.dumps({"x": ["a"], "y": ["b"]}, indent=1)
        assert [s.label for s in read_texts(write(tmp_path, name, labelled))] == ["x", "y"]
        # One line, which is a document as well.
        assert read_texts(write(tmp_path, name, lines.split("\n")[0]))[0].label == "x"


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"r.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "a", "label": "x"}\n'))
    assert read_texts(path) == [Sample(f"r.jsonl{suffix}:1", "a", "x")]
    path.write_bytes(pack(b'{"text": "a"}\n')[:-6])
    with pytest.raises(ValueError, match="cannot be unpacked: it is damaged"):
        read_texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04\xe0", r"is a Parquet file, which is not read; write it as JSON lines: `pandas"),
        (b"ARROW1\0\0", "is an Arrow file"),
        (b"\xff\xff\xff\xff\x70", r"is an Arrow stream, .*from_file"),
        (b"PK\x03\x04", "is a zip archive or an Excel workbook"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed by Zstandard"),
        ("text\n".encode("utf-16-le"), "no UTF-8 text .it holds zero bytes.; wanted plain text, JSON lines"),
        (gzip.compress(b"a.txt" + bytes(100), mtime=0), "no UTF-8 text .it holds zero bytes."),
    ],
)
def test_formats_that_are_not_read_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder, which is not read; wanted a file$"):
        read_texts(tmp_path)
    write(tmp_path, "dataset_info.json", "{}")
    with pytest.raises(ValueError, match=r"a folder of datasets\.save_to_disk.*load_from_disk"):
        read_texts(tmp_path)
