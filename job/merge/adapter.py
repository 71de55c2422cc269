"""A LoRA adapter as PEFT saved it: its keys sorted by what they do, its settings checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.errors import ExitCode, JobError
from job.merge.checkpoint import FLOATS, Slot, missing, read_header, read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.weight)?$")
FIRST_EXPERT_VERSION = (0, 19)
"""PEFT 0.19 exchanged in and out of parameters with three axes; older factors fit elsewhere."""
NOT_MERGED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "trainable_token_indices",
    "use_qalora", "alora_invocation_tokens", "arrow_config", "megatron_config", "use_bdlora",
    "velora_config", "kasa_config",
)  # fmt: skip
"""Settings that change what the adapter computes, so that base + s·B·A is not it."""
RESIDUAL = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""First weights that PEFT takes out of the base: with these, the adapter's base is another one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapted module or parameter: the two factors, under PEFT's name for the module."""

    module: str
    kind: Literal["linear", "embedding"]
    a_key: str
    b_key: str


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter holds."""

    folder: Path
    config: dict[str, Any]
    slots: dict[str, Slot]
    """Every key of adapter_model.safetensors."""
    pairs: list[Pair]
    saved: dict[str, str]
    """Parameter of the model → key that replaces it (modules_to_save, resized embeddings)."""

    def scaling(self, module: str, rank: int) -> float:
        """Return PEFT's factor s for ``module``, whose factors have rank ``rank``.

        Raises:
            JobError: 70 if the settings say another rank.
        """
        ranks, alphas = (
            self.config.get("rank_pattern") or {},
            self.config.get("alpha_pattern") or {},
        )
        said = _by_pattern(ranks, module, self.config["r"])
        if said != rank:
            raise self.refused(f"{module} has rank {rank}, its settings say {said}")
        alpha = float(_by_pattern(alphas, module, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def refused(
        self, what: str, *, do: str = "train it again, or take the base that it was trained on"
    ) -> JobError:
        """Return the error of an adapter that can't be merged as it is."""
        return JobError(ExitCode.NOT_PROVEN, str(self.folder), what, do)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the first pattern's value that matches the end of ``name``, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_adapter(folder: Path) -> AdapterFiles:
    """Read the header and the settings of the adapter in ``folder``, and sort its keys.

    Raises:
        JobError: 66 if a file is not there, 78 for a kind that can't be merged, 70 for keys that
            are no adapter's.
    """
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise missing(folder / WEIGHTS)
    slots = read_header(folder / WEIGHTS)
    _check_config(folder, config)
    pairs, saved, unknown = _sort_keys(slots)
    files = AdapterFiles(folder, config, slots, pairs, saved)
    if unknown:
        raise files.refused(f"{len(unknown)} of its keys are not known here, such as {unknown[0]}")
    if not pairs and not saved:
        raise files.refused("it holds no weights")
    odd = [key for key, slot in slots.items() if slot.dtype not in FLOATS]
    if odd:
        raise files.refused(f"{odd[0]} is stored as {slots[odd[0]].dtype}, not as floats")
    return files


def _sort_keys(slots: dict[str, Slot]) -> tuple[list[Pair], dict[str, str], list[str]]:
    sides: dict[tuple[str, str], dict[str, str]] = {}
    saved: dict[str, str] = {}
    unknown: list[str] = []
    for key in slots:
        name = key.removeprefix(PREFIX)
        match = KEY.match(name)
        if name == key or (match is None and "lora_" in name):
            unknown.append(key)
        elif match is None:
            saved[name.replace(".base_layer.", ".")] = key
        else:
            sides.setdefault((match["module"], match["kind"] or ""), {})[match["side"]] = key
    pairs = []
    for (module, kind), both in sides.items():
        if both.keys() == {"A", "B"}:
            pairs.append(Pair(module, "embedding" if kind else "linear", both["A"], both["B"]))
        else:
            unknown.extend(both.values())
    return pairs, saved, unknown


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise JobError(ExitCode.CONFIG, where, f"is a {kind} adapter", "give a LoRA adapter")
    used = [name for name in NOT_MERGED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).startswith(RESIDUAL):
        used.append(f"init_lora_weights: {config['init_lora_weights']}")
    if used:
        raise JobError(
            ExitCode.CONFIG, where, f"uses {', '.join(used)}, which is not merged here",
            "train without it, or merge with PEFT itself",
        )  # fmt: skip
    if not all(isinstance(config.get(key), int | float) for key in ("r", "lora_alpha")):
        raise JobError(
            ExitCode.CONFIG, where, "does not say r and lora_alpha", "take the file PEFT wrote"
        )
    if config.get("target_parameters"):
        _check_expert_version(where, config.get("peft_version"))


def _check_expert_version(where: str, version: Any) -> None:
    numbers = re.match(r"^(\d+)\.(\d+)", str(version or ""))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < FIRST_EXPERT_VERSION:
        raise JobError(
            ExitCode.CONFIG,
            where,
            f"adapts expert parameters and was written by PEFT {version or 'of an unknown version'}"
            ", whose layout is another one",
            "train it again with PEFT 0.19 or newer",
        )
