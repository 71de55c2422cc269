"""Tiny random models, a tokenizer and rows: real in shape, seeded, on disk in well under a second.

``tiny_model(folder, "gpt_oss", mxfp4=True)`` writes blocks and scales as the released checkpoint
has them. Every weight is random (norms around one), so that a leak, a swap or a lost bias shows.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

ARCHITECTURES = (
    "gpt_oss", "llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "mistral", "smollm2",
)  # fmt: skip
LANGUAGES = ("English", "German", "French", "Spanish", "Italian", "Hindi")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.9}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # 6 experts: no rank that a test would take. intermediate != hidden: a transposition shows.
    "gpt_oss": (
        GptOssConfig,
        {**MIXED, **EXPERTS, "intermediate_size": 96, "num_local_experts": 6},
    ),
    "llama": (LlamaConfig, {"intermediate_size": 96}),
    "qwen2": (Qwen2Config, {"intermediate_size": 96, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"intermediate_size": 96}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 96},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {**MIXED, "intermediate_size": 96, "query_pre_attn_scalar": 16},
    ),
    "mistral": (MistralConfig, {"intermediate_size": 96, "sliding_window": 8}),
    "smollm2": (LlamaConfig, {"intermediate_size": 96, "tie_word_embeddings": True}),
}


def tiny_rows(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` rows in the schema of HuggingFaceH4/Multilingual-Thinking, of many lengths."""
    dice = random.Random(seed)
    return [_row(index, dice) for index in range(n)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` as jsonl and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def _row(index: int, dice: random.Random) -> dict[str, Any]:
    language = LANGUAGES[index % len(LANGUAGES)]
    left, right = dice.randint(1, 99), dice.randint(1, 99)
    developer = "You are a careful helper who adds numbers."
    user = f"What is {left} plus {right}?"
    steps = [f"I think in {language}."] + [
        f"{left} + {step} = {left + step}." for step in range(1, dice.randint(2, 6))
    ]
    analysis, final = " ".join(steps), f"{left} + {right} = {left + right}. नमस्ते, grüß dich!"
    system = f"reasoning language: {language}\n\n{developer}"
    return {
        "reasoning_language": language,
        "developer": developer,
        "user": user,
        "analysis": analysis,
        "final": final,
        "messages": [
            {"role": "system", "content": system, "thinking": None},
            {"role": "user", "content": user, "thinking": None},
            {"role": "assistant", "content": final, "thinking": analysis},
        ],
    }


@functools.cache
def _tokenizer_json(specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [json.dumps(row, ensure_ascii=False) for row in tiny_rows(40)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return str(tokenizer.to_str())


def harmony_template() -> str:
    """Return gpt-oss's own chat template, as TRL carries it (analysis channel, strftime_now)."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / "gptoss.jinja").read_text("utf-8")


def tiny_tokenizer(arch: str = "llama", *, template: str | None = "auto") -> Any:
    """Return a byte-level BPE tokenizer: harmony's tokens for gpt_oss, ChatML's for all others.

    ``template``: a chat template, None for a base model without one, or "auto" for the arch's own.
    """
    harmony = arch == "gpt_oss"
    source = _tokenizer_json(HARMONY_TOKENS if harmony else CHATML_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(source),
        eos_token="<|return|>" if harmony else "<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    own = harmony_template() if harmony else CHATML
    tokenizer.chat_template = own if template == "auto" else template
    return tokenizer


def tiny_config(arch: str, **overrides: Any) -> Any:
    """Return a small config of ``arch``, as many tokens as its tokenizer and a few more."""
    kind, own = CONFIGS[arch]
    tokenizer = tiny_tokenizer(arch)
    settings = {
        **SHAPE,
        "vocab_size": len(tokenizer) + 5,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        **own,
        **overrides,
    }
    layers = settings["num_hidden_layers"]
    if "layer_types" in settings and "layer_types" not in overrides:
        settings["layer_types"] = [MIXED["layer_types"][i % 2] for i in range(layers)]
    return kind(**settings)


def tiny_model(
    folder: Path,
    arch: str,
    *,
    dtype: torch.dtype = torch.float32,
    mxfp4: bool = False,
    seed: int = 0,
    max_shard_size: str = "5GB",
    template: str | None = "auto",
    **overrides: Any,
) -> Path:
    """Write a random model of ``arch`` with its tokenizer into ``folder``, and return that.

    ``mxfp4`` (gpt_oss only): bf16, with the experts as blocks and scales and the
    quantization_config of the released checkpoint. ``overrides`` are fields of the config.
    """
    config = tiny_config(arch, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    model = model.to(torch.bfloat16 if mxfp4 else dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if mxfp4:
        _quantise(folder, model, seed)
    tiny_tokenizer(arch, template=template).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    return folder


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        scale = 0.1 if is_norm or name.endswith("bias") else 0.125
        offset = 1.0 if is_norm and "gemma" not in model.config.model_type else 0.0
        parameter.copy_(noise * scale + offset)


def _quantise(folder: Path, model: PreTrainedModel, seed: int) -> None:
    """Put random blocks and scales in place of the experts' weights."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name:
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32)
            tensors[f"{name}_blocks"] = torch.randint(
                0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
            )
            tensors[f"{name}_scales"] = torch.randint(
                121, 125, shape, generator=generator, dtype=torch.uint8
            )
        else:
            tensors[name] = tensor.contiguous()
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    # Blocks and scales lie in different shards, as they may in a released checkpoint.
    first = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scales")}
    second = {name: tensor for name, tensor in tensors.items() if name.endswith("_scales")}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for part, name in zip((first, second), names, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {n: names[n in second] for n in sorted(tensors)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _declare_mxfp4(folder / "config.json")


def _declare_mxfp4(path: Path) -> None:
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for known in ARCHITECTURES:
            print(known, *sorted(p.name for p in tiny_model(Path(scratch, known), known).iterdir()))
