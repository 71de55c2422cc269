"""What the cluster can be asked before it is given work: ok, wrong, or not allowed to look."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from job.config import JobConfig
from job.errors import ExitCode, JobError
from k8s.cluster import CLUSTER_KINDS, Cluster
from k8s.config import ClusterConfig
from k8s.inputs import CLAIM
from k8s.nodes import refusal
from k8s.refusals import CutError, ForbiddenError, NotFoundError
from k8s.render import Object
from k8s.runs import require_namespace

GPU = "nvidia.com/gpu"
SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "K": 1e3}
SUFFIXES |= {letter: 1000.0**power for power, letter in enumerate("MGTPE", start=2)}
SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)}


State = Literal["ok", "warning", "wrong", "not allowed to look"]
Check = tuple[str, Callable[[], Iterator["Finding"]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    state: State
    what: str
    do: str = ""
    code: ExitCode | None = None
    """What submit ends with where this is wrong; by itself 78."""

    def __str__(self) -> str:
        return f"{self.check}: {self.state}: {self.what}; {self.do}"


def quantity(text: str | int | float) -> float:
    """Return a Kubernetes quantity (``96Gi``, ``500m``) as a number."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * SUFFIXES[found[2]]


def run_checks(
    cluster: Cluster, settings: ClusterConfig, job: JobConfig, objects: list[Object]
) -> Iterator[Finding]:
    """Yield the finding of every check, in the order in which a mend helps."""
    pod = pod_of(objects)
    checks: list[Check] = [
        ("namespace", lambda: _namespace(cluster, settings)),
        ("image", lambda: _image(settings)),
        ("store", lambda: _store(job, settings)),
        ("gpus", lambda: _gpus(job, settings)),
        ("secrets", lambda: _secrets(cluster, settings)),
        *((kind, partial(_exists, cluster, kind, name)) for kind, name in _named(settings)),
        ("quota", lambda: _quota(cluster, pod)),
        ("node pool", lambda: _nodes(cluster, pod)),
        ("dry run", lambda: _dry_run(cluster, objects)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except ForbiddenError as error:
            # The dry run needs no more than submit itself.
            state: State = "wrong" if name == "dry run" else "not allowed to look"
            yield Finding(name, state, f"your Role {error.what}", error.do, error.code)
        except CutError:
            raise
        except JobError as error:
            if name == "namespace":
                raise
            yield Finding(name, "wrong", error.what, error.do, error.code)


def pod_of(objects: list[Object]) -> Object:
    """Return the pod's spec in a Job or a CronJob."""
    item = objects[-1]
    spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
    return spec["template"]["spec"]


def _namespace(cluster: Cluster, settings: ClusterConfig) -> Iterator[Finding]:
    labels = require_namespace(cluster)["metadata"].get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "privileged")
    if settings.cache and settings.cache.host_path and level != "privileged":
        do = "use cache.claim, or a namespace at level privileged"
        what = f"Pod Security level {level} refuses cache.host_path"
        yield Finding("namespace", "wrong", what, do)
    elif level == "restricted":
        yield Finding("namespace", "ok", f"{cluster.namespace}, Pod Security level {level}")
    else:
        do = "label it pod-security.kubernetes.io/enforce=restricted: the job needs no more"
        what = f"{cluster.namespace} enforces Pod Security level {level}"
        yield Finding("namespace", "warning", what, do)


def _image(settings: ClusterConfig) -> Iterator[Finding]:
    if settings.has_digest:
        yield Finding("image", "ok", "named by digest")
    else:
        do = "use the …@sha256:… that `make image push` prints"
        yield Finding("image", "warning", f"{settings.image} has no digest: it may change", do)


def _store(job: JobConfig, settings: ClusterConfig) -> Iterator[Finding]:
    on_claim = settings.cache and settings.cache.claim and job.store.startswith(CLAIM)
    if job.store.startswith("s3://") or on_claim:
        yield Finding("store", "ok", job.store)
    else:
        do = "use s3://bucket/prefix"
        yield Finding("store", "wrong", f"{job.store} is a folder that dies with its pod", do)


def _gpus(job: JobConfig, settings: ClusterConfig) -> Iterator[Finding]:
    what = f"the job file says device: {job.device}, the cluster file gpus: {settings.gpus}"
    if job.device == "cuda" and settings.gpus == 0:
        yield Finding("gpus", "wrong", what, "set gpus: 1, or device: cpu")
    elif job.device == "cpu" and settings.gpus > 0:
        yield Finding("gpus", "wrong", what, "set gpus: 0, or device: cuda")


def _secrets(cluster: Cluster, settings: ClusterConfig) -> Iterator[Finding]:
    wanted: dict[str, list[str]] = {}
    for reference in settings.secrets.values():
        name, key = reference.split("/")
        wanted.setdefault(name, []).append(key)
    for name, keys in wanted.items():
        yield _secret(cluster, name, keys)


def _secret(cluster: Cluster, name: str, keys: list[str]) -> Finding:
    check = f"secret {name}"
    try:
        secret = cluster.get("Secret", name)
    except ForbiddenError:
        do = "ask whoever made it; if one is missing, `lora-job why` names it"
        return Finding(check, "not allowed to look", f"needs keys {', '.join(keys)}", do)
    if secret is None:
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        create = f"kubectl -n {cluster.namespace} create secret generic {name} {literals}"
        return Finding(check, "wrong", f"there is no Secret {name}", create)
    lost = [key for key in keys if key not in (secret.get("data") or {})]
    if lost:
        there = ", ".join(sorted(secret.get("data") or {})) or "none"
        added = ", ".join(f'"{key}": "…"' for key in lost)
        add = f"kubectl -n {cluster.namespace} patch secret {name} -p '{{\"stringData\": {{{added}}}}}'"
        return Finding(check, "wrong", f"has no key {', '.join(lost)} (it has {there})", add)
    return Finding(check, "ok", f"has {', '.join(keys)}")


def _named(settings: ClusterConfig) -> Iterator[tuple[str, str]]:
    """Yield kind and name of what the cluster file names."""
    named = {
        "ServiceAccount": settings.service_account,
        "PersistentVolumeClaim": settings.cache.claim if settings.cache else None,
        "PriorityClass": settings.priority_class,
        "LocalQueue": settings.queue,
    }
    yield from ((kind, name) for kind, name in named.items() if name)


def _exists(cluster: Cluster, kind: str, name: str) -> Iterator[Finding]:
    if cluster.get(kind, name) is not None:
        yield Finding(kind, "ok", f"{name} is there")
    elif kind == "LocalQueue" and not _has_kueue(cluster):
        do = "install Kueue, or leave queue out of the cluster file"
        yield Finding(kind, "wrong", "Kueue is not installed: its API is not served", do)
    else:
        place = "" if kind in CLUSTER_KINDS else f" in namespace {cluster.namespace}"
        do = f"create it{place}, or name one that is there"
        yield Finding(kind, "wrong", f"there is no {kind} {name}", do)


def _has_kueue(cluster: Cluster) -> bool:
    try:
        cluster.list("Workload", limit=1)
    except NotFoundError:
        return False
    return True


def demand(pod: Object) -> dict[str, float]:
    """Return what a pod asks for, under the names that quotas use too."""
    resources = pod["containers"][0]["resources"]
    asked = {key: quantity(value) for key, value in resources.get("requests", {}).items()}
    named = {f"requests.{key}": value for key, value in asked.items()}
    limits = {f"limits.{key}": quantity(it) for key, it in resources.get("limits", {}).items()}
    return {**asked, **named, **limits, "pods": 1.0, "count/jobs.batch": 1.0}


COMPUTE = {
    "cpu",
    "memory",
    *(f"{it}.{of}" for it in ("requests", "limits") for of in ("cpu", "memory")),
}
"""A quota of one of these refuses pods that do not say how much of it they take."""


def _quota(cluster: Cluster, pod: Object) -> Iterator[Finding]:
    asked = demand(pod)
    quotas = cluster.list("ResourceQuota")
    wrong = False
    for item in quotas:
        if item["spec"].get("scopes") or item["spec"].get("scopeSelector"):
            continue  # of other pods, or the dry run would say
        for key, hard in (item.get("status", {}).get("hard") or {}).items():
            if key in COMPUTE and key not in asked:
                what = (
                    f"{item['metadata']['name']} wants {key} of every pod, and this one says none"
                )
                do = "fine if a LimitRange gives a default; else ask for a quota without it"
                yield Finding("quota", "warning", what, do)
                continue
            used = quantity(item["status"].get("used", {}).get(key, "0"))
            if key not in asked or used + asked[key] <= quantity(hard):
                continue
            # More than the whole quota can never run; more than what is left waits.
            wrong |= asked[key] > quantity(hard)
            what = (
                f"{item['metadata']['name']}: {key} is {hard}, used {used:g}, asked {asked[key]:g}"
            )
            do = "ask for less in the cluster file, or for more quota"
            yield Finding("quota", "wrong" if asked[key] > quantity(hard) else "warning", what, do)
            break
    if quotas and not wrong:
        yield Finding("quota", "ok", f"{len(quotas)} seen")


def _nodes(cluster: Cluster, pod: Object) -> Iterator[Finding]:
    selector = pod.get("nodeSelector") or {}
    label = ",".join(f"{key}={value}" for key, value in selector.items())
    nodes = cluster.list("Node", **({"labelSelector": label} if label else {}))
    refusals = [refusal(pod, node) for node in nodes]
    takers = [node for node, refused in zip(nodes, refusals, strict=True) if refused is None]
    if takers:
        yield _largest(pod, takers)
        return
    told = ", ".join(f"{count} {why}" for why, count in Counter(refusals).items())
    if nodes and all(why and why.startswith("tainted") for why in refusals):
        do = "use the platform of this cluster, or untaint"
        yield Finding("node pool", "wrong", f"no node takes it: {told}", do)
        return
    what = f"no node takes it now: {told}" if nodes else f"no node has {label} now"
    do = "fine if the pool grows from nothing; else see the labels of your nodes"
    yield Finding("node pool", "warning", what, do)


def _largest(pod: Object, nodes: list[Object]) -> Finding:
    asked = pod["containers"][0]["resources"].get("requests", {})
    shares = [node["status"].get("allocatable") or {} for node in nodes]
    fits = [it for it in shares if not _short(asked, it)]
    if fits:
        return Finding("node pool", "ok", f"{len(fits)} of {len(nodes)} matching nodes can hold it")
    key, most = _short(asked, max(shares, key=lambda it: quantity(it.get(GPU, "0"))))[0]
    what = f"asks for {asked[key]} {key}, the largest matching node has {most}"
    if quantity(most) == 0:
        do = "fine if that node is new: its device plugin takes minutes; else see the plugin"
        return Finding("node pool", "warning", what, do)
    do = "ask for less in the cluster file, or add larger nodes"
    return Finding("node pool", "wrong", what, do)


def _short(asked: Object, share: Object) -> list[tuple[str, str]]:
    return [
        (key, str(share.get(key, "0")))
        for key, value in asked.items()
        if quantity(value) > quantity(share.get(key, "0"))
    ]


def _dry_run(cluster: Cluster, objects: list[Object]) -> Iterator[Finding]:
    from k8s.refusals import AlreadyExistsError

    warnings: list[str] = []
    for item in objects:
        try:
            warnings += cluster.create(item, dry_run=True).warnings
        except AlreadyExistsError:
            continue
        except NotFoundError as error:
            raise JobError(
                ExitCode.NOT_FOUND, error.where, "is not served here", "see its API"
            ) from error
    for text in warnings:
        yield Finding("dry run", "warning", text, "see k8s/manifests")
    if not warnings:
        yield Finding("dry run", "ok", "the server accepts every field")
