"""A real Kubernetes control plane on loopback: etcd, API server, controllers, scheduler.

``tests/cluster/build.sh`` builds the programs; ``KUBEBUILDER_ASSETS`` may name a folder with
etcd and kube-apiserver instead (without controllers, what needs them is skipped). Authorisation
is RBAC, Pod Security is enforced, and no kubelet runs: nodes are objects, and a pod's end is
written into its status by :meth:`ControlPlane.end_pod`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import urllib3
import yaml
from certificates import Authority
from processes import Server, free_ports

Object = dict[str, Any]
T = TypeVar("T")

ROOT = Path(__file__).parents[1]
MINORS = ("1.34", "1.37")
PATCH = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
    "strategic": "application/strategic-merge-patch+json",
}
ADMIN = "admin-of-the-tests"


class Refused(Exception):  # noqa: N818 - what the server said, not an error of ours
    """The API server's answer, where it is not 2xx."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def programs(minor: str) -> Path | None:
    """Return the folder of the control plane's programs, or None if they are not built."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folder = Path(assets) if assets else ROOT / ".tools/kubernetes" / minor
    return folder if (folder / "kube-apiserver").exists() else None


def etcd_program(folder: Path) -> Path:
    """Return etcd: the one beside the API server, or the one that was built."""
    beside = folder / "etcd"
    return beside if beside.exists() else ROOT / ".tools/bin/etcd"


class ControlPlane:
    """One control plane; several may run at once. Start it with :func:`control_plane`.

    Args:
        folder: Where data, certificates, kubeconfigs and logs go.
        minor: Kubernetes minor, such as ``1.34``.
        address: Where the API server listens beside loopback, for nodes.
    """

    def __init__(self, folder: Path, minor: str, *, address: str = "127.0.0.1") -> None:
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
        self._http = self._pool()
        self._etcd = self._etcd_server(peer)
        self._apiserver = self._api_server()
        self._others = [self._other(name) for name in self._other_names()]

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

    # HTTP

    def request(self, method: str, path: str, body: Any = None, *, kind: str = "json") -> Any:
        """Return the JSON answer, as admin; ``kind`` is the content type of a patch.

        Raises:
            Refused: the answer is not 2xx.
        """
        content = PATCH[kind] if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body)
        answer = self._http.request(
            method, self.server + path, body=data, headers={"Content-Type": content}
        )
        if answer.status >= 300:
            said = answer.json()
            raise Refused(answer.status, said.get("message", str(said)))
        return answer.json() if answer.headers.get("Content-Type", "").endswith("json") else None

    def get(self, path: str) -> Any:
        """Return what lies at ``path``."""
        return self.request("GET", path)

    def create(self, path: str, body: Object) -> Object:
        """Create ``body`` in the collection ``path``."""
        return self.request("POST", path, body)

    def patch(self, path: str, body: Any, kind: str = "merge") -> Object:
        """Patch what lies at ``path``."""
        return self.request("PATCH", path, body, kind=kind)

    def delete(self, path: str, *, now: bool = False) -> None:
        """Delete what lies at ``path``; ``now`` without grace, as no kubelet would end a pod."""
        body = {"propagationPolicy": "Background"} | ({"gracePeriodSeconds": 0} if now else {})
        self.request("DELETE", path, body)

    def wait(
        self,
        collection: str,
        condition: Callable[[list[Object]], T],
        *,
        selector: str = "",
        within_s: float = 60.0,
    ) -> T:
        """Return the first true value of ``condition`` of the collection's objects, by a watch.

        Raises:
            TimeoutError: it did not become true; with the objects as they are.
        """
        query = f"?labelSelector={selector}" if selector else "?"
        end = time.monotonic() + within_s
        objects: dict[str, Object] = {}
        for objects in self._changes(collection, query, end):
            value = condition(list(objects.values()))
            if value:
                return value
        shown = json.dumps([one.get("status", one) for one in objects.values()], indent=1)
        raise TimeoutError(f"{collection} after {within_s} s: {shown[:4000]}")

    def wait_for(
        self, path: str, condition: Callable[[Object], T], *, within_s: float = 60.0
    ) -> T:
        """Like :meth:`wait`, for the one object at ``path``."""
        collection, name = path.rsplit("/", 1)

        def of_one(objects: list[Object]) -> T | None:
            found = [one for one in objects if one["metadata"]["name"] == name]
            return condition(found[0]) if found else None

        value = self.wait(collection, of_one, within_s=within_s)
        assert value is not None
        return value

    # What tests need in the cluster

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

    def namespace(self, prefix: str = "test", *, pod_security: str = "restricted") -> str:
        """Create a namespace that enforces a Pod Security level, and return its name."""
        labels = {"pod-security.kubernetes.io/enforce": pod_security}
        metadata = {"generateName": f"{prefix}-", "labels": labels}
        name = self.create("/api/v1/namespaces", {"metadata": metadata})["metadata"]["name"]
        if self.has_controllers:
            self.wait(f"/api/v1/namespaces/{name}/serviceaccounts", bool)
        return name

    def user(
        self, namespace: str, rules: list[Object], name: str = "submitter", **where: Any
    ) -> Path:
        """Create a service account that may do ``rules`` in ``namespace`` and nothing else.

        Returns:
            The path of a kubeconfig with a token of that account.
        """
        core = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        self.create(core, {"metadata": {"name": name}})
        self.create(f"{rbac}/roles", {"metadata": {"name": name}, "rules": rules})
        self.bind(namespace, name, "Role", name)
        return self.kubeconfig(
            name, token=self.token(namespace, name), namespace=namespace, **where
        )

    def bind(self, namespace: str, account: str, kind: str, role: str) -> None:
        """Bind a Role (in ``namespace``) or a ClusterRole (everywhere) to a service account."""
        rbac = "/apis/rbac.authorization.k8s.io/v1"
        everywhere = kind == "ClusterRole"
        path = "clusterrolebindings" if everywhere else f"namespaces/{namespace}/rolebindings"
        group = "rbac.authorization.k8s.io"
        binding = {
            "metadata": {"name": f"{account}-{role}-{secrets.token_hex(3)}"},
            "roleRef": {"apiGroup": group, "kind": kind, "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
        }
        self.create(f"{rbac}/{path}", binding)

    def token(self, namespace: str, account: str) -> str:
        """Return a fresh token of a service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return self.create(path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]

    def add_node(
        self,
        name: str,
        *,
        gpus: int = 8,
        labels: dict[str, str] | None = None,
        taints: list[dict[str, str]] | None = None,
    ) -> None:
        """Add a node that is ready and has room, GPUs included, but runs nothing."""
        spec = {"taints": taints or []}
        metadata = {"name": name, "labels": {"kubernetes.io/hostname": name} | (labels or {})}
        self.create("/api/v1/nodes", {"metadata": metadata, "spec": spec})
        room = {
            "cpu": "96",
            "memory": "1Ti",
            "ephemeral-storage": "2Ti",
            "pods": "110",
            "nvidia.com/gpu": str(gpus),
        }
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": ""}
        status = {"capacity": room, "allocatable": room, "conditions": [ready]}
        path = f"/api/v1/nodes/{name}"
        self.patch(f"{path}/status", {"status": status}, kind="strategic")
        if self.has_controllers:  # the taint not-ready goes when the node controller has looked
            self.wait_for(path, lambda node: _taints(node) == {t["key"] for t in taints or []})

    def run_pod(self, namespace: str, name: str) -> None:
        """Write into a pod's status that its containers run."""
        pod = self.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
        state = {"running": {"startedAt": _now()}}
        status = {"phase": "Running", "startTime": _now(), "containerStatuses": []}
        status["containerStatuses"] = [_container(c, state, ready=True) for c in _containers(pod)]
        self._write_status(namespace, name, status)

    def end_pod(
        self,
        namespace: str,
        name: str,
        code: int,
        *,
        message: str = "",
        reason: str = "",
        disruption: str = "",
    ) -> None:
        """Write into a pod's status that every container ended with ``code``.

        Args:
            namespace: The pod's namespace.
            name: The pod's name.
            code: The containers' exit code.
            message: The termination message.
            reason: The container's reason, such as ``OOMKilled``; else by the code.
            disruption: Reason of a condition ``DisruptionTarget``, if there is to be one.
        """
        pod = self.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
        ended: Object = {
            "exitCode": code,
            "reason": reason or ("Error" if code else "Completed"),
            "message": message,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        status: Object = {"phase": "Failed" if code else "Succeeded", "startTime": _now()}
        status["containerStatuses"] = [
            _container(c, {"terminated": ended}, ready=False) for c in _containers(pod)
        ]
        if disruption:
            target = {"type": "DisruptionTarget", "status": "True", "reason": disruption}
            status["conditions"] = [target | {"lastTransitionTime": _now()}]
        self._write_status(namespace, name, status)

    def end_deleted_pods(self, namespace: str) -> None:
        """Let every pod go that is being deleted, as its kubelet would."""
        for pod in self.get(f"/api/v1/namespaces/{namespace}/pods")["items"]:
            if pod["metadata"].get("deletionTimestamp"):
                path = f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}"
                with contextlib.suppress(Refused):
                    self.delete(path, now=True)

    # Below the surface

    def _write_status(self, namespace: str, name: str, status: Object) -> None:
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/status"
        self.patch(path, {"status": status}, kind="strategic")

    def _changes(self, collection: str, query: str, end: float) -> Iterator[dict[str, Object]]:
        while time.monotonic() < end:
            listed = self.get(collection + query)
            objects = {one["metadata"]["uid"]: one for one in listed["items"]}
            yield objects
            version = listed["metadata"]["resourceVersion"]
            left = max(1, int(end - time.monotonic()))
            path = f"{collection}{query}&watch=1&resourceVersion={version}&timeoutSeconds={left}"
            for event in self._events(path, left):
                if event["type"] == "ERROR":
                    break
                uid = event["object"]["metadata"]["uid"]
                if event["type"] == "DELETED":
                    objects.pop(uid, None)
                else:
                    objects[uid] = event["object"]
                yield objects

    def _events(self, path: str, seconds: float) -> Iterator[Object]:
        answer = self._http.request(
            "GET", self.server + path, preload_content=False, timeout=seconds + 5
        )
        buffer = b""
        try:
            for chunk in answer.stream(65536, decode_content=True):
                *lines, buffer = (buffer + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines if line.strip())
        except urllib3.exceptions.HTTPError:
            return  # the server went away: the caller lists again
        finally:
            answer.close()

    def _pool(self) -> urllib3.PoolManager:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return urllib3.PoolManager(
            ssl_context=context, headers=headers, retries=False, timeout=30, maxsize=8
        )

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
def control_plane(
    folder: Path, minor: str, *, address: str = "127.0.0.1"
) -> Iterator[ControlPlane]:
    """Run a control plane, and stop it by its processes' ids whatever happens."""
    plane = ControlPlane(folder, minor, address=address)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _taints(node: Object) -> set[str]:
    return {taint["key"] for taint in node["spec"].get("taints", [])}


def _containers(pod: Object) -> list[Object]:
    return pod["spec"]["containers"]


def _container(container: Object, state: Object, *, ready: bool) -> Object:
    image = container["image"]
    return {
        "name": container["name"],
        "image": image,
        "imageID": image,
        "ready": ready,
        "restartCount": 0,
        "state": state,
    }
