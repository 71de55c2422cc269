"""Expert LoRA without folding: the same outputs, gradients and files as PEFT's own."""

from pathlib import Path

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from job.train.experts import GroupedParamWrapper, use_grouped_lora

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(
    folder: Path, *, grouped: bool, rank: int = 4, dtype: torch.dtype = torch.float32
) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, target_modules=["q_proj"], target_parameters=PARAMETERS
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    if grouped:
        assert use_grouped_lora(model) == 2 * model.config.num_hidden_layers
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(48).view(2, 24) % 90 + 5
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


@pytest.mark.parametrize("arch", ["gpt_oss", "qwen3_moe"])
def test_outputs_and_gradients_equal_pefts(tmp_path: Path, arch: str) -> None:
    """In fp32 nothing tells the two apart but rounding, for both layouts of expert weights."""
    tiny.tiny_model(tmp_path, arch)
    logits, gradients = run(adapted(tmp_path, grouped=False))
    ours, our_gradients = run(adapted(tmp_path, grouped=True))
    assert our_gradients.keys() == gradients.keys()
    torch.testing.assert_close(ours, logits, atol=2e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        difference = (our_gradients[name] - gradient).abs().max().item()
        assert difference < 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("rank", [3, 12])
def test_a_rank_that_the_kernel_does_not_take_is_filled_up(tmp_path: Path, rank: int) -> None:
    """grouped_mm wants rows of whole 16 bytes, 8 columns in bf16; every factor has its gradient."""
    tiny.tiny_model(tmp_path, "gpt_oss", dtype=torch.bfloat16)
    model = adapted(tmp_path, grouped=True, rank=rank, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, gradients = run(model)
    factors = {n: p.shape for n, p in model.named_parameters() if "experts" in n and "lora_" in n}
    assert {name: gradients[name].shape for name in factors} == factors
    assert all(gradients[name].abs().max() > 0 for name in factors)


def test_no_copy_of_the_experts_is_made(tmp_path: Path) -> None:
    """No tensor of a whole expert stack's size is allocated in forward and backward."""
    tiny.tiny_model(tmp_path, "gpt_oss")

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        stacks = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape in shapes and not out._is_view():
                self.stacks += 1
            return out

    def stacks(*, grouped: bool) -> int:
        model = adapted(tmp_path, grouped=grouped)
        with Largest() as counted:
            run(model)
        return counted.stacks

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    shapes = {
        p.shape for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))
    }
    assert stacks(grouped=False) > 0
    assert stacks(grouped=True) == 0


def test_the_saved_adapter_is_pefts(tmp_path: Path) -> None:
    """The same keys and values, loaded by PEFT without our code."""
    tiny.tiny_model(tmp_path / "base", "gpt_oss")
    model = adapted(tmp_path / "base", grouped=True)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not any(isinstance(m, GroupedParamWrapper) for m in loaded.modules())
    ids = torch.arange(24).view(1, 24) + 5
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=2e-5, rtol=1e-4
        )


def test_a_disabled_adapter_is_the_base(tmp_path: Path) -> None:
    """The judge's *before* is the base itself, also with grouped experts."""
    tiny.tiny_model(tmp_path, "gpt_oss")
    model = adapted(tmp_path, grouped=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(24).view(1, 24) + 5
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
