"""What all verbs share: the files and flags they were given, and how they speak."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.config import JobConfig
    from job.stop import Stop
    from k8s.cluster import Cluster
    from k8s.config import ClusterConfig


def say(text: str) -> None:
    """Say something to the person: on stderr, so that stdout stays data."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print what a program reads."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def wants_json(arguments: argparse.Namespace) -> bool:
    """Return whether `--output json` was given."""
    return bool(arguments.output == "json")


def new_stop() -> Stop:
    """Return a stop that nothing asks: Ctrl-C ends what waits here, and never the run."""
    import logging

    from job import logs
    from job.stop import PERSONS_PATIENCE_S, Stop

    # Between the words of a verb, a pull's progress is noise.
    logs.configure(least=logging.WARNING)
    return Stop(patience_s=PERSONS_PATIENCE_S)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that somebody is waited for: a spinner on a TTY, one line elsewhere."""
    if not sys.stderr.isatty():
        say(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def settings_of(arguments: argparse.Namespace) -> ClusterConfig:
    """Return the cluster file, with the namespace and context that the flags name."""
    from k8s.config import load_cluster

    beside = Path(arguments.job).parent / "cluster.yaml"
    settings = load_cluster(arguments.cluster or beside)
    flags = {"namespace": arguments.namespace, "context": arguments.context}
    return settings.model_copy(update={key: value for key, value in flags.items() if value})


def open_cluster(named: argparse.Namespace | ClusterConfig) -> Cluster:
    """Open the cluster that the flags, or the cluster file, name."""
    from k8s.connect import connect

    return connect(context=named.context, namespace=named.namespace)


def load(path: Path) -> JobConfig:
    """Read a job file; a credential in it is refused before anything is uploaded."""
    from job.config import load_job
    from k8s.render import job_file

    job = load_job(path)
    job_file(job)
    return job


def write_line(line: bytes) -> None:
    """Write a line of a log as it is."""
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
