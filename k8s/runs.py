"""A run as a person sees it, put together from its Job, its pods, their last words and the store."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from job.errors import ExitCode, JobError, name_of
from k8s.cluster import Cluster
from k8s.refusals import ForbiddenError
from k8s.render import JOB_NAME, PRICE, QUEUE, SELECTOR, SINGLE_WRITER, STORE, Object
from k8s.stored import Stored, read_run

JOB_LABEL = "batch.kubernetes.io/job-name"
UNKNOWN_END = 1

Seen = tuple[Object | None, list[Object]]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One pod of a run."""

    pod: str
    phase: str
    created: float
    started: float | None = None
    ended: float | None = None
    code: int | None = None
    reason: str = ""
    """The kubelet's or the scheduler's word: OOMKilled, Evicted, PreemptionByScheduler."""
    word: dict[str, Any] = field(default_factory=dict)
    """The job's own last words (exit.json), or ``{"what": the end of its log}``."""
    node: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Times are seconds since 1970."""

    name: str
    state: str
    """pending, queued, running, lost, suspended, ending, succeeded, failed, or unknown."""
    job_name: str = ""
    namespace: str = ""
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    gpus: int = 0
    price: float | None = None
    store: str | None = None
    attempts: tuple[Attempt, ...] = ()
    number: int = 0
    """The attempt that runs, or ran last: its epoch in the store, else how many pods there were."""
    progress: dict[str, Any] = field(default_factory=dict)
    checkpoint: int | None = None
    last_end: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    gpu_hours: float = 0.0
    note: str = ""

    @property
    def is_over(self) -> bool:
        """Whether no attempt will follow."""
        return self.state in ("succeeded", "failed")

    @property
    def cost(self) -> float | None:
        """GPU-hours times the price, if there is one."""
        return None if self.price is None else round(self.gpu_hours * self.price, 2)

    @property
    def code(self) -> int:
        """The run's own exit code: 0, or that of its last attempt, or 1 if it left no word."""
        if self.state == "succeeded":
            return int(ExitCode.VERIFIED)
        code = (self.last_end or {}).get("code")
        return int(code) if code else UNKNOWN_END

    def as_json(self) -> dict[str, Any]:
        """Return the run as programs read it."""
        return {**asdict(self), "cost": self.cost, "code": self.code if self.is_over else None}


def seconds(stamp: str | None) -> float | None:
    """Return an RFC 3339 time as seconds since 1970."""
    return datetime.fromisoformat(stamp).timestamp() if stamp else None


def condition(item: Object, kind: str) -> Object | None:
    """Return an object's condition of this type if its status is True."""
    for one in item.get("status", {}).get("conditions") or []:
        if one["type"] == kind and one["status"] == "True":
            return one
    return None


def container(pod: Object) -> Object:
    """Return the status of the pod's ``job`` container, or an empty dict before there is one."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((it for it in statuses if it["name"] == "job"), {})


def attempt_of(pod: Object) -> Attempt:
    """Return what a pod says about its attempt."""
    state = container(pod).get("state", {})
    ended = state.get("terminated", {})
    disrupted = condition(pod, "DisruptionTarget") or {}
    reason = disrupted.get("reason") or pod["status"].get("reason") or ended.get("reason", "")
    return Attempt(
        pod=pod["metadata"]["name"],
        phase=pod["status"].get("phase", "Unknown"),
        created=seconds(pod["metadata"]["creationTimestamp"]) or 0.0,
        started=seconds(ended.get("startedAt") or state.get("running", {}).get("startedAt")),
        ended=seconds(ended.get("finishedAt")),
        code=ended.get("exitCode"),
        reason="" if reason == "Completed" else reason,
        word=_word(ended.get("message", "")),
        node=pod.get("spec", {}).get("nodeName", ""),
    )


def _word(message: str) -> dict[str, Any]:
    try:
        word = json.loads(message)
    except ValueError:
        word = None
    if isinstance(word, dict) and "code" in word:
        return word
    lines = message.strip().splitlines()
    return {"what": lines[-1][-300:]} if lines else {}


def state_of(job: Object, pods: Iterable[Object]) -> str:
    """Return the state that a Job and its pods are in."""
    if condition(job, "Complete"):
        return "succeeded"
    if condition(job, "Failed"):
        return "failed"
    if job["metadata"].get("deletionTimestamp"):
        return "ending"
    if job["spec"].get("suspend"):
        return "queued" if QUEUE in job["metadata"].get("labels", {}) else "suspended"
    lost = [is_lost(pod) for pod in pods if "running" in container(pod).get("state", {})]
    if not lost:
        return "pending"
    return "lost" if all(lost) else "running"


def is_lost(pod: Object) -> bool:
    """Return whether the control plane wrote the pod off, which its silent node calls running."""
    conditions = pod["status"].get("conditions") or []
    unready = any(one["type"] == "Ready" and one["status"] == "False" for one in conditions)
    return unready and "running" in container(pod).get("state", {})


def gpus_of(job: Object) -> int:
    """Return how many GPUs a pod of this Job asks for."""
    first = job["spec"]["template"]["spec"]["containers"][0]
    return int((first.get("resources", {}).get("limits") or {}).get("nvidia.com/gpu", 0))


def assemble(
    name: str, job: Object | None, pods: list[Object], stored: Stored, *, now: float
) -> Run:
    """Put a run together from what is there of it: any of Job, pods and store may be gone."""
    attempts = tuple(sorted((attempt_of(pod) for pod in pods), key=lambda it: it.created))
    head = stored.head
    meta = job["metadata"] if job else {}
    notes = meta.get("annotations") or {}
    gpus = gpus_of(job) if job else 0
    finished = attempts[-1] if attempts and attempts[-1].ended else None
    started = [it.started for it in attempts if it.started]
    return Run(
        name=name,
        state=state_of(job, pods) if job else _state_without_job(head, now),
        job_name=meta.get("labels", {}).get(JOB_NAME, ""),
        namespace=meta.get("namespace", ""),
        created=seconds(meta.get("creationTimestamp")) or head.get("started"),
        started=head.get("started") or min(started, default=None),
        ended=_ended(job, stored),
        gpus=gpus,
        price=float(notes[PRICE]) if PRICE in notes else None,
        store=notes.get(STORE),
        attempts=attempts,
        number=int(head.get("epoch") or len(attempts)),
        progress=dict(head.get("progress") or (finished.word if finished else {})),
        checkpoint=(head.get("checkpoint") or {}).get("step"),
        last_end=_last_end(attempts, stored),
        receipt=stored.receipt or (finished.word.get("receipt") if finished else None),
        gpu_hours=_gpu_hours(attempts, stored, gpus, now),
    )


def _state_without_job(head: dict[str, Any], now: float) -> str:
    state = str(head.get("state", ""))
    if state.startswith("published"):
        return "succeeded"
    if state == "ended":
        return "failed"
    return "running" if now - float(head.get("heartbeat", 0)) < 300 else "unknown"


def _ended(job: Object | None, stored: Stored) -> float | None:
    if job is None:
        return seconds(stored.exits[-1].get("ended")) if stored.exits else None
    end = condition(job, "Complete") or condition(job, "Failed")
    return seconds(end["lastTransitionTime"]) if end else None


def _last_end(attempts: tuple[Attempt, ...], stored: Stored) -> dict[str, Any] | None:
    """Return how the last attempt that ended did: its own words, else what the kubelet saw."""
    over = [it for it in attempts if it.ended is not None]
    told = stored.last_end
    if not over:
        return told
    last = over[-1]
    if last.word.get("code") is not None:
        return last.word
    # The store's word belongs to this pod only if it was written in the pod's time.
    if told and last.started and (seconds(told.get("ended")) or 0.0) >= last.started:
        return told
    what = last.word.get("what") or last.reason or "ended without a word"
    return {"code": last.code, "name": name_of(last.code or 0), "what": what, "reason": last.reason}


def _gpu_hours(attempts: tuple[Attempt, ...], stored: Stored, gpus: int, now: float) -> float:
    """Return GPU-hours of all attempts: those that the store knows, and pods after the last one."""
    spans = [(seconds(it.get("started")), seconds(it.get("ended"))) for it in stored.exits]
    known_until = max((end or 0.0 for _, end in spans), default=0.0)
    spans += [
        (it.started, it.ended or now) for it in attempts if (it.ended or now) > known_until + 5.0
    ]
    total = sum(end - begin for begin, end in spans if begin and end)
    return round(gpus * total / 3600.0, 3)


def observe(cluster: Cluster, name: str) -> Seen:
    """Return a run's Job, if it is there, and its pods."""
    job = cluster.get("Job", name)
    pods = cluster.list("Pod", labelSelector=f"{JOB_LABEL}={name}") if job else []
    return job, pods


def find(
    cluster: Cluster, name: str, *, store: str | None, now: float, seen: Seen | None = None
) -> Run:
    """Return the run ``name``; the store is that of its Job, or ``store`` once the Job is gone.

    Raises:
        JobError: 66 if neither the cluster nor the store knows it.
    """
    job, pods = seen or observe(cluster, name)
    annotations = (job or {}).get("metadata", {}).get("annotations") or {}
    uri = annotations.get(STORE) or store
    stored, note = Stored(), ""
    if uri:
        try:
            stored = read_run(uri, name, single_writer=SINGLE_WRITER in annotations)
        except (JobError, ModuleNotFoundError) as error:
            if job is None:
                raise
            note = f"the store was not read: {error}"
    if job is None and not stored.head:
        raise missing(cluster, name, looked_in_store=uri is not None)
    return replace(assemble(name, job, pods, stored, now=now), note=note, store=uri)


def missing(cluster: Cluster, name: str, *, looked_in_store: bool = False) -> JobError:
    """Return the error for a run that is not there, with the names that are near."""
    import difflib

    with contextlib.suppress(ForbiddenError):
        require_namespace(cluster)
    rows = cluster.list("Job", labelSelector=SELECTOR, limit=500)
    near = difflib.get_close_matches(name, [row["metadata"]["name"] for row in rows], n=3)
    do = f"did you mean {', '.join(near)}?" if near else "see `lora-job list`"
    if not looked_in_store:
        do += "; if its Job was cleaned up, name its store with --store"
    where = f"{cluster.namespace}/{name}"
    return JobError(ExitCode.NOT_FOUND, where, "there is no such run", do)


def require_namespace(cluster: Cluster) -> Object:
    """Return the namespace itself: to ask for what is in one that is not there is no error.

    Raises:
        JobError: 66.
    """
    namespace = cluster.get("Namespace", cluster.namespace)
    if namespace is None:
        do = "create it: kubectl apply -k k8s/manifests/setup, or name another one"
        where = f"{cluster.host}: {cluster.namespace}"
        raise JobError(ExitCode.NOT_FOUND, where, "there is no such namespace", do)
    return namespace
