"""One rank: trains, and speaks only to PID 1, by a pipe, a folder and an exit code."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog

from job import logs
from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import write_json
from job.progress import Progress
from job.stop import RUNS_PATIENCE_S, SIGNALS, Stop, preempted

if TYPE_CHECKING:
    from job.train.checkpoints import Restored

BUG = 1
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """What a rank is started with; it travels to a fresh process."""

    job: JobConfig
    model: Source
    dataset: Dataset
    folder: Path
    parts: dict[str, str]
    restored: Restored | None
    run_id: str
    line: Line
    stopping: Any
    """An event of multiprocessing."""


@dataclass
class Line:
    """Rank 0's end of the pipe to PID 1."""

    pipe: Connection
    _lock: Any = field(default=None)

    def say(self, kind: str, *words: Any) -> None:
        """Send one message; threads of rank 0 take turns."""
        self._lock = self._lock or threading.Lock()
        with self._lock:
            self.pipe.send((kind, *words))


class RankProgress(Progress):
    """Figures of rank 0 on their way to PID 1, whose watchdog hears them."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def update(self, **figures: Any) -> None:
        """Send the figures on."""
        super().update(**figures)
        self._line.say("progress", figures)

    def end(self, part: str) -> None:
        """Send it on; the clock is PID 1's."""
        self._line.say("ended", part)


class RankStop(Stop):
    """PID 1's wish, as an event that all ranks see."""

    def __init__(self, stopping: Any) -> None:
        super().__init__()
        self._event = stopping
        self._error = preempted("a signal")


@dataclass(frozen=True)
class RankAttempt:
    """What a rank sees of the attempt: checkpoints go to PID 1, who answers once they are durable."""

    run_id: str
    line: Line

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Hand a checkpoint over, and wait for the answer.

        Raises:
            JobError: whatever kept PID 1 from storing it.
        """
        self.line.say("checkpoint", folder, step)
        failed = self.line.pipe.recv()
        if failed is not None:
            raise error_of(failed)


def rank_main(task: Task) -> dict[str, Any] | None:
    """Be one rank: return the adapter (rank 0), or None once stopped and saved.

    Any JobError becomes a file in ``ranks`` and the exit code.
    """
    _die_with_parent()
    rank = int(os.environ["RANK"])
    folder = task.folder if rank == 0 else task.folder / "ranks" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    _log_as(rank, task.line)
    try:
        return _train(task, rank, folder)
    except JobError as error:
        if error.code is ExitCode.PREEMPTED:
            return None
        _leave(task, rank, error)
    except Exception as error:
        if not _is_collective(error):
            _tell(task, rank, {"code": BUG, "what": traceback.format_exc()})
            raise
        what = f"rank {rank} lost the others ({str(error).strip().splitlines()[0][:160]})"
        do = "look at the first rank that failed, and at the GPUs"
        _leave(task, rank, JobError(ExitCode.HARDWARE, "train", what, do))
    raise AssertionError("unreachable")


def _train(task: Task, rank: int, folder: Path) -> dict[str, Any] | None:
    import torch.distributed as dist

    from job.context import Context
    from job.train.fit import fit
    from job.train.peers import Group

    _join(task.job)
    silent = Progress()
    context = Context(
        job=task.job,
        work=task.folder,
        cache=None,
        attempt=cast("Any", RankAttempt(task.run_id, task.line)),
        stop=RankStop(task.stopping),
        progress=RankProgress(task.line) if rank == 0 else silent,
    )
    adapter = fit(context, task.model, task.dataset, folder, task.parts, task.restored, Group())
    dist.destroy_process_group()
    return adapter.model_dump(mode="json") if rank == 0 else None


def _join(job: JobConfig) -> None:
    """Join the group of ranks, and let the libraries believe that this process is alone."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # All ranks are on this machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The others wait while rank 0's checkpoint is made durable.
    patience = timedelta(seconds=RUNS_PATIENCE_S + job.train.step_timeout_s)
    backend = "gloo" if job.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=patience)
    if job.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def _die_with_parent() -> None:
    """Leave signals to PID 1, and don't outlive it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _log_as(rank: int, line: Line) -> None:
    """Send rank 0's events to PID 1; of the others only warnings are told, on stderr."""
    logs.configure()
    if rank:
        os.environ["TQDM_DISABLE"] = "1"
        level = structlog.make_filtering_bound_logger(logging.WARNING)
        structlog.configure(wrapper_class=level)
        structlog.contextvars.bind_contextvars(rank=rank)
        return

    def pass_on(_logger: Any, method: str, event: Any) -> Any:
        line.say("event", method, dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.processors.format_exc_info, pass_on])


def _leave(task: Task, rank: int, error: JobError) -> None:
    """End this rank as ``error`` says, at once: a group that is broken can't be taken down."""
    _tell(task, rank, record_of(error))
    sys.stderr.flush()
    os._exit(int(error.code))


def _tell(task: Task, rank: int, words: dict[str, Any]) -> None:
    told = {**words, "rank": rank, "time": time.time()}
    write_json(task.folder / "ranks" / f"error-{rank}.json", told)


def _is_collective(error: Exception) -> bool:
    import torch.distributed as dist

    words = str(error).lower()
    known = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in words for word in known)


def record_of(error: JobError) -> dict[str, Any]:
    """Return an error as it travels between processes."""
    return {"code": int(error.code), "where": error.where, "what": error.what, "do": error.do}


def error_of(record: dict[str, Any]) -> JobError:
    """Return the error that a record tells of."""
    code = ExitCode(record["code"])
    return JobError(code, record["where"], record["what"], record["do"])
