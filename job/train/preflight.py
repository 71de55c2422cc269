"""Before a packed run: are packed documents computed as they are alone? About a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from job.train.collator import Collator, build_masks
from job.train.model import KNOWN, base_of

MAX_TOKENS, MAX_DOCUMENTS = 160, 3
# Largest difference of a logit, as a share of the largest logit. Rounding stays far below, a leak
# is near 1. In bf16 single logits may flip an expert, so the mean counts there.
LIMIT_FP32, LIMIT_BF16 = 1e-5, 2e-2


def packing_fault(model: Any, documents: Sequence[np.ndarray], pad_token_id: int) -> str | None:
    """Return why these documents must not be packed for ``model``, or None if they may."""
    config = base_of(model).config.get_text_config()
    if config.model_type not in KNOWN:
        return f"packing is not proven for the architecture {config.model_type}"
    if config._attn_implementation.startswith("flash"):  # noqa: SLF001
        return f"{config._attn_implementation} takes no mask of ours"  # noqa: SLF001
    worst, scale = _compare(model, list(documents), pad_token_id, config)
    exact = next(base_of(model).parameters()).dtype is torch.float32
    limit = LIMIT_FP32 if exact else LIMIT_BF16
    if worst <= limit * max(scale, 1.0):
        return None
    return f"packed logits differ by {worst:.2g} from those of the documents alone ({scale:.2g})"


def pick_documents(rows: Any) -> list[np.ndarray]:
    """Return the first few documents of packed rows, cut so that the check takes a second."""
    found: list[np.ndarray] = []
    for row in rows.select(range(min(len(rows), MAX_DOCUMENTS))):
        ends = np.cumsum(row["lengths"])
        found += np.split(np.asarray(row["input_ids"]), ends[:-1])
        if len(found) >= MAX_DOCUMENTS:
            break
    # One longer than most windows, so that a sliding layer has something to forget.
    return [tokens[: MAX_TOKENS // (1 + i)] for i, tokens in enumerate(found[:MAX_DOCUMENTS])]


@torch.no_grad()
def _compare(
    model: Any, documents: list[np.ndarray], pad_token_id: int, config: Any
) -> tuple[float, float]:
    """Return the difference and the scale of logits: largest in fp32, mean in bf16."""
    device = next(model.parameters()).device
    dtype = next(base_of(model).parameters()).dtype
    ids = np.concatenate(documents)
    lengths = [len(tokens) for tokens in documents]
    row = {"input_ids": ids, "labels": ids, "lengths": lengths}
    batch = {k: v.to(device) for k, v in Collator(pad_token_id, packed=True)([row]).items()}
    training = model.training
    model.eval()
    packed = (
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=build_masks(batch["documents"], config, dtype),
            use_cache=False,
        )
        .logits[0]
        .float()
    )
    starts = np.cumsum(lengths) - lengths
    difference, scale = 0.0, 0.0
    for start, tokens in zip(starts, documents, strict=True):
        alone = model(input_ids=torch.as_tensor(tokens, device=device)[None], use_cache=False)
        logits = alone.logits[0].float()
        gap = (packed[start : start + len(tokens)] - logits).abs()
        reduce = torch.max if dtype is torch.float32 else torch.mean
        difference = max(difference, float(reduce(gap)))
        scale = max(scale, float(reduce(logits.abs())))
    model.train(training)
    return difference, scale
