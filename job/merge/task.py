"""What the merge's parent process tells its workers, as lines of JSON, and how it is cut up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from job.merge.checkpoint import ITEM_BYTES, MXFP4, Slot, Tensor, as_matrices
from job.merge.place import Delta
from job.merge.plan import Output

TASK_ELEMENTS = 1 << 23
"""Weights in a task: what was merged is proven while it is still in a cache."""

Span = tuple[int, int, int]
"""Slice of the tensor, first row, and the row after the last."""


@dataclass(frozen=True, slots=True)
class Task:
    """Merge, or only prove, some rows of one tensor in one file."""

    kind: Literal["merge", "prove"]
    output: Output
    path: str
    offset: int
    """Of the whole tensor in the file, in bytes."""
    spans: list[Span]
    a: Slot | None = None
    b: Slot | None = None
    """The factors' places in the adapter's file."""

    def to_line(self) -> bytes:
        """Return the task as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


def from_line(line: bytes) -> Task:
    """Return the task that :meth:`Task.to_line` wrote."""
    raw = json.loads(line)
    output, source = raw["output"], raw["output"]["source"]
    tensor = Tensor(
        source["name"], source["dtype"], tuple(source["shape"]), tuple(map(_slot, source["slots"]))
    )
    delta = Delta(**output["delta"]) if output["delta"] else None
    made = Output(output["name"], output["dtype"], tuple(output["shape"]), tensor, "", delta)
    spans = [(one[0], one[1], one[2]) for one in raw["spans"]]
    a, b = (_slot(raw[side]) if raw[side] else None for side in "ab")
    return Task(raw["kind"], made, raw["path"], raw["offset"], spans, a, b)


def _slot(raw: dict[str, Any]) -> Slot:
    return Slot(raw["file"], raw["dtype"], tuple(raw["shape"]), raw["offset"])


def cut(output: Output) -> Iterator[list[Span]]:
    """Yield the spans of each task for ``output``.

    An MXFP4 expert stays whole: its rows are columns of the blocks.
    """
    matrices, rows, columns = as_matrices(output.shape)
    most = rows if output.source.dtype == MXFP4 else max(1, TASK_ELEMENTS // max(columns, 1))
    spans: list[Span] = []
    elements = 0
    for matrix in range(matrices):
        for low in range(0, rows, most):
            span = (matrix, low, min(rows, low + most))
            size = (span[2] - low) * columns
            if spans and elements + size > TASK_ELEMENTS:
                yield spans
                spans, elements = [], 0
            spans.append(span)
            elements += size
    if spans:
        yield spans


def byte_range(output: Output, span: Span) -> tuple[int, int]:
    """Return where a span begins and ends, in bytes from the tensor's start."""
    _, rows, columns = as_matrices(output.shape)
    row_bytes = columns * ITEM_BYTES[output.dtype]
    matrix, low, high = span
    return (matrix * rows + low) * row_bytes, (matrix * rows + high) * row_bytes
