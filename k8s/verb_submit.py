"""``lora-job submit``: check, upload, create, and follow to the run's own end."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

from k8s.terminal import (
    load,
    new_stop,
    open_cluster,
    print_json,
    say,
    settings_of,
    waiting,
    wants_json,
    write_line,
)

if TYPE_CHECKING:
    from job.config import JobConfig
    from job.stop import Stop
    from k8s.cluster import Cluster
    from k8s.config import ClusterConfig
    from k8s.runs import Run


DETACHED = 130
"""What a shell says of a program that Ctrl-C ended: nothing is verified yet."""


def call(arguments: argparse.Namespace) -> int:
    """Submit a job file, and print the run's id or follow it."""
    from k8s.inputs import place, send
    from k8s.render import run_name
    from k8s.submit import attach, create

    settings, job, stop = settings_of(arguments), load(arguments.job), new_stop()
    cluster = open_cluster(settings)
    placed, inputs = place(job, stop=stop)
    run = run_name(placed, new=str(time.time_ns()) if arguments.new else None)
    # A run that is there is joined before anything is looked at, which takes far longer.
    outcome = attach(cluster, settings, placed, run)
    if outcome is None:
        if not arguments.no_data_checks:
            settings = _looked_at(job, placed, settings, run, stop)
        with waiting(f"submitting {run}"):
            sending = partial(send, placed, inputs, stop=stop, say=say)
            outcome = create(cluster, settings, placed, run, send=sending, stop=stop, say=say)
    say(f"{run}: {outcome}; see it: lora-job status {run} -n {cluster.namespace}")
    if arguments.follow:
        return _follow(cluster, run, placed.store, arguments)
    print_json({"run": run, "outcome": outcome}) if wants_json(arguments) else print(run)
    return 0


def _looked_at(
    job: JobConfig, placed: JobConfig, settings: ClusterConfig, run: str, stop: Stop
) -> ClusterConfig:
    """Check the run on this machine; return its settings with the grace period that it needs."""
    from k8s.checks import pod_of
    from k8s.grace import with_grace
    from k8s.local_checks import check_locally
    from k8s.render import objects

    pod = pod_of([*objects(placed, settings, run=run)])
    saved = check_locally(job, pod, stop=stop, say=say)
    return with_grace(placed, settings, run, say=say, checkpoint_bytes=saved)


def _follow(cluster: Cluster, run: str, store: str, arguments: argparse.Namespace) -> int:
    from k8s import control, logs
    from k8s.facts import gather
    from k8s.watch import until
    from k8s.why import why

    stop, said = new_stop(), ""

    def tell_why() -> None:
        nonlocal said
        answer = until(
            lambda: why(gather(cluster, run, store=store)), wait=stop.wait, allowed_before=True
        )
        if str(answer) != said and answer.cause not in ("starting", "running"):
            said = str(answer)
            say(f"waiting: {said}")

    try:
        logs.follow(cluster, run, write_line, stop, waiting=tell_why)
        done = control.wait(cluster, run, store=store, stop=stop)
    except KeyboardInterrupt:
        back = f"lora-job logs {run} -f -n {cluster.namespace}"
        say(f"\ndetached: {run} goes on. Come back with: {back}")
        return DETACHED
    return tell_end(done, arguments)


def tell_end(run: Run, arguments: argparse.Namespace) -> int:
    """Print the Receipt, or why there is none; return the run's own exit code."""
    if wants_json(arguments):
        print_json(run.as_json())
    elif run.receipt:
        print_json(run.receipt)
    if run.code:
        end = run.last_end or {}
        text = "; ".join(str(end[key]) for key in ("what", "do") if end.get(key))
        say(f"lora-job: {run.name}: {run.state} with {run.code}: {text or 'see lora-job why'}")
    return int(run.code)
