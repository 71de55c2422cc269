"""``lora-job schedule``: make a nightly job, change it, fire it, or say when it fires."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import ExitCode, JobError
from k8s.terminal import (
    load,
    new_stop,
    open_cluster,
    print_json,
    say,
    settings_of,
    wants_json,
)

if TYPE_CHECKING:
    from job.config import JobConfig
    from k8s.cluster import Cluster


def call(arguments: argparse.Namespace) -> int:
    """Make or change a schedule, then print what it is now."""
    from k8s import schedule

    is_file = Path(arguments.job).suffix in (".yaml", ".yml")
    job = load(Path(arguments.job)) if is_file else None
    name = job.name if job else str(arguments.job)
    done: dict[str, Any] = {}
    if arguments.cron:
        if job is None:
            do = "lora-job schedule JOB.yaml --cron …"
            raise JobError(ExitCode.USAGE, "schedule", "--cron needs a job file, not a name", do)
        cluster = _create_schedule(job, arguments)
    else:
        beside = is_file and Path(arguments.job).with_name("cluster.yaml").is_file()
        by_file = arguments.cluster or beside
        cluster = open_cluster(settings_of(arguments) if by_file else arguments)
        done = _change_schedule(cluster, name, arguments)
    if not arguments.delete:
        done |= schedule.describe(schedule.find(cluster, name))
    if wants_json(arguments):
        print_json(done)
    elif not arguments.delete:
        _print_schedule(done)
    return 0


def _create_schedule(job: JobConfig, arguments: argparse.Namespace) -> Cluster:
    from datetime import UTC, datetime

    from k8s import inputs, schedule
    from k8s.grace import with_grace

    stop, settings = new_stop(), settings_of(arguments)
    zone = arguments.time_zone or schedule.DEFAULT_ZONE
    schedule.next_times(arguments.cron, zone, after=datetime.now(UTC))
    cluster = open_cluster(settings)
    placed, local = inputs.place(job, stop=stop)
    schedule.schedule(
        cluster,
        with_grace(job, settings, job.name, say=say),
        placed,
        send=partial(inputs.send, placed, local, stop=stop, say=say),
        cron=arguments.cron,
        time_zone=arguments.time_zone,
        start_deadline_s=arguments.start_deadline,
        say=say,
    )
    return cluster


def _change_schedule(cluster: Cluster, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what the flags ask for; return what a program should know of it."""
    from k8s import schedule

    if arguments.run_now:
        run, new = schedule.run_now(cluster, name)
        say(f"{run}: {'created' if new else 'this minute has fired already'}")
        return {"run": run, "new": new}
    if arguments.suspend or arguments.resume:
        schedule.suspend(cluster, name, on=arguments.suspend)
    elif arguments.delete:
        jobs = schedule.delete(cluster, name)
        say(f"{name}: deleted" + (f", and with it {', '.join(jobs)}" if jobs else ""))
        return {"name": name, "outcome": "deleted", "jobs": jobs}
    return {}


def _print_schedule(about: dict[str, Any]) -> None:
    print(f"{about['name']}: {about['cron']} {about['time_zone']}")
    print(f"next   {', '.join(about['next']) or 'suspended'}")
    if about["active"]:
        print(f"runs   {', '.join(about['active'])}")
