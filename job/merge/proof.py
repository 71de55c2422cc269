"""The tensor proof: what lies in the merged file is round(base + s·B·A), bit for bit.

Written apart from the merge: it reads base, factors and result from their files again, takes the
factors apart by its own indexing, and instead of rounding asks whether the stored value *is* the
nearest one. A weight whose fp32 sum comes out on the other side of a tie is decided in fp64, and
so is a random sample of every span, so that the proof does not hang on one matrix product.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import lru_cache

import numpy as np

from job.merge.checkpoint import ITEM_BYTES, MXFP4, Slot, Tensor, as_matrices
from job.merge.mxfp4 import VALUES
from job.merge.numbers import STORED, Array, aligned, opened, read_into
from job.merge.task import Task

SAMPLE = 64
"""Weights of each span that are computed in fp64 in any case."""
DECIDED_AT_ONCE = 4096
ROUNDING = 2.0**-23
"""Bound on fp32's error in base + s·B·A, by term, relative to the sum of the terms' sizes."""


class ProofError(Exception):
    """The merged file does not hold what base and adapter make."""


class Proof:
    """One slice of one tensor: what base and factors make, against what lies in the file."""

    def __init__(self, task: Task, matrix: int, space: Array, files: ExitStack) -> None:
        self._output, self._matrix, self._offset = task.output, matrix, task.offset
        self._rows, self._columns = as_matrices(task.output.shape)[1:]
        self._target = opened(files, task.path)
        source = task.output.source
        self._base_file = opened(files, source.slots[0].file)
        self._weights, self._decided, self._lost, self._last = 0, 0, 0.0, (0, 0)
        if task.output.copied:
            self._stored, self._raw = np.empty(
                (2, space.shape[1], self._columns * ITEM_BYTES[source.dtype]), np.uint8
            )
            return
        self._expert = _unpack(source, matrix) if source.dtype == MXFP4 else None
        self._left, self._right = _own_factors(task, matrix)
        self._raw = aligned(space.shape[1:], STORED.get(source.dtype, np.uint8))
        self._stored = aligned(space.shape[1:], STORED[task.output.dtype])
        self._space = space

    def check(self, low: int, high: int) -> None:
        """Prove rows ``low`` to ``high``, no more than fit ``space``.

        Raises:
            ProofError: a weight is not what base and adapter make it, with its place.
        """
        self._last = low, high
        self._weights += (high - low) * self._columns
        stored = self._read(self._target, self._offset, self._output.dtype, self._stored)
        if self._output.copied:
            if not np.array_equal(stored, self._read_raw()):
                raise self._wrong("a copied tensor differs from the base's")
            return
        base, change, merged, apart = self._space[:, : high - low]
        self._read_base(base)
        np.matmul(self._left[low:high], self._right, out=change)
        total = np.add(base, change, out=base)
        _as_fp32(stored, self._output.dtype, merged)
        doubtful = self._not_nearest(total, merged, stored, apart)
        for first in range(0, len(doubtful), DECIDED_AT_ONCE):
            self._decide(doubtful[first : first + DECIDED_AT_ONCE])
        self._decided += len(doubtful)
        rounded = np.subtract(merged, total, out=merged)
        self._lost += float(np.dot(rounded.ravel(), change.ravel()))
        # Infinities and NaNs anywhere make this product one too: no look at every weight needed.
        if not math.isfinite(self._lost):
            raise self._wrong("it is not finite; the adapter, or the base, is broken")

    def finish(self, first: int, last: int) -> dict[str, float]:
        """Decide a sample of the last block in fp64, and return the span's figures.

        Returns:
            ``weights``; ``decided``: those that needed fp64, beside the sample; ``delta_square``;
            ``kept``: the product of (merged - base) with the delta, which is ``delta_square`` if
            nothing was rounded away. Figures of one tensor add up.
        """
        square = 0.0
        if not self._output.copied:
            low, high = self._last
            generator = np.random.default_rng(self._matrix * self._rows + first)
            self._decide(generator.integers(0, (high - low) * self._columns, SAMPLE))
            square = _square_norm(self._left[first:last], self._right)
        return {
            "weights": self._weights, "decided": self._decided, "delta_square": square,
            "kept": square + self._lost,
        }  # fmt: skip

    def _read(self, file: int, start: int, dtype: str, out: Array) -> Array:
        """Return the rows that are looked at now, as a file has them."""
        low, high = self._last
        row = self._matrix * self._rows + low
        return read_into(file, out[: high - low], start + row * self._columns * ITEM_BYTES[dtype])

    def _read_raw(self) -> Array:
        slot = self._output.source.slots[0]
        return self._read(self._base_file, slot.offset, slot.dtype, self._raw)

    def _read_base(self, wide: Array) -> None:
        if self._expert is not None:
            np.copyto(wide, self._expert[slice(*self._last)])
        else:
            _as_fp32(self._read_raw(), self._output.source.dtype, wide)

    def _wrong(self, what: str) -> ProofError:
        return ProofError(f"slice {self._matrix}: {what}")

    def _not_nearest(self, total: Array, merged: Array, stored: Array, space: Array) -> Array:
        """Return the flat places where the stored value is not clearly the nearest to ``total``."""
        if self._output.dtype != "BF16":
            with np.errstate(over="ignore"):
                return np.flatnonzero(total.astype(stored.dtype) != stored)
        # As integers, neighbouring bf16 values are 0x10000 apart: nearest is less than half.
        apart = np.subtract(total.view(np.int32), merged.view(np.int32), out=space.view(np.int32))
        shifted = np.add(apart, 0x7FFF, out=apart).view(np.uint32).ravel()
        places = (shifted > 0xFFFE).nonzero()[0]
        if not len(places):
            return places
        tie = shifted[places] + 1 & 0xFFFEFFFF == 0
        return places[~tie | (stored.ravel()[places] & 1 == 1)]

    def _decide(self, places: Array) -> None:
        """Compute weights of the last block in fp64: each must be within half a step of its dtype."""
        low, high = self._last
        rows, columns = np.divmod(places, self._columns)
        left, right = self._left[low:high][rows], self._right[:, columns].T
        terms = left.astype(np.float64) * right.astype(np.float64)
        wide = np.empty((high - low, self._columns), np.float32)
        self._read_base(wide)
        base = wide[rows, columns].astype(np.float64)
        exact = base + terms.sum(axis=1)
        slack = ROUNDING * (terms.shape[1] + 2) * (np.abs(base) + np.abs(terms).sum(axis=1))
        below, found, above = _neighbours(self._stored[rows, columns], self._output.dtype)
        gap = np.where(exact > found, above - found, found - below)
        bad = ~(np.abs(found - exact) <= gap / 2 + slack)
        if bad.any():
            one = int(np.argmax(bad))
            if not np.isfinite(exact[one]):
                raise self._wrong("base + s·B·A is not finite: the adapter, or the base, is broken")
            raise self._wrong(
                f"row {low + int(rows[one])}, column {int(columns[one])} is "
                f"{found[one]:.7g}, base + s·B·A is {exact[one]:.7g}"
            )


def _square_norm(left: Array, right: Array) -> float:
    """Return the sum of squares of left @ right without making it."""
    tall, wide = left.astype(np.float64), right.astype(np.float64)
    return float(np.sum((tall.T @ tall) * (wide @ wide.T)))


def _as_fp32(stored: Array, dtype: str, wide: Array) -> Array:
    if dtype == "BF16":
        bits = wide.view(np.uint32)
        np.copyto(bits, stored)
        np.multiply(bits, 0x10000, out=bits)
    else:
        np.copyto(wide, stored)
    return wide


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


def _unpack(tensor: Tensor, expert: int) -> Array:
    """Return one expert of an MXFP4 tensor, (in, out): by a table of whole bytes."""
    blocks, scales = tensor.slots
    _, out, groups, _ = blocks.shape
    count = out * groups
    packed = np.fromfile(
        blocks.file, np.uint8, count * 16, offset=blocks.offset + expert * count * 16
    )
    powers = np.fromfile(scales.file, np.uint8, count, offset=scales.offset + expert * count)
    factor = np.exp2(powers.astype(np.float64) - 127).astype(np.float32).reshape(out, groups, 1)
    table = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1)
    result = np.empty((groups * 32, out), np.float32)
    for low in range(0, out, 128):
        rows = slice(low, min(out, low + 128))
        values = table[packed.reshape(out, -1)[rows]].reshape(-1, groups, 32) * factor[rows]
        result[:, rows] = values.reshape(-1, groups * 32).T
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


@lru_cache(maxsize=2)
def _read_factor(slot: Slot) -> Array:
    """Return one factor as fp32."""
    raw: Array = np.fromfile(
        slot.file, STORED[slot.dtype], math.prod(slot.shape), offset=slot.offset
    )
    wide = (raw.astype(np.uint32) * 65536).view(np.float32) if slot.dtype == "BF16" else raw
    return wide.astype(np.float32).reshape(slot.shape)
