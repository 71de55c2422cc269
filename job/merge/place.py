"""Where each key of an adapter lands: stored tensors, experts and rows, checked for their shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.merge.adapter import AdapterFiles, Pair
from job.merge.checkpoint import FLOATS, MXFP4, Tensor, as_matrices

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


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


@dataclass
class Draft:
    """A plan while it is made."""

    adapter: AdapterFiles
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    """Tensor → adapter key whose values it takes."""


def _needs_names(draft: Draft) -> bool:
    """Return whether names differ from the checkpoint's, so that libraries must be asked."""
    names = [f"{pair.module}.weight" for pair in draft.adapter.pairs] + list(draft.adapter.saved)
    tied = draft.tensors.keys() | {HEAD}
    return bool(draft.adapter.config.get("target_parameters")) or not tied.issuperset(names)


def place(draft: Draft, base: Path) -> None:
    """Put every key of the adapter on stored tensors."""
    from job.merge import names

    ask = _needs_names(draft)
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


def _place_pair(draft: Draft, pair: Pair, target: Any, parts_of: Callable[[str], Any]) -> None:
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


def _check_fit(draft: Draft, delta: Delta, stored: Tensor, a: Any, b: Any) -> None:
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


def _place_saved(draft: Draft, parameter: str, key: str, parts: list[Any]) -> None:
    if len(parts) != 1 or parts[0].expert is not None:
        raise draft.adapter.refused(f"{key} replaces {parameter}, which the base lacks")
    stored, given = draft.tensors[parts[0].name], draft.adapter.slots[key]
    resized = stored.name == HEAD or stored.name.endswith(EMBEDDINGS)
    if given.shape[1:] != stored.shape[1:] or (given.shape != stored.shape and not resized):
        raise draft.adapter.refused(
            f"{key} {list(given.shape)} does not fit {stored.name} {list(stored.shape)}"
        )
    draft.replaced[stored.name] = key


def _embedding(draft: Draft) -> Tensor | None:
    found = [t for name, t in draft.tensors.items() if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def untie(draft: Draft) -> bool:
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
