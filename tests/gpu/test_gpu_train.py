"""Small recipes on a CUDA device, in bf16: they learn, they merge, and the kernels are right."""

from __future__ import annotations

import pytest
import tiny
import torch
import trainbed
from structlog.testing import capture_logs

from job.artifacts import Adapter
from job.merge.stage import merge
from job.train import attention
from job.train.collator import Collator
from job.train.lora import add_lora
from job.train.meters import read_history
from job.train.model import load_base
from job.train.recompute import memory_lack
from job.train.stage import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
EXPERTS = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
# Shapes that grouped kernels and flex attention take: multiples of 16 bytes, head_dim of 64.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def trained(folder, arch, *, packed=True, **sections):
    """Train a tiny bf16 model of ``arch`` on the GPU."""
    model = tiny.tiny_model(folder / "model", arch, dtype=torch.bfloat16, **SHAPE)
    dataset = trainbed.make_dataset(folder / "data", arch, packed=packed)
    sections["data"] = {"packing": packed}
    sections.setdefault("lora", {"dropout": 0})
    sections["train"] = {"epochs": 6, "learning_rate": 3e-3, **sections.get("train", {})}
    job = trainbed.make_job(model, folder, device="cuda", **sections)
    context = trainbed.make_context(job, folder)
    return context, dataset, train(context, trainbed.make_source(model), dataset)


def check_learned(adapter: Adapter) -> None:
    history = read_history(adapter.folder / "history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert all(line["memory_gb"] >= 0 for line in history)


@pytest.mark.parametrize("way", ["grouped", "fold"])
def test_gpt_oss_learns_and_merges(tmp_path, way):
    """Attention and experts, packed, with recomputation; the merge proof holds on what came out."""
    lora = {"dropout": 0, "target_parameters": EXPERTS, "expert_forward": way}
    with capture_logs() as logs:
        context, dataset, adapter = trained(
            tmp_path, "gpt_oss", lora=lora, train={"gradient_checkpointing": True}
        )
    check_learned(adapter)
    (loaded,) = [e for e in logs if e["event"] == "base_loaded"]
    assert loaded["dtype"] == "bfloat16"
    assert any(e["event"] == "packing_checked" for e in logs), logs
    model = trainbed.make_source(tmp_path / "model")
    merged = merge(context, model, dataset, adapter)
    assert merged is not None
    assert merged.report


def test_a_step_that_fits_is_not_recomputed(tmp_path):
    """Tried with the largest batch; a batch that no GPU holds is told, and leaves no gradient."""
    with capture_logs() as logs:
        trained(tmp_path, "llama", train={"gradient_checkpointing": "auto"})
    [picked] = [e for e in logs if e["event"] == "recompute_picked"]
    assert (picked["recompute"], picked["reason"]) == (False, "the largest batch was tried")

    base, _ = load_base(tmp_path / "model", device="cuda", dtype="bfloat16", attention="auto")
    model = add_lora(base, trainbed.make_job(tmp_path, tmp_path).lora, seed=0)
    row = {"input_ids": [5] * 128, "labels": [5] * 128, "lengths": [128]}
    batch = Collator(0, packed=True)([row] * 200_000)
    assert "memory" in str(memory_lack(model, batch, "cuda"))
    assert all(it.grad is None for it in model.parameters())
    assert memory_lack(model, Collator(0, packed=True)([row]), "cuda") is None


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_dense_models_learn_packed(tmp_path, arch):
    """In bf16, each with the attention that a run picks."""
    _, _, adapter = trained(tmp_path, arch)
    check_learned(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_is_eager_attention(dtype):
    """Sinks, window and packing, forward and backward, compiled."""
    config = tiny.tiny_config("gpt_oss", **SHAPE)
    assert attention.fault("flex_attention", config, dtype, "cuda") is None


def test_grouped_experts_are_the_folded_ones(tmp_path):
    """The same first loss, and norms of the deltas that are alike, in bf16."""
    found = {}
    for way in ("grouped", "fold"):
        lora = {"dropout": 0, "target_parameters": EXPERTS, "expert_forward": way}
        _, _, adapter = trained(tmp_path / way, "gpt_oss", lora=lora, train={"max_steps": 3})
        found[way] = read_history(adapter.folder / "history.jsonl")[0]["loss"]
    assert found["grouped"] == pytest.approx(found["fold"], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is here")
def test_two_gpus_train_as_one_does(tmp_path):
    """Ranks by NCCL: the same first loss at the same global batch."""
    losses = []
    for count in (1, 2):
        section = {"num_processes": count, "gradient_accumulation": 2 // count, "max_steps": 3}
        _, _, adapter = trained(tmp_path / str(count), "llama", train=section)
        losses.append(read_history(adapter.folder / "history.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
