"""Local paths, packages and the checks that every model goes through."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import sources
from hypothesis import given, settings
from hypothesis import strategies as st

from job import pull
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.pull import pull_one, resolve
from job.pull.pin import Hashes, Pin, PinnedFile, SourceKind
from job.pull.select import check_safetensors, front_matter, selected
from job.pull.transfer import RestartError, _File
from job.retry import TransientError
from job.stop import Stop
from job.store.transfer import Meter


def pulled(uri: str, folder: Path, kind: SourceKind = "model", **more: Any) -> Any:
    return pull_one(uri, folder / "x", kind=kind, stop=Stop(), progress=Progress(), **more)


def pin_of(uri: str, folder: Path, kind: SourceKind = "model") -> Pin:
    return resolve(uri, kind, Hashes(folder / "hashes.json", Stop()))


def code_of(uri: str, folder: Path, kind: SourceKind = "model", **more: Any) -> ExitCode:
    with pytest.raises(JobError) as caught:
        pulled(uri, folder, kind, **more)
    return caught.value.code


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    """Nothing is copied, and the source's name holds no path of this machine."""
    folder = sources.write_files(tmp_path / "base", sources.model_files())
    source = pulled(str(folder), tmp_path / "work")
    assert source.folder == folder
    assert source.uri == "file:base"
    assert source.license == "apache-2.0"
    assert str(tmp_path) not in pin_of(str(folder), tmp_path / "work").model_dump_json()


def test_a_file_of_rows_is_one_file(tmp_path: Path) -> None:
    """A path to a file is that file, whatever lies beside it."""
    folder = sources.write_files(tmp_path, {"a.jsonl": sources.ROWS, "b.jsonl": sources.ROWS})
    source = pulled(str(folder / "a.jsonl"), tmp_path / "work", "data")
    assert list(source.files) == ["a.jsonl"]


def test_a_folder_of_rows_is_all_its_data_files(tmp_path: Path) -> None:
    """jsonl, json, parquet and csv, each also packed; nothing hidden, nothing else."""
    names = ["a.jsonl", "b/c.parquet", "d.csv.gz", "e.json.zst", ".hidden.jsonl", "notes.txt"]
    sources.write_files(tmp_path / "data", dict.fromkeys(names, b"x"))
    source = pulled(str(tmp_path / "data"), tmp_path / "work", "data")
    assert list(source.files) == ["a.jsonl", "b/c.parquet", "d.csv.gz", "e.json.zst"]


def test_hashes_are_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same size and time is not read again; a new time is."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(sources.ROWS)
    first = Hashes(tmp_path / "hashes.json", Stop()).sha256(path)
    reads: list[Path] = []
    monkeypatch.setattr("job.pull.pin.sha256_file", lambda p, **_: reads.append(p) or "new")
    assert Hashes(tmp_path / "hashes.json", Stop()).sha256(path) == first
    os.utime(path, (1, 1))
    assert Hashes(tmp_path / "hashes.json", Stop()).sha256(path) == "new"
    assert reads == [path]


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_pinned_file_that_changed_is_refused(tmp_path: Path, change: str) -> None:
    """A later attempt that finds other rows than the run pinned ends with 70."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(sources.ROWS)
    folder = sources.write_files(tmp_path / "data", {"a.jsonl": sources.ROWS, "b.jsonl": b"{}"})
    pin = pin_of(str(folder), tmp_path / "work", "data")
    if change == "gone":
        (folder / "b.jsonl").unlink()
    else:
        (folder / "b.jsonl").write_bytes(b"[]")
    assert code_of(str(folder), tmp_path / "work", "data", pin=pin) is ExitCode.NOT_PROVEN


def test_a_missing_path_is_not_found(tmp_path: Path) -> None:
    """A path that is not there is code 66."""
    assert code_of(str(tmp_path / "nothing"), tmp_path) is ExitCode.NOT_FOUND


def test_a_folder_without_a_model_is_not_found(tmp_path: Path) -> None:
    """A folder with a config and no weights is code 66, with pickles only 65."""
    folder = sources.write_files(tmp_path / "base", {"config.json": sources.CONFIG})
    assert code_of(str(folder), tmp_path / "w") is ExitCode.NOT_FOUND
    sources.write_files(folder, {"pytorch_model.bin": b"pickle"})
    assert code_of(str(folder), tmp_path / "w") is ExitCode.DATA


def test_a_missing_shard_is_not_found(tmp_path: Path) -> None:
    """Every shard that the index names has to be there."""
    index = b'{"weight_map": {"w": "model-00002-of-00002.safetensors"}}'
    files = sources.model_files() | {"model.safetensors.index.json": index}
    folder = sources.write_files(tmp_path / "base", files)
    assert code_of(str(folder), tmp_path / "w") is ExitCode.NOT_FOUND


@given(cut=st.integers(0, 200), extra=st.binary(max_size=9), flip=st.integers(0, 120))
def test_torn_weights_never_pass(
    tmp_path_factory: pytest.TempPathFactory, cut: int, extra: bytes, flip: int
) -> None:
    """Whatever is cut off, added, or flipped in the header: code 70, or the sizes still fit."""
    path = tmp_path_factory.getbasetemp() / f"torn-{os.getpid()}.safetensors"
    whole = sources.safetensors(100)
    path.write_bytes(whole[: max(0, len(whole) - cut)] + extra)
    if cut == len(extra) == 0:
        check_safetensors(path, where="w")
    elif cut != len(extra):
        with pytest.raises(JobError) as caught:
            check_safetensors(path, where="w")
        assert caught.value.code is ExitCode.NOT_PROVEN
    mutant = bytearray(whole)
    mutant[flip % len(whole)] ^= 0x40
    path.write_bytes(mutant)
    with contextlib.suppress(JobError):
        check_safetensors(path, where="w")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    """A length of exabytes is refused, not allocated."""
    path = tmp_path / "m.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(JobError, match="torn"):
        check_safetensors(path, where="w")


def test_a_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an installed package is found without running the package's code."""
    package = tmp_path / "site" / "some_rows"
    sources.write_files(package, {"__init__.py": b"raise SystemExit(9)", "a.jsonl": sources.ROWS})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = pulled("package:some_rows/a.jsonl", tmp_path / "work", "data")
    assert source.uri == "package:some_rows/a.jsonl"
    assert list(source.files) == ["a.jsonl"]
    assert "some_rows" not in sys.modules


@pytest.mark.parametrize("uri", ["package:no_such_package/a", "package:job/no-such-file"])
def test_a_missing_package_is_not_found(tmp_path: Path, uri: str) -> None:
    """No package, or no file in it, is code 66."""
    assert code_of(uri, tmp_path, "data") is ExitCode.NOT_FOUND


def test_a_package_file_cant_lead_outside(tmp_path: Path) -> None:
    """An upward path is refused."""
    assert code_of("package:job/../secrets", tmp_path, "data") is ExitCode.NOT_PROVEN


@settings(max_examples=50)
@given(st.text(max_size=100))
def test_any_card_is_read(text: str) -> None:
    """No card's text makes the front matter raise."""
    assert isinstance(front_matter(text), dict)
    assert isinstance(front_matter(f"---\n{text}\n---\n"), dict)


def test_a_gguf_alone_is_a_model() -> None:
    """One GGUF and no safetensors: the GGUF; with safetensors beside it, those."""
    assert selected(["a.gguf", "README.md"], "model", where="x") == ["a.gguf"]
    names = ["a.gguf", "config.json", "model.safetensors"]
    assert selected(names, "model", where="x") == names[1:]


def test_a_cache_that_knows_no_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """78, and not an endless wait for another process."""
    import errno

    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("job.pull.fcntl.flock", flock)
    base = sources.write_files(tmp_path / "base", sources.model_files())
    with pytest.raises(JobError, match="can't be locked") as caught, pull._alone(base, Stop()):
        pytest.fail("went on")
    assert caught.value.code is ExitCode.CONFIG


def test_a_server_without_ranges_that_breaks_ends_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never comes further than the first time: no hammering, and 74."""
    monkeypatch.setattr("job.retry.FIRST_WAIT_S", 0.01)
    asked: list[int] = []

    @contextlib.contextmanager
    def cut(_name: str, _pinned: Any, offset: int) -> Any:
        asked.append(offset)
        if offset:
            raise RestartError

        def chunks() -> Any:
            yield b"x" * 10
            raise TransientError("cut")

        yield chunks()

    pin = Pin(uri="hf://a/b", files={"f": PinnedFile(size=100)})
    file = _File(pin, "f", tmp_path / "f", cut, Meter(Progress(), 100), Stop(patience_s=0.3))
    with pytest.raises(JobError) as caught:
        file.pull()
    assert caught.value.code is ExitCode.STORE
    assert 2 < len(asked) < 100
