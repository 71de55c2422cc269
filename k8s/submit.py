"""One run, one Job: create it, attach to it, or create it again after it failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.checks import Finding, run_checks
from k8s.cluster import Cluster
from k8s.config import ClusterConfig
from k8s.refusals import AlreadyExistsError
from k8s.render import APP, MANAGED_BY, OWNED, Object, objects
from k8s.runs import condition, seconds
from k8s.watch import changes

Say = Callable[[str], None]

ORPHAN_S = 600.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a submission."""

    run: str
    outcome: Literal["created", "attached", "created again"]
    findings: tuple[Finding, ...] = ()


def submit(
    cluster: Cluster, settings: ClusterConfig, job: JobConfig, run: str, *, stop: Stop, say: Say
) -> Submitted:
    """Check, then make sure that the run has exactly one Job.

    Raises:
        JobError: whatever the cluster refuses; 73 for a Job of that name that is not ours.
    """
    config, manifest = objects(job, settings, run=run)
    there = _ours(cluster, run)
    if there is not None and not condition(there, "Failed"):
        return Submitted(run, "attached")
    findings = tuple(run_checks(cluster, settings, job, [config, manifest]))
    refuse_wrong(findings, say)
    if there is not None:
        say(f"the Job failed before: deleting it, {run} goes on from its checkpoint")
        _delete(cluster, there, stop, say)
    sweep(cluster)
    ensure_config(cluster, config)
    try:
        created = cluster.create(manifest).body
    except AlreadyExistsError:
        return Submitted(run, "attached", findings)
    own(cluster, config["metadata"]["name"], created)
    return Submitted(run, "created again" if there else "created", findings)


def refuse_wrong(findings: tuple[Finding, ...], say: Say) -> None:
    """Tell all findings that are not plainly ok, and refuse if one is wrong.

    Raises:
        JobError: 78 with everything that is wrong.
    """
    for one in findings:
        if one.state in ("warning", "not allowed to look"):
            say(f"{one.check}: {one.state}: {one.what}; {one.do}")
    wrong = [one for one in findings if one.state == "wrong"]
    if wrong:
        what = "; ".join(f"{one.check}: {one.what}" for one in wrong)
        raise JobError(ExitCode.CONFIG, "cluster", what, "; ".join(one.do for one in wrong))


def _ours(cluster: Cluster, run: str) -> Object | None:
    job = cluster.get("Job", run)
    if job and job["metadata"].get("labels", {}).get(MANAGED_BY) != APP:
        do = "name your job differently, or delete that one"
        where = f"{cluster.namespace}/{run}"
        raise JobError(ExitCode.TAKEN, where, "a Job of this name is not lora-job's", do)
    if job and job["metadata"].get("deletionTimestamp"):
        do = "wait a moment, or see what holds its pod: kubectl get pods"
        where = f"{cluster.namespace}/{run}"
        raise JobError(ExitCode.TAKEN, where, "its Job is just being deleted", do)
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
        if there is not None and there.get("data") == config["data"]:
            return
        cluster.delete("ConfigMap", name)
        cluster.create(config)


def own(cluster: Cluster, config: str, owner: Object) -> None:
    """Let a ConfigMap go when its owner goes."""
    reference = {key: owner[key] for key in ("apiVersion", "kind")}
    reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
    metadata = {"labels": {OWNED: "true"}, "ownerReferences": [reference]}
    cluster.patch("ConfigMap", config, {"metadata": metadata})


def sweep(cluster: Cluster) -> list[str]:
    """Delete ConfigMaps whose submitter died before there was a Job; adopt those that have one."""
    swept = []
    selector = f"{MANAGED_BY}={APP},{OWNED}=false"
    for item in cluster.list("ConfigMap", labelSelector=selector):
        name, created = item["metadata"]["name"], seconds(item["metadata"]["creationTimestamp"])
        if time.time() - (created or 0.0) < ORPHAN_S:
            continue
        job = cluster.get("Job", name)
        if job:
            own(cluster, name, job)
        elif cluster.delete("ConfigMap", name):
            swept.append(name)
    return swept
