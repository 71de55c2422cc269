"""Rows out of files: jsonl, json, parquet and csv, plain, gzip or zstd, one file or a folder.

Everything streams: memory does not grow with a file. A row that can't be read comes out with its
number and its fault, in place of its value; what is wrong with a whole file ends the reading.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from job.artifacts import Source
from job.errors import ExitCode, JobError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
         ".csv": "csv"}  # fmt: skip
PACKED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# What the Hub and `datasets` put beside data.
ABOUT_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
CHUNK_BYTES = 1 << 20
LONGEST_ROW_BYTES = 1 << 28
TRAIN = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)")
HELD_OUT = re.compile(r"(^|[/_.-])(held[_-]?out|test|valid(ation)?|eval|dev)([/_.-]|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its place (``file:number``, from 1) and its value, or what is wrong."""

    place: str
    value: Any = None
    fault: str | None = None


class RowFault(Exception):  # noqa: N818 - a fault of the data, counted and reported; no error of ours
    """What is wrong with one row, in words that many rows can share."""


def data_files(source: Source, *, held_out: bool = False) -> list[str]:
    """Return the names of the files in ``source`` to read, sorted.

    Where names tell splits apart, training takes `train` and measuring takes `test` or the like.

    Raises:
        JobError: 66 if there is no data file.
    """
    names = sorted(name for name in source.files if _is_data(name))
    if not names:
        raise JobError(
            ExitCode.NOT_FOUND,
            source.uri,
            "has no data file",
            f"give one of {', '.join(KINDS)}, each plain, .gz or .zst",
        )
    train = [name for name in names if TRAIN.search(name)]
    other = [name for name in names if HELD_OUT.search(name) and name not in train]
    if held_out:
        return other or names
    return train or [name for name in names if name not in other] or names


def _is_data(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return kind_of(name) is not None and not hidden and path.name not in ABOUT_DATA


def kind_of(name: str) -> str | None:
    """Return `jsonl`, `json`, `parquet` or `csv`, or None for another file."""
    path = Path(name.lower())
    return KINDS.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of one file; ``name`` is what places are told by.

    Raises:
        JobError: 65 for a file that is broken as a whole, 66 if it is not there.
    """
    reader = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[kind_of(name) or ""]
    try:
        yield from reader(path, name)
    except FileNotFoundError:
        raise JobError(ExitCode.NOT_FOUND, name, "is not there", "see data.source") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        what = f"can't be read: {' '.join(str(error).split())[:200]}"
        raise JobError(ExitCode.DATA, name, what, "fetch or write the file again") from error


def _opened(path: Path, name: str) -> Any:
    """Open a file for reading, unpacked by its name."""
    import pyarrow as pa

    return pa.input_stream(str(path), compression=PACKED.get(Path(name.lower()).suffix))


def _lines(path: Path, name: str) -> Iterator[bytes]:
    """Yield lines with their ends, but for the byte order mark."""
    rest, mark = b"", codecs.BOM_UTF8
    with _opened(path, name) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            *lines, rest = (rest + chunk.removeprefix(mark)).split(b"\n")
            mark = b""
            if len(rest) > LONGEST_ROW_BYTES:
                raise ValueError(f"a line is longer than {LONGEST_ROW_BYTES >> 20} MiB")
            for line in lines:
                yield line + b"\n"
    if rest:
        yield rest


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, name), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield _as_row(place, json.loads(line))
        except UnicodeDecodeError:
            yield Row(place, fault="is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Row(place, fault=_json_fault(error))


def _json_fault(error: Exception) -> str:
    """Return what is wrong without the position, so that like faults are counted together."""
    return f"is no JSON ({getattr(error, 'msg', None) or type(error).__name__})"


def _as_row(place: str, value: Any) -> Row:
    return Row(place, value) if isinstance(value, dict) else Row(place, fault="is no JSON object")


def _json(path: Path, name: str) -> Iterator[Row]:
    """Read one array of objects, or objects one after the other, without holding the file."""
    with _opened(path, name) as stream:
        text = _Text(stream)
        closing = "]" if text.peek() == "[" else ""
        text.skip(len(closing))
        number = 0
        while (following := text.peek()) not in ("", closing):
            if following == ",":
                text.skip(1)
                continue
            number += 1
            yield _as_row(f"{name}:{number}", text.value(f"{name}:{number}"))
        if closing and text.peek() != closing:
            raise ValueError("the array has no end: the file is cut off")


class _Text:
    """A window over a stream of UTF-8 that JSON values are taken from."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._window, self._at, self._ended = "", 0, False

    def _more(self, size: int = CHUNK_BYTES) -> bool:
        if self._ended:
            return False
        chunk = self._stream.read(size)
        self._ended = not chunk
        self._window = self._window[self._at :] + self._decode(chunk, final=self._ended)
        self._at = 0
        return True

    def peek(self) -> str:
        """Return the next character that is not white space, or '' at the end."""
        while True:
            while self._at < len(self._window) and self._window[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        """Pass over characters that were peeked at."""
        self._at += count

    def value(self, place: str) -> Any:
        """Take the value that begins here, reading on (ever larger pieces) until it is whole."""
        size = CHUNK_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._window, self._at)
            except ValueError as error:
                if not self._more(size):
                    raise ValueError(f"{place} {_json_fault(error)}") from None
                size = min(size * 2, LONGEST_ROW_BYTES)
            else:
                self._at = end
                return value


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_ROW_BYTES)
    # A byte that is no UTF-8 becomes a lone surrogate here, and that row is refused when rendered.
    text = (line.decode("utf-8", "surrogateescape") for line in _lines(path, name))
    rows = csv.reader(text, strict=True)
    header = next(rows, None)
    for values in rows:
        if not values:
            continue
        place = f"{name}:{rows.line_num}"
        if header is None or len(values) != len(header):
            yield Row(place, fault="has another number of fields than the header")
        else:
            yield Row(place, dict(zip(header, values, strict=True)))


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _seekable(path, name) as plain, pq.ParquetFile(plain) as file:
            values = (v for batch in file.iter_batches(batch_size=1024) for v in batch.to_pylist())
            for number, value in enumerate(values, 1):
                yield Row(f"{name}:{number}", _without_nulls(value))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _without_nulls(value: Any) -> Any:
    """Drop fields that a row does not have: a column of objects has every row's fields in each."""
    if isinstance(value, dict):
        return {key: _without_nulls(it) for key, it in value.items() if it is not None}
    return [_without_nulls(it) for it in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _seekable(path: Path, name: str) -> Iterator[Path]:
    """Yield a file that can be read from its end, as parquet must be: unpacked aside if packed."""
    if Path(name.lower()).suffix not in PACKED:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
        with _opened(path, name) as stream:
            shutil.copyfileobj(stream, plain, CHUNK_BYTES)
        plain.flush()
        yield Path(plain.name)
