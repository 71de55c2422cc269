"""The S3 store on a real server: conditions, lost answers, silence, parts, refusals."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import servers

from job.errors import ExitCode, JobError
from job.stop import Stop, preempted
from job.store import base, open_store, s3_client
from job.store import probe as probe_module
from job.store.base import ConflictError, ExistsError, Store
from job.store.probe import probe, require_conditions
from job.store.s3 import S3Store
from job.store.show import print_findings, probe_store
from job.store.transfer import each

MB = 1 << 20
PART = 5 * MB
"""The smallest part that S3 allows: tests need not move more."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PART_BYTES", PART)
    monkeypatch.setattr(probe_module, "LARGE_BYTES", PART + MB)


@pytest.fixture
def store(s3_root: str) -> Store:
    return open_store(s3_root, stop=Stop())


@pytest.fixture
def proxy(
    seaweed: servers.S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.Proxy]:
    """A faulty proxy before the server; stores that are opened now go through it."""
    with servers.faulty_proxy(seaweed.endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        yield made


def code_of(call: Any) -> ExitCode:
    with pytest.raises(JobError) as caught:
        call()
    return caught.value.code


def a_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def open_uploads(server: servers.S3Server, root: str) -> list[str]:
    client = boto3.client("s3", **server.client_options())
    answer = client.list_multipart_uploads(Bucket=server.bucket)
    prefix = root.removeprefix(f"s3://{server.bucket}/")  # other tests share the bucket
    keys = [upload["Key"] for upload in answer.get("Uploads", [])]
    return [key for key in keys if key.startswith(prefix)]


def test_create_and_swap(store: Store) -> None:
    """What is there is not created again; a stale tag swaps nothing."""
    tag = store.create("head.json", b"1")
    assert store.create("head.json", b"1") == tag
    with pytest.raises(ExistsError):
        store.create("head.json", b"2")
    newer = store.swap("head.json", b"2", tag)
    for key, old in (("head.json", tag), ("nothing.json", tag)):
        with pytest.raises(ConflictError):
            store.swap(key, b"3", old)
    found = store.get("head.json")
    assert found is not None
    assert (found.body, found.tag) == (b"2", newer)
    assert store.get("nothing.json") is None


def test_one_of_sixteen_wins(store: Store) -> None:
    """Sixteen writers at once: exactly one creates, exactly one swaps, round after round."""

    def create(work: tuple[int, int]) -> bool:
        with contextlib.suppress(ExistsError):
            return bool(store.create(f"race/{work[0]}", f"writer {work[1]}".encode()))
        return False

    def swap(work: tuple[str, str, int]) -> bool:
        with contextlib.suppress(ConflictError):
            return bool(store.swap(work[0], f"swapper {work[2]}".encode(), work[1]))
        return False

    with ThreadPoolExecutor(16) as pool:
        for number in range(5):
            assert sum(pool.map(create, [(number, writer) for writer in range(16)])) == 1
            key = f"race/{number}"
            found = store.get(key)
            assert found is not None
            assert sum(pool.map(swap, [(key, found.tag, writer) for writer in range(16)])) == 1


def test_a_lost_answer_to_our_own_success_is_success(
    proxy: servers.Proxy, s3_root: str, store: Store
) -> None:
    """The server did the work, its answer is lost, the second try meets 412: read back, and won."""
    ours = open_store(s3_root, stop=Stop(patience_s=1.0))
    proxy.first("lost", "PUT", "/head.json")
    tag = ours.create("head.json", b"ours")
    proxy.first("lost", "PUT", "/head.json")
    newer = ours.swap("head.json", b"ours again", tag)
    found = store.get("head.json")
    assert found is not None
    assert (found.body, found.tag) == (b"ours again", newer)
    assert [fault for _, _, fault in proxy.seen].count("lost") == 2


def test_a_lost_answer_does_not_hide_somebody_elses_success(
    proxy: servers.Proxy, s3_root: str, store: Store
) -> None:
    """If another writer's body is there after a lost answer, it is a conflict."""
    theirs = store.create("head.json", b"theirs")
    ours = open_store(s3_root, stop=Stop(patience_s=1.0))
    proxy.first("lost", "PUT", "/head.json")
    with pytest.raises(ExistsError):
        ours.create("head.json", b"ours")
    store.swap("head.json", b"theirs, newer", theirs)
    proxy.first("lost", "PUT", "/head.json")
    with pytest.raises(ConflictError):
        ours.swap("head.json", b"ours", theirs)


@pytest.mark.parametrize("fault", ["503", "500", "429", "409", "refuse"])
def test_what_may_pass_is_tried_again(proxy: servers.Proxy, s3_root: str, fault: str) -> None:
    """Busy servers and broken connections are retried; the write arrives once."""
    ours = open_store(s3_root, stop=Stop(patience_s=1.0))
    proxy.first(fault, "PUT", "/a.json", times=2)
    ours.create("a.json", b"x")
    proxy.first(fault, "GET", "/a.json", times=1)
    found = ours.get("a.json")
    assert found is not None
    assert found.body == b"x"


def test_unreachable_past_the_deadline_is_74(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not there is tried until the deadline, then 74."""
    [port] = servers.free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    ours = open_store(s3_root, stop=Stop(patience_s=1.0))
    assert code_of(lambda: ours.get("a")) is ExitCode.STORE


def test_a_stop_is_heard_while_the_server_is_silent(
    proxy: servers.Proxy, s3_root: str, tmp_path: Path
) -> None:
    """Transfers end at once though the server says nothing; a single request by its timeout."""
    proxy.rule = lambda *_: "hang"
    stop = Stop()
    store = open_store(s3_root, stop=stop)
    paths = [a_file(tmp_path / str(number), 2 * PART + MB) for number in range(2)]
    threading.Timer(0.5, stop.request, [preempted("SIGTERM")]).start()
    began = time.monotonic()
    call = lambda path, inner: store.hearing(inner).upload(path.name, path)  # noqa: E731
    assert code_of(lambda: each(call, paths, stop=stop)) is ExitCode.PREEMPTED
    assert time.monotonic() - began < 5.0
    assert s3_client.READ_TIMEOUT_S <= 10
    proxy.release()


def test_a_silent_server_is_left_and_asked_again(
    proxy: servers.Proxy, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without an answer is given up after the read timeout, and tried again."""
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 1)
    store = open_store(s3_root, stop=Stop())
    proxy.first("hang", "PUT", "/a")
    store.create("a", b"x")
    proxy.first("hang", "GET", "/a")
    assert store.get("a") is not None


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 7])
def test_files_go_and_come_back(store: Store, tmp_path: Path, size: int) -> None:
    """Files of any size, also around a part's, come back byte for byte, hashed on both ways."""
    source = a_file(tmp_path / "source", size)
    moved: list[int] = []
    sent = store.upload("a/b", source, tick=moved.append)
    assert sent[0] == size == sum(moved)
    assert store.sha256("a/b") == sent
    store.download("a/b", tmp_path / "back", size=size, sha256=sent[1])
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert [(e.key, e.size) for e in store.list("a/")] == [("a/b", size)]


def test_a_failed_upload_leaves_no_parts(
    proxy: servers.Proxy, seaweed: servers.S3Server, s3_root: str, tmp_path: Path
) -> None:
    """When a part is refused for good, the others are aborted: nobody pays for orphans."""
    store = open_store(s3_root, stop=Stop())
    source = a_file(tmp_path / "source", 4 * PART)
    proxy.first("403", "PUT", "partNumber=3")
    assert code_of(lambda: store.upload("x/broken", source)) is ExitCode.NOT_ALLOWED
    assert open_uploads(seaweed, s3_root) == []
    assert list(store.list("x/")) == []


def test_sweep_aborts_what_a_kill_left(
    seaweed: servers.S3Server, s3_root: str, store: Store
) -> None:
    """Uploads below the prefix that nobody ended are thrown away; others stay."""
    client = boto3.client("s3", **seaweed.client_options())
    prefix = s3_root.removeprefix(f"s3://{seaweed.bucket}/")
    for key in ("mine/a", "other/b"):
        client.create_multipart_upload(Bucket=seaweed.bucket, Key=f"{prefix}/{key}")
    store.sweep("mine/", older_than_s=3600)
    assert len(open_uploads(seaweed, s3_root)) == 2
    store.sweep("mine/")
    assert open_uploads(seaweed, s3_root) == [f"{prefix}/other/b"]
    store.sweep("")
    assert open_uploads(seaweed, s3_root) == []


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_lost_answers_do_not_hurt_uploads(
    proxy: servers.Proxy, s3_root: str, tmp_path: Path, method: str
) -> None:
    """A part sent twice, or a completion whose answer is lost, ends in the right object."""
    store = open_store(s3_root, stop=Stop())
    source = a_file(tmp_path / "source", 2 * PART + MB)
    proxy.first("lost", method, "partNumber=2" if method == "PUT" else "?uploadId=")
    sent = store.upload("a", source)
    assert ("lost" in [fault for _, _, fault in proxy.seen]) is True
    assert store.sha256("a") == sent


@pytest.mark.parametrize("fault", ["half", "503", "refuse"])
def test_broken_downloads_are_mended(
    proxy: servers.Proxy, s3_root: str, tmp_path: Path, fault: str
) -> None:
    """A range that ends early is fetched again; what arrives is whole and verified."""
    store = open_store(s3_root, stop=Stop())
    source = a_file(tmp_path / "source", 2 * PART + MB)
    size, digest = store.upload("a", source)
    proxy.first(fault, "GET", "/a", times=2)
    store.download("a", tmp_path / "back", size=size, sha256=digest)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_flipped_bits_are_refused(proxy: servers.Proxy, s3_root: str, tmp_path: Path) -> None:
    """Bytes that change on their way are 70, and no file is left."""
    store = open_store(s3_root, stop=Stop())
    size, digest = store.upload("a", a_file(tmp_path / "source", PART + MB))
    back = tmp_path / "back"
    proxy.first("flip", "GET", "/a")
    call = lambda: store.download("a", back, size=size, sha256=digest)  # noqa: E731
    assert code_of(call) is ExitCode.NOT_PROVEN
    assert sorted(os.listdir(tmp_path)) == ["source"]
    wrong = lambda: store.download("a", back, size=size + 1, sha256=digest)  # noqa: E731
    assert code_of(wrong) is ExitCode.NOT_PROVEN
    gone = lambda: store.download("gone", back, size=size, sha256=digest)  # noqa: E731
    assert code_of(gone) is ExitCode.NOT_FOUND


def test_an_object_replaced_while_it_is_read_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of two different objects are never put together."""
    store.upload("a", a_file(tmp_path / "one", 2 * PART + MB))
    state = S3Store._state

    def then_replaced(self: S3Store, key: str) -> tuple[int, str]:
        known = state(self, key)
        store.upload("a", a_file(tmp_path / "two", 2 * PART + MB))
        return known

    monkeypatch.setattr(S3Store, "_state", then_replaced)
    assert code_of(lambda: store.sha256("a")) is ExitCode.NOT_PROVEN


def test_lists_longer_than_a_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing goes on past its first page, also when asking for a page fails once."""
    keys = [f"many/{number:04d}" for number in range(25)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert isinstance(store, S3Store)
    ask = store._client.list_objects_v2
    failed: list[int] = []

    def in_pages(**request: Any) -> Any:
        if request.get("ContinuationToken") and not failed:
            failed.append(1)
            raise ConnectionResetError("once")
        return ask(**request, MaxKeys=10)

    monkeypatch.setattr(store._client, "list_objects_v2", in_pages)
    assert [entry.key for entry in store.list("many/")] == keys
    assert failed
    store.delete([*keys, "many/never"])
    assert list(store.list("many/")) == []


def test_wrong_credentials_are_77(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret, an unknown key and no key at all: one line each, and 77."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert code_of(lambda: open_store(s3_root, stop=Stop()).get("a")) is ExitCode.NOT_ALLOWED
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert code_of(lambda: open_store(s3_root, stop=Stop()).put("a", b"")) is ExitCode.NOT_ALLOWED
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(JobError) as caught:
        open_store(s3_root, stop=Stop()).get("a")
    assert caught.value.code is ExitCode.NOT_ALLOWED
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)


def test_read_only_credentials_are_77(
    store: Store, s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Credentials that may read but not write are told at the first write, and leave nothing."""
    store.put("a", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.READER_SECRET)
    reader = open_store(s3_root, stop=Stop())
    assert reader.get("a") is not None
    large = a_file(tmp_path / "large", PART + MB)
    for write in (
        lambda: reader.create("b", b"x"),
        lambda: reader.upload("b", large),
        lambda: probe(reader),
    ):
        assert code_of(write) is ExitCode.NOT_ALLOWED
    assert [entry.key for entry in store.list("")] == ["a"]


def test_a_missing_bucket_is_66(s3_root: str, tmp_path: Path) -> None:
    """Reading from and writing to a bucket that does not exist is one line and 66."""
    store = open_store("s3://no-such-bucket/x", stop=Stop())
    source = a_file(tmp_path / "a", PART + MB)
    for call in (
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.upload("a", source),
        lambda: list(store.list("")),
        lambda: store.sha256("a"),
    ):
        assert code_of(call) is ExitCode.NOT_FOUND


def test_bad_settings_are_78(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that is no URL, or a profile that does not exist, is one line and 78."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    assert code_of(lambda: open_store(s3_root, stop=Stop())) is ExitCode.CONFIG
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert code_of(lambda: open_store(s3_root, stop=Stop())) is ExitCode.CONFIG


def test_a_good_store_passes_the_probe(s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every condition is tried for real, holds, and nothing is left behind."""
    report = probe_store(s3_root, stop=Stop())
    assert report["code"] == 0, report
    store = open_store(s3_root, stop=Stop())
    require_conditions(store)
    assert list(store.list("")) == []
    print_findings(report, __import__("sys").stdout)
    assert "can hold every promise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("server", "broken"),
    [
        (servers.localbucket, {"swap refuses a stale tag"}),
        (servers.rclone_s3, {"create refuses a key that is there", "swap refuses a stale tag"}),
    ],
)
def test_stores_without_conditions_are_refused(
    server: Any, broken: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bad servers are found out (78), by the probe and before a run; single_writer allows them."""
    with server() as running:
        for key, value in running.environment().items():
            monkeypatch.setenv(key, value)
        uri = f"s3://{running.bucket}/x"
        report = probe_store(uri, stop=Stop())
        assert report["code"] == ExitCode.CONFIG
        failed = {row["check"] for row in report["findings"] if not row["ok"]}
        assert broken <= failed, report
        assert code_of(lambda: require_conditions(open_store(uri, stop=Stop()))) is ExitCode.CONFIG
        alone = open_store(uri, stop=Stop(), single_writer=True)
        require_conditions(alone)
        tag = alone.create("head", b"1")
        with pytest.raises(ExistsError):
            alone.create("head", b"2")
        alone.swap("head", b"2", tag)
        with pytest.raises(ConflictError):
            alone.swap("head", b"3", tag)
