"""A linear layer with its adapter in one: y = xWᵀ + s(xAᵀ)Bᵀ without the products in between.

PEFT's own layer makes s·(xAᵀ)Bᵀ, scales it and adds it, each as large as y, and again for the
gradients. Here the small products are added into the large ones where those are computed. The
layer is PEFT's in everything else: names, keys, saving, merging.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn import functional


class _FusedLora(torch.autograd.Function):
    """x [n, in], weight [out, in] (frozen), a [r, in], b [out, r] → [n, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return functional.linear(x, weight, bias).addmm_(low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = outputs
        x, weight, a, b, low = ctx.saved_tensors
        scaled = (gradient @ b).mul_(ctx.scale)
        into_x = (gradient @ weight).addmm_(scaled, a) if ctx.needs_input_grad[0] else None
        into_b = (gradient.T @ low).mul_(ctx.scale)
        return into_x, None, None, scaled.T @ x, into_b, None


class FusedLinear(Linear):
    """PEFT's LoRA layer of a frozen ``nn.Linear``, faster where nothing special is asked of it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, x [..., in] → [..., out]."""
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        weight, a, b = self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = self.base_layer.bias
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            y = _FusedLora.apply(
                flat, weight.to(dtype), bias, a.to(dtype), b.to(dtype), self.scaling[name]
            )
        return y.view(*x.shape[:-1], -1)

    def _plain_adapter(self) -> str | None:
        """Return the one adapter that is active, unless something needs PEFT's own way."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        dropout = self.lora_dropout[names[0]]
        drops = self.training and not isinstance(dropout, torch.nn.Identity)
        frozen = type(self.base_layer) is torch.nn.Linear and not any(
            p.requires_grad for p in self.base_layer.parameters()
        )
        biased = self.lora_B[names[0]].bias is not None
        return names[0] if frozen and not drops and not biased else None


def fused_linear(
    target: Any, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> FusedLinear | None:
    """Make the layer for PEFT's dispatcher; None leaves a targeted parameter to PEFT."""
    if parameter_name is not None:
        return None
    return FusedLinear(target, adapter_name, config=config, **kwargs)
