"""Attention with sinks: a fused kernel only once it computes what eager attention does.

A sink is one more score in each query's softmax, without a value: most kernels know none, and one
that leaves it out or differentiates it wrongly still trains, to something else. So each candidate is
compared on this very GPU, forward and backward, with sinks, packing and window, before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import structlog
import torch
from torch import Tensor

log = structlog.get_logger()

TOKENS = 384
# Largest difference as a share of the largest value. Tensor cores round fp32 to TF32.
LIMITS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}

Kernel = Callable[["Case"], Tensor]
"""Returns [rows, tokens, heads, head_dim]."""


@dataclass(frozen=True)
class Case:
    """One small attention: q [rows, heads, tokens, d], k and v with fewer heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor
    documents: Tensor
    """int [rows, tokens]"""
    window: int | None
    scaling: float


def allow_shapes() -> None:
    """Let a run compile flex attention for each window, mask and length that it meets.

    Past dynamo's limit of 8 it would compute all scores at full size, for the rest of the run, and
    only warn of that.
    """
    from torch._dynamo import config  # seconds, which others need not wait for

    config.recompile_limit = 64


def choose(
    config: Any,
    dtype: torch.dtype,
    device: str,
    *,
    fault_of: Callable[[str, Any, torch.dtype, str], str | None] | None = None,
) -> tuple[str, str]:
    """Return the fastest attention that is right for a model with sinks, and why it is that one."""
    check = fault_of or fault
    faults: list[str] = []
    for name in KERNELS:
        found = check(name, config, dtype, device)
        if found is None:
            passed = "forward and backward are eager's here, sinks and window included"
            return name, "; ".join([passed, *faults])
        faults.append(f"not {name}: {found}")
    return "eager", "; ".join(faults)


def fault(name: str, config: Any, dtype: torch.dtype, device: str) -> str | None:
    """Return why a kernel must not be taken on this device, or None if it may."""
    missing = _missing(name)
    if missing is not None:
        return missing
    packed = name == "flex_attention"
    windows = {None, getattr(config, "sliding_window", None)}
    try:
        for window in sorted(windows, key=str):
            case = make_case(config, dtype, device, window=window, packed=packed)
            worst = difference(KERNELS[name], case)
            if not worst <= LIMITS.get(dtype, LIMITS[torch.bfloat16]):
                return f"differs from eager attention by {worst:.1%} (window: {window})"
    except Exception as error:  # noqa: BLE001 - whatever a kernel can't do here, another one may
        return (
            f"fails here ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})"
        )
    return None


def make_case(
    config: Any, dtype: torch.dtype, device: str, *, window: int | None, packed: bool
) -> Case:
    """Return random inputs in the model's own shape; scores are large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    documents = torch.ones(1, TOKENS, dtype=torch.int64, device=device)
    if packed:
        documents[:, TOKENS // 3 :] = 2
    q, k, v = (draw(1, n, TOKENS, d) for n in (heads, groups, groups))
    sinks = draw(heads).detach()
    return Case(q, k, v, sinks, documents, window, d**-0.5)


def difference(kernel: Kernel, case: Case) -> float:
    """Return the largest difference from the definition: of the output, or of a gradient."""
    direction = torch.randn(
        case.q.transpose(1, 2).shape, generator=torch.Generator().manual_seed(1)
    ).to(case.q)
    wanted = _with_gradients(_definition, case, direction)
    got = _with_gradients(kernel, case, direction)
    shares = [
        float((one.float() - two.float()).abs().max() / two.float().abs().max().clamp(min=1e-6))
        for one, two in zip(got, wanted, strict=True)
    ]
    return float("nan") if any(map(math.isnan, shares)) else max(shares)


def _with_gradients(kernel: Kernel, case: Case, direction: Tensor) -> list[Tensor]:
    out = kernel(case)
    gradients = torch.autograd.grad(out, (case.q, case.k, case.v), direction.to(out.dtype))
    return [out.detach(), *gradients]


def _definition(case: Case) -> Tensor:
    """Compute softmax over the scores and the sink, in fp32."""
    repeats = case.q.shape[1] // case.k.shape[1]
    k, v = (t.float().repeat_interleave(repeats, dim=1) for t in (case.k, case.v))
    place = torch.arange(case.q.shape[2], device=case.q.device)
    back = place[:, None] - place[None, :]
    near = (back >= 0) if case.window is None else (back >= 0) & (back < case.window)
    seen = (case.documents[:, :, None] == case.documents[:, None, :]) & near
    scores = case.q.float() @ k.transpose(-2, -1) * case.scaling
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    sinks = case.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    p = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return (p @ v).transpose(1, 2)


def _flex(case: Case) -> Tensor:
    from transformers.integrations.flex_attention import flex_attention_forward

    from job.train.collator import block_mask

    out, _ = flex_attention_forward(
        SimpleNamespace(training=True),  # all that it asks of the module
        case.q,
        case.k,
        case.v,
        block_mask(case.documents, case.window),
        scaling=case.scaling,
        s_aux=case.sinks,
    )
    return torch.as_tensor(out)


def _flash4(case: Case) -> Tensor:
    from importlib import import_module

    flash_attn_func = import_module("flash_attn.cute").flash_attn_func

    out = flash_attn_func(
        *(t.transpose(1, 2) for t in (case.q, case.k, case.v)),
        softmax_scale=case.scaling,
        causal=True,
        # It counts the keys to the left of the query's own.
        window_size=(None, None) if case.window is None else (case.window - 1, 0),
        learnable_sink=case.sinks,
    )
    return torch.as_tensor(out[0] if isinstance(out, tuple) else out)


def _missing(name: str) -> str | None:
    if name != "flash_attention_4":
        return None
    from transformers.utils import is_flash_attn_4_available

    return None if is_flash_attn_4_available() else "is not installed"


# The fastest for packed rows first: FlashAttention takes no mask of ours, so it trains unpacked.
KERNELS: dict[str, Kernel] = {"flex_attention": _flex, "flash_attention_4": _flash4}
