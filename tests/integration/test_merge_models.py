"""The merge on tiny models of real architectures: equal to PEFT's, loadable, and honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file

from job.errors import ExitCode, JobError
from job.merge.mxfp4 import quantise
from job.merge.stage import merge_folders
from job.stop import Stop

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied, rslora, patterns": (
        "qwen2",
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.mlp.up_proj": 5}},
    ),
    "head trained whole, tied": (
        "qwen2", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "embedding trained whole, tied": (
        "qwen2", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "embedding adapted, tied": ("smollm2", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding and head adapted": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "experts": ("gpt_oss", {}, {"target_parameters": merging.EXPERTS}),
    "one expert parameter": (
        "gpt_oss", {}, {"target_parameters": ["1.mlp.experts.down_proj"], "rank_pattern": {}},
    ),
    "square experts": (
        "gpt_oss", {"intermediate_size": 64}, {"target_parameters": merging.EXPERTS},
    ),
    "experts of an MXFP4 base": (
        "gpt_oss", {"mxfp4": True}, {"target_parameters": merging.EXPERTS},
    ),
    "experts that lie one by one": (
        "qwen3_moe", {}, {"target_parameters": merging.EXPERTS},
    ),
}  # fmt: skip


def run(
    tmp: Path, arch: str, model: dict[str, Any], lora: dict[str, Any], fmt: Any = "base"
) -> Any:
    tiny.tiny_model(tmp / "base", arch, max_shard_size="150KB", **model)
    merging.write_adapter(tmp / "base", tmp / "adapter", **lora)
    return merge_folders(tmp / "adapter", tmp / "base", tmp / "out", fmt, Stop())


@pytest.mark.parametrize("case", CASES)
def test_merged_in_fp32_equals_peft(case: str, tmp_path: Path) -> None:
    """Every weight is PEFT's own to 1e-6, every key landed, and from_pretrained misses none."""
    arch, model, lora = CASES[case]
    merged = run(tmp_path, arch, model, lora, "fp32")
    found = merging.load(tmp_path / "out").state_dict()
    expected = merging.peft_merged(tmp_path / "base", tmp_path / "adapter")
    both_tied = "tied" in case and "embedding adapted" not in case and "whole" not in case
    for name, value in expected.items():
        # PEFT's merge writes an adapted embedding into the tied head as well, which its forward
        # does not; the logits below decide.
        if name != "lm_head.weight" or both_tied:
            assert (value - found[name]).abs().max() < 1e-6, name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = merging.load(tmp_path / "out")(ids).logits
    adapted = merging.peft_logits(tmp_path / "base", tmp_path / "adapter", ids)
    assert (logits - adapted).abs().max() < 1e-4
    assert merged["keys_landed"] == len(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert merged["logits"]["max_difference"] < 1e-4
    assert merged["delta_kept"] == pytest.approx(1, abs=1e-5)


def test_bf16_merge_rounds_once_and_tells_what_it_kept(tmp_path: Path) -> None:
    """A bf16 merge is base + delta in fp32, rounded; the report has the share that survived."""
    merged = run(tmp_path, "llama", {"dtype": torch.bfloat16}, {})
    expected = merging.peft_merged(tmp_path / "base", tmp_path / "adapter")
    for name, value in merging.load(tmp_path / "out", torch.bfloat16).state_dict().items():
        rounded = expected[name].bfloat16()
        assert (value != rounded).float().mean() < 1e-3, name
    assert 0.98 < merged["delta_kept"] < 1.02
    assert merged["logits"]["kl_merged"] < 0.1 * merged["logits"]["kl_base"]
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert len(report["tensors"]) == 14
    assert set(report["delta_norms"]) == {"0", "1"}


def test_delta_that_bf16_would_lose_is_refused(tmp_path: Path) -> None:
    """Weights that rounding swallows are no merged model: 70, with figures and the mend."""
    tiny.tiny_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    merging.write_adapter(tmp_path / "base", tmp_path / "adapter", scale=0.0005)
    with pytest.raises(JobError, match=r"KL\(adapter, merged\).*merge.format: fp32") as refused:
        merge_folders(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", "base", Stop())
    assert refused.value.code is ExitCode.NOT_PROVEN
    assert not (tmp_path / "out").exists()


def test_base_config_and_tokenizer_are_copied_not_rewritten(tmp_path: Path) -> None:
    """Landmine 7: no trainer or library puts use_cache, a loss weight or a version into them."""
    run(tmp_path, "gpt_oss", {"dtype": torch.bfloat16}, {})
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*names, "generation_config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_mxfp4_base_merges_to_experts_that_load(tmp_path: Path) -> None:
    """Landmine 9: no ``*_blocks`` that are bf16, no experts at random, no quantization_config."""
    run(tmp_path, "gpt_oss", {"mxfp4": True}, {"target_parameters": merging.EXPERTS})
    before = json.loads((tmp_path / "base/config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert before.pop("quantization_config")
    assert after == before
    names = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert not [name for name in names if name.endswith(("_blocks", "_scales"))]
    expected = merging.peft_merged(tmp_path / "base", tmp_path / "adapter")
    for name, value in merging.load(tmp_path / "out", torch.bfloat16).state_dict().items():
        assert (value.float() - expected[name]).abs().max() < 0.02, name


def test_a_head_of_its_own_is_told_in_the_config(tmp_path: Path) -> None:
    """Else a loader that believes the config would tie the trained head to the embedding again."""
    run(tmp_path, "qwen2", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    before = json.loads((tmp_path / "base/config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == before | {"tie_word_embeddings": False}
    assert before["tie_word_embeddings"]


def test_index_counts_bytes(tmp_path: Path) -> None:
    """``total_size`` is the bytes of all tensors, and the shards have nothing else in them."""
    merged = run(tmp_path, "llama", {}, {})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = [t for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).items()]
    size = sum(value.numel() * value.element_size() for _, value in tensors)
    assert index["metadata"]["total_size"] == size == merged["size_bytes"]
    assert sorted(index["weight_map"]) == sorted(name for name, _ in tensors)


def test_mxfp4_preserve_keeps_experts_byte_for_byte(tmp_path: Path) -> None:
    """Where experts are not adapted, their blocks and scales stay, and so does the config."""
    run(tmp_path, "gpt_oss", {"mxfp4": True}, {}, "mxfp4-preserve")
    name = "model-00002-of-00002.safetensors"
    before, after = load_file(tmp_path / "base" / name), load_file(tmp_path / "out" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    merging.load(tmp_path / "out")


def test_mxfp4_preserve_refuses_adapted_experts_with_the_measured_loss(tmp_path: Path) -> None:
    """What requantising would lose is told in per cent, and nothing is written."""
    lora = {"target_parameters": merging.EXPERTS, "scale": 0.02}
    with pytest.raises(JobError, match=r"lose \d+\.\d% of what was trained") as refused:
        run(tmp_path, "gpt_oss", {"mxfp4": True}, lora, "mxfp4-preserve")
    assert refused.value.code is ExitCode.NOT_PROVEN
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))


def test_mxfp4_preserve_needs_an_mxfp4_base(tmp_path: Path) -> None:
    """A bf16 base has nothing to preserve: 78."""
    with pytest.raises(JobError, match="no MXFP4 checkpoint") as refused:
        run(tmp_path, "llama", {}, {}, "mxfp4-preserve")
    assert refused.value.code is ExitCode.CONFIG


def test_what_is_mxfp4_already_stays_exactly() -> None:
    """Requantising a matrix that MXFP4 holds changes nothing: the loss measured is the delta's."""
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    matrix = steps[torch.randint(0, 8, (16, 64))] * 2.0 ** torch.randint(-6, -2, (16, 1))
    assert (quantise(matrix.numpy()) == matrix.numpy()).all()
