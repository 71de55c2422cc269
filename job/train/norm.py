"""RMSNorm in as few passes over the hidden states as it takes, forward and backward.

transformers writes it out operation by operation: on a CPU most of what a step does beside its
matrix products, on a GPU eight kernels where torch has one. Each norm of a frozen base is replaced
only if it is that computation, which is tried on random numbers.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch import nn
from torch.nn import functional

log = structlog.get_logger()


class _FrozenNorm(torch.autograd.Function):
    """x [..., n] and weight [n], which is not trained → x · weight / sqrt(mean(x²) + eps)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        scaled = outputs[0] * weight
        along = (scaled * x).sum(dim=-1, keepdim=True) * inverse.pow(3) / x.shape[-1]
        return scaled.mul_(inverse).addcmul_(x, along, value=-1), None, None


class FusedNorm(nn.Module):
    """What a transformers norm becomes; weight [n] and eps are its own."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed hidden states, x [..., n], in their dtype."""
        if x.is_cuda:
            with torch.autocast("cuda", enabled=False):
                weight = self.weight.to(x.dtype)
                return functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)
        y: torch.Tensor = _FrozenNorm.apply(x.float(), self.weight.float(), self.variance_epsilon)
        return y.to(x.dtype)


def use_fused_norms(model: nn.Module) -> int:
    """Replace the frozen norms of ``model`` that compute just this, and return how many."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    fitting = [norm for norm in norms if _fits(norm)]
    for norm in fitting:
        # The instance's own class is exchanged: the library's stays as it is.
        norm.__class__ = FusedNorm
    if norms:
        log.info("norms", fused=len(fitting), plain=len(norms) - len(fitting))
    return len(fitting)


@torch.no_grad()
def _fits(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or weight.requires_grad or not hasattr(norm, "variance_epsilon"):
        return False
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(4, *weight.shape, generator=dice).to(weight.device, weight.dtype)
    limit = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(FusedNorm.forward(norm, x), norm(x), rtol=limit, atol=limit)
