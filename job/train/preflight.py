"""Before a packed run: are packed documents computed as they are alone? About a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from job.train.collator import Collator, build_masks
from job.train.model import KNOWN, base_of

MAX_TOKENS, MAX_DOCUMENTS = 160, 3
# Of a difference between logits, as a share of the largest: rounding stays far below in fp32.
LIMIT_FP32 = 1e-5
# In bf16 other shapes round otherwise, and a token may take another expert: means count, and against
# the documents alone only gross faults. A leak is looked for at equal shapes, where little differs.
LIMIT_BF16, LIMIT_BF16_LEAK = 0.3, 2e-2


def packing_fault(model: Any, documents: Sequence[np.ndarray], pad_token_id: int) -> str | None:
    """Return why these documents must not be packed for ``model``, or None if they may."""
    config = base_of(model).config.get_text_config()
    if config.model_type not in KNOWN:
        return f"packing is not proven for the architecture {config.model_type}"
    if config._attn_implementation.startswith("flash"):  # noqa: SLF001
        return f"{config._attn_implementation} takes no mask of ours"  # noqa: SLF001
    pack = partial(_packed, model, pad_token_id=pad_token_id)
    documents, packed = list(documents), pack(documents)
    exact = next(base_of(model).parameters()).dtype is torch.float32
    found = _difference(packed, [_alone(model, tokens) for tokens in documents], exact=exact)
    if not found <= (LIMIT_FP32 if exact else LIMIT_BF16):
        return f"packed logits differ by {found:.2g} of the largest from those of documents alone"
    if exact or len(documents) < 2:
        return None
    others = pack([documents[0][::-1], *documents[1:]])
    leak = _difference(packed[1:], others[1:], exact=False)
    if leak <= LIMIT_BF16_LEAK:
        return None
    return f"another document before them changes logits by {leak:.2g} of the largest"


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
def _packed(
    model: Any, documents: Sequence[np.ndarray], *, pad_token_id: int
) -> list[torch.Tensor]:
    """Return each document's logits [tokens, vocabulary], packed into one row."""
    device = next(model.parameters()).device
    dtype = next(base_of(model).parameters()).dtype
    ids, lengths = np.concatenate(documents), [len(tokens) for tokens in documents]
    row = {"input_ids": ids, "labels": ids, "lengths": lengths}
    batch = {k: v.to(device) for k, v in Collator(pad_token_id, packed=True)([row]).items()}
    config = base_of(model).config.get_text_config()
    logits = _evaluated(
        model,
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=build_masks(batch["documents"], config, dtype),
    )
    return list(logits.split(lengths))


@torch.no_grad()
def _alone(model: Any, tokens: np.ndarray) -> torch.Tensor:
    device = next(model.parameters()).device
    return _evaluated(model, input_ids=torch.as_tensor(tokens, device=device)[None])


def _evaluated(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.eval()
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    model.train(training)
    return logits


def _difference(
    ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor], *, exact: bool
) -> float:
    """Return the difference as a share of the scale: of the largest logits, or of their means."""
    reduce = torch.max if exact else torch.mean
    gaps = [float(reduce((a - b).abs())) for a, b in zip(ones, others, strict=True)]
    scale = max(float(reduce(b.abs())) for b in others)
    return max(gaps) / max(scale, 1.0 if exact else 1e-6)
