"""A thin API over the kubernetes client: plain dicts in and out, and errors that name the mend.

The client's typed models change with every release (37 is pydantic, 36.0.0 lost its token), and cost
a second for thousands of objects. Its kubeconfig, its authentication and its connection pool are
what we use; requests are made on the pool itself.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

from pydantic import AliasPath, Field, TypeAdapter

from k8s import refusals
from k8s.refusals import CutError, GoneError, NotFoundError, cut_is_told
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
METADATA = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
MERGE_PATCH, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"


@dataclass(frozen=True, slots=True)
class Reply:
    """A decoded response, with the warnings that the server attached to it."""

    body: Any
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class _Born:
    created: Annotated[str, Field(validation_alias=AliasPath("metadata", "creationTimestamp"))]
    name: Annotated[str, Field(validation_alias=AliasPath("metadata", "name"))]


@dataclass(frozen=True, slots=True)
class _Page:
    metadata: Object
    items: list[_Born] | None


_PAGE = TypeAdapter(_Page)


def _births(data: bytes) -> Object:
    """Return a list's body with (time, name) for items.

    Nine tenths of an object's metadata say who set which field: this parser makes no objects of it.
    """
    page = _PAGE.validate_json(data)
    born = [(it.created, it.name) for it in page.items or []]
    return {"metadata": page.metadata, "items": born}


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

    def newest(self, kind: str, count: int, **query: Any) -> list[str]:
        """Return the names of the newest objects that the server selects, newest first.

        The server can't sort, and thousands of whole objects would be tens of megabytes: it is
        asked for their metadata.
        """
        born = self._items(kind, query, accept=METADATA, decode=_births)
        return [name for _, name in heapq.nlargest(count, born)]

    def list(self, kind: str, **query: Any) -> list[Object]:
        """Return all objects that the server selects."""
        return list(self._items(kind, query))

    def _items(self, kind: str, query: dict[str, Any], **how: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = {"limit": PAGE, "continue": token, **query}
            body = self._call("list", kind, query=page, **how).body
            yield from body["items"] or []
            token = body["metadata"].get("continue", "")
            if not token or "limit" in query:
                return

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
                # The cut came inside a line.
                raise CutError(self.host, "the watch was cut") from None
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
        decode: Callable[[bytes], Any] = json.loads,
    ) -> Reply:
        headers = {"Accept": accept, "Accept-Encoding": "gzip", "Content-Type": content}
        with cut_is_told(self.host):
            response = self._open(verb, kind, name, "", body, query or {}, headers, READ_S)
            data = response.data
        self._raise_for(response.status, data, verb, kind, name)
        return Reply(decode(data), refusals.warnings_in(response.headers.getlist("Warning")))

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
        with cut_is_told(self.host):
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
        with cut_is_told(self.host):
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

        refusals.require_name(name)
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
        refusals.raise_refusal(
            status, said.get("reason"), message, f"{verb} {resource}", self.namespace, where
        )
