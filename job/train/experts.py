"""Expert LoRA beside the base experts: grouped x·A·B, never a folded copy of all experts' weights.

PEFT's ``ParamWrapper`` folds ``W + s·B·A`` for every expert in every forward: 1.06 GB for one
gate_up_proj of gpt-oss-20b, again for its recompute, and a dense gradient of the same size in the
backward. Here the wrapper only lends its two factors to the experts module, and an experts
implementation, registered by name with transformers, multiplies the tokens of each expert by them.
The adapter's parameters stay PEFT's own, so what is saved has PEFT's keys and loads anywhere.

Shapes: S token-expert pairs sorted by expert, E experts, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe

log = structlog.get_logger()

NAME = "grouped_lora"
LENT = "_lent_lora_factors"


@dataclass(frozen=True, slots=True)
class Factors:
    """What ``x`` is multiplied by beside one stack of weights."""

    down: Tensor
    """(E, I, r)"""
    up: Tensor
    """(E, r, O)"""
    scaling: float


class GroupedParamWrapper(ParamWrapper):
    """PEFT's wrapper of an expert parameter, but one that lends factors in place of folding them."""

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        assert len(adapters) == 1, "training has one adapter"
        experts = self.get_base_layer()
        lent: dict[str, Factors] = experts.__dict__.setdefault(LENT, {})
        lent[self.parameter_name] = self._factors(adapters[0])
        try:
            yield
        finally:
            del lent[self.parameter_name]

    def _factors(self, adapter: str) -> Factors:
        lhs, rhs, scaling = self.get_delta_factors(adapter)
        # The delta is scaling · lhs @ rhs in the weight's own layout: (E, I, O) where it is
        # transposed, else (E, O, I). The kernel wants rows that lie together.
        if self._did_swap_in_out_features:
            lhs, rhs = rhs.transpose(-2, -1), lhs.transpose(-2, -1)
        # It takes rows of whole 16 bytes: more columns, of nothing, make up a rank's.
        short = -lhs.shape[-1] % (16 // lhs.element_size())
        down, up = functional.pad(lhs, (0, short)), functional.pad(rhs, (0, 0, 0, short))
        return Factors(down.contiguous(), up.contiguous(), scaling)


def use_grouped_lora(model: nn.Module) -> int:
    """Let every adapted expert stack of a PEFT model run grouped, and return how many there are.

    A stack that can't (its experts don't dispatch by transformers' hook) keeps PEFT's fold.
    """
    wrappers = [module for module in model.modules() if type(module) is ParamWrapper]
    fitting = [wrapper for wrapper in wrappers if _fits(wrapper)]
    for wrapper in fitting:
        # The instance's own class is exchanged: the library's stays as it is.
        wrapper.__class__ = GroupedParamWrapper
        wrapper.get_base_layer().config._experts_implementation = NAME  # noqa: SLF001
    if wrappers:
        log.info("expert_lora", grouped=len(fitting), folded=len(wrappers) - len(fitting))
    return len(fitting)


def _fits(wrapper: ParamWrapper) -> bool:
    experts = wrapper.get_base_layer()
    dispatches = hasattr(experts, "_apply_gate") and getattr(experts, "has_gate", False)
    plain = not getattr(experts, "has_post_expert_norm", False)
    return dispatches and wrapper.num_experts > 1 and plain


def grouped_lora_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' weighted outputs, with the lent adapters beside their weights.

    Args:
        self: The experts module of a transformers model.
        hidden_states: (tokens, hidden)
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k)
    """
    num_tokens, hidden = hidden_states.shape
    k = top_k_index.size(-1)
    expert_of, order = torch.sort(top_k_index.reshape(-1))
    experts = torch.arange(1, self.num_experts + 1, device=expert_of.device, dtype=expert_of.dtype)
    offsets = torch.searchsorted(expert_of, experts).to(torch.int32)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0), device=order.device)
    x = _ToExperts.apply(hidden_states, order, inverse, k)
    x = self._apply_gate(_linear(self, "gate_up_proj", x, expert_of, offsets))
    x = _linear(self, "down_proj", x, expert_of, offsets)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # A sum over k in place of index_add: the same every time, also on a GPU.
    x = _FromExperts.apply(x, order, inverse)
    return x.view(num_tokens, k, hidden).sum(dim=1).to(hidden_states.dtype)


class _ToExperts(torch.autograd.Function):
    """(tokens, hidden) → (S, hidden), in the experts' order. Backward is a gather and a sum over k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        (gradient,) = outputs
        return gradient[inverse].view(-1, ctx.k, gradient.shape[-1]).sum(dim=1), None, None, None


class _FromExperts(torch.autograd.Function):
    """(S, hidden) back in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[inverse]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return outputs[0][order], None, None


def _linear(experts: nn.Module, name: str, x: Tensor, expert_of: Tensor, offsets: Tensor) -> Tensor:
    """Return (S, O): each row times its expert's weight, plus bias, plus the lent adapter."""
    weight = getattr(experts, name)
    weight = weight if experts.is_transposed else weight.transpose(-2, -1)
    out = moe._grouped_mm(x, weight, offs=offsets)  # noqa: SLF001  picks the kernel that is there
    if experts.has_bias:
        out.add_(getattr(experts, f"{name}_bias")[expert_of])
    factors: Factors | None = experts.__dict__.get(LENT, {}).get(name)
    if factors is None:
        return out
    low = moe._grouped_mm(x, factors.down, offs=offsets) * factors.scaling  # noqa: SLF001
    return out.add_(moe._grouped_mm(low, factors.up, offs=offsets))  # noqa: SLF001


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_lora_experts)
