"""What the merge will write, decided and checked before a byte is: which key lands on which rows.

Every key of the adapter must land on tensors whose shapes fit it, and every slice of an adapted
parameter must be reached, or nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.merge.adapter import AdapterFiles, Pair, read_adapter
from job.merge.checkpoint import (
    FLOATS,
    ITEM_BYTES,
    MXFP4,
    Tensor,
    as_matrices,
    pair_mxfp4,
    read_checkpoint,
    read_json,
)

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Delta:
    """The rows of s·B·A that one stored tensor gets.

    Slice ``m`` of the tensor belongs to expert ``first_expert + m``, and its first row is row
    ``first_row`` of that expert's matrix. ``flipped``: the matrix is (in, out), so its delta is
    transposed.
    """

    a_key: str
    b_key: str
    scaling: float
    rank: int
    experts: int = 1
    first_expert: int = 0
    first_row: int = 0
    flipped: bool = False


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
    landed: dict[str, list[str]]
    """Adapter key → the outputs it is in."""

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(output.size for output in self.outputs)


@dataclass
class _Draft:
    """A plan while it is made."""

    adapter: AdapterFiles
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    """Tensor → adapter key whose values it takes."""


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
    draft = _Draft(files, tensors, config)
    _place(draft, base, _needs_names(draft))
    untied = tied and _untie(draft)
    if merge_format == "mxfp4-preserve":
        _refuse_lossy(draft, base)
    outputs = [
        output
        for tensor in draft.tensors.values()
        for output in _outputs(draft, tensor, merge_format)
    ]
    edits = _config_edits(draft, outputs, merge_format, untied=untied)
    return Plan(base, files, merge_format, outputs, edits, _landed(draft))


def _needs_names(draft: _Draft) -> bool:
    """Return whether names differ from the checkpoint's, so that libraries must be asked."""
    names = [f"{pair.module}.weight" for pair in draft.adapter.pairs] + list(draft.adapter.saved)
    tied = draft.tensors.keys() | {HEAD}
    return bool(draft.adapter.config.get("target_parameters")) or not tied.issuperset(names)


def _place(draft: _Draft, base: Path, ask: bool) -> None:
    """Put every key of the adapter on stored tensors."""
    from job.merge import names

    targets = names.find_targets(base, draft.adapter.folder) if ask else {}

    @cache
    def all_parts() -> dict[str, list[names.Part]]:
        return names.find_parts(names.empty_model(base), list(draft.tensors))

    def parts_of(parameter: str) -> list[names.Part]:
        if parameter in draft.tensors:
            return [names.Part(parameter)]
        if parameter == HEAD and (tied := _embedding(draft)):
            draft.tensors[HEAD] = Tensor(HEAD, tied.dtype, tied.shape, tied.slots)
            return [names.Part(HEAD)]
        return all_parts().get(parameter, [])

    for pair in draft.adapter.pairs:
        target = targets.get(pair.module, names.Target(f"{pair.module}.weight", False, 1))
        if ask and pair.module not in targets:
            raise draft.adapter.refused(f"PEFT finds no module for {pair.a_key} in this base")
        _place_pair(draft, pair, target, parts_of)
    for parameter, key in draft.adapter.saved.items():
        _place_saved(draft, parameter, key, parts_of(parameter))


def _place_pair(draft: _Draft, pair: Pair, target: Any, parts_of: Callable[[str], Any]) -> None:
    parts = parts_of(target.parameter)
    if not parts:
        raise draft.adapter.refused(f"{pair.a_key} adapts {target.parameter}, which the base lacks")
    a, b = draft.adapter.slots[pair.a_key].shape, draft.adapter.slots[pair.b_key].shape
    rank = a[0] // target.experts
    name = target.parameter.removesuffix(".weight")
    flipped = target.flipped or pair.kind == "embedding"
    scaling = draft.adapter.scaling(name, rank)
    reached = 0
    for part in parts:
        stored = draft.tensors[part.name]
        rows = as_matrices(stored.shape)[1]
        delta = Delta(
            pair.a_key, pair.b_key, scaling, rank, target.experts,
            part.expert or 0, part.part * rows, flipped,
        )  # fmt: skip
        _check_fit(draft, delta, stored, a, b)
        draft.deltas[part.name] = delta
        reached += math.prod(stored.shape)
    expected = a[1] * b[0] * target.experts
    if reached != expected:
        raise draft.adapter.refused(
            f"{pair.a_key} adapts {expected} weights, but {target.parameter} has {reached}"
        )


def _check_fit(draft: _Draft, delta: Delta, stored: Tensor, a: Any, b: Any) -> None:
    """Refuse factors whose product is not the shape of ``stored``."""
    matrices, rows, columns = as_matrices(stored.shape)
    wide, high = (b[0], a[1]) if delta.flipped else (a[1], b[0])
    fits = (
        len(a) == len(b) == 2
        and a[0] == b[1] == delta.rank * delta.experts
        and delta.rank > 0
        and columns == wide
        and delta.first_row + rows <= high
        and delta.first_expert + matrices <= delta.experts
    )
    if not fits:
        raise draft.adapter.refused(
            f"{delta.a_key} {list(a)} and its lora_B {list(b)} do not fit {stored.name} "
            f"{list(stored.shape)}"
        )
    if stored.dtype not in (*FLOATS, MXFP4):
        raise JobError(
            ExitCode.CONFIG, stored.slots[0].file, f"holds {stored.name} as {stored.dtype}",
            "take a checkpoint in bf16, fp16, fp32 or MXFP4",
        )  # fmt: skip


def _place_saved(draft: _Draft, parameter: str, key: str, parts: list[Any]) -> None:
    if len(parts) != 1 or parts[0].expert is not None:
        raise draft.adapter.refused(f"{key} replaces {parameter}, which the base lacks")
    stored, given = draft.tensors[parts[0].name], draft.adapter.slots[key]
    resized = stored.name == HEAD or stored.name.endswith(EMBEDDINGS)
    if given.shape[1:] != stored.shape[1:] or (given.shape != stored.shape and not resized):
        raise draft.adapter.refused(
            f"{key} {list(given.shape)} does not fit {stored.name} {list(stored.shape)}"
        )
    draft.replaced[stored.name] = key


def _embedding(draft: _Draft) -> Tensor | None:
    found = [t for name, t in draft.tensors.items() if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _untie(draft: _Draft) -> bool:
    """Give a tied model a head of its own where the adapter changes only one of the two."""
    embedding = _embedding(draft)
    if embedding is None:
        return False
    touched = [n for n in (embedding.name, HEAD) if n in draft.deltas or n in draft.replaced]
    if not touched:
        return False
    if draft.adapter.config.get("ensure_weight_tying"):
        raise JobError(
            ExitCode.CONFIG, str(draft.adapter.folder), "ties the adapters of embedding and head",
            "train with ensure_weight_tying: false; the merged model gets a head of its own",
        )  # fmt: skip
    if HEAD not in draft.tensors:
        draft.tensors[HEAD] = Tensor(HEAD, embedding.dtype, embedding.shape, embedding.slots)
    return True


def _outputs(draft: _Draft, tensor: Tensor, merge_format: str) -> list[Output]:
    """Return what is written for one tensor of the base."""
    shard = Path(tensor.slots[0].file).name
    if tensor.dtype == MXFP4 and merge_format == "mxfp4-preserve":
        names = (f"{tensor.name}_blocks", f"{tensor.name}_scales")
        stored = [Tensor(n, s.dtype, s.shape, (s,)) for n, s in zip(names, tensor.slots, strict=True)]
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


def _dtype_for(draft: _Draft, tensor: Tensor, merge_format: str) -> str:
    if tensor.dtype not in (*FLOATS, MXFP4):
        return tensor.dtype
    if merge_format in ("fp32", "bf16"):
        return {"fp32": "F32", "bf16": "BF16"}[merge_format]
    if tensor.dtype != MXFP4:
        return tensor.dtype
    said = draft.config.get("dtype") or draft.config.get("torch_dtype") or "bfloat16"
    return {name: dtype for dtype, name in DTYPES.items()}.get(said, "BF16")


def _config_edits(
    draft: _Draft, outputs: list[Output], merge_format: str, *, untied: bool
) -> dict[str, Any]:
    """Return the few keys of config.json that the merge makes untrue."""
    edits: dict[str, Any] = {}
    if merge_format in ("fp32", "bf16"):
        key = "torch_dtype" if "torch_dtype" in draft.config else "dtype"
        edits[key] = DTYPES[{"fp32": "F32", "bf16": "BF16"}[merge_format]]
    if draft.config.get("quantization_config") and merge_format != "mxfp4-preserve":
        edits["quantization_config"] = None
    if untied:
        edits["tie_word_embeddings"] = False
    sizes = {o.shape[0] for o in outputs if o.name == HEAD or o.name.endswith(EMBEDDINGS)}
    if draft.replaced and len(sizes) > 1:
        raise draft.adapter.refused(f"embedding and head would have {sorted(sizes)} rows")
    if draft.replaced and sizes and "vocab_size" in draft.config:
        edits["vocab_size"] = sizes.pop()
    return {key: value for key, value in edits.items() if draft.config.get(key, ...) != value}


def _landed(draft: _Draft) -> dict[str, list[str]]:
    landed: dict[str, list[str]] = {key: [] for key in draft.adapter.slots}
    for name, delta in draft.deltas.items():
        landed[delta.a_key].append(name)
        landed[delta.b_key].append(name)
    for name, key in draft.replaced.items():
        landed[key].append(name)
    lost = [key for key, names in landed.items() if not names]
    if lost:
        raise draft.adapter.refused(f"{len(lost)} of its keys land nowhere, such as {lost[0]}")
    return landed


def _refuse_lossy(draft: _Draft, base: Path) -> None:
    """Refuse mxfp4-preserve for a base that is not MXFP4, and for adapted experts."""
    experts = [t for t in draft.tensors.values() if t.dtype == MXFP4]
    if not experts:
        raise JobError(
            ExitCode.CONFIG, str(base), "is no MXFP4 checkpoint",
            "set merge.format: base; mxfp4-preserve keeps what is MXFP4 already",
        )  # fmt: skip
    adapted = [t for t in experts if t.name in draft.deltas]
    if adapted:
        from job.merge.worker import measure_mxfp4

        tensor = adapted[0]
        kept = measure_mxfp4(tensor, draft.deltas[tensor.name], draft.adapter.slots)
        raise draft.adapter.refused(
            f"{len(adapted)} expert tensors are adapted, and MXFP4 would lose {1 - kept:.1%} of "
            f"what was trained (measured on {tensor.name})",
            do="set merge.format: base or bf16",
        )
