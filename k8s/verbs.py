"""The verbs of a cluster: flags say where; words go to stderr, data to stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import ExitCode, JobError

if TYPE_CHECKING:
    from job.config import JobConfig
    from k8s.cluster import Cluster
    from k8s.config import ClusterConfig


def add_parsers(verbs: Any) -> None:
    """Add a subparser for each verb of ``k8s``."""
    submit = _verb(verbs, "submit", _submit, "run a job on a cluster")
    _files(submit)
    submit.add_argument("--new", action="store_true", help="another run of the same job file")
    submit.add_argument(
        "--follow", action="store_true", help="show its log to the end; its exit code"
    )
    submit.add_argument("--no-data-checks", action="store_true", help="ask the cluster only")
    _output(submit)

    render = _verb(verbs, "render", _render, "the objects that submit would send, as YAML")
    _files(render)

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

    wait = _verb(verbs, "wait", _wait, "wait for a run; its own exit code")
    _run(wait)
    wait.add_argument("--timeout", type=float, metavar="SECONDS")
    _output(wait)

    cancel = _verb(verbs, "cancel", _cancel, "save a checkpoint, then end a run")
    _run(cancel)
    cancel.add_argument("--now", action="store_true", help="do not wait for a checkpoint")

    listing = _verb(verbs, "list", _list, "the newest runs")
    _where(listing)
    listing.add_argument("--selector", "-l", help="only Jobs with these labels")
    listing.add_argument("--limit", type=int, default=20)
    _output(listing)

    _add_schedule(verbs)
    doctor = _verb(verbs, "doctor", _doctor, "could a job run here? all of submit's checks")
    _files(doctor)
    _output(doctor)


def _add_schedule(verbs: Any) -> None:
    parser = _verb(verbs, "schedule", _schedule, "run a job every night")
    parser.add_argument("job", metavar="JOB.yaml|NAME", help="a job file; a name for what is there")
    parser.add_argument("--cluster", type=Path, metavar="CLUSTER.yaml")
    parser.add_argument("--cron", metavar="LINE", help='such as "0 2 * * *"')
    parser.add_argument("--time-zone", metavar="ZONE", default="Etc/UTC", help="Europe/Berlin")
    parser.add_argument("--start-deadline", type=int, default=3600, metavar="SECONDS")
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
    parser.add_argument("--cluster", type=Path, required=True, metavar="CLUSTER.yaml")
    _where(parser)


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _as_json(arguments: argparse.Namespace) -> bool:
    return bool(arguments.output == "json")


def _stop() -> Any:
    from job import logs
    from job.stop import Stop

    # No signal handlers: Ctrl-C ends what waits here, and never the run.
    logs.configure()
    return Stop()


@contextlib.contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Show that somebody is waited for: a spinner on a TTY, one line elsewhere."""
    if not sys.stderr.isatty():
        _say(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _settings(arguments: argparse.Namespace) -> ClusterConfig:
    from k8s.config import load_cluster

    settings = load_cluster(arguments.cluster)
    flags = {"namespace": arguments.namespace, "context": arguments.context}
    return settings.model_copy(update={key: value for key, value in flags.items() if value})


def _connect(arguments: argparse.Namespace) -> Cluster:
    from k8s.connect import connect

    return connect(context=arguments.context, namespace=arguments.namespace)


def _connect_as(settings: ClusterConfig) -> Cluster:
    from k8s.connect import connect

    return connect(context=settings.context, namespace=settings.namespace)


def _load_job(path: Path) -> JobConfig:
    from job.config import load_job
    from k8s.render import job_file

    job = load_job(path)
    job_file(job)  # refuses credentials before anything is uploaded
    return job


def _submit(arguments: argparse.Namespace) -> int:
    from k8s import inputs, submit
    from k8s.render import run_name

    settings, job, stop = _settings(arguments), _load_job(arguments.job), _stop()
    cluster = _connect_as(settings)
    if not arguments.no_data_checks:
        _check_data(job, stop)
    job = inputs.upload(job, stop=stop, say=_say)
    run = run_name(job, new=str(time.time_ns()) if arguments.new else None)
    with _waiting(f"submitting {run}"):
        done = submit.submit(cluster, settings, job, run, stop=stop, say=_say)
    _say(f"{run}: {done.outcome}; see it: lora-job status {run} -n {cluster.namespace}")
    if arguments.follow:
        return _follow(cluster, run, arguments)
    _print({"run": run, "outcome": done.outcome}) if _as_json(arguments) else print(run)
    return 0


def _check_data(job: JobConfig, stop: Any) -> None:
    """Refuse data that the run would refuse, before it is uploaded and a GPU is asked for."""
    try:
        from job.check import check
    except ModuleNotFoundError as missing:
        _say(
            f"data checks left out: {missing.name} is not installed (pip install 'lora-job[check]')"
        )
        return
    report = check(job, stop=stop)
    code = int(report.get("code", 0))
    if code:
        do = "see `lora-job check`, or submit with --no-data-checks"
        raise JobError(ExitCode(code), "check", str(report.get("what", "it would fail")), do)


def _follow(cluster: Cluster, run: str, arguments: argparse.Namespace) -> int:
    from k8s import control, logs
    from k8s.facts import gather
    from k8s.why import why

    stop, said = _stop(), ""

    def waiting() -> None:
        nonlocal said
        answer = why(gather(cluster, run, store=None))
        if str(answer) != said and answer.cause not in ("starting", "running"):
            said = str(answer)
            _say(f"waiting: {said}")

    try:
        logs.follow(cluster, run, _write, stop, waiting=waiting)
        done = control.wait(cluster, run, store=None, stop=stop)
    except KeyboardInterrupt:
        back = f"lora-job logs {run} -f -n {cluster.namespace}"
        _say(f"\ndetached: {run} goes on. Come back with: {back}")
        return 0
    return _tell_end(done, arguments)


def _tell_end(run: Any, arguments: argparse.Namespace) -> int:
    if _as_json(arguments):
        _print(run.as_json())
    elif run.receipt:
        _print(run.receipt)
    if run.code:
        end = run.last_end or {}
        text = "; ".join(str(end[key]) for key in ("what", "do") if end.get(key))
        _say(f"lora-job: {run.name}: {run.state} with {run.code}: {text or 'see lora-job why'}")
    return int(run.code)


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _render(arguments: argparse.Namespace) -> int:
    from k8s.inputs import local_inputs
    from k8s.render import objects, run_name, to_yaml

    settings, job = _settings(arguments), _load_job(arguments.job)
    for key, path in local_inputs(job).items():
        _say(f"{key}: submit uploads {path} first, and puts its place in the store here")
    sys.stdout.write(to_yaml(list(objects(job, settings, run=run_name(job)))))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from k8s.runs import find
    from k8s.status import print_status

    now = time.time()
    run = find(_connect(arguments), arguments.run, store=arguments.store, now=now)
    _print(run.as_json()) if _as_json(arguments) else print_status(run, sys.stdout, now=now)
    return 0


def _why(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from k8s.facts import gather
    from k8s.why import why

    answer = why(gather(_connect(arguments), arguments.run, store=arguments.store))
    _print(asdict(answer)) if _as_json(arguments) else print(answer)
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from k8s import logs

    cluster = _connect(arguments)
    if not arguments.follow:
        logs.show(cluster, arguments.run, _write, store=arguments.store)
        return 0
    try:
        logs.follow(cluster, arguments.run, _write, _stop(), waiting=lambda: None)
    except KeyboardInterrupt:
        _say(f"\ndetached: {arguments.run} goes on")
    return 0


def _wait(arguments: argparse.Namespace) -> int:
    from k8s.control import wait

    cluster = _connect(arguments)
    with _waiting(f"waiting for {arguments.run}"):
        run = wait(
            cluster,
            arguments.run,
            store=arguments.store,
            stop=_stop(),
            timeout_s=arguments.timeout,
        )
    return _tell_end(run, arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    from k8s.control import cancel

    cluster = _connect(arguments)
    with _waiting(f"ending {arguments.run}"):
        run = cancel(cluster, arguments.run, now=arguments.now, stop=_stop(), say=_say)
    kept = (
        f"its checkpoint is step {run.checkpoint}"
        if run and run.checkpoint
        else "no checkpoint known"
    )
    _say(f"{arguments.run}: cancelled, {kept}; submit its job file again to go on")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from k8s.status import list_runs, print_list

    runs = list_runs(_connect(arguments), selector=arguments.selector, limit=arguments.limit)
    if _as_json(arguments):
        _print([run.as_json() for run in runs])
    else:
        print_list(runs, sys.stdout, now=time.time())
    return 0


def _schedule(arguments: argparse.Namespace) -> int:
    from k8s import schedule

    is_file = Path(arguments.job).suffix in (".yaml", ".yml")
    job = _load_job(Path(arguments.job)) if is_file else None
    name = job.name if job else str(arguments.job)
    if arguments.cron:
        if job is None or arguments.cluster is None:
            do = "lora-job schedule JOB.yaml --cluster CLUSTER.yaml --cron …"
            raise JobError(ExitCode.USAGE, "schedule", "--cron needs a job and a cluster file", do)
        cluster = _create_schedule(job, arguments)
    else:
        cluster = _connect_as(_settings(arguments)) if arguments.cluster else _connect(arguments)
        _change_schedule(cluster, name, arguments)
    if arguments.delete:
        return 0
    about = schedule.describe(schedule.find(cluster, name))
    _print(about) if _as_json(arguments) else _print_schedule(about)
    return 0


def _create_schedule(job: JobConfig, arguments: argparse.Namespace) -> Cluster:
    from datetime import UTC, datetime

    from k8s import inputs, schedule

    stop, settings = _stop(), _settings(arguments)
    schedule.next_times(arguments.cron, arguments.time_zone, after=datetime.now(UTC))
    cluster = _connect_as(settings)
    schedule.schedule(
        cluster,
        settings,
        inputs.upload(job, stop=stop, say=_say),
        cron=arguments.cron,
        time_zone=arguments.time_zone,
        start_deadline_s=arguments.start_deadline,
        say=_say,
    )
    return cluster


def _change_schedule(cluster: Cluster, name: str, arguments: argparse.Namespace) -> None:
    from k8s import schedule

    if arguments.run_now:
        run, new = schedule.run_now(cluster, name)
        _say(f"{run}: {'created' if new else 'this minute has fired already'}")
    elif arguments.suspend or arguments.resume:
        schedule.suspend(cluster, name, on=arguments.suspend)
    elif arguments.delete:
        schedule.delete(cluster, name)
        _say(f"{name}: deleted")


def _print_schedule(about: dict[str, Any]) -> None:
    print(f"{about['name']}: {about['cron']} {about['time_zone']}")
    print(f"next   {', '.join(about['next']) or 'suspended'}")
    if about["active"]:
        print(f"runs   {', '.join(about['active'])}")


def _doctor(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from k8s.checks import run_checks
    from k8s.render import objects, run_name

    settings, job = _settings(arguments), _load_job(arguments.job)
    cluster = _connect_as(settings)
    items = list(objects(job, settings, run=run_name(job)))
    findings = list(run_checks(cluster, settings, job, items))
    if _as_json(arguments):
        _print([asdict(one) for one in findings])
    else:
        for one in findings:
            print(f"{one.state:<20}{one.check}: {one.what}" + (f"; {one.do}" if one.do else ""))
    return int(ExitCode.CONFIG) if any(one.state == "wrong" for one in findings) else 0
