"""MXFP4 on disk becomes plain weights: transformers' own to the last bit, at the model's memory."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from job.train.model import load_base
from job.train.mxfp4 import dequantise


def peak_bytes(call):
    """Return the most memory that tensors took at once while ``call`` ran, and its result."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_transformers_own_bit_by_bit(dtype):
    """All half bytes, and all scales down to where floats end."""
    dice = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 4, 16), generator=dice, dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, 64, 4), generator=dice, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    assert torch.equal(dequantise(blocks, scales, dtype).view(bits), expected.view(bits))


def test_a_checkpoint_loads_as_transformers_loads_it(tmp_path):
    """Every tensor of a tiny gpt-oss, blocks and scales in different shards."""
    folder = tiny.tiny_model(tmp_path, "gpt_oss", mxfp4=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    ours = load_base(folder, dtype="bfloat16", device="cpu")[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """At most 5 % more, though one stack of experts is a ninth of the model."""
    folder = tiny.tiny_model(
        tmp_path, "gpt_oss", mxfp4=True, num_hidden_layers=6, hidden_size=128,
        intermediate_size=256, num_local_experts=32,
    )  # fmt: skip
    peak, (model, _) = peak_bytes(lambda: load_base(folder, dtype="bfloat16", device="cpu"))
    # The files are mapped into memory, not read into it; torch counts them all the same.
    mapped = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert peak - mapped < 1.05 * sum(p.nbytes for p in model.parameters())
