"""A worker process of the merge: reads tasks from stdin, merges rows, proves them, answers.

It imports numpy and no torch, so that two of them take less memory than one layer of a model.
"""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from contextlib import ExitStack

import numpy as np

from job.merge import mxfp4
from job.merge.checkpoint import ITEM_BYTES, MXFP4, as_matrices
from job.merge.numbers import (
    STORED,
    Array,
    aligned,
    factors,
    narrow,
    opened,
    read_into,
    widen,
    write_from,
)
from job.merge.proof import Proof, ProofError
from job.merge.task import BLOCK_ELEMENTS, Task


class Merger:
    """Writes one slice of a tensor: round(source + s·B·A), or the source's own bytes."""

    def __init__(self, task: Task, matrix: int, space: Array, files: ExitStack) -> None:
        output, source, delta = task.output, task.output.source, task.output.delta
        self._output, self._from, self._target_start = output, source.slots[0], task.offset
        self._target = opened(files, task.path, "r+b")
        self._source = opened(files, self._from.file)
        _, rows, self._columns = as_matrices(output.shape)
        self._first = matrix * rows
        self._wide, self._change = space[:2]
        self._expert = mxfp4.read_expert(source, matrix) if source.dtype == MXFP4 else None
        if delta is not None:
            assert task.a is not None
            assert task.b is not None
            left, right = factors(delta, task.a, task.b, delta.first_expert + matrix)
            self._left, self._right = left[delta.first_row :], right
        if self._expert is None:
            dtype: type = np.uint8 if output.copied else STORED[source.dtype]
            width = self._columns * ITEM_BYTES[source.dtype] // np.dtype(dtype).itemsize
            self._stored = aligned((len(self._wide), width), dtype)

    def write(self, low: int, high: int) -> None:
        """Write rows ``low`` to ``high``, no more than fit ``space``."""
        output, wide, change = self._output, self._wide[: high - low], self._change[: high - low]
        if output.copied:
            rows = self._read(low, high)
        else:
            if self._expert is not None:
                widen(self._expert[low:high], "BF16", wide)
            else:
                widen(self._read(low, high), self._from.dtype, wide)
            if output.delta is not None:
                np.matmul(self._left[low:high], self._right, out=change)
                np.add(wide, change, out=wide)
            rows = narrow(wide, output.dtype)
        place = (self._first + low) * self._columns * ITEM_BYTES[output.dtype]
        write_from(self._target, rows, self._target_start + place)

    def _read(self, low: int, high: int) -> Array:
        place = (self._first + low) * self._columns * ITEM_BYTES[self._from.dtype]
        return read_into(self._source, self._stored[: high - low], self._from.offset + place)


def do(task: Task) -> dict[str, float]:
    """Merge a task's rows, if they are to be, and prove every block as soon as it is written.

    Soon, so that base and result are still in this core's cache when the proof reads their files.

    Returns:
        What the proof measured (see :meth:`job.merge.proof.Proof.finish`).

    Raises:
        ProofError: a weight is not what base and adapter make it.
    """
    figures: Counter[str] = Counter()
    columns = as_matrices(task.output.shape)[2]
    step = -(-BLOCK_ELEMENTS // max(columns, 1))
    space = aligned((4, step, columns), np.float32)
    for matrix, first, last in task.spans:
        with ExitStack() as files:
            merger = Merger(task, matrix, space, files) if task.write else None
            proof = Proof(task, matrix, space, files)
            for low in range(first, last, step):
                high = min(last, low + step)
                if merger:
                    merger.write(low, high)
                proof.check(low, high)
            figures.update(proof.finish(first, last))
    return dict(figures)


def answer(task: Task) -> dict[str, float] | Exception:
    """Do one task, or return what a person can mend; a bug is raised."""
    try:
        return do(task)
    except (ProofError, EOFError, OSError) as error:
        return error


def main() -> None:
    """Answer tasks until stdin ends, which it does when the parent does."""
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(task), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
