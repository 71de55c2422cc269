"""``hf://`` against a small Hub on real HTTP, by the real client."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hubserver
import pytest
import sources
from hubserver import Fault, Hub

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.pull import pull_one, resolve
from job.pull.pin import Hashes, Pin, SourceKind
from job.stop import Stop, preempted

MODEL = "hf://org/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubserver.hub_server() as server:
        hubserver.hub_environment(server, monkeypatch)
        monkeypatch.setattr("job.retry.FIRST_WAIT_S", 0.01)
        yield server


def pulled(
    uri: str, folder: Path, kind: SourceKind = "model", stop: Stop | None = None, **more: Any
) -> Any:
    return pull_one(uri, folder / "x", kind=kind, stop=stop or Stop(), progress=Progress(), **more)


def pin_of(uri: str, folder: Path, kind: SourceKind = "model") -> Pin:
    return resolve(uri, kind, Hashes(folder / "hashes.json", Stop()))


def refusal(uri: str, folder: Path, kind: SourceKind = "model") -> JobError:
    with pytest.raises(JobError) as caught:
        pulled(uri, folder, kind)
    assert "\n" not in str(caught.value)
    assert not (folder / "x").exists()
    return caught.value


def test_a_model_comes_whole_with_its_commit_and_licence(hub: Hub, tmp_path: Path) -> None:
    """What is pulled is what the repository holds, named by its commit."""
    files = sources.model_files()
    commit = hub.add("org/model", files)
    source = pulled(MODEL, tmp_path)
    assert source.uri == f"hf://org/model@{commit}"
    assert source.revision == commit
    assert source.license == "apache-2.0"
    assert {n: hashlib.sha256(b).hexdigest() for n, b in files.items()} == source.files
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_pin_holds_when_the_branch_moves(hub: Hub, tmp_path: Path) -> None:
    """A later attempt pulls the commit that the first one resolved."""
    hub.add("org/model", sources.model_files())
    pin = pin_of(MODEL, tmp_path)
    hub.repos["models/org/model"].commit(sources.model_files(config__json=b'{"moved": 1}'))
    source = pulled(MODEL, tmp_path, pin=pin)
    assert (source.folder / "config.json").read_bytes() == sources.CONFIG


def test_pickles_beside_safetensors_are_not_pulled(hub: Hub, tmp_path: Path) -> None:
    """A repository's .bin, its other formats and its folders of copies stay where they are."""
    more = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": sources.safetensors(),
        "original/model.safetensors": sources.safetensors(),
        "model.py": b"boom",
    }
    hub.add("org/model", {**sources.model_files(), **more})
    assert set(pulled(MODEL, tmp_path).files) == set(sources.model_files())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_a_model_of_pickles_only_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """Weights that can run code are code 65, before anything is pulled."""
    hub.add("org/model", {"config.json": sources.CONFIG, name: b"pickle"})
    error = refusal(MODEL, tmp_path)
    assert error.code is ExitCode.DATA
    assert name in str(error)
    assert hub.count("/resolve/") == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """A model that names code of its own (auto_map) is code 65."""
    hub.add("org/model", {**sources.model_files(), name: b'{"auto_map": {"AutoModel": "x.Y"}}'})
    with pytest.raises(JobError, match="auto_map") as caught:
        pulled(MODEL, tmp_path)
    assert caught.value.code is ExitCode.DATA


def test_torn_safetensors_are_refused(hub: Hub, tmp_path: Path) -> None:
    """A shard that is shorter than its header promises is code 70."""
    torn = sources.safetensors(3000)[:-100]
    hub.add("org/model", sources.model_files(model__safetensors=torn))
    with pytest.raises(JobError, match="torn") as caught:
        pulled(MODEL, tmp_path)
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_a_missing_repository_is_not_found(hub: Hub, tmp_path: Path) -> None:
    """A wrong name is code 66."""
    assert refusal("hf://org/nothing", tmp_path).code is ExitCode.NOT_FOUND


def test_a_missing_revision_is_not_found(hub: Hub, tmp_path: Path) -> None:
    """A revision that does not exist is code 66, and the line says it is the revision."""
    hub.add("org/model", sources.model_files())
    error = refusal(f"{MODEL}@v9", tmp_path)
    assert error.code is ExitCode.NOT_FOUND
    assert "revision" in str(error)


def test_a_gated_repository_without_a_token_is_not_allowed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated and no token is code 77, with HF_TOKEN named; with the token it is pulled."""
    hub.add("org/model", sources.model_files(), gated=True)
    hubserver.hub_environment(hub, monkeypatch, token=None)
    error = refusal(MODEL, tmp_path)
    assert error.code is ExitCode.NOT_ALLOWED
    assert "HF_TOKEN" in str(error)
    hubserver.hub_environment(hub, monkeypatch)
    assert pulled(MODEL, tmp_path).revision


def test_a_wrong_token_is_not_allowed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that the Hub refuses are code 77."""
    hub.add("org/model", sources.model_files())
    hub.faults = [Fault("GET /api/models", "status", status=403)]
    assert refusal(MODEL, tmp_path).code is ExitCode.NOT_ALLOWED


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """A file that is not what its LFS or git digest promises is asked for again, then code 70."""
    hub.add("org/model", sources.model_files())
    hub.faults = [Fault(f"/resolve/.*{name}", "corrupt", times=9)]
    assert refusal(MODEL, tmp_path).code is ExitCode.NOT_PROVEN
    assert hub.count(f"/resolve/.*/{name}") == 2


def test_one_flipped_bit_is_mended_by_asking_again(hub: Hub, tmp_path: Path) -> None:
    """Wrong bytes once are pulled once more, and are right."""
    files = sources.model_files()
    hub.add("org/model", files)
    hub.faults = [Fault("/resolve/.*safetensors", "corrupt")]
    source = pulled(MODEL, tmp_path)
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_broken_stream_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    """After half of a file the rest is asked for, not the whole."""
    files = sources.model_files()
    hub.add("org/model", files)
    hub.faults = [Fault("/resolve/.*safetensors", "cut")]
    source = pulled(MODEL, tmp_path)
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert len(hub.ranges) == 1
    assert int(hub.ranges[0].removeprefix("bytes=").rstrip("-")) > 0


def test_a_killed_pull_goes_on_in_the_next_attempt(hub: Hub, tmp_path: Path) -> None:
    """A stop in the middle keeps what came; the next attempt asks for the rest only."""
    hub.add("org/model", sources.model_files())
    stop = Stop()
    hub.faults = [
        Fault("/resolve/.*safetensors", "cut"),
        Fault("/resolve/.*safetensors", "hold", before=lambda: stop.request(preempted("SIGTERM"))),
    ]
    # The held answer never comes: the stream has to end by the stop alone.
    threading.Timer(2.0, hub.over.set).start()
    with pytest.raises(JobError) as caught:
        pulled(MODEL, tmp_path, stop=stop)
    assert caught.value.code is ExitCode.PREEMPTED
    assert not (tmp_path / "x").exists()
    before = len(hub.ranges)
    source = pulled(MODEL, tmp_path)
    assert source.files["model.safetensors"]
    assert len(hub.ranges) >= before
    assert hub.ranges[-1] != "bytes=0-"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path, status: int) -> None:
    """429 and 5xx while streaming are tried again under the deadline."""
    hub.add("org/model", sources.model_files())
    headers = {"RateLimit": '"api";r=0;t=1'} if status == 429 else {}
    hub.faults = [Fault("/resolve/", "status", status=status, headers=headers)]
    assert pulled(MODEL, tmp_path).revision


def test_past_the_deadline_it_is_the_store(hub: Hub, tmp_path: Path) -> None:
    """A server that stays busy is code 74 in the end, as soon as the stop's patience is."""
    hub.add("org/model", sources.model_files())
    hub.faults = [Fault("/resolve/", "status", times=999)]
    with pytest.raises(JobError) as caught:
        pulled(MODEL, tmp_path, stop=Stop(patience_s=0.2))
    assert caught.value.code is ExitCode.STORE


def test_offline_asks_nobody_and_says_so(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE a model that is not in the client's cache is code 66, without a request."""
    from huggingface_hub import constants

    hub.add("org/model", sources.model_files())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    error = refusal(MODEL, tmp_path)
    assert error.code is ExitCode.NOT_FOUND
    assert "HF_HUB_OFFLINE" in str(error)
    assert hub.requests == []


def test_offline_uses_the_clients_own_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``hf download`` brought is used in place when there is no network."""
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = hub.add("org/model", sources.model_files())
    folder = snapshot_download("org/model", cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num_requests = len(hub.requests)
    source = pulled(MODEL, tmp_path)
    assert str(source.folder) == folder
    assert source.revision == commit
    assert len(hub.requests) == num_requests


def test_the_training_split_of_a_data_set_is_taken(hub: Hub, tmp_path: Path) -> None:
    """The card's default configuration says which files are the training split."""
    card = (
        b"---\nlicense: cc0-1.0\nconfigs:\n- config_name: other\n  data_files: other/*\n"
        b"- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        b"  - split: test\n    path: data/test-*\n---\n"
    )
    files = {
        "README.md": card,
        "data/train-0.jsonl": sources.ROWS,
        "data/test-0.jsonl": sources.ROWS,
        "other/a.jsonl": sources.ROWS,
    }
    hub.add("org/data", files, kind="dataset")
    source = pulled("hf://org/data", tmp_path, "data")
    assert list(source.files) == ["data/train-0.jsonl"]
    assert source.license == "cc0-1.0"


def test_a_data_set_without_rows_is_not_found(hub: Hub, tmp_path: Path) -> None:
    """A repository without a readable file is code 66."""
    hub.add("org/data", {"README.md": b"hello"}, kind="dataset")
    assert refusal("hf://org/data", tmp_path, "data").code is ExitCode.NOT_FOUND


def test_the_cache_is_pulled_into_once(hub: Hub, tmp_path: Path) -> None:
    """Two runs at once share one download, and a third finds it there."""
    hub.add("org/model", sources.model_files())
    cache, found = tmp_path / "cache", []

    def one(name: str) -> None:
        found.append(pulled(MODEL, tmp_path / name, cache=cache).folder)

    threads = [threading.Thread(target=one, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one("c")
    assert len(set(found)) == 1
    assert found[0].is_relative_to(cache)
    assert hub.count("/resolve/.*safetensors") == 1


def test_a_damaged_cache_is_pulled_again(hub: Hub, tmp_path: Path) -> None:
    """A truncated file in the cache is noticed and replaced."""
    files = sources.model_files()
    hub.add("org/model", files)
    folder = pulled(MODEL, tmp_path / "a", cache=tmp_path / "cache").folder
    os.truncate(folder / "model.safetensors", 10)
    again = pulled(MODEL, tmp_path / "b", cache=tmp_path / "cache")
    assert (again.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_check_leaves_the_weights_where_they_are(hub: Hub, tmp_path: Path) -> None:
    """Without weights: config and tokenizer only."""
    hub.add("org/model", sources.model_files())
    source = pulled(MODEL, tmp_path, weights=False)
    assert set(source.files) == {"README.md", "config.json", "tokenizer.json"}
    assert hub.count("/resolve/.*safetensors") == 0


def test_a_disk_that_is_too_small_is_told_before(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed and what is free is code 71, before the first byte."""
    hub.add("org/model", sources.model_files())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    error = refusal(MODEL, tmp_path)
    assert error.code is ExitCode.OUT_OF_RESOURCES
    assert "MB are free" in str(error)
    assert hub.count("/resolve/") == 0


def test_a_disk_that_fills_up_is_out_of_resources(hub: Hub, tmp_path: Path) -> None:
    """A write that the system refuses in the middle of a file is code 71."""
    hub.add("org/model", sources.model_files())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        error = refusal(MODEL, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.code is ExitCode.OUT_OF_RESOURCES
    assert "full" in str(error)


def test_progress_tells_how_long(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's progress, and so its head, shows how long the pull will take yet."""
    hub.add("org/model", sources.model_files())
    monkeypatch.setattr("job.store.transfer.SAY_EVERY_S", 0)
    progress = Progress()
    pull_one(MODEL, tmp_path / "x", kind="model", stop=Stop(), progress=progress)
    assert progress.snapshot()["eta_s"] == 0


def test_a_person_who_checks_is_told_soon_that_the_hub_is_away(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``check`` does not try for the 20 minutes that a run would."""
    from job.cli import main

    monkeypatch.setattr("job.stop.PERSONS_PATIENCE_S", 0.2)
    hub.faults = [Fault("/api/", "status", times=999)]
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: away\ndevice: cpu\nstore: {tmp_path}/store\n"
        "model: {source: 'hf://org/model'}\ndata: {source: 'hf://org/rows'}\n"
    )
    assert main(["check", str(job)]) == ExitCode.STORE
    assert "no success within 0 s" in capsys.readouterr().out
