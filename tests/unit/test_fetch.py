"""fetch: verified, resumed by file, renamed when whole; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from job.errors import ExitCode, JobError
from job.fetch import fetch
from job.stop import Stop
from job.store import folder as folder_module
from job.store import open_store
from job.store.versions import move_channel

NAME = "demo"
FILES = {
    "adapter/adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter/adapter_model.safetensors": b"a" * 100_000,
    "merged/model.safetensors": b"m" * 200_000,
}


class Published(NamedTuple):
    """A version that was written by hand."""

    root: str
    version: str
    place: Path

    @property
    def spec(self) -> str:
        """What fetch is asked for."""
        return f"{self.root}/{NAME}@{self.version}"


def publish(
    root: Path, number: int, files: dict[str, bytes], promised: dict[str, Any] | None = None
) -> Published:
    """Write a version by hand; ``promised`` replaces entries of its manifest."""
    version = f"202611{number:02d}T010203Z-e1-0123abcd"
    place = root / NAME / "versions" / version
    entries: dict[str, Any] = {}
    for name, body in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        entries[name] = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    entries |= promised or {}
    manifest = {"files": entries, "name": NAME, "version": version, "run": "r", "epoch": 1}
    (place / "manifest.json").write_text(json.dumps(manifest | {"lineage": {}}))
    return Published(str(root), version, place)


def code_of(spec: str, folder: Path) -> ExitCode:
    with pytest.raises(JobError) as caught:
        fetch(spec, folder, stop=Stop())
    return caught.value.code


def test_a_fetched_version_is_the_published_one(tmp_path: Path) -> None:
    """By channel, by version or as the newest: the same files, and nothing beside the folder."""
    made = publish(tmp_path / "store", 1, FILES)
    move_channel(open_store(made.root, stop=Stop()), NAME, "nightly", made.version, (1, 1))
    for number, reference in enumerate(("", "@nightly", f"@{made.version}")):
        target = tmp_path / "out" / str(number)
        report = fetch(f"{made.root}/{NAME}{reference}", target, stop=Stop())
        assert {n: (target / n).read_bytes() for n in FILES} == FILES
        assert report["version"] == made.version
        assert (target / "manifest.json").exists()
    assert sorted(os.listdir(tmp_path / "out")) == ["0", "1", "2"]


def test_fetch_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second fetch takes only what is missing or damaged in the .partial folder."""
    made = publish(tmp_path / "store", 1, FILES)
    partial = tmp_path / "out.partial"
    (partial / "adapter").mkdir(parents=True)
    (partial / "adapter/adapter_model.safetensors").write_bytes(b"a" * 100_000)
    (partial / "merged").mkdir()
    (partial / "merged/model.safetensors").write_bytes(b"x" * 200_000)
    (partial / "of-another-version").write_bytes(b"x")
    taken: list[str] = []
    download = folder_module.FolderStore.download

    def counted(self: Any, key: str, *args: Any, **more: Any) -> None:
        taken.append(key.split(made.version + "/")[1])
        download(self, key, *args, **more)

    monkeypatch.setattr(folder_module.FolderStore, "download", counted)
    report = fetch(made.spec, tmp_path / "out", stop=Stop())
    assert sorted(taken) == ["adapter/adapter_config.json", "merged/model.safetensors"]
    assert report["already_there"] == 1
    assert {n: (tmp_path / "out" / n).read_bytes() for n in FILES} == FILES
    assert not (tmp_path / "out" / "of-another-version").exists()
    assert not partial.exists()


def test_a_newer_version_replaces_an_older_one_at_once(tmp_path: Path) -> None:
    """Fetching into a fetched folder replaces it; the same version again only verifies, and mends."""
    first = publish(tmp_path / "store", 1, FILES)
    fetch(first.spec, tmp_path / "out", stop=Stop())
    second = publish(tmp_path / "store", 2, {"adapter/adapter_config.json": b"{}"})
    fetch(second.spec, tmp_path / "out", stop=Stop())
    names = sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert names == ["adapter_config.json", "manifest.json"]
    fetch(first.spec, tmp_path / "out", stop=Stop())
    (tmp_path / "out" / "merged/model.safetensors").write_bytes(b"damaged")
    assert fetch(first.spec, tmp_path / "out", stop=Stop())["already_there"] == 2
    assert (tmp_path / "out" / "merged/model.safetensors").read_bytes() == b"m" * 200_000


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    """A folder that no fetch made is refused (64), with everything in it left alone."""
    made = publish(tmp_path / "store", 1, FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert code_of(made.spec, tmp_path / "out") is ExitCode.USAGE
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
    assert code_of(made.spec, tmp_path / "out" / "thesis.txt") is ExitCode.USAGE


@pytest.mark.parametrize("harm", ["flip", "truncate", "lose"])
def test_bytes_that_differ_are_refused(tmp_path: Path, harm: str) -> None:
    """A file that is not what its manifest promises is 70 (66 if gone), and what was there stays."""
    old = publish(tmp_path / "store", 1, FILES)
    fetch(old.spec, tmp_path / "out", stop=Stop())
    made = publish(tmp_path / "store", 2, {**FILES, "merged/model.safetensors": b"n" * 200_000})
    path = made.place / "merged/model.safetensors"
    if harm == "lose":
        path.unlink()
    else:
        path.write_bytes(b"n" * 100 if harm == "truncate" else b"N" + b"n" * 199_999)
    expected = ExitCode.NOT_FOUND if harm == "lose" else ExitCode.NOT_PROVEN
    assert code_of(made.spec, tmp_path / "out") is expected
    assert (tmp_path / "out" / "merged/model.safetensors").read_bytes() == b"m" * 200_000
    assert not (tmp_path / "out.partial" / "merged/model.safetensors").exists()


ONE = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.parametrize(
    "name",
    [
        "../escaped",
        "/tmp/escaped",
        "adapter/../../escaped",
        "adapter\\escaped",
        "adapter/x\0y",
        "adapter//x",
        "./x",
        "ADAPTER/adapter_config.json",
        "adapter/adapter_config.json/x",
        "adapter/.hidden",
        "adapter/adapter_model.bin",
        "merged/pytorch_model.PTH",
        "x.pkl",
    ],
)
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    """Names that leave the folder, collide, hide or hold pickles are 70, and nothing is written."""
    made = publish(tmp_path / "store", 1, FILES, {name: ONE})
    assert code_of(made.spec, tmp_path / "out") is ExitCode.NOT_PROVEN
    assert sorted(os.listdir(tmp_path)) == ["store"]


def test_links_in_the_way_are_not_followed(tmp_path: Path) -> None:
    """A link planted in the .partial folder does not lead a download out of it."""
    made = publish(tmp_path / "store", 1, FILES)
    (tmp_path / "victim").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "adapter").symlink_to(tmp_path / "victim")
    fetch(made.spec, tmp_path / "out", stop=Stop())
    assert os.listdir(tmp_path / "victim") == []


def test_an_adapter_that_imports_code_is_refused(tmp_path: Path) -> None:
    """PEFT imports the library that auto_mapping names: such an adapter is 70."""
    body = b'{"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}'
    made = publish(tmp_path / "store", 1, {"adapter/adapter_config.json": body})
    assert code_of(made.spec, tmp_path / "out") is ExitCode.NOT_PROVEN
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_71(tmp_path: Path) -> None:
    """A version larger than the free disk is refused before the first byte, with both figures."""
    huge = {"merged/huge.safetensors": {"size": 10**15, "sha256": "0" * 64}}
    made = publish(tmp_path / "store", 1, FILES, huge)
    with pytest.raises(JobError) as caught:
        fetch(made.spec, tmp_path / "out", stop=Stop())
    assert caught.value.code is ExitCode.OUT_OF_RESOURCES
    assert "1,000,000,000.3 MB more are needed" in str(caught.value)


def test_a_full_disk_is_71(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up meanwhile is told in one line, and the file that did not fit is gone."""
    made = publish(tmp_path / "store", 1, FILES)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.FolderStore, "_chunks", full)
    assert code_of(made.spec, tmp_path / "out") is ExitCode.OUT_OF_RESOURCES
    assert [p for p in (tmp_path / "out.partial").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("spec", ["nowhere/demo", "store/demo@weekly", "store/other"])
def test_what_is_not_there_is_66(tmp_path: Path, spec: str) -> None:
    """A store, name or channel that does not exist is one line and 66."""
    publish(tmp_path / "store", 1, FILES)
    assert code_of(f"{tmp_path}/{spec}", tmp_path / "out") is ExitCode.NOT_FOUND
    assert not (tmp_path / "out").exists()


def test_readers_beside_a_publisher_see_old_or_new(tmp_path: Path) -> None:
    """While versions appear and the channel moves, each fetch gets one whole version."""
    root = tmp_path / "store"
    store = open_store(str(root), stop=Stop())

    def add(number: int) -> None:
        text = b"%02d" % number
        made = publish(root, number, {"adapter/a": text * 1000, "merged/b": text * 5000})
        move_channel(store, NAME, "nightly", made.version, (number, 1))

    add(1)
    over = threading.Event()
    seen: set[bytes] = set()

    def read(number: int) -> None:
        while not over.is_set():
            target = tmp_path / f"reader-{number}"
            fetch(f"{root}/{NAME}@nightly", target, stop=Stop())
            one, two = (target / "adapter/a").read_bytes(), (target / "merged/b").read_bytes()
            assert (one, two) == (one[:2] * 1000, one[:2] * 5000)
            seen.add(one[:2])
            shutil.rmtree(target)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    for number in range(2, 20):
        add(number)
    over.set()
    for reader in readers:
        reader.join()
    assert len(seen) > 1
