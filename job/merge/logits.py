"""The logit proof: base + adapter by PEFT's own forward, against the merged model, on real tokens.

Catches what no look at tensors can: a wrong idea of which weights an adapter key means. Done layer
by layer: hooks read a layer's weights from the shards when its turn comes and drop them after it,
so memory holds one layer (or the embedding), however many there are. The arithmetic is finer than
what is compared (fp64 for weights in fp32, fp32 for rounder ones): only the weights' rounding shows,
not the order in which a deep model adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from job.errors import ExitCode, JobError
from job.merge.adapter import WEIGHTS
from job.merge.checkpoint import MXFP4, Tensor, pair_mxfp4, read_checkpoint
from job.merge.mxfp4 import read_expert
from job.merge.names import Part, empty_model, empty_peft_model, find_parts
from job.merge.place import EMBEDDINGS, HEAD
from job.merge.plan import Plan

if TYPE_CHECKING:
    from job.config import MergeSection
    from job.stop import Stop

PROMPTS, PROMPT_TOKENS = 4, 48
KL_FLOOR = 1e-9
"""Nats; what fp32 arithmetic alone makes of equal models."""


@dataclass(frozen=True, slots=True)
class LogitReport:
    """How far the merged model's words are from the adapter's."""

    positions: int
    max_difference: float
    """Of logits, merged against base + adapter."""
    kl_merged: float
    """KL(adapter, merged), nats, mean over positions."""
    kl_base: float
    """KL(adapter, base): what the adapter changed at all."""
    same_top_token: float
    """Share of positions where both would say the same next token."""


class _Weights:
    """Reads a model's parameters, by their names at run time, from the shards in a folder."""

    def __init__(self, folder: Path, model: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tensors = pair_mxfp4(read_checkpoint(folder))
        self._parts = find_parts(model, list(self._tensors))

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return a parameter in the arithmetic's dtype; a missing row of a resized embedding is zero.

        Raises:
            JobError: 70 if the shards do not have it: such a model would load at random.
        """
        parts = self._parts.get(name) or self._tied(name)
        if not parts:
            raise _refused(f"the checkpoint has nothing for {name}")
        value = self._stack(parts)
        if value.shape != shape and value.shape[1:] == shape[1:]:
            rows = value.new_zeros(shape)
            rows[: value.shape[0]] = value
            value = rows
        if value.shape != shape:
            raise _refused(f"{name} is {list(value.shape)}, the model needs {list(shape)}")
        return value

    def _tied(self, name: str) -> list[Part]:
        found = [one for one in self._tensors if one.endswith(EMBEDDINGS)]
        return [Part(found[0])] if name == HEAD and len(found) == 1 else []

    def _stack(self, parts: list[Part]) -> torch.Tensor:
        if parts[0].expert is None:
            return self._one(self._tensors[parts[0].name])
        experts: dict[int, dict[int, torch.Tensor]] = {}
        for part in parts:
            experts.setdefault(part.expert or 0, {})[part.part] = self._one(
                self._tensors[part.name]
            )
        rows = [
            torch.cat([one for _, one in sorted(e.items())]) for _, e in sorted(experts.items())
        ]
        return torch.stack(rows)

    def _one(self, tensor: Tensor) -> torch.Tensor:
        """Return one stored tensor, in the shape that transformers gives it."""
        if tensor.dtype != MXFP4:
            with safe_open(tensor.slots[0].file, "pt") as file:
                return file.get_tensor(tensor.name).to(self._dtype)
        whole = torch.empty(tensor.shape, dtype=self._dtype)
        for expert, place in enumerate(whole):
            bits = torch.from_numpy(read_expert(tensor, expert).view(np.int16))
            place.copy_(bits.view(torch.bfloat16))
        return whole


def compare(plan: Plan, out: Path, input_ids: list[list[int]], *, stop: Stop) -> LogitReport:
    """Return how the merged model in ``out`` differs from base + adapter on ``input_ids``.

    Args:
        plan: What was merged.
        out: The merged model, config.json included.
        input_ids: Prompts; shorter ones are padded on the right and their padding is left out.
        stop: Heard at every layer.
    """
    ids, real = _batch(input_ids)
    dtype = torch.float32 if _is_rounded(plan) else torch.float64
    model = empty_peft_model(plan.base, plan.adapter.folder, plan.config_edits.get("vocab_size"))
    _check_scaling(plan, model)
    _load_adapter(model, plan.adapter.folder, dtype)
    _stream_weights(model, plan.base, model.get_base_model(), dtype, stop)
    adapted = _logits(model, ids, real)
    with model.disable_adapter():
        base = _logits(model, ids, real)
    del model
    merged_model = empty_model(out)
    _stream_weights(merged_model, out, merged_model, dtype, stop)
    merged = _logits(merged_model, ids, real)
    return LogitReport(
        positions=adapted.shape[0],
        max_difference=float((adapted - merged).abs().max()),
        kl_merged=_kl(adapted, merged),
        kl_base=_kl(adapted, base),
        same_top_token=float((adapted.argmax(-1) == merged.argmax(-1)).double().mean()),
    )


def judge(report: LogitReport, plan: Plan, limits: MergeSection) -> None:
    """Refuse a merged model whose logits are too far from the adapter's.

    Raises:
        JobError: 70, with what was measured and the mend.
    """
    if not _is_rounded(plan):
        if not report.max_difference <= limits.max_logit_difference:
            raise _refused(
                f"logits differ by {report.max_difference:.2g} from base + adapter, more than "
                f"{limits.max_logit_difference:.2g}",
                do="tell the maintainers: tensors agree, so a key is understood wrongly",
            )
        return
    allowed = limits.max_kl_ratio * report.kl_base + KL_FLOOR
    if not report.kl_merged <= allowed:
        raise _refused(
            f"KL(adapter, merged) is {report.kl_merged:.2g} nats, more than "
            f"{limits.max_kl_ratio:.0%} of KL(adapter, base) = {report.kl_base:.2g}: rounding "
            "loses too much of what was trained",
            do="set merge.format: fp32, or train with more rank, steps or learning rate",
        )


def _is_rounded(plan: Plan) -> bool:
    """Whether what is merged is kept in fewer bits than fp32 has."""
    return any(o.dtype in ("BF16", "F16") for o in plan.outputs if not o.copied)


def fixed_prompts(vocab_size: int) -> list[list[int]]:
    """Return prompts of arbitrary known tokens, for a merge without a data set."""
    return [
        [(7919 * (row * PROMPT_TOKENS + i) + 13) % vocab_size for i in range(PROMPT_TOKENS)]
        for row in range(2)
    ]


def dataset_prompts(folder: Path) -> list[list[int]]:
    """Return the first tokens of the first training rows of a prepared data set."""
    import pyarrow

    with pyarrow.memory_map(str(folder / "train.arrow")) as source:
        batch = pyarrow.ipc.open_stream(source).read_next_batch()
        rows = batch.slice(0, PROMPTS).column("input_ids").to_pylist()
    return [row[:PROMPT_TOKENS] for row in rows if row]


def _batch(input_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, input_ids))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in input_ids])
    real = torch.tensor([[i < len(row) for i in range(length)] for row in input_ids])
    return ids, real


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the logits of the real positions, (positions, vocabulary)."""
    logits = model(input_ids=ids, use_cache=False).logits[real]
    if not torch.isfinite(logits).all():
        raise _refused("logits are not finite", do="look at the base: its weights are broken")
    return logits


def _kl(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return KL(left, right) in nats, the mean over positions. Shapes: (positions, vocabulary)."""
    sums = 0.0
    for one, other in zip(left, right, strict=True):
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        sums += float((log_p.exp() * (log_p - log_q)).sum())
    return max(sums / left.shape[0], 0.0)


def _load_adapter(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Put the adapter's own weights into PEFT's model, by PEFT's own names."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    # PEFT's loader would move the adapter to where the base is: nowhere. Its saver knows as well
    # which key is which parameter.
    own = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in own.items()}
    saved = get_peft_model_state_dict(model, own, save_embedding_layers=False)
    known = {name: name for name in own} | {key: names[id(value)] for key, value in saved.items()}
    state = load_file(folder / WEIGHTS)
    if strange := [key for key in state if key not in known]:
        raise _refused(f"PEFT does not know the adapter's key {strange[0]}")
    if lost := saved.keys() - state.keys():
        raise _refused(f"the adapter has nothing for {min(lost)}")
    loaded = {known[key]: value.to(dtype) for key, value in state.items()}
    model.load_state_dict(loaded, strict=False, assign=True)


def _check_scaling(plan: Plan, model: Any) -> None:
    """Refuse another s than PEFT's own: in bf16, a single wrong one could hide below the KL."""
    ours = {o.delta.a_key: o.delta.scaling for o in plan.outputs if o.delta}
    for name, module in model.named_modules():
        for kind in ("lora_A.weight", "lora_embedding_A"):
            said = ours.get(f"{name}.{kind}")
            if said is not None and abs(said - module.scaling["default"]) > 1e-9 * abs(said):
                raise _refused(f"{name} is scaled by {said}, PEFT says {module.scaling['default']}")


def _stream_weights(
    model: Any, folder: Path, named_model: Any, dtype: torch.dtype, stop: Stop
) -> None:
    """Make every layer of ``model`` read its weights from ``folder`` for its turn only."""
    named = empty_model(folder) if named_model is not model else model
    weights = _Weights(folder, named, dtype)
    prefix = next(n for n, m in model.named_modules() if m is named_model)
    for name, unit in _units(model):
        owned = _empty_parameters(name, unit, prefix)
        if owned:
            unit.register_forward_pre_hook(_loader(owned, weights, stop))
            unit.register_forward_hook(_dropper(owned), always_call=True)


def _units(model: Any) -> list[tuple[str, Any]]:
    """Return the decoder layers, and every module outside them that owns parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    units = [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]
    for other, module in model.named_modules():
        inside = other == name or other.startswith(f"{name}.")
        if not inside and any(True for _ in module.parameters(recurse=False)):
            units.append((other, module))
    return units


Owned = list[tuple[Any, str, str, torch.Size]]
"""Module, attribute, the parameter's name at run time without PEFT's wrappers, shape."""


def _empty_parameters(name: str, unit: Any, prefix: str) -> Owned:
    owned = []
    for inner, module in unit.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            path = [*name.split("."), *inner.split("."), attribute]
            wrappers = ("base_layer", "original_module", "")
            plain = ".".join(part for part in path if part not in wrappers)
            plain = plain.removeprefix(f"{prefix}.") if prefix else plain
            owned.append((module, attribute, plain, parameter.shape))
    return owned


def _loader(owned: Owned, weights: _Weights, stop: Stop) -> Any:
    def load(*_: Any) -> None:
        stop.check()
        for module, attribute, name, shape in owned:
            value = torch.nn.Parameter(weights.read(name, shape), requires_grad=False)
            module._parameters[attribute] = value  # noqa: SLF001 (setattr is PEFT's here)

    return load


def _dropper(owned: Owned) -> Any:
    def drop(*_unused: Any) -> None:
        for module, attribute, _name, shape in owned:
            empty = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            module._parameters[attribute] = empty  # noqa: SLF001

    return drop


def _refused(what: str, *, do: str = "take an adapter and a base that belong together") -> JobError:
    return JobError(ExitCode.NOT_PROVEN, "merge", what, do)
