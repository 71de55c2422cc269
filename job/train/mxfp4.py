"""MXFP4 checkpoints as plain weights, one expert at a time.

transformers dequantises a whole stack of experts at once, through indices of four bytes for each
half byte: gigabytes beside a gpt-oss-20b that already fills half of a card. Its quantizer may be
replaced by name, so this one differs in that operation alone. Values are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

METHOD = "mxfp4_by_expert"


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights (experts, inputs, outputs) that the packed ones stand for.

    Args:
        blocks: uint8 (experts, outputs, groups, 16), two values in each byte, the lower first.
        scales: uint8 (experts, outputs, groups), powers of two, 127 being one.
        dtype: of the result.
    """
    experts, outputs, groups, packed = blocks.shape
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=blocks.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    out = torch.empty(experts, groups * packed * 2, outputs, dtype=dtype, device=blocks.device)
    for weight, block, scale in zip(out, blocks, scales, strict=True):
        found = pairs[block.int()].view(outputs, groups, packed * 2)
        torch.ldexp(found, (scale.int() - 127)[..., None], out=found)
        weight.copy_(found.view(outputs, -1).T)
    return out


class _ByExpert(Mxfp4Dequantize):
    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        found = {name.rpartition("_")[2]: tensor for name, tensor in input_dict.items()}
        blocks, scales = (
            found[key][0] if isinstance(found[key], list) else found[key]
            for key in ("blocks", "scales")
        )
        dtype = kwargs["model"].get_parameter(full_layer_name).dtype
        return {full_layer_name: dequantise(blocks, scales, dtype)}


@register_quantization_config(METHOD)
class _Config(Mxfp4Config):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dequantize": True})
        self.quant_method = METHOD


@register_quantizer(METHOD)
class _Quantizer(Mxfp4HfQuantizer):
    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": _ByExpert}


def take_over(config: Any) -> None:
    """Let a model of this transformers config, MXFP4 on disk, be loaded by this module."""
    config.quantization_config = {"quant_method": METHOD}


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """Let transformers read no tensor ahead: packed ones would pile up beside the model."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
