"""A GGUF becomes safetensors and a tokenizer, once, and says the same as what it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.pull import pull_one
from job.stop import Stop

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def write_gguf(base: Path, path: Path) -> Path:
    """Write a llama folder as an unquantised GGUF, as llama.cpp's converter does."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, weight in model.state_dict().items():
        writer.add_tensor(_renamed(name), _ordered(name, weight.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _ordered(name: str, weight: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    """Return queries and keys with the halves of each head interleaved, as GGUF keeps them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = [n for part, n in heads.items() if part in name]
    if not found:
        return weight
    halves = weight.reshape(found[0], 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _write_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids) | {t["id"] for t in own["added_tokens"]}
    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)]
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in own["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    base = tiny.tiny_model(folder / "base", "llama")
    return base, write_gguf(base, folder / "tiny.gguf")


def pulled(path: Path, folder: Path, **more: Any) -> Any:
    return pull_one(str(path), folder / "x", kind="model", stop=Stop(), progress=Progress(), **more)


def test_an_unpacked_gguf_says_what_its_origin_says(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Same logits in fp32, same chat template, same stop token, safetensors only."""
    base, path = models
    source = pulled(path, tmp_path)
    assert source.uri == "file:tiny.gguf"
    assert "model.safetensors" in source.files
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (source.folder, base))
    assert ours.dtype == torch.float32
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (source.folder, base))
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token == theirs.eos_token
    text = "<|im_start|>user\nWie heißt das?<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_it_is_unpacked_once_for_each_dtype(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run finds it in the cache; another dtype is another model."""
    cache = tmp_path / "cache"
    half = pulled(models[1], tmp_path / "a", cache=cache, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(half.folder).dtype == torch.bfloat16
    monkeypatch.setattr("job.pull.convert", None)
    again = pulled(models[1], tmp_path / "b", cache=cache, dtype="bfloat16")
    assert again == half
    with pytest.raises(TypeError):
        pulled(models[1], tmp_path / "c", cache=cache, dtype="float32")


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    """Other bytes under that name are code 65, in one line, with nothing left behind."""
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(JobError) as caught:
        pulled(tmp_path / "m.gguf", tmp_path)
    assert caught.value.code is ExitCode.DATA
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
