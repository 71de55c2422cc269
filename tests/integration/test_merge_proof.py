"""Wrong merges, made on purpose: each is caught, by its tensors or by its logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import merging
import pytest
import tiny
import torch

from job.config import MergeSection
from job.errors import ExitCode, JobError
from job.merge import logits
from job.merge.place import Delta
from job.merge.plan import Plan, make_plan
from job.merge.stage import merge_folders
from job.merge.stream import prove_model, write_model
from job.merge.task import cut
from job.stop import Stop

DOWN = "model.layers.1.mlp.experts.down_proj"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss with a square down_proj (in = out), adapted everywhere."""
    folder = tmp_path_factory.mktemp("merge")
    tiny.tiny_model(folder / "base", "gpt_oss", intermediate_size=64, dtype=torch.bfloat16)
    merging.write_adapter(folder / "base", folder / "adapter", target_parameters=merging.EXPERTS)
    return folder


@pytest.fixture(scope="module")
def whole(folders: Path) -> Path:
    """The right merge of the two."""
    plan = make_plan(folders / "adapter", folders / "base", "base")
    write_model(plan, folders / "merged", stop=Stop())
    prove_model(plan, folders / "merged", stop=Stop())
    return folders / "merged"


def flip_one_bit(value: torch.Tensor) -> torch.Tensor:
    value.view(torch.int16).view(-1)[37] ^= 1
    return value


def swap_experts(value: torch.Tensor) -> torch.Tensor:
    return value[[1, 0, *range(2, value.shape[0])]]


def wrong_scale(base: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: (base + 2 * (value.float() - base)).bfloat16()


def half_applied(base: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: torch.cat([value[:3], base[3:].bfloat16()])


@pytest.mark.parametrize("how", ["corrupted", "transposed", "swapped", "scaled", "half", "copied"])
@pytest.mark.parametrize("name", [DOWN, QUERY])
def test_wrong_tensors_fail_the_proof(
    folders: Path, whole: Path, name: str, how: str, tmp_path: Path
) -> None:
    """A merged file that is not round(base + s·B·A) in every weight is refused, with the tensor."""
    base = merging.load(folders / "base").state_dict()[name]
    plan = make_plan(folders / "adapter", folders / "base", "base")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    changes: dict[str, Any] = {
        "corrupted": flip_one_bit,
        "transposed": lambda value: value.mT.contiguous(),
        "swapped": swap_experts,
        "scaled": wrong_scale(base),
        "half": half_applied(base),
        "copied": lambda _: base.bfloat16(),
    }
    merging.edit_tensors(tmp_path, name, changes[how])
    with pytest.raises(JobError, match=name) as caught:
        prove_model(plan, tmp_path, stop=Stop())
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_one_bit_of_a_copied_tensor_fails_the_proof(
    folders: Path, whole: Path, tmp_path: Path
) -> None:
    """What the adapter does not touch must be the base's own bytes."""
    plan = make_plan(folders / "adapter", folders / "base", "base")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    merging.edit_tensors(tmp_path, "model.norm.weight", flip_one_bit)
    with pytest.raises(JobError, match=r"model\.norm\.weight"):
        prove_model(plan, tmp_path, stop=Stop())


def test_rows_that_nobody_looked_at_fail_the_proof(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not written is not proven either, however right the rest is."""
    monkeypatch.setattr("job.merge.stream.cut", lambda output: list(cut(output))[:-1])
    plan = make_plan(folders / "adapter", folders / "base", "base")
    with pytest.raises(JobError, match="not proven in every weight"):
        write_model(plan, tmp_path / "out", stop=Stop())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def wrongly(plan: Plan, change: Callable[[Delta], dict[str, Any]], only: str) -> Plan:
    """Return the plan with another idea of what the adapter's keys mean."""
    outputs = [
        replace(one, delta=replace(one.delta, **change(one.delta)))
        if one.delta and one.name.endswith(only)
        else one
        for one in plan.outputs
    ]
    return replace(plan, outputs=outputs)


def prove_logits(plan: Plan, folder: Path) -> None:
    found = logits.compare(plan, folder, logits.fixed_prompts(300), stop=Stop())
    logits.judge(found, plan, MergeSection())


MISTAKES: dict[str, tuple[str, Callable[[Delta], dict[str, Any]]]] = {
    "a square down_proj transposed": ("down_proj", lambda _: {"flipped": False}),
    "scaled twice": ("", lambda delta: {"scaling": 2 * delta.scaling}),
    "not scaled": ("q_proj.weight", lambda _: {"scaling": 1.0}),
    "lora_A for the wrong parameter": (
        "q_proj.weight", lambda d: {"a_key": d.a_key.replace("q_proj", "k_proj")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_plan_fails_the_logits(folders: Path, mistake: str, tmp_path: Path) -> None:
    """A key understood wrongly makes consistent tensors; PEFT's own forward knows better."""
    only, change = MISTAKES[mistake]
    right = make_plan(folders / "adapter", folders / "base", "base")
    plan = wrongly(right, change, only)
    write_model(plan, tmp_path, stop=Stop())
    (tmp_path / "config.json").write_bytes((folders / "base/config.json").read_bytes())
    with pytest.raises(JobError) as caught:
        prove_logits(plan, tmp_path)
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_right_plan_passes_in_bf16(folders: Path, tmp_path: Path) -> None:
    """The same base and adapter, merged as they are, are proven."""
    merged = merge_folders(folders / "adapter", folders / "base", tmp_path / "out", "base", Stop())
    assert merged["logits"]["same_top_token"] > 0.9


def test_logits_hold_one_layer_at_a_time(folders: Path) -> None:
    """Before and after a forward no base weight is in memory; in a layer's turn only its own are."""
    model = logits.empty_peft_model(folders / "base", folders / "adapter")
    logits._load_adapter(model, folders / "adapter", torch.float64)
    base = model.get_base_model()
    logits._stream_weights(model, folders / "base", base, torch.float64, Stop())
    loaded: list[set[str]] = []

    def look(*_: Any) -> None:
        real = [n for n, p in model.named_parameters() if not p.is_meta and "lora" not in n]
        loaded.append({".".join(name.split(".")[3:5]) for name in real})

    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(look)
    logits._logits(model, torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool))
    look()
    assert loaded == [{"layers.0"}, {"layers.1"}, set()]
