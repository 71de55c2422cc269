"""Layers computed anew in the backward pass cost a third more time: only where memory asks for it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import structlog
import torch

from job.config import JobConfig
from job.estimate import Shape, recomputes
from job.train.collator import Collator, build_masks
from job.train.loss import summed_loss
from job.train.memory import is_lack
from job.train.model import base_of
from job.train.peers import Peers

log = structlog.get_logger()

SPARE = 0.08
"""Share of a GPU's memory that stays free: fragments, and what libraries take later."""
MOMENTS_BYTES = 8
"""Of AdamW, for each trained weight: they come after the first step."""


def pick_recompute(
    model: Any, rows: Any, collate: Collator, job: JobConfig, shape: Shape, peers: Peers
) -> bool:
    """Return whether to recompute: as the job file says, else whether a step does not fit without.

    On a GPU the largest batch is tried. On a CPU it is estimated: a kernel kills without a word.
    Ranks that share the base out recompute: one out of memory would leave the others waiting.
    """
    wish = job.train.gradient_checkpointing
    if wish != "auto":
        return wish
    if job.device == "cpu" or job.train.sharding != "none":
        longest = max(sum(counts) for counts in rows.with_format(None)["lengths"])
        recompute, reason = recomputes(job, shape, longest), "by estimate"
    else:
        lack = memory_lack(model, largest_batch(rows, collate, job.train.batch_size), job.device)
        recompute, reason = peers.any(lack is not None)[0], lack or "the largest batch was tried"
    log.info("recompute_picked", recompute=recompute, reason=reason)
    return recompute


def largest_batch(rows: Any, collate: Collator, batch_size: int) -> dict[str, torch.Tensor]:
    """Return the longest rows as one batch."""
    lengths = [sum(counts) for counts in rows.with_format(None)["lengths"]]
    longest = np.argsort(lengths)[-batch_size:]
    plain = rows.with_format("numpy")
    return collate([plain[int(index)] for index in longest])


def memory_lack(model: Any, batch: dict[str, torch.Tensor], device: str) -> str | None:
    """Return why a step on ``batch`` that keeps its activations does not fit, or None if it does."""
    base, training = base_of(model), model.training
    model.train()
    if device == "cuda":
        # What allocates beside torch (cuBLAS, Triton) would end otherwise than torch does.
        torch.cuda.set_per_process_memory_fraction(1 - SPARE)
    try:
        _forward_and_back(base, {name: it.to(device) for name, it in batch.items()}, device)
        return _too_full(model) if device == "cuda" else None
    except RuntimeError as error:
        if not is_lack(error):
            raise
        return str(error).strip().splitlines()[0][:160]
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        gc.collect()
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


def _forward_and_back(base: Any, inputs: dict[str, torch.Tensor], device: str) -> None:
    labels, _, documents = (inputs.pop(name, None) for name in ("labels", "real", "documents"))
    dtype = base.get_input_embeddings().weight.dtype
    if documents is not None:
        inputs["attention_mask"] = build_masks(documents, base.config.get_text_config(), dtype)
    assert labels is not None
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        total, _ = summed_loss(base, inputs, labels, aux=False)
    total.backward()


def _too_full(model: Any) -> str | None:
    """Return how full the GPU was at the peak, if that is too full."""
    trained = sum(it.numel() for it in model.parameters() if it.requires_grad)
    # What the peak took stays reserved until it is given back.
    free, total = torch.cuda.mem_get_info()
    if free - trained * MOMENTS_BYTES >= SPARE * total:
        return None
    return f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB were taken"
