"""Trackers, each read back from where it really wrote; and that none of them can hurt a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from job import track
from job.config import JobConfig


def _job(track_section: dict[str, Any]) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "tracked",
            "device": "cpu",
            "store": "store",
            "model": {"source": "model"},
            "data": {"source": "data"},
            "track": track_section,
        }
    )


def _follow(trackers: list[track.Tracker], *, first: int = 1) -> None:
    for step in range(first, first + 3):
        for tracker in trackers:
            tracker.log(step, {"loss": 1.0 / step, "odd": float("nan"), "word": "x"})
    for tracker in trackers:
        tracker.end(timeout_s=60)


def test_mlflow_gets_one_run_under_its_name_over_two_attempts(tmp_path: Path) -> None:
    """Two attempts write into one MLflow run: figures by step, parameters, a status, a name."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = _job({"mlflow": {"experiment": "e", "run_name": "seed-run", "tracking_uri": uri}})
    _follow(track.make_trackers(job, "tracked-1", tmp_path))
    _follow(track.make_trackers(job, "tracked-1", tmp_path), first=4)

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == ["seed-run"]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert runs[0].data.params["lora.rank"] == "16"
    assert runs[0].info.status == "FINISHED"


def test_trackio_keeps_figures_locally_and_says_nothing_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trackio's local database has every step, and its chatter does not reach our stdout."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _follow(track.make_trackers(_job({"trackio": {"project": "p"}}), "tracked-1", tmp_path))

    import sqlite3

    (database,) = (tmp_path / "trackio").glob("p*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows][:3] == [1, 2, 3]
    assert b"loss" in bytes(rows[0][1])
    assert capfd.readouterr().out == ""


def test_tensorboard_event_file_has_every_step(tmp_path: Path) -> None:
    """TensorBoard's own reader finds the figures in the attempt's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _follow(track.make_trackers(_job({"tensorboard": {}}), "tracked-1", tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_a_tracker_that_fails_is_named_once_and_dropped(tmp_path: Path) -> None:
    """A database that can't be opened costs one warning with its reason, and no exception."""
    (tmp_path / "a-file").touch()
    uri = f"sqlite:///{tmp_path}/a-file/mlflow.db"
    with structlog.testing.capture_logs() as said:
        _follow(track.make_trackers(_job({"mlflow": {"tracking_uri": uri}}), "r", tmp_path))
    assert [event["event"] for event in said] == ["tracker_dropped"]
    assert said[0]["tracker"] == "mlflow"
    assert "File exists" in said[0]["reason"]


def test_a_tracker_that_hangs_neither_slows_a_run_nor_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that never reads fills its pipe: logging stays fast, and the end is bounded."""
    hanging = tmp_path / "job"
    hanging.mkdir()
    (hanging / "__init__.py").touch()
    (hanging / "track.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with structlog.testing.capture_logs() as said:
        tracker = track.Tracker("mlflow", {})
        began = time.monotonic()
        for step in range(3000):
            tracker.log(step, {"loss": 1.0, "learning_rate": 0.1})
        tracker.end(timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert [event["event"] for event in said] == ["tracker_slow", "tracker_dropped"]
    with pytest.raises(ProcessLookupError):
        os.kill(tracker._child.pid, 0)
