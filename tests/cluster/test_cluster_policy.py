"""What the real Job controller does with each exit code: the table, put to the proof."""

from __future__ import annotations

from typing import Any

from controlplane import ControlPlane

from job.errors import TABLE
from k8s.kustomize import MANIFESTS, build

OTHERS = {1: "count", 2: "count", 126: "count", 137: "count", 143: "count", 255: "count"}
EXPECTED = {int(code): row.action for code, row in TABLE.items()} | OTHERS


def _create_job(plane: ControlPlane, namespace: str, name: str, **spec: Any) -> None:
    job = next(item for item in build(MANIFESTS / "base") if item["kind"] == "Job")
    body = {**job, "metadata": {"name": name}, "spec": {**job["spec"], **spec}}
    plane.create(f"/apis/batch/v1/namespaces/{namespace}/jobs", body)


def _first_pods(plane: ControlPlane, namespace: str, count: int) -> dict[str, str]:
    """Wait for so many pods; return Job name → pod name."""

    def all_there(pods: list[dict[str, Any]]) -> dict[str, str] | None:
        found = {
            pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]: pod["metadata"]["name"]
            for pod in pods
        }
        return found if len(found) == count else None

    found = plane.wait(f"/api/v1/namespaces/{namespace}/pods", all_there)
    assert found is not None
    return found


def _action(job: dict[str, Any]) -> str | None:
    """Return what the controller did with the Job's first pod, once that can be seen."""
    status = job.get("status", {})
    for condition in status.get("conditions", []):
        if condition["status"] == "True" and condition["type"] == "Complete":
            return "complete"
        if condition["status"] == "True" and condition["type"] == "Failed":
            return {"PodFailurePolicy": "fail"}.get(condition["reason"], condition["reason"])
    if status.get("uncountedTerminatedPods"):
        return None
    if status.get("failed"):
        return "count"
    # An ignored pod leaves no trace in the status: its replacement is the trace.
    return "ignore" if job.get("replaced") else None


def _actions(plane: ControlPlane, namespace: str, count: int) -> dict[str, str]:
    jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"

    def all_known(pods: list[dict[str, Any]]) -> dict[str, str] | None:
        of_jobs = [pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] for pod in pods]
        actions = {}
        for job in plane.get(jobs)["items"]:
            name = job["metadata"]["name"]
            actions[name] = _action({**job, "replaced": of_jobs.count(name) > 1})
        return actions if len(actions) == count and None not in actions.values() else None

    found = plane.wait(f"/api/v1/namespaces/{namespace}/pods", all_known, within_s=90)
    assert found is not None
    return found


def test_each_exit_code_does_what_the_table_says(controllers: ControlPlane, namespace: str) -> None:
    """Completed, failed at once, counted and tried again, or ignored: as job.errors says."""
    for code in EXPECTED:
        _create_job(controllers, namespace, f"code-{code}")
    pods = _first_pods(controllers, namespace, len(EXPECTED))
    for code in EXPECTED:
        controllers.end_pod(namespace, pods[f"code-{code}"], code)
    actions = _actions(controllers, namespace, len(EXPECTED))
    assert actions == {f"code-{code}": action for code, action in EXPECTED.items()}


def test_a_disruption_never_counts_whatever_the_code(
    controllers: ControlPlane, namespace: str
) -> None:
    """Drained, preempted or evicted pods are replaced, even if their process said 78 or 137."""
    reasons = {
        "preempted": ("PreemptionByScheduler", 143),
        "drained": ("EvictionByEvictionAPI", 75),
        "tainted": ("DeletionByTaintManager", 137),
        "config": ("TerminationByKubelet", 78),
    }
    for name in reasons:
        _create_job(controllers, namespace, name, backoffLimit=0)
    pods = _first_pods(controllers, namespace, len(reasons))
    for name, (reason, code) in reasons.items():
        controllers.end_pod(namespace, pods[name], code, disruption=reason)
    assert set(_actions(controllers, namespace, len(reasons)).values()) == {"ignore"}


def test_failures_that_count_end_the_job_at_the_limit(
    controllers: ControlPlane, namespace: str
) -> None:
    """The last allowed failure ends the Job, and says that the limit did it."""
    _create_job(controllers, namespace, "last", backoffLimit=0)
    pods = _first_pods(controllers, namespace, 1)
    controllers.end_pod(namespace, pods["last"], 137, reason="OOMKilled")
    assert _actions(controllers, namespace, 1) == {"last": "BackoffLimitExceeded"}


def test_a_pod_that_is_being_deleted_is_not_replaced_before_it_is_gone(
    controllers: ControlPlane, namespace: str
) -> None:
    """PodReplacementPolicy Failed: one pod of a run at a time, the old one's grace included."""
    controllers.add_node(f"node-{namespace}", gpus=8)
    _create_job(controllers, namespace, "one")
    name = _first_pods(controllers, namespace, 1)["one"]
    pods = f"/api/v1/namespaces/{namespace}/pods"
    controllers.wait_for(f"{pods}/{name}", lambda pod: pod["spec"].get("nodeName"))
    controllers.run_pod(namespace, name)
    controllers.delete(f"{pods}/{name}")
    job = f"/apis/batch/v1/namespaces/{namespace}/jobs/one"
    controllers.wait_for(job, lambda one: one["status"].get("terminating") == 1)
    assert [pod["metadata"]["name"] for pod in controllers.get(pods)["items"]] == [name]
    controllers.end_pod(namespace, name, 75)
    controllers.end_deleted_pods(namespace)

    def replaced(found: list[dict[str, Any]]) -> bool:
        return any(pod["metadata"]["name"] != name for pod in found)

    assert controllers.wait(pods, replaced)
