"""Out of memory: what took it, and which setting gives some back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.train.meters import memory_bytes

# The words of torch, cuBLAS and Triton, where they have no exception of their own.
WORDS = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


@contextlib.contextmanager
def memory_explained(model: Any, job: JobConfig) -> Iterator[None]:
    """Turn running out of memory inside the block into one line.

    Raises:
        JobError: 71, with the largest terms and the setting to change.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_lack(error):
            raise
        words = str(error)
        raise JobError(
            ExitCode.OUT_OF_RESOURCES,
            f"train on {job.device}",
            f"out of memory: {terms(model, job)} ({words.strip().splitlines()[0][:160]})",
            mend(model, job),
        ) from error


def is_lack(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory."""
    words = any(known in str(error) for known in WORDS)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and words)


def terms(model: Any, job: JobConfig) -> str:
    """Return where the memory went, the largest part first."""
    frozen = trained = 0
    for parameter in model.parameters():
        # A sharded one: this rank's share.
        held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        size = held.nbytes
        # A trained weight comes with its gradient and two moments.
        if parameter.requires_grad:
            trained += 4 * size
        else:
            frozen += size
    total = 0
    if job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    rest = max(memory_bytes(job.device) - frozen - trained, 0)
    parts = {"base": frozen, "adapter and optimiser": trained, "activations": rest}
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in ranked)
    return f"{told} of {total / 1e9:.0f} GB" if total else told


def mend(model: Any, job: JobConfig) -> str:
    """Return the setting that gives most memory back at the least cost."""
    section = job.train
    if section.gradient_checkpointing is not True and not model.is_activation_checkpointing:
        return "set train.gradient_checkpointing: true"
    if section.batch_size > 1:
        half, twice = section.batch_size // 2, section.gradient_accumulation * 2
        return f"set train.batch_size: {half} and train.gradient_accumulation: {twice}"
    if job.data.max_length > 512:
        return f"set data.max_length: {job.data.max_length // 2}"
    if section.sharding == "none" and job.device == "cuda":
        return "set train.sharding: fsdp2 (on several GPUs), or take a larger GPU"
    return "lower lora.rank, or take a device with more memory"
