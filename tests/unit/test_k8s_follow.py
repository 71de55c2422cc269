"""Following a run over its attempts, with a cluster of our own making behind our own seam."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.errors import JobError
from job.stop import Stop
from k8s import cli, verb_submit, verbs
from k8s.logs import follow, show
from k8s.refusals import CutError

Object = dict[str, Any]

RUN = "night-1a2b3c4d"
WORD = json.dumps({"code": 79, "name": "gate refused", "what": "not better", "do": "look at it"})


class Scripted:  # answers as k8s.cluster.Cluster does
    """A cluster that lives through ``moments``: each is what there is at one time."""

    namespace = "lora-job"

    def __init__(self, *moments: Object) -> None:
        self.moments = list(moments)
        self.logs = {"first": [b"1 a\n", b"2 b\n"], "second": [b"3 c\n"]}

    @property
    def now(self) -> Object:
        """What there is."""
        return self.moments[0]

    def page(self, _kind: str, **_: Any) -> Object:
        """The Jobs."""
        jobs = [self.now["job"]] if self.now["job"] else []
        return {"items": jobs, "metadata": {"resourceVersion": "1"}}

    def watch(self, _kind: str, **_: Any) -> Iterator[Object]:
        """Time passes, and the connection breaks."""
        if len(self.moments) > 1:
            self.moments.pop(0)
        raise CutError("server", "was cut")
        yield {}

    def get(self, kind: str, name: str) -> Object | None:
        """The namespace, the Job, or a pod."""
        if kind == "Namespace":
            return {"metadata": {"name": name}}
        if kind == "Job":
            return self.now["job"]
        return next((it for it in self.now["pods"] if it["metadata"]["name"] == name), None)

    def list(self, kind: str, **_: Any) -> list[Object]:
        """All pods."""
        return self.now["pods"] if kind == "Pod" else []

    def log(self, pod: str, **_: Any) -> Iterator[bytes]:
        """All of a pod's log."""
        yield from (b"2026-11-22T02:00:00.00000000" + line for line in self.logs[pod])


def _job(kind: str = "") -> Object:
    condition = {"type": kind, "status": "True", "lastTransitionTime": "2026-11-22T02:30:00Z"}
    return {
        "metadata": {
            "name": RUN,
            "uid": "u",
            "creationTimestamp": "2026-11-22T02:00:00Z",
            "labels": {"app.kubernetes.io/name": "lora-job"},
        },
        "spec": {"template": {"spec": {"containers": [{}]}}},
        "status": {"conditions": [condition] if kind else []},
    }


def _pod(name: str, minute: int, code: int | None = None, message: str = "") -> Object:
    state: Object = {}
    if code is not None:
        times = {"startedAt": "2026-11-22T02:01:00Z", "finishedAt": "2026-11-22T02:20:00Z"}
        state = {"terminated": {"exitCode": code, "message": message, **times}}
    created = f"2026-11-22T02:{minute:02}:00Z"
    return {
        "metadata": {"name": name, "creationTimestamp": created},
        "spec": {"containers": [{"image": "x"}]},
        "status": {"phase": "Pending", "containerStatuses": [{"name": "job", "state": state}]},
    }


@pytest.fixture
def cluster() -> Scripted:
    first, second = _pod("first", 0, 75), _pod("second", 5, 79, WORD)
    return Scripted(
        {"job": _job(), "pods": []},
        {"job": _job(), "pods": [_pod("first", 0)]},
        {"job": _job(), "pods": [first]},
        {"job": _job(), "pods": [first, _pod("second", 5)]},
        {"job": _job("Failed"), "pods": [second, first]},
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stop, "wait", lambda self, _: self.check())


def test_all_attempts_in_order_each_once(cluster: Scripted) -> None:
    """The second attempt's log follows the first's; `waiting` is called in between only."""
    written: list[bytes] = []
    waits: list[int] = []
    follow(
        cluster,  # type: ignore[arg-type]
        RUN,
        written.append,
        Stop(),
        waiting=lambda: waits.append(len(written)),
    )
    assert written == [b"a\n", b"b\n", b"c\n"]
    assert set(waits) == {0, 2}


def test_a_run_that_does_not_exist_is_66(cluster: Scripted) -> None:
    """Not an endless wait."""
    cluster.moments = [{"job": None, "pods": []}]
    with pytest.raises(JobError, match="no such run") as caught:
        follow(cluster, RUN, lambda _: None, Stop(), waiting=lambda: None)  # type: ignore[arg-type]
    assert caught.value.code == 66


def test_submit_follow_ends_with_the_runs_own_code(
    cluster: Scripted, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log on stdout, the last words on stderr, the run's exit code."""
    arguments = argparse.Namespace(output="text")
    assert verb_submit._follow(cluster, RUN, "s3://b/p", arguments) == 79  # type: ignore[arg-type]
    said = capfd.readouterr()
    assert said.out == "a\nb\nc\n"
    assert "failed with 79: not better; look at it" in said.err


def test_ctrl_c_detaches_and_says_how_to_come_back(
    cluster: Scripted, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on: nothing is deleted, and the command to return is told."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("k8s.logs.follow", interrupted)
    assert verb_submit._follow(cluster, RUN, "s3://b/p", argparse.Namespace(output="text")) == 130  # type: ignore[arg-type]
    assert f"lora-job logs {RUN} -f -n lora-job" in capfd.readouterr().err


def test_the_log_begins_with_attempts_whose_pods_are_gone(
    cluster: Scripted, tmp_path: Path
) -> None:
    """A drained node takes its pods along; what they shipped stands before what is left."""
    job = _job()
    job["metadata"]["annotations"] = {"lora-job/store": str(tmp_path)}
    cluster.moments = [{"job": job, "pods": [_pod("second", 0, 75)]}]
    cluster.logs["second"] = [b"3 here\n", b'4 {"epoch": 2}\n']
    for epoch in (1, 2):
        kept = tmp_path / "_runs" / RUN / f"attempts/{epoch}/log-000.jsonl"
        kept.parent.mkdir(parents=True)
        kept.write_bytes(b"attempt %d\n" % epoch)
    written: list[bytes] = []
    show(cluster, RUN, written.append, store=None)  # type: ignore[arg-type]
    assert written == [b"attempt 1\n", b"here\n", b'{"epoch": 2}\n']


def test_a_run_that_neither_cluster_nor_store_knows_has_no_log(
    cluster: Scripted, tmp_path: Path
) -> None:
    """66, no such run; one that the store knows has only written none yet."""
    cluster.moments = [{"job": None, "pods": []}]
    for said in ("there is no such run", "no attempt has written a log yet"):
        with pytest.raises(JobError, match=said) as caught:
            show(cluster, RUN, print, store=str(tmp_path))  # type: ignore[arg-type]
        assert caught.value.code == 66
        head = tmp_path / "_runs" / RUN / "head.json"
        head.parent.mkdir(parents=True, exist_ok=True)
        head.write_text(json.dumps({"epoch": 1, "state": "running"}))


@pytest.mark.parametrize(("raised", "code"), [(None, 124), (KeyboardInterrupt, 130)])
def test_a_wait_that_ends_before_the_run_has_codes_of_its_own(
    cluster: Scripted, monkeypatch: pytest.MonkeyPatch, raised: type | None, code: int
) -> None:
    """124 once the time is over, 130 after Ctrl-C; the server is not asked to watch for longer."""
    watched: list[int] = []

    def watch(_kind: str, *, seconds: int, **_: Any) -> Iterator[Object]:
        watched.append(seconds)
        if raised:
            raise raised
        yield from ()

    cluster.moments = [{"job": _job(), "pods": []}]
    monkeypatch.setattr(cluster, "watch", watch)
    monkeypatch.setattr(verbs, "open_cluster", lambda _: cluster)
    assert cli.main(["wait", RUN, "--timeout", "0.2"]) == code
    assert set(watched) == {1}


@pytest.mark.parametrize("words", [[], ["--now"]])
def test_a_cancel_tells_a_program_too(
    cluster: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    """JSON on stdout, words on stderr."""
    cluster.moments = [{"job": _job(), "pods": []}]
    for deed in ("patch", "delete"):
        monkeypatch.setattr(cluster, deed, lambda *_, **__: {}, raising=False)
    monkeypatch.setattr(verbs, "open_cluster", lambda _: cluster)
    assert cli.main(["cancel", RUN, "-o", "json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"run": RUN, "outcome": "cancelled", "checkpoint": None}


def test_the_log_of_a_silent_node_comes_from_the_store(
    cluster: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its kubelet can't be asked; the copy that the attempt shipped is whole up to a minute ago."""
    job = _job()
    job["metadata"]["annotations"] = {"lora-job/store": str(tmp_path)}
    cluster.moments = [{"job": job, "pods": [_pod("first", 0, 75)]}]
    kept = tmp_path / "_runs" / RUN / "attempts/1/log-000.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"1 a\n")
    written: list[bytes] = []
    show(cluster, RUN, written.append, store=None)  # type: ignore[arg-type]
    assert written == [b"a\n", b"b\n"]

    def silent(*_: Any, **__: Any) -> Iterator[bytes]:
        raise CutError("server", "no route to the kubelet")

    monkeypatch.setattr(cluster, "log", silent)
    written.clear()
    show(cluster, RUN, written.append, store=None)  # type: ignore[arg-type]
    assert written == [b"1 a\n"]


@pytest.mark.parametrize("words", [["cancel", RUN], ["cancel", RUN, "--now"]])
def test_a_cancel_leaves_somebody_elses_job_alone(
    cluster: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    """73, and nothing is asked of the server."""
    theirs = _job()
    theirs["metadata"]["labels"] = {"app": "billing"}
    cluster.moments = [{"job": theirs, "pods": []}]
    monkeypatch.setattr(verbs, "open_cluster", lambda _: cluster)
    assert cli.main(words) == 73
    assert "it is not lora-job's" in capsys.readouterr().err


def test_a_server_that_is_away_for_a_moment_does_not_end_following(
    cluster: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run waits, `why` is asked again."""
    away = [CutError("server", "429")]
    whole = cluster.list

    def list_(kind: str, **query: Any) -> list[Object]:
        if kind == "Event" and away:
            raise away.pop()
        return whole(kind, **query)

    monkeypatch.setattr(cluster, "list", list_)
    arguments: Any = argparse.Namespace(output="text")
    assert verb_submit._follow(cluster, RUN, "s3://b/p", arguments) == 79  # type: ignore[arg-type]
    assert not away
