"""More than one process in a pod: PID 1 starts the ranks, and alone speaks to the world.

The ranks only train. Rank 0 tells PID 1 of its progress and its log through a pipe, and hands each
checkpoint over as a folder, which PID 1 makes durable before the ranks go on. A stop reaches the
ranks from PID 1 as an event; they agree on the step. An error leaves a rank as a file and as its
exit code; the first one is what the run ends with.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Adapter, Dataset, Source
from job.errors import ExitCode, JobError
from job.train.rank import BUG, Line, Task, error_of, rank_main, record_of

if TYPE_CHECKING:
    from job.context import Context
    from job.train.checkpoints import Restored

log = structlog.get_logger()

LOOK_S = 0.1
LEAVE_S = 5
"""How long ranks whose peer failed may take to leave by themselves."""


def train_in_ranks(
    context: Context,
    model: Source,
    dataset: Dataset,
    folder: Path,
    parts: dict[str, str],
    restored: Restored | None,
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
        restored=restored,
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
        raise _explain(outcome, folder / "ranks", count) from outcome
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

    def _on_ended(self, part: str) -> None:
        self.context.progress.end(part)

    def _on_event(self, method: str, event: dict[str, Any]) -> None:
        getattr(log, method)(**event)

    def _on_checkpoint(self, folder: Path, step: int) -> None:
        try:
            self.context.attempt.save_checkpoint(folder, step)
        except JobError as error:
            self.failed = error
        self.pipe.send(None if self.failed is None else record_of(self.failed))


def _explain(outcome: BaseException, folder: Path, count: int) -> BaseException:
    """Return the error that began it: a rank's own words, or that it had none."""
    told = [json.loads(path.read_bytes()) for path in folder.glob("error-*.json")]
    told.sort(key=lambda words: words["time"])
    # Those that only lost the others came after somebody's real reason.
    reasons = [words for words in told if words["code"] != ExitCode.HARDWARE]
    if reasons:
        first = reasons[0]
        if first["code"] != BUG:
            return error_of(first)
        return RuntimeError(f"rank {first['rank']}:\n{first['what']}")
    silent = sorted(set(range(count)) - {words["rank"] for words in told})
    if silent and (told or _was_killed(outcome)):
        what = f"rank {silent[0]} ended without a word (killed: out of memory?)"
        do = "look at the node's memory and its kernel log; the next attempt goes on"
        return JobError(ExitCode.HARDWARE, "train", what, do)
    return error_of(told[0]) if told else outcome


def _was_killed(outcome: BaseException) -> bool:
    failures = getattr(outcome, "failures", {}).values()
    return any(failure.exitcode < 0 for failure in failures)
