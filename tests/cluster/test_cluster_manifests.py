"""The manifests, built by kustomize and by us, and put before real API servers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusterapi import Refused
from controlplane import ROOT, ControlPlane

from k8s.kustomize import MANIFESTS, build

OVERLAYS = sorted(path.parent for path in MANIFESTS.glob("overlays/*/*/kustomization.yaml"))
STRICT = "?dryRun=All&fieldValidation=Strict"
COLLECTIONS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "Namespace": "/api/v1/namespaces",
}


def _name(folder: Path) -> str:
    return str(folder.relative_to(MANIFESTS))


def _kustomize(folder: Path) -> list[dict[str, Any]]:
    program = ROOT / ".tools/bin/kustomize"
    if not program.exists():
        pytest.fail("kustomize is not built; run tests/cluster/build.sh kustomize")
    command = [str(program), "build", "--load-restrictor=LoadRestrictionsNone", str(folder)]
    built = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [one for one in yaml.safe_load_all(built) if one]


def _by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def _admit(plane: ControlPlane, namespace: str, item: dict[str, Any]) -> None:
    metadata = {**item["metadata"]}
    if "namespace" in metadata:
        metadata["namespace"] = namespace
    path = COLLECTIONS[item["kind"]].format(namespace)
    plane.create(path + STRICT, {**item, "metadata": metadata})


def _pod(job: dict[str, Any]) -> dict[str, Any]:
    """Return the pod that a Job's template makes, the Job controller's labels included."""
    template = job["spec"]["template"]
    labels = {"batch.kubernetes.io/job-name": "x", "batch.kubernetes.io/controller-uid": "y"}
    metadata = {"generateName": "x-", "labels": {**template["metadata"]["labels"], **labels}}
    return {"metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("folder", [*OVERLAYS, MANIFESTS / "base"], ids=_name)
def test_our_kustomize_builds_what_kustomize_builds(folder: Path) -> None:
    """`kubectl apply -k` and the submitter start from equal objects, for every platform."""
    assert _by_name(build(folder)) == _by_name(_kustomize(folder))


@pytest.mark.parametrize("folder", OVERLAYS, ids=_name)
def test_a_restricted_namespace_admits_each_overlay(
    plane: ControlPlane, namespace: str, folder: Path
) -> None:
    """Strict validation knows every field, and Pod Security restricted admits the Job's pod."""
    objects = build(folder)
    for item in objects:
        _admit(plane, namespace, item)
    job = next(item for item in objects if item["kind"] == "Job")
    plane.create(f"/api/v1/namespaces/{namespace}/pods{STRICT}", _pod(job))


def test_the_admission_check_would_see_a_fault(plane: ControlPlane, namespace: str) -> None:
    """A misspelt field and a pod that may gain privileges are refused: the tests above bite."""
    job = next(item for item in build(OVERLAYS[0]) if item["kind"] == "Job")
    misspelt = {**job, "spec": {**job["spec"], "backofLimit": 1}}
    with pytest.raises(Refused, match="unknown field"):
        _admit(plane, namespace, misspelt)
    pod = _pod(job)
    pod["spec"] = {**pod["spec"], "securityContext": {}}
    with pytest.raises(Refused, match=r"violates PodSecurity .restricted"):
        plane.create(f"/api/v1/namespaces/{namespace}/pods{STRICT}", pod)


@pytest.mark.parametrize("folder", ["setup", "setup/look", "network"])
def test_set_up_manifests_are_admitted(plane: ControlPlane, namespace: str, folder: str) -> None:
    """Namespace, Roles, ClusterRoles and the NetworkPolicy pass strict validation."""
    for item in _kustomize(MANIFESTS / folder):
        _admit(plane, namespace, item)


def test_a_job_without_python_by_kustomize_alone(
    plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """The kustomization of the base's comment makes a run of its own name, image and job file."""
    overlay = shutil.copytree(MANIFESTS, tmp_path / "manifests") / "overlays/gke/on-demand"
    mine = tmp_path / "mine"
    mine.mkdir()
    digest = f"sha256:{'0' * 64}"
    image = {"name": "lora-job", "newName": "registry.example/lora-job", "digest": digest}
    patch = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "lora-job"},
        "data": {"job.yaml": "name: mine\n"},
    }
    (mine / "job-file.yaml").write_text(yaml.safe_dump(patch))
    kustomization = {
        "resources": [str(Path("..") / overlay.relative_to(tmp_path))],
        "nameSuffix": "-first",
        "images": [image],
        "patches": [{"path": "job-file.yaml"}],
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    objects = _by_name(_kustomize(mine))
    job, config = objects["Job", "lora-job-first"], objects["ConfigMap", "lora-job-first"]
    pod = job["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["job-file"]["configMap"]["name"] == "lora-job-first"
    assert pod["containers"][0]["image"] == f"registry.example/lora-job@{digest}"
    assert config["data"] == {"job.yaml": "name: mine\n"}
    for item in (config, job):
        _admit(plane, namespace, item)
