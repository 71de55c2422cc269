"""The verbs of a cluster: flags say where; words go to stderr, data to stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import ExitCode, JobError
from k8s import verb_schedule, verb_submit
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
    from k8s.runs import Run

TIMED_OUT = 124
"""As timeout(1) has it: no code of a run's own."""
BESIDE = "by itself cluster.yaml beside the job file"


def add_parsers(verbs: Any) -> None:
    """Add a subparser for each verb of ``k8s``."""
    submit = _verb(verbs, "submit", verb_submit.call, "run a job on a cluster")
    _files(submit)
    submit.add_argument("--new", action="store_true", help="another run of the same job file")
    submit.add_argument(
        "--follow", action="store_true", help="show its log to the end; its exit code"
    )
    _offline(submit)
    _output(submit)

    render = _verb(verbs, "render", _render, "the objects that submit would send, as YAML")
    _files(render)
    _offline(render)

    for name, call, text in (
        ("status", _status, "one screen about a run"),
        ("why", _why, "why it is not running, or why it failed"),
    ):
        parser = _verb(verbs, name, call, text)
        _run(parser)
        _output(parser)

    logs = _verb(verbs, "logs", _logs, "a run's log, all attempts")
    _run(logs)
    logs.add_argument("--follow", "-f", action="store_true", help="to the end of the run")

    codes = f"wait for a run; its own exit code, or {TIMED_OUT} (--timeout), 130 (Ctrl-C)"
    wait = _verb(verbs, "wait", _wait, codes)
    _run(wait)
    wait.add_argument("--timeout", type=float, metavar="SECONDS")
    _output(wait)

    cancel = _verb(verbs, "cancel", _cancel, "save a checkpoint, then end a run")
    _run(cancel)
    cancel.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    _output(cancel)

    listing = _verb(verbs, "list", _list, "the newest runs")
    _where(listing)
    listing.add_argument("--selector", "-l", help="only Jobs with these labels")
    listing.add_argument("--limit", type=int, default=20)
    _output(listing)

    _add_schedule(verbs)
    doctor = _verb(verbs, "doctor", _doctor, "could a job run here? all of submit's checks")
    _files(doctor)
    _offline(doctor)
    _output(doctor)


def _add_schedule(verbs: Any) -> None:
    parser = _verb(verbs, "schedule", verb_schedule.call, "run a job every night")
    parser.add_argument("job", metavar="JOB.yaml|NAME", help="a job file; a name for what is there")
    parser.add_argument("--cluster", type=Path, metavar="CLUSTER.yaml", help=BESIDE)
    parser.add_argument("--cron", metavar="LINE", help='such as "0 2 * * *"')
    parser.add_argument(
        "--time-zone", metavar="ZONE", help="Europe/Berlin; by itself as it was, or Etc/UTC"
    )
    late = "how late a night may start; by itself as it was, or 3600"
    parser.add_argument("--start-deadline", type=int, metavar="SECONDS", help=late)
    deed = parser.add_mutually_exclusive_group()
    for flag, text in (
        ("--run-now", "fire it now"),
        ("--suspend", "stop it from firing"),
        ("--resume", "let it fire again"),
        ("--delete", "delete it, and its Jobs"),
    ):
        deed.add_argument(flag, action="store_true", help=text)
    _where(parser)
    _output(parser)


def _verb(verbs: Any, name: str, call: Callable[[argparse.Namespace], int], text: str) -> Any:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(call=call, verb=name)
    return parser


def _files(parser: Any) -> None:
    parser.add_argument("job", type=Path, metavar="JOB.yaml")
    parser.add_argument("--cluster", type=Path, metavar="CLUSTER.yaml", help=BESIDE)
    _where(parser)


def _offline(parser: Any) -> None:
    parser.add_argument(
        "--no-data-checks", action="store_true", help="look at the cluster only, not at the store"
    )


def _run(parser: Any) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--store", help="where to look once the Job is gone")
    _where(parser)


def _where(parser: Any) -> None:
    parser.add_argument("--namespace", "-n", help="instead of the cluster file's, or the context's")
    parser.add_argument("--context", help="a context of the kubeconfig")


def _output(parser: Any) -> None:
    parser.add_argument(
        "--output", "-o", choices=["text", "json"], default="text", help="on stdout"
    )


def _render(arguments: argparse.Namespace) -> int:
    from k8s.grace import with_grace
    from k8s.inputs import place
    from k8s.render import objects, run_name, to_yaml

    settings, job = settings_of(arguments), load(arguments.job)
    job, inputs = place(job, stop=new_stop())
    for one in inputs:
        say(f"{one.folder}: submit uploads it first; a run without it ends with 66")
    run = run_name(job)
    if not arguments.no_data_checks:
        settings = with_grace(job, settings, run, say=say)
    sys.stdout.write(to_yaml(list(objects(job, settings, run=run))))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from k8s.status import print_status

    now = time.time()
    run = _found(arguments, now)
    print_json(run.as_json()) if wants_json(arguments) else print_status(run, sys.stdout, now=now)
    return 0


def _found(arguments: argparse.Namespace, now: float) -> Run:
    from k8s.runs import assemble, find
    from k8s.stored import read_run

    try:
        cluster = open_cluster(arguments)
    except JobError as error:
        # Without a kubeconfig, a store that was named can still tell.
        if error.code is not ExitCode.NOT_FOUND or arguments.store is None:
            raise
        stored = read_run(arguments.store, arguments.run)
        if not stored.head:
            raise
        return assemble(arguments.run, None, [], stored, now=now)
    return find(cluster, arguments.run, store=arguments.store, now=now)


def _why(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from k8s.facts import gather
    from k8s.why import why

    answer = why(gather(open_cluster(arguments), arguments.run, store=arguments.store))
    print_json(asdict(answer)) if wants_json(arguments) else print(f"{answer.cause}: {answer}")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from k8s import logs

    cluster = open_cluster(arguments)
    if not arguments.follow:
        logs.show(cluster, arguments.run, write_line, store=arguments.store)
        return 0
    try:
        logs.follow(cluster, arguments.run, write_line, new_stop(), waiting=lambda: None)
    except KeyboardInterrupt:
        return _detached(arguments.run)
    return 0


def _detached(run: str) -> int:
    say(f"\ndetached: {run} goes on")
    return verb_submit.DETACHED


def _wait(arguments: argparse.Namespace) -> int:
    from k8s.control import LateError, wait

    cluster, name = open_cluster(arguments), arguments.run
    where = {"store": arguments.store, "timeout_s": arguments.timeout}
    try:
        with waiting(f"waiting for {name}"):
            run = wait(cluster, name, stop=new_stop(), **where)
    except LateError as error:
        say(f"lora-job: {error}")
        return TIMED_OUT
    except KeyboardInterrupt:
        return _detached(name)
    return verb_submit.tell_end(run, arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    from k8s.control import cancel

    cluster = open_cluster(arguments)
    with waiting(f"ending {arguments.run}"):
        run = cancel(cluster, arguments.run, now=arguments.now, stop=new_stop(), say=say)
    kept = (
        f"its checkpoint is step {run.checkpoint}"
        if run and run.checkpoint
        else "no checkpoint known"
    )
    say(f"{arguments.run}: cancelled, {kept}; submit its job file again to go on")
    if wants_json(arguments):
        checkpoint = run.checkpoint if run else None
        print_json({"run": arguments.run, "outcome": "cancelled", "checkpoint": checkpoint})
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from k8s.status import list_runs, print_list

    runs = list_runs(open_cluster(arguments), selector=arguments.selector, limit=arguments.limit)
    if wants_json(arguments):
        print_json([run.as_json() for run in runs])
    else:
        print_list(runs, sys.stdout, now=time.time())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from k8s.checks import pod_of, run_checks
    from k8s.local_checks import local_findings, look
    from k8s.render import objects, run_name

    settings, job, stop = settings_of(arguments), load(arguments.job), new_stop()
    cluster = open_cluster(settings)
    items = list(objects(job, settings, run=run_name(job)))
    findings = list(run_checks(cluster, settings, job, items))
    if not arguments.no_data_checks:
        findings += local_findings(look(job, stop=stop), job, pod_of(items))
    if wants_json(arguments):
        print_json([asdict(one) for one in findings])
    else:
        for one in findings:
            print(f"{one.state:<20}{one.check}: {one.what}" + (f"; {one.do}" if one.do else ""))
    return next((int(one.code or ExitCode.CONFIG) for one in findings if one.state == "wrong"), 0)
