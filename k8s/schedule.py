"""Every night: a CronJob whose Jobs are those that submit makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from job.config import JobConfig
from job.errors import ExitCode, JobError
from k8s.checks import run_checks
from k8s.cluster import Cluster
from k8s.config import ClusterConfig
from k8s.control import require_ours
from k8s.refusals import AlreadyExistsError
from k8s.render import APP, CONFIG, MANAGED_BY, SCHEDULE, SINGLE_WRITER, Object, cron_objects
from k8s.runs import condition, seconds
from k8s.submit import Say, ensure_config, ours, own, refuse_wrong, sweep

MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


DEFAULT_ZONE = "Etc/UTC"
START_DEADLINE_S = 3600
"""A night that could not start in an hour (the control plane was away) is left out."""


def next_times(cron: str, time_zone: str, *, after: datetime, count: int = 3) -> list[datetime]:
    """Return when a line of cron fires next.

    Raises:
        JobError: 78 for a line that never fires, or an unknown time zone. What only other crons
            know (L, W, #) the server's dry run refuses.
    """
    from cronsim import CronSim, CronSimError

    zone = _zone(time_zone)
    line = MACROS.get(cron, cron)
    if len(line.split()) != 5:
        raise _bad_cron(cron, "needs five fields: minute hour day month weekday")
    try:
        moments = CronSim(line, after.astimezone(zone))
        found = [moment for moment, _ in zip(moments, range(count), strict=False)]
    except CronSimError as error:
        raise _bad_cron(cron, str(error).lower()) from error
    if not found:
        raise _bad_cron(cron, "never fires")
    return found


def _zone(name: str) -> ZoneInfo:
    try:
        # Kubernetes refuses "Local", which here would be a file's name.
        return ZoneInfo("" if name == "Local" else name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        do = "use a name of the tz database, such as Europe/Berlin or Etc/UTC"
        raise JobError(ExitCode.CONFIG, "--time-zone", f"there is no {name!r}", do) from error


def _bad_cron(cron: str, what: str) -> JobError:
    do = 'write it like "0 2 * * *", every night at two'
    return JobError(ExitCode.CONFIG, f"--cron {cron!r}", what, do)


def schedule(
    cluster: Cluster,
    settings: ClusterConfig,
    job: JobConfig,
    *,
    cron: str,
    time_zone: str | None,
    start_deadline_s: int | None,
    send: Callable[[], None],
    say: Say,
) -> None:
    """Create the CronJob, or change the one that is there: what is not named stays as it was.

    Raises:
        JobError: whatever the cluster refuses; 73 for a CronJob of that name that is not ours.
    """
    there = ours(cluster, "CronJob", job.name)
    was = there["spec"] if there else {}
    if start_deadline_s is None:
        start_deadline_s = was.get("startingDeadlineSeconds", START_DEADLINE_S)
    config, item = cron_objects(
        job,
        settings,
        cron=cron,
        time_zone=time_zone or was.get("timeZone") or DEFAULT_ZONE,
        start_deadline_s=start_deadline_s,
        suspend=was.get("suspend", False),
    )
    refuse_wrong(run_checks(cluster, settings, job, [config, item]), say)
    send()
    sweep(cluster)
    ensure_config(cluster, config)
    try:
        owner = cluster.create(item).body
    except AlreadyExistsError:
        owner = cluster.replace(item)
    own(cluster, config["metadata"]["name"], owner)
    _drop_old_configs(cluster, job.name, keep=config["metadata"]["name"])


def _drop_old_configs(cluster: Cluster, name: str, *, keep: str) -> None:
    """Delete job files of earlier versions of a schedule that no unfinished Job reads."""
    selector = f"{MANAGED_BY}={APP},lora-job/name={name}"
    for item in cluster.list("ConfigMap", labelSelector=selector):
        owners = item["metadata"].get("ownerReferences") or []
        config = item["metadata"]["name"]
        if config == keep or not any(it["kind"] == "CronJob" for it in owners):
            continue
        if not cluster.list("Job", labelSelector=f"{CONFIG}={config}", limit=1):
            cluster.delete("ConfigMap", config)


def find(cluster: Cluster, name: str) -> Object:
    """Return a schedule's CronJob.

    Raises:
        JobError: 66 if there is none, 73 if it is not lora-job's.
    """
    item = cluster.get("CronJob", name)
    if item is None:
        there = cluster.list("CronJob", labelSelector=f"{MANAGED_BY}={APP}")
        names = [it["metadata"]["name"] for it in there]
        do = f"use one of: {', '.join(names)}" if names else "make one: --cron and --time-zone"
        where = f"{cluster.namespace}/{name}"
        raise JobError(ExitCode.NOT_FOUND, where, "there is no such schedule", do)
    require_ours(item)
    return item


def suspend(cluster: Cluster, name: str, *, on: bool) -> None:
    """Stop a schedule from firing, or let it fire again."""
    find(cluster, name)
    cluster.patch("CronJob", name, {"spec": {"suspend": on}})


def delete(cluster: Cluster, name: str) -> list[str]:
    """Delete a schedule, and with it its Jobs, also those that run; return their names."""
    find(cluster, name)
    jobs = cluster.list("Job", labelSelector=f"{SCHEDULE}={name}")
    cluster.delete("CronJob", name)
    return [job["metadata"]["name"] for job in jobs]


def run_now(cluster: Cluster, name: str, *, now: float | None = None) -> tuple[str, bool]:
    """Fire a schedule now; return the run, and whether it is new.

    The Job gets the name that the CronJob's own controller would give it for this minute, so that
    two calls, or a call and the clock, are one run.
    """
    item = find(cluster, name)
    run = f"{name}-{int((now or time.time()) // 60)}"
    template = item["spec"]["jobTemplate"]
    if SINGLE_WRITER in template["metadata"].get("annotations", {}):
        _require_idle(cluster, name, other_than=run)
    owner: Object = {"apiVersion": "batch/v1", "kind": "CronJob", "name": name}
    owner |= {"uid": item["metadata"]["uid"], "controller": True}
    metadata: Object = {
        "name": run,
        "namespace": cluster.namespace,
        "labels": template["metadata"].get("labels", {}) | {SCHEDULE: name},
        "annotations": template["metadata"].get("annotations", {})
        | {"cronjob.kubernetes.io/instantiate": "manual"},
        "ownerReferences": [owner],
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]}
    try:
        cluster.create(job)
    except AlreadyExistsError:
        return run, False
    return run, True


def _require_idle(cluster: Cluster, name: str, *, other_than: str) -> None:
    """Refuse a second writer where the store can't: the job file says `single_writer`."""
    for job in cluster.list("Job", labelSelector=f"{SCHEDULE}={name}"):
        run, over = job["metadata"]["name"], condition(job, "Complete") or condition(job, "Failed")
        if not over and run != other_than:
            do = f"wait for it, or `lora-job cancel {run}`"
            raise JobError(ExitCode.TAKEN, name, f"{run} is not over (single_writer)", do)


def describe(item: Object) -> dict[str, Any]:
    """Return a schedule with the times at which it fires next."""
    spec, status = item["spec"], item.get("status", {})
    suspended, zone = bool(spec.get("suspend")), spec.get("timeZone", "")
    times = next_times(spec["schedule"], zone or DEFAULT_ZONE, after=datetime.now(UTC))
    return {
        "name": item["metadata"]["name"],
        "cron": spec["schedule"],
        "time_zone": zone,
        "suspended": suspended,
        "last": seconds(status.get("lastScheduleTime")),
        "active": [it["name"] for it in status.get("active") or []],
        "next": [] if suspended else [it.isoformat() for it in times],
    }
