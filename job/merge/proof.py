"""The tensor proof: what lies in the merged file is round(base + s·B·A), bit for bit.

Written apart from the merge: it reads base, factors and result from their files again, takes the
factors apart by its own indexing, and instead of rounding asks whether the stored value *is* the
nearest one. A weight whose fp32 sum comes out on the other side of a tie is decided in fp64, and
so is a random sample of every span, so that the proof does not hang on one matrix product.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from job.merge.checkpoint import ITEM_BYTES, MXFP4, as_matrices
from job.merge.mxfp4 import VALUES
from job.merge.numbers import BLOCK_ELEMENTS, STORED, Array, Scratch, read_into
from job.merge.plan import Output
from job.merge.task import Span, Task, byte_range

SAMPLE = 64
"""Weights of each span that are computed in fp64 in any case."""
ROUNDING = 2.0**-23
"""Bound on fp32's error in base + s·B·A, by term, relative to the sum of the terms' sizes."""
COMPARE_BYTES = 4 << 20

_scratch = Scratch()


class ProofError(Exception):
    """The merged file does not hold what base and adapter make."""


@dataclass(slots=True)
class Tally:
    """What the proof measured on a task; tallies of one tensor add up."""

    weights: int = 0
    decided: int = 0
    """Weights that needed fp64, beside the sample."""
    delta_square: float = 0.0
    kept: float = 0.0
    """Product of (merged - base) with the delta: ``delta_square`` if nothing was rounded away."""


def prove(task: Task) -> dict[str, float]:
    """Prove a task's rows in its file.

    Raises:
        ProofError: a weight is not what base and adapter make it, with its place.
    """
    tally = Tally()
    target = os.open(task.path, os.O_RDONLY)
    try:
        for span in task.spans:
            if task.output.copied:
                _prove_copy(task, target, span, tally)
            else:
                _prove_span(task, target, span, tally)
    finally:
        os.close(target)
    return asdict(tally)


def _prove_copy(task: Task, target: int, span: Span, tally: Tally) -> None:
    slot = task.output.source.slots[0]
    begin, end = byte_range(task.output, span)
    source = os.open(slot.file, os.O_RDONLY)
    try:
        for low in range(begin, end, COMPARE_BYTES):
            size = min(COMPARE_BYTES, end - low)
            there = read_into(target, _scratch.get("there", (size,), np.uint8), task.offset + low)
            here = read_into(source, _scratch.get("here", (size,), np.uint8), slot.offset + low)
            if not np.array_equal(there, here):
                raise ProofError(f"{task.output.name}: a copied tensor differs from the base's")
    finally:
        os.close(source)
    tally.weights += (end - begin) // ITEM_BYTES[task.output.dtype]


def _prove_span(task: Task, target: int, span: Span, tally: Tally) -> None:
    output = task.output
    _, rows, columns = as_matrices(output.shape)
    matrix, first, last = span
    reader = _BaseReader(task, matrix)
    left, right = _own_factors(task, matrix)
    step = max(1, BLOCK_ELEMENTS // columns)
    tally.delta_square += _square_norm(left[first:last], right)
    generator = np.random.default_rng(matrix * rows + first)
    try:
        for low in range(first, last, step):
            high = min(last, low + step)
            place = (matrix * rows + low) * columns * ITEM_BYTES[output.dtype]
            stored = _scratch.get("stored", (high - low, columns), STORED[output.dtype])
            read_into(target, stored, task.offset + place)
            block = _Block(output, reader.rows(low, high), left[low:high], right, stored, low)
            block.compare(tally)
        sample = generator.integers(0, block.stored.size, SAMPLE)
        block.decide(np.unravel_index(sample, block.stored.shape))
    except _WrongError as error:
        raise ProofError(f"{output.name}, slice {matrix}: {error}") from None
    finally:
        reader.close()


def _square_norm(left: Array, right: Array) -> float:
    """Return the sum of squares of left @ right without making it."""
    tall, wide = left.astype(np.float64), right.astype(np.float64)
    return float(np.sum((tall.T @ tall) * (wide @ wide.T)))


class _WrongError(Exception):
    pass


@dataclass(slots=True)
class _Block:
    """Some rows: what base and factors are, and what was stored."""

    output: Output
    base: Array
    left: Array
    right: Array
    stored: Array
    row: int

    def compare(self, tally: Tally) -> None:
        change = _scratch.get("change", self.base.shape, np.float32)
        np.matmul(self.left, self.right, out=change)
        total = np.add(self.base, change, out=_scratch.get("total", self.base.shape, np.float32))
        merged = self._as_fp32(self.stored)
        doubtful = self._not_nearest(total, merged)
        if doubtful is not None and len(doubtful[0]):
            self.decide(doubtful)
            tally.decided += len(doubtful[0])
        moved = np.subtract(merged, self.base, out=merged)
        tally.weights += merged.size
        tally.kept += float(np.dot(moved.ravel(), change.ravel()))
        # Infinities and NaNs anywhere make this product one too: no look at every weight needed.
        if not math.isfinite(tally.kept):
            raise _WrongError("it is not finite; the adapter, or the base, is broken")

    def _not_nearest(self, total: Array, merged: Array) -> tuple[Array, ...] | None:
        """Return the places where the stored value is not clearly the one nearest to ``total``."""
        if self.output.dtype != "BF16":
            with np.errstate(over="ignore"):
                wrong = total.astype(STORED[self.output.dtype]) != self.stored
            return np.nonzero(wrong) if wrong.any() else None
        # As integers, neighbouring bf16 values are 0x10000 apart: nearest is less than half.
        apart = np.subtract(total.view(np.int32), merged.view(np.int32), out=total.view(np.int32))
        distance = np.abs(apart, out=apart).view(np.uint32)  # unsigned: a flipped sign is 2^31
        if distance.max() < 0x8000:
            return None
        places = np.flatnonzero(distance.ravel() >= 0x8000)
        tied_to_even = (distance.ravel()[places] == 0x8000) & (self.stored.ravel()[places] & 1 == 0)
        return np.unravel_index(places[~tied_to_even], total.shape)

    def _as_fp32(self, stored: Array) -> Array:
        wide = _scratch.get("merged", stored.shape, np.float32)
        if self.output.dtype == "BF16":
            bits = wide.view(np.uint32)
            np.copyto(bits, stored)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(wide, stored)
        return wide

    def decide(self, places: tuple[Array, ...]) -> None:
        """Compute some weights in fp64: each must be within half a step of its dtype."""
        for begin in range(0, len(places[0]), 4096):
            self._decide(tuple(axis[begin : begin + 4096] for axis in places))

    def _decide(self, at: tuple[Array, ...]) -> None:
        terms = self.left[at[0]].astype(np.float64) * self.right[:, at[1]].T.astype(np.float64)
        base = self.base[at].astype(np.float64)
        exact = base + terms.sum(axis=1)
        slack = ROUNDING * (terms.shape[1] + 2) * (np.abs(base) + np.abs(terms).sum(axis=1))
        below, found, above = _neighbours(self.stored[at], self.output.dtype)
        error = np.abs(found - exact)
        gap = np.where(exact > found, above - found, found - below)
        bad = ~(error <= gap / 2 + slack)
        if bad.any():
            one = int(np.argmax(bad))
            if not np.isfinite(exact[one]):
                raise _WrongError("base + s·B·A is not finite: the adapter, or the base, is broken")
            raise _WrongError(
                f"row {self.row + int(at[0][one])}, column {int(at[1][one])} is "
                f"{found[one]:.7g}, base + s·B·A is {exact[one]:.7g}"
            )


def _neighbours(stored: Array, dtype: str) -> tuple[Array, Array, Array]:
    """Return the values below, at and above ``stored`` in its dtype, as fp64."""
    if dtype != "BF16":
        sides = [np.nextafter(stored, stored.dtype.type(side)) for side in (-np.inf, np.inf)]
        return sides[0].astype(np.float64), stored.astype(np.float64), sides[1].astype(np.float64)
    values = [
        (np.uint32(0x10000) * bits.astype(np.uint32)).view(np.float32).astype(np.float64)
        for bits in (stored, stored + np.uint16(1), stored - np.uint16(1))
    ]
    found, out, into = values
    # Next to zero, the smaller neighbour by bits would be a NaN of the other sign.
    into = np.where(np.isnan(into), -out, into)
    return np.minimum(out, into), found, np.maximum(out, into)


class _BaseReader:
    """The base's rows, read apart from the merge."""

    def __init__(self, task: Task, matrix: int) -> None:
        self._tensor, self._matrix = task.output.source, matrix
        self._files = [os.open(slot.file, os.O_RDONLY) for slot in self._tensor.slots]
        self._expert = self._unpack() if self._tensor.dtype == MXFP4 else None

    def close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)

    def rows(self, low: int, high: int) -> Array:
        if self._expert is not None:
            return self._expert[low:high].astype(np.float32)
        slot = self._tensor.slots[0]
        _, rows, columns = as_matrices(self._tensor.shape)
        begin = (self._matrix * rows + low) * columns * ITEM_BYTES[slot.dtype] + slot.offset
        raw = _scratch.get("raw", (high - low, columns), STORED[slot.dtype])
        read_into(self._files[0], raw, begin)
        wide = _scratch.get("base", raw.shape, np.float32)
        if slot.dtype == "BF16":
            bits = wide.view(np.uint32)
            np.copyto(bits, raw)
            np.multiply(bits, 0x10000, out=bits)
        else:
            np.copyto(wide, raw)
        return wide

    def _unpack(self) -> Array:
        """Return this expert of an MXFP4 tensor, (in, out): by a table of whole bytes."""
        blocks, scales = self._tensor.slots
        _, out, groups, _ = blocks.shape
        table = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1)
        result = np.empty((groups * 32, out), np.float32)
        for row in range(0, out, 128):
            count = min(128, out - row)
            first = (self._matrix * out + row) * groups
            packed = read_into(
                self._files[0], np.empty(count * groups * 16, np.uint8), blocks.offset + first * 16
            )
            powers = read_into(
                self._files[1], np.empty(count * groups, np.uint8), scales.offset + first
            )
            factor = np.exp2(powers.astype(np.float64) - 127).astype(np.float32)
            values = table[packed].reshape(count * groups, 32) * factor[:, None]
            result[:, row : row + count] = values.reshape(count, groups * 32).T
        return result


def _own_factors(task: Task, matrix: int) -> tuple[Array, Array]:
    """Return the factors of one slice of a tensor, of no columns where there is no delta."""
    _, rows, columns = as_matrices(task.output.shape)
    delta, a, b = task.output.delta, task.a, task.b
    if delta is None or a is None or b is None:
        return np.zeros((rows, 1), np.float32), np.zeros((1, columns), np.float32)
    expert = delta.first_expert + matrix
    whole_a, whole_b = _read_factor(a), _read_factor(b)
    mine_a = whole_a[expert * delta.rank : (expert + 1) * delta.rank]
    mine_b = whole_b[:, expert :: delta.experts] * np.float32(delta.scaling)
    if delta.flipped:
        return np.array(mine_a.T, order="C"), np.array(mine_b.T, order="C")
    mine_b = mine_b[delta.first_row : delta.first_row + rows]
    return np.array(mine_b, order="C"), np.array(mine_a, order="C")


_factors: dict[tuple[str, int], Array] = {}


def _read_factor(slot: Any) -> Array:
    """Return one factor as fp32; the last two stay in memory."""
    key = (slot.file, slot.offset)
    if key not in _factors:
        while len(_factors) > 1:
            _factors.pop(next(iter(_factors)))
        with open(slot.file, "rb") as handle:
            handle.seek(slot.offset)
            raw = np.frombuffer(handle.read(slot.size), STORED[slot.dtype]).reshape(slot.shape)
        bf16 = slot.dtype == "BF16"
        wide = (raw.astype(np.uint32) * 65536).view(np.float32) if bf16 else raw.astype(np.float32)
        _factors[key] = wide
    return _factors[key]
