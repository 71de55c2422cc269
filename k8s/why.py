"""Why is it not running, or why did it fail: a table of causes, and one plain answer with its mend.

Each cause looks at the facts and answers or passes. The first that answers is the answer, so the
table goes from what is certain (it is over) to what is likely.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from job.errors import TABLE
from k8s.facts import Facts
from k8s.render import QUEUE, Object
from k8s.runs import condition, container

WAIT = "nothing to do: it starts by itself"


@dataclass(frozen=True, slots=True)
class Answer:
    """One cause. ``do`` is the mend."""

    cause: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}; {self.do}"


def why(facts: Facts) -> Answer:
    """Return the one answer for a run."""
    for cause in CAUSES:
        answer = cause(facts)
        if answer is not None:
            return answer
    do = f"see kubectl describe job {facts.run.name}"
    return Answer("unknown", f"it is {facts.run.state}, and nothing says why", do)


# It is over


def _succeeded(facts: Facts) -> Answer | None:
    if facts.run.state != "succeeded":
        return None
    uri = (facts.run.receipt or {}).get("uri", "its store")
    return Answer("succeeded", f"it did not fail: it is published at {uri}", "fetch it")


def _deadline(facts: Facts) -> Answer | None:
    end = condition(facts.job, "Failed") if facts.job else None
    if end is None or end.get("reason") != "DeadlineExceeded":
        return None
    do = "raise active_deadline_s (waiting and retries count too) or set train.max_duration_s; "
    return Answer(
        "deadline",
        "the Job ran into its active_deadline_s",
        f"{do}then submit again: it goes on from its checkpoint",
    )


def _oom_killed(facts: Facts) -> Answer | None:
    last = _ended_pod(facts)
    if facts.run.state != "failed" or last is None:
        return None
    if container(last)["state"]["terminated"].get("reason") != "OOMKilled":
        return None
    limits = last["spec"]["containers"][0].get("resources", {}).get("limits", {})
    memory = limits.get("memory", "none")
    do = "raise memory in the cluster file (shm_size is a part of it), then submit again"
    return Answer("oom-killed", f"the kernel killed it at its memory limit of {memory}", do)


def _evicted(facts: Facts) -> Answer | None:
    last = facts.pod
    if facts.run.state != "failed" or last is None or last["status"].get("reason") != "Evicted":
        return None
    message = " ".join(str(last["status"].get("message", "")).split())
    do = "raise ephemeral_storage in the cluster file, then submit again"
    if "ephemeral" not in message and "disk" not in message.lower():
        do = "submit again: it goes on from its checkpoint"
    return Answer("evicted", f"its node evicted it: {message}", do)


def _bad_device(facts: Facts) -> Answer | None:
    last = facts.pod
    if last is None or last["status"].get("reason") != "UnexpectedAdmissionError":
        return None
    node = last["spec"].get("nodeName", "?")
    do = f"cordon it (kubectl cordon {node}), then submit again"
    return Answer("bad-device", f"node {node} could not give it the GPU it promised", do)


def _exit_code(facts: Facts) -> Answer | None:
    last = facts.run.last_end
    if facts.run.state != "failed" or not last or last.get("code") is None:
        return None
    code = int(last["code"])
    row = next((row for known, row in TABLE.items() if known == code), None)
    if row is None:
        return _killed(facts, code, str(last.get("what", "")))
    where = f"{last['where']}: " if last.get("where") else ""
    what = f"exit code {code}, {row.name}: {where}{last.get('what') or row.means}"
    do = last.get("do") or "mend that, then submit again"
    return Answer(f"exit-{code}", what, str(do))


def _killed(facts: Facts, code: int, said: str) -> Answer:
    name = facts.run.name
    if code == 137:
        what = "killed from outside (exit code 137), and no word from the kernel about memory"
        do = "see the node's events; submit again: it goes on from its checkpoint"
        return Answer("killed", what, do)
    what = f"it ended unexpectedly with exit code {code}: {said}"
    return Answer("bug", what, f"see `lora-job logs {name}` and report it")


def _failed(facts: Facts) -> Answer | None:
    if facts.run.state != "failed":
        return None
    end = (condition(facts.job, "Failed") if facts.job else None) or {}
    what = f"the Job failed: {end.get('reason', '')} {end.get('message', '')}".rstrip()
    return Answer("failed", what, f"see `lora-job logs {facts.run.name}`, then submit again")


# It waits for somebody's leave


def _kueue(facts: Facts) -> Answer | None:
    if facts.run.state != "queued" or facts.job is None:
        return None
    queue = facts.job["metadata"]["labels"][QUEUE]
    if facts.workload is None:
        what = f"it waits for queue {queue}, and Kueue has made no Workload for it"
        return Answer(
            "kueue-absent", what, "see whether Kueue runs here, and allows this namespace"
        )
    if facts.workload["spec"].get("active") is False:
        do = f"submit again after `lora-job cancel {facts.run.name}`"
        return Answer("kueue-inactive", "its Workload was set inactive (a cancel, or Kueue)", do)
    for kind in ("Evicted", "QuotaReserved", "Admitted"):
        found = _workload_condition(facts.workload, kind, "True" if kind == "Evicted" else "False")
        if found:
            cause = "kueue-preempted" if found.get("reason") == "Preempted" else "kueue-quota"
            what = f"queue {queue}: {found.get('message') or found.get('reason')}"
            return Answer(cause, what, f"{WAIT} when quota is free; or ask for less, or more quota")
    return Answer("kueue-waiting", f"it waits in queue {queue}", WAIT)


def _workload_condition(workload: Object, kind: str, status: str) -> Object | None:
    found = workload.get("status", {}).get("conditions") or []
    return next((it for it in found if it["type"] == kind and it["status"] == status), None)


def _suspended(facts: Facts) -> Answer | None:
    if facts.run.state != "suspended":
        return None
    name = facts.run.name
    do = f'kubectl patch job {name} -p \'{{"spec":{{"suspend":false}}}}\', or cancel it'
    return Answer("suspended", "somebody suspended the Job", do)


# There is no pod


def _refused_pod(facts: Facts) -> Answer | None:
    if facts.run.state != "pending" or facts.pod is not None:
        return None
    said = facts.said("FailedCreate") or ""
    if "exceeded quota" in said:
        detail = said.partition("exceeded quota: ")[2]
        do = "wait until other work ends, ask for less in the cluster file, or for more quota"
        return Answer("quota", f"the namespace's quota is used up: {detail}", do)
    if "violates PodSecurity" in said:
        detail = said.partition("violates PodSecurity ")[2]
        do = "use the manifests as they are (cache.claim, not cache.host_path), or relax the namespace"
        return Answer("pod-security", f"Pod Security refuses the pod: {detail}", do)
    account = re.search(r'serviceaccount "?([\w.-]+)"? not found', said)
    if account:
        do = "create it, or name another service_account in the cluster file, then submit again"
        return Answer("service-account", f"there is no service account {account[1]}", do)
    if said:
        return Answer(
            "refused", f"the cluster refuses the pod: {said}", "mend that: it is tried again"
        )
    return Answer("starting", "its pod is just being created", WAIT)


# There is a pod, and it does not start


def _leaving(facts: Facts) -> Answer | None:
    stuck = [pod for pod in facts.pods if pod["metadata"].get("deletionTimestamp")]
    running = [pod for pod in stuck if pod["status"].get("phase") in ("Running", "Pending")]
    if facts.run.is_over or not running or running[0] is not facts.pod:
        return None
    node = running[0]["spec"].get("nodeName", "?")
    what = f"its last pod is still ending on node {node}; a new one starts only when it is gone"
    do = f"{WAIT}; if node {node} is dead, delete it or taint it node.kubernetes.io/out-of-service"
    return Answer("leaving", what, do)


def _container_waits(facts: Facts) -> Answer | None:
    state = container(facts.pod).get("state", {}) if facts.pod else {}
    waiting = state.get("waiting") or {}
    reason, said = waiting.get("reason", ""), " ".join(str(waiting.get("message", "")).split())
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
        return _image(facts, f"{said} {facts.said('Failed') or ''}")
    if reason == "CreateContainerConfigError":
        return _config(said)
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return Answer(
            "container", f"the container can't start: {said}", "see the image and its command"
        )
    return None


def _image(facts: Facts, said: str) -> Answer:
    assert facts.pod is not None
    image = facts.pod["spec"]["containers"][0]["image"]
    if re.search(r"unauthorized|denied|forbidden|401|403|authentication", said, re.IGNORECASE):
        do = "give the node's account the right to pull, or set image_pull_secret in the cluster file"
        return Answer("image-denied", f"the registry refuses to give {image}", do)
    if re.search(r"not found|manifest unknown|does not exist|InvalidImage", said, re.IGNORECASE):
        do = "push it (`make image push`) and use the digest that it prints"
        return Answer("image-absent", f"there is no image {image}", do)
    return Answer("image-pull", f"{image} can't be pulled: {said.strip()}", "see the registry")


def _config(said: str) -> Answer:
    key = re.search(r"couldn't find key (\S+) in Secret \S*?([\w.-]+)$", said)
    if key:
        do = "add it to the Secret, or mend secrets in the cluster file: it starts by itself"
        return Answer("secret-key", f"Secret {key[2]} has no key {key[1]}", do)
    secret = re.search(r'secret "?([\w.-]+)"? not found', said)
    if secret:
        do = "create it, or mend secrets in the cluster file: it starts by itself"
        return Answer("secret", f"there is no Secret {secret[1]}", do)
    return Answer("container-config", f"the container can't be set up: {said}", "mend that")


def _volume(facts: Facts) -> Answer | None:
    said = facts.said("FailedMount", "FailedAttachVolume", "FailedMapVolume", "ProvisioningFailed")
    if facts.run.state != "pending" or not facts.pod or not said:
        return None
    if not facts.pod["spec"].get("nodeName"):
        return None
    do = "see that the claim (cache.claim) and the ConfigMap are there and not in use elsewhere"
    return Answer("volume", f"a volume can't be mounted: {said}", do)


SHORTAGES = {
    "nvidia.com/gpu": ("gpus", "GPUs", "wait, free a GPU, or add nodes to the pool"),
    "memory": ("memory", "memory", "ask for less memory in the cluster file, or add larger nodes"),
    "cpu": ("cpu", "CPU", "ask for less cpu in the cluster file, or add nodes"),
    "ephemeral-storage": ("disk", "local disk", "ask for less ephemeral_storage, or larger disks"),
}


def _unscheduled(facts: Facts) -> Answer | None:
    if facts.pod is None or facts.pod["spec"].get("nodeName") or facts.run.is_over:
        return None
    said = _scheduler_says(facts)
    growing = facts.said("TriggeredScaleUp", "Nominated")
    if growing:
        return Answer("scaling-up", f"a node is being added for it: {growing}", WAIT)
    return _volume_claim(said) or _shortage(facts, said) or _no_node(facts, said)


def _scheduler_says(facts: Facts) -> str:
    for one in (facts.pod or {}).get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False":
            return " ".join(str(one.get("message", "")).split())
    return facts.said("FailedScheduling") or ""


def _volume_claim(said: str) -> Answer | None:
    absent = re.search(r'persistentvolumeclaim "([^"]+)" not found', said)
    if absent:
        do = "create it, or mend cache.claim in the cluster file"
        return Answer("claim", f"there is no PersistentVolumeClaim {absent[1]}", do)
    if "unbound immediate PersistentVolumeClaims" in said:
        what = "its PersistentVolumeClaim is bound to no volume"
        return Answer("claim-unbound", what, "see kubectl describe pvc, and its storage class")
    if "volume node affinity conflict" in said:
        do = "use a claim in the zone of the GPU nodes"
        return Answer("claim-zone", "its volume lies in another zone than the GPU nodes", do)
    return None


def _shortage(facts: Facts, said: str) -> Answer | None:
    short = re.findall(r"(\d+) Insufficient ([\w./-]+?)[,.]?(?:\s|$)", said)
    named = next((SHORTAGES[key] for key in SHORTAGES if key in dict(map(reversed, short))), None)
    if named is None:
        return None
    cause, noun, do = named
    held = f" ({', '.join(facts.holders)} runs now)" if facts.holders and cause == "gpus" else ""
    asked = f"{facts.run.gpus} " if cause == "gpus" else ""
    grows = facts.said("NotTriggerScaleUp")
    stuck = f"; the autoscaler adds none: {grows}" if grows else ""
    return Answer(
        cause,
        f"not enough free {noun}{held}, it asks for {asked or 'more'}: {said}{stuck}".replace(
            "it asks for more: ", ""
        ),
        do,
    )


def _no_node(facts: Facts, said: str) -> Answer | None:
    taint = re.search(r"untolerated taint\(?s?\)? ?\{([^}]*)\}", said)
    selector = (facts.pod or {}).get("spec", {}).get("nodeSelector") or {}
    labels = ", ".join(f"{key}={value}" for key, value in selector.items())
    if "didn't match Pod's node affinity/selector" in said:
        do = "set platform, capacity or node_selector in the cluster file to what your nodes carry"
        return Answer("selector", f"no free node has the labels {labels}: {said}", do)
    if taint:
        what = (
            f"the nodes that fit are tainted {taint[1].rstrip(': ')}, and it does not tolerate that"
        )
        return Answer("taint", what, "use this cluster's platform in the cluster file, or untaint")
    if "no nodes available" in said:
        return Answer("no-nodes", "the cluster has no nodes", "add a GPU node pool")
    if said:
        return Answer("unscheduled", f"no node takes it: {said}", "see the node pool")
    return Answer("scheduling", "the scheduler has not looked at it yet", WAIT)


def _starting(facts: Facts) -> Answer | None:
    if facts.run.state != "pending" or facts.pod is None or not facts.pod["spec"].get("nodeName"):
        return None
    node = facts.pod["spec"]["nodeName"]
    if facts.pod["status"].get("phase") in ("Failed", "Succeeded"):
        return _between(facts)
    if facts.said("Pulling") and not facts.said("Pulled"):
        image = facts.pod["spec"]["containers"][0]["image"]
        return Answer(
            "pulling", f"node {node} is pulling {image}", f"{WAIT}: minutes when it is new"
        )
    return Answer("starting", f"its container is being set up on node {node}", WAIT)


def _between(facts: Facts) -> Answer:
    last = facts.run.last_end or {}
    ended = f"exit code {last.get('code')}: {last.get('what', '')}" if last else "an attempt ended"
    return Answer("between", f"between attempts: {ended}", f"{WAIT}, after a pause that doubles")


def _running(facts: Facts) -> Answer | None:
    if facts.run.state != "running":
        return None
    stage = facts.run.progress.get("stage", "start")
    last = facts.run.last_end
    before = (
        f"; the attempt before ended with {last.get('code')}: {last.get('what')}" if last else ""
    )
    return Answer("running", f"it runs, attempt {facts.run.number}, stage {stage}{before}", "wait")


def _ending(facts: Facts) -> Answer | None:
    if facts.run.state != "ending":
        return None
    return Answer("ending", "the Job is being deleted", "wait; submit again to start it anew")


def _gone(facts: Facts) -> Answer | None:
    if facts.job is not None:
        return None
    what = "its Job is gone, and its heartbeat in the store has stopped"
    return Answer("gone", what, "submit again: it goes on from its checkpoint")


def _ended_pod(facts: Facts) -> Object | None:
    return next((it for it in facts.pods if "terminated" in container(it).get("state", {})), None)


CAUSES: tuple[Callable[[Facts], Answer | None], ...] = (
    _succeeded,
    _deadline,
    _evicted,
    _bad_device,
    _oom_killed,
    _exit_code,
    _failed,
    _ending,
    _kueue,
    _suspended,
    _refused_pod,
    _leaving,
    _container_waits,
    _volume,
    _unscheduled,
    _starting,
    _running,
    _gone,
)
