"""A run's head: who may take it next, and when taking it again is no use any more."""

from __future__ import annotations

import copy
import math
import re
import secrets
from typing import Any

from job.errors import ExitCode, JobError
from job.progress import Progress

Head = dict[str, Any]

STALE_S, SURE_S, SKEW_S = 5 * 60.0, 90.0, 20 * 60.0
"""How old a heartbeat is if its owner is dead, how long that is looked at before it is believed
(more than one beat), and what two machines' clocks may differ by."""
MAX_ATTEMPTS, MAX_VANISHED = 5, 2
ENDS_KEPT = 100


def run_folder(run_id: str) -> str:
    """Return the store's folder of a run."""
    if not re.fullmatch(r"[a-z0-9A-Z]([-._a-zA-Z0-9]{0,120})", run_id):
        what = "is no name for a run"
        raise JobError(ExitCode.USAGE, run_id, what, "use letters, digits, - and _")
    return f"_runs/{run_id}"


def next_head(head: Head | None, run_id: str, owner: str, now: float) -> Head:
    """Return the head of the next attempt after the one in ``head``, if there may be one."""
    if head is None:
        head = {"seq": 0, "epoch": 0, "started": now, "checkpoint": None, "previous": None}
        head |= {"ends": [], "state": "running", "receipt": None}
    else:
        head = copy.deepcopy(head)
        if not _ended(head):
            last = head.get("progress", {})
            place = {"stage": last.get("stage"), "step": last.get("step")}
            add_end(head, code=None, **place, stopping=head.get("stopping"))
        _require_progress(head, run_id, owner)
    if not head["state"].startswith("published:"):
        head["state"] = "running"
    head["seq"] += 1
    head["epoch"] += 1
    head |= {"owner": owner, "heartbeat": now, "nonce": secrets.token_hex(8)}
    return head | {"stopping": False}


def _ended(head: Head) -> bool:
    return any(end["epoch"] == head["epoch"] for end in head["ends"])


def add_end(head: Head, *, code: int | None, **figures: Any) -> None:
    """Note how and where the head's own attempt ended; a ``code`` of None: without a word.

    ``stopping``: it had been asked to end, and was killed before its checkpoint was durable.
    """
    end = {"epoch": head["epoch"], "owner": head["owner"], "code": code}
    head["ends"] = [*head["ends"], end | figures][-ENDS_KEPT:]


def silence_s(head: Head, owner: str, now: float) -> float:
    """Return for how long a head must not move before ``owner`` may take it; 0 if it may at once."""
    age_s = now - head["heartbeat"]
    if head["owner"] == owner or _ended(head) or age_s > SKEW_S:
        return 0.0
    return min(STALE_S, max(STALE_S - age_s, SURE_S))


def taken(head: Head, run_id: str, now: float) -> JobError:
    """Return the refusal of a run that somebody else works on."""
    age_s = max(0, now - head["heartbeat"])
    what = f"owner {head['owner']} works on it (heartbeat {age_s:.0f} s ago)"
    return JobError(ExitCode.TAKEN, run_id, what, "wait for it, or end it")


def _require_progress(head: Head, run_id: str, owner: str) -> None:
    """Raise 72 if this owner's attempts come and go. A new owner is somebody's new decision."""
    if head["state"].startswith("published:"):
        return
    since = head["checkpoint"]["epoch"] if head["checkpoint"] else 0
    ends = [end for end in head["ends"] if end["owner"] == owner and end["epoch"] > since]
    last = ends[-MAX_VANISHED:]
    # Before its first step an attempt knows of none.
    places = {(end["code"], end["stage"], end["step"] or 0) for end in last}
    same = len(last) == MAX_VANISHED and len(places) == 1
    # At "start" nothing is known of the place: pods that were started at once look like this too.
    # Who was asked to end was taken away by somebody, and no place's fault.
    vanished = same and last[0]["code"] is None and last[0]["stage"] != "start"
    if vanished and not any(end.get("stopping") for end in last):
        what = (
            f"{MAX_VANISHED} attempts vanished without a word in stage {last[0]['stage']}, "
            f"step {last[0]['step']} (out of memory?)"
        )
        do = "see the pods' last state; give it more memory, or a smaller batch_size"
        raise JobError(ExitCode.NO_PROGRESS, run_id, what, do)
    if len(ends) >= MAX_ATTEMPTS:
        codes = ", ".join(str(end["code"] or "vanished") for end in ends[-MAX_ATTEMPTS:])
        what = f"{len(ends)} attempts made no newer checkpoint (ended with {codes})"
        do = "see their exit.json, mend the cause, and submit with --new"
        raise JobError(ExitCode.NO_PROGRESS, run_id, what, do)


def figures_of(progress: Progress) -> dict[str, Any]:
    """Return the progress as JSON can hold it: a loss may well be NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in progress.snapshot().items()
        if isinstance(value, str | int | float | None)
    }
