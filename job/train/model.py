"""The base model, loaded whole or not at all: no remote code, no missing key, no silent device."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import structlog
import torch

from job.errors import ExitCode, JobError
from job.train.attention import allow_shapes, choose
from job.train.devices import require_device

log = structlog.get_logger()

# Architectures whose packing and loss are shown right by tests: transformers' `model_type`.
KNOWN = frozenset({"gpt_oss", "llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral"})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def pick_dtype(wanted: str, config: Any, device: str) -> torch.dtype:
    """Return what the base is held in: as asked, else fp32 on a CPU, else the checkpoint's own."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device == "cpu":
        return torch.float32
    if _is_mxfp4(config):
        return torch.bfloat16
    own = getattr(config, "dtype", None)
    # fp16 has not the range to train in.
    return torch.bfloat16 if own is torch.float16 else own or torch.float32


def pick_attention(wanted: str, config: Any, device: str) -> tuple[str, str]:
    """Return the attention implementation and the reason for it.

    Raises:
        JobError: 78 for one that this model or this device can't do.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    sdpa = bool(getattr(kind, "_supports_sdpa", False))
    where = f"model.attention: {wanted}"
    if wanted == "auto":
        if sdpa:
            return "sdpa", "PyTorch's fused attention is right for this model on any device"
        return "eager", f"{config.model_type} has no fused attention here (sinks); eager is right"
    if wanted == "sdpa" and not sdpa:
        what = f"{config.model_type} can't compute its attention so"
        raise JobError(ExitCode.CONFIG, where, what, "set attention: auto")
    if wanted in ("flex_attention", "flash_attention_4") and device == "cpu":
        raise JobError(ExitCode.CONFIG, where, "needs a GPU", "set attention: auto")
    return wanted, "the job file asks for it"


def require_plain(config: Any, merge_format: str = "base") -> None:
    """Refuse a quantised base, and a merge that keeps a quantisation that the base has not.

    Raises:
        JobError: 78.
    """
    method = _quantization(config)
    if method not in (None, "mxfp4"):
        what, do = f"is quantised with {method}", "take the unquantised checkpoint of this model"
        raise JobError(ExitCode.CONFIG, "model.source", what, do)
    if merge_format == "mxfp4-preserve" and method is None:
        what = "keeps MXFP4, and the base is not quantised so"
        raise JobError(ExitCode.CONFIG, "merge.format: mxfp4-preserve", what, "set it to base")


def require_router(config: Any, coefficient: float) -> None:
    """Refuse a router's loss for a model without a router.

    Raises:
        JobError: 78.
    """
    text = config.get_text_config()
    if coefficient and not hasattr(text, "output_router_logits"):
        what = f"{text.model_type} has no router"
        raise JobError(ExitCode.CONFIG, "train.router_aux_loss_coef", what, "leave it out")


def has_sinks(config: Any) -> bool:
    """Whether attention has a learned sink, which few kernels know."""
    return bool(config.model_type == "gpt_oss")


def load_base(
    source_folder: Path,
    *,
    dtype: str = "auto",
    device: str,
    attention: str = "auto",
    training: bool = False,
    on_host: bool = False,
) -> tuple[Any, str]:
    """Load a causal language model from a folder of safetensors, onto ``device``.

    MXFP4 experts become plain weights of the dtype. ``use_kernels`` is never set: a replaced
    MLP would train expert adapters that nothing applies.

    Args:
        source_folder: ``config.json`` and safetensors, as ``save_pretrained`` lays them out.
        dtype: ``auto``, ``bfloat16`` or ``float32``.
        device: ``cuda`` or ``cpu``.
        attention: the job file's ``model.attention``.
        training: whether a kernel with a backward may be picked, after a check that takes seconds.

        on_host: leave the weights in the host's memory, in the device's dtype, to be sharded.

    Returns:
        The model in evaluation mode, and the attention it got with the reason, for the log.

    Raises:
        JobError: 66 no model there, 69 no GPU, 70 keys or bytes are missing, 71 too big, 78 an
            attention that it can't do.
    """
    from transformers import AutoModelForCausalLM

    require_device(device)
    config = _read_config(source_folder)
    require_plain(config)
    _refuse_pickles(source_folder)
    precision = pick_dtype(dtype, config, device)
    implementation, reason = pick_attention(attention, config, device)
    if training and device == "cuda" and attention == "auto" and has_sinks(config):
        implementation, reason = choose(config, precision, device)
    if implementation == "flex_attention":
        allow_shapes()
    # Straight to the GPU, shard by shard.
    extra = {"device_map": {"": 0}} if device == "cuda" and not on_host else {}
    with _unpacking(config):
        model, found = _read_weights(
            source_folder,
            lambda: AutoModelForCausalLM.from_pretrained(
                source_folder,
                config=config,
                dtype=precision,
                attn_implementation=implementation,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **extra,
            ),
        )
    _require_whole(source_folder, found)
    _plain_config(model)
    return model.eval(), f"{implementation}: {reason}"


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder, without remote code.

    Raises:
        JobError: 66 if there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"holds no tokenizer that can be read ({_first_line(error)})"
        raise JobError(
            ExitCode.NOT_FOUND, str(folder), what, "take a model folder with its tokenizer's files"
        ) from error


def base_of(model: Any) -> Any:
    """Return transformers' model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_parameters(model: Any) -> int:
    """Count the base parameters that one token meets, embeddings looked up left out.

    Experts count by the share that the router picks. This is the N of MFU by 4N.
    """
    config = base_of(model).config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    embedding = base_of(model).get_input_embeddings().weight
    head = base_of(model).get_output_embeddings()
    total = 0.0
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter is embedding and head.weight is not embedding):
            continue
        total += parameter.numel() * (share if ".experts." in name else 1.0)
    return int(total)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = f"holds no model that transformers can load ({_first_line(error)})"
        raise JobError(
            ExitCode.NOT_FOUND, str(folder), what, "name a folder with config.json and safetensors"
        ) from error


def _read_weights(folder: Path, load: Any) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError

    try:
        model, found = load()
    except SafetensorError as error:
        what = f"a weights file is truncated or damaged ({_first_line(error)})"
        raise JobError(ExitCode.NOT_PROVEN, str(folder), what, "download it again") from error
    except torch.OutOfMemoryError as error:
        what = f"its weights do not fit on the GPU ({_first_line(error)})"
        raise JobError(
            ExitCode.OUT_OF_RESOURCES,
            str(folder),
            what,
            "take a larger GPU, model.dtype: bfloat16, or train.sharding: fsdp2 on several",
        ) from error
    except OSError as error:
        what = f"its weights can't be read ({_first_line(error)})"
        raise JobError(
            ExitCode.NOT_FOUND, str(folder), what, "name a folder with safetensors files"
        ) from error
    return model, found


def _require_whole(folder: Path, found: dict[str, Any]) -> None:
    """Take a missing key for what it is: a weight that transformers made up at random."""
    kinds: tuple[Literal["missing_keys", "unexpected_keys", "mismatched_keys"], ...] = (
        "missing_keys",
        "unexpected_keys",
        "mismatched_keys",
    )
    odd = {kind: sorted(map(str, found[kind])) for kind in kinds if found.get(kind)}
    if not odd and not found.get("error_msgs"):
        return
    parts = [f"{len(names)} {kind[:-5]} (such as {names[0]})" for kind, names in odd.items()]
    parts += [str(message)[:200] for message in found.get("error_msgs") or []]
    raise JobError(
        ExitCode.NOT_PROVEN,
        str(folder),
        f"its weights are not those of its config: {'; '.join(parts)}",
        "take the checkpoint as its maker published it",
    )


def _refuse_pickles(folder: Path) -> None:
    pickled = [path.name for path in folder.iterdir() if path.suffix in REFUSED]
    if pickled and not list(folder.glob("*.safetensors")):
        raise JobError(
            ExitCode.NOT_FOUND,
            str(folder),
            f"has pickled weights only ({pickled[0]}), and those are never loaded",
            "take the model's safetensors files",
        )


def _is_mxfp4(config: Any) -> bool:
    return _quantization(config) == "mxfp4"


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None) or {}
    method = (found if isinstance(found, dict) else found.to_dict()).get("quant_method")
    # An enum in some of transformers' own classes.
    return None if method is None else str(getattr(method, "value", method))


def _unpacking(config: Any) -> contextlib.AbstractContextManager[None]:
    """Let MXFP4 be unpacked by our own code, which needs no memory beside the model's."""
    if not _is_mxfp4(config):
        return contextlib.nullcontext()
    from job.train.mxfp4 import one_after_another, take_over

    take_over(config)
    return one_after_another()


def _plain_config(model: Any) -> None:
    """Forget the quantisation that is gone, so that trainers take the model for what it is now."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
