"""Waiting for a run, and ending it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.cluster import Cluster
from k8s.refusals import ForbiddenError, NotFoundError
from k8s.render import QUEUE, SELECTOR, STORE, Object
from k8s.runs import JOB_LABEL, Run, condition, find, is_lost, missing
from k8s.stored import impatient
from k8s.watch import changes, until

Say = Callable[[str], None]


class LateError(JobError):
    """The run is not over, and the time to wait for it is."""


def wait(
    cluster: Cluster, name: str, *, store: str | None, stop: Stop, timeout_s: float | None = None
) -> Run:
    """Return the run once it is over.

    Raises:
        LateError: it is not over after ``timeout_s``.
        JobError: 66 if it is not there.
    """
    if timeout_s is None:
        return _over(cluster, name, store, stop)
    give_up = time.monotonic() + timeout_s
    do = f"wait again, or see `lora-job why {name}`"
    late = LateError(ExitCode.STORE, name, f"is not over after {timeout_s:g} s", do)
    return impatient(
        lambda hurried: _over(cluster, name, store, hurried, give_up), seconds=timeout_s, late=late
    )


def _over(
    cluster: Cluster, name: str, store: str | None, stop: Stop, give_up: float = math.inf
) -> Run:
    which = f"metadata.name={name}"
    for jobs in changes(
        cluster, "Job", wait=stop.wait, seconds=10, give_up=give_up, fieldSelector=which
    ):
        if jobs:
            # Should it be deleted while we wait, the store still knows how it ended.
            store = (jobs[0]["metadata"].get("annotations") or {}).get(STORE) or store
        if not jobs or condition(jobs[0], "Complete") or condition(jobs[0], "Failed"):
            break
        stop.check()
    return _found(cluster, name, store, stop)


def _found(cluster: Cluster, name: str, store: str | None, stop: Stop) -> Run:
    def look() -> Run:
        return find(cluster, name, store=store, now=time.time())

    return until(look, wait=stop.wait, allowed_before=True)


def cancel(cluster: Cluster, name: str, *, now: bool, stop: Stop, say: Say) -> Run | None:
    """End a run: let its pod save a checkpoint, then delete the Job.

    Returns:
        The run as it was when its pods were gone; None for ``now``.

    Raises:
        JobError: 66 if it is not there, 73 if it is no run of lora-job's.
    """
    job = cluster.get("Job", name)
    if job is None:
        raise missing(cluster, name)
    require_ours(job)
    over = condition(job, "Complete") or condition(job, "Failed")
    run = None
    if not now and not over:
        _suspend(cluster, job)
        say("asked it to save a checkpoint and end")
        _await_pods(cluster, name, stop)
        run = _found(cluster, name, None, stop)
    cluster.delete("Job", name, propagation="Background")
    return run


def require_ours(item: Object) -> None:
    """Refuse to touch what neither lora-job nor `kubectl apply -k` of its manifests made.

    Raises:
        JobError: 73.
    """
    labels, name = item["metadata"].get("labels") or {}, item["metadata"]["name"]
    key, _, value = SELECTOR.partition("=")
    if labels.get(key) != value:
        do = "use kubectl, if it is meant"
        raise JobError(ExitCode.TAKEN, name, "it is not lora-job's", do)


def _suspend(cluster: Cluster, job: Object) -> None:
    """Suspend the Job; with Kueue its Workload, since Kueue would start the Job again."""
    workload = workload_of(cluster, job)
    if workload is not None:
        cluster.patch("Workload", workload["metadata"]["name"], {"spec": {"active": False}})
    else:
        cluster.patch("Job", job["metadata"]["name"], {"spec": {"suspend": True}})


def workload_of(cluster: Cluster, job: Object) -> Object | None:
    """Return the Job's Kueue Workload, if it has one."""
    if QUEUE not in (job["metadata"].get("labels") or {}):
        return None
    selector = f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"
    try:
        found = cluster.list("Workload", labelSelector=selector)
    except (NotFoundError, ForbiddenError):
        return None
    return found[0] if found else None


def _await_pods(cluster: Cluster, name: str, stop: Stop) -> None:
    selector = f"{JOB_LABEL}={name}"
    for pods in changes(cluster, "Pod", wait=stop.wait, labelSelector=selector):
        alive = [pod for pod in pods if pod["status"].get("phase") in ("Pending", "Running")]
        # A silent node tells of no end, however long one waits.
        if all(map(is_lost, alive)):
            return
