"""Blocks of weights in numpy: reading, writing, widening to fp32, rounding to bf16.

bf16 has no numpy dtype, so it is handled as integers: a bf16 is the upper half of an fp32.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from job.merge.checkpoint import Slot
from job.merge.place import Delta

Array = npt.NDArray[Any]
CACHE_LINE = 64
STORED: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def aligned(shape: tuple[int, ...], dtype: type) -> Array:
    """Return an uninitialised array that begins on a cache line: its loops are a tenth faster."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


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


def narrow(wide: Array, dtype: str) -> Array:
    """Return fp32 values rounded to nearest, ties to even. ``wide`` is used up."""
    if dtype == "F32":
        return wide
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return wide.astype(np.float16)
    bits = wide.view(np.uint32)
    np.add(bits, 0x8000, out=bits)
    # What was half-way has gone up, and has a lower half of zeros now: back if it came out odd.
    ties = (bits.astype(np.uint16) == 0).ravel().nonzero()[0]
    np.right_shift(bits, 16, out=bits)
    stored = bits.astype(np.uint16)
    if len(ties):
        stored.reshape(-1)[ties] &= 0xFFFE
    return stored


def read_floats(slot: Slot) -> Array:
    """Return a whole stored tensor as a new fp32 array."""
    with open(slot.file, "rb", buffering=0) as file:
        stored = read_into(file.fileno(), np.empty(slot.shape, STORED[slot.dtype]), slot.offset)
    return widen(stored, slot.dtype)


_factor = lru_cache(maxsize=2)(read_floats)


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
