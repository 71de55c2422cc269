"""What submit sends: one golden a platform, the exit-code table, and no secret in any of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import JobConfig, parse
from job.errors import TABLE
from k8s.config import ClusterConfig
from k8s.kustomize import MANIFESTS, build, merge
from k8s.render import cron_objects, objects, pod_failure_policy, run_name, to_yaml

RENDERED = Path(__file__).parent / "rendered"
DIGEST = f"registry.example/lora-job@sha256:{'a' * 64}"
CANARY = "canary-3c1f9a-never-in-a-manifest"
PLATFORMS = ["gke", "eks-karpenter", "eks-managed", "aks", "gpu-operator"]
JOB = """
name: multilingual-reasoner
device: cuda
store: s3://models/adapters
model: {source: "hf://openai/gpt-oss-20b@main"}
data: {source: "hf://HuggingFaceH4/Multilingual-Thinking"}
publish: {channel: nightly}
"""


def _job() -> JobConfig:
    return parse(JOB, JobConfig, where="job.yaml")


def _cluster(platform: str, **more: Any) -> ClusterConfig:
    raw = {
        "platform": platform,
        "image": DIGEST,
        "memory": "192Gi",
        "ephemeral_storage": "300Gi",
        "service_account": "trainer",
        "secrets": {"HF_TOKEN": "hub/token", "AWS_SECRET_ACCESS_KEY": "s3/secret-key"},
        "env": {"AWS_ENDPOINT_URL": "https://s3.example"},
        "queue": "gpus",
        "queue_priority": "nightly",
        "cache": {"claim": "weights"},
        "price_per_gpu_hour": 2.5,
        **more,
    }
    return ClusterConfig.model_validate(raw)


def _rendered(platform: str) -> str:
    """Return a run on-demand and a schedule on spot: what both share is rendered alike."""
    job, spot = _job(), _cluster(platform, capacity="spot")
    cron = cron_objects(
        job, spot, cron="0 2 * * *", time_zone="Europe/Berlin", start_deadline_s=3600
    )
    return to_yaml([*objects(job, _cluster(platform), run=run_name(job)), cron[1]])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_rendered_objects_are_the_reviewed_ones(platform: str) -> None:
    """What a change does to every platform is seen in review; UPDATE_RENDERED=1 rewrites."""
    text = _rendered(platform)
    golden = RENDERED / f"{platform}.yaml"
    if os.environ.get("UPDATE_RENDERED"):
        golden.write_text(text)
    assert text == golden.read_text(), "see the diff; UPDATE_RENDERED=1 accepts it"


def test_merge_is_strategic() -> None:
    """Maps merge, null deletes, lists with a key merge by it, all other lists are replaced."""
    base = {"a": {"x": 1, "y": 2}, "env": [{"name": "A", "value": "1"}], "args": [1, 2]}
    patch = {"a": {"x": None, "z": 3}, "env": [{"name": "B"}, {"name": "A", "value": "2"}]}
    merged = merge(base, {**patch, "args": [3]})
    assert merged["a"] == {"y": 2, "z": 3}
    assert merged["env"] == [{"name": "A", "value": "2"}, {"name": "B"}]
    assert merged["args"] == [3]
    assert base["a"] == {"x": 1, "y": 2}


def test_the_manifest_holds_the_exit_code_table() -> None:
    """The plain manifest, that needs no Python, has the policy that the table renders to."""
    job = next(item for item in build(MANIFESTS / "base") if item["kind"] == "Job")
    assert job["spec"]["podFailurePolicy"] == pod_failure_policy()


def test_every_code_of_the_table_is_in_the_policy_once_disruptions_first() -> None:
    """DisruptionTarget with status "True" is the first rule; codes do what their row says."""
    first, *rules = pod_failure_policy()["rules"]
    assert first == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    named = {"fail": ["FailJob"], "ignore": ["Ignore"]}
    for code, row in TABLE.items():
        actions = [
            rule["action"]
            for rule in rules
            if rule["onExitCodes"]["operator"] == "In"
            and int(code) in rule["onExitCodes"]["values"]
        ]
        assert actions == named.get(row.action, [])


def test_the_pod_keeps_the_rules_of_the_house() -> None:
    """Restricted, read-only root, no token, exec form, its own identity, words that survive."""
    _, job = objects(_job(), _cluster("gke"), run="run-1")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["command"][0] == "python"
    assert container["args"] == ["--cache-dir", "/cache"]
    assert container["terminationMessagePath"] == "/dev/termination-log"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/work", "/home/job", "/tmp", "/dev/shm"} <= mounts
    assert "livenessProbe" not in container
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert job["spec"]["backoffLimit"] == 6
    assert "activeDeadlineSeconds" not in job["spec"]


def test_no_secret_value_reaches_a_rendered_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not from the environment, not from a kubeconfig: only references to Secrets are rendered."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    config = tmp_path / "kubeconfig"
    config.write_text(json.dumps({"users": [{"name": "me", "user": {"token": CANARY}}]}))
    monkeypatch.setenv("KUBECONFIG", str(config))
    for platform in PLATFORMS:
        text = _rendered(platform)
        assert CANARY not in text
        environment = [
            env
            for item in yaml.safe_load_all(text)
            for env in _environment(item)
            if env["name"] in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
        ]
        assert len(environment) == 4
        assert all(set(env) == {"name", "valueFrom"} for env in environment)


def _environment(item: dict[str, Any]) -> list[dict[str, Any]]:
    if item["kind"] == "ConfigMap":
        return []
    spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
    return list(spec["template"]["spec"]["containers"][0]["env"])


def test_without_gpus_none_is_asked_for() -> None:
    """gpus: 0 leaves no nvidia.com/gpu behind, a null in node_selector drops a label."""
    cluster = _cluster("gke", gpus=0, node_selector={"cloud.google.com/gke-accelerator": None})
    _, job = objects(_job(), cluster, run="run-1")
    pod = job["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in str(pod["containers"][0]["resources"])
    assert not pod["nodeSelector"]


def test_the_job_file_in_the_pod_is_the_same_run() -> None:
    """The pod reads exactly the job that was submitted: same meaning, same run id."""
    config, _ = objects(_job(), _cluster("gke"), run="run-1")
    again = parse(config["data"]["job.yaml"], JobConfig, where="pod")
    assert again == _job()
    assert again.run_name == run_name(_job())


def test_names_stay_within_kubernetes_limits() -> None:
    """The longest job name leaves room for the digest, --new, a night's minutes, a pod's suffix."""
    name = "a" * 40
    job = parse(JOB.replace("multilingual-reasoner", name), JobConfig, where="job.yaml")
    assert len(run_name(job, new="x")) + 6 <= 63
    _, cron = cron_objects(
        job, _cluster("gke"), cron="0 2 * * *", time_zone="Etc/UTC", start_deadline_s=60
    )
    assert len(cron["metadata"]["name"]) <= 52
