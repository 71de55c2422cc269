"""What the merge will write, decided and checked before a byte is: which key lands on which rows.

Every key of the adapter must land on tensors whose shapes fit it, and every slice of an adapted
parameter must be reached, or nothing is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.merge.adapter import AdapterFiles, read_adapter
from job.merge.checkpoint import (
    FLOATS,
    ITEM_BYTES,
    MXFP4,
    Tensor,
    pair_mxfp4,
    read_checkpoint,
    read_json,
)
from job.merge.place import EMBEDDINGS, HEAD, Delta, Draft, place, untie

FORMATS = {"fp32": "F32", "bf16": "BF16"}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged model: its source, cast to ``dtype``, plus ``delta``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor
    shard: str
    """The base's file that it (or what it replaces) lies in."""
    delta: Delta | None = None

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are taken as they are."""
        return self.delta is None and self.dtype == self.source.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is written, in order, and what becomes of config.json."""

    base: Path
    adapter: AdapterFiles
    format: str
    outputs: list[Output]
    config_edits: dict[str, Any]
    """Keys of config.json that change; None removes one."""

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(output.size for output in self.outputs)


def make_plan(adapter: Path, base: Path, merge_format: str) -> Plan:
    """Return the plan for merging ``adapter`` into ``base``.

    Raises:
        JobError: 66 for missing files, 70 for an adapter that does not land on this base, or not
            in this format, 78 for what can't be merged at all.
    """
    files = read_adapter(adapter)
    config = read_json(base / "config.json")
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, "mxfp4"):
        raise JobError(
            ExitCode.CONFIG, str(base / "config.json"), f"is quantised with {quantised}",
            "take the base's unquantised checkpoint; only MXFP4 is read here",
        )  # fmt: skip
    tensors = pair_mxfp4(read_checkpoint(base))
    # A base whose config does not say is tied by its class, and then stores no head.
    tied = bool(config.get("tie_word_embeddings", HEAD not in tensors))
    draft = Draft(files, tensors, config)
    place(draft, base)
    untied = tied and untie(draft)
    if merge_format == "mxfp4-preserve":
        _refuse_lossy(draft, base)
    outputs = [
        output
        for tensor in draft.tensors.values()
        for output in _outputs(draft, tensor, merge_format)
    ]
    edits = _config_edits(draft, outputs, merge_format, untied=untied)
    _require_landed(draft)
    return Plan(base, files, merge_format, outputs, edits)


def _outputs(draft: Draft, tensor: Tensor, merge_format: str) -> list[Output]:
    """Return what is written for one tensor of the base."""
    shard = Path(tensor.slots[0].file).name
    if tensor.dtype == MXFP4 and merge_format == "mxfp4-preserve":
        names = (f"{tensor.name}_blocks", f"{tensor.name}_scales")
        stored = [
            Tensor(n, s.dtype, s.shape, (s,)) for n, s in zip(names, tensor.slots, strict=True)
        ]
        return [
            Output(one.name, one.dtype, one.shape, one, Path(one.slots[0].file).name)
            for one in stored
        ]
    dtype = _dtype_for(draft, tensor, merge_format)
    delta, key = draft.deltas.get(tensor.name), draft.replaced.get(tensor.name)
    if key is None:
        return [Output(tensor.name, dtype, tensor.shape, tensor, shard, delta)]
    slot = draft.adapter.slots[key]
    saved = Tensor(tensor.name, slot.dtype, slot.shape, (slot,))
    return [Output(tensor.name, dtype, slot.shape, saved, shard, delta)]


def _dtype_for(draft: Draft, tensor: Tensor, merge_format: str) -> str:
    if tensor.dtype not in (*FLOATS, MXFP4):
        return tensor.dtype
    if merge_format in FORMATS:
        return FORMATS[merge_format]
    if tensor.dtype != MXFP4:
        return tensor.dtype
    said = draft.config.get("dtype") or draft.config.get("torch_dtype") or "bfloat16"
    return {name: dtype for dtype, name in DTYPES.items()}.get(said, "BF16")


def _config_edits(
    draft: Draft, outputs: list[Output], merge_format: str, *, untied: bool
) -> dict[str, Any]:
    """Return the few keys of config.json that the merge makes untrue."""
    edits: dict[str, Any] = {}
    if merge_format in FORMATS:
        key = "torch_dtype" if "torch_dtype" in draft.config else "dtype"
        edits[key] = DTYPES[FORMATS[merge_format]]
    if draft.config.get("quantization_config") and merge_format != "mxfp4-preserve":
        edits["quantization_config"] = None
    if untied:
        edits["tie_word_embeddings"] = False
    sizes = {o.shape[0] for o in outputs if o.name == HEAD or o.name.endswith(EMBEDDINGS)}
    if draft.replaced and len(sizes) > 1:
        raise draft.adapter.refused(f"embedding and head would have {sorted(sizes)} rows")
    nested = (draft.config.get("text_config") or {}).get("vocab_size")
    if draft.replaced and sizes and "vocab_size" in draft.config:
        edits["vocab_size"] = sizes.pop()
    elif draft.replaced and sizes and nested not in (None, *sizes):
        raise draft.adapter.refused(f"its embedding has not the {nested} rows of text_config")
    return {key: value for key, value in edits.items() if draft.config.get(key, ...) != value}


def _require_landed(draft: Draft) -> None:
    landed = {key for delta in draft.deltas.values() for key in (delta.a_key, delta.b_key)}
    lost = draft.adapter.slots.keys() - landed - set(draft.replaced.values())
    if lost:
        raise draft.adapter.refused(f"{len(lost)} of its keys land nowhere, such as {min(lost)}")


def _refuse_lossy(draft: Draft, base: Path) -> None:
    """Refuse mxfp4-preserve for a base that is not MXFP4, and for adapted experts."""
    experts = [t for t in draft.tensors.values() if t.dtype == MXFP4]
    if not experts:
        raise JobError(
            ExitCode.CONFIG, str(base), "is no MXFP4 checkpoint",
            "set merge.format: base; mxfp4-preserve keeps what is MXFP4 already",
        )  # fmt: skip
    adapted = [t for t in experts if t.name in draft.deltas]
    if adapted:
        from job.merge import mxfp4
        from job.merge.numbers import factors

        tensor, slots = adapted[0], draft.adapter.slots
        delta = draft.deltas[tensor.name]
        left, right = factors(delta, slots[delta.a_key], slots[delta.b_key], delta.first_expert)
        kept = mxfp4.share_kept(mxfp4.read_expert(tensor, delta.first_expert), left @ right)
        raise draft.adapter.refused(
            f"{len(adapted)} expert tensors are adapted, and MXFP4 would lose {1 - kept:.1%} of "
            f"what was trained (measured on {tensor.name})",
            do="set merge.format: base or bf16",
        )
