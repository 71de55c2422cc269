"""The adapter: names that exist, gradients that arrive, bytes that do not depend on luck."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import PeftModel

from job.artifacts import Source
from job.config import LoraSection
from job.errors import ExitCode, JobError
from job.train.lora import (
    adapters,
    add_lora,
    delta_norms,
    require_gradients,
    require_learned,
    save_adapter,
)
from job.train.model import load_base

EXPERTS = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]


def base_model(folder, arch="gpt_oss", **overrides):
    return load_base(tiny.tiny_model(folder, arch, **overrides), device="cpu")[0]


@pytest.mark.parametrize("names", [["self_attn"], ["input_layernorm"]])
def test_names_of_no_linear_layer_are_a_wrong_setting(tmp_path, names):
    """PEFT's own words, in one line, with 78."""
    with pytest.raises(JobError) as caught:
        add_lora(base_model(tmp_path), LoraSection(target_modules=names), seed=0)
    assert caught.value.code is ExitCode.CONFIG
    assert "\n" not in str(caught.value)


def randomise(model):
    """Give every adapter a delta."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return model


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"target_parameters": ["1.mlp.expert.gate_up_proj"]}, "1.mlp.experts.gate_up_proj"),
        ({"target_parameters": ["9.mlp.experts.gate_up_proj"]}, "did you mean"),
        ({"target_modules": ["q_prj"]}, "did you mean .*q_proj"),
        ({"modules_to_save": ["lm_hed"]}, "did you mean lm_head"),
        ({"target_modules": ["zzz"]}, "the model has no zzz"),
        ({"target_modules": ["lm_head"]}, "can't have an adapter"),
        ({"target_parameters": ["0.input_layernorm.weight"]}, "is a vector"),
    ],
)
def test_names_that_the_model_lacks_are_refused(tmp_path, section, says):
    """78, with those that come near."""
    with pytest.raises(JobError, match=says) as caught:
        add_lora(base_model(tmp_path), LoraSection(**section), seed=0)
    assert caught.value.code == ExitCode.CONFIG


def test_dropout_beside_adapted_experts_is_refused(tmp_path):
    """All-linear adapts Qwen3-MoE's fused experts, where PEFT has no dropout: one line, 78."""
    with pytest.raises(JobError, match=r"lora.dropout: .*; set lora.dropout: 0") as caught:
        add_lora(base_model(tmp_path, "qwen3_moe"), LoraSection(dropout=0.1), seed=0)
    assert caught.value.code == ExitCode.CONFIG


def test_short_parameter_names_mean_one_layer(tmp_path):
    """1.mlp… is layer 1 and not layer 11."""
    model = base_model(tmp_path, num_hidden_layers=12)
    lora = add_lora(model, LoraSection(rank=2, target_parameters=EXPERTS), seed=0)
    adapted = {name for name, _ in adapters(lora) if ".experts." in name}
    assert adapted == {f"model.layers.{name}" for name in EXPERTS}


def test_the_same_seed_gives_the_same_first_weights(tmp_path):
    """Whatever drew random numbers before."""
    states = []
    for _ in range(2):
        model = add_lora(base_model(tmp_path), LoraSection(rank=2), seed=7)
        states.append({n: p.clone() for n, p in model.named_parameters() if "lora_A" in n})
        torch.rand(5)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_delta_norms_are_those_of_the_deltas(tmp_path):
    """By Gram matrices, experts' rank-major layout included, rslora's scale too."""
    section = LoraSection(rank=3, target_parameters=EXPERTS, use_rslora=True)
    model = randomise(add_lora(base_model(tmp_path), section, seed=0))
    expected = {n: m.get_delta_weight("default").norm().item() for n, m in adapters(model)}
    got = delta_norms(model)
    assert got.keys() == expected.keys()
    assert "model.layers.1.mlp.experts.down_proj" in got
    for name, norm in expected.items():
        assert got[name] == pytest.approx(norm, rel=1e-4)


def test_an_adapter_that_learned_nothing_is_refused(tmp_path):
    """Zero or not finite, with the names."""
    model = add_lora(base_model(tmp_path), LoraSection(rank=2), seed=0)
    with pytest.raises(JobError, match=r"learned nothing in 8 adapter.*q_proj") as caught:
        require_learned(delta_norms(model))
    assert caught.value.code == ExitCode.NOT_PROVEN
    with pytest.raises(JobError, match="not finite"):
        require_learned({"a": float("nan")})
    with pytest.raises(JobError, match="learned nothing"):
        require_learned({})


def test_experts_that_are_bypassed_have_no_gradient(tmp_path):
    """A layer swapped for one that reads the parameters directly trains nothing: 70, by name."""
    model = add_lora(base_model(tmp_path), LoraSection(target_parameters=EXPERTS), seed=0)
    mlp = model.get_base_model().model.layers[1].mlp
    plain = mlp.experts
    while hasattr(plain, "base_layer"):
        plain = plain.base_layer
    ids = torch.randint(0, 400, (1, 16))
    model(ids, labels=ids).loss.backward()
    require_gradients(model, "lora_B")
    model.zero_grad()
    mlp.forward = lambda x: _bypass(mlp, plain, x)
    model(ids, labels=ids).loss.backward()
    with pytest.raises(JobError, match=r"no gradient reaches lora_B of 2 adapter.*experts"):
        require_gradients(model, "lora_B")


def _bypass(mlp, plain, x):
    flat = x.reshape(-1, x.shape[-1])
    _, scores, indices = mlp.router(flat)
    return plain(flat, indices, scores).reshape(x.shape), scores


def test_the_adapter_loads_anywhere_and_its_bytes_are_stable(tmp_path):
    """PEFT's layout, the base by its public name, sorted lists, readable files."""
    source = Source(
        folder=tmp_path, uri="hf://org/base@c0ffee", revision="c0ffee", files={"a": "b"}
    )
    section = LoraSection(rank=2, target_parameters=EXPERTS)
    model = randomise(add_lora(base_model(tmp_path / "m"), section, seed=0, source=source))
    digest = save_adapter(model, tmp_path / "one")
    assert save_adapter(model, tmp_path / "two") == digest
    config_path = tmp_path / "one" / "adapter_config.json"
    assert config_path.read_bytes() == (tmp_path / "two" / "adapter_config.json").read_bytes()
    config = json.loads(config_path.read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == "c0ffee"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "one").iterdir()} == {0o644}
    again = PeftModel.from_pretrained(base_model(tmp_path / "m"), tmp_path / "one")
    ids = torch.randint(0, 400, (1, 16))
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", [a for a in tiny.ARCHITECTURES if a != "gpt_oss"])
def test_every_architectures_adapter_loads_by_peft(tmp_path, arch):
    """Fused experts that PEFT finds for itself included."""
    model = randomise(add_lora(base_model(tmp_path / "m", arch), LoraSection(rank=2), seed=0))
    save_adapter(model, tmp_path / "a")
    again = PeftModel.from_pretrained(base_model(tmp_path / "m", arch), tmp_path / "a")
    ids = torch.randint(0, 400, (1, 16))
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_modules_to_save_are_saved_whole(tmp_path):
    """A trained head travels with the adapter."""
    section = LoraSection(rank=2, modules_to_save=["lm_head"])
    model = add_lora(base_model(tmp_path / "m", "llama"), section, seed=0)
    save_adapter(model, tmp_path / "a")
    again = PeftModel.from_pretrained(base_model(tmp_path / "m", "llama"), tmp_path / "a")
    assert any("lm_head.modules_to_save" in name for name, _ in again.named_parameters())
