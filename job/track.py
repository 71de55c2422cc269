"""Trackers: MLflow, Trackio and TensorBoard, each in a process of its own.

A tracker may hang in its network, print to stdout, leave threads behind or fall over. In a child
process none of that reaches the run: figures go down a pipe that is never waited for, and a child
that is not done when the run is over is ended. ``python -m job.track`` is that child.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from job.config import JobConfig

log = structlog.get_logger()

END_TIMEOUT_S = 15.0
LINE_BYTES = 4096  # PIPE_BUF: a write of at most so much goes whole or not at all.


class Tracker:
    """One tracker's child process. Nothing here raises, and nothing but :meth:`end` waits."""

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        self.kind = kind
        self._dropped = False
        self._full = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end
        self._child = subprocess.Popen(
            [sys.executable, "-m", "job.track", kind, json.dumps(settings, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,  # a terminal's Ctrl-C is the run's, which then ends the child
        )
        assert self._child.stdin is not None
        self._pipe = self._child.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send a step's figures; those that are not finite numbers are left out."""
        self._send({"step": step, "figures": _finite(figures)})

    def end(self, summary: Mapping[str, Any], *, timeout_s: float = END_TIMEOUT_S) -> None:
        """Send the last figures, and give the tracker ``timeout_s`` seconds to be done with them.

        Only the first call does anything.
        """
        if self._said.closed:
            return
        self._send({"summary": dict(summary)})
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            if self._child.wait(timeout=timeout_s):
                self._drop(self._reason())
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._drop(f"not done after {timeout_s:.0f} s")
        self._said.close()

    def _send(self, message: dict[str, Any]) -> None:
        if self._dropped or self._said.closed:
            return
        if self._child.poll() is not None:
            self._drop(self._reason())
            return
        line = json.dumps(message, default=str).encode() + b"\n"
        try:
            if len(line) <= LINE_BYTES:
                os.write(self._pipe, line)
        except BlockingIOError:
            self._skip()
        except OSError as error:
            self._drop(str(error))

    def _skip(self) -> None:
        if not self._full:
            log.warning("tracker_slow", tracker=self.kind, reason="figures are left out")
        self._full = True

    def _drop(self, reason: str) -> None:
        if not self._dropped:
            log.warning("tracker_dropped", tracker=self.kind, reason=reason)
        self._dropped = True

    def _reason(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else f"ended with {self._child.returncode}"


def make_trackers(job: JobConfig, run_id: str, folder: Path) -> list[Tracker]:
    """Start the trackers that the job file asks for.

    Args:
        job: Whose ``track`` section counts; the rest is logged as the run's parameters.
        run_id: The same for all attempts of a run, which so share a tracked run.
        folder: Where TensorBoard writes, unless the job file names a folder.
    """
    config = _flat(job.model_dump(mode="json", exclude={"track", "judge"}))
    asked = {
        "mlflow": job.track.mlflow,
        "trackio": job.track.trackio,
        "tensorboard": job.track.tensorboard,
    }
    trackers = []
    for kind, section in asked.items():
        if section is not None:
            own = {
                "run_id": run_id,
                "config": config,
                "default_folder": str(folder / "tensorboard"),
            }
            try:
                trackers.append(Tracker(kind, section.model_dump() | own))
            except OSError as error:
                log.warning("tracker_dropped", tracker=kind, reason=str(error))
    return trackers


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level: ``train.learning_rate``."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


# What follows runs in the child.


class Sink(Protocol):
    """Where a child puts what it reads."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Keep a step's figures."""

    def end(self, summary: dict[str, Any]) -> None:
        """Keep the last figures, and flush."""


class _Mlflow:
    """MLflow's client, without its global run: a later attempt goes on with the run of the first."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # One server that is away must not hold us for MLflow's own 7 tries of 2 minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=settings["tracking_uri"])
        experiment = self._experiment(settings["experiment"])
        tags = {"lora_job.run_id": settings["run_id"]}
        where = f"tags.`lora_job.run_id` = '{settings['run_id']}'"
        found = self._client.search_runs([experiment], filter_string=where, max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        name = settings["run_name"] or settings["run_id"]
        self._run = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        parameters = [Param(key, str(value)[:500]) for key, value in settings["config"].items()]
        self._client.log_batch(self._run, params=parameters[:100])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def log(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, summary: dict[str, Any]) -> None:
        numbers = _finite(summary)
        self.log(int(numbers.get("step", 0)), {f"end_{key}": numbers[key] for key in numbers})
        for key in summary.keys() - numbers.keys():
            self._client.set_tag(self._run, f"lora_job.{key}", str(summary[key])[:5000])
        self._client.set_terminated(self._run)


class _Trackio:
    """Trackio: a local database, or a Space if the job file names one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=settings["project"],
            name=settings["run_id"],
            space_id=settings["space_id"],
            config=settings["config"],
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def end(self, summary: dict[str, Any]) -> None:
        numbers = _finite(summary)
        if numbers:
            self._run.log({f"end_{key}": numbers[key] for key in numbers})
        self._run.finish()


class _Tensorboard:
    """TensorBoard's event files."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(settings["folder"] or settings["default_folder"])
        lines = [f"    {key}: {value}" for key, value in settings["config"].items()]
        self._writer.add_text("job", "\n".join(lines))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(f"train/{key}", value, step)
        self._writer.flush()

    def end(self, summary: dict[str, Any]) -> None:
        numbers = _finite(summary)
        for key, value in numbers.items():
            self._writer.add_scalar(f"end/{key}", value, int(numbers.get("step", 0)))
        self._writer.close()


SINKS: dict[str, Callable[[dict[str, Any]], Sink]] = {
    "mlflow": _Mlflow,
    "trackio": _Trackio,
    "tensorboard": _Tensorboard,
}


def main(kind: str, settings: dict[str, Any]) -> None:
    """Read figures, one JSON object a line, until the pipe is closed."""
    os.nice(10)  # training comes first
    sink = SINKS[kind](settings)
    summary: dict[str, Any] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "figures" in message:
            sink.log(message["step"], message["figures"])
        else:
            summary = message["summary"]
    sink.end(summary)


if __name__ == "__main__":
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - the parent logs it, and drops us
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text[:400]}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
