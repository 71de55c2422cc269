"""Each cause, from pods and events as servers really write them: one answer, and its mend."""

from __future__ import annotations

import json
from typing import Any

import pytest

from k8s.facts import Facts, _holders
from k8s.runs import assemble
from k8s.stored import Stored
from k8s.why import why

Object = dict[str, Any]

NOW = 1_780_000_000.0
RUN = "night-1a2b3c4d"
IMAGE = "registry.example/lora-job@sha256:0"
SELECTOR = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


def _job(*, kind: str = "", reason: str = "", message: str = "", **spec: Any) -> Object:
    limits = {"nvidia.com/gpu": "1", "memory": "96Gi"}
    pod = {"containers": [{"name": "job", "image": IMAGE, "resources": {"limits": limits}}]}
    end = {"type": kind, "status": "True", "reason": reason, "message": message}
    end["lastTransitionTime"] = "2026-11-22T02:30:00Z"
    labels = {"kueue.x-k8s.io/queue-name": "gpus"} if spec.pop("queued", False) else {}
    return {
        "metadata": {
            "name": RUN,
            "uid": "u",
            "creationTimestamp": "2026-11-22T02:00:00Z",
            "labels": labels,
            "annotations": {"lora-job/store": "s3://models/adapters"},
        },
        "spec": {"template": {"spec": pod}, **spec},
        "status": {"conditions": [end] if kind else []},
    }


def _pod(
    state: Object | None = None,
    *,
    phase: str = "Pending",
    node: str = "node-7",
    deleting: bool = False,
    **status: Any,
) -> Object:
    limits = {"nvidia.com/gpu": "1", "memory": "96Gi"}
    container = {"name": "job", "image": IMAGE, "resources": {"limits": limits}}
    statuses = [{"name": "job", "state": state}] if state else []
    metadata: Object = {"name": f"{RUN}-x", "creationTimestamp": "2026-11-22T02:00:01Z"}
    if deleting:
        metadata["deletionTimestamp"] = "2026-11-22T02:10:00Z"
    return {
        "metadata": metadata,
        "spec": {"containers": [container], "nodeName": node, "nodeSelector": SELECTOR},
        "status": {"phase": phase, "containerStatuses": statuses, **status},
    }


def _unscheduled(message: str) -> Object:
    false = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return _pod(node="", conditions=[{**false, "message": message}])


def _waiting(reason: str, message: str = "") -> Object:
    return _pod({"waiting": {"reason": reason, "message": message}})


def _ended(code: int, *, reason: str = "Error", message: str = "", **status: Any) -> Object:
    times = {"startedAt": "2026-11-22T02:01:00Z", "finishedAt": "2026-11-22T02:31:00Z"}
    ended = {"exitCode": code, "reason": reason, "message": message, **times}
    return _pod({"terminated": ended}, phase="Failed", **status)


def _event(reason: str, message: str) -> Object:
    return {"reason": reason, "message": message, "lastTimestamp": "2026-11-22T02:02:00Z"}


def _facts(
    job: Object | None,
    *pods: Object,
    events: tuple[Object, ...] = (),
    stored: Stored | None = None,
    **more: Any,
) -> Facts:
    run = assemble(RUN, job, list(pods), stored or Stored(), now=NOW)
    return Facts(run, job, list(pods), list(events), **more)


def _workload(kind: str, status: str, reason: str, message: str, *, active: bool = True) -> Object:
    one = {"type": kind, "status": status, "reason": reason, "message": message}
    return {"spec": {"active": active}, "status": {"conditions": [one]}}


WORD = json.dumps(
    {"code": 78, "name": "config", "where": "lora.rank", "what": "is 0", "do": "set it to 8"}
)
FAILED = {"kind": "Failed", "reason": "PodFailurePolicy", "message": "rule 2"}
LIMIT = {"kind": "Failed", "reason": "BackoffLimitExceeded"}
GPU = (
    "0/5 nodes are available: 2 Insufficient nvidia.com/gpu, 3 node(s) didn't match Pod's node "
    "affinity/selector. preemption: 0/5 nodes are available: 5 Preemption is not helpful."
)
CONDITION = "QuotaReserved"
KUEUE = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu"

CASES: dict[str, tuple[Facts, str, str]] = {
    "exit-78": (_facts(_job(**FAILED), _ended(78, message=WORD)), "lora.rank: is 0", "set it to 8"),
    "exit-74": (_facts(_job(**LIMIT), _ended(74)), "store unreachable", "submit again"),
    "oom-killed": (
        _facts(_job(**LIMIT), _ended(137, reason="OOMKilled")),
        "memory limit of 96Gi",
        "raise memory",
    ),
    "killed": (_facts(_job(**LIMIT), _ended(137)), "exit code 137", "checkpoint"),
    "node-lost": (
        _facts(
            _job(),
            _pod(
                {"running": {"startedAt": "2026-11-22T02:01:00Z"}},
                phase="Running",
                deleting=True,
                conditions=[{"type": "Ready", "status": "False"}],
            ),
        ),
        "nobody hears from node node-7",
        "kubectl delete node node-7",
    ),
    "cordoned": (
        _facts(
            _job(),
            _unscheduled("0/1 nodes are available: 1 node(s) were unschedulable."),
            cordoned=["node-7"],
        ),
        "cordoned (node-7)",
        "kubectl uncordon node-7",
    ),
    "bug": (
        _facts(_job(**LIMIT), _ended(1, message="Traceback\nKeyError: 'x'")),
        "KeyError: 'x'",
        "report it",
    ),
    "deadline": (
        _facts(_job(kind="Failed", reason="DeadlineExceeded"), _ended(75)),
        "active_deadline_s",
        "max_duration_s",
    ),
    "evicted": (
        _facts(
            _job(**LIMIT),
            _ended(
                137,
                reason="Evicted",
                message="",
            )
            | {
                "status": {
                    "phase": "Failed",
                    "reason": "Evicted",
                    "message": "Pod ephemeral local storage usage exceeds the total limit "
                    "of containers 200Gi.",
                }
            },
        ),
        "exceeds the total limit of containers",
        "raise ephemeral_storage",
    ),
    "bad-device": (
        _facts(_job(**LIMIT), _pod(phase="Failed", reason="UnexpectedAdmissionError")),
        "node node-7 could not give it the GPU",
        "cordon",
    ),
    "failed": (_facts(_job(**LIMIT)), "BackoffLimitExceeded", "logs"),
    "gpus": (
        _facts(_job(), _unscheduled(GPU), holders=["day-9f"]),
        "not enough free GPUs (held by day-9f), it asks for 1",
        "add nodes",
    ),
    "memory": (
        _facts(_job(), _unscheduled("0/1 nodes are available: 1 Insufficient memory.")),
        "not enough free memory",
        "ask for less memory",
    ),
    "disk": (
        _facts(_job(), _unscheduled("0/1 nodes are available: 1 Insufficient ephemeral-storage.")),
        "local disk",
        "ephemeral_storage",
    ),
    "selector": (
        _facts(
            _job(),
            _unscheduled(
                "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
            ),
        ),
        "gke-accelerator=nvidia-h100-80gb",
        "platform",
    ),
    "taint": (
        _facts(
            _job(),
            _unscheduled(
                "0/2 nodes are available: 2 node(s) had untolerated taint {dedicated: vision}."
            ),
        ),
        "tainted dedicated: vision",
        "platform",
    ),
    "no-nodes": (
        _facts(_job(), _unscheduled("no nodes available to schedule pods")),
        "no nodes",
        "node pool",
    ),
    "scaling-up": (
        _facts(
            _job(),
            _unscheduled(GPU),
            events=(_event("TriggeredScaleUp", "pod triggered scale-up: [{pool 0->1}]"),),
        ),
        "a node is being added",
        "nothing to do",
    ),
    "claim": (
        _facts(
            _job(),
            _unscheduled(
                '0/1 nodes are available: persistentvolumeclaim "weights" not found. preemption: …'
            ),
        ),
        "no PersistentVolumeClaim weights",
        "cache.claim",
    ),
    "claim-unbound": (
        _facts(
            _job(),
            _unscheduled(
                "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."
            ),
        ),
        "bound to no volume",
        "storage class",
    ),
    "claim-zone": (
        _facts(_job(), _unscheduled("1 node(s) had volume node affinity conflict.")),
        "another zone",
        "zone",
    ),
    "image-absent": (
        _facts(
            _job(),
            _waiting("ImagePullBackOff", 'Back-off pulling image "x"'),
            events=(_event("Failed", f'Failed to pull image "{IMAGE}": manifest unknown'),),
        ),
        f"no image {IMAGE}",
        "make image push",
    ),
    "image-denied": (
        _facts(_job(), _waiting("ErrImagePull", "pull access denied, 401 Unauthorized")),
        "refuses to give",
        "image_pull_secret",
    ),
    "image-pull": (
        _facts(_job(), _waiting("ErrImagePull", "dial tcp: i/o timeout")),
        "i/o timeout",
        "registry",
    ),
    "secret": (
        _facts(_job(), _waiting("CreateContainerConfigError", 'secret "hub" not found')),
        "no Secret hub",
        "create it",
    ),
    "secret-key": (
        _facts(
            _job(),
            _waiting(
                "CreateContainerConfigError", "couldn't find key token in Secret lora-job/hub"
            ),
        ),
        "Secret hub has no key token",
        "add it",
    ),
    "volume": (
        _facts(
            _job(),
            _waiting("ContainerCreating"),
            events=(_event("FailedMount", 'MountVolume.SetUp failed: configmap "x" not found'),),
        ),
        "can't be mounted",
        "claim",
    ),
    "pulling": (
        _facts(
            _job(),
            _waiting("ContainerCreating"),
            events=(_event("Pulling", f'Pulling image "{IMAGE}"'),),
        ),
        "node node-7 is pulling",
        "minutes",
    ),
    "quota": (
        _facts(
            _job(),
            events=(
                _event(
                    "FailedCreate",
                    'Error creating: pods "x" is forbidden: exceeded quota: gpus, requested: '
                    "requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1",
                ),
            ),
        ),
        "gpus, requested: requests.nvidia.com/gpu=1",
        "more quota",
    ),
    "pod-security": (
        _facts(
            _job(),
            events=(
                _event(
                    "FailedCreate",
                    'Error creating: pods "x" is forbidden: violates PodSecurity '
                    '"restricted:latest": restricted volume types (volume "cache" uses hostPath)',
                ),
            ),
        ),
        'volume "cache" uses hostPath',
        "cache.claim",
    ),
    "service-account": (
        _facts(
            _job(),
            events=(
                _event(
                    "FailedCreate",
                    'Error creating: pods "x" is forbidden: error looking up service account '
                    'lora-job/trainer: serviceaccount "trainer" not found',
                ),
            ),
        ),
        "no service account trainer",
        "create it",
    ),
    "leaving": (
        _facts(_job(), _pod({"running": {}}, phase="Running", deleting=True)),
        "still ending on node node-7",
        "out-of-service",
    ),
    "suspended": (_facts(_job(suspend=True)), "suspended", "submit again to resume it"),
    "kueue-absent": (_facts(_job(suspend=True, queued=True)), "no Workload", "Kueue"),
    "kueue-quota": (
        _facts(
            _job(suspend=True, queued=True),
            workload=_workload(CONDITION, "False", "Pending", KUEUE),
        ),
        KUEUE,
        "quota",
    ),
    "kueue-inadmissible": (
        _facts(
            _job(suspend=True, queued=True),
            workload=_workload(CONDITION, "False", "Inadmissible", "LocalQueue x doesn't exist"),
        ),
        "LocalQueue x doesn't exist",
        "there and active",
    ),
    "kueue-preempted": (
        _facts(
            _job(suspend=True, queued=True),
            workload=_workload("Evicted", "True", "Preempted", "Preempted by a workload"),
        ),
        "Preempted by a workload",
        "quota is free",
    ),
    "kueue-inactive": (
        _facts(
            _job(suspend=True, queued=True),
            workload=_workload(CONDITION, "False", "Pending", "", active=False),
        ),
        "inactive",
        "submit again",
    ),
    "succeeded": (
        _facts(
            _job(kind="Complete"),
            stored=Stored({"state": "published:v"}, (), {"uri": "s3://models/adapters/night"}),
        ),
        "s3://models/adapters/night",
        "fetch",
    ),
    "gone": (
        _facts(None, stored=Stored({"state": "running", "heartbeat": NOW - 3600, "epoch": 1})),
        "heartbeat",
        "submit again",
    ),
    "running": (
        _facts(_job(), _pod({"running": {"startedAt": "2026-11-22T02:01:00Z"}}, phase="Running")),
        "it runs, attempt 1",
        "wait",
    ),
    "between": (_facts(_job(), _ended(74, message="")), "between attempts: exit code 74", "pause"),
}


@pytest.mark.parametrize("cause", CASES)
def test_one_plain_answer_and_its_mend(cause: str) -> None:
    """The cause is found, what is wrong is named, and so is what to do."""
    facts, what, do = CASES[cause]
    answer = why(facts)
    assert answer.cause == cause, str(answer)
    assert what in answer.what
    assert do in answer.do
    assert "\n" not in str(answer)


def _evicted(message: str) -> Object:
    status = {"phase": "Failed", "reason": "Evicted", "message": message}
    return _ended(137) | {"status": status}


def test_a_limit_that_the_next_attempt_will_meet_too_is_named_at_once() -> None:
    """Retries that are left change nothing: memory or disk has to be raised."""
    killed = _ended(137, reason="OOMKilled")
    answer = why(_facts(_job(), killed))
    assert (answer.cause, answer.do[:12]) == ("oom-killed", "raise memory")
    assert "cancel it and submit again" in answer.do
    running = _pod({"running": {"startedAt": "2026-11-22T02:33:00Z"}}, phase="Running")
    running["metadata"]["creationTimestamp"] = "2026-11-22T02:32:00Z"
    answer = why(_facts(_job(), running, killed))
    assert (answer.cause, answer.do[:12]) == ("running", "raise memory")
    own = 'Container job exceeded its local ephemeral storage limit "200Gi".'
    assert "raise ephemeral_storage" in why(_facts(_job(), _evicted(own))).do
    theirs = (
        "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 0. "
        "Container job was using 20Gi, request is 200Gi, has larger consumption of it."
    )
    assert "nothing to do" in why(_facts(_job(), _evicted(theirs))).do
    assert "nothing to do" in why(_facts(_job(), _evicted("low on resource: memory"))).do


def test_gpus_are_held_from_the_moment_that_a_pod_has_a_node() -> None:
    """A pod that is still pulling its image has them already; one without a node has none."""

    class Cluster:
        def list(self, _kind: str, **query: str) -> list[Object]:
            assert "Running" not in query["fieldSelector"]
            return [_of("day-9f", "node-7"), _of("eve-2b", ""), _of(RUN, "node-7")]

    def _of(run: str, node: str) -> Object:
        labels = {"batch.kubernetes.io/job-name": run}
        return {"metadata": {"labels": labels}, "spec": {"nodeName": node}}

    assert _holders(Cluster(), RUN) == ["day-9f"]  # type: ignore[arg-type]


SELECTORS = "2 node(s) didn't match Pod's node affinity/selector"
NO_SPOT = {"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"}
AFFINITY = {"nodeSelectorTerms": [{"matchExpressions": [NO_SPOT]}]}


def test_what_no_node_fits_is_the_labels_and_the_affinity() -> None:
    """A spot node has every label of the selector: it is the affinity that rules it out."""
    pod = _unscheduled(f"0/2 nodes are available: {SELECTORS}.")
    rule = {"requiredDuringSchedulingIgnoredDuringExecution": AFFINITY}
    pod["spec"]["affinity"] = {"nodeAffinity": rule}
    answer = why(_facts(_job(), pod))
    assert "gke-accelerator=nvidia-h100-80gb and cloud.google.com/gke-spot DoesNotExist" in str(
        answer
    )
    assert "capacity" in answer.do


@pytest.mark.parametrize(
    ("taint", "cause"),
    [
        ("{team: other}", "taint"),
        ("{node-role.kubernetes.io/control-plane: }", "selector"),
        ("{node.kubernetes.io/unschedulable: }", "cordoned"),
    ],
)
def test_a_taint_beside_nodes_that_do_not_match_is_named(taint: str, cause: str) -> None:
    """The right node is the tainted one; a control plane's taint explains nothing."""
    said = f"0/3 nodes are available: 1 node(s) had untolerated taint {taint}, {SELECTORS}."
    answer = why(_facts(_job(), _unscheduled(f"{said} preemption: 0/3 nodes are available.")))
    assert answer.cause == cause
    assert taint in answer.what
    assert "preemption" not in answer.what


@pytest.mark.parametrize(("moved", "cause"), [("02:01", "selector"), ("02:03", "no-nodes")])
def test_the_schedulers_newest_word_wins(moved: str, cause: str) -> None:
    """A condition may stay as it was while events tell of the nodes that have come."""
    pod = _unscheduled("no nodes available to schedule pods")
    pod["status"]["conditions"][0]["lastTransitionTime"] = f"2026-11-22T{moved}:00Z"
    event = _event("FailedScheduling", f"0/2 nodes are available: {SELECTORS}.")
    assert why(_facts(_job(), pod, events=(event,))).cause == cause


def test_no_progress_is_explained_by_what_ended_the_attempts_before() -> None:
    """72 says that it goes nowhere; the pods before it say why."""
    job, last = _job(**FAILED), _ended(72)
    last["metadata"]["creationTimestamp"] = "2026-11-22T02:40:00Z"
    assert why(_facts(job, last, _ended(137, reason="OOMKilled"))).cause == "oom-killed"
    assert why(_facts(job, last, _ended(137))).cause == "exit-72"


UP = _event("TriggeredScaleUp", "pod triggered scale-up: [{h100 0->1 (max: 2)}]")
OUT = _event("FailedScaleUp", "Node scale up in zones z failed: GCE out of resources.")


def test_the_newest_word_of_an_autoscaler_counts() -> None:
    """Events are newest first: out of stock after it had tried is no node on its way."""
    waiting = _unscheduled(GPU)
    assert why(_facts(_job(), waiting, events=(UP, OUT))).cause == "scaling-up"
    answer = why(_facts(_job(), waiting, events=(OUT, UP)))
    assert answer.cause == "gpus"
    assert "the autoscaler adds none: Node scale up in zones z failed" in answer.what


def test_between_attempts_a_pod_that_is_refused_is_named() -> None:
    """The quota went to somebody else meanwhile; what was refused before the last pod is past."""
    full = _event("FailedCreate", "pods x is forbidden: exceeded quota: gpus, requested: 1")
    newer = full | {"lastTimestamp": "2026-11-22T02:40:00Z"}
    assert why(_facts(_job(), _ended(75), events=(newer,))).cause == "quota"
    assert why(_facts(_job(), _ended(75), events=(full,))).cause == "between"


def test_a_mount_that_has_passed_is_not_the_cause() -> None:
    """A kubelet pulls once the volumes are there."""
    failed = _event("FailedMount", "failed to sync configmap cache: timed out")
    pulling = _event("Pulling", "Pulling image")
    assert why(_facts(_job(), _pod(), events=(failed,))).cause == "volume"
    assert why(_facts(_job(), _pod(), events=(pulling, failed))).cause == "pulling"


def test_a_digest_is_no_status_code() -> None:
    """Neither are names that hold `denied`."""
    image = "registry.example/denied@sha256:aa403bb"
    pod = _waiting("ErrImagePull", f'failed to pull "{image}": {image}: not found')
    pod["spec"]["containers"][0]["image"] = image
    assert why(_facts(_job(), pod)).cause == "image-absent"
    pod = _waiting("ErrImagePull", "unexpected status code 403")
    assert why(_facts(_job(), pod)).cause == "image-denied"


def test_a_command_that_does_not_start_is_the_images_fault() -> None:
    """Code 128 is the runtime's; an attempt without a code vanished."""
    ended = _ended(128, reason="StartError", message='exec: "python": not found')
    answer = why(_facts(_job(**LIMIT), ended))
    assert (answer.cause, "exec:" in answer.what) == ("container", True)
    assert "None" not in str(why(_facts(_job(), _pod(phase="Failed"))))
