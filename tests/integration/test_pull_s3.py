"""``s3://`` as a source, against a real S3 server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
import servers
import sources

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.pull import pull_one, resolve
from job.pull.pin import Hashes, Pin, SourceKind
from job.stop import Stop


def put(server: servers.S3Server, root: str, files: dict[str, bytes]) -> None:
    s3 = boto3.client("s3", **server.client_options())
    prefix = root.removeprefix(f"s3://{server.bucket}/")
    for name, body in files.items():
        s3.put_object(Bucket=server.bucket, Key=f"{prefix}/{name}", Body=body)


def pulled(uri: str, folder: Path, kind: SourceKind = "model", **more: Any) -> Any:
    return pull_one(uri, folder / "x", kind=kind, stop=Stop(), progress=Progress(), **more)


def pin_of(uri: str, folder: Path, kind: SourceKind) -> Pin:
    return resolve(uri, kind, Hashes(folder / "hashes.json", Stop()))


def test_a_prefix_is_pulled_whole(seaweed: servers.S3Server, s3_root: str, tmp_path: Path) -> None:
    """A model under a prefix comes with its files, without its pickles."""
    files = sources.model_files()
    put(seaweed, s3_root, {**files, "training_args.bin": b"pickle"})
    source = pulled(s3_root, tmp_path)
    assert set(source.files) == set(files)
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_key_is_pulled_alone(seaweed: servers.S3Server, s3_root: str, tmp_path: Path) -> None:
    """A single object is one file, though others begin with its name."""
    put(seaweed, s3_root, {"rows.jsonl": sources.ROWS, "rows.jsonl.gz": b"another"})
    source = pulled(f"{s3_root}/rows.jsonl", tmp_path, "data")
    assert list(source.files) == ["rows.jsonl"]
    assert (source.folder / "rows.jsonl").read_bytes() == sources.ROWS


def test_an_object_that_changed_is_not_taken_for_the_pinned_one(
    seaweed: servers.S3Server, s3_root: str, tmp_path: Path
) -> None:
    """A later attempt never trains on other rows: 66, and it says that they changed."""
    put(seaweed, s3_root, {"rows.jsonl": sources.ROWS})
    pin = pin_of(s3_root, tmp_path, "data")
    put(seaweed, s3_root, {"rows.jsonl": sources.ROWS.replace(b"one", b"six")})
    with pytest.raises(JobError, match="changed") as caught:
        pulled(s3_root, tmp_path, "data", pin=pin)
    assert caught.value.code is ExitCode.NOT_FOUND
    assert not (tmp_path / "x").exists()


def test_a_begun_file_goes_on(seaweed: servers.S3Server, s3_root: str, tmp_path: Path) -> None:
    """What an attempt before this one brought is kept, and the whole is hashed."""
    files = sources.model_files()
    put(seaweed, s3_root, files)
    pin = pin_of(s3_root, tmp_path, "model")
    begun = tmp_path / "x.partial"
    begun.mkdir()
    (begun / ".fingerprint").write_text(pin.fingerprint)
    (begun / "model.safetensors.incomplete").write_bytes(files["model.safetensors"][:1000])
    source = pulled(s3_root, tmp_path, pin=pin)
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_begun_bytes_that_are_wrong_are_noticed(
    seaweed: servers.S3Server, s3_root: str, tmp_path: Path
) -> None:
    """The ETag of a plain object is its MD5, and what lay on disk is held against it."""
    files = sources.model_files()
    put(seaweed, s3_root, files)
    pin = pin_of(s3_root, tmp_path, "model")
    begun = tmp_path / "x.partial"
    begun.mkdir()
    (begun / ".fingerprint").write_text(pin.fingerprint)
    (begun / "model.safetensors.incomplete").write_bytes(b"wrong" * 200)
    source = pulled(s3_root, tmp_path, pin=pin)
    assert (source.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize("uri", ["s3://nobucket/data", "{root}/nothing"])
def test_what_is_not_there_is_not_found(
    seaweed: servers.S3Server, s3_root: str, tmp_path: Path, uri: str
) -> None:
    """A missing bucket or prefix is code 66."""
    with pytest.raises(JobError) as caught:
        pulled(uri.format(root=s3_root), tmp_path, "data")
    assert caught.value.code is ExitCode.NOT_FOUND


def test_wrong_credentials_are_not_allowed(
    seaweed: servers.S3Server, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key is code 77."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(JobError) as caught:
        pulled(s3_root, tmp_path, "data")
    assert caught.value.code is ExitCode.NOT_ALLOWED


def test_a_version_that_was_pinned_is_pulled_though_a_newer_one_came(
    seaweed: servers.S3Server, s3_root: str, tmp_path: Path
) -> None:
    """Where the bucket keeps versions, tonight's run finishes on the rows that it began with."""
    s3 = boto3.client("s3", **seaweed.client_options())
    bucket = "versioned" + s3_root[-8:]
    s3.create_bucket(Bucket=bucket)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket=bucket, Key="d/rows.jsonl", Body=sources.ROWS)
    pin = pin_of(f"s3://{bucket}/d", tmp_path, "data")
    s3.put_object(Bucket=bucket, Key="d/rows.jsonl", Body=b'{"text": "new"}')
    source = pulled(f"s3://{bucket}/d", tmp_path, "data", pin=pin)
    assert (source.folder / "rows.jsonl").read_bytes() == sources.ROWS
