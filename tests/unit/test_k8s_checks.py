"""What doctor and submit say of a cluster, held against what a server would answer."""

from __future__ import annotations

from typing import Any

import pytest

from job.config import JobConfig, parse
from job.errors import JobError
from k8s.checks import Finding, run_checks
from k8s.config import ClusterConfig
from k8s.refusals import ForbiddenError, NotFoundError, raise_refusal, warnings_in
from k8s.render import objects

Object = dict[str, Any]

DIGEST = f"r/lora-job@sha256:{'a' * 64}"
JOB = 'name: n\nstore: s3://b/p\nmodel: {source: "hf://a/b"}\ndata: {source: "hf://a/c"}\n'
LABELS = {
    "gpu-operator": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "gke": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
}


class Answering:
    """A cluster that answers from a table; what it holds is a thing, a list, or an error."""

    namespace, host = "here", "https://k8s"

    def __init__(self, **answers: Any) -> None:
        self.answers = {"Namespace": {"metadata": {}}, "ResourceQuota": [], "Node": [], **answers}

    def _answer(self, kind: str) -> Any:
        answer = self.answers.get(kind)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get(self, kind: str, _name: str) -> Any:
        """Return the one thing of this kind."""
        return self._answer(kind)

    def list(self, kind: str, **_query: str) -> Any:
        """Return all of this kind."""
        return self._answer(kind)

    def create(self, item: Object, *, dry_run: bool) -> Any:
        """Accept everything."""
        assert item, dry_run
        return type("Reply", (), {"warnings": []})


def _found(
    cluster: Any, platform: str = "gpu-operator", device: str = "cuda", **changes: Any
) -> dict[str, Finding]:
    job = parse(f"device: {device}\n{JOB}", JobConfig, where="job.yaml")
    raw = {"platform": platform, "image": DIGEST, **changes}
    settings = ClusterConfig.model_validate(raw)
    items = list(objects(job, settings, run="run-1"))
    return {one.check: one for one in run_checks(cluster, settings, job, items)}


def _node(platform: str, *, more: Object | None = None, **spec: Any) -> Object:
    share = {"cpu": "96", "memory": "2Ti", "ephemeral-storage": "2Ti", "nvidia.com/gpu": "8"}
    labels = LABELS[platform] | (more or {})
    return {"metadata": {"labels": labels}, "spec": spec, "status": {"allocatable": share}}


@pytest.mark.parametrize(
    ("platform", "label", "said"),
    [
        ("gpu-operator", {"capacity": "spot"}, "capacity NotIn spot"),
        ("gke", {"cloud.google.com/gke-spot": "true"}, "gke-spot DoesNotExist"),
    ],
)
def test_spot_nodes_are_no_pool_of_an_on_demand_job(
    platform: str, label: Object, said: str
) -> None:
    """The required affinity of the manifests rules them out; on-demand ones beside them count."""
    spot, other = _node(platform, more=label), _node(platform)
    pool = _found(Answering(Node=[spot]), platform)["node pool"]
    assert (pool.state, said in pool.what) == ("warning", True), pool
    pool = _found(Answering(Node=[spot, other]), platform)["node pool"]
    assert (pool.state, pool.what) == ("ok", "1 of 1 matching nodes can hold it")


def test_cordoned_and_tainted_nodes_take_nothing() -> None:
    """A pool that is cordoned may come back; taints that are not tolerated stay."""
    cordoned = _node("gpu-operator", unschedulable=True)
    pool = _found(Answering(Node=[cordoned]))["node pool"]
    assert (pool.state, pool.what) == ("warning", "no node takes it now: 1 cordoned")
    taint = {"key": "team", "value": "blue", "effect": "NoSchedule"}
    pool = _found(Answering(Node=[_node("gpu-operator", taints=[taint])]))["node pool"]
    assert (pool.state, "1 tainted team=blue" in pool.what) == ("wrong", True)
    gpu = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    assert _found(Answering(Node=[_node("gpu-operator", taints=[gpu])]))["node pool"].state == "ok"


@pytest.mark.parametrize(
    ("device", "gpus", "do"),
    [
        ("cuda", 0, "set gpus: 1, or device: cpu"),
        ("cpu", 1, "set gpus: 0, or device: cuda"),
        ("cpu", 0, None),
        ("cuda", 2, None),
    ],
)
def test_a_gpu_is_asked_for_if_the_job_uses_it(device: str, gpus: int, do: str | None) -> None:
    """Neither a pod that finds no GPU, nor an H100 for a job that leaves it idle."""
    found = _found(Answering(), device=device, gpus=gpus).get("gpus")
    assert (found and (found.state, found.do)) == (do and ("wrong", do))


def _refused(status: int, message: str, deed: str) -> JobError:
    with pytest.raises(JobError) as caught:
        raise_refusal(status, "Forbidden", message, deed, "here", "https://k8s")
    return caught.value


def test_a_role_without_resourcequotas_is_no_quota_that_is_full() -> None:
    """The word quota is in both; only the first is about asking for less."""
    full = 'pods "a" is forbidden: exceeded quota: gpus, requested: 2, used: 0, limited: 1'
    assert "ask for less" in str(_refused(403, full, "create jobs"))
    role = 'resourcequotas is forbidden: User "me" cannot list resource "resourcequotas"'
    error = _refused(403, role, "list resourcequotas")
    assert isinstance(error, ForbiddenError)
    found = _found(Answering(ResourceQuota=error))["quota"]
    assert (found.state, "list resourcequotas" in found.what) == ("not allowed to look", True)


def test_mends_for_a_secret_work_for_who_reads_them() -> None:
    """No `describe` for those who may not; a missing key is added to the Secret that is there."""
    secrets = {"AWS_ACCESS_KEY_ID": "s3/access-key", "AWS_SECRET_ACCESS_KEY": "s3/secret-key"}

    def found(answer: Any) -> Finding:
        return _found(Answering(Secret=answer), secrets=secrets)["secret s3"]

    unseen = found(_refused(403, 'User "me" cannot get resource "secrets"', "get secrets"))
    assert (unseen.state, "kubectl" in unseen.do) == ("not allowed to look", False)
    assert "create secret generic s3 --from-literal=access-key=… " in found(None).do
    lacking = found({"data": {"access-key": "eA=="}})
    assert (
        lacking.do == """kubectl -n here patch secret s3 -p '{"stringData": {"secret-key": "…"}}'"""
    )


def test_what_the_cluster_file_names_is_created_where_it_belongs() -> None:
    """A PriorityClass has no namespace; without Kueue there is no queue to create."""
    gone = _found(Answering(), priority_class="low", service_account="trainer")
    assert gone["PriorityClass"].do == "create it, or name one that is there"
    assert "create it in namespace here" in gone["ServiceAccount"].do
    queue = _found(Answering(Workload=[]), queue="gpus")["LocalQueue"]
    assert queue.what == "there is no LocalQueue gpus"
    queue = _found(Answering(Workload=NotFoundError("x")), queue="gpus")["LocalQueue"]
    assert (queue.state, "Kueue is not installed" in queue.what) == ("wrong", True)


def test_a_servers_warning_is_read_to_its_end() -> None:
    """Quotes inside it are escaped."""
    text = r'299 - "would violate PodSecurity \"restricted:latest\": hostPath (volume \"cache\")"'
    said = 'would violate PodSecurity "restricted:latest": hostPath (volume "cache")'
    assert warnings_in([text, '299 - "plain"', "odd"]) == [said, "plain"]


@pytest.mark.parametrize(
    "said",
    [
        'admission webhook "gate" denied the request: [allowed-repos] use our registry',
        "unable to create new content in namespace here because it is being terminated",
    ],
)
def test_a_rule_that_is_no_role_is_told_in_its_own_words(said: str) -> None:
    """A webhook's, or a namespace that goes: no Role would help."""
    error = _refused(403, said, "create jobs")
    assert (error.code, isinstance(error, ForbiddenError)) == (77, False)
    assert said in str(error)
    assert "Role" not in str(error)


def test_a_refused_dry_run_hides_no_other_finding() -> None:
    """The missing Secret stands beside what the server says."""

    class Refusing(Answering):
        def create(self, item: Object, *, dry_run: bool) -> Any:
            raise _refused(422, "spec.template: Invalid value", f"create {item} {dry_run}")

    found = _found(Refusing(Secret=None), secrets={"A": "s3/a"})
    assert found["secret s3"].state == "wrong"
    assert (found["dry run"].state, found["dry run"].code) == ("wrong", 78)
    assert "Invalid value" in found["dry run"].what


def test_nodes_that_come_or_go_refuse_nobody() -> None:
    """A new one has no GPU yet for minutes; one that the autoscaler takes away comes again."""
    new = _node("gpu-operator")
    del new["status"]["allocatable"]["nvidia.com/gpu"]
    pool = _found(Answering(Node=[new]))["node pool"]
    assert (pool.state, "device plugin" in pool.do) == ("warning", True)
    for key in ("ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"):
        going = _node("gpu-operator", taints=[{"key": key, "effect": "NoSchedule"}])
        assert _found(Answering(Node=[going]))["node pool"].state == "ok"


def _quota(hard: Object, **spec: Any) -> Object:
    return {"metadata": {"name": "q"}, "spec": spec, "status": {"hard": hard, "used": {}}}


def test_a_quota_of_other_pods_counts_nothing_here() -> None:
    """One with scopes; and one of a kind that no pod of ours states is told before it refuses."""
    other = _quota({"pods": "0"}, scopeSelector={"matchExpressions": []})
    assert _found(Answering(ResourceQuota=[other]))["quota"].state == "ok"
    assert _found(Answering(ResourceQuota=[_quota({"pods": "0"})]))["quota"].state == "wrong"

    job = parse(f"device: cuda\n{JOB}", JobConfig, where="job.yaml")
    settings = ClusterConfig.model_validate({"platform": "gke", "image": DIGEST})
    cluster: Any = Answering(ResourceQuota=[_quota({"limits.cpu": "64"})])
    items = list(objects(job, settings, run="run-1"))
    said = [one for one in run_checks(cluster, settings, job, items) if one.check == "quota"]
    assert any(one.state == "warning" and "LimitRange" in one.do for one in said)
