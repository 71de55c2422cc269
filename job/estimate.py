"""What a run will need, before it runs: steps, memory by terms, disk by files. Torch-free arithmetic.

The sizes come from the model built on torch's meta device (:func:`measure`), which has every name
and shape and no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.artifacts import Source
from job.config import JobConfig, TrainSection
from job.errors import ExitCode, JobError

TILE_BYTES = 256 << 20  # of the loss, see job.train.loss
CUDA_BYTES = 1.2e9
"""Context, cuBLAS workspaces and what the allocator keeps apart."""
CPU_BYTES = 0.6e9
"""Python, torch and the libraries themselves."""
KEPT_SHARE = 0.5
"""Of a machine's memory, for a training that keeps all its activations: others live there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that memory depends on."""

    parameters: int
    whole: int
    """Parameters outside the layers, embeddings and head: no sharding shares them out."""
    adapted: int
    """Parameters that are trained: the adapter's, and whole modules'."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP that one token takes, over all its experts."""
    heads: int
    head_dim: int
    kv_heads: int
    vocabulary: int
    bytes_each: int
    """Of a frozen weight while training."""
    fused_attention: bool
    """Whether scores are never written out whole."""


def measure(job: JobConfig, model: Source) -> Shape:
    """Build base and adapter without weights, check the job file's names against it, and measure.

    Raises:
        JobError: 64 without the train extra, 66 for an architecture that is not known, 78 for a
            name that the model has not, with the near misses.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from job.train.lora import add_lora
        from job.train.model import pick_attention, pick_dtype, require_plain, require_router
    except ModuleNotFoundError as error:
        what = f"names and memory are not checked: {error.name} is not installed"
        raise JobError(ExitCode.USAGE, "check", what, "pip install 'lora-job[train]'") from None
    try:
        config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
        dtype = pick_dtype(job.model.dtype, config, job.device)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise JobError(
            ExitCode.NOT_FOUND, "model.source", f"is no model that is known here: {words}",
            "choose an architecture that transformers has",
        ) from error  # fmt: skip
    require_plain(config, job.merge.format)
    attention, _ = pick_attention(job.model.attention, config, job.device)
    require_router(config, job.train.router_aux_loss_coef)
    sizes = {name: p.numel() for name, p in base.named_parameters()}
    with torch.device("meta"):
        wrapped = add_lora(base, job.lora, seed=job.seed)
    _require_mergeable(wrapped, job)
    adapted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    text = config.get_text_config()
    return Shape(
        parameters=sum(sizes.values()),
        whole=sum(size for name, size in sizes.items() if ".layers." not in name),
        adapted=adapted,
        bytes_each=dtype.itemsize,
        fused_attention=attention != "eager",
        **_widths(text),
    )


def _require_mergeable(wrapped: Any, job: JobConfig) -> None:
    """Refuse layers whose weights lie the other way (GPT-2's Conv1D): the merge would, at the end."""
    if job.merge.format != "none" and wrapped.peft_config["default"].fan_in_fan_out:
        what, do = (
            "its adapted layers are Conv1D, which is not merged here",
            "set merge.format: none",
        )
        raise JobError(ExitCode.CONFIG, "model.source", what, do)


MLP_WIDTHS = (
    "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size",
)  # fmt: skip


def _widths(text: Any) -> dict[str, int]:
    """Return the widths of a transformers text config."""
    experts = getattr(text, "num_experts_per_tok", None) or 1
    # By the names that architectures have for it; GPT-2's own default is the last.
    named = (getattr(text, name, None) for name in MLP_WIDTHS)
    one = next(filter(None, named), 4 * text.hidden_size)
    heads = text.num_attention_heads
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": experts * (max(one) if isinstance(one, list | tuple) else one),
        "heads": heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "vocabulary": text.vocab_size,
    }


def planned_steps(section: TrainSection, num_rows: int, num_processes: int) -> int:
    """Return the optimiser steps that the job file asks for, on ``num_rows`` rows."""
    if section.max_steps is not None:
        return section.max_steps
    batches = math.ceil(num_rows / section.batch_size)
    at_once = section.gradient_accumulation * num_processes
    return math.ceil(section.epochs * math.ceil(batches / at_once))


def recomputes(job: JobConfig, shape: Shape, longest: int) -> bool:
    """Return whether layers will be computed anew in the backward pass, as far as can be told here.

    A GPU is not asked: there the training tries, and this says what takes the least memory.
    """
    wish = job.train.gradient_checkpointing
    if wish != "auto":
        return wish
    here = available_bytes(job.device)
    if here is None or job.train.sharding != "none":
        return True
    return sum(memory(job, shape, longest, recompute=False).values()) > KEPT_SHARE * here


def memory(
    job: JobConfig, shape: Shape, longest: int, *, recompute: bool | None = None
) -> dict[str, int]:
    """Return the peak of training in bytes, by terms: on each GPU, or of all ranks on a CPU.

    Args:
        job: The job file.
        shape: Sizes of base and adapter.
        longest: Tokens of the longest row, T.
        recompute: Whether layers are computed anew; by itself what :func:`recomputes` says.
    """
    if recompute is None:
        recompute = recomputes(job, shape, longest)
    rows, each = job.train.batch_size, shape.bytes_each
    tokens = rows * longest
    attention = tokens * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    # Two norms and two residuals; gate, up, their product; queries, keys, values, output.
    layer = (4 * tokens * shape.hidden + 3 * tokens * shape.intermediate + attention) * each
    if not shape.fused_attention:
        # Scores, their softmax in fp32, and its gradient.
        layer += rows * shape.heads * longest**2 * (each + 8)
    kept = shape.layers * tokens * shape.hidden * each
    activations = kept + 2 * layer if recompute else shape.layers * layer
    tile = min(TILE_BYTES, tokens * shape.vocabulary * 4)
    terms = {
        "weights": _held_parameters(job, shape) * each,
        "adapter": shape.adapted * 4,
        "gradients": shape.adapted * 4,
        "optimizer": shape.adapted * 8,
        "activations": activations,
        "logits": 3 * tile + 2 * tokens * shape.hidden * 4,
        "runtime": int(CUDA_BYTES if job.device == "cuda" else CPU_BYTES),
    }
    here = (job.train.num_processes or 1) if job.device == "cpu" else 1
    return {name: size * here for name, size in terms.items()}


def _held_parameters(job: JobConfig, shape: Shape) -> int:
    """Return the base's parameters that one rank holds at once."""
    if job.train.sharding == "none":
        return shape.parameters
    # Two, if the job file leaves it open: the least that can share.
    ranks = job.train.num_processes or 2
    layers = shape.parameters - shape.whole
    # One layer computes while the next is fetched.
    return shape.whole + math.ceil(layers / ranks + 2 * layers / shape.layers)


def disk(
    job: JobConfig, shape: Shape, *, model_bytes: int, data_bytes: int, tokens: int
) -> dict[str, int]:
    """Return what a run writes beside what is read in place, in bytes, by kinds.

    Args:
        job: The job file.
        shape: Sizes of base and adapter.
        model_bytes: What is downloaded of the model.
        data_bytes: What is downloaded of the data.
        tokens: In train.arrow and held_out.arrow.
    """
    each = {"fp32": 4, "bf16": 2, "none": 0}.get(job.merge.format, shape.bytes_each)
    merged = model_bytes if job.merge.format == "mxfp4-preserve" else shape.parameters * each
    return {
        "model": model_bytes,
        "data": data_bytes,
        "tokens": 8 * tokens,
        # Two stay, a third is written; each has the adapter and two moments.
        "checkpoints": 3 * shape.adapted * 12,
        "adapter": shape.adapted * 4,
        "merged": merged,
    }


def available_bytes(device: str) -> int | None:
    """Return the memory of this machine (and not of another's GPU), or None."""
    if device != "cpu":
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    return total if text == "max" else min(total, int(text))
