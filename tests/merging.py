"""What the tests of the merge share: random adapters that PEFT itself writes, and PEFT's answers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model and insist that no key is missing or left over."""
    extra: dict[str, Any] = {}
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager", **extra
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def write_adapter(base: Path, out: Path, *, scale: float = 0.05, **lora: Any) -> Path:
    """Let PEFT write an adapter of random weights for ``base``; ``lora`` goes to LoraConfig."""
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        model.save_pretrained(out)
    return out


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights as PEFT merges them, in fp32, by their names at run time."""
    model = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    return {name: value.detach() for name, value in model.state_dict().items()}


def peft_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of base + adapter, without a merge."""
    with torch.no_grad():
        return PeftModel.from_pretrained(load(base), adapter).eval()(ids).logits


def edit_tensors(folder: Path, name: str, change: Any) -> None:
    """Rewrite the one tensor of a finished model that is called ``name``."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors = {key: value.clone() for key, value in tensors.items()}
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)
