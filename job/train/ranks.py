"""More than one process in a pod: PID 1 starts the ranks, and alone speaks to the world.

The ranks only train. Rank 0 tells PID 1 of its progress and its log through a pipe, and hands each
checkpoint over as a folder, which PID 1 makes durable before the ranks go on. A stop reaches the
ranks from PID 1 as an event; they agree on the step. An error leaves a rank as a file and as its
exit code; the first one is what the run ends with.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog

from job import logs
from job.artifacts import Adapter, Dataset, Source
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import write_json
from job.progress import Progress
from job.retry import DEADLINE_S
from job.stop import Stop, preempted

if TYPE_CHECKING:
    from job.context import Context
    from job.train.checkpoints import CheckpointState

log = structlog.get_logger()

LOOK_S = 0.1
LEAVE_S = 5
"""How long ranks whose peer failed may take to leave by themselves."""
PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Task:
    """What a rank is started with; it travels to a fresh process."""

    job: JobConfig
    model: Source
    dataset: Dataset
    folder: Path
    parts: dict[str, str]
    resumed: CheckpointState | None
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
            raise _error_of(failed)


def num_processes(job: JobConfig) -> int:
    """Return how many ranks train: as the job file says, else one for each GPU.

    Raises:
        JobError: 69 for more than there are GPUs.
    """
    wanted = job.train.num_processes
    if job.device == "cpu":
        return wanted or 1
    import torch

    seen = torch.cuda.device_count()
    if wanted is not None and wanted > seen:
        raise JobError(
            ExitCode.HARDWARE,
            f"train.num_processes: {wanted}",
            f"only {seen} GPU(s) are here",
            "ask for as many GPUs, or leave it out",
        )
    return wanted or max(seen, 1)


def train_in_ranks(
    context: Context,
    model: Source,
    dataset: Dataset,
    folder: Path,
    parts: dict[str, str],
    resumed: CheckpointState | None,
    count: int,
) -> Adapter:
    """Train with ``count`` processes, and return what rank 0 made.

    Raises:
        JobError: the first failing rank's, or the stop's reason once all have saved.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    task = Task(
        job=context.job,
        model=model,
        dataset=dataset,
        folder=folder,
        parts=parts,
        resumed=resumed,
        run_id=context.attempt.run_id,
        line=Line(there),
        stopping=spawn.Event(),
    )
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    host = Host(context, here, task.stopping)
    log.info("ranks_started", num_processes=count)
    outcome = host.run(Launch(task, count))
    there.close()
    here.close()
    if host.failed is not None:
        raise host.failed
    if isinstance(outcome, BaseException):
        raise _explain(outcome, folder / "ranks") from outcome
    if outcome[0] is None:
        context.stop.check()
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    return Adapter.model_validate(outcome[0])


@dataclass
class Launch:
    """The ranks, as torch's elastic agent starts and watches them, in a thread.

    In a thread, so that the main one hears signals: the agent would take them over.
    """

    task: Task
    count: int
    outcome: Any = None

    def __call__(self) -> None:
        """Run the ranks to their end."""
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # It would tell of every signal handler and exit code in its own words.
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.count,
            run_id=self.task.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=LOOK_S,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=str(self.task.folder / "ranks" / "agent")),
            virtual_local_rank=self.task.job.device == "cuda",
            shutdown_timeout=LEAVE_S,
        )
        try:
            self.outcome = elastic_launch(config, rank_main)(self.task)
        except BaseException as error:  # noqa: BLE001 - it goes on in the main thread
            self.outcome = error


@dataclass
class Host:
    """PID 1 while the ranks train: passes the stop on, and does what rank 0 can't."""

    context: Context
    pipe: Connection
    stopping: Any
    failed: JobError | None = None
    """What kept a checkpoint from being stored: it ends the ranks."""

    def run(self, launch: Launch) -> Any:
        """Serve until the ranks have left; return their results, or the error."""
        thread = threading.Thread(target=launch, name="ranks", daemon=True)
        thread.start()
        while thread.is_alive():
            if self.context.stop.requested:
                self.stopping.set()
            self._hear(LOOK_S)
        self._hear(0)
        return launch.outcome

    def _hear(self, wait_s: float) -> None:
        while self.pipe.poll(wait_s):
            kind, *words = self.pipe.recv()
            getattr(self, f"_on_{kind}")(*words)
            wait_s = 0

    def _on_progress(self, figures: dict[str, Any]) -> None:
        self.context.progress.update(**figures)

    def _on_event(self, method: str, event: dict[str, Any]) -> None:
        getattr(log, method)(**event)

    def _on_checkpoint(self, folder: Path, step: int) -> None:
        try:
            self.context.attempt.save_checkpoint(folder, step)
        except JobError as error:
            self.failed = error
        self.pipe.send(None if self.failed is None else _record(self.failed))


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
            raise
        what = f"rank {rank} lost the others ({str(error).strip().splitlines()[0][:160]})"
        do = "look at the first rank that failed, and at the GPUs"
        _leave(task, rank, JobError(ExitCode.HARDWARE, "train", what, do))
    raise AssertionError("unreachable")


def _train(task: Task, rank: int, folder: Path) -> dict[str, Any] | None:
    import torch.distributed as dist

    from job.context import Context
    from job.train.peers import Group
    from job.train.stage import train_here

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
    restored = task.folder / "restored"
    adapter = train_here(
        context, task.model, task.dataset, folder, task.parts, restored, task.resumed, Group()
    )
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
    patience = timedelta(seconds=DEADLINE_S + job.train.step_timeout_s)
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
    write_json(
        task.folder / "ranks" / f"error-{rank}.json", {**_record(error), "time": time.time()}
    )
    sys.stderr.flush()
    os._exit(int(error.code))


def _is_collective(error: Exception) -> bool:
    import torch.distributed as dist

    words = str(error).lower()
    known = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in words for word in known)


def _record(error: JobError) -> dict[str, Any]:
    return {"code": int(error.code), "where": error.where, "what": error.what, "do": error.do}


def _error_of(record: dict[str, Any]) -> JobError:
    code = ExitCode(record["code"])
    return JobError(code, record["where"], record["what"], record["do"])


def _explain(outcome: BaseException, folder: Path) -> BaseException:
    """Return the error that began it: a rank's own words, else how a rank died, else a bug."""
    told = [json.loads(path.read_bytes()) for path in folder.glob("error-*.json")]
    # Those that only lost the others came after somebody's real reason.
    told.sort(key=lambda record: (record["code"] == ExitCode.HARDWARE, record["time"]))
    if told and told[0]["code"] != ExitCode.HARDWARE:
        return _error_of(told[0])
    killed = _killed(outcome)
    if killed is not None:
        return killed
    return _error_of(told[0]) if told else outcome


def _killed(outcome: BaseException) -> JobError | None:
    """Return what to say of a rank that a signal ended."""
    for rank, failure in getattr(outcome, "failures", {}).items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            what = f"rank {rank} was ended by {name} (out of memory?)"
            do = "look at the node's memory and its kernel log; the next attempt goes on"
            return JobError(ExitCode.HARDWARE, "train", what, do)
    return None
