"""What submit does with a Job that is there already."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from job import logs
from job.config import JobConfig, parse
from job.errors import ExitCode, JobError
from k8s.config import ClusterConfig
from k8s.refusals import AlreadyExistsError, ForbiddenError, NotFoundError
from k8s.render import objects
from k8s.submit import attach, ensure_config, sweep
from k8s.terminal import new_stop

Object = dict[str, Any]

JOB = parse(
    'name: n\ndevice: cuda\nstore: s3://b/p\nmodel: {source: "hf://a/b"}\ndata: {source: "hf://a/c"}',
    JobConfig,
    where="job.yaml",
)


class Holding:
    """A cluster that holds one Job, and perhaps its Workload."""

    namespace = "here"

    def __init__(self, job: Object, *workloads: Object) -> None:
        self.job, self.workloads = job, list(workloads)
        self.patched: list[tuple[str, Object]] = []
        job["metadata"]["uid"] = "1"

    def get(self, _kind: str, _name: str) -> Object:
        """Return the Job."""
        return self.job

    def list(self, _kind: str, **_query: str) -> list[Object]:
        """Return the Workloads."""
        return self.workloads

    def patch(self, kind: str, _name: str, change: Object) -> None:
        """Remember what was changed."""
        self.patched.append((kind, change))


def _settings(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"platform": "gke", "image": "r/lora-job", **changes})


def _holding(settings: ClusterConfig, *workloads: Object, suspend: bool = False) -> Holding:
    _, job = objects(JOB, settings, run="run-1")
    job["spec"]["suspend"] = suspend
    return Holding(job, *workloads)


def _submits(cluster: Any, settings: ClusterConfig) -> str:
    return attach(cluster, settings, JOB, "run-1")


@pytest.mark.parametrize(
    "changes",
    [{"platform": "aks"}, {"image": f"r/lora-job@sha256:{'a' * 64}"}, {"queue": "gpus"}],
)
def test_a_job_of_another_cluster_file_is_refused(changes: Object) -> None:
    """73 with both ways out, instead of quietly leaving the old one; the same file attaches."""
    cluster = _holding(_settings())
    assert _submits(cluster, _settings()) == "attached"
    with pytest.raises(JobError, match=r"another cluster file.*lora-job cancel run-1.*--new") as no:
        _submits(cluster, _settings(**changes))
    assert no.value.code == 73


def test_a_grace_period_measured_anew_or_a_job_that_is_done_attaches() -> None:
    """Neither is another Job to make; nor is one that says nothing of what it was made from."""
    cluster = _holding(_settings())
    assert _submits(cluster, _settings(grace_period_s=900)) == "attached"
    cluster.job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    assert _submits(cluster, _settings(platform="aks")) == "attached"
    cluster = _holding(_settings())
    del cluster.job["metadata"]["annotations"]["lora-job/made-from"]
    assert _submits(cluster, _settings(platform="aks")) == "attached"


def test_a_suspended_run_goes_on() -> None:
    """A cancel was cut off: submit takes it back."""
    cluster = _holding(_settings(), suspend=True)
    assert _submits(cluster, _settings()) == "resumed"
    assert cluster.patched == [("Job", {"spec": {"suspend": False}})]


def test_in_a_queue_its_workload_goes_on() -> None:
    """Kueue lets the Job go; one that just waits in its queue is left to it."""
    queued = _settings(queue="gpus")
    workload = {"metadata": {"name": "w"}, "spec": {"active": False}}
    cluster = _holding(queued, workload, suspend=True)
    assert _submits(cluster, queued) == "resumed"
    assert cluster.patched == [("Workload", {"spec": {"active": True}})]
    for waiting in ([], [{"metadata": {"name": "w"}, "spec": {"active": True}}]):
        cluster = _holding(queued, *waiting, suspend=True)
        assert (_submits(cluster, queued), cluster.patched) == ("attached", [])


def test_only_warnings_come_between_a_verbs_words(capsys: pytest.CaptureFixture[str]) -> None:
    """A run's own log has every event."""
    for least, heard in ((new_stop, ["slow"]), (logs.configure, ["pulled", "slow"])):
        least()
        structlog.get_logger().info("pulled")
        structlog.get_logger().warning("slow")
        said = capsys.readouterr().err
        assert [word for word in ("pulled", "slow") if word in said] == heard


class Configs:
    """A cluster with one ConfigMap, whose owners may be anybody or nobody."""

    namespace = "here"

    def __init__(self, **there: Any) -> None:
        self.there, self.done = there, []  # type: ignore[var-annotated]

    def create(self, item: Object) -> None:
        """Refuse what is there."""
        if item["kind"] in self.there:
            raise AlreadyExistsError("configmaps/run-1")
        self.done.append(("create", item["metadata"]["name"]))

    def get(self, kind: str, _name: str) -> Any:
        """What is there of this kind."""
        return self.there.get(kind)

    def list(self, kind: str, **_query: str) -> Any:
        """All of this kind."""
        found = self.there.get(kind, [])
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, list) else [found]

    def patch(self, kind: str, name: str, change: Object) -> None:
        """Remember the owner; a dying object is gone by now."""
        if self.there[kind].get("dying"):
            del self.there[kind]
            raise NotFoundError(name)
        self.done.append(("own", change["metadata"]["ownerReferences"]))

    def delete(self, _kind: str, name: str) -> None:
        """Remember it."""
        self.done.append(("delete", name))


CONFIG_MAP: Object = {
    "kind": "ConfigMap",
    "metadata": {"name": "run-1", "creationTimestamp": "2026-11-22T02:00:00Z"},
    "data": {"job.yaml": "x"},
}


def test_a_job_file_of_a_dying_owner_is_taken_from_it_or_made_anew() -> None:
    """The garbage collector would take it from under the new Job."""
    there: Any = Configs(ConfigMap=CONFIG_MAP)
    ensure_config(there, CONFIG_MAP)
    assert there.done == [("own", None)]
    dying: Any = Configs(ConfigMap=CONFIG_MAP | {"dying": True})
    ensure_config(dying, CONFIG_MAP)
    assert dying.done == [("delete", "run-1"), ("create", "run-1")]


@pytest.mark.parametrize(
    ("crons", "done"),
    [
        ([], "delete"),
        ([{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "n", "uid": "u"}}], "own"),
        (ForbiddenError(ExitCode.NOT_ALLOWED, "cronjobs", "may not list", "…"), None),
    ],
)  # fmt: skip
def test_a_sweep_spares_what_a_schedule_mounts(crons: Any, done: str | None) -> None:
    """Adopted if it was cut off before that, and left alone where nobody may look."""
    cluster: Any = Configs(ConfigMap=CONFIG_MAP, CronJob=crons)
    sweep(cluster)
    assert [deed for deed, _ in cluster.done] == ([done] if done else [])
