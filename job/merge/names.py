"""Names at run time against names in the checkpoint, asked of PEFT and transformers themselves.

PEFT's keys do not name an adapted parameter: wrappers around the parameters of one module are
nested (``experts.base_layer.lora_A``), in the order of ``named_parameters``. And transformers
renames and stacks tensors while loading (``experts.3.up_proj.weight`` becomes rows of slice 3 of
``experts.gate_up_proj``). Both are found on a model without memory (the meta device). Only
adapters that need it come here: it imports torch.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.merge.adapter import CONFIG, PREFIX


@dataclass(frozen=True, slots=True)
class Target:
    """What a pair of factors adapts."""

    parameter: str
    flipped: bool
    """Whether the parameter is (experts, in, out), not (experts, out, in)."""
    experts: int


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that becomes (a part of) a parameter."""

    name: str
    expert: int | None = None
    """Slice of the parameter that it is part of; None if it is the parameter."""
    part: int = 0
    """Which of the tensors that lie one after the other on the slice's first axis."""


def empty_model(base: Path, vocab_size: int | None = None) -> Any:
    """Return the base's model with buffers, but with parameters that take no memory.

    ``vocab_size``: of a model whose embeddings the adapter replaces by larger ones.

    Raises:
        JobError: 78 for a model that transformers does not know.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if vocab_size:
            config.get_text_config().vocab_size = vocab_size
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                # The grouped kernels know no fp64.
                experts_implementation="eager",
            ).eval()
    except (ValueError, KeyError, OSError) as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise JobError(
            ExitCode.CONFIG, str(base), f"transformers can't build it: {what}",
            "take a causal language model that this version of transformers knows",
        ) from error  # fmt: skip


def empty_peft_model(base: Path, adapter: Path, vocab_size: int | None = None) -> Any:
    """Return PEFT's model of base and adapter without weights, the way PEFT would load it."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    model = empty_model(base, vocab_size)
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings and nested parameters: both are handled here.
        warnings.simplefilter("ignore")
        try:
            return PeftModel(model, config, low_cpu_mem_usage=True).eval()
        except ValueError as error:
            what = " ".join(str(error).split())[:300]
            raise JobError(
                ExitCode.CONFIG, str(adapter / CONFIG), f"does not fit this base: {what}",
                "take the base that it was trained on",
            ) from error  # fmt: skip


def find_targets(base: Path, adapter: Path) -> dict[str, Target]:
    """Return what PEFT adapts: the module as named in PEFT's keys → its parameter."""
    targets = {}
    for name, module in empty_peft_model(base, adapter).named_modules():
        if not getattr(module, "lora_A", None):
            continue
        key = name.removeprefix(PREFIX)
        bare = re.sub(r"\.base_layer\b", "", key)
        # Only PEFT's ParamWrapper has these two; a layer of its own has a weight.
        parameter = getattr(module, "parameter_name", "weight")
        experts = getattr(module, "num_experts", 1)
        three_axes = hasattr(module, "parameter_name") and module.get_param().ndim == 3
        swapped = getattr(module, "_did_swap_in_out_features", True)
        targets[key] = Target(f"{bare}.{parameter}", three_axes and not swapped, experts)
    return targets


def find_parts(model: Any, stored: list[str]) -> dict[str, list[Part]]:
    """Return the stored tensors that make each parameter of ``model``, as transformers has it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    known = dict(model.named_parameters(remove_duplicate=False))
    sources = {pattern: one for one in converters for pattern in one.source_patterns}
    parts: dict[str, list[Part]] = {}
    for name in stored:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if pattern is None:
            parts.setdefault(renamed, []).append(Part(name))
        elif (part := _stacked(name, pattern, sources[pattern])) is not None:
            parts.setdefault(renamed, []).append(part)
    return parts


def _stacked(name: str, pattern: str, converter: Any) -> Part | None:
    """Return the place of a per-expert tensor in its stack, or None for another conversion."""
    operations = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
    stacks = [("MergeModulelist", 0), ("Concatenate", 1)]
    if operations != stacks[: len(operations)] or len(converter.target_patterns) != 1:
        return None
    numbers = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if numbers is None:
        return None
    return Part(name, int(numbers[1]), converter.source_patterns.index(pattern))
