"""The folder store: the protocol's promises among processes, and a full or forbidden disk."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import ExitCode, JobError
from job.stop import Stop, preempted
from job.store import base, open_store
from job.store.base import ConflictError, ExistsError

FORK = multiprocessing.get_context("fork")
NOBODY = 65534


def in_child(call: Callable[[], None]) -> str:
    """Run ``call`` in a forked child, and return ``ok``, its JobError's code, or another error."""
    reader, writer = FORK.Pipe(duplex=False)

    def child() -> None:
        try:
            call()
            writer.send("ok")
        except JobError as error:
            writer.send(f"{int(error.code)} {error}")
        except BaseException as error:  # noqa: BLE001
            writer.send(repr(error))
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join(30)
    return reader.recv() if reader.poll(1) else f"died with {process.exitcode}"


def test_create_happens_once(tmp_path: Path) -> None:
    """A second create with another body is refused; with the same body it is a success."""
    store = open_store(str(tmp_path), stop=Stop())
    tag = store.create("a/b.json", b"one")
    assert store.create("a/b.json", b"one") == tag
    with pytest.raises(ExistsError):
        store.create("a/b.json", b"two")
    found = store.get("a/b.json")
    assert found is not None
    assert (found.body, found.tag) == (b"one", tag)


def test_swap_needs_the_present_tag(tmp_path: Path) -> None:
    """A swap with a stale tag, or of nothing, changes nothing."""
    store = open_store(str(tmp_path), stop=Stop())
    first = store.create("head", b"1")
    store.swap("head", b"2", first)
    for key, tag in (("head", first), ("nothing", first)):
        with pytest.raises(ConflictError):
            store.swap(key, b"3", tag)
    found = store.get("head")
    assert found is not None
    assert found.body == b"2"
    assert store.get("nothing") is None


def _increment(root: str, times: int) -> None:
    store, done = open_store(root, stop=Stop()), 0
    while done < times:
        found = store.get("counter")
        assert found is not None
        value = json.loads(found.body)
        value["n"] += 1
        value["seq"] = f"{os.getpid()}-{done}"
        try:
            store.swap("counter", json.dumps(value).encode(), found.tag)
            done += 1
        except ConflictError:
            pass


def test_no_swap_is_lost_among_processes(tmp_path: Path) -> None:
    """Four processes that swap a counter at once never overwrite each other."""
    open_store(str(tmp_path), stop=Stop()).create("counter", b'{"n": 0}')
    workers = [FORK.Process(target=_increment, args=(str(tmp_path), 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert json.loads((tmp_path / "counter").read_bytes())["n"] == 100


def test_create_race_among_processes(tmp_path: Path) -> None:
    """Of processes that create one key at once, exactly one wins, round after round."""
    with FORK.Pool(4) as pool:
        for number in range(20):
            work = [(str(tmp_path), f"r/{number}", f"w{i}".encode()) for i in range(4)]
            assert sum(pool.map(_creates, work)) == 1


def _creates(work: tuple[str, str, bytes]) -> bool:
    root, key, body = work
    try:
        open_store(root, stop=Stop()).create(key, body)
    except ExistsError:
        return False
    return True


def test_a_killed_lock_holder_blocks_nobody(tmp_path: Path) -> None:
    """The swap's lock dies with its process: a lock file left behind is no lock."""
    store = open_store(str(tmp_path), stop=Stop())
    tag = store.create("head", b"1")
    (tmp_path / ".head.lock").write_bytes(b"")
    assert store.swap("head", b"2", tag)


def test_files_are_copied_whole_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload returns what was written; a download that does not match leaves nothing behind."""
    monkeypatch.setattr(base, "PART_BYTES", 1_000_000)
    store = open_store(str(tmp_path / "store"), stop=Stop())
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9_000_000))
    size, digest = store.upload("a/file", source)
    assert (size, digest) == (9_000_000, hashlib.sha256(source.read_bytes()).hexdigest())
    assert store.sha256("a/file") == (size, digest)
    store.download("a/file", tmp_path / "there", size=size, sha256=digest)
    assert (tmp_path / "there").read_bytes() == source.read_bytes()
    with pytest.raises(JobError) as caught:
        store.download("a/file", tmp_path / "wrong", size=size, sha256="0" * 64)
    assert caught.value.code is ExitCode.NOT_PROVEN
    with pytest.raises(JobError) as caught:
        store.download("a/none", tmp_path / "wrong", size=size, sha256=digest)
    assert caught.value.code is ExitCode.NOT_FOUND
    pruned = lambda _: (tmp_path / "store" / "a" / "file").unlink(missing_ok=True)  # noqa: E731
    with pytest.raises(JobError) as caught:
        store.download("a/file", tmp_path / "wrong", size=size, sha256=digest, tick=pruned)
    assert caught.value.code is ExitCode.NOT_FOUND
    assert sorted(os.listdir(tmp_path)) == ["source", "store", "there"]


def test_list_delete_and_sweep(tmp_path: Path) -> None:
    """Temporary and lock files are in no list; delete removes emptied folders; sweep the rest."""
    store = open_store(str(tmp_path), stop=Stop())
    tag = store.create("a/b/c", b"1")
    store.swap("a/b/c", b"2", tag)
    store.put("a/d", b"12")
    (tmp_path / "a/.d.left-by-a-kill").write_bytes(b"half")
    assert [(e.key, e.size) for e in store.list("a/")] == [("a/d", 2), ("a/b/c", 1)]
    assert [e.key for e in store.list("a/b")] == ["a/b/c"]
    assert list(store.list("nothing/")) == []
    store.sweep("a/", older_than_s=3600)
    assert (tmp_path / "a/.d.left-by-a-kill").exists()
    store.sweep("a/")
    store.delete(["a/b/c", "a/d", "a/never"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x", "a\\b", "a//b", "", "."])
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    """A key that leads out of the store is refused before anything is touched."""
    store = open_store(str(tmp_path), stop=Stop())
    with pytest.raises(JobError) as caught:
        store.put(key, b"x")
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_full_disk_is_71_and_leaves_nothing(tmp_path: Path) -> None:
    """A disk that takes no more is told in one line, and no half file stays."""
    source = tmp_path / "source"
    source.write_bytes(bytes(2_000_000))

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        open_store(str(tmp_path / "store"), stop=Stop()).upload("a", source)

    assert in_child(fill).startswith("71 ")
    assert os.listdir(tmp_path / "store") == []


def test_no_write_permission_is_77(tmp_path: Path) -> None:
    """A folder that may not be written is told in one line."""
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)

    def write() -> None:
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        open_store(str(folder), stop=Stop()).create("a/b", b"x")

    assert in_child(write).startswith("77 ")


def test_a_stop_ends_a_copy(tmp_path: Path) -> None:
    """A copy hears the stop between chunks, and leaves nothing half-written."""
    stop = Stop()
    store = open_store(str(tmp_path / "store"), stop=stop)
    source = tmp_path / "source"
    source.write_bytes(bytes(20_000_000))
    with pytest.raises(JobError) as caught:
        store.upload("a/b", source, tick=lambda _: stop.request(preempted("SIGTERM")))
    assert caught.value.code is ExitCode.PREEMPTED
    assert os.listdir(tmp_path / "store" / "a") == []


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", ""])
def test_unknown_stores_are_78(uri: str) -> None:
    """A store of an unknown kind is a mistake in the job file."""
    with pytest.raises(JobError) as caught:
        open_store(uri, stop=Stop())
    assert caught.value.code is ExitCode.CONFIG


def test_a_creator_that_is_overtaken_still_hears_of_its_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer swaps the object just after it was created: the creation was a success."""
    store = open_store(str(tmp_path), stop=Stop())
    link = os.link

    def overtaken(source: str, target: Path) -> None:
        link(source, target)
        target.write_bytes(b"two")

    monkeypatch.setattr(os, "link", overtaken)
    assert store.create("key", b"one") == hashlib.sha256(b"one").hexdigest()
