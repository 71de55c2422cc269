"""A run is put together from whatever is left of it: Job, pods, last words, store."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k8s.facts import Facts
from k8s.runs import assemble
from k8s.status import print_list, print_status, span
from k8s.stored import Stored, impatient
from k8s.why import why

Object = dict[str, Any]

START = 1_795_312_800.0  # 2026-11-22T02:00:00Z
RUN = "night-1a2b3c4d"


def _job(*conditions: Object) -> Object:
    container = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    return {
        "metadata": {
            "name": RUN,
            "namespace": "lora-job",
            "creationTimestamp": "2026-11-22T02:00:00Z",
            "annotations": {
                "lora-job/store": "s3://models/adapters",
                "lora-job/price-per-gpu-hour": "3",
            },
        },
        "spec": {"template": {"spec": {"containers": [container]}}},
        "status": {"conditions": list(conditions)},
    }


def _pod(name: str, minute: int, state: Object, phase: str = "Running") -> Object:
    created = f"2026-11-22T02:{minute:02}:00Z"
    return {
        "metadata": {"name": name, "creationTimestamp": created},
        "spec": {"nodeName": "node-7"},
        "status": {"phase": phase, "containerStatuses": [{"name": "job", "state": state}]},
    }


def _ended(code: int, begin: int, end: int, message: str = "", reason: str = "Error") -> Object:
    times = {"startedAt": _at(begin), "finishedAt": _at(end)}
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, **times}}


def _at(minute: int) -> str:
    return f"2026-11-22T02:{minute:02}:00Z"


HEAD = {
    "epoch": 2,
    "started": START,
    "state": "running",
    "heartbeat": START + 1750,
    "checkpoint": {"step": 40, "epoch": 1},
    "progress": {
        "stage": "train",
        "step": 52,
        "num_steps": 120,
        "loss": 1.2345,
        "tokens_per_s": 8123.4,
        "eta_s": 754,
    },
    "ends": [{"epoch": 1, "code": 75, "stage": "train", "step": 40}],
}
FIRST_END = {
    "epoch": 1,
    "code": 75,
    "name": "preempted",
    "what": "stopped by SIGTERM",
    "do": "start it again",
    "started": _at(1),
    "ended": _at(11),
}


def test_a_running_second_attempt_on_one_screen() -> None:
    """State, stage, step, loss, speed, ETA, attempt, why the last one ended, hours, cost."""
    running = _pod("p2", 12, {"running": {"startedAt": _at(12)}})
    run = assemble(RUN, _job(), [running], Stored(HEAD, (FIRST_END,)), now=START + 1800)
    out = io.StringIO()
    print_status(run, out, now=START + 1800)
    text = out.getvalue()
    for part in (
        "running for 30 min",
        "train",
        "52 of 120, loss 1.2345, 8,123 tokens/s",
        "12 min 34 s",
        "step 40",
        "2, pod p2 on node-7",
        "75 preempted: stopped by SIGTERM; start it again",
    ):
        assert part in text, text
    # Ten minutes of the first attempt and eighteen of this one, on two GPUs, at 3 an hour.
    assert run.gpu_hours == round(2 * 28 / 60, 3)
    assert run.cost == round(run.gpu_hours * 3, 2)


def test_after_the_pods_the_store_still_tells() -> None:
    """A finished Job without pods: code and receipt come from the store."""
    receipt = {"uri": "s3://models/adapters/night/versions/v", "channel": None}
    head = {**HEAD, "state": "published:v", "ends": [{"epoch": 2, "code": 0}]}
    end = {**FIRST_END, "epoch": 2, "code": 0, "started": _at(12), "ended": _at(30)}
    done = {"type": "Complete", "status": "True", "lastTransitionTime": _at(31)}
    for job in (_job(done), None):
        run = assemble(RUN, job, [], Stored(head, (FIRST_END, end), receipt), now=START + 9000)
        assert (run.state, run.code, run.receipt) == ("succeeded", 0, receipt)
        assert run.ended is not None
        json.dumps(run.as_json())


def test_without_a_store_the_pods_tell() -> None:
    """The termination message of the newest pod is the last end; else what the kubelet saw."""
    word = json.dumps({"code": 65, "name": "data refused", "what": "row 3", "do": "mend it"})
    first = _pod("p1", 0, _ended(137, 1, 5, reason="OOMKilled"), "Failed")
    last = _pod("p2", 6, _ended(65, 6, 9, message=word), "Failed")
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": _at(10)}
    run = assemble(RUN, _job(failed), [last, first], Stored(), now=START + 900)
    assert (run.state, run.code, run.number) == ("failed", 65, 2)
    only = assemble(RUN, _job(failed), [first], Stored(), now=START + 900)
    assert only.last_end is not None
    assert (only.code, only.last_end["reason"]) == (137, "OOMKilled")


def test_a_store_word_of_an_earlier_attempt_is_not_the_last_pods() -> None:
    """A pod killed without a word is not explained by the attempt before it."""
    killed = _pod("p2", 12, _ended(137, 12, 20, reason="OOMKilled"), "Failed")
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": _at(21)}
    run = assemble(RUN, _job(failed), [killed], Stored(HEAD, (FIRST_END,)), now=START + 1800)
    assert run.code == 137


def test_a_run_whose_job_is_gone_is_running_unknown_or_failed_by_its_head() -> None:
    """A fresh heartbeat means it runs somewhere; an old one means nobody knows."""
    states = {}
    for now in (START + 1800, START + 9000):
        states[now] = assemble(RUN, None, [], Stored(HEAD), now=now).state
    assert list(states.values()) == ["running", "unknown"]
    ended = assemble(RUN, None, [], Stored({**HEAD, "state": "ended"}, (FIRST_END,)), now=START)
    assert (ended.state, ended.code) == ("failed", 75)


def test_a_list_has_a_line_a_run() -> None:
    """Columns line up, and a run without pods is no error."""
    out = io.StringIO()
    run = assemble(RUN, _job(), [], Stored(), now=START + 60)
    print_list([run, run], out, now=START + 60)
    header, first, second = out.getvalue().splitlines()
    assert header.startswith("RUN")
    assert first == second
    assert "pending" in first
    assert first.index("pending") == header.index("STATE")


def test_spans_are_said_as_people_say_them() -> None:
    """Seconds, minutes, hours, days."""
    said = [span(it) for it in (None, 5, 65, 3900, 200_000)]
    assert said == ["-", "5 s", "1 min 05 s", "1 h 05 min", "2 d 7 h"]


def test_a_store_that_does_not_answer_is_given_up_soon() -> None:
    """The store's own 20 minutes of retries are not a person's."""
    from job.errors import JobError

    with pytest.raises(JobError) as caught:
        impatient(lambda stop: stop.wait(60), seconds=0.05)
    assert caught.value.code == 74


def test_the_store_is_read_as_runs_write_it(tmp_path: Path) -> None:
    """An attempt that stopped, one that vanished, one that runs: as job.store.runs leaves them."""
    from job.progress import Progress
    from job.stop import Stop
    from job.store.folder import FolderStore
    from job.store.runs import take
    from k8s.stored import read_logs, read_run

    def attempt(record: dict[str, Any] | None) -> None:
        stop, progress = Stop(), Progress()
        progress.enter("train")
        progress.update(step=7, num_steps=20)
        store = FolderStore(tmp_path, stop=stop)
        taken = take(store, RUN, owner="uid", job_text=b"", stop=stop, progress=progress)
        taken.put("log-000.jsonl", b'{"event": "%d"}\n' % taken.epoch)
        if record is not None:
            taken.end({"epoch": taken.epoch, **record})

    attempt({"code": 75, "what": "stopped", "stage": "train", "step": 7})
    attempt(None)
    stored = read_run(str(tmp_path), RUN)
    assert (stored.head["epoch"], [it["code"] for it in stored.exits]) == (2, [75])
    run = assemble(RUN, None, [], stored, now=stored.head["heartbeat"])
    assert (run.state, run.progress["step"], run.progress["num_steps"]) == ("running", 7, 20)
    attempt({"code": 70, "what": "not proven", "stage": "merge", "step": 20})
    ended = assemble(RUN, None, [], read_run(str(tmp_path), RUN), now=START)
    assert (ended.state, ended.code, ended.number) == ("failed", 70, 3)
    lines = [b'{"event": "%d"}\n' % epoch for epoch in (1, 2, 3)]
    assert read_logs(str(tmp_path), RUN, False, None) == lines
    assert read_logs(str(tmp_path), RUN, False, 3) == lines[:2]
    assert read_run(str(tmp_path), "another") == Stored()


def test_an_attempt_that_vanished_is_not_explained_by_the_one_before() -> None:
    """The head knows that it ended, and that nobody knows how."""
    ends = [*HEAD["ends"], {"epoch": 2, "code": None, "stage": "merge", "step": 120}]
    run = assemble(RUN, None, [], Stored({**HEAD, "ends": ends}, (FIRST_END,)), now=START)
    assert run.last_end is not None
    assert run.last_end["what"] == "vanished without a word in stage merge, step 120"


def test_an_attempt_killed_while_it_was_saving_names_its_grace_period() -> None:
    """It had been asked to end, and there was no last word: SIGKILL came first."""
    end = {"epoch": 2, "code": None, "stage": "train", "step": 50, "stopping": True}
    run = assemble(RUN, None, [], Stored({**HEAD, "ends": [end]}), now=START)
    assert run.last_end is not None
    assert run.last_end["what"].startswith("was asked to end in stage train, step 50, and killed")
    assert "grace_period_s" in run.last_end["do"]
    answer = why(Facts(replace(run, state="running"), job=_job()))
    assert "the attempt before was asked to end" in answer.what
    assert "grace_period_s" in answer.do


def test_status_needs_no_kubeconfig_if_the_store_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Job is gone, and so may be the cluster: the store remembers the run; 66 without it."""
    from k8s import cli

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (tmp_path / "_runs" / RUN).mkdir(parents=True)
    (tmp_path / "_runs" / RUN / "head.json").write_text(json.dumps({**HEAD, "state": "ended"}))
    words = ["status", RUN, "--store"]
    assert cli.main([*words, str(tmp_path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == RUN
    assert cli.main([*words, str(tmp_path / "another")]) == 66
    assert "there is no kubeconfig" in capsys.readouterr().err
