"""MXFP4: 32 four-bit floats under one power of two, as gpt-oss stores its experts.

Source: OCP Microscaling Formats (MX) v1.0. E2M1's sixteen values times 2^(scale - 127) are exact
in bf16, so dequantising loses nothing. Here it is done one expert at a time.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from job.merge.checkpoint import Tensor
from job.merge.numbers import Array, opened, read_into, widen

VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
ROWS_AT_ONCE = 256


def read_expert(tensor: Tensor, expert: int) -> Array:
    """Return one expert's matrix as bf16 bits, (in, out), the way transformers holds it.

    Blocks and scales may lie in two files. Memory: the matrix, and a little.
    """
    blocks, scales = tensor.slots
    _, rows, groups, _ = blocks.shape
    matrix = np.empty((groups * 32, rows), np.uint16)
    with ExitStack() as files:
        blocks_file, scales_file = opened(files, blocks.file), opened(files, scales.file)
        for low in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - low)
            first = (expert * rows + low) * groups
            packed = np.empty((count, groups, 16), np.uint8)
            powers = np.empty((count, groups), np.uint8)
            read_into(blocks_file, packed, blocks.offset + first * 16)
            read_into(scales_file, powers, scales.offset + first)
            matrix[:, low : low + count] = (dequantise(packed, powers).view(np.uint32) >> 16).T
    return matrix


def dequantise(packed: Array, powers: Array) -> Array:
    """Return fp32 (rows, groups * 32) of packed (rows, groups, 16) and powers (rows, groups)."""
    values = np.empty((*packed.shape, 2), np.float32)
    # The lower half byte comes first.
    values[..., 0] = VALUES[packed & 15]
    values[..., 1] = VALUES[packed >> 4]
    exponents = powers.astype(np.int32) - 127
    np.ldexp(values, exponents[:, :, None, None], out=values)
    return values.reshape(packed.shape[0], -1)


def quantise(matrix: Array) -> Array:
    """Return fp32 (rows, columns) rounded to what MXFP4 can hold, columns in groups of 32."""
    groups = matrix.reshape(matrix.shape[0], -1, 32)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    # E2M1's largest power of two is 4: the scale moves the group's largest value just there.
    exponents = np.floor(np.log2(np.maximum(largest, np.float32(2.0**-120)))) - 2
    scaled = np.abs(np.ldexp(groups, -exponents.astype(np.int32)))
    steps = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    rounded = VALUES[:8][np.searchsorted(steps, scaled)]
    signed = np.copysign(rounded, groups)
    return np.ldexp(signed, exponents.astype(np.int32)).astype(np.float32).reshape(matrix.shape)


def share_kept(bits: Array, delta: Array) -> float:
    """Return the share of ``delta`` that is left when an expert + delta is MXFP4 again.

    Both are (in, out), the expert as :func:`read_expert` gives it.
    """
    matrix, change = np.ascontiguousarray(widen(bits, "BF16").T), np.ascontiguousarray(delta.T)
    kept = quantise(matrix + change) - matrix
    square = float(np.vdot(change, change))
    return float(np.vdot(kept, change)) / square if square else 1.0
