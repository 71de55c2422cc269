"""Blocks of weights in numpy: reading, writing, widening to fp32, rounding to bf16.

bf16 has no numpy dtype, so it is handled as integers: a bf16 is the upper half of an fp32.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from job.merge.checkpoint import Slot

Array = npt.NDArray[Any]
STORED: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def opened(files: ExitStack, path: str, mode: str = "rb") -> int:
    """Return a descriptor of ``path`` that ``files`` closes."""
    return files.enter_context(open(path, mode, buffering=0)).fileno()


def read_into(descriptor: int, array: Array, offset: int) -> Array:
    """Fill a contiguous ``array`` from a file.

    Raises:
        EOFError: the file ends before.
    """
    view, done = array.data, os.preadv(descriptor, [array.data], offset)
    while done < array.nbytes:
        size = os.preadv(descriptor, [view.cast("B")[done:]], offset + done)
        if size == 0:
            raise EOFError("the file ends before its tensors do")
        done += size
    return array


def write_from(descriptor: int, array: Array, offset: int) -> None:
    """Write a contiguous ``array`` to a file at ``offset``."""
    view, done = array.data, os.pwrite(descriptor, array.data, offset)
    while done < array.nbytes:
        done += os.pwrite(descriptor, view.cast("B")[done:], offset + done)


def widen(stored: Array, dtype: str, out: Array | None = None) -> Array:
    """Return stored values as fp32, exactly, in ``out`` if it is given."""
    wide = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "BF16":
        bits = wide.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(wide, stored)
    return wide


def narrow(wide: Array, dtype: str, spare: Array) -> Array:
    """Return fp32 values rounded to nearest, ties to even.

    ``wide`` and ``spare``, an fp32 array of the same shape, are used up.
    """
    if dtype == "F32":
        return wide
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return wide.astype(np.float16)
    bits, bump = wide.view(np.uint32), spare.view(np.uint32)
    # Adding 0x7FFF, and one more where the kept part is odd, carries into it exactly when due.
    np.right_shift(bits, 16, out=bump)
    np.bitwise_and(bump, 1, out=bump)
    np.add(bump, 0x7FFF, out=bump)
    np.add(bits, bump, out=bits)
    np.right_shift(bits, 16, out=bits)
    return bits.astype(np.uint16)


def read_floats(slot: Slot) -> Array:
    """Return a whole stored tensor as a new fp32 array."""
    with open(slot.file, "rb", buffering=0) as file:
        stored = read_into(file.fileno(), np.empty(slot.shape, STORED[slot.dtype]), slot.offset)
    return widen(stored, slot.dtype)
