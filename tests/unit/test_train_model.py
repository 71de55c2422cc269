"""The base: loaded whole or refused, in the dtype and with the attention that the job file says."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from job.errors import ExitCode, JobError
from job.train.devices import require_device
from job.train.model import active_parameters, load_base, load_tokenizer


def refused(code, *parts):
    """Expect a JobError of ``code`` that says every part."""
    pattern = "(?s)" + "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(JobError, match=pattern), code


def check_refused(call, code, *parts):
    expectation, _ = refused(code, *parts)
    with expectation as caught:
        call()
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_mxfp4_becomes_plain_weights(tmp_path):
    """Blocks and scales in different shards, fp32 on a CPU, nothing quantised left behind."""
    model, reason = load_base(tiny.tiny_model(tmp_path, "gpt_oss", mxfp4=True), device="cpu")
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert weight.dtype == torch.float32
    assert weight.shape == (6, 64, 192)
    assert len(weight.unique()) > 8
    assert reason.startswith("eager: ")
    assert not hasattr(model.config, "quantization_config")
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    lut = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    block = first[f"{name}_blocks"][3, 5, 0]
    values = torch.stack([lut[(block & 15).long()], lut[(block >> 4).long()]], dim=-1).flatten()
    scale = 2.0 ** (int(second[f"{name}_scales"][3, 5, 0]) - 127)
    torch.testing.assert_close(weight[3, :32, 5], values * scale)


def test_mxfp4_in_bf16(tmp_path):
    """The dtype of the job file holds for what was quantised too."""
    folder = tiny.tiny_model(tmp_path, "gpt_oss", mxfp4=True)
    model, _ = load_base(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_experts_under_wrong_names_are_refused(tmp_path):
    """bf16 experts named *_blocks, as transformers saves them: never trained from random ones."""
    tiny.tiny_model(tmp_path, "gpt_oss")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    renamed = {
        f"{n}_blocks" if n.endswith(("gate_up_proj", "down_proj")) else n: t
        for n, t in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    check_refused(
        lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_PROVEN, "missing", "down_proj"
    )


def test_a_missing_weight_is_refused(tmp_path):
    """Transformers would make it up at random, with a warning."""
    tiny.tiny_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    check_refused(
        lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_PROVEN, "1 missing", "up_proj"
    )


def test_a_truncated_file_is_refused(tmp_path):
    """Half a file is not half a model."""
    tiny.tiny_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    check_refused(lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_PROVEN, "truncated")


def test_a_folder_without_a_model_is_not_found(tmp_path):
    """An empty folder, or one with a config alone."""
    check_refused(lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_FOUND, "no model")
    tiny.tiny_config("llama").save_pretrained(tmp_path)
    check_refused(lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_FOUND, "weights")


def test_pickled_weights_are_never_loaded(tmp_path):
    """A pickle runs code."""
    tiny.tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    check_refused(lambda: load_base(tmp_path, device="cpu"), ExitCode.NOT_FOUND, "pickled")


def test_a_gpu_that_is_not_there_is_hardware():
    """Never a silent run on the CPU."""
    if torch.cuda.is_available():
        require_device("cuda")
        return
    check_refused(lambda: require_device("cuda"), ExitCode.HARDWARE, "sees no GPU")
    require_device("cpu")


@pytest.mark.parametrize(
    ("arch", "wanted", "got"),
    [("llama", "auto", "sdpa"), ("gpt_oss", "auto", "eager"), ("llama", "eager", "eager")],
)
def test_attention_is_picked_with_a_reason(tmp_path, arch, wanted, got):
    """Auto takes the fused one where there is one."""
    folder = tiny.tiny_model(tmp_path, arch)
    model, reason = load_base(folder, device="cpu", attention=wanted)
    assert model.config._attn_implementation == got
    assert reason.startswith(f"{got}: ")


@pytest.mark.parametrize(
    ("arch", "wanted", "says"),
    [("gpt_oss", "sdpa", "can't compute"), ("llama", "flex_attention", "needs a GPU")],
)
def test_an_attention_that_cannot_be_had_is_a_config_error(tmp_path, arch, wanted, says):
    """Refused by name, not replaced in silence."""
    folder = tiny.tiny_model(tmp_path, arch)
    check_refused(
        lambda: load_base(folder, device="cpu", attention=wanted), ExitCode.CONFIG, wanted, says
    )


def test_active_parameters_count_experts_by_their_share(tmp_path):
    """MFU's N: what one token meets; looked-up embeddings cost nothing, tied heads do."""
    model, _ = load_base(tiny.tiny_model(tmp_path / "a", "gpt_oss"), device="cpu")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.model.embed_tokens.weight.numel()
    whole = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) == whole - embedding - experts + experts // 3
    tied, _ = load_base(tiny.tiny_model(tmp_path / "b", "smollm2"), device="cpu")
    assert active_parameters(tied) == sum(p.numel() for p in tied.parameters())


def test_a_tokenizer_is_read_or_not_found(tmp_path):
    """From files alone, template included."""
    tiny.tiny_tokenizer("gpt_oss").save_pretrained(tmp_path / "t")
    assert "strftime_now" in load_tokenizer(tmp_path / "t").chat_template
    (tmp_path / "empty").mkdir()
    check_refused(lambda: load_tokenizer(tmp_path / "empty"), ExitCode.NOT_FOUND, "tokenizer")


def test_remote_code_is_not_run(tmp_path):
    """A model that brings code is one that transformers does not know."""
    folder = tiny.tiny_model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    check_refused(lambda: load_base(folder, device="cpu"), ExitCode.NOT_FOUND, "can load")
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "settings", "width"),
    [
        ("gpt2", {"n_embd": 64}, 256),
        ("opt", {"hidden_size": 64, "ffn_dim": 96}, 96),
        ("gemma3n_text", {"intermediate_size": 128, "hidden_size": 64}, 128),
    ],
)
def test_an_estimate_knows_the_words_of_other_architectures(kind, settings, width):
    """GPT-2 calls it n_inner and leaves it out, OPT ffn_dim; Gemma 3n has one for each layer."""
    from transformers import AutoConfig

    from job.estimate import _widths

    assert _widths(AutoConfig.for_model(kind, **settings))["intermediate"] == width


@pytest.mark.parametrize(
    ("quantization", "merge", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "base", "quantised with bitsandbytes"),
        (None, "mxfp4-preserve", "the base is not quantised so"),
    ],
)
def test_a_base_that_could_not_be_merged_is_refused_first(quantization, merge, words):
    """78 before a night of training, by check as well."""
    from types import SimpleNamespace

    from job.train.model import require_plain

    config = SimpleNamespace(quantization_config=quantization)
    with pytest.raises(JobError, match=words) as caught:
        require_plain(config, merge)
    assert caught.value.code == 78
    require_plain(SimpleNamespace(quantization_config={"quant_method": "mxfp4"}), "mxfp4-preserve")


def test_a_model_with_nested_settings_is_built_for_its_merge(tmp_path):
    """Gemma 3's larger ones keep the vocabulary in text_config."""
    from transformers import Gemma3Config

    from job.merge.names import empty_model

    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert empty_model(tmp_path).get_input_embeddings().weight.shape[0] == 64
    assert empty_model(tmp_path, 80).get_input_embeddings().weight.shape[0] == 80


def test_layers_that_the_merge_does_not_know_are_refused_first(tmp_path):
    """GPT-2's Conv1D: 78 before training, unless nothing is to be merged."""
    import trainbed
    from transformers import GPT2Config

    from job.estimate import measure

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    config.save_pretrained(tmp_path)
    source = trainbed.make_source(tmp_path)
    with pytest.raises(JobError, match="Conv1D") as caught:
        measure(trainbed.make_job(tmp_path, tmp_path), source)
    assert caught.value.code == 78
    job = trainbed.make_job(tmp_path, tmp_path, merge={"format": "none"})
    assert measure(job, source).intermediate == 128
