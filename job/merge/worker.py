"""A worker process of the merge: reads tasks from stdin, merges rows, proves them, answers.

It imports numpy and no torch, so that two of them take less memory than one layer of a model.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from job.merge import mxfp4, proof
from job.merge.checkpoint import ITEM_BYTES, MXFP4, Slot, Tensor, as_matrices
from job.merge.numbers import (
    BLOCK_ELEMENTS,
    STORED,
    Array,
    Scratch,
    narrow,
    read_floats,
    read_into,
    widen,
    write_from,
)
from job.merge.place import Delta
from job.merge.task import Span, Task, byte_range, from_line

COPY_BYTES = 8 << 20


class Files:
    """Open descriptors, by path."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], int] = {}

    def get(self, path: str, flags: int = os.O_RDONLY) -> int:
        """Return a descriptor of ``path``; it stays open."""
        if (path, flags) not in self._open:
            self._open[path, flags] = os.open(path, flags | os.O_CLOEXEC)
        return self._open[path, flags]

    def close(self) -> None:
        """Close them all: a later task may meet another file under the same name."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


@lru_cache(maxsize=2)
def _factor(slot: Slot) -> Array:
    descriptor = os.open(slot.file, os.O_RDONLY)
    try:
        return read_floats(descriptor, slot.offset, slot.shape, slot.dtype)
    finally:
        os.close(descriptor)


def factors(delta: Delta, a: Slot, b: Slot, expert: int) -> tuple[Array, Array]:
    """Return (left, right) with left @ right = the delta of one expert's whole matrix.

    lora_A is (experts * rank, in), expert by expert; lora_B is (out, rank * experts), rank by
    rank (PEFT's ParamWrapper.get_delta_weight).
    """
    lora_a = _factor(a).reshape(delta.experts, delta.rank, -1)[expert]
    lora_b = _factor(b).reshape(b.shape[0], delta.rank, delta.experts)[:, :, expert]
    scaled = lora_b * np.float32(delta.scaling)
    left, right = (lora_a.T, scaled.T) if delta.flipped else (scaled, lora_a)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


class Rows:
    """The source's rows as fp32, whatever it is stored as."""

    def __init__(self, tensor: Tensor, files: Files, scratch: Scratch) -> None:
        self._tensor, self._files, self._scratch = tensor, files, scratch
        self._expert: tuple[int, Array] | None = None

    def read(self, matrix: int, low: int, high: int) -> Array:
        """Return rows ``low`` to ``high`` of a slice, in a buffer that the next call takes."""
        slot = self._tensor.slots[0]
        if self._tensor.dtype == MXFP4:
            return widen(self._dequantised(matrix)[low:high], "BF16", self._scratch, "rows")
        _, rows, columns = as_matrices(self._tensor.shape)
        stored = self._scratch.get("stored", (high - low, columns), STORED[slot.dtype])
        first = (matrix * rows + low) * columns * ITEM_BYTES[slot.dtype]
        read_into(self._files.get(slot.file), stored, slot.offset + first)
        return widen(stored, slot.dtype, self._scratch, "rows")

    def _dequantised(self, expert: int) -> Array:
        if self._expert is None or self._expert[0] != expert:
            self._expert = None
            blocks, scales = self._tensor.slots
            opened = self._files.get(blocks.file), self._files.get(scales.file)
            self._expert = expert, mxfp4.read_expert(*opened, blocks, scales, expert)
        return self._expert[1]


def merge(task: Task, files: Files, scratch: Scratch) -> None:
    """Write the task's rows: round(source + s·B·A), or the source's own bytes."""
    if task.output.copied:
        for span in task.spans:
            _copy(task, files, span)
        return
    target = files.get(task.path, os.O_RDWR)
    rows_of = Rows(task.output.source, files, scratch)
    delta, dtype = task.output.delta, task.output.dtype
    _, rows, columns = as_matrices(task.output.shape)
    step = max(1, BLOCK_ELEMENTS // columns)
    for matrix, first, last in task.spans:
        if delta is not None:
            assert task.a is not None
            assert task.b is not None
            left, right = factors(delta, task.a, task.b, delta.first_expert + matrix)
        for low in range(first, last, step):
            high = min(last, low + step)
            block = rows_of.read(matrix, low, high)
            if delta is not None:
                change = scratch.get("change", block.shape, np.float32)
                start = delta.first_row
                np.matmul(left[start + low : start + high], right, out=change)
                np.add(block, change, out=block)
            place = (matrix * rows + low) * columns * ITEM_BYTES[dtype]
            write_from(target, narrow(block, dtype, scratch), task.offset + place)


def _copy(task: Task, files: Files, span: Span) -> None:
    """Copy a span's bytes inside the kernel where it can, else through memory."""
    slot = task.output.source.slots[0]
    begin, end = byte_range(task.output, span)
    source, target = files.get(slot.file), files.get(task.path, os.O_RDWR)
    while begin < end:
        count = min(COPY_BYTES, end - begin)
        try:
            done = os.copy_file_range(
                source, target, count, slot.offset + begin, task.offset + begin
            )
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = 0
        if done == 0:
            body = read_into(source, np.empty(count, np.uint8), slot.offset + begin)
            write_from(target, body, task.offset + begin)
            done = count
        begin += done


def read_whole(tensor: Tensor) -> Array:
    """Return a stored tensor as fp32, in the shape that transformers gives it."""
    whole = np.empty(tensor.shape, np.float32)
    matrices, rows, columns = as_matrices(tensor.shape)
    files = Files()
    try:
        reader = Rows(tensor, files, Scratch())
        for matrix, place in enumerate(whole.reshape(matrices, rows, columns)):
            for low in range(0, rows, 1024):
                high = min(rows, low + 1024)
                place[low:high] = reader.read(matrix, low, high)
    finally:
        files.close()
    return whole


def measure_mxfp4(tensor: Tensor, delta: Delta, slots: dict[str, Slot]) -> float:
    """Return the share of its delta that one expert would keep if it became MXFP4 again."""
    blocks, scales = tensor.slots
    files = Files()
    try:
        bits = mxfp4.read_expert(
            files.get(blocks.file), files.get(scales.file), blocks, scales, delta.first_expert
        )
    finally:
        files.close()
    matrix = widen(bits, "BF16", Scratch(), "all")
    left, right = factors(delta, slots[delta.a_key], slots[delta.b_key], delta.first_expert)
    return mxfp4.share_kept(np.ascontiguousarray(matrix.T), np.ascontiguousarray((left @ right).T))


def answer(line: bytes, scratch: Scratch) -> dict[str, Any]:
    """Do one task; what a person can mend comes back as words, a bug is raised."""
    task = from_line(line)
    files = Files()
    try:
        if task.kind == "merge":
            merge(task, files, scratch)
        return {"proven": proof.prove(task)}
    except proof.ProofError as error:
        return {"failed": str(error)}
    except EOFError as error:
        return {"failed": f"{task.output.name}: {error}"}
    except OSError as error:
        return {"errno": error.errno, "failed": f"{task.path}: {error.strerror}"}
    finally:
        files.close()


def main() -> None:
    """Answer tasks until stdin ends, which it does when the parent does."""
    scratch = Scratch()
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(answer(line, scratch)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
