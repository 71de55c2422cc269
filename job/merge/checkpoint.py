"""Safetensors checkpoints as places in files: headers read and checked, no tensor loaded.

Nothing here imports torch: the merge's worker processes use it within a few dozen megabytes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES = FLOATS | {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MXFP4 = "MXFP4"
"""Dtype of a tensor that lies as 4-bit blocks and their scales, in two places."""
HEADER_LIMIT = 100_000_000
"""Bytes; safetensors' own limit."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one stored tensor lies: ``offset`` is in bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model: one slot, or for MXFP4 its blocks and its scales.

    An MXFP4 tensor's shape is (experts, in, out), as transformers holds it, although its blocks
    lie as (experts, out, in / 32, 16).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]


def as_matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return ``shape`` as (matrices, rows, columns); only three axes make several matrices."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, math.prod(shape[:-1]), math.prod(shape[-1:])


def read_header(path: Path) -> dict[str, Slot]:
    """Return the places of the tensors in a safetensors file.

    Raises:
        JobError: 66 if it is not there, 70 if it is cut off or no safetensors file.
    """
    try:
        with open(path, "rb") as handle:
            total = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, total - 8):
                raise _broken(path, f"its header should have {length} bytes, the file has {total}")
            header = json.loads(handle.read(length))
    except FileNotFoundError as error:
        raise missing(path) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise _broken(path, "its header is no JSON") from error
    slots = {
        name: _slot(path, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = max((slot.offset + slot.size for slot in slots.values()), default=8 + length)
    if end != total:
        raise _broken(path, f"its header says {end} bytes, the file has {total}")
    return slots


def _slot(path: Path, name: str, entry: Any, start: int) -> Slot:
    try:
        dtype, shape = entry["dtype"], tuple(int(axis) for axis in entry["shape"])
        begin, end = entry["data_offsets"]
        slot = Slot(str(path), dtype, shape, start + begin)
        fits = begin >= 0 and end - begin == slot.size
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"its entry for {name} can't be read: {error!r}") from error
    if not fits:
        raise _broken(path, f"{name} has {end - begin} bytes, its shape needs {slot.size}")
    return slot


def shard_files(folder: Path) -> list[Path]:
    """Return the weight files of the model in ``folder``, in the order of their names.

    Raises:
        JobError: 66 if there is none, or the index names one that is not there.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise missing(folder / SINGLE)
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise _broken(index, "it is no index of shards") from error
    for name in names:
        if not (folder / name).is_file() or Path(name).name != name:
            raise missing(folder / name)
    return [folder / name for name in names]


def read_checkpoint(folder: Path) -> dict[str, Slot]:
    """Return every stored tensor of the model in ``folder``, shard by shard, in stored order."""
    slots: dict[str, Slot] = {}
    for file in shard_files(folder):
        header = read_header(file)
        slots |= dict(sorted(header.items(), key=lambda item: item[1].offset))
    index = folder / INDEX
    if index.exists():
        lost = json.loads(index.read_bytes())["weight_map"].keys() - slots.keys()
        if lost:
            raise _broken(index, f"it names {len(lost)} tensors that no shard has: {min(lost)}")
    return slots


def pair_mxfp4(slots: dict[str, Slot]) -> dict[str, Tensor]:
    """Return the model's tensors, with ``X_blocks`` and ``X_scales`` joined to one MXFP4 ``X``.

    Raises:
        JobError: 70 for blocks without their scales, or of another shape than the scales say.
    """
    tensors: dict[str, Tensor] = {}
    for name, slot in slots.items():
        stem = name.removesuffix("_blocks")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in slots:
            continue
        if stem == name or slot.dtype != "U8" or len(slot.shape) != 4:
            tensors[name] = Tensor(name, slot.dtype, slot.shape, (slot,))
            continue
        scales = slots.get(f"{stem}_scales")
        if scales is None or scales.shape != slot.shape[:3] or slot.shape[3] != 16:
            raise _broken(Path(slot.file), f"{name} has no scales that fit it")
        experts, rows, groups, _ = slot.shape
        tensors[stem] = Tensor(stem, MXFP4, (experts, groups * 32, rows), (slot, scales))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file of a model or an adapter.

    Raises:
        JobError: 66 if it is not there, 70 if it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise missing(path) from error
    except ValueError as error:
        raise _broken(path, "it is no JSON") from error
    if not isinstance(value, dict):
        raise _broken(path, "it holds no JSON object")
    return value


def missing(path: Path) -> JobError:
    """Return the error for a file that a model or an adapter must have."""
    return JobError(ExitCode.NOT_FOUND, str(path), "is not there", "name a complete folder")


def _broken(path: Path, what: str) -> JobError:
    return JobError(ExitCode.NOT_PROVEN, str(path), f"is broken or cut off: {what}", "get it again")
