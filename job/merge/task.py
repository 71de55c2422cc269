"""What the merge's parent process tells its workers, and how the work is cut up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from job.merge.checkpoint import ITEM_BYTES, MXFP4, Slot, as_matrices
from job.merge.plan import Output

TASK_ELEMENTS = 1 << 23
BLOCK_ELEMENTS = 3 << 14
"""A fifth of a megabyte in fp32: a block and its few temporaries stay in a core's L2 cache."""

Span = tuple[int, int, int]
"""Slice of the tensor, first row, and the row after the last."""


@dataclass(frozen=True, slots=True)
class Task:
    """Write (or only prove) some rows of one tensor in one file."""

    write: bool
    output: Output
    path: str
    offset: int
    """Of the whole tensor in the file, in bytes."""
    spans: list[Span]
    a: Slot | None = None
    b: Slot | None = None
    """The factors' places in the adapter's file."""

    def place(self, matrix: int, row: int) -> int:
        """Return where a row of the output lies, in bytes from the tensor's start."""
        _, rows, columns = as_matrices(self.output.shape)
        return (matrix * rows + row) * columns * ITEM_BYTES[self.output.dtype]


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
