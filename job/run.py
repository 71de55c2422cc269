"""An attempt's life: take the run, go through the pipeline, and say in one object how it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import yaml

from job import logs
from job.artifacts import Receipt
from job.config import JobConfig, load_job
from job.context import Context
from job.disk import within_share
from job.ending import Ending, write_termination_message
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.shipping import shipped_log
from job.stop import Stop, install_signals
from job.store import open_store
from job.store.probe import require_conditions
from job.store.runs import take
from job.watchdog import watched

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where an attempt runs; none of it changes what comes out."""

    work: Path
    """Folder for all runs' local files."""
    cache: Path | None = None
    run_id: str | None = None
    """The Job's name in a cluster; by itself the job file's own name and digest."""
    owner: str | None = None
    """The Job's uid in a cluster; by itself whoever holds the lock on the work folder."""


def run(job_path: Path, where: Where) -> Ending:
    """Run one attempt of ``job_path`` to its end, and return how it ended.

    Nothing but a bug is raised: every JobError becomes its code, is logged in one line, and is
    written to the store (if the run was taken) and to the termination message.
    """
    stop, progress = Stop(), Progress()
    install_signals(stop)
    ending = Ending(run_id=where.run_id or job_path.stem, began=time.time())
    logs.configure()
    with ending.recorded(progress):
        job = load_job(job_path)
        ending.run_id = where.run_id or job.run_name
        structlog.contextvars.bind_contextvars(run_id=ending.run_id)
        ending.receipt = _attempt(job, where, ending, stop, progress)
    write_termination_message(ending.record)
    summary = ending.summary()
    log.info("run_finished", **summary)
    if "said" in summary and sys.stderr.isatty():
        print(f"lora-job: {summary['said']}", file=sys.stderr)
    return ending


def _attempt(
    job: JobConfig, where: Where, ending: Ending, stop: Stop, progress: Progress
) -> Receipt:
    _require_device(job)
    work = where.work.resolve() / ending.run_id
    store = open_store(job.store, stop=stop, single_writer=job.single_writer)
    with _locked(work) as local_owner:
        require_conditions(store)
        attempt = take(
            store,
            ending.run_id,
            owner=where.owner or local_owner,
            job_text=_resolved(job),
            stop=stop,
            progress=progress,
        )
        ending.attempt = attempt
        structlog.contextvars.bind_contextvars(epoch=attempt.epoch)
        context = Context(
            job=job, work=work, cache=where.cache, attempt=attempt, stop=stop, progress=progress
        )
        share = within_share(where.work.resolve(), stop)
        with shipped_log(attempt, work), watched(context, ending), share:
            receipt = _published(context)
            ending.reused = receipt is not None
            return receipt or _pipeline(context)


def _published(context: Context) -> Receipt | None:
    """Return the Receipt of a run that is published already, once its bytes are verified again."""
    from job.publish import announce
    from job.store.versions import verify

    receipt = context.attempt.receipt()
    if receipt is None:
        return None
    with context.stage("verify"):
        try:
            verify(context.attempt.store, receipt.name, receipt.version, stop=context.stop)
        except JobError as error:
            if error.code is not ExitCode.NOT_FOUND:
                raise
            what = f"was published as {receipt.version}, which has been deleted since"
            do = "begin a new run of it: --run-id ANOTHER-NAME"
            raise JobError(error.code, context.attempt.run_id, what, do) from error
        receipt = announce(context, receipt)
    log.info("run_reused", reason="published already, and read back again", uri=receipt.uri)
    return receipt


def _pipeline(context: Context) -> Receipt:
    from job import pipeline

    try:
        receipt = pipeline.run(context)
    except JobError as error:
        # A store that can't be reached would keep the report waiting as long again.
        if error.code is not ExitCode.STORE:
            _report(context)
        raise
    _report(context)
    return receipt


def _report(context: Context) -> None:
    """Leave report.html with the attempt. A courtesy: it neither hides an error nor makes one."""
    from job import report

    try:
        context.attempt.put("report.html", report.render(context).encode())
    except Exception as error:  # noqa: BLE001
        log.warning("report_not_written", reason=repr(error))


def _resolved(job: JobConfig) -> bytes:
    """Return the job file with every default spelt out, as it is saved with the run."""
    settings = job.model_dump(mode="json")
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()


def _require_device(job: JobConfig) -> None:
    if job.device == "cuda":
        from job.train.devices import require_device

        require_device(job.device)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[str]:
    """Hold a run's work folder, and yield the owner's name that goes with it.

    Raises:
        JobError: 73 if another process on this machine holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".owner", "a+", encoding="utf-8") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            what, do = "another process works on this run", "wait for it, or end it"
            raise JobError(ExitCode.TAKEN, str(work), what, do) from None
        handle.seek(0)
        owner = handle.read().strip()
        if not owner:
            owner = f"local-{secrets.token_hex(8)}"
            handle.write(owner)
            handle.flush()
            os.fsync(handle.fileno())
        yield owner
