"""The loss: exactly cross-entropy, only where labels are, and nothing that nobody asked for."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from job.train import loss as loss_module
from job.train.loss import balance_loss, summed_loss
from job.train.model import load_base


@pytest.mark.parametrize("tile_bytes", [4096, 256 << 20])
def test_it_equals_cross_entropy_with_its_gradient(tmp_path, monkeypatch, tile_bytes):
    """In one tile or many, value and gradient are those of the plain computation."""
    monkeypatch.setattr(loss_module, "TILE_BYTES", tile_bytes)
    model, _ = load_base(tiny.tiny_model(tmp_path, "llama"), device="cpu")
    ids = torch.randint(0, 400, (2, 20))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.lm_head.weight.requires_grad_(False)
    logits = model(ids).logits[:, :-1].reshape(-1, model.config.vocab_size)
    expected = functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    (wanted,) = torch.autograd.grad(expected, weight)
    got, _ = summed_loss(model, {"input_ids": ids}, labels, aux=False)
    (gradient,) = torch.autograd.grad(got, weight)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("change", ["trained head", "capped logits", "unknown architecture"])
def test_other_heads_take_the_models_own_logits(tmp_path, monkeypatch, change):
    """A head that is trained, capped or not known is never short-cut."""
    model, _ = load_base(tiny.tiny_model(tmp_path, "gemma3"), device="cpu")
    model.requires_grad_(False)
    if change == "trained head":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    elif change == "capped logits":
        model.config.final_logit_softcapping = 0.5
    else:
        monkeypatch.setattr(loss_module, "KNOWN", frozenset())
    ids = torch.randint(0, 400, (1, 12))
    got, _ = summed_loss(model, {"input_ids": ids}, ids, aux=False)
    logits = model(ids).logits[0, :-1]
    torch.testing.assert_close(got, functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def test_no_supervised_position_is_a_zero_that_can_be_differentiated(tmp_path):
    """A micro-batch without labels adds nothing and does not fail."""
    model, _ = load_base(tiny.tiny_model(tmp_path, "llama"), device="cpu")
    model.lm_head.weight.requires_grad_(False)
    ids = torch.randint(0, 400, (1, 12))
    got, _ = summed_loss(model, {"input_ids": ids}, torch.full_like(ids, -100), aux=False)
    got.backward()
    assert got == 0


@pytest.mark.parametrize("arch", ["gpt_oss", "qwen3_moe"])
def test_the_balance_loss_counts_real_tokens_only(tmp_path, arch):
    """Padding has no say in how experts should be balanced; transformers' own value else."""
    model, _ = load_base(tiny.tiny_model(tmp_path, arch), device="cpu")
    ids = torch.randint(0, 400, (1, 16))
    with torch.no_grad():
        own = model(ids, output_router_logits=True).aux_loss
        padded = torch.cat([ids, ids.new_zeros(1, 9)], dim=1)
        _, router = summed_loss(model, {"input_ids": padded}, padded, aux=True)
        got = balance_loss(model, router, torch.arange(25)[None] < 16)
    torch.testing.assert_close(got, own)
