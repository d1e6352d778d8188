from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        ("a.jsonl", '\n{"text": "  "}', r"line 2: .*got str '  ' as its text"),
        ("a.jsonl", "[1]", r"line 1: .*got list \[1\]"),
        ("a.csv", "label,body\nx,a\n", r"a\.csv, line 1: wanted a header .*got 'label', 'body'"),
        ("a.csv", "text\na\nb,c\n", r"a\.csv, line 3: more cells than columns"),
        ("a.csv", "text,label\n,x\n", r"a\.csv, line 2: wanted"),
        ("a.csv", 'text\n"a\n', r"a\.csv, line \d: "),
        ("a.json", '{"x": ["a"],\n "y": }', r"a\.json, line 2, column 7: not JSON"),
        ("a.json", '{"x": "a"}', r"label 'x': wanted a list of texts, got str 'a'"),
        ("a.json", '{"x": ["a", 4]}', r"label 'x', item 1: wanted a text, got int 4"),
        ("a.json", "[1]", r"item 0: wanted"),
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
