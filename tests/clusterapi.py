"""The API server as the tests' administrator sees it: plain HTTP, objects as dicts.

Independent of the client library that the program uses, so that a fault in one does not hide in
the other. Nodes can be objects without a kubelet, and a pod's end is written into its status.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import urllib3

Object = dict[str, Any]
T = TypeVar("T")

BATCH = "/apis/batch/v1/namespaces/{}"
PATCH = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
    "strategic": "application/strategic-merge-patch+json",
}


class Refused(Exception):  # noqa: N818 - what the server said, not an error of ours
    """The API server's answer, where it is not 2xx."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Api:
    """One API server, spoken to with a token that may do everything."""

    has_controllers = True

    def __init__(self, server: str, authority: Path, token: str) -> None:
        self.server = server
        self._nodes: list[str] = []
        self._http = urllib3.PoolManager(
            ssl_context=ssl.create_default_context(cafile=str(authority)),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            retries=False,
            timeout=30,
            maxsize=8,
        )

    def request(self, method: str, path: str, body: Any = None, *, kind: str = "json") -> Any:
        """Return the JSON answer, as admin; ``kind`` is the content type of a patch.

        Raises:
            Refused: the answer is not 2xx.
        """
        content = PATCH[kind] if method == "PATCH" else "application/json"
        answer = self._http.request(
            method,
            self.server + path,
            body=None if body is None else json.dumps(body),
            headers={**self._http.headers, "Content-Type": content},
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
        within_s: float = 120.0,
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
        self, path: str, condition: Callable[[Object], T], *, within_s: float = 120.0
    ) -> T:
        """Like :meth:`wait`, for the one object at ``path``."""
        collection, name = path.rsplit("/", 1)

        def of_one(objects: list[Object]) -> T | None:
            found = [one for one in objects if one["metadata"]["name"] == name]
            return condition(found[0]) if found else None

        value = self.wait(collection, of_one, within_s=within_s)
        assert value is not None
        return value

    def namespace(self, prefix: str = "test", *, pod_security: str = "restricted") -> str:
        """Create a namespace that enforces a Pod Security level, and return its name."""
        labels = {"pod-security.kubernetes.io/enforce": pod_security}
        metadata = {"generateName": f"{prefix}-", "labels": labels}
        name = self.create("/api/v1/namespaces", {"metadata": metadata})["metadata"]["name"]
        accounts = f"/api/v1/namespaces/{name}/serviceaccounts"
        if not self.has_controllers:
            self.create(accounts, {"metadata": {"name": "default"}})
        self.wait(accounts, bool)  # no pod is admitted before its service account is there
        return name

    def account(self, namespace: str, rules: list[Object], name: str = "submitter") -> str:
        """Create a service account that may do ``rules`` in ``namespace`` and nothing else.

        Returns:
            A token of that account.
        """
        core = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        self.create(core, {"metadata": {"name": name}})
        self.create(f"{rbac}/roles", {"metadata": {"name": name}, "rules": rules})
        self.bind(namespace, name, "Role", name)
        return self.token(namespace, name)

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
        self._nodes.append(name)
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

    def clear(self, namespace: str) -> None:
        """Delete what runs in ``namespace``, and all nodes that :meth:`add_node` added."""
        for collection in (f"{BATCH}/cronjobs", f"{BATCH}/jobs", "/api/v1/namespaces/{}/pods"):
            for item in self.get(collection.format(namespace))["items"]:
                path = f"{collection.format(namespace)}/{item['metadata']['name']}"
                with contextlib.suppress(Refused):
                    if item["metadata"].get("finalizers"):
                        self.patch(path, {"metadata": {"finalizers": None}})
                    self.delete(path, now=True)
        while self._nodes:
            with contextlib.suppress(Refused):
                self.delete(f"/api/v1/nodes/{self._nodes.pop()}")

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
