"""The grace period comes from what a save was measured to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import write_json
from k8s import stored
from k8s.config import ClusterConfig
from k8s.grace import with_grace

RUN = "night-1a2b3c4d"
VERSION = "20261122T020000Z-e1-0123abcd"


def _graced(
    store: Path, *, checkpoint_bytes: int = 0, **cluster: Any
) -> tuple[int | None, list[str]]:
    job = {"name": "night", "device": "cuda", "store": str(store)}
    job |= {"model": {"source": "hf://a/b"}, "data": {"source": "hf://a/c"}}
    settings = ClusterConfig.model_validate({"platform": "gke", "image": "i", **cluster})
    said: list[str] = []
    graced = with_grace(
        JobConfig.model_validate(job), settings, RUN, say=said.append,
        checkpoint_bytes=checkpoint_bytes,
    )  # fmt: skip
    return graced.grace_period_s, said


def _measured(store: Path, save_s: float) -> Path:
    write_json(store / "_runs" / RUN / "head.json", {"save_s": save_s})
    return store


def test_a_slow_save_gets_the_time_that_it_took_and_a_half(tmp_path: Path) -> None:
    """And says so; a quick one leaves the manifest's 300 s."""
    grace, (said,) = _graced(_measured(tmp_path, 400.0))
    assert grace == 600
    assert said == "grace_period_s: 600: a step and its save take 400 s, measured"
    assert _graced(_measured(tmp_path, 20.0)) == (None, [])


def test_a_new_run_goes_by_the_newest_version_of_its_name(tmp_path: Path) -> None:
    """Another job file, or tomorrow's night: the measure is in the manifest's lineage."""
    manifest = {"name": "night", "version": VERSION, "run": "night-0", "epoch": 1, "files": {}}
    path = tmp_path / "night/versions" / VERSION / "manifest.json"
    write_json(path, {**manifest, "lineage": {"save_s": 260.0}})
    assert _graced(tmp_path)[0] == 390


def test_without_a_measure_the_size_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """At 50 MB a second."""
    grace, (said,) = _graced(tmp_path, checkpoint_bytes=15_000_000_000)
    assert grace == 450
    assert "by estimate" in said
    assert _graced(tmp_path) == (None, [])


def test_spot_gives_no_more_than_its_notice_and_a_warning_says_what_that_costs(
    tmp_path: Path,
) -> None:
    """The overlay's grace stays, and the mend is named."""
    grace, (said,) = _graced(_measured(tmp_path, 40.0), capacity="spot")
    assert grace is None
    assert "take 40 s, measured, and the pod gets 15 s" in said
    assert "loses up to 300 s: lower train.checkpoint_every_s" in said


def test_the_cluster_files_own_setting_wins(tmp_path: Path) -> None:
    """A warning tells that it is too short."""
    grace, (said,) = _graced(_measured(tmp_path, 400.0), grace_period_s=60)
    assert grace == 60
    assert "the pod gets 60 s" in said
    assert "raise grace_period_s" in said


def test_a_store_that_cannot_be_read_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's grace period stays, and one line says why."""
    refused = JobError(ExitCode.NOT_ALLOWED, "s3://b", "no credentials", "set some")

    def refuse(*_: Any, **__: Any) -> None:
        raise refused

    monkeypatch.setattr(stored, "impatient", refuse)
    grace, (said,) = _graced(tmp_path)
    assert grace is None
    assert "was not read: s3://b: no credentials" in said
