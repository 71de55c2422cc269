"""Runs: epochs, fences, owners, checkpoints, and when trying again is no use. On a folder."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.artifacts import Receipt
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop, preempted
from job.store import heads, open_store, runs
from job.store.runs import Attempt, take

RUN = "demo-0123abcd"


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Bench:
    """A store in a folder, a clock, and attempts to take."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.attempts: list[Attempt] = []

    def take(self, owner: str = "me", run: str = RUN, **figures: Any) -> Attempt:
        """Take the run's next attempt, whose progress begins with ``figures``."""
        stop, progress = Stop(), Progress()
        progress.update(**figures)
        store = open_store(str(self.folder), stop=stop)
        attempt = take(
            store,
            run,
            owner=owner,
            job_text=b"name: demo\n",
            stop=stop,
            progress=progress,
            clock=self.clock,
        )
        self.attempts.append(attempt)
        return attempt

    def head(self, run: str = RUN) -> dict[str, Any]:
        """Return head.json."""
        head: dict[str, Any] = json.loads((self.folder / f"_runs/{run}/head.json").read_bytes())
        return head

    def vanish(self, attempt: Attempt) -> None:
        """Let an attempt's heartbeat die, as with its process."""
        attempt._ending.request(preempted("SIGKILL"))
        attempt._beats.join()

    def close(self) -> None:
        """End every heartbeat."""
        for attempt in self.attempts:
            self.vanish(attempt)


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    made = Bench(tmp_path / "store")
    yield made
    made.close()


def a_checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(text.encode() * 100)
    (folder / "state.json").write_text(json.dumps({"text": text}))
    return folder


def code_of(error: pytest.ExceptionInfo[JobError]) -> ExitCode:
    return error.value.code


def record(code: int, **more: Any) -> dict[str, Any]:
    return {"run": RUN, "code": code, "stage": "train", "step": 1, **more}


def test_the_same_owner_takes_over_at_once(bench: Bench, tmp_path: Path) -> None:
    """A new pod of the same Job takes the next epoch; the old one is fenced when it wakes (76)."""
    zombie = bench.take()
    zombie.save_checkpoint(a_checkpoint(tmp_path / "c", "old"), 10)
    heir = bench.take()
    assert (zombie.epoch, heir.epoch) == (1, 2)
    assert heir.checkpoint_step == 10
    with pytest.raises(JobError) as caught:
        zombie.save_checkpoint(a_checkpoint(tmp_path / "c", "late"), 20)
    assert code_of(caught) is ExitCode.FENCED
    with pytest.raises(JobError) as caught:
        zombie._stop.check()
    assert code_of(caught) is ExitCode.FENCED
    zombie.end(record(76))
    assert bench.head()["checkpoint"] == {"step": 10, "epoch": 1}
    assert bench.head()["epoch"] == 2
    assert (bench.folder / f"_runs/{RUN}/attempts/1/exit.json").exists()


def test_a_zombie_can_not_publish(bench: Bench) -> None:
    """Neither publishing nor published gets past a newer attempt."""
    zombie = bench.take()
    bench.take()
    for act in (lambda: zombie.publishing("v"), lambda: zombie.published(a_receipt())):
        with pytest.raises(JobError) as caught:
            act()
        assert code_of(caught) is ExitCode.FENCED
    assert not (bench.folder / f"_runs/{RUN}/receipt.json").exists()


def test_a_zombie_deletes_nothing_of_its_heir(bench: Bench, tmp_path: Path) -> None:
    """A zombie that passed its swap and sleeps before its clean-up spares newer epochs."""
    zombie = bench.take()
    for step in (1, 2):
        zombie.save_checkpoint(a_checkpoint(tmp_path / "c", str(step)), step)
    heir = bench.take()
    for step in (3, 4):
        heir.save_checkpoint(a_checkpoint(tmp_path / "c", str(step)), step)
    zombie._forget_checkpoints()
    assert heir.restore_checkpoint(tmp_path / "back") == 4


def test_a_living_foreign_owner_keeps_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner waits for a sign of life, and is refused (73) once there is one."""
    monkeypatch.setattr(runs, "LOOK_S", 0.01)
    monkeypatch.setattr(runs, "SIGN_S", 0.01)
    bench.take("one")
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(bench.take, "two")
        bench.clock.now += 61  # time for one's heartbeat
        assert isinstance(error := refused.exception(30), JobError)
    assert error.code is ExitCode.TAKEN
    assert bench.head()["owner"] == "one"


def test_a_foreign_owner_that_died_without_a_word_is_waited_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ran out, it was submitted anew with more: the run goes on, it is not refused."""
    monkeypatch.setattr(runs, "SIGN_S", 0.01)
    monkeypatch.setattr(heads, "STALE_S", 0.3)
    bench.vanish(bench.take("one"))
    with ThreadPoolExecutor(1) as pool:
        heir = pool.submit(bench.take, "two")
        with pytest.raises(TimeoutError):
            heir.result(0.1)
        assert heir.result(30).epoch == 2
    assert bench.head()["owner"] == "two"


@pytest.mark.parametrize("skew_s", [-400, 3600])
def test_clocks_of_two_machines_prove_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    """A beat that looks old is looked for; one from the future is waited for no longer than others."""
    for name in ("SIGN_S", "LOOK_S"):
        monkeypatch.setattr(runs, name, 0.01)
    monkeypatch.setattr(heads, "STALE_S", 0.2)
    monkeypatch.setattr(heads, "SURE_S", 0.2)
    bench.clock.now += skew_s
    dead = bench.take("one")
    bench.vanish(dead)
    bench.clock.now -= skew_s
    assert bench.take("two").epoch == 2

    monkeypatch.setattr(heads, "SURE_S", 20.0)
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.0)
    bench.take("two", stage="train")
    bench.clock.now += 400
    with pytest.raises(JobError) as caught:
        bench.take("three")
    assert code_of(caught) is ExitCode.TAKEN


def test_an_owner_that_is_ending_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last swaps are no sign that it goes on: a submit right after a cancel gets the run."""
    for name in ("SIGN_S", "LOOK_S", "HEARTBEAT_S"):
        monkeypatch.setattr(runs, name, 0.01)
    ending = bench.take("one")
    ending._stop.request(preempted("SIGTERM"))
    wait_for(lambda: bench.head()["stopping"])
    with ThreadPoolExecutor(1) as pool:
        heir = pool.submit(bench.take, "two")
        with pytest.raises(TimeoutError):
            heir.result(0.2)
        ending.end(record(75))
        assert heir.result(30).epoch == 2


def test_two_that_were_taken_away_while_they_loaded_are_no_dead_end(bench: Bench) -> None:
    """A spot notice ended them before their first step: somebody asked, no memory ran out."""
    for _ in range(2):
        attempt = bench.take(stage="train")
        attempt._stop.request(preempted("SIGTERM"))
        attempt._swap(attempt._lasting, lambda _: None)
        bench.vanish(attempt)
    assert bench.take().epoch == 3


def test_a_published_run_always_has_its_receipt(bench: Bench) -> None:
    """Killed between the head's swap and receipt.json: the next attempt writes it."""
    from types import SimpleNamespace

    from job.publish import announce

    bench.take().published(a_receipt())
    path = bench.folder / f"_runs/{RUN}/receipt.json"
    path.unlink()
    attempt = bench.take()
    receipt = attempt.receipt()
    assert receipt is not None
    announce(SimpleNamespace(attempt=attempt), receipt)  # type: ignore[arg-type]
    assert path.exists()


def test_versions_that_were_begun_are_remembered_over_attempts(bench: Bench) -> None:
    """So that the one which publishes can delete what the others left."""
    bench.vanish(first := bench.take())
    first.publishing("v1")
    second = bench.take()
    second.publishing("v2")
    assert second.begun == ["v1", "v2"]


def test_an_ended_run_may_be_taken_by_anybody(bench: Bench) -> None:
    """A run whose attempt said its last words is not alive."""
    bench.take("one").end(record(70))
    assert bench.head()["state"] == "ended"
    assert bench.take("two").epoch == 2
    assert bench.head()["state"] == "running"


def test_the_heartbeat_keeps_a_run_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head gets a heartbeat and the progress; a takeover is noticed and asks for the end."""
    monkeypatch.setattr(runs, "LOOK_S", 0.01)
    attempt = bench.take()
    attempt._progress.enter("train")
    attempt._progress.update(step=7, loss=math.nan)
    wait_for(lambda: bench.head()["progress"].get("stage") == "train")
    bench.clock.now += 61
    wait_for(lambda: bench.head()["heartbeat"] == bench.clock.now)
    assert bench.head()["progress"] == {"stage": "train", "step": 7, "loss": None}
    bench.take()
    bench.clock.now += 61
    wait_for(lambda: attempt._stop.requested)
    with pytest.raises(JobError) as caught:
        attempt._stop.check()
    assert code_of(caught) is ExitCode.FENCED


def wait_for(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came true")


def test_five_attempts_without_a_newer_checkpoint_are_the_end(bench: Bench, tmp_path: Path) -> None:
    """The sixth is refused (72); a checkpoint in between, or a new owner, starts the count anew."""
    for step in range(4):
        bench.take().end(record(69, step=step))
    last = bench.take()
    last.save_checkpoint(a_checkpoint(tmp_path / "c", "x"), 5)
    last.end(record(69))
    for step in range(5):
        bench.take().end(record(69, step=step))
    with pytest.raises(JobError) as caught:
        bench.take()
    assert code_of(caught) is ExitCode.NO_PROGRESS
    assert "69, 69, 69, 69, 69" in str(caught.value)
    assert bench.take("a new Job").epoch == 11


def test_the_head_keeps_the_slowest_save_of_all_attempts(bench: Bench, tmp_path: Path) -> None:
    """It is what submit makes a pod's grace period of."""
    first = bench.take()
    for step, save_s in ((1, 40.0), (2, 12.0)):
        first._progress.update(save_s=save_s)
        first.save_checkpoint(a_checkpoint(tmp_path / "c", str(step)), step)
    first.end(record(75))
    second = bench.take()
    second._progress.update(save_s=30.0)
    second._progress.enter("merge")
    second.end(record(75))
    assert bench.head()["save_s"] == bench.take().save_s == 40.0


def test_an_attempt_killed_while_it_was_saving_is_told_apart(bench: Bench) -> None:
    """The head hears of the signal; without a last word after it, the grace was too short."""
    attempt = bench.take(stage="train", step=7)
    attempt._stop.request(preempted("SIGTERM"))
    wait_for(lambda: bench.head()["stopping"])
    bench.take()
    assert bench.head()["ends"][-1]["stopping"] is True
    bench.take()
    assert bench.head()["ends"][-1]["stopping"] is False


def test_two_that_vanish_at_the_same_place_are_the_end(bench: Bench) -> None:
    """Two attempts that end without a word at one stage and step are 72, and memory is named."""
    for _ in range(2):
        bench.vanish(bench.take(stage="train", step=30))
    with pytest.raises(JobError) as caught:
        bench.take(stage="train", step=30)
    assert code_of(caught) is ExitCode.NO_PROGRESS
    assert "step 30 (out of memory?)" in str(caught.value)


def test_no_step_yet_is_step_0(bench: Bench) -> None:
    """Of two that vanish while they load the base, one may have come as far as to count steps."""
    bench.vanish(bench.take(stage="train"))
    bench.vanish(bench.take(stage="train", step=0))
    with pytest.raises(JobError):
        bench.take()


def test_vanishing_at_different_places_is_bad_luck(bench: Bench) -> None:
    """Attempts that get further each time before they vanish may go on."""
    for step in (10, 20, 30):
        bench.vanish(bench.take(stage="train", step=step))
    assert bench.take().epoch == 4


def test_attempts_at_once_get_epochs_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods of one Job that start together get different epochs; of foreign owners one gets in."""
    for name, seconds in (("LOOK_S", 0.01), ("SIGN_S", 0.01), ("HEARTBEAT_S", 0.0)):
        monkeypatch.setattr(runs, name, seconds)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: bench.take(), range(4)))
        assert sorted(a.epoch for a in taken) == [1, 2, 3, 4]

        def foreign(number: int) -> bool:
            try:
                bench.take(f"owner-{number}", run="other-1")
            except JobError as error:
                refused.append(error.code)
                return False
            return True

        refused: list[ExitCode] = []
        assert sum(pool.map(foreign, range(4))) == 1
        assert refused == [ExitCode.TAKEN] * 3


def test_inputs_are_resolved_once(bench: Bench) -> None:
    """Whoever comes first pins the moving inputs; later attempts are not even asked."""
    assert bench.take().inputs(lambda: {"model": "abc"}) == {"model": "abc"}
    assert bench.take().inputs(lambda: pytest.fail("asked again")) == {"model": "abc"}


def test_inputs_resolved_at_once_are_one(bench: Bench) -> None:
    """An attempt that loses the race to inputs.json takes what the winner wrote."""
    slow, fast = bench.take(), bench.take()

    def resolve() -> dict[str, Any]:
        fast.inputs(lambda: {"model": "first"})
        return {"model": "second"}

    assert slow.inputs(resolve) == {"model": "first"}


def test_checkpoints_come_back_and_two_stay(bench: Bench, tmp_path: Path) -> None:
    """The newest comes back byte for byte; the third drops the first, with its manifest."""
    attempt = bench.take()
    assert attempt.restore_checkpoint(tmp_path / "back") is None
    for step in (5, 10, 15):
        attempt.save_checkpoint(a_checkpoint(tmp_path / f"c{step}", f"step {step}"), step)
    assert attempt.restore_checkpoint(tmp_path / "back") == 15
    for name in ("adapter.safetensors", "state.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "c15" / name).read_bytes()
    places = sorted(p.name for p in (bench.folder / f"_runs/{RUN}/checkpoints").iterdir())
    assert places == ["10-e1", "15-e1"]


def _flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize("harm", ["flip", "truncate", "lose", "no manifest", "foreign name"])
def test_an_invalid_checkpoint_gives_way_to_the_one_before(
    bench: Bench, tmp_path: Path, harm: str
) -> None:
    """Every file is verified; the newest *valid* checkpoint is taken, and none if none is."""
    attempt = bench.take()
    for step in (1, 2):
        attempt.save_checkpoint(a_checkpoint(tmp_path / "c", str(step)), step)
    for step, expected in ((2, 1), (1, None)):
        place = bench.folder / f"_runs/{RUN}/checkpoints/{step}-e1"
        if harm == "flip":
            _flip(place / "adapter.safetensors")
        elif harm == "truncate":
            (place / "adapter.safetensors").write_bytes(b"short")
        elif harm == "lose":
            (place / "state.json").unlink()
        elif harm == "no manifest":
            (place / "manifest.json").unlink()
        else:
            manifest = json.loads((place / "manifest.json").read_bytes())
            manifest["files"]["../../escaped"] = manifest["files"].pop("state.json")
            (place / "manifest.json").write_text(json.dumps(manifest))
        assert bench.take().restore_checkpoint(tmp_path / "back") == expected
    assert not (tmp_path / "back").exists() or harm != "never"
    assert not (tmp_path.parent / "escaped").exists()


def test_a_checkpoint_without_its_head_is_not_taken(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between upload and swap: the head still names the one before."""
    attempt = bench.take()
    attempt.save_checkpoint(a_checkpoint(tmp_path / "c", "1"), 1)
    monkeypatch.setattr(attempt, "_swap", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        attempt.save_checkpoint(a_checkpoint(tmp_path / "c", "2"), 2)
    heir = bench.take()
    assert heir.restore_checkpoint(tmp_path / "back") == 1
    for step in (2, 3):
        heir.save_checkpoint(a_checkpoint(tmp_path / "c", str(step)), step)
    places = sorted(p.name for p in (bench.folder / f"_runs/{RUN}/checkpoints").iterdir())
    assert places == ["2-e2", "3-e2"]


def test_a_signal_does_not_lose_the_checkpoint(bench: Bench, tmp_path: Path) -> None:
    """After SIGTERM a checkpoint still becomes durable, and the last words are still written."""
    attempt = bench.take()
    attempt._stop.request(preempted("SIGTERM"))
    attempt.save_checkpoint(a_checkpoint(tmp_path / "c", "x"), 9)
    attempt.put("log-000.jsonl", b"{}\n")
    attempt.end(record(75))
    head = bench.head()
    assert head["checkpoint"] == {"step": 9, "epoch": 1}
    assert head["ends"] == [{"epoch": 1, "owner": "me", "code": 75, "stage": "train", "step": 1}]
    assert (bench.folder / f"_runs/{RUN}/attempts/1/log-000.jsonl").exists()


def test_pickles_never_become_checkpoints(bench: Bench, tmp_path: Path) -> None:
    """A checkpoint that holds a pickle is refused before a byte of it is written."""
    folder = a_checkpoint(tmp_path / "c", "x")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(JobError) as caught:
        bench.take().save_checkpoint(folder, 1)
    assert code_of(caught) is ExitCode.NOT_PROVEN
    assert not (bench.folder / f"_runs/{RUN}/checkpoints").exists()


def a_receipt(**more: Any) -> Receipt:
    fields = {"run": RUN, "name": "demo", "version": "v", "uri": "u", "adapter_sha256": "a"}
    return Receipt(**fields, manifest_sha256="m", size_bytes=1, published="", **more)


def test_a_published_run_is_known_as_such(bench: Bench) -> None:
    """A later attempt finds the Receipt, also one that was completed by the channel's move."""
    attempt = bench.take()
    assert attempt.receipt() is None
    attempt.publishing("v")
    assert bench.head()["state"] == "publishing:v"
    attempt.published(a_receipt())
    attempt.published(a_receipt(channel="nightly", channel_state="moved"))
    attempt.end(record(0))
    for _ in range(6):
        heir = bench.take()
        heir.end(record(75))
    assert heir.receipt() == a_receipt(channel="nightly", channel_state="moved")
    stored = json.loads((bench.folder / f"_runs/{RUN}/receipt.json").read_bytes())
    assert stored["channel_state"] == "moved"
    assert bench.head()["state"] == "published:v"


def test_the_scheduled_minute_comes_from_a_cron_jobs_name(bench: Bench) -> None:
    """A CronJob's suffix orders the run; eight digits that are a digest do not."""
    minute = int(bench.clock.now // 60)
    assert bench.take(run=f"nightly-{minute - 90}").scheduled == minute - 90
    assert bench.take(run="demo-12345678").scheduled == minute
    assert bench.take(run="demo-0123abcd").scheduled == minute


def test_a_late_write_of_our_own_is_taken_up(bench: Bench) -> None:
    """A swap that arrived although its answer never came does not fence its own attempt."""
    attempt = bench.take()
    stale = attempt._tag
    attempt.publishing("v")
    attempt._tag = stale
    attempt.publishing("w")
    assert bench.head()["state"] == "publishing:w"


def test_a_head_that_a_server_tore_is_written_again_by_who_holds_it(
    bench: Bench, tmp_path: Path
) -> None:
    """Cut off in a write, some servers keep an empty object; a newcomer is told, and counts."""
    attempt = bench.take()
    path = bench.folder / f"_runs/{RUN}/head.json"
    path.write_bytes(b"")
    with pytest.raises(JobError, match="torn") as caught:
        bench.take("two")
    assert code_of(caught) is ExitCode.STORE
    attempt.save_checkpoint(a_checkpoint(tmp_path / "c", "x"), 10)
    assert bench.head()["checkpoint"] == {"step": 10, "epoch": 1}
    assert bench.take().checkpoint_step == 10
