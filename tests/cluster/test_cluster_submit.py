"""The submitter against real API servers, with nothing but its Role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane
from submitting import JOB, Person, person, rules

Object = dict[str, Any]


@pytest.fixture
def me(
    controllers: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Person:
    """A person with the submitter's Role."""
    return person(controllers, namespace, tmp_path, monkeypatch, capsys)


def only(namespace: str) -> dict[str, str | None]:
    """Return a selector for this test's nodes alone: pods of other tests take none of them."""
    return {"nvidia.com/gpu.product": None, "mine": namespace}


def jobs(plane: ControlPlane, namespace: str) -> list[Object]:
    return plane.get(f"/apis/batch/v1/namespaces/{namespace}/jobs")["items"]


def configs(plane: ControlPlane, namespace: str) -> list[Object]:
    items = plane.get(f"/api/v1/namespaces/{namespace}/configmaps")["items"]
    return [item for item in items if item["metadata"]["name"].startswith("night")]


def pod_of(plane: ControlPlane, namespace: str, run: str, *, other_than: str = "") -> str:
    def first(pods: list[Object]) -> str | None:
        names = [pod["metadata"]["name"] for pod in pods]
        return next((name for name in names if name.startswith(run) and name != other_than), None)

    found = plane.wait(f"/api/v1/namespaces/{namespace}/pods", first)
    assert found is not None
    return found


def ended(plane: ControlPlane, namespace: str, run: str, kind: str) -> None:
    def is_over(job: Object) -> bool:
        conditions = job.get("status", {}).get("conditions", [])
        return any(it["type"] == kind and it["status"] == "True" for it in conditions)

    plane.wait_for(f"/apis/batch/v1/namespaces/{namespace}/jobs/{run}", is_over)


def test_submit_creates_one_owned_immutable_job_file_and_one_job(
    me: Person, controllers: ControlPlane
) -> None:
    """The ConfigMap is immutable and goes with its Job; the same run twice attaches."""
    code, out, err = me.submits()
    assert code == 0, err
    run = out.strip()
    (config,), (job,) = configs(controllers, me.namespace), jobs(controllers, me.namespace)
    assert config["immutable"] is True
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert job["metadata"]["name"] == config["metadata"]["name"] == run
    code, out, err = me.submits()
    assert (code, out.strip()) == (0, run)
    assert "attached" in err
    assert len(jobs(controllers, me.namespace)) == 1


def test_new_makes_another_run_of_the_same_file(me: Person, controllers: ControlPlane) -> None:
    """`--new` gives the run another id."""
    first = me.submits()[1].strip()
    second = me.submits("--new")[1].strip()
    assert first != second
    assert second.startswith(first)
    assert len(jobs(controllers, me.namespace)) == 2


def test_a_changed_cluster_file_is_told_and_a_cut_off_cancel_is_taken_back(
    me: Person, controllers: ControlPlane
) -> None:
    """The Job that is there is compared as it was made, whatever the server added; it resumes."""
    run = me.submits()[1].strip()
    code, _, err = me.submits(platform="aks")
    assert (code, f"lora-job cancel {run}" in err) == (73, True), err
    path = f"/apis/batch/v1/namespaces/{me.namespace}/jobs/{run}"
    controllers.patch(path, {"spec": {"suspend": True}})
    code, _, err = me.submits()
    assert (code, "resumed" in err) == (0, True), err
    assert controllers.get(path)["spec"]["suspend"] is False


def test_a_failed_job_is_created_again(me: Person, controllers: ControlPlane) -> None:
    """The failed Job and its pods go first; the new one has a job file of its own."""
    run = me.submits()[1].strip()
    before = jobs(controllers, me.namespace)[0]["metadata"]["uid"]
    controllers.end_pod(me.namespace, pod_of(controllers, me.namespace, run), 78)
    ended(controllers, me.namespace, run, "Failed")
    code, _, err = me.submits()
    assert code == 0, err
    assert "created again" in err
    (job,), (config,) = jobs(controllers, me.namespace), configs(controllers, me.namespace)
    assert job["metadata"]["uid"] != before
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


def test_what_submit_sends_is_what_render_prints(me: Person, controllers: ControlPlane) -> None:
    """The objects in the cluster hold every field that render printed."""
    import yaml

    from k8s.kustomize import merge

    job_path, cluster_path = me.write()
    _, out, _ = me.types("render", job_path, "--cluster", cluster_path)
    config, job = yaml.safe_load_all(out)
    me.submits()
    (stored,) = jobs(controllers, me.namespace)
    assert configs(controllers, me.namespace)[0]["data"] == config["data"]
    for part in ("metadata", "spec"):
        assert merge(stored[part], job[part]) == stored[part]


def test_orphans_are_swept_and_the_rest_is_left(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job file whose submitter died before the Job was there is deleted by the next submit."""
    from k8s import submit

    labels = {"app.kubernetes.io/managed-by": "lora-job", "lora-job/owned": "false"}
    path = f"/api/v1/namespaces/{me.namespace}/configmaps"
    controllers.create(path, {"metadata": {"name": "night-orphan", "labels": labels}})
    controllers.create(path, {"metadata": {"name": "night-else"}})
    me.submits()
    assert {it["metadata"]["name"] for it in configs(controllers, me.namespace)} >= {
        "night-orphan",
        "night-else",
    }
    monkeypatch.setattr(submit, "ORPHAN_S", -60.0)
    me.submits("--new")
    names = {it["metadata"]["name"] for it in configs(controllers, me.namespace)}
    assert "night-orphan" not in names
    assert "night-else" in names


def test_a_job_of_somebody_else_is_left_alone(me: Person, controllers: ControlPlane) -> None:
    """A foreign Job of the run's name is 73, and nothing is touched."""
    import yaml

    job_path, cluster_path = me.write()
    _, out, _ = me.types("render", job_path, "--cluster", cluster_path)
    _, job = yaml.safe_load_all(out)
    job["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "somebody"}
    controllers.create(f"/apis/batch/v1/namespaces/{me.namespace}/jobs", job)
    code, _, err = me.submits()
    assert code == 73
    assert "not lora-job's" in err


def test_status_why_and_list_tell_a_runs_life(me: Person, controllers: ControlPlane) -> None:
    """Pending for want of a node, then running, then failed with the job's own last words."""
    run = me.submits(price_per_gpu_hour=3.5)[1].strip()
    pod = pod_of(controllers, me.namespace, run)
    controllers.wait_for(
        f"/api/v1/namespaces/{me.namespace}/pods/{pod}",
        lambda it: it.get("status", {}).get("conditions"),
    )
    code, out, err = me.types("why", run)
    assert code == 0, err
    assert "no free node fits" in out or "no nodes" in out
    code, out, err = me.types("status", run)
    assert code == 0, err
    assert "pending" in out
    controllers.run_pod(me.namespace, pod)
    assert json.loads(me.types("status", run, "--output", "json")[1])["state"] == "running"
    word = {
        "code": 65,
        "name": "data refused",
        "where": "data",
        "what": "row 3 is bad",
        "do": "mend",
    }
    controllers.end_pod(me.namespace, pod, 65, message=json.dumps(word))
    ended(controllers, me.namespace, run, "Failed")
    assert "row 3 is bad; mend" in me.types("why", run)[1]
    (listed,) = json.loads(me.types("list", "--output", "json")[1])
    assert listed["state"] == "failed"
    assert listed["last_end"]["code"] == 65
    assert "65 data refused" in me.types("list")[1]
    code, out, err = me.types("wait", run)
    assert code == 65
    assert "row 3 is bad" in err


def test_list_finds_the_newest_over_several_pages(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends them by name, a page at a time; the newest come first."""
    monkeypatch.setattr("k8s.cluster.PAGE", 2)
    for _ in range(3):
        me.submits("--new")
    born = [
        (job["metadata"]["creationTimestamp"], job["metadata"]["name"])
        for job in jobs(controllers, me.namespace)
    ]
    listed = json.loads(me.types("list", "--limit", "2", "--output", "json")[1])
    assert [run["name"] for run in listed] == [name for _, name in sorted(born)[:0:-1]]


def test_an_empty_namespace_lists_nothing_and_an_absent_one_is_66(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server itself answers both with an empty list."""
    assert me.types("list", "--output", "json")[:2] == (0, "[]\n")
    monkeypatch.setenv("KUBECONFIG", str(controllers.admin))
    for words in (["list"], ["status", "run"]):
        code, _, err = me.types(*words, "-n", "nowhere")
        assert (code, "there is no namespace nowhere" in err) == (66, True)


def test_a_second_gpu_job_waits_and_why_names_the_first(
    me: Person, controllers: ControlPlane
) -> None:
    """Insufficient nvidia.com/gpu, and which run holds it."""
    controllers.add_node(f"gpu-{me.namespace}", gpus=1, labels={"mine": me.namespace})
    mine = {"node_selector": only(me.namespace)}
    first = me.submits(**mine)[1].strip()
    pod = pod_of(controllers, me.namespace, first)
    pods = f"/api/v1/namespaces/{me.namespace}/pods"
    controllers.wait_for(f"{pods}/{pod}", lambda it: it["spec"].get("nodeName"))
    controllers.run_pod(me.namespace, pod)
    second = me.submits("--new", **mine)[1].strip()
    waits = pod_of(controllers, me.namespace, second)
    controllers.wait_for(f"{pods}/{waits}", lambda it: it.get("status", {}).get("conditions"))
    code, out, _ = me.types("why", second, "--output", "json")
    answer = json.loads(out)
    assert (code, answer["cause"]) == (0, "gpus")
    assert first in answer["what"]


def test_quota_is_named_before_and_after(me: Person, controllers: ControlPlane) -> None:
    """More than the whole quota is refused by submit; `why` names a quota that is used up."""
    hard = {"requests.nvidia.com/gpu": "1"}
    path = f"/api/v1/namespaces/{me.namespace}/resourcequotas"
    controllers.create(path, {"metadata": {"name": "gpus"}, "spec": {"hard": hard}})
    controllers.wait_for(f"{path}/gpus", lambda it: it.get("status", {}).get("hard"))
    code, _, err = me.submits(gpus=2)
    assert code == 78
    assert "gpus: requests.nvidia.com/gpu is 1" in err
    assert jobs(controllers, me.namespace) == []
    me.submits()
    second = me.submits("--new")[1].strip()

    def refused(events: list[Object]) -> bool:
        return any(it["involvedObject"]["name"] == second for it in events)

    controllers.wait(f"/api/v1/namespaces/{me.namespace}/events", refused)
    assert json.loads(me.types("why", second, "-o", "json")[1])["cause"] == "quota"


def test_cancel_waits_for_the_pod_then_deletes(me: Person, controllers: ControlPlane) -> None:
    """Suspended first, so that the pod gets its grace; the Job goes when the pod has gone."""
    import threading

    labels = {"mine": me.namespace}
    controllers.add_node(f"cancel-{me.namespace}", gpus=1, labels=labels)
    run = me.submits(node_selector=only(me.namespace))[1].strip()
    pod = pod_of(controllers, me.namespace, run)
    pods = f"/api/v1/namespaces/{me.namespace}/pods"
    controllers.wait_for(f"{pods}/{pod}", lambda it: it["spec"].get("nodeName"))
    controllers.run_pod(me.namespace, pod)

    def kubelet() -> None:
        controllers.wait_for(f"{pods}/{pod}", lambda it: it["metadata"].get("deletionTimestamp"))
        controllers.end_pod(me.namespace, pod, 75)
        controllers.end_deleted_pods(me.namespace)

    thread = threading.Thread(target=kubelet)
    thread.start()
    code, _, err = me.types("cancel", run)
    thread.join()
    assert code == 0, err
    assert "asked it to save a checkpoint" in err
    assert jobs(controllers, me.namespace) == []
    assert me.types("status", run)[0] == 66


def test_a_silent_node_is_told_and_cancel_does_not_wait_for_it(
    me: Person, controllers: ControlPlane
) -> None:
    """The node controller wrote its pod off: nobody will ever tell of its end."""
    controllers.add_node(f"silent-{me.namespace}", gpus=1, labels={"mine": me.namespace})
    run = me.submits(node_selector=only(me.namespace))[1].strip()
    pod = pod_of(controllers, me.namespace, run)
    path = f"/api/v1/namespaces/{me.namespace}/pods/{pod}"
    controllers.wait_for(path, lambda it: it["spec"].get("nodeName"))
    controllers.run_pod(me.namespace, pod)
    conditions = [{"type": "Ready", "status": "False"}]
    controllers.patch(f"{path}/status", {"status": {"conditions": conditions}}, kind="strategic")
    assert "lost for" in me.types("status", run)[1]
    assert f"kubectl delete node silent-{me.namespace}" in me.types("why", run)[1]
    code, _, err = me.types("cancel", run)
    assert code == 0, err
    assert jobs(controllers, me.namespace) == []


def test_cancel_now_deletes_at_once(me: Person, controllers: ControlPlane) -> None:
    """`--now` does not wait."""
    run = me.submits()[1].strip()
    assert me.types("cancel", run, "--now")[0] == 0
    assert jobs(controllers, me.namespace) == []


def test_schedule_is_created_changed_fired_once_and_deleted(
    me: Person, controllers: ControlPlane
) -> None:
    """A second fire of the same minute is one run; a changed job file replaces the old one."""
    job_path, cluster_path = me.write()
    line = ["--cluster", cluster_path, "--cron", "0 2 * * *", "--time-zone", "Europe/Berlin"]
    late = ["--start-deadline", "600"]
    code, out, err = me.types("schedule", job_path, *line, *late, "-o", "json")
    assert code == 0, err
    assert len(json.loads(out)["next"]) == 3
    path = f"/apis/batch/v1/namespaces/{me.namespace}/cronjobs/night"
    spec = controllers.get(path)["spec"]
    assert (spec["timeZone"], spec["concurrencyPolicy"]) == ("Europe/Berlin", "Forbid")
    old = configs(controllers, me.namespace)[0]["metadata"]["name"]

    me.write(job=JOB.replace("name: night", "name: night\nseed: 7"))
    assert me.types("schedule", job_path, *line)[0] == 0
    (config,) = configs(controllers, me.namespace)
    assert config["metadata"]["name"] != old
    me.write(platform="aks")
    assert me.types("schedule", "night", "--suspend")[0] == 0
    assert me.types("schedule", job_path, *line[:4])[0] == 0
    spec = controllers.get(path)["spec"]
    assert (spec["timeZone"], spec["startingDeadlineSeconds"]) == ("Europe/Berlin", 600)
    assert spec["suspend"] is True
    assert me.types("schedule", "night", "--resume")[0] == 0
    pod = controllers.get(path)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5"}

    for _ in range(2):
        code, _, err = me.types("schedule", "night", "--run-now")
        assert code == 0, err
    assert len(jobs(controllers, me.namespace)) <= 2  # the minute may have turned between
    run = jobs(controllers, me.namespace)[0]["metadata"]["name"]
    assert run.removeprefix("night-").isdigit()
    pod_of(controllers, me.namespace, run)

    assert json.loads(me.types("schedule", "night", "--suspend", "-o", "json")[1])["suspended"]
    assert controllers.get(path)["spec"]["suspend"] is True
    me.types("schedule", "night", "--resume")
    assert controllers.get(path)["spec"]["suspend"] is False
    assert me.types("schedule", "night", "--delete")[0] == 0
    assert me.types("schedule", "night")[0] == 66


@pytest.mark.parametrize("line", ["0 2 L * *", "0 2 * * 1#2", "0 2 * * 7"])
def test_a_line_that_only_other_crons_know_is_refused(
    me: Person, controllers: ControlPlane, line: str
) -> None:
    """By the server's own words, before anything is created."""
    job_path, cluster_path = me.write()
    code, _, err = me.types("schedule", job_path, "--cluster", cluster_path, "--cron", line)
    assert (code, "spec.schedule" in err) == (78, True), err
    assert configs(controllers, me.namespace) == []


def test_the_ci_role_submits_and_is_refused_a_schedule_by_name(
    controllers: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CI may submit and wait; what it may not, it is told by verb and resource."""
    ci = person(controllers, namespace, tmp_path, monkeypatch, capsys, role="ci")
    code, out, err = ci.submits()
    assert code == 0, err
    assert ci.types("status", out.strip())[0] == 0
    code, _, err = ci.types("schedule", "night")
    assert code == 77
    assert "may not get cronjobs" in err
    assert "Traceback" not in err


def test_checks_say_when_they_may_not_look_and_when_they_may(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets and nodes are not seen with the Role alone; with the ClusterRoles they are."""
    job_path, cluster_path = me.write(secrets={"HF_TOKEN": "hub/token"})
    words = ["doctor", job_path, "--cluster", cluster_path, "-o", "json", "--no-data-checks"]
    code, out, err = me.types(*words)
    assert code == 0, err
    states = {one["check"]: one["state"] for one in json.loads(out)}
    assert states["secret hub"] == states["node pool"] == "not allowed to look"
    assert states["dry run"] == states["namespace"] == "ok"

    group = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
    look = {"apiGroups": [""], "resources": ["nodes", "secrets"], "verbs": ["get", "list"]}
    role = f"look-{me.namespace}"
    controllers.create(group, {"metadata": {"name": role}, "rules": [look]})
    controllers.bind(me.namespace, "submitter", "ClusterRole", role)
    code, out, _ = me.types(*words)
    found = {one["check"]: one for one in json.loads(out)}
    assert code == 78
    assert found["secret hub"]["state"] == "wrong"
    secrets = f"/api/v1/namespaces/{me.namespace}/secrets"
    controllers.create(secrets, {"metadata": {"name": "hub"}, "data": {"other": "eA=="}})
    found = {one["check"]: one for one in json.loads(me.types(*words)[1])}
    assert "has no key token (it has other)" in found["secret hub"]["what"]


def test_doctor_tells_of_this_machine_too(me: Person) -> None:
    """What submit would refuse before it uploads: data that is not there, beside the cluster's."""
    job = JOB.replace("hf://HuggingFaceH4/Multilingual-Thinking", str(me.folder / "no.jsonl"))
    job = job.replace("hf://Qwen/Qwen3-0.6B@main", "package:nobody_has/it.gguf")
    job_path, cluster_path = me.write(job=job)
    code, out, err = me.types("doctor", job_path, "--cluster", cluster_path, "-o", "json")
    assert code == 66, err
    found = {one["check"]: one for one in json.loads(out)}
    assert found["dry run"]["state"] == "ok"
    assert found["data"]["state"] == found["model"]["state"] == "wrong"


def test_a_gpu_count_that_no_node_holds_is_refused(me: Person, controllers: ControlPlane) -> None:
    """With leave to look at nodes, the largest matching node is named."""
    controllers.add_node(f"small-{me.namespace}", gpus=1, labels={"mine": me.namespace})
    group = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
    role = f"nodes-{me.namespace}"
    look = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]}
    controllers.create(group, {"metadata": {"name": role}, "rules": [look]})
    controllers.bind(me.namespace, "submitter", "ClusterRole", role)
    code, _, err = me.submits(gpus=4, node_selector=only(me.namespace))
    assert code == 78
    assert "asks for 4 nvidia.com/gpu, the largest matching node has 1" in err
    assert jobs(controllers, me.namespace) == []
    assert me.submits(gpus=1, node_selector=only(me.namespace))[0] == 0


def test_data_is_sent_only_for_a_run_that_is_made(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing for a submit that the cluster refuses; a run that is there is joined at once."""
    from job.stop import Stop
    from job.store.folder import FolderStore

    sent = me.folder / "sent"
    sent.mkdir()
    monkeypatch.setattr("job.store.open_store", lambda *_, **__: FolderStore(sent, stop=Stop()))
    rows = me.folder / "rows.jsonl"
    rows.write_text("{}\n")
    job = JOB.replace("hf://HuggingFaceH4/Multilingual-Thinking", str(rows))
    code, _, err = me.submits(job=job, image="registry.example/it:latest", require_digest=True)
    assert (code, list(sent.rglob("rows.jsonl"))) == (78, []), err
    code, run, err = me.submits(job=job)
    assert (code, len(list(sent.rglob("rows.jsonl")))) == (0, 1), err

    checks = "k8s.local_checks.check_locally"
    monkeypatch.setattr(checks, lambda *_, **__: pytest.fail("looked at the data"))
    job_path, cluster_path = me.write(job=job)
    code, out, err = me.types("submit", job_path, "--cluster", cluster_path)
    assert (code, out) == (0, run), err
    assert "attached" in err
    assert len(jobs(controllers, me.namespace)) == 1


def test_doctor_goes_on_where_a_role_may_not_create_jobs(
    me: Person, controllers: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole report, and 77 with the verb and the resource."""
    looks = [
        {**rule, "verbs": [verb for verb in rule["verbs"] if verb != "create"]}
        for rule in rules("submitter")
    ]
    config = controllers.user(me.namespace, looks, name="viewer")
    monkeypatch.setenv("KUBECONFIG", str(config))
    job_path, cluster_path = me.write()
    words = ("doctor", job_path, "--cluster", cluster_path, "-o", "json", "--no-data-checks")
    code, out, err = me.types(*words)
    assert code == 77, err
    found = {one["check"]: one for one in json.loads(out)}
    assert found["namespace"]["state"] == "ok"
    assert "may not create" in found["dry run"]["what"]
