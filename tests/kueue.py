"""Kueue against a control plane: its manager on loopback, its own CRDs and webhooks.

``tests/cluster/build.sh kueue`` builds it and writes down what its release installs. Here no
kubelet mounts its certificate and no Service leads to it: the certificate is of the tests'
authority, and the API server calls the webhooks by their address.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
import yaml
from clusterapi import Refused
from controlplane import ROOT, ControlPlane
from processes import Server, free_ports

Object = dict[str, Any]

PROGRAM = ROOT / ".tools/bin/kueue"
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
HOOKS = "/apis/admissionregistration.k8s.io/v1/{}webhookconfigurations"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
SYSTEM = "kueue-system"
KINDS = ("clusterqueues", "cohorts", "localqueues", "resourceflavors", "workloads")


@contextlib.contextmanager
def kueue(plane: ControlPlane, folder: Path) -> Iterator[None]:
    """Install Kueue and run it; afterwards Jobs are admitted without it again."""
    hook_port, health = free_ports(2)
    installed = list(yaml.load_all(PROGRAM.with_suffix(".yaml").read_text(), yaml.CSafeLoader))
    _install(plane, installed)
    command = [
        PROGRAM,
        f"--kubeconfig={plane.admin}",
        f"--config={_config(folder, hook_port, health)}",
    ]
    pair = plane.authority.server("kueue", ["127.0.0.1"])
    for path, name in ((pair.certificate, "tls.crt"), (pair.key, "tls.key")):
        (folder / name).write_bytes(path.read_bytes())
    manager = Server(command, folder / "kueue.log").start()
    try:
        manager.ready(lambda: _ready(health) and _served(plane), within_s=120)
        with _webhooks(plane, installed, hook_port):
            yield
    finally:
        manager.stop()


def _install(plane: ControlPlane, installed: list[Object]) -> None:
    """Create the CRDs and what the manager looks for, once per control plane."""
    there = {it["metadata"]["name"] for it in plane.get(CRDS)["items"] or []}
    for item in installed:
        if item["kind"] == "CustomResourceDefinition" and item["metadata"]["name"] not in there:
            plane.create(CRDS, item)
            plane.wait_for(f"{CRDS}/{item['metadata']['name']}", _established)
    if not there:
        plane.create("/api/v1/namespaces", {"metadata": {"name": SYSTEM}})
        secret = {"metadata": {"name": "kueue-webhook-server-cert"}}
        plane.create(f"/api/v1/namespaces/{SYSTEM}/secrets", secret)


def _established(crd: Object) -> bool:
    found = crd.get("status", {}).get("conditions") or []
    return any(it["type"] == "Established" and it["status"] == "True" for it in found)


def _config(folder: Path, hook_port: int, health: int) -> Path:
    content = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": SYSTEM,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": hook_port, "certDir": str(folder)},
        "leaderElection": {"leaderElect": False},
        "integrations": {"frameworks": ["batch/job"]},
        "featureGates": {"VisibilityOnDemand": False},  # an API server of its own, on a fixed port
    }
    path = folder / "kueue-config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _ready(port: int) -> bool:
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        answer = urllib3.request("GET", f"http://127.0.0.1:{port}/readyz", retries=False, timeout=2)
        return answer.status == 200
    return False


def _served(plane: ControlPlane) -> bool:
    """Whether the API server has taken in Kueue's certificate: it serves nothing meanwhile."""
    with contextlib.suppress(Refused):
        return all(plane.get(f"{KUEUE}/{kind}") for kind in KINDS)
    return False


@contextlib.contextmanager
def _webhooks(plane: ControlPlane, installed: list[Object], port: int) -> Iterator[None]:
    """Let the API server ask Kueue about Jobs and about Kueue's own kinds."""
    paths = []
    try:
        for item in installed:
            kind = item["kind"].removesuffix("WebhookConfiguration").lower()
            if kind in ("mutating", "validating"):
                hooks = [_by_address(plane, it, port) for it in item["webhooks"] if _ours(it)]
                metadata = {"name": f"kueue-at-{port}"}
                plane.create(HOOKS.format(kind), {"metadata": metadata, "webhooks": hooks})
                paths.append(f"{HOOKS.format(kind)}/{metadata['name']}")
        yield
    finally:
        for path in paths:
            plane.delete(path)


def _ours(hook: Object) -> bool:
    groups = {group for rule in hook["rules"] for group in rule["apiGroups"]}
    return groups <= {"batch", "kueue.x-k8s.io"}


def _by_address(plane: ControlPlane, hook: Object, port: int) -> Object:
    authority = base64.b64encode(plane.authority.certificate.read_bytes()).decode()
    url = f"https://127.0.0.1:{port}{hook['clientConfig']['service']['path']}"
    return {**hook, "clientConfig": {"url": url, "caBundle": authority}}
