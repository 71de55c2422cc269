"""The GPUs of this machine: whether there are any, and how many train."""

from __future__ import annotations

import torch

from job.config import JobConfig
from job.errors import ExitCode, JobError


def require_device(device: str) -> None:
    """Refuse a GPU that is not there, before anything is downloaded for it.

    Raises:
        JobError: 69 if the job says ``cuda`` and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"CUDA {built}" if built else "no CUDA"
        raise JobError(
            ExitCode.HARDWARE,
            "device: cuda",
            f"torch {torch.__version__} (built with {why}) sees no GPU here",
            "start it on a node with a GPU, or set device: cpu",
        )


def num_processes(job: JobConfig) -> int:
    """Return how many ranks train: as the job file says, else one for each GPU.

    Raises:
        JobError: 69 for more than there are GPUs.
    """
    wanted = job.train.num_processes
    if job.device == "cpu":
        return wanted or 1
    seen = torch.cuda.device_count()
    if wanted is not None and wanted > seen:
        raise JobError(
            ExitCode.HARDWARE,
            f"train.num_processes: {wanted}",
            f"only {seen} GPU(s) are here",
            "ask for as many GPUs, or leave it out",
        )
    return wanted or max(seen, 1)
