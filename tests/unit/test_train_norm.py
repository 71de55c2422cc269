"""The fused norms: transformers' numbers in fewer passes, and only where they are that computation."""

from __future__ import annotations

import pytest
import structlog
import tiny
import torch

from job.config import LoraSection
from job.train.lora import add_lora
from job.train.model import load_base
from job.train.norm import FusedNorm, _FrozenNorm, use_fused_norms
from job.train.preflight import packing_fault


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), grads


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_a_model_computes_what_it_did(tmp_path, arch):
    """Loss, every adapter's gradient, and packed documents as they are alone."""
    model = add_lora(
        load_base(tiny.tiny_model(tmp_path, arch), device="cpu")[0], LoraSection(rank=2), seed=0
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    expected_loss, expected = gradients(model, ids)
    fused = use_fused_norms(model)
    # Gemma's norm multiplies by 1 + weight: it stays as it is.
    assert bool(fused) == (arch != "gemma3")
    loss, got = gradients(model, ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    documents = [row.numpy() for row in ids]
    assert packing_fault(model, documents, 0) is None


def test_its_gradient_is_right_by_finite_differences():
    """Against the definition, in fp64."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=dice).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, generator=dice)
    assert torch.autograd.gradcheck(lambda x: _FrozenNorm.apply(x, weight, 1e-3), (x,))


@pytest.mark.parametrize("why", ["trained", "another computation"])
def test_other_norms_stay_as_they_are(tmp_path, why):
    """One whose weight is trained, or that computes something else under a like name."""
    model, _ = load_base(tiny.tiny_model(tmp_path, "llama"), device="cpu")
    model.requires_grad_(False)
    odd = model.model.norm
    if why == "trained":
        odd.weight.requires_grad_()
    else:
        odd.__class__ = type("OddRMSNorm", (type(odd),), {"forward": lambda _, x: 2 * x})
    with structlog.testing.capture_logs() as logs:
        assert use_fused_norms(model) == 4
    assert not isinstance(odd, FusedNorm)
    assert logs == [{"event": "norms", "fused": 4, "plain": 1, "log_level": "info"}]


def test_in_bf16_it_rounds_as_transformers_does_or_better(tmp_path):
    """A bf16 model's output stays within bf16's rounding."""
    model, _ = load_base(tiny.tiny_model(tmp_path, "llama"), device="cpu", dtype="bfloat16")
    model.requires_grad_(False)
    norm = model.model.norm
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), 1e-6)
    before = (norm(x) - exact).abs().mean()
    assert use_fused_norms(model) == 5
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) - exact).abs().mean() <= before
