"""Rows out of files of every kind, and what is said about those that can't be read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.artifacts import Source
from job.data.read import data_files, read_rows
from job.errors import ExitCode, JobError

ROWS = [{"prompt": f'Frage {n}, ähm\n"x"', "completion": f"答え {n}"} for n in range(5)]


def zstd(body: bytes) -> bytes:
    return pa.compress(body, codec="zstd", asbytes=True)


def body(kind: str) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if kind == "json":
        return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    if kind == "csv":
        cells = [[f'"{v.replace(chr(34), chr(34) * 2)}"' for v in row.values()] for row in ROWS]
        return "\n".join(["prompt,completion", *map(",".join, cells)]).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, packing: str) -> None:
    """jsonl, json, csv and parquet, plain, gzip and zstd, hold the same rows."""
    path = tmp_path / f"rows.{kind}{packing}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[packing]
    path.write_bytes(pack(body(kind)))
    assert [row.value for row in read_rows(path, path.name)] == ROWS


def test_packed_in_several_members(tmp_path: Path) -> None:
    """Files that were packed in pieces (pigz, pzstd, cat) are read to their end."""
    half = len(body("jsonl")) // 2
    pieces = (body("jsonl")[:half], body("jsonl")[half:])
    for name, pack in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstd)):
        (tmp_path / name).write_bytes(b"".join(map(pack, pieces)))
        assert [row.value for row in read_rows(tmp_path / name, name)] == ROWS


def test_bad_lines_are_told_by_number(tmp_path: Path) -> None:
    """A bad line among good ones is named by its line, and the others are read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"\n\n[1]\n{"text": "\xff"}\n{"text": "c"}'
    )
    found = [(row.place, row.fault) for row in read_rows(path, "rows.jsonl")]
    assert found == [
        ("rows.jsonl:1", None),
        ("rows.jsonl:2", "is no JSON (Expecting ',' delimiter)"),
        ("rows.jsonl:4", "is no JSON object"),
        ("rows.jsonl:5", "is not UTF-8"),
        ("rows.jsonl:6", None),
    ]


def test_csv_rows_with_another_number_of_fields(tmp_path: Path) -> None:
    """A csv row that does not fit its header is named by the line that it ends on."""
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nonly one\nd,e\n')
    rows = list(read_rows(path, "rows.csv"))
    assert [(row.place, row.fault is None) for row in rows] == [
        ("rows.csv:3", True),
        ("rows.csv:4", False),
        ("rows.csv:5", True),
    ]


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}', '[{"a": 1}, {"a": 2}]', '{"a":1}{"a":2}'])
def test_json_is_an_array_or_objects_in_a_row(tmp_path: Path, text: str) -> None:
    """A .json file may hold an array, or lines of objects as many that are named so do."""
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert [row.value for row in read_rows(path, "rows.json")] == [{"a": 1}, {"a": 2}]


def test_large_json_values_cross_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array is read piece by piece, whatever the pieces cut through."""
    monkeypatch.setattr("job.data.read.CHUNK_BYTES", 7)
    path = tmp_path / "rows.json"
    path.write_bytes(body("json"))
    assert [row.value for row in read_rows(path, "rows.json")] == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(body("jsonl") * 50)[:-20]),
        ("cut.jsonl.zst", zstd(body("jsonl") * 50)[:-20]),
        ("cut.parquet", body("parquet")[:-20]),
        ("cut.json", body("json")[:-20]),
        ("no.gz.jsonl.gz", b"plain"),
        ("array.json", b'[{"a": 1}, {"a"'),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that is cut off or not what its name says ends with 65 and the file's name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError) as caught:
        list(read_rows(tmp_path / name, name))
    assert caught.value.code is ExitCode.DATA
    assert name in str(caught.value)


def test_reading_does_not_hold_the_file(tmp_path: Path) -> None:
    """Memory does not grow with the rows."""
    line = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 20_000)
    (tmp_path / "rows.json").write_text("[" + ",".join([line] * 20_000) + "]")
    for name in ("rows.jsonl", "rows.json"):
        tracemalloc.start()
        count = sum(1 for _ in read_rows(tmp_path / name, name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 20_000
        assert peak < 10e6


def files(*names: str) -> Source:
    return Source(folder=Path(), uri="hf://a/b", files=dict.fromkeys(names, ""))


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (("b.jsonl", "a.csv.gz", "README.md"), ["a.csv.gz", "b.jsonl"], None),
        (
            ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
            ["data/train-00000-of-00001.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (("train.jsonl", "held_out.jsonl"), ["train.jsonl"], ["held_out.jsonl"]),
        (("test.jsonl",), ["test.jsonl"], ["test.jsonl"]),
        (("a.parquet", "dataset_infos.json", ".hidden.jsonl"), ["a.parquet"], None),
    ],
)
def test_files_of_a_folder(names: Any, train: list[str], held_out: list[str] | None) -> None:
    """Data files are found, what describes data is passed over, and a test split is not trained on."""
    assert data_files(files(*names)) == train
    assert data_files(files(*names), held_out=True) == (held_out or train)


def test_no_data_file() -> None:
    """A source without data ends with 66 and the kinds that are known."""
    with pytest.raises(JobError, match="has no data file") as caught:
        data_files(files("README.md", "model.safetensors"))
    assert caught.value.code is ExitCode.NOT_FOUND


def test_a_parquet_row_has_only_its_own_fields(tmp_path: Path) -> None:
    """Arrow unites the keys of all rows; an argument that nobody gave is not trained."""
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {"zone": "CET"}}]  # fmt: skip
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"calls": [call]} for call in calls]), path)
    assert [row.value["calls"] for row in read_rows(path, path.name)] == [[it] for it in calls]


def test_json_that_is_nested_without_end_is_a_broken_file(tmp_path: Path) -> None:
    """65, as in jsonl, and no traceback."""
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(JobError) as caught:
        list(read_rows(path, path.name))
    assert caught.value.code == 65
