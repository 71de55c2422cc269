"""Versions and channels: manifest last, monotone channels, pruning. On a folder."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop
from job.store import open_store
from job.store.folder import FolderStore
from job.store.runs import Attempt, take
from job.store.show import list_or_prune, print_versions
from job.store.versions import (
    list_versions,
    move_channel,
    parse_spec,
    prune,
    read_manifest,
    resolve,
    verify,
    version_name,
    write_version,
)

NAME = "demo"
V = [f"2026112{day}T010203Z-e{epoch}-0123abcd" for day in (0, 1) for epoch in (1, 9, 10)]


@pytest.fixture
def attempt(tmp_path: Path) -> Any:
    stop = Stop()
    store = open_store(str(tmp_path / "store"), stop=stop)
    made = take(store, "demo-1", owner="me", job_text=b"", stop=stop, progress=Progress())
    yield made
    made.end({"code": 0})


def folders(tmp_path: Path, text: str = "x") -> dict[str, Path]:
    for part, name in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        folder = tmp_path / "made" / part
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{part} {text}".encode() * 1000)
        (folder / "config.json").write_text("{}")
        (folder / ".fingerprint").write_text("local")
    return {part: tmp_path / "made" / part for part in ("adapter", "merged")}


def publish(attempt: Attempt, tmp_path: Path, version: str, **more: Any) -> Any:
    made = folders(tmp_path, version)
    return write_version(attempt, NAME, version, made, {"seed": 0}, stop=Stop(), **more)


def code_of(call: Any) -> ExitCode:
    with pytest.raises(JobError) as caught:
        call()
    return caught.value.code


def test_a_version_is_plain_files_and_a_manifest(attempt: Attempt, tmp_path: Path) -> None:
    """Every visible file is there under its own name, and the manifest names them all."""
    manifest = publish(attempt, tmp_path, V[0])
    place = tmp_path / "store" / NAME / "versions" / V[0]
    found = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert found == sorted([*manifest.files, "manifest.json"])
    assert sorted(manifest.files) == [
        "adapter/adapter_model.safetensors",
        "adapter/config.json",
        "merged/config.json",
        "merged/model.safetensors",
    ]
    stored = (place / "manifest.json").read_bytes()
    assert stored == manifest.body()
    assert json.loads(stored)["lineage"] == {"seed": 0}
    assert read_manifest(attempt.store, NAME, V[0]) == manifest
    assert verify(attempt.store, NAME, V[0], stop=Stop()).sha256 == manifest.sha256


class Failing(FolderStore):
    """A store whose n-th large write fails, or that returns other bytes than it was given."""

    fails_at, lies = -1, False
    uploads: list[str]

    def upload(self, key: str, path: Path, **more: Any) -> tuple[int, str]:
        """Fail, or lie, as set."""
        self.uploads.append(key)
        if len(self.uploads) == self.fails_at:
            raise JobError(ExitCode.STORE, key, "gone", "again")
        sent = super().upload(key, path, **more)
        if self.lies:
            body = bytearray(self._path(key).read_bytes())
            body[0] ^= 1
            self._path(key).write_bytes(body)
        return sent


def failing(attempt: Attempt, **settings_: Any) -> Failing:
    store = Failing(Path(attempt.store.uri), stop=Stop())
    store.uploads = []
    for key, value in settings_.items():
        setattr(store, key, value)
    attempt.store = store
    return store


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_half_a_version_is_no_version(attempt: Attempt, tmp_path: Path, fails_at: int) -> None:
    """Wherever writing ends early, no reader sees the version; the next call goes on from there."""
    store = failing(attempt, fails_at=fails_at)
    assert code_of(lambda: publish(attempt, tmp_path, V[0])) is ExitCode.STORE
    assert code_of(lambda: resolve(store, NAME, None)) is ExitCode.NOT_FOUND
    assert code_of(lambda: read_manifest(store, NAME, V[0])) is ExitCode.NOT_FOUND
    assert list_versions(store, NAME) == []
    there = {e.key for e in store.list(f"{NAME}/")}
    again = failing(attempt)
    manifest = publish(attempt, tmp_path, V[0])
    assert not there & set(again.uploads)
    assert len(manifest.files) == 4
    assert publish(attempt, tmp_path, V[0]) == manifest


def test_what_the_store_changed_is_not_published(attempt: Attempt, tmp_path: Path) -> None:
    """Bytes are read back before the manifest: a store that returns others is 70."""
    store = failing(attempt, lies=True)
    assert code_of(lambda: publish(attempt, tmp_path, V[0])) is ExitCode.NOT_PROVEN
    assert store.get(f"{NAME}/versions/{V[0]}/manifest.json") is None


def test_left_over_bytes_are_replaced(attempt: Attempt, tmp_path: Path) -> None:
    """A file of the right size and other bytes, of an interrupted call, is written again."""
    made = folders(tmp_path, V[0])
    size = (made["adapter"] / "config.json").stat().st_size
    key = f"{NAME}/versions/{V[0]}/adapter/config.json"
    attempt.store.put(key, b"?" * size)
    publish(attempt, tmp_path, V[0])
    verify(attempt.store, NAME, V[0], stop=Stop())


def test_a_version_is_immutable(attempt: Attempt, tmp_path: Path) -> None:
    """Other files under the name of a finished version are refused."""
    publish(attempt, tmp_path, V[0])
    other = folders(tmp_path, "other")
    call = lambda: write_version(attempt, NAME, V[0], other, {}, stop=Stop())  # noqa: E731
    assert code_of(call) is ExitCode.NOT_PROVEN


@pytest.mark.parametrize("name", ["model.bin", "sub/optimizer.PT", "x.pkl"])
def test_pickles_are_not_published(attempt: Attempt, tmp_path: Path, name: str) -> None:
    """A pickle among the files is refused before anything is written."""
    path = folders(tmp_path)["adapter"] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert code_of(lambda: publish(attempt, tmp_path, V[0])) is ExitCode.NOT_PROVEN
    assert list(attempt.store.list(f"{NAME}/")) == []


def test_damage_is_found(attempt: Attempt, tmp_path: Path) -> None:
    """Verifying a version reads every byte: a flipped bit or a lost file is told."""
    publish(attempt, tmp_path, V[0])
    path = tmp_path / "store" / NAME / "versions" / V[0] / "merged" / "model.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    check = lambda: verify(attempt.store, NAME, V[0], stop=Stop())  # noqa: E731
    assert code_of(check) is ExitCode.NOT_PROVEN
    path.unlink()
    assert code_of(check) is ExitCode.NOT_FOUND


def test_references(attempt: Attempt, tmp_path: Path) -> None:
    """None is the newest (e10 after e9), a channel is what it points to, unknown names are 66."""
    store = attempt.store
    for version in (V[2], V[0], V[1]):
        publish(attempt, tmp_path, version)
    assert resolve(store, NAME, None) == V[2]
    assert move_channel(store, NAME, "nightly", V[1], (1, 1)) == "moved"
    assert resolve(store, NAME, "nightly") == V[1]
    assert resolve(store, NAME, V[0]) == V[0]
    for unknown in ("weekly", "UPPER", "../x", "a/b"):
        assert code_of(lambda name=unknown: resolve(store, NAME, name)) is ExitCode.NOT_FOUND
    rows = list_versions(store, NAME)
    assert [(r["version"], r["channels"]) for r in rows] == [
        (V[0], []),
        (V[1], ["nightly"]),
        (V[2], []),
    ]
    assert rows[0]["parts"] == ["adapter", "merged"]


def test_specs() -> None:
    """STORE/NAME[@reference], for S3 and for folders; anything else is 64."""
    assert parse_spec("s3://b/p/demo@nightly") == ("s3://b/p", "demo", "nightly")
    assert parse_spec("s3://b/demo") == ("s3://b", "demo", None)
    assert parse_spec(f"/a@b/store/demo@{V[0]}") == ("/a@b/store", "demo", V[0])
    for wrong in ("demo", "s3://demo", "store/De_mo", "store/", "store/..", ""):
        assert code_of(lambda spec=wrong: parse_spec(spec)) is ExitCode.USAGE
    assert version_name(1_800_000_000.0, 3, "abcdef0123456789") == "20270115T080000Z-e3-abcdef01"


def test_a_channel_needs_a_finished_version(attempt: Attempt) -> None:
    """No pointer before its data."""
    call = lambda: move_channel(attempt.store, NAME, "nightly", V[0], (1, 1))  # noqa: E731
    assert code_of(call) is ExitCode.NOT_FOUND


ORDERS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(orders=ORDERS, at_once=st.booleans())
def test_channels_only_go_forward(
    tmp_path_factory: pytest.TempPathFactory, orders: list[tuple[int, int]], at_once: bool
) -> None:
    """In whatever order writers come, or at once, the channel ends at the latest, never back."""
    root = tmp_path_factory.mktemp("channel")
    store = open_store(str(root), stop=Stop())
    names = [f"20261120T0102{n:02d}Z-e1-0123abcd" for n in range(len(orders))]
    for version in names:
        body = {"files": {}, "name": NAME, "version": version, "run": "r", "epoch": 1}
        store.put(
            f"{NAME}/versions/{version}/manifest.json", json.dumps(body | {"lineage": {}}).encode()
        )

    def move(work: tuple[str, tuple[int, int]]) -> str:
        return move_channel(store, NAME, "nightly", *work)

    with ThreadPoolExecutor(4 if at_once else 1) as pool:
        said = list(pool.map(move, zip(names, orders, strict=True)))
    latest = max(zip(orders, names, strict=True))[1]
    assert resolve(store, NAME, "nightly") == latest
    pointer = json.loads((root / NAME / "channels" / "nightly.json").read_bytes())
    moves = [(move["order"], move["version"]) for move in pointer["moves"]]
    assert moves == sorted(moves)
    assert pointer["seq"] == len(moves) == said.count("moved")


def test_prune_keeps_the_newest_and_what_channels_name(attempt: Attempt, tmp_path: Path) -> None:
    """Old versions go, their manifests first; leftovers go once they are a day old."""
    store = attempt.store
    for version in V[:4]:
        publish(attempt, tmp_path, version)
    move_channel(store, NAME, "stable", V[0], (1, 1))
    store.put(f"{NAME}/versions/{V[4]}/adapter/half", b"on its way")
    store.put(f"{NAME}/versions/{V[5]}/adapter/half", b"left behind")
    old = time.time() - 90_000
    os.utime(tmp_path / "store" / NAME / "versions" / V[5] / "adapter" / "half", (old, old))
    assert code_of(lambda: prune(store, NAME, 0)) is ExitCode.USAGE
    report = list_or_prune(f"{store.uri}/{NAME}", keep=1, stop=Stop())
    assert report["deleted"] == [V[1], V[2], V[5]]
    assert [row["version"] for row in report["versions"]] == [V[0], V[3]]
    left = sorted(p.name for p in (tmp_path / "store" / NAME / "versions").iterdir())
    assert left == [V[0], V[3], V[4]]
    print_versions(report, out := __import__("io").StringIO())
    assert "@stable" in out.getvalue()
    assert f"{V[1]:<40} deleted" in out.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"{}",
        b'{"files": {"../../x": {"size": 1, "sha256": "%s"}}}' % (b"0" * 64),
        b'{"files": {"a": {"size": -1, "sha256": "%s"}}}' % (b"0" * 64),
        b'{"files": {"a": {"size": 1, "sha256": "short"}}}',
    ],
)
def test_hostile_manifests_are_70(attempt: Attempt, body: bytes) -> None:
    """A manifest that is none, or names what it must not, is one line and 70."""
    attempt.store.put(f"{NAME}/versions/{V[0]}/manifest.json", body)
    assert code_of(lambda: read_manifest(attempt.store, NAME, V[0])) is ExitCode.NOT_PROVEN


def test_hostile_channels_are_70(attempt: Attempt) -> None:
    """A pointer to something that is no version's name is refused."""
    for body in (b"{}", b"[]", b"x", b'{"version": "../../x"}'):
        attempt.store.put(f"{NAME}/channels/nightly.json", body)
        call = lambda: resolve(attempt.store, NAME, "nightly")  # noqa: E731
        assert code_of(call) is ExitCode.NOT_PROVEN


def test_a_store_that_is_not_there_is_66(tmp_path: Path) -> None:
    """A mistyped folder is not a store in which nothing is published."""
    with pytest.raises(JobError) as caught:
        list_or_prune(f"{tmp_path}/typo/name", keep=None, stop=Stop())
    assert caught.value.code is ExitCode.NOT_FOUND
    assert "there is no such store" in str(caught.value)
