"""Blocks of weights in numpy: reading, widening to fp32, rounding to bf16, and MXFP4's values.

bf16 has no numpy dtype, so it is handled as integers: a bf16 is the upper half of an fp32.
"""

from __future__ import annotations

import math
import os
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
STORED: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
BLOCK_ELEMENTS = 3 << 14
"""A fifth of a megabyte in fp32: a block and its few temporaries stay in a core's L2 cache."""


class Scratch:
    """Named buffers that are used again for every block, so that no page is touched first twice."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: type) -> Array:
        """Return an uninitialised array; the next call with this name takes its memory."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


def read_into(descriptor: int, array: Array, offset: int) -> Array:
    """Fill a contiguous ``array`` from a file.

    Raises:
        EOFError: the file ends before.
    """
    view = memoryview(cast("Any", array.reshape(-1).view(np.uint8)))
    while view:
        size = os.preadv(descriptor, [view], offset)
        if size == 0:
            raise EOFError("the file ends before its tensors do")
        view, offset = view[size:], offset + size
    return array


def write_from(descriptor: int, array: Array, offset: int) -> None:
    """Write a contiguous ``array`` to a file at ``offset``."""
    view = memoryview(cast("Any", array.reshape(-1).view(np.uint8)))
    while view:
        size = os.pwrite(descriptor, view, offset)
        view, offset = view[size:], offset + size


def widen(stored: Array, dtype: str, scratch: Scratch, name: str) -> Array:
    """Return stored values as fp32, exactly, in the buffer ``name``."""
    wide = scratch.get(name, stored.shape, np.float32)
    if dtype == "BF16":
        bits = wide.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(wide, stored)
    return wide


def narrow(wide: Array, dtype: str, scratch: Scratch) -> Array:
    """Return fp32 values rounded to nearest, ties to even. ``wide`` is used up."""
    if dtype == "F32":
        return wide
    stored = scratch.get("narrow", wide.shape, STORED[dtype])
    if dtype == "F16":
        with np.errstate(over="ignore"):
            np.copyto(stored, wide, casting="same_kind")
        return stored
    bits = wide.view(np.uint32)
    bump = scratch.get("bump", wide.shape, np.uint32)
    # Adding 0x7FFF, and one more where the kept part is odd, carries into it exactly when due.
    np.right_shift(bits, 16, out=bump)
    np.bitwise_and(bump, 1, out=bump)
    np.add(bump, 0x7FFF, out=bump)
    np.add(bits, bump, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(stored, bits, casting="unsafe")
    return stored


def read_floats(descriptor: int, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Return a whole stored tensor as a new fp32 array."""
    stored = read_into(descriptor, np.empty(shape, STORED[dtype]), offset)
    return widen(stored, dtype, Scratch(), "all")
