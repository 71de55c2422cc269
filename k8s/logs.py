"""A run's log, over pods that come and go and connections that break: no line doubled, none lost."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import structlog

from job.errors import ExitCode, JobError
from job.stop import Stop
from k8s.cluster import Cluster
from k8s.refusals import CutError, NotFoundError
from k8s.render import SINGLE_WRITER, STORE, Object
from k8s.runs import condition, container, missing, observe
from k8s.stored import read_logs, read_run
from k8s.watch import changes, until

log = structlog.get_logger()

Write = Callable[[bytes], None]

POLL_S = 20
EPOCH = re.compile(rb'"epoch": ?(\d+)')


class Position:
    """How far a pod's log was read.

    The server can only be asked for whole seconds, and two streams of a container may be written
    a little out of order. So the lines of the last seconds are remembered, asked for again, and
    each is skipped as often as it was seen.
    """

    def __init__(self) -> None:
        self._recent: deque[bytes] = deque()
        self._second = b""
        self._since = ""

    @property
    def query(self) -> dict[str, str]:
        """What to ask the server for, to go on from here."""
        return {"timestamps": "true", **({"sinceTime": self._since} if self._since else {})}

    def unseen(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the lines that were not seen before, their timestamps taken off."""
        again = Counter(self._recent)
        for line in lines:
            if again[line]:
                again[line] -= 1
            elif line.endswith(b"\n"):
                self._remember(line)
                yield line.partition(b" ")[2]
            else:
                # Half a line: the connection was cut here, or the container ended without a newline.
                self.rest = line.partition(b" ")[2]
                return

    rest = b""

    def _remember(self, line: bytes) -> None:
        second = line[:19]
        if second > self._second:
            self._second = second
            before = datetime.fromisoformat(second.decode()) - timedelta(seconds=2)
            self._since = f"{before.isoformat()}Z"
            oldest = before.isoformat().encode()
            while self._recent and self._recent[0][:19] < oldest:
                self._recent.popleft()
        self._recent.append(line)


def stream(cluster: Cluster, pod: str, write: Write, stop: Stop) -> None:
    """Write a pod's log to its end, from wherever the connection breaks."""
    position = Position()
    while True:
        position.rest = b""
        try:
            _copy(cluster.log(pod, follow="true", **position.query), position, write)
        except NotFoundError:
            return
        except JobError as error:
            if error.code not in (ExitCode.STORE, ExitCode.NOT_ALLOWED):
                raise
            # Asking for the pod tells whether it has passed.
            stop.wait(0.5)
        found = until(lambda: cluster.get("Pod", pod), wait=stop.wait, allowed_before=True)
        if found is None:
            return
        if has_ended(found):
            _finish(cluster, pod, position, write, stop)
            return
        stop.wait(0.5)


def _finish(cluster: Cluster, pod: str, position: Position, write: Write, stop: Stop) -> None:
    def rest() -> None:
        position.rest = b""
        _copy(cluster.log(pod, **position.query), position, write)

    try:
        until(rest, wait=stop.wait, allowed_before=True, away_s=30.0)
    except (CutError, NotFoundError) as error:
        # Its node is gone, say. The attempt's own copy of the log is in the store.
        log.warning("log_cut_short", pod=pod, reason=str(error))
        return
    if position.rest:
        write(position.rest + b"\n")


def _copy(lines: Iterator[bytes], position: Position, write: Write) -> None:
    for line in position.unseen(lines):
        write(line)


def has_ended(pod: Object) -> bool:
    """Return whether nothing will be added to a pod's log."""
    over = pod["status"].get("phase") in ("Succeeded", "Failed")
    return over or "terminated" in container(pod).get("state", {})


def has_begun(pod: Object) -> bool:
    """Return whether a pod has a log."""
    return bool({"running", "terminated"} & set(container(pod).get("state", {})))


def follow(
    cluster: Cluster, name: str, write: Write, stop: Stop, *, waiting: Callable[[], None]
) -> None:
    """Write the logs of all attempts until the run is over; ``waiting`` is called while none runs.

    Raises:
        JobError: 66 if there is no such run.
    """
    done: set[str] = set()
    known = False
    selector = f"metadata.name={name}"
    for jobs in changes(cluster, "Job", wait=stop.wait, seconds=POLL_S, fieldSelector=selector):
        if not jobs and not known:
            raise missing(cluster, name)
        known = True
        _, pods = until(lambda: observe(cluster, name), wait=stop.wait, allowed_before=True)
        fresh = [pod for pod in in_order(pods) if pod["metadata"]["name"] not in done]
        for pod in filter(has_begun, fresh):
            stream(cluster, pod["metadata"]["name"], write, stop)
            done.add(pod["metadata"]["name"])
        if not jobs or condition(jobs[0], "Complete") or condition(jobs[0], "Failed"):
            return
        if not any(map(has_begun, fresh)):
            waiting()


def in_order(pods: list[Object]) -> list[Object]:
    """Return pods, oldest first."""
    return sorted(
        pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"])
    )


def show(cluster: Cluster, name: str, write: Write, *, store: str | None) -> None:
    """Write a run's log: the store's copy of attempts whose pods are gone, then what pods say.

    Raises:
        JobError: 66 if there is no such run, or no log of it.
    """
    job, pods = observe(cluster, name)
    lines: list[bytes] = []
    try:
        for pod in filter(has_begun, in_order(pods)):
            position = Position()
            _copy(cluster.log(pod["metadata"]["name"], **position.query), position, lines.append)
            lines += [position.rest + b"\n"] if position.rest else []
    except (CutError, NotFoundError):
        # Its node is silent, or the pod has just gone: the store has a copy.
        lines = []
    annotations = (job or {}).get("metadata", {}).get("annotations") or {}
    uri = annotations.get(STORE) or store
    if job is None and uri is None:
        raise missing(cluster, name)
    first = next(filter(None, map(EPOCH.search, lines)), None)
    # Pods that don't say which attempt they are have only just begun.
    before = int(first[1]) if first else 0 if lines else None
    try:
        stored = read_logs(uri, name, SINGLE_WRITER in annotations, before) if uri else []
    except (JobError, ModuleNotFoundError) as error:
        if not lines:
            raise
        log.warning("earlier_attempts_not_read", reason=str(error))
        stored = []
    if not lines and not stored:
        if job is None and uri and not read_run(uri, name).head:
            raise missing(cluster, name, looked_in_store=True)
        do = f"see `lora-job why {name}`"
        raise JobError(ExitCode.NOT_FOUND, name, "no attempt has written a log yet", do)
    for line in [*stored, *lines]:
        write(line)
