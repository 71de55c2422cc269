"""The submitter with a real Kueue: one GPU of quota, and more than one job that wants it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusterapi import BATCH
from controlplane import ControlPlane
from kueue import KUEUE, PROGRAM, kueue
from submitting import Person, person

Object = dict[str, Any]

QUOTA = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "64Gi", "nvidia.com/gpu": "1"}


@pytest.fixture(scope="module")
def queueing(
    plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane that Kueue admits Jobs to."""
    if not plane.has_controllers:
        pytest.skip("no kube-controller-manager in KUBEBUILDER_ASSETS")
    if not PROGRAM.exists():
        pytest.fail("Kueue is not built; run tests/cluster/build.sh kueue")
    with kueue(plane, tmp_path_factory.mktemp(f"kueue-{plane.minor}")):
        yield plane


@pytest.fixture
def me(
    queueing: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Person]:
    """A person with the submitter's Role, in a namespace whose queue `gpus` has one GPU."""
    _set_up_queue(queueing, namespace)
    queueing.add_node(f"kueue-{namespace}", gpus=8, labels={"mine": namespace})
    yield person(queueing, namespace, tmp_path, monkeypatch, capsys)
    queueing.delete(f"{KUEUE}/clusterqueues/{namespace}")


def _set_up_queue(plane: ControlPlane, namespace: str) -> None:
    resources = [{"name": name, "nominalQuota": quota} for name, quota in QUOTA.items()]
    flavors = [{"name": namespace, "resources": resources}]
    spec = {
        "namespaceSelector": {},
        "resourceGroups": [{"coveredResources": list(QUOTA), "flavors": flavors}],
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    for kind, path, item in (
        ("ResourceFlavor", "resourceflavors", {"metadata": {"name": namespace}}),
        ("ClusterQueue", "clusterqueues", {"metadata": {"name": namespace}, "spec": spec}),
        (
            "LocalQueue",
            f"namespaces/{namespace}/localqueues",
            {"metadata": {"name": "gpus"}, "spec": {"clusterQueue": namespace}},
        ),
    ):
        _create(plane, kind, path, item)


def _create(plane: ControlPlane, kind: str, path: str, item: Object) -> None:
    plane.create(
        f"{KUEUE}/{path}", {"apiVersion": KUEUE.removeprefix("/apis/"), "kind": kind, **item}
    )


def queued(me: Person, *more: str, queue: str = "gpus", **cluster: Any) -> str:
    """Submit to a queue and return the run."""
    mine = {"nvidia.com/gpu.product": None, "mine": me.namespace}
    code, out, err = me.submits(*more, queue=queue, node_selector=mine, **cluster)
    assert code == 0, err
    return out.strip()


def await_job(plane: ControlPlane, me: Person, run: str, *, suspended: bool = False) -> Object:
    """Wait until Kueue has let a run's Job go, or has suspended it."""
    path = f"{BATCH.format(me.namespace)}/jobs/{run}"
    return plane.wait_for(path, lambda it: it if it["spec"]["suspend"] is suspended else None)


def await_workload(plane: ControlPlane, me: Person, run: str, kind: str, status: str) -> Object:
    """Wait for a condition of a run's Workload, and return the Workload."""

    def of_run(workloads: list[Object]) -> Object | None:
        for it in workloads:
            conditions = it.get("status", {}).get("conditions", [])
            told = any((c["type"], c["status"]) == (kind, status) for c in conditions)
            if told and it["metadata"]["ownerReferences"][0]["name"] == run:
                return it
        return None

    found = plane.wait(f"{KUEUE}/namespaces/{me.namespace}/workloads", of_run)
    assert found is not None
    return found


def await_pod(plane: ControlPlane, me: Person, run: str) -> str:
    """Wait until a run's pod is on a node, and return its name."""

    def placed(pods: list[Object]) -> str | None:
        for pod in pods:
            if pod["metadata"]["name"].startswith(run) and pod["spec"].get("nodeName"):
                return str(pod["metadata"]["name"])
        return None

    found = plane.wait(f"/api/v1/namespaces/{me.namespace}/pods", placed)
    assert found is not None
    return found


def end_when_deleted(plane: ControlPlane, me: Person, pod: str) -> threading.Thread:
    """Be the kubelet of a pod that is deleted: it saves its checkpoint and goes."""

    def kubelet() -> None:
        path = f"/api/v1/namespaces/{me.namespace}/pods/{pod}"
        plane.wait_for(path, lambda it: it["metadata"].get("deletionTimestamp"))
        plane.end_pod(me.namespace, pod, 75)
        plane.end_deleted_pods(me.namespace)

    thread = threading.Thread(target=kubelet)
    thread.start()
    return thread


def why(me: Person, run: str) -> Object:
    """Return what `why` answers."""
    code, out, err = me.types("why", run, "--output", "json")
    assert code == 0, err
    answer: Object = json.loads(out)
    assert "\n" not in answer["what"]
    return answer


def test_a_second_job_waits_for_quota_and_starts_when_the_first_ends(
    me: Person, queueing: ControlPlane
) -> None:
    """One is admitted; `why` names queue and quota for the other, which then starts by itself."""
    first = queued(me)
    await_job(queueing, me, first)
    await_workload(queueing, me, first, "Admitted", "True")
    pod = await_pod(queueing, me, first)
    second = queued(me, "--new")
    await_workload(queueing, me, second, "QuotaReserved", "False")
    answer = why(me, second)
    assert answer["cause"] == "kueue-quota"
    assert "queue gpus: " in answer["what"]
    assert "insufficient unused quota for nvidia.com/gpu" in answer["what"]
    assert json.loads(me.types("status", second, "-o", "json")[1])["state"] == "queued"
    queueing.run_pod(me.namespace, pod)
    queueing.end_pod(me.namespace, pod, 0)
    await_job(queueing, me, second)


def test_more_than_the_queue_will_ever_have_is_told_apart(
    me: Person, queueing: ControlPlane
) -> None:
    """Waiting does not help a run that asks for more than the whole quota."""
    run = queued(me, gpus=2)
    await_workload(queueing, me, run, "QuotaReserved", "False")
    assert "it can't start so: ask for less" in why(me, run)["do"]


def test_cancel_deactivates_the_workload_and_waits_for_the_pod(
    me: Person, queueing: ControlPlane
) -> None:
    """Kueue would start a Job again that is only suspended: its Workload becomes inactive."""
    run = queued(me)
    pod = await_pod(queueing, me, run)
    queueing.run_pod(me.namespace, pod)
    workloads = f"{KUEUE}/namespaces/{me.namespace}/workloads"
    seen: list[bool] = []

    def watch() -> None:
        seen.append(queueing.wait(workloads, lambda its: its[0]["spec"]["active"] is False))

    threads = [end_when_deleted(queueing, me, pod), threading.Thread(target=watch)]
    threads[1].start()
    code, _, err = me.types("cancel", run)
    for thread in threads:
        thread.join()
    assert (code, seen) == (0, [True]), err
    assert "asked it to save a checkpoint" in err
    assert queueing.get(f"{BATCH.format(me.namespace)}/jobs")["items"] == []


def test_submit_takes_back_a_cancel_that_was_cut_off(me: Person, queueing: ControlPlane) -> None:
    """The inactive Workload becomes active, and Kueue lets the Job go again."""
    run = queued(me)
    await_job(queueing, me, run)
    workload = await_workload(queueing, me, run, "Admitted", "True")
    path = f"{KUEUE}/namespaces/{me.namespace}/workloads/{workload['metadata']['name']}"
    queueing.patch(path, {"spec": {"active": False}})
    await_job(queueing, me, run, suspended=True)
    assert queued(me) == run
    assert queueing.get(path)["spec"]["active"] is True


def test_a_queue_that_is_not_there_is_refused_and_explained(
    me: Person, queueing: ControlPlane
) -> None:
    """Submit refuses it; of a Job that came there another way, `why` says what to mend."""
    code, _, err = me.submits(queue="nowhere")
    assert code == 78
    assert "there is no LocalQueue nowhere" in err
    job_path, cluster_path = me.write(queue="nowhere")
    rendered = me.types("render", job_path, "--cluster", cluster_path)[1]
    _, job = yaml.safe_load_all(rendered)
    queueing.create(f"{BATCH.format(me.namespace)}/jobs", job)
    run = job["metadata"]["name"]
    await_workload(queueing, me, run, "QuotaReserved", "False")
    answer = why(me, run)
    assert answer["cause"] == "kueue-inadmissible"
    assert "nowhere" in answer["what"]


def test_an_urgent_job_takes_the_place_of_another_which_is_told_so(
    me: Person, queueing: ControlPlane
) -> None:
    """A priority class of Kueue's preempts what runs; the preempted run's pod saves and waits."""
    name = f"urgent-{me.namespace}"
    item = {"metadata": {"name": name}, "value": 1000}
    _create(queueing, "WorkloadPriorityClass", "workloadpriorityclasses", item)
    first = queued(me)
    pod = await_pod(queueing, me, first)
    queueing.run_pod(me.namespace, pod)
    kubelet = end_when_deleted(queueing, me, pod)
    second = queued(me, "--new", queue_priority=name)
    workload = await_workload(queueing, me, second, "Admitted", "True")
    kubelet.join()
    assert workload["spec"]["priority"] == 1000
    await_job(queueing, me, first, suspended=True)
    await_workload(queueing, me, first, "QuotaReserved", "False")
    answer = why(me, first)
    assert answer["cause"] == "kueue-preempted"
    assert "queue gpus" in answer["what"]
