"""When a schedule fires, and what can never fire."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from job.errors import JobError
from k8s import cli, verb_schedule
from k8s.schedule import next_times, run_now

CRON: dict[str, Any] = {
    "metadata": {
        "name": "night",
        "uid": "u",
        "labels": {"app.kubernetes.io/name": "lora-job"},
    },
    "spec": {
        "schedule": "0 2 * * *",
        "timeZone": "Etc/UTC",
        "jobTemplate": {"metadata": {}, "spec": {}},
    },
}


class Scripted:  # answers as k8s.cluster.Cluster does
    """A cluster with one schedule, and the Jobs that it was asked to create."""

    namespace = "lora-job"

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []

    def get(self, _kind: str, _name: str) -> dict[str, Any]:
        """The CronJob."""
        return CRON

    def create(self, item: dict[str, Any]) -> None:
        """A Job."""
        self.jobs.append(item)

    def list(self, _kind: str, **query: str) -> list[dict[str, Any]]:
        """The Jobs of a schedule."""
        key, value = query["labelSelector"].split("=")
        return [job for job in self.jobs if job["metadata"]["labels"].get(key) == value]

    def delete(self, _kind: str, _name: str) -> None:
        """Is asked for, and done."""


def test_firing_and_deleting_tell_a_program_which_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that was fired has its id in the JSON; what is deleted with a schedule is named."""
    cluster = Scripted()
    monkeypatch.setattr(verb_schedule, "open_cluster", lambda _: cluster)
    assert cli.main(["schedule", "night", "--run-now", "-o", "json"]) == 0
    fired = json.loads(capsys.readouterr().out)
    run = cluster.jobs[0]["metadata"]["name"]
    assert (fired["name"], fired["run"], fired["new"]) == ("night", run, True)
    assert cli.main(["schedule", "night", "--delete", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"name": "night", "outcome": "deleted", "jobs": [run]}
    assert err == f"night: deleted, and with it {run}\n"
    assert cli.main(["schedule", "night", "--delete"]) == 0
    assert capsys.readouterr().out == ""


AFTER = datetime(2026, 3, 28, 12, tzinfo=UTC)


def _utc(cron: str, zone: str, count: int = 2) -> list[str]:
    found = next_times(cron, zone, after=AFTER, count=count)
    return [moment.astimezone(UTC).strftime("%m-%d %H:%M") for moment in found]


def test_times_follow_the_zone_through_a_change_of_clocks() -> None:
    """Berlin's clocks go forward on 29 March 2026: three at night is 02:00, then 01:00 UTC."""
    assert _utc("0 4 * * *", "Europe/Berlin") == ["03-29 02:00", "03-30 02:00"]
    assert _utc("0 4 * * *", "Etc/UTC") == ["03-29 04:00", "03-30 04:00"]
    assert _utc("@daily", "Etc/UTC", 1) == ["03-29 00:00"]
    assert _utc("30 1 * * MON-FRI", "America/New_York", 1) == ["03-30 05:30"]


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("0 0 30 2 *", "day-of-month"),
        ("0 0 31 4,6,9,11 *", "day-of-month"),
        ("61 0 * * *", "minute"),
        ("0 25 * * *", "hour"),
        ("* * * *", "five fields"),
        ("0 0 2 * * *", "five fields"),
        ("@reboot", "five fields"),
        ("CRON_TZ=Europe/Berlin 0 2 * * *", "five fields"),
        ("", "five fields"),
    ],
)
def test_a_line_that_never_fires_or_is_not_kubernetes_own(cron: str, said: str) -> None:
    """78, naming the line."""
    with pytest.raises(JobError, match=said) as caught:
        next_times(cron, "Etc/UTC", after=AFTER)
    assert caught.value.code == 78
    assert cron in str(caught.value)


@pytest.mark.parametrize("cron", ["0 2 * * WED", "0 2 * JUL *", "*/15 * * * 1-5", "0 2 29 2 *"])
def test_lines_that_fire(cron: str) -> None:
    """Names with W or L in them, steps, and the 29th of February are fine."""
    assert len(next_times(cron, "Etc/UTC", after=AFTER)) == 3


@pytest.mark.parametrize("zone", ["Europe/Berln", "", "Local", "../etc/passwd", "MESZ"])
def test_a_time_zone_that_does_not_exist(zone: str) -> None:
    """78; "Local" too, which Kubernetes refuses."""
    with pytest.raises(JobError, match="tz database") as caught:
        next_times("0 2 * * *", zone, after=AFTER)
    assert caught.value.code == 78


def test_a_second_writer_is_not_fired_where_the_store_could_not_stop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With single_writer, a night that runs is waited for; twice in a minute is still one run."""
    cluster: Any = Scripted()
    monkeypatch.setitem(
        CRON["spec"]["jobTemplate"], "metadata", {"annotations": {"lora-job/single-writer": "true"}}
    )
    first, new = run_now(cluster, "night", now=60.0)
    assert new
    with pytest.raises(JobError, match=f"{first} is not over") as caught:
        run_now(cluster, "night", now=120.0)
    assert caught.value.code == 73
    run_now(cluster, "night", now=61.0)
    ended = {"conditions": [{"type": "Complete", "status": "True"}]}
    for job in cluster.jobs:
        job["status"] = ended
    assert run_now(cluster, "night", now=120.0)[1]


def test_a_job_file_brings_the_cluster_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted is deleted where it was made, whatever the kubeconfig's context is now."""
    opened: list[Any] = []

    def opens(named: Any) -> Scripted:
        opened.append((named.context, named.namespace))
        return Scripted()

    monkeypatch.setattr(verb_schedule, "open_cluster", opens)
    job = 'name: night\ndevice: cuda\nstore: s3://b/p\nmodel: {source: "hf://a/b"}\n'
    (tmp_path / "job.yaml").write_text(job + 'data: {source: "hf://a/c"}\n')
    assert cli.main(["schedule", str(tmp_path / "job.yaml"), "--delete"]) == 0
    (tmp_path / "cluster.yaml").write_text(
        "platform: gke\nimage: r/i\ncontext: staging\nnamespace: ml\n"
    )
    assert cli.main(["schedule", str(tmp_path / "job.yaml"), "--delete"]) == 0
    assert opened == [(None, None), ("staging", "ml")]
