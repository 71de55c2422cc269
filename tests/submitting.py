"""A person at a cluster: job and cluster files, a kubeconfig with the submitter's Role, the verbs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane import ControlPlane

from k8s import cli
from k8s.kustomize import MANIFESTS

Object = dict[str, Any]

DIGEST = f"registry.example/lora-job@sha256:{'a' * 64}"
JOB = """
name: night
device: cuda
store: s3://models/adapters
model: {source: "hf://Qwen/Qwen3-0.6B@main"}
data: {source: "hf://HuggingFaceH4/Multilingual-Thinking"}
"""


def rules(name: str) -> list[Object]:
    """Return the rules of a Role in k8s/manifests/setup."""
    role = yaml.safe_load((MANIFESTS / "setup" / f"{name}.yaml").read_text())
    return role["rules"]  # type: ignore[no-any-return]


@dataclass
class Person:
    """Somebody who types `lora-job` into a shell."""

    folder: Path
    namespace: str
    capsys: pytest.CaptureFixture[str]

    def write(self, *, job: str = JOB, **cluster: Any) -> tuple[str, str]:
        """Write the two files and return their paths."""
        settings = {
            "platform": "gpu-operator",
            "image": DIGEST,
            "namespace": self.namespace,
            "memory": "8Gi",
            "cpu": "1",
            "ephemeral_storage": "1Gi",
            **cluster,
        }
        job_path, cluster_path = self.folder / "job.yaml", self.folder / "cluster.yaml"
        job_path.write_text(job)
        cluster_path.write_text(yaml.safe_dump(settings))
        return str(job_path), str(cluster_path)

    def types(self, *words: str) -> tuple[int, str, str]:
        """Run a verb; return its exit code, stdout and stderr."""
        self.capsys.readouterr()
        code = cli.main(list(words))
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def submits(self, *more: str, job: str = JOB, **cluster: Any) -> tuple[int, str, str]:
        """Submit without data checks."""
        job_path, cluster_path = self.write(job=job, **cluster)
        return self.types("submit", job_path, "--cluster", cluster_path, "--no-data-checks", *more)


def person(
    plane: ControlPlane,
    namespace: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    role: str = "submitter",
    **where: Any,
) -> Person:
    """Return a person who has one of our Roles and nothing else."""
    config = plane.user(namespace, rules(role), name=role, **where)
    monkeypatch.setenv("KUBECONFIG", str(config))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("COLUMNS", "200")
    return Person(folder, namespace, capsys)
