"""Watches and waits over what real API servers and networks do to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane
from proxies import toxiproxy
from submitting import Person, person

from job.errors import JobError
from job.stop import Stop
from k8s.cluster import Cluster
from k8s.connect import connect
from k8s.control import wait
from k8s.refusals import CutError, GoneError
from k8s.watch import changes

Object = dict[str, Any]


def _connected(plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("KUBECONFIG", str(plane.admin))
    return connect(namespace=namespace)


def _config(plane: ControlPlane, namespace: str, name: str) -> None:
    plane.create(f"/api/v1/namespaces/{namespace}/configmaps", {"metadata": {"name": name}})


class Seen:
    """The names that a watch has shown, read by a thread of its own."""

    def __init__(self, cluster: Cluster) -> None:
        self._names: set[str] = set()
        self._changed = threading.Condition()
        self._cluster, self._stop = cluster, Stop()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        def quickly(_: float) -> None:
            self._stop.wait(0.2)

        try:
            for items in changes(self._cluster, "ConfigMap", wait=quickly, seconds=3):
                self._stop.check()
                with self._changed:
                    self._names |= {item["metadata"]["name"] for item in items}
                    self._changed.notify_all()
        except JobError:
            return

    def awaits(self, name: str) -> None:
        """Return when the watch has shown ``name``."""
        with self._changed:
            assert self._changed.wait_for(lambda: name in self._names, timeout=60), name


@contextmanager
def _seen(cluster: Cluster) -> Iterator[Seen]:
    from job.stop import preempted

    seen = Seen(cluster)
    seen._thread.start()
    try:
        yield seen
    finally:
        seen._stop.request(preempted("the test's end"))
        seen._thread.join(timeout=30)


def test_a_watch_goes_on_over_a_restart_of_the_api_server(
    plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was created while it was away, and after it, is seen."""
    with _seen(_connected(plane, namespace, monkeypatch)) as seen:
        _config(plane, namespace, "before")
        seen.awaits("before")
        plane.stop_apiserver()
        plane.start_apiserver()
        _config(plane, namespace, "after")
        seen.awaits("after")


def test_a_version_that_is_too_old_is_listed_anew(
    plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """410 is told by a watch from a version that etcd forgot; `changes` starts over by itself."""
    cluster = _connected(plane, namespace, monkeypatch)
    old = cluster.page("ConfigMap")["metadata"]["resourceVersion"]
    for number in range(3):
        _config(plane, namespace, f"gone-{number}")
    plane.compact()
    plane.stop_apiserver()  # its cache of events goes with it
    plane.start_apiserver()
    with pytest.raises(GoneError):
        list(cluster.watch("ConfigMap", resource_version=old, seconds=2))
    real, versions = Cluster.watch, [old]

    def from_an_old_version(self: Cluster, kind: str, **query: Any) -> Iterator[Object]:
        if versions:
            query["resource_version"] = versions.pop()
        return real(self, kind, **query)

    monkeypatch.setattr(Cluster, "watch", from_an_old_version)
    with _seen(cluster) as seen:
        seen.awaits("gone-2")
        _config(plane, namespace, "fresh")
        seen.awaits("fresh")
    assert not versions


def test_a_cut_connection_is_made_again(
    plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cut between, in the middle of an event, and while it is quiet."""
    with toxiproxy(tmp_path, api=plane.server.removeprefix("https://")) as proxies:
        proxy = proxies["api"]
        server = f"https://127.0.0.1:{proxy.port}"
        config = plane.kubeconfig("through", token="admin-of-the-tests", server=server)
        monkeypatch.setenv("KUBECONFIG", str(config))
        with _seen(connect(namespace=namespace)) as seen:
            _config(plane, namespace, "one")
            seen.awaits("one")
            proxy.cut()
            _config(plane, namespace, "two")
            proxy.mend()
            seen.awaits("two")
            with proxy.toxic("limit_data", bytes=3000):
                _config(plane, namespace, "three")
            seen.awaits("three")
        proxy.cut()
        with pytest.raises(CutError, match="can't be reached"):
            connect(namespace=namespace).page("ConfigMap")


def test_wait_gives_the_runs_own_code_though_the_server_restarts(
    controllers: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`wait` that began before a restart ends after it, with what the pod ended with."""
    me: Person = person(controllers, namespace, tmp_path, monkeypatch, capsys)
    run = me.submits()[1].strip()
    pods = f"/api/v1/namespaces/{namespace}/pods"
    (pod,) = controllers.wait(pods, lambda found: found)
    found: list[int] = []
    cluster = connect(namespace=namespace)
    waiter = threading.Thread(
        target=lambda: found.append(wait(cluster, run, store=None, stop=Stop()).code)
    )
    waiter.start()
    controllers.stop_apiserver()
    controllers.start_apiserver()
    controllers.end_pod(namespace, pod["metadata"]["name"], 66)
    waiter.join(timeout=60)
    assert found == [66]


def test_expired_credentials_and_a_missing_namespace(
    plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """77 and the mend; 66 for a namespace that is not there."""
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig("nobody", token="long-expired")))
    with pytest.raises(JobError, match="expired or refused; log in again") as caught:
        connect(namespace=namespace).page("Job")
    assert caught.value.code == 77
    monkeypatch.setenv("KUBECONFIG", str(plane.admin))
    with pytest.raises(JobError, match="there is no namespace nowhere") as caught:
        connect(namespace="nowhere").create(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
        )
    assert caught.value.code == 66
