"""One run, one Job: create it, attach to it, or create it again after it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.checks import Finding, run_checks
from k8s.cluster import Cluster
from k8s.config import ClusterConfig
from k8s.control import workload_of
from k8s.facts import allowed
from k8s.refusals import AlreadyExistsError, NotFoundError
from k8s.render import APP, CONFIG, MADE_FROM, MANAGED_BY, OWNED, QUEUE, Object, objects
from k8s.runs import condition, seconds
from k8s.watch import changes

Say = Callable[[str], None]

Outcome = Literal["created", "attached", "resumed", "created again"]

ORPHAN_S = 600.0


def attach(cluster: Cluster, settings: ClusterConfig, job: JobConfig, run: str) -> Outcome | None:
    """Leave the run's Job, if there is one that did not fail; let it go on if it was ending.

    Raises:
        JobError: 73 for a Job of that name that is not ours, that is just being deleted, or that
            goes on with other settings than these.
    """
    there = _unless_ending(ours(cluster, "Job", run))
    if there is None or condition(there, "Failed"):
        return None
    if condition(there, "Complete"):
        return "attached"
    notes = there["metadata"].get("annotations") or {}
    wanted = objects(job, settings, run=run)[1]["metadata"]["annotations"][MADE_FROM]
    if notes.get(MADE_FROM, wanted) != wanted:
        what = "it runs with another cluster file"
        do = f"`lora-job cancel {run} -n {cluster.namespace}` first, or --new for another run"
        raise JobError(ExitCode.TAKEN, run, what, do)
    return "resumed" if _resume(cluster, there) else "attached"


def create(
    cluster: Cluster,
    settings: ClusterConfig,
    job: JobConfig,
    run: str,
    *,
    send: Callable[[], None],
    stop: Stop,
    say: Say,
) -> Outcome:
    """Look at the cluster, send the run's inputs, and make its Job; one that failed goes first.

    Raises:
        JobError: 78 for what is wrong with the cluster; whatever the cluster or the store refuses.
    """
    config, manifest = objects(job, settings, run=run)
    refuse_wrong(run_checks(cluster, settings, job, [config, manifest]), say)
    send()
    failed = ours(cluster, "Job", run)
    if failed is not None and condition(failed, "Failed"):
        say(f"the Job failed before: deleting it, {run} goes on from its checkpoint")
        _delete(cluster, failed, stop, say)
    sweep(cluster)
    ensure_config(cluster, config)
    try:
        created = cluster.create(manifest).body
    except AlreadyExistsError:  # somebody else submitted it meanwhile
        return attach(cluster, settings, job, run) or "attached"
    own(cluster, config["metadata"]["name"], created)
    return "created again" if failed else "created"


def _resume(cluster: Cluster, job: Object) -> bool:
    """Take back a cancel that did not get to its end; return whether there was one."""
    workload = workload_of(cluster, job)
    if workload is not None and workload["spec"].get("active") is False:
        cluster.patch("Workload", workload["metadata"]["name"], {"spec": {"active": True}})
        return True
    # A Job of a queue is Kueue's to start.
    if QUEUE in job["metadata"]["labels"] or not job["spec"].get("suspend"):
        return False
    cluster.patch("Job", job["metadata"]["name"], {"spec": {"suspend": False}})
    return True


def refuse_wrong(findings: Iterable[Finding], say: Say) -> None:
    """Tell all findings that are not plainly ok, and refuse if one is wrong.

    Raises:
        JobError: everything that is wrong, with the code of the first.
    """
    wrong = []
    for one in findings:
        if one.state == "wrong":
            wrong.append(one)
        elif one.state != "ok":
            say(str(one))
    if wrong:
        what = "; ".join(f"{one.check}: {one.what}" for one in wrong)
        raise JobError(
            wrong[0].code or ExitCode.CONFIG, "cluster", what, "; ".join(one.do for one in wrong)
        )


def ours(cluster: Cluster, kind: str, name: str) -> Object | None:
    """Return an object that lora-job made, or None if there is none.

    Raises:
        JobError: 73 if somebody else made it.
    """
    item = cluster.get(kind, name)
    if item and item["metadata"].get("labels", {}).get(MANAGED_BY) != APP:
        do = "name your job differently, or delete that one"
        what = f"a {kind} of this name is not lora-job's"
        raise JobError(ExitCode.TAKEN, f"{cluster.namespace}/{name}", what, do)
    return item


def _unless_ending(job: Object | None) -> Object | None:
    if job and job["metadata"].get("deletionTimestamp"):
        do = "wait a moment, or see what holds its pod: kubectl get pods"
        name = job["metadata"]["name"]
        raise JobError(ExitCode.TAKEN, name, "its Job is just being deleted", do)
    return job


def _delete(cluster: Cluster, job: Object, stop: Stop, say: Say) -> None:
    """Delete a Job and return when it and its pods are gone: one writer of a run at a time."""
    name = job["metadata"]["name"]
    cluster.delete("Job", name, propagation="Foreground")
    selector = f"metadata.name={name}"
    began = time.monotonic()
    for left in changes(cluster, "Job", wait=stop.wait, seconds=20, fieldSelector=selector):
        if not left or left[0]["metadata"]["uid"] != job["metadata"]["uid"]:
            break
        if time.monotonic() - began > 20:
            say(f"waiting for the pods of {name} to go")
    # Its owner is gone: the garbage collector would take it from under the new Job.
    cluster.delete("ConfigMap", name)


def ensure_config(cluster: Cluster, config: Object) -> None:
    """Create the ConfigMap, or find it there with the very same job file."""
    name = config["metadata"]["name"]
    try:
        cluster.create(config)
    except AlreadyExistsError:
        there = cluster.get("ConfigMap", name)
        if there is not None and there.get("data") == config["data"] and _disowned(cluster, name):
            return
        cluster.delete("ConfigMap", name)
        cluster.create(config)


def _disowned(cluster: Cluster, name: str) -> bool:
    """Take a ConfigMap from an owner that may just be dying; return whether it is still there."""
    change = {"metadata": {"ownerReferences": None, "labels": {OWNED: "false"}}}
    try:
        cluster.patch("ConfigMap", name, change)
    except NotFoundError:
        return False
    return True


def own(cluster: Cluster, config: str, owner: Object) -> None:
    """Let a ConfigMap go when its owner goes."""
    reference = {key: owner[key] for key in ("apiVersion", "kind")}
    reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
    metadata = {"labels": {OWNED: "true"}, "ownerReferences": [reference]}
    cluster.patch("ConfigMap", config, {"metadata": metadata})


def sweep(cluster: Cluster) -> None:
    """Delete ConfigMaps whose submitter died before there was a Job; adopt those that have one."""
    selector = f"{MANAGED_BY}={APP},{OWNED}=false"
    for item in cluster.list("ConfigMap", labelSelector=selector):
        name, created = item["metadata"]["name"], seconds(item["metadata"]["creationTimestamp"])
        if time.time() - (created or 0.0) < ORPHAN_S:
            continue
        mounts = partial(cluster.list, "CronJob", labelSelector=f"{CONFIG}={name}")
        crons = allowed(mounts, None)
        owner = cluster.get("Job", name) or next(iter(crons or []), None)
        if owner:
            own(cluster, name, owner)
        elif crons is not None:  # else nobody knows: this Role may not see schedules
            cluster.delete("ConfigMap", name)
