"""Checkpoints of our own: safetensors and JSON, whole or not there, of this very run or refused.

The Trainer's would pickle. Random numbers are not in them, because each step seeds every generator
from (seed, step): a resumed run draws what the uninterrupted one drew, whatever drew in between.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import (
    fingerprint,
    fsync_tree,
    list_files,
    sha256_file,
    write_bytes,
    write_json,
)

log = structlog.get_logger()

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "checkpoint.json"
TRAINER_STATE, HISTORY = "trainer_state.json", "history.jsonl"

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
# Settings that change when a run is saved or ended, and not what it computes.
TIMING = frozenset({"checkpoint_every_s", "checkpoint_every_steps", "step_timeout_s"})
# Counted as what it comes to: one for each GPU that is here.
COUNTED = frozenset({"num_processes"})


class CheckpointState(BaseModel):
    """What a checkpoint says beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    step: int
    num_tokens: int
    """Real tokens trained on so far, by all attempts."""
    duration_s: float
    """Spent in training so far, by all attempts."""
    ended: bool
    """Training is over: all steps are made, or max_duration_s has passed."""
    fingerprint: dict[str, str]
    """Part (config, data, …) → what it was; all must be the same to go on."""
    param_groups: list[dict[str, Any]]
    scheduler: dict[str, Any]


def save_checkpoint(folder: Path, *, trainer: Any, state: CheckpointState, history: Path) -> None:
    """Write a checkpoint into ``folder``: staged, fsynced, renamed, so never half there."""
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    _save_tensors(staged / WEIGHTS, trainable(trainer.model))
    _save_tensors(staged / MOMENTS, _moments(trainer.optimizer))
    trainer.state.save_to_json(str(staged / TRAINER_STATE))
    shutil.copyfile(history, staged / HISTORY)
    write_json(staged / STATE, state.model_dump(mode="json"))
    fsync_tree(staged)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def fingerprints(job: JobConfig, model: Source, dataset: Dataset) -> dict[str, str]:
    """Return what an adapter depends on, part by part, so that a difference has a name."""
    from job.train.devices import num_processes

    tokenizer = dataset.folder / "tokenizer"
    train_section = job.train.model_dump(mode="json", exclude=set(TIMING | COUNTED))
    return {
        "seed": str(job.seed),
        "device": job.device,
        "processes": str(num_processes(job)),
        "model": fingerprint(job.model.model_dump(mode="json", exclude={"source"}), model.files),
        "lora": fingerprint(job.lora.model_dump(mode="json")),
        "train": fingerprint(train_section),
        "data": dataset.digest,
        "tokenizer": fingerprint({n: sha256_file(tokenizer / n) for n in list_files(tokenizer)}),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES),
    }


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint on the local disk."""

    folder: Path
    state: CheckpointState


def read_state(folder: Path, fingerprint: dict[str, str]) -> CheckpointState:
    """Return a checkpoint's state if it is of this very run.

    Raises:
        JobError: 65, naming what has changed since it was written.
    """
    try:
        state = CheckpointState.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise _foreign(f"has no {STATE} that this version reads") from error
    parts = sorted(fingerprint.keys() | state.fingerprint.keys())
    changed = [part for part in parts if fingerprint.get(part) != state.fingerprint.get(part)]
    if changed:
        raise _foreign(f"is of another run: changed since then: {', '.join(changed)}")
    return state


def _foreign(what: str) -> JobError:
    return JobError(
        ExitCode.DATA, "checkpoint", what, "put that back as it was, or start a new run (--new)"
    )


def load_weights(folder: Path, model: Any) -> None:
    """Put a checkpoint's weights into the trainable parameters, bit by bit.

    Raises:
        JobError: 65 if they are not the same parameters.
    """
    import torch

    saved = _load_tensors(folder / WEIGHTS)
    wanted = trainable(model)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in wanted.items()}:
        raise _foreign("holds other parameters than this adapter")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def load_optimizer(folder: Path, state: CheckpointState, optimizer: Any, scheduler: Any) -> None:
    """Put a checkpoint's moments and schedule back."""
    moments: dict[int, dict[str, Any]] = {}
    for name, tensor in _load_tensors(folder / MOMENTS).items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": state.param_groups})
    scheduler.load_state_dict(state.scheduler)


def trainable(model: Any) -> dict[str, Any]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the optimizer's settings as JSON takes them."""
    groups: list[dict[str, Any]] = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    return groups


def _moments(optimizer: Any) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": tensor for i, slot in state.items() for key, tensor in slot.items()}


def _save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    write_bytes(path, save(plain))


def _load_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _foreign(f"has no {path.name} that can be read") from error
    return tensors
