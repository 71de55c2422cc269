"""A real Kubernetes control plane on loopback: etcd, API server, controllers, scheduler.

``tests/cluster/build.sh`` builds the programs; ``KUBEBUILDER_ASSETS`` may name a folder with
etcd and kube-apiserver instead (without controllers, what needs them is skipped). Authorisation
is RBAC, Pod Security is enforced, and no kubelet runs: nodes are objects, and a pod's end is
written into its status by :meth:`ControlPlane.end_pod`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
import yaml
from certificates import Authority
from clusterapi import Api, Object
from processes import Server, free_ports

ROOT = Path(__file__).parents[1]
# envtest's binaries, where they are given, are one more control plane of whatever version.
MINORS = ("assets",) if os.environ.get("KUBEBUILDER_ASSETS") else ("1.34", "1.37")
ADMIN = "admin-of-the-tests"


def programs(minor: str) -> Path | None:
    """Return the folder of the control plane's programs, or None if they are not built."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folder = Path(assets) if assets else ROOT / ".tools/kubernetes" / minor
    return folder if (folder / "kube-apiserver").exists() else None


def etcd_program(folder: Path) -> Path:
    """Return etcd: the one beside the API server, or the one that was built."""
    beside = folder / "etcd"
    return beside if beside.exists() else ROOT / ".tools/bin/etcd"


class ControlPlane(Api):
    """One control plane; several may run at once. Start it with :func:`control_plane`.

    Args:
        folder: Where data, certificates, kubeconfigs and logs go.
        minor: Kubernetes minor, such as ``1.34``.
        address: Where the API server listens; nodes need one that is not loopback.
        controllers: Whether Jobs become pods.
    """

    def __init__(
        self, folder: Path, minor: str, *, address: str = "127.0.0.1", controllers: bool = True
    ) -> None:
        found = programs(minor)
        if found is None:
            raise RuntimeError(f"Kubernetes {minor} is not built; run tests/cluster/build.sh")
        self.minor = minor
        self.address = address
        self.folder = folder
        self._programs = found
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(folder / "certificates")
        self._etcd_port, peer, self.port = free_ports(3)
        self.server = f"https://{address}:{self.port}"
        (folder / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        self.admin = self.kubeconfig("admin", token=ADMIN)
        super().__init__(self.server, self.authority.certificate, ADMIN)
        self._etcd = self._etcd_server(peer)
        self._apiserver = self._api_server()
        self._others = [self._other(name) for name in self._other_names() if controllers]

    # Processes

    @property
    def has_controllers(self) -> bool:
        """Whether Jobs become pods here."""
        return bool(self._others)

    def start(self) -> None:
        """Start everything; returns when a pod could be created."""
        self._etcd.start()
        self._apiserver.start()
        for server in self._others:
            server.start()
        self.await_ready()
        if self.has_controllers:
            self.wait("/api/v1/namespaces/default/serviceaccounts", bool)

    def await_ready(self) -> None:
        """Wait until the API server says that it is ready."""
        self._apiserver.ready(self._says_ready, within_s=120)

    def stop(self) -> None:
        """Stop everything, the API server last but one."""
        for server in [*self._others, self._apiserver, self._etcd]:
            server.stop()

    def stop_apiserver(self) -> None:
        """End the API server at once: open connections break."""
        self._apiserver.stop(number=9)

    def start_apiserver(self) -> None:
        """Start the API server again: same port, same data, and no memory of old versions."""
        self._apiserver.start()
        self.await_ready()

    def compact(self) -> None:
        """Forget etcd's history: a watch from an older version is answered with 410."""
        etcd = urllib3.PoolManager()
        base = f"http://127.0.0.1:{self._etcd_port}/v3/kv"
        answer = etcd.request("POST", f"{base}/range", json={"key": "AA=="})
        revision = answer.json()["header"]["revision"]
        body = {"revision": revision, "physical": True}
        assert etcd.request("POST", f"{base}/compaction", json=body).status == 200

    # Users

    def kubeconfig(
        self,
        user: str,
        *,
        token: str | None = None,
        pair: tuple[Path, Path] | None = None,
        namespace: str = "default",
        server: str | None = None,
    ) -> Path:
        """Write a kubeconfig with one context, named like the user, and return its path."""
        credentials: Object = {"token": token} if token else {}
        if pair:
            credentials = {"client-certificate": str(pair[0]), "client-key": str(pair[1])}
        cluster = {
            "server": server or self.server,
            "certificate-authority": str(self.authority.certificate),
        }
        context = {"cluster": "tests", "user": user, "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": user,
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": user, "context": context}],
        }
        stem = user.replace(":", "-")
        path = self.folder / f"{stem}-{secrets.token_hex(3)}.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path

    def user(
        self, namespace: str, rules: list[Object], name: str = "submitter", **where: Any
    ) -> Path:
        """Create an account that may do ``rules`` in ``namespace``; return its kubeconfig."""
        token = self.account(namespace, rules, name)
        return self.kubeconfig(name, token=token, namespace=namespace, **where)

    # Below the surface

    def _says_ready(self) -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return self._http.request("GET", f"{self.server}/readyz", timeout=2).status == 200
        return False

    def _etcd_server(self, peer: int) -> Server:
        client = f"http://127.0.0.1:{self._etcd_port}"
        peer_url = f"http://127.0.0.1:{peer}"
        command = [
            etcd_program(self._programs),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
            "--log-level=error",
        ]
        return Server(command, self.folder / "etcd.log")

    def _api_server(self) -> Server:
        serving = self.authority.server("kubernetes", sorted({"127.0.0.1", self.address}))
        kubelets = self.authority.client("apiserver", "system:masters")
        signing = self.authority.signing_key("service-accounts")
        command = [
            self._programs / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--secure-port={self.port}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/24",
            f"--cert-dir={self.folder}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={self.authority.certificate}",
            f"--kubelet-client-certificate={kubelets.certificate}",
            f"--kubelet-client-key={kubelets.key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={signing}",
            f"--service-account-signing-key-file={signing}",
            "--shutdown-delay-duration=0s",
            "--profiling=false",
        ]
        return Server(command, self.folder / "kube-apiserver.log")

    def _other_names(self) -> list[str]:
        names = ["kube-controller-manager", "kube-scheduler"]
        return [name for name in names if (self._programs / name).exists()]

    def _other(self, name: str) -> Server:
        command: list[str | Path] = [
            self._programs / name,
            f"--kubeconfig={self.admin}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]
        if name == "kube-controller-manager":
            folder = self.authority.folder
            command += [
                f"--service-account-private-key-file={folder / 'service-accounts.key'}",
                f"--root-ca-file={self.authority.certificate}",
                # Nodes of the tests' own have no kubelet that would renew a lease.
                *(["--node-monitor-grace-period=24h"] if self.address == "127.0.0.1" else []),
            ]
        return Server(command, self.folder / f"{name}.log")


@contextlib.contextmanager
def control_plane(folder: Path, minor: str, **options: Any) -> Iterator[ControlPlane]:
    """Run a control plane, and stop it by its processes' ids whatever happens."""
    plane = ControlPlane(folder, minor, **options)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()
