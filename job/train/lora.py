"""The adapter: PEFT's, from the job file's names; checked that all of it learns; saved stably."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from job.artifacts import Source
from job.config import LoraSection
from job.errors import ExitCode, JobError
from job.files import atomic_writer, sha256_file, write_json

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"


def add_lora(model: Any, section: LoraSection, *, seed: int, source: Source | None = None) -> Any:
    """Wrap ``model`` by PEFT as ``lora`` says; the same seed gives the same first weights.

    Raises:
        JobError: 78 for a name that the model lacks, with those that come near; for dropout
            where experts are adapted.
    """
    from peft import LoraConfig, get_peft_model

    from job.train.linear import fused_linear

    check_names(model, section)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        # PEFT writes a whole number as one; 16 and 16.0 are the same alpha.
        lora_alpha=int(section.alpha) if float(section.alpha).is_integer() else section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        target_parameters=sorted(set(section.target_parameters)) or None,
        modules_to_save=sorted(set(section.modules_to_save)) or None,
        use_rslora=section.use_rslora,
    )
    # PEFT's own hook for other layers; it is not saved with the config.
    config._register_custom_module({torch.nn.Linear: fused_linear})  # noqa: SLF001
    torch.manual_seed(seed)
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        # Of some mixtures of experts (Qwen3-MoE), PEFT's all-linear adapts the fused experts too.
        if not (section.dropout and "lora_dropout" in str(error)):
            said, do = " ".join(str(error).split())[:200], "name linear layers such as q_proj"
            raise JobError(ExitCode.CONFIG, "lora", said, do) from error
        what = f"{section.dropout} can't be had with adapters on experts"
        raise JobError(ExitCode.CONFIG, "lora.dropout", what, "set lora.dropout: 0") from error
    if source is not None:
        # After wrapping: PEFT puts the folder that the model came from.
        config.base_model_name_or_path = public_name(source)
        config.revision = source.revision
    return wrapped


def public_name(source: Source) -> str:
    """Return what an adapter calls its base: the Hub's id, or the source's URI."""
    if source.uri.startswith("hf://"):
        return source.uri.removeprefix("hf://").partition("@")[0]
    return source.uri


def check_names(model: Any, section: LoraSection) -> None:
    """Refuse names in the job file that the model has not.

    Raises:
        JobError: 78, with the near misses.
    """
    modules = [name for name, _ in model.named_modules() if name]
    if section.target_modules != "all-linear":
        _require("lora.target_modules", section.target_modules, modules)
        _refuse_head(model, section.target_modules)
    _require("lora.modules_to_save", section.modules_to_save, modules)
    parameters = {name: p.ndim for name, p in model.named_parameters()}
    _require("lora.target_parameters", section.target_parameters, parameters)
    flat = [n for n in section.target_parameters if min(_dimensions(n, parameters)) < 2]
    if flat:
        raise JobError(
            ExitCode.CONFIG,
            "lora.target_parameters",
            f"{flat[0]} is a vector, and LoRA adapts matrices",
            "name a weight such as 7.mlp.experts.down_proj",
        )


def _dimensions(wanted: str, parameters: dict[str, int]) -> list[int]:
    return [ndim for name, ndim in parameters.items() if _matches(name, wanted)]


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _refuse_head(model: Any, wanted: list[str]) -> None:
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    if head is not None and any(_matches(head, name) for name in wanted):
        raise JobError(
            ExitCode.CONFIG,
            "lora.target_modules",
            f"{head} can't have an adapter: the loss multiplies by its weight directly",
            "leave it out, or train it whole by lora.modules_to_save",
        )


def _require(where: str, wanted: list[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in wanted:
        if any(_matches(full, name) for full in names):
            continue
        near = _near_misses(name, names)
        do = f"did you mean {', '.join(near)}?" if near else "see the model's own names"
        raise JobError(ExitCode.CONFIG, where, f"the model has no {name}", do)


def _near_misses(wanted: str, names: list[str]) -> list[str]:
    """Return up to three names like ``wanted``, cut to as many parts as it has."""
    parts = wanted.count(".") + 1
    tails = {".".join(name.split(".")[-parts:]) for name in names}
    return difflib.get_close_matches(wanted, sorted(tails), n=3, cutoff=0.6)


def adapters(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield each LoRA layer under the name of the weight that it adapts."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield _weight_name(name, module), module


def _weight_name(module_name: str, module: Any) -> str:
    plain = module_name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{plain}.{getattr(module, 'parameter_name', 'weight')}"


def require_gradients(model: Any, which: str) -> None:
    """Check that every adapter's ``lora_A`` or ``lora_B`` has a gradient that is not zero.

    Raises:
        JobError: 70, naming the adapters that have none: they are declared, and nothing uses them.
    """
    silent = [name for name, layer in adapters(model) if not _has_gradient(layer, which)]
    if silent:
        raise JobError(
            ExitCode.NOT_PROVEN,
            "train",
            f"no gradient reaches {which} of {_some(silent)}",
            "take them out of lora.target_modules or target_parameters: they would not learn",
        )


def _has_gradient(layer: Any, which: str) -> bool:
    gradient = getattr(layer, which)[ADAPTER].weight.grad
    return gradient is not None and bool(gradient.count_nonzero())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} adapter(s): {', '.join(names[:5])}{more}"


@torch.no_grad()
def delta_norms(model: Any) -> dict[str, float]:
    """Return the Frobenius norm of s·B·A for each adapted weight, over all its experts.

    It takes the small Gram matrices, |BA|² = <BᵀB, AAᵀ>, and never the product itself.
    """
    return {name: _delta_norm(layer) for name, layer in adapters(model)}


def _delta_norm(layer: Any) -> float:
    a = layer.lora_A[ADAPTER].weight.double()
    b = layer.lora_B[ADAPTER].weight.double()
    experts = getattr(layer, "num_experts", 1)
    # PEFT's layout: A is expert-major [E·r, in], B is rank-major [out, r·E].
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, experts)
    squares = torch.einsum("ore,ose->ers", b, b) * torch.einsum("eri,esi->ers", a, a)
    return float(layer.scaling[ADAPTER] * math.sqrt(max(float(squares.sum()), 0.0)))


def require_learned(norms: dict[str, float]) -> None:
    """Refuse an adapter, or a part of one, that changes nothing or is not finite.

    Raises:
        JobError: 70.
    """
    odd = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if odd:
        raise JobError(
            ExitCode.NOT_PROVEN, "train", f"not finite: {_some(odd)}", "lower train.learning_rate"
        )
    empty = [name for name, norm in norms.items() if norm == 0]
    if empty or not norms:
        raise JobError(
            ExitCode.NOT_PROVEN,
            "train",
            f"the adapter learned nothing in {_some(empty)}",
            "train for more steps, or raise train.learning_rate",
        )


def save_adapter(model: Any, folder: Path) -> str:
    """Write the adapter in PEFT's layout and return the sha256 of its weights.

    The bytes depend on the weights alone: lists are sorted, files are readable by everybody.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    state = get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=_trains_embedding(model)
    )
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    with atomic_writer(folder / WEIGHTS) as handle:
        handle.write(save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", _config_of(model))
    return sha256_file(folder / WEIGHTS)


def _trains_embedding(model: Any) -> bool:
    """Ask PEFT for whole embeddings only where one is trained ("auto" would ask the Hub)."""
    targets = model.peft_config[ADAPTER].target_modules or []
    return any(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in targets)


def _config_of(model: Any) -> dict[str, Any]:
    """Return PEFT's config as JSON, its sets sorted: their order differs from run to run."""
    config = dict(model.peft_config[ADAPTER].to_dict())
    config["inference_mode"] = True
    return {key: _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.value if hasattr(value, "value") else value
