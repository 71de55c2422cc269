"""A thin API over the kubernetes client: plain dicts in and out, and errors that name the mend.

The client's typed models change with every release (37 is pydantic, 36.0.0 lost its token), and cost
a second for thousands of objects. Its kubeconfig, its authentication and its connection pool are
what we use; requests are made on the pool itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from k8s.refusals import CutError, GoneError, NotFoundError, raise_refusal
from k8s.render import Object, to_yaml

KINDS = {
    "Job": ("/apis/batch/v1", "jobs"),
    "CronJob": ("/apis/batch/v1", "cronjobs"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
    "Secret": ("/api/v1", "secrets"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "ResourceQuota": ("/api/v1", "resourcequotas"),
    "Workload": ("/apis/kueue.x-k8s.io/v1beta2", "workloads"),
    "LocalQueue": ("/apis/kueue.x-k8s.io/v1beta2", "localqueues"),
}
CLUSTER_KINDS = {
    "Namespace": ("/api/v1", "namespaces"),
    "Node": ("/api/v1", "nodes"),
    "PriorityClass": ("/apis/scheduling.k8s.io/v1", "priorityclasses"),
}
CONNECT_S, READ_S = 10.0, 60.0
PAGE = 500
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
MERGE_PATCH, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"


@dataclass(frozen=True, slots=True)
class Reply:
    """A decoded response, with the warnings that the server attached to it."""

    body: Object
    warnings: list[str]


class Cluster:
    """One namespace of one cluster."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._configuration = client.configuration
        self._pool = client.rest_client.pool_manager
        self.namespace = namespace
        self.host: str = client.configuration.host

    def get(self, kind: str, name: str) -> Object | None:
        """Return one object, or None."""
        try:
            return self._call("get", kind, name).body
        except NotFoundError:
            return None

    def page(self, kind: str, **query: Any) -> Object:
        """Return one page as the server sends it, with the resource version to watch from."""
        return self._call("list", kind, query=query).body

    def pages(
        self, kind: str, *, accept: str = "application/json", **query: Any
    ) -> Iterator[list[Object]]:
        """Yield the objects (or rows of a table) that the server selects, page by page."""
        token = ""
        while True:
            page = {"limit": PAGE, **query, **({"continue": token} if token else {})}
            body = self._call("list", kind, query=page, accept=accept).body
            yield body.get("items") or body.get("rows") or []
            token = body.get("metadata", {}).get("continue", "")
            if not token or "limit" in query:
                return

    def list(self, kind: str, **query: Any) -> list[Object]:
        """Return all objects that the server selects."""
        return [item for page in self.pages(kind, **query) for item in page]

    def create(self, item: Object, *, dry_run: bool = False) -> Reply:
        """Create an object, strictly: a field that the server does not know is an error.

        Raises:
            AlreadyExistsError: there is one of this name.
        """
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        body = to_yaml([item]).encode()
        return self._call(
            "create", item["kind"], body=body, query=query, content="application/yaml"
        )

    def patch(self, kind: str, name: str, change: Object, **query: Any) -> Object:
        """Merge ``change`` (RFC 7396) into an object.

        Raises:
            NotFoundError: it is not there.
        """
        body = json.dumps(change).encode()
        return self._call("patch", kind, name, body=body, query=query, content=MERGE_PATCH).body

    def replace(self, item: Object) -> Object:
        """Give an object that is there this spec, these labels and annotations, and no others.

        A merge would keep what is gone: the node labels of a platform that it was on before.
        """
        meta = item["metadata"]
        parts = {"/spec": item["spec"], "/metadata/labels": meta["labels"]}
        parts["/metadata/annotations"] = meta["annotations"]
        change = [{"op": "add", "path": path, "value": value} for path, value in parts.items()]
        body, name = json.dumps(change).encode(), meta["name"]
        query = {"fieldValidation": "Strict"}
        return self._call(
            "patch", item["kind"], name, body=body, query=query, content=JSON_PATCH
        ).body

    def delete(self, kind: str, name: str, *, propagation: str = "Background") -> bool:
        """Delete an object; return whether it was there."""
        try:
            self._call("delete", kind, name, query={"propagationPolicy": propagation})
        except NotFoundError:
            return False
        return True

    def watch(
        self, kind: str, *, resource_version: str, seconds: int = 300, **query: Any
    ) -> Iterator[Object]:
        """Yield changes until the server ends the watch.

        Raises:
            GoneError: list anew first.
            CutError: the connection broke.
        """
        query |= {"watch": "1", "resourceVersion": resource_version, "timeoutSeconds": seconds}
        for line in self._lines("watch", kind, query=query, read_s=seconds + 30.0):
            try:
                event = json.loads(line)
            except ValueError:
                raise CutError(
                    self.host, "the watch was cut"
                ) from None  # the cut came inside a line
            if event["type"] == "ERROR":
                code = event["object"].get("code")
                if code == 410:
                    raise GoneError
                raise CutError(self.host, str(event["object"].get("message")))
            yield event

    def log(self, pod: str, **query: Any) -> Iterator[bytes]:
        """Yield the lines of a pod's log, each with its newline (the last one perhaps without).

        Raises:
            NotFoundError: the pod is gone.
            CutError: the connection broke, or the container has not started.
        """
        # A quiet job is no broken connection: 90 s without a byte, then ask again from there.
        yield from self._lines("get", "Pod", pod, part="log", query=query, read_s=90.0)

    def _call(
        self,
        verb: str,
        kind: str,
        name: str = "",
        *,
        body: bytes | None = None,
        query: dict[str, Any] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> Reply:
        headers = {"Accept": accept, "Content-Type": content}
        with _cut_is_told(self.host):
            response = self._open(verb, kind, name, "", body, query or {}, headers, READ_S)
            data = response.data
        self._raise_for(response.status, data, verb, kind, name)
        warnings = response.headers.getlist("Warning")
        return Reply(json.loads(data), [text.split('"')[1] for text in warnings if '"' in text])

    def _lines(
        self,
        verb: str,
        kind: str,
        name: str = "",
        *,
        part: str = "",
        query: dict[str, Any],
        read_s: float,
    ) -> Iterator[bytes]:
        with _cut_is_told(self.host):
            response = self._open(verb, kind, name, part, None, query, {}, read_s)
        try:
            if response.status >= 400:
                self._raise_for(response.status, response.data, verb, kind, name, part)
            pending = b""
            chunks = response.stream(1 << 16, decode_content=True)
            while (chunk := self._next(chunks)) is not None:
                *lines, pending = (pending + chunk).split(b"\n")
                yield from (line + b"\n" for line in lines)
            if pending:
                yield pending
        finally:
            response.close()

    def _next(self, chunks: Iterator[bytes]) -> bytes | None:
        # Around each read alone: what the reader of our lines raises is not the network's.
        with _cut_is_told(self.host):
            return next(chunks, None)

    def _open(
        self,
        verb: str,
        kind: str,
        name: str,
        part: str,
        body: bytes | None,
        query: dict[str, Any],
        headers: dict[str, str],
        read_s: float,
    ) -> Any:
        import urllib3

        for setting in self._configuration.auth_settings().values():
            headers[setting["key"]] = setting["value"]
        method = {"create": "POST", "patch": "PATCH", "delete": "DELETE"}.get(verb, "GET")
        url = f"{self.host}{self._path(kind)}"
        url += "".join(f"/{it}" for it in (name, part) if it)
        again = urllib3.Retry(total=1, redirect=0, raise_on_status=False)
        return self._pool.request(
            method,
            f"{url}?{urlencode(query)}" if query else url,
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
            retries=again,
            preload_content=False,
        )

    def _path(self, kind: str) -> str:
        if kind in CLUSTER_KINDS:
            return "/".join(CLUSTER_KINDS[kind])
        group, resource = KINDS[kind]
        return f"{group}/namespaces/{self.namespace}/{resource}"

    def _raise_for(
        self, status: int, data: bytes, verb: str, kind: str, name: str, part: str = ""
    ) -> None:
        if status < 400:
            return
        try:
            said = json.loads(data)
        except ValueError:
            said = {}
        message = said.get("message") or data.decode(errors="replace")[:300]
        resource = (CLUSTER_KINDS | KINDS)[kind][1] + (f"/{part}" if part else "")
        where = f"{self.host}: {resource}" + (f"/{name}" if name else "")
        raise_refusal(
            status, said.get("reason"), message, f"{verb} {resource}", self.namespace, where
        )


@contextlib.contextmanager
def _cut_is_told(host: str) -> Iterator[None]:
    """Turn the ways in which a server can't be reached, or goes away, into a CutError."""
    import urllib3

    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise CutError(host, f"can't be reached: {str(reason).split(': ', 1)[-1]}") from error
