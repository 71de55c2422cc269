"""Why a run that nobody holds back has no running pod: refused, unscheduled, or unable to start."""

from __future__ import annotations

import re
from dataclasses import replace

from k8s.facts import WAIT, Answer, Facts
from k8s.nodes import required
from k8s.render import Object
from k8s.runs import container

# There is no pod


def refused_pod(facts: Facts) -> Answer | None:
    """The Job may not create its pod: quota, Pod Security, service account, a webhook."""
    last = facts.pod
    if facts.run.state != "pending" or not (last is None or _has_ended(last)):
        return None
    ended = container(last).get("state", {}).get("terminated", {}) if last else {}
    said = facts.said("FailedCreate", since=ended.get("finishedAt")) or ""
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
    return None if last else Answer("starting", "its pod is just being created", WAIT)


def _has_ended(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Failed", "Succeeded")


# There is a pod, and it does not start


def node_lost(facts: Facts) -> Answer | None:
    """Nobody hears from the pod's node: it may be dead, and the pod may still write."""
    if facts.run.state != "lost" or facts.pod is None:
        return None
    node = facts.pod["spec"].get("nodeName", "?")
    what = f"nobody hears from node {node}, so nobody knows whether its pod has ended"
    do = (
        f"wait if it comes back; if it is dead: kubectl delete node {node} (or kubectl taint node "
        f"{node} node.kubernetes.io/out-of-service=dead:NoExecute), and the run goes on elsewhere"
    )
    return Answer("node-lost", what, do)


def leaving(facts: Facts) -> Answer | None:
    """The pod before is still ending, perhaps on a node that is dead."""
    stuck = [pod for pod in facts.pods if pod["metadata"].get("deletionTimestamp")]
    running = [pod for pod in stuck if pod["status"].get("phase") in ("Running", "Pending")]
    if facts.run.is_over or not running or running[0] is not facts.pod:
        return None
    node = running[0]["spec"].get("nodeName", "?")
    what = f"its last pod is still ending on node {node}; a new one starts only when it is gone"
    do = f"{WAIT}; if node {node} is dead, delete it or taint it node.kubernetes.io/out-of-service"
    return Answer("leaving", what, do)


def container_waits(facts: Facts) -> Answer | None:
    """The kubelet can't start the container: image, Secret, command."""
    state = container(facts.pod).get("state", {}) if facts.pod else {}
    waiting = state.get("waiting") or {}
    reason, said = waiting.get("reason", ""), " ".join(str(waiting.get("message", "")).split())
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
        return _image(facts, f"{said} {facts.said('Failed') or ''}")
    if reason == "CreateContainerConfigError":
        return _config(said)
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return cannot_start(said)
    return None


def cannot_start(said: str) -> Answer:
    """The runtime has the image, and no process comes of it."""
    return Answer(
        "container", f"the container can't start: {said}", "see the image and its command"
    )


def _image(facts: Facts, said: str) -> Answer:
    assert facts.pod is not None
    image = facts.pod["spec"]["containers"][0]["image"]
    # Names and digests may hold any of these.
    said = said.replace(image, "")
    if re.search(r"unauthorized|denied|forbidden|\b40[13]\b|authentication", said, re.IGNORECASE):
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


def volume(facts: Facts) -> Answer | None:
    """A volume can't be mounted on the node."""
    said = facts.said("FailedMount", "FailedAttachVolume", "FailedMapVolume", "ProvisioningFailed")
    if facts.run.state != "pending" or not facts.pod or not said:
        return None
    # An image is pulled once the volumes are there.
    mounted = facts.event("Pulling", "Pulled", "Created")
    if not facts.pod["spec"].get("nodeName") or mounted:
        return None
    do = "see that the claim (cache.claim) and the ConfigMap are there and not in use elsewhere"
    return Answer("volume", f"a volume can't be mounted: {said}", do)


SHORTAGES = {
    "nvidia.com/gpu": ("gpus", "GPUs", "wait, free a GPU, or add nodes to the pool"),
    "memory": ("memory", "memory", "ask for less memory in the cluster file, or add larger nodes"),
    "cpu": ("cpu", "CPU", "ask for less cpu in the cluster file, or add nodes"),
    "ephemeral-storage": ("disk", "local disk", "ask for less ephemeral_storage, or larger disks"),
}


GROWING, STUCK = ("TriggeredScaleUp", "Nominated"), ("NotTriggerScaleUp", "FailedScaleUp")
"""What autoscalers say of a pod: the newest word counts."""


def unscheduled(facts: Facts) -> Answer | None:
    """No node takes the pod, or one is just being added."""
    if facts.pod is None or facts.pod["spec"].get("nodeName") or facts.run.is_over:
        return None
    said = _scheduler_says(facts)
    news, word = facts.event(*GROWING, *STUCK), facts.said(*GROWING, *STUCK)
    if news and news["reason"] in GROWING:
        return Answer("scaling-up", f"a node is being added for it: {word}", WAIT)
    found = _volume_claim(said) or _shortage(facts, said) or _no_node(facts, said)
    return replace(found, what=f"{found.what}; the autoscaler adds none: {word}") if news else found


def _scheduler_says(facts: Facts) -> str:
    """Return the scheduler's newest word, without what it says of preemption."""
    said, since = "", None
    for one in (facts.pod or {}).get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False":
            said, since = str(one.get("message", "")), one.get("lastTransitionTime")
    said = facts.said("FailedScheduling", since=since) or said
    return " ".join(said.partition("preemption:")[0].split())


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
    held = f" (held by {', '.join(facts.holders)})" if facts.holders and cause == "gpus" else ""
    asked = f", it asks for {facts.run.gpus}" if cause == "gpus" else ""
    return Answer(cause, f"not enough free {noun}{held}{asked}: {said}", do)


def _no_node(facts: Facts, said: str) -> Answer:
    if "were unschedulable" in said or "{node.kubernetes.io/unschedulable" in said:
        names = " ".join(facts.cordoned)
        what = f"nodes that may fit are cordoned{f' ({names})' if names else ''}: {said}"
        do = f"wait for new nodes, or put them back: kubectl uncordon {names or 'NODE'}"
        return Answer("cordoned", what, do)
    unfit = "didn't match Pod's node affinity/selector" in said
    wanted = _wanted((facts.pod or {}).get("spec", {}))
    taints = _taints(said)
    if taints:
        others = f", and the others do not fit {wanted}" if unfit else ""
        what = f"nodes are tainted {taints}, and it does not tolerate that{others}: {said}"
        return Answer("taint", what, "use this cluster's platform in the cluster file, or untaint")
    if unfit:
        do = "set platform, capacity or node_selector in the cluster file to what your nodes carry"
        return Answer("selector", f"no free node fits {wanted}: {said}", do)
    if "no nodes available" in said:
        return Answer("no-nodes", "the cluster has no nodes", "add a GPU node pool")
    if said:
        return Answer("unscheduled", f"no node takes it: {said}", "see the node pool")
    return Answer("scheduling", "the scheduler has not looked at it yet", WAIT)


def _wanted(pod: Object) -> str:
    """Return the labels and the affinity that the scheduler calls by one name."""
    labels = [f"{key}={value}" for key, value in (pod.get("nodeSelector") or {}).items()]
    return " and ".join(filter(None, [*labels, required(pod)]))


def _taints(said: str) -> str:
    """Return the taints that keep it away; those of a control plane are on no GPU node."""
    found = re.findall(r"untolerated taint(?:\(s\))? ?\{([^}]*)\}", said)
    kept = (it.rstrip(": ") for it in found if not it.startswith("node-role.kubernetes.io/"))
    return ", ".join(kept)


def starting(facts: Facts) -> Answer | None:
    """All is well, it only takes its time: pulling, setting up, between two attempts."""
    if facts.run.state != "pending" or facts.pod is None or not facts.pod["spec"].get("nodeName"):
        return None
    node = facts.pod["spec"]["nodeName"]
    if _has_ended(facts.pod):
        return _between(facts)
    if facts.said("Pulling") and not facts.said("Pulled"):
        image = facts.pod["spec"]["containers"][0]["image"]
        return Answer(
            "pulling", f"node {node} is pulling {image}", f"{WAIT}: minutes when it is new"
        )
    return Answer("starting", f"its container is being set up on node {node}", WAIT)


def _between(facts: Facts) -> Answer:
    last = facts.run.last_end or {}
    code = f"exit code {last['code']}: " if last.get("code") is not None else ""
    ended = f"{code}{last.get('what', '')}" if last else "an attempt ended"
    return Answer("between", f"between attempts: {ended}", f"{WAIT}, after a pause that doubles")
