"""All that can be found out about a run, for :mod:`k8s.why` to explain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k8s.cluster import Cluster
from k8s.control import workload_of
from k8s.refusals import ForbiddenError, NotFoundError
from k8s.render import SELECTOR, Object
from k8s.runs import JOB_LABEL, Run, find, observe, seconds

MAX_PODS = 3
WAIT = "nothing to do: it starts by itself"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server and the store say about one run."""

    run: Run
    job: Object | None = None
    pods: list[Object] = field(default_factory=list)
    """The newest pods, newest first."""
    events: list[Object] = field(default_factory=list)
    """Events of the Job and of the newest pod, newest first."""
    workload: Object | None = None
    """Kueue's view of the Job."""
    cordoned: list[str] = field(default_factory=list)
    """Nodes that take no new pods; empty too where the Role may not look at nodes."""
    holders: list[str] = field(default_factory=list)
    """Other runs of this namespace whose pods have a node."""

    @property
    def pod(self) -> Object | None:
        """The newest pod."""
        return self.pods[0] if self.pods else None

    def said(self, *reasons: str, since: str | None = None) -> str | None:
        """Return the message of the newest event with one of these reasons, not older than that."""
        event = self.event(*reasons, since=since)
        return " ".join(str(event.get("message", "")).split()) if event else None

    def event(self, *reasons: str, since: str | None = None) -> Object | None:
        """Return that event."""
        for event in self.events:
            old = (seconds(_when(event)) or 0.0) < (seconds(since) or 0.0)
            if event.get("reason") in reasons and not old:
                return event
        return None


@dataclass(frozen=True, slots=True)
class Answer:
    """One cause. ``do`` is the mend."""

    cause: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}; {self.do}"


def gather(cluster: Cluster, name: str, *, store: str | None) -> Facts:
    """Ask for everything; what the Role may not see is left out.

    Raises:
        JobError: 66 if neither the cluster nor the store knows the run.
    """
    job, pods = seen = observe(cluster, name)
    run = find(cluster, name, store=store, now=time.time(), seen=seen)
    pods.sort(key=lambda pod: str(pod["metadata"]["creationTimestamp"]), reverse=True)
    pods = pods[:MAX_PODS]
    names = [name, *(pod["metadata"]["name"] for pod in pods[:1])] if job else []
    events: list[Object] = allowed(
        lambda: [it for name in names for it in _events(cluster, name)], []
    )
    return Facts(
        run,
        job,
        pods,
        sorted(events, key=_when, reverse=True),
        workload_of(cluster, job) if job else None,
        [] if run.is_over else allowed(lambda: _cordoned(cluster), []),
        [] if run.is_over else allowed(lambda: _holders(cluster, name), []),
    )


def allowed(ask: Callable[[], Any], otherwise: Any) -> Any:
    """Return what ``ask`` returns, or ``otherwise`` if the Role forbids it."""
    try:
        return ask()
    except (ForbiddenError, NotFoundError):
        return otherwise


def _events(cluster: Cluster, name: str) -> list[Object]:
    return cluster.list("Event", fieldSelector=f"involvedObject.name={name}")


def _when(event: Object) -> str:
    return str(
        (event.get("series") or {}).get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )


def _cordoned(cluster: Cluster) -> list[str]:
    nodes = cluster.list("Node", fieldSelector="spec.unschedulable=true")
    return [node["metadata"]["name"] for node in nodes]


def _holders(cluster: Cluster, name: str) -> list[str]:
    alive = "status.phase!=Succeeded,status.phase!=Failed"
    pods = cluster.list("Pod", labelSelector=SELECTOR, fieldSelector=alive)
    placed = [pod["metadata"] for pod in pods if pod["spec"].get("nodeName")]
    runs = {str(meta.get("labels", {}).get(JOB_LABEL)) for meta in placed}
    return sorted(runs - {name, "None"})
