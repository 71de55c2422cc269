"""The verbs inside a cluster: no kubeconfig, only what a pod finds of its service account."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from controlplane import ControlPlane
from submitting import Person, person, rules

COMMAND = Path(sys.executable).with_name("lora-job")
# A mount namespace of its own, in which /var/run (a link to /run) holds what a kubelet mounts there.
MOUNTED = """
mount -t tmpfs none /run && mkdir -p /var/run/secrets/kubernetes.io &&
cp -r "$0" /var/run/secrets/kubernetes.io/serviceaccount && exec "$@"
"""


def _in_a_pod(
    plane: ControlPlane, namespace: str, token: str, folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run ``lora-job`` as a process of a pod would, with ``token`` mounted."""
    account = folder / "account"
    account.mkdir(exist_ok=True)
    (account / "token").write_text(token)
    (account / "namespace").write_text(namespace)
    (account / "ca.crt").write_bytes(plane.authority.certificate.read_bytes())
    kept = ("PATH", "LANG", "SSL_CERT_FILE")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    environment |= {"HOME": str(folder), "KUBERNETES_SERVICE_HOST": plane.address}
    environment |= {"KUBERNETES_SERVICE_PORT": str(plane.port), "AWS_EC2_METADATA_DISABLED": "true"}
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", MOUNTED, str(account)]
    return subprocess.run(
        [*inside, str(COMMAND), *words],
        check=False, capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip


def test_a_pod_with_the_ci_role_asks_for_its_own_namespace(
    controllers: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Address, token and namespace are the pod's; submit works too, and what it may not it is told."""
    me: Person = person(controllers, namespace, tmp_path, monkeypatch, capsys)
    run = me.submits()[1].strip()
    token = controllers.account(namespace, rules("ci"), "ci")

    listed = _in_a_pod(controllers, namespace, token, tmp_path, "list", "--output", "json")
    assert listed.returncode == 0, listed.stderr
    assert [one["name"] for one in json.loads(listed.stdout)] == [run]
    status = _in_a_pod(controllers, namespace, token, tmp_path, "status", run)
    assert status.returncode == 0, status.stderr
    assert run in status.stdout

    job, cluster = me.write()
    words = ("submit", job, "--cluster", cluster, "--no-data-checks", "--new")
    submitted = _in_a_pod(controllers, namespace, token, tmp_path, *words)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith(run)
    refused = _in_a_pod(controllers, namespace, token, tmp_path, "cancel", run)
    assert (refused.returncode, "may not patch jobs" in refused.stderr) == (77, True)


def test_a_token_that_is_not_accepted_is_77(controllers: ControlPlane, tmp_path: Path) -> None:
    """And one line."""
    done = _in_a_pod(controllers, "default", "old", tmp_path, "list")
    assert done.returncode == 77
    assert "expired or refused" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
