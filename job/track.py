"""Trackers: MLflow, Trackio and TensorBoard, each in a process of its own.

A tracker may hang in its network, print to stdout, leave threads behind or fall over. In a child
process none of that reaches the run (transformers' own callbacks would live in the training loop):
figures go down a pipe that is never waited for, and a child that is not done when the run is over
is ended. ``python -m job.track`` is that child.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from job.config import JobConfig

log = structlog.get_logger()

END_TIMEOUT_S = 15.0
LINE_BYTES = 4096  # PIPE_BUF: a write of at most so much goes whole or not at all.

Settings = dict[str, Any]
Steps = Iterator[tuple[int, dict[str, float]]]


class Tracker:
    """One tracker's child process. Nothing here raises, and nothing but :meth:`end` waits."""

    def __init__(self, kind: str, settings: Settings) -> None:
        self.kind = kind
        self._dropped = self._full = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end
        self._child = subprocess.Popen(
            [sys.executable, "-m", "job.track", kind, json.dumps(settings, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,  # a terminal's Ctrl-C is the run's, which then ends the child
        )
        assert self._child.stdin is not None
        self._pipe = self._child.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send a step's figures; those that are not finite numbers are left out."""
        numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
        line = json.dumps([step, {k: v for k, v in numbers.items() if math.isfinite(v)}])
        if self._dropped or self._pipe.closed or len(line) >= LINE_BYTES:
            return
        try:
            os.write(self._pipe.fileno(), line.encode() + b"\n")
        except BlockingIOError:
            if not self._full:
                log.warning("tracker_slow", tracker=self.kind, reason="figures are left out")
            self._full = True
        except OSError:
            self._drop(self._last_words())

    def end(self, *, timeout_s: float = END_TIMEOUT_S) -> None:
        """Give the tracker ``timeout_s`` seconds to be done. Only the first call does anything."""
        if self._pipe.closed:
            return
        self._pipe.close()
        try:
            if self._child.wait(timeout=timeout_s):
                self._drop(self._last_words())
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._drop(f"not done after {timeout_s:.0f} s")
        self._said.close()

    def _drop(self, reason: str) -> None:
        if not self._dropped:
            log.warning("tracker_dropped", tracker=self.kind, reason=reason)
        self._dropped = True

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else f"ended with {self._child.poll()}"


def make_trackers(job: JobConfig, run_id: str, folder: Path) -> list[Tracker]:
    """Start the trackers that the job file asks for.

    Args:
        job: Whose ``track`` section counts; the rest is logged as the run's parameters.
        run_id: The same for all attempts of a run, which so share a tracked run.
        folder: Where TensorBoard writes, unless the job file names a folder.
    """
    config = _flat(job.model_dump(mode="json", exclude={"track", "judge"}))
    common = {"run_id": run_id, "config": config, "default_folder": str(folder / "tensorboard")}
    trackers = []
    for kind, section in job.track.model_dump().items():
        if section is not None:
            try:
                trackers.append(Tracker(kind, section | common))
            except OSError as error:
                log.warning("tracker_dropped", tracker=kind, reason=str(error))
    return trackers


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level: ``train.learning_rate``."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


# What follows runs in the child: each tracker reads the steps to their end.


def _mlflow(settings: Settings, steps: Steps) -> None:
    """A later attempt goes on with the MLflow run of the first."""
    # One server that is away must not hold us for MLflow's own 7 tries of 2 minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    import mlflow

    run_id = settings["run_id"]
    mlflow.set_tracking_uri(settings["tracking_uri"])
    mlflow.set_experiment(settings["experiment"])
    found = mlflow.search_runs(
        filter_string=f"tags.`lora_job.run_id` = '{run_id}'", max_results=1, output_format="list"
    )
    if found:
        mlflow.start_run(run_id=found[0].info.run_id)
    else:
        name = settings["run_name"] or run_id
        mlflow.start_run(run_name=name, tags={"lora_job.run_id": run_id})
        mlflow.log_params({key: str(value)[:500] for key, value in settings["config"].items()})
    for step, figures in steps:
        mlflow.log_metrics(figures, step=step)
    mlflow.end_run()


def _trackio(settings: Settings, steps: Steps) -> None:
    """A local database, or a Space if the job file names one."""
    import trackio

    run = trackio.init(
        project=settings["project"],
        name=settings["run_id"],
        space_id=settings["space_id"],
        config=settings["config"],
        resume="allow",
        embed=False,
        auto_log_cpu=False,
    )
    for step, figures in steps:
        run.log(figures, step=step)
    run.finish()


def _tensorboard(settings: Settings, steps: Steps) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(settings["folder"] or settings["default_folder"])
    writer.add_text("job", "\n".join(f"    {k}: {v}" for k, v in settings["config"].items()))
    for step, figures in steps:
        for key, value in figures.items():
            writer.add_scalar(f"train/{key}", value, step)
        writer.flush()
    writer.close()


TRACKERS: dict[str, Callable[[Settings, Steps], None]] = {
    "mlflow": _mlflow,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
}


def main(kind: str, settings: Settings) -> None:
    """Read figures, one JSON list a line, until the pipe is closed."""
    os.nice(10)  # training comes first
    TRACKERS[kind](settings, (tuple(json.loads(line)) for line in sys.stdin))


if __name__ == "__main__":
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - the parent logs it, and drops us
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text[:400]}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
