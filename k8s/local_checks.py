"""What `lora-job check` finds on this machine, held against what the pod asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.checks import Finding, State, quantity
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
    report = look(job, stop=stop)
    for one in local_findings(report, job, pod):
        if one.state == "wrong":
            raise JobError(one.code or ExitCode.CONFIG, one.check, one.what, one.do)
        if one.state != "ok":
            say(str(one))
    return int(report.get("disk", {}).get("checkpoints", 0)) // CHECKPOINTS


def look(job: JobConfig, *, stop: Stop) -> dict[str, Any]:
    """Return the report of `lora-job check`; only ``missing`` where it can't run here."""
    try:
        from job.check import check

        return check(job, stop=stop)
    except ModuleNotFoundError as missing:
        return {"checks": [], "missing": missing.name}


def local_findings(report: dict[str, Any], job: JobConfig, pod: Object) -> Iterator[Finding]:
    """Yield what a report says about a run in this pod."""
    if "missing" in report:
        what = f"left out: {report['missing']} is not installed"
        do = "pip install 'lora-job[check]'"
        yield Finding("data checks", "warning", what, do)
    yield from map(_finding, report["checks"])
    yield from _sizes(report, job, pod)


def _finding(tried: dict[str, Any]) -> Finding:
    check = tried["check"]
    if tried["ok"]:
        return Finding(check, "ok", "tried on this machine")
    # Only this machine has it: credentials that are the cluster's, or an extra.
    here_only = tried["code"] == ExitCode.USAGE
    theirs = check in ("store", "hub") and tried["code"] == ExitCode.NOT_ALLOWED
    state: State = "not allowed to look" if here_only or theirs else "wrong"
    what = tried["what"] if tried["where"] == check else f"{tried['where']}: {tried['what']}"
    return Finding(check, state, what, tried["do"], ExitCode(tried["code"]))


def _sizes(report: dict[str, Any], job: JobConfig, pod: Object) -> Iterator[Finding]:
    """Yield what is too small for the run: the pod's disk, or perhaps the GPU's memory."""
    needed = report.get("disk", {}).get("total", 0) * SPARE
    asked = pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    if needed > quantity(asked):
        gib = math.ceil(needed / GIB)
        what = f"asks for {asked}, and the run writes about {gib} Gi"
        do = f"set it to {gib}Gi in the cluster file"
        yield Finding("ephemeral_storage", "wrong", what, do)
    total = report.get("memory", {}).get("total", 0)
    if job.device == "cuda" and total > H100_BYTES:
        what = f"about {total / 1e9:.0f} GB on the GPU"
        yield Finding("memory", "warning", what, "make batch_size less")
