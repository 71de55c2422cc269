"""What `lora-job check` finds on this machine, held against what the pod asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.checks import quantity
from k8s.render import Object

GIB = 1 << 30
H100_BYTES = 80e9
CHECKPOINTS = 3
"""So many are in the disk estimate."""
SPARE = 1.1
"""Over the disk estimate: logs, caches, what compilers write."""


def check_locally(job: JobConfig, pod: Object, *, stop: Stop, say: Callable[[str], None]) -> int:
    """Refuse what the run would refuse, before anything is uploaded and a GPU is asked for.

    Returns:
        Bytes of a checkpoint; 0 where that can't be told.

    Raises:
        JobError: the first fault of the check; 78 for a disk request that is too small.
    """
    try:
        from job.check import check

        report = check(job, stop=stop)
    except ModuleNotFoundError as missing:
        extra = "pip install 'lora-job[check]'"
        say(f"data checks: left out: {missing.name} is not installed ({extra})")
        return 0
    for tried in report["checks"]:
        if not tried["ok"]:
            _refuse_or_say(tried, say)
    _require_disk(report, pod)
    total = report.get("memory", {}).get("total", 0)
    if job.device == "cuda" and total > H100_BYTES:
        say(f"memory: warning: about {total / 1e9:.0f} GB on the GPU; make batch_size less")
    return int(report.get("disk", {}).get("checkpoints", 0)) // CHECKPOINTS


def _refuse_or_say(tried: dict[str, Any], say: Callable[[str], None]) -> None:
    """Raise a fault, unless only this machine has it: credentials that are the cluster's, an extra."""
    here_only = tried["code"] == ExitCode.USAGE
    theirs = tried["check"] in ("store", "hub") and tried["code"] == ExitCode.NOT_ALLOWED
    if not here_only and not theirs:
        raise JobError(ExitCode(tried["code"]), tried["where"], tried["what"], tried["do"])
    say(f"{tried['check']}: not allowed to look: {tried['what']}")


def _require_disk(report: dict[str, Any], pod: Object) -> None:
    needed = report.get("disk", {}).get("total", 0) * SPARE
    asked = pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    if needed <= quantity(asked):
        return
    gib = math.ceil(needed / GIB)
    what = f"asks for {asked}, and the run writes about {gib} Gi"
    raise JobError(
        ExitCode.CONFIG, "ephemeral_storage", what, f"set it to {gib}Gi in the cluster file"
    )
