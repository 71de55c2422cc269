"""The fused LoRA layer: PEFT's numbers, PEFT's keys, and PEFT's own way where it must be."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear

from job.config import LoraSection
from job.train.linear import FusedLinear
from job.train.lora import add_lora, save_adapter
from job.train.model import load_base


def pair(folder, arch="qwen2"):
    """Return one base twice: with our layers and with PEFT's, and the same random adapter."""
    tiny.tiny_model(folder, arch)
    ours = add_lora(load_base(folder, device="cpu")[0], LoraSection(rank=3, alpha=5), seed=0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(load_base(folder, device="cpu")[0], config)
    generator = torch.Generator().manual_seed(2)
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
            values[name].data.copy_(parameter.data)
    return ours, theirs


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_it_gives_pefts_loss_and_gradients(tmp_path):
    """In fp32 to rounding, biases of the base (Qwen2) included."""
    ours, theirs = pair(tmp_path)
    assert all(isinstance(m, FusedLinear) for m in ours.modules() if isinstance(m, Linear))
    ids = torch.randint(0, 400, (2, 24))
    (loss, got), (expected_loss, expected) = gradients(ours, ids), gradients(theirs, ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_its_gradients_are_right_by_finite_differences():
    """Against the definition, in fp64."""
    from job.train.linear import _FusedLora

    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, a, b = (
        noise(5, 4).requires_grad_(),
        noise(2, 4).requires_grad_(),
        noise(3, 2).requires_grad_(),
    )
    weight, bias = noise(3, 4), noise(3)
    assert torch.autograd.gradcheck(
        lambda x, a, b: _FusedLora.apply(x, weight, bias, a, b, 1.7), (x, a, b)
    )


@pytest.mark.parametrize("how", ["dropout", "disabled", "merged"])
def test_what_it_cannot_do_is_left_to_peft(tmp_path, monkeypatch, how):
    """Dropout in training, disabled adapters and merged weights."""
    folder = tiny.tiny_model(tmp_path, "llama")
    section = LoraSection(rank=2, dropout=0.5 if how == "dropout" else 0.0)
    base = load_base(folder, device="cpu")[0]
    ids = torch.randint(0, 400, (1, 12))
    plain = base(ids).logits.detach()
    model = add_lora(base, section, seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = model(ids).logits.detach()
    assert (adapted - plain).abs().max() > 0.01
    if how == "disabled":
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
    elif how == "merged":
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    else:
        model.train()
        assert (model(ids).logits - adapted).abs().max() > 0.01


def test_checkpointed_layers_give_the_same_gradients(tmp_path):
    """Recomputed in the backward pass, as on a GPU."""
    ours, _ = pair(tmp_path, "llama")
    ids = torch.randint(0, 400, (1, 16))
    _, expected = gradients(ours.train(), ids)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable()
    _, got = gradients(ours, ids)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_under_autocast_it_computes_in_bf16_and_keeps_fp32_gradients(tmp_path):
    """As on a GPU: a bf16 base, fp32 adapter weights."""
    folder = tiny.tiny_model(tmp_path, "llama")
    model = add_lora(
        load_base(folder, device="cpu", dtype="bfloat16")[0], LoraSection(rank=2), seed=0
    )
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    ids = torch.randint(0, 400, (1, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(g.dtype == torch.float32 and bool(g.count_nonzero()) for g in grads)


def test_its_adapter_is_pefts(tmp_path):
    """Saved by ours, loaded by PEFT's own layers."""
    ours, _ = pair(tmp_path / "m", "llama")
    save_adapter(ours, tmp_path / "a")
    again = PeftModel.from_pretrained(load_base(tmp_path / "m", device="cpu")[0], tmp_path / "a")
    assert not any(isinstance(m, FusedLinear) for m in again.modules())
    ids = torch.randint(0, 400, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(ids).logits, ours.eval()(ids).logits, rtol=1e-5, atol=1e-5
        )
