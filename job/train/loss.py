"""Cross-entropy where there is something to learn, and nowhere else.

Only supervised positions meet the vocabulary, in tiles. The head is frozen, so its gradient with
respect to the hidden states is made in the same pass, while the tile's probabilities are at hand:
no logits are kept, and none are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from job.train.collator import IGNORED
from job.train.model import KNOWN

TILE_BYTES = 256 << 20


class _FrozenHead(torch.autograd.Function):
    """Sum of -log p(target) over tokens: hidden [n, h], weight [vocabulary, h], targets [n]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor
    ) -> torch.Tensor:
        tile = max(1, TILE_BYTES // (4 * weight.shape[0]))
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), tile):
            part, wanted = hidden[start : start + tile], targets[start : start + tile, None]
            logits = functional.linear(part.to(weight.dtype), weight, bias).float()
            scores = torch.log_softmax(logits, dim=-1)
            total -= scores.gather(1, wanted).sum()
            # d loss / d logits = p - 1[target]
            p = scores.exp_()
            p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
            gradient[start : start + tile] = (p.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def summed_loss(
    base: Any, inputs: dict[str, Any], labels: torch.Tensor, aux: bool
) -> tuple[torch.Tensor, Any]:
    """Return the summed cross-entropy of one batch, and the router's logits if ``aux``.

    Args:
        base: transformers' model for causal language modelling, adapters inside.
        inputs: what its forward takes, without labels.
        labels: int [rows, tokens]; position i is predicted from i - 1.
        aux: whether the router's logits are wanted.
    """
    extra = {"use_cache": False} | ({"output_router_logits": True} if aux else {})
    mask = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][mask]
    if not _head_is_plain(base):
        outputs = base(**inputs, **extra)
        logits = outputs.logits[:, :-1][mask].float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
    else:
        outputs = base.base_model(**inputs, **extra)
        head = base.get_output_embeddings()
        hidden = outputs.last_hidden_state[:, :-1][mask]
        loss = _FrozenHead.apply(hidden, head.weight, head.bias, targets)
    return loss, getattr(outputs, "router_logits", None)


def _head_is_plain(base: Any) -> bool:
    """Whether logits are weight · hidden with a frozen weight: known, not trained, not capped."""
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    capped = getattr(config, "final_logit_softcapping", None)
    plain = isinstance(head, torch.nn.Linear) and not head.weight.requires_grad
    return plain and not capped and config.model_type in KNOWN


def balance_loss(base: Any, router_logits: Any, real: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of a mixture of experts over the real tokens.

    Source: Switch Transformer, equations 4 to 6 (arXiv 2101.03961), as transformers has it.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = base.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    loss: torch.Tensor = load_balancing_loss_func(
        router_logits, experts, config.num_experts_per_tok, real.long()
    )
    return loss
