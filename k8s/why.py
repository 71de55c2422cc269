"""Why is it not running, or why did it fail: a table of causes, and one plain answer with its mend.

Each cause looks at the facts and answers or passes. The first that answers is the answer, so the
table goes from what is certain (it is over) to what is likely.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from job.errors import TABLE, ExitCode
from k8s import pending
from k8s.facts import WAIT, Answer, Facts
from k8s.render import QUEUE, Object
from k8s.runs import condition, container

MORE_MEMORY = "raise memory in the cluster file (shm_size is a part of it)"
RESUME = "submit again to resume it, or cancel it"
NO_PROGRESS = int(ExitCode.NO_PROGRESS)


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
    last = _culprit(facts)
    if last is None or _terminated(last).get("reason") != "OOMKilled":
        return None
    memory = _limit(last, "memory")
    what = f"the kernel killed it at its memory limit of {memory}"
    return Answer("oom-killed", what, _anew(facts, MORE_MEMORY))


def _anew(facts: Facts, mend: str) -> str:
    if facts.run.is_over:
        return f"{mend}, then submit again"
    return f"{mend}, cancel it and submit again: the next attempt meets the same limit"


def _evicted(facts: Facts) -> Answer | None:
    last = _culprit(facts)
    if last is None or last["status"].get("reason") != "Evicted":
        return None
    message = " ".join(str(last["status"].get("message", "")).split())
    disk = _limit(last, "ephemeral-storage")
    mend = (
        f"raise ephemeral_storage in the cluster file ({disk} now; `lora-job check` estimates it)"
    )
    do = _anew(facts, mend)
    # Else its node was short of something, and it goes on where there is room.
    if not re.search(r"exceed.* limit", message):
        do = "submit again: it goes on from its checkpoint" if facts.run.is_over else WAIT
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
    if code == 128:
        return pending.cannot_start(said)
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
        return Answer(
            "kueue-inactive", "its Workload was set inactive (a cancel, or Kueue)", RESUME
        )
    for kind in ("Evicted", "QuotaReserved", "Admitted"):
        found = _workload_condition(facts.workload, kind, "True" if kind == "Evicted" else "False")
        if found:
            return _not_admitted(queue, str(found.get("reason")), str(found.get("message")))
    return Answer("kueue-waiting", f"it waits in queue {queue}", WAIT)


def _not_admitted(queue: str, reason: str, said: str) -> Answer:
    what = f"queue {queue}: {said or reason}"
    if reason in ("Inadmissible", "Misconfigured", "Suspended"):
        do = "see that queue, ClusterQueue and flavors are there and active: it starts by itself"
        return Answer("kueue-inadmissible", what, do)
    if reason == "Preempted":
        do = f"{WAIT} when quota is free, and goes on from its checkpoint"
        return Answer("kueue-preempted", what, do)
    if "maximum capacity" in said:
        do = "it can't start so: ask for less in the cluster file, or for more quota"
        return Answer("kueue-quota", what, do)
    do = f"{WAIT} when quota is free; or ask for less, or more quota"
    return Answer("kueue-quota", what, do)


def _workload_condition(workload: Object, kind: str, status: str) -> Object | None:
    found = workload.get("status", {}).get("conditions") or []
    return next((it for it in found if it["type"] == kind and it["status"] == status), None)


def _suspended(facts: Facts) -> Answer | None:
    if facts.run.state != "suspended":
        return None
    return Answer("suspended", "somebody suspended the Job", RESUME)


def _running(facts: Facts) -> Answer | None:
    if facts.run.state != "running":
        return None
    stage = facts.run.progress.get("stage", "start")
    last = facts.run.last_end or {}
    code = f" ended with {last['code']}:" if last.get("code") is not None else ""
    before = f"; the attempt before{code} {last.get('what')}" if last else ""
    do = str(last["do"]) if last.get("name") == "killed" else "wait"
    do = _anew(facts, MORE_MEMORY) if last.get("reason") == "OOMKilled" else do
    return Answer("running", f"it runs, attempt {facts.run.number}, stage {stage}{before}", do)


def _ending(facts: Facts) -> Answer | None:
    if facts.run.state != "ending":
        return None
    return Answer("ending", "the Job is being deleted", "wait; submit again to start it anew")


def _gone(facts: Facts) -> Answer | None:
    if facts.job is not None:
        return None
    what = "its Job is gone, and its heartbeat in the store has stopped"
    return Answer("gone", what, "submit again: it goes on from its checkpoint")


def _culprit(facts: Facts) -> Object | None:
    """Return the newest pod, past one that only said that this goes nowhere (72).

    None of a run that goes on, or that went well.
    """
    pods = facts.pods if facts.run.state in ("failed", "pending") else []
    return next((it for it in pods if _terminated(it).get("exitCode") != NO_PROGRESS), None)


def _terminated(pod: Object) -> Object:
    found: Object = container(pod).get("state", {}).get("terminated", {})
    return found


def _limit(pod: Object, resource: str) -> str:
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return str(limits.get(resource, "none"))


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
    pending.node_lost,
    pending.refused_pod,
    pending.leaving,
    pending.container_waits,
    pending.volume,
    pending.unscheduled,
    pending.starting,
    _running,
    _gone,
)
