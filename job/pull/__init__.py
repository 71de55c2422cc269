"""Pull: a model and data become Sources, pinned once per run and the same for every attempt."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Source, reuse
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import fingerprint, list_files, refusals, sha256_file, write_json
from job.hub import check_access
from job.progress import Progress
from job.pull import file, hub, package, s3
from job.pull.gguf import Dtype, convert
from job.pull.pin import Hashes, Pin, SourceKind, not_proven
from job.pull.select import check_model
from job.pull.transfer import Opener, download
from job.stop import Stop

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

__all__ = ["pull", "pull_one", "resolve"]


def pull(context: Context) -> tuple[Source, Source, Source | None]:
    """Return the base model, the data and, if it has a source of its own, the held-out data.

    Raises:
        JobError: 65 pickles or code in a model, 66 not there, 70 wrong bytes, 71 disk full,
            74 unreachable, 77 not allowed.
    """
    job, folder = context.job, context.work / "pull"
    with context.stage("pull"):
        check_access(job.publish.hub, stop=context.stop)
        inputs = context.attempt.inputs(lambda: _resolve_all(context, folder))
        write_json(folder / "inputs.json", inputs)  # for the report

        def one(name: str, uri: str, kind: SourceKind) -> Source:
            return pull_one(
                uri,
                folder / name,
                kind=kind,
                stop=context.stop,
                progress=context.progress,
                pin=Pin.model_validate(inputs[name]),
                cache=context.cache,
                dtype=base_dtype(job),
            )

        held_out = job.data.held_out
        return (
            one("model", job.model.source, "model"),
            one("data", job.data.source, "data"),
            one("held_out", held_out, "data") if isinstance(held_out, str) else None,
        )


def base_dtype(job: JobConfig) -> Dtype:
    """Return what a GGUF is unpacked to: as asked, else exact on a CPU and half on a GPU."""
    if job.model.dtype != "auto":
        return job.model.dtype
    return "float32" if job.device == "cpu" else "bfloat16"


def _resolve_all(context: Context, folder: Path) -> dict[str, Any]:
    hashes = Hashes(folder / "hashes.json", context.stop)

    def pin(uri: str, kind: SourceKind) -> dict[str, Any]:
        found = resolve(uri, kind, hashes)
        log.info("input_pinned", source=uri, pinned=found.uri, size_bytes=found.size_bytes)
        return found.model_dump(mode="json")

    held_out = context.job.data.held_out
    return {
        "model": pin(context.job.model.source, "model"),
        "data": pin(context.job.data.source, "data"),
        "held_out": pin(held_out, "data") if isinstance(held_out, str) else None,
        "template_date": datetime.fromtimestamp(context.attempt.started, UTC).date().isoformat(),
    }


def resolve(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    """Return what ``uri`` is exactly, without pulling it: commit or version, sizes, digests."""
    schemes = {"hf://": hub.resolve, "s3://": s3.resolve, "package:": package.resolve}
    found = (call for scheme, call in schemes.items() if uri.startswith(scheme))
    return next(found, file.resolve)(uri, kind, hashes)


def _place(uri: str, kind: SourceKind, pin: Pin) -> Path | Opener:
    """Return where a source lies on this machine, or how its files are streamed."""
    if uri.startswith("hf://"):
        return hub.place(pin, kind)
    if uri.startswith("s3://"):
        return s3.place(pin)
    return package.locate(uri) if uri.startswith("package:") else file.locate(uri)


def pull_one(
    uri: str,
    folder: Path,
    *,
    kind: SourceKind,
    stop: Stop,
    progress: Progress,
    pin: Pin | None = None,
    cache: Path | None = None,
    dtype: Dtype = "float32",
    weights: bool = True,
) -> Source:
    """Bring one source to this machine: into ``folder``, or the shared ``cache``, or in place.

    Args:
        uri: ``hf://``, ``s3://``, ``package:`` or a path.
        folder: Where it goes, unless it is on this machine already.
        kind: Models are checked for code, pickles and torn weights.
        stop: Heard everywhere.
        progress: Told the ETA.
        pin: What it was resolved to; resolved now if None.
        cache: Folder for models that runs share, safe for several at once.
        dtype: What a GGUF is unpacked to.
        weights: False leaves out a model's .safetensors, for a check without them.
    """
    hashes = Hashes(folder.parent / "hashes.json", stop)
    pin = pin or resolve(uri, kind, hashes)
    is_gguf = kind == "model" and any(name.endswith(".gguf") for name in pin.files)
    if kind == "model" and not weights:
        pin = pin.only(lambda name: not name.endswith(".safetensors"))
    home = cache / "sources" if cache is not None and kind == "model" else None
    place = _place(uri, kind, pin)
    if isinstance(place, Path):
        source = _in_place(place, pin, hashes)
    else:
        begun = folder.with_name(f"{folder.name}-gguf") if is_gguf else folder
        kept = _kept(home, pin.uri, pin.fingerprint, begun)
        source = _downloaded(pin, place, kept, stop, progress)
    if is_gguf:
        source = _converted(source, home, folder, dtype, stop, weights)
    if kind == "model":
        check_model(source.folder, source.files, where=uri, weights=weights)
    log.info("pulled", uri=source.uri, size_bytes=pin.size_bytes, num_files=len(source.files))
    return source


def _kept(cache: Path | None, uri: str, digest: str, folder: Path) -> Path:
    """Return the folder in the cache that is this source's alone, or ``folder``."""
    slug = re.sub(r"[^a-z0-9]+", "-", uri.lower()).strip("-")[:60]
    return folder if cache is None else cache / f"{slug}-{digest[:16]}"


def _in_place(place: Path, pin: Pin, hashes: Hashes) -> Source:
    """Use what lies on this machine, once it is what the run pinned."""
    folder = place if place.is_dir() else place.parent
    found: dict[str, str] = {}
    for name, promised in pin.files.items():
        path = folder / name
        found[name] = hashes.sha256(path) if path.is_file() else ""
        if found[name] != promised.sha256:
            what = "has changed since this run pinned it" if found[name] else "is gone"
            raise not_proven(f"{pin.uri}/{name}", what, "put it back, or start a new run")
    return _source(pin, folder, found)


def _source(pin: Pin, folder: Path, files: dict[str, str]) -> Source:
    return Source(
        folder=folder, uri=pin.uri, revision=pin.revision, license=pin.license, files=files
    )


def _downloaded(pin: Pin, open_at: Opener, home: Path, stop: Stop, progress: Progress) -> Source:
    def make(partial: Path) -> Source:
        return _source(pin, partial, download(pin, open_at, partial, stop=stop, progress=progress))

    with _alone(home, stop):
        _drop_if_damaged(home, pin)
        return reuse(home, pin.fingerprint, Source, make, stage="pull")


def _drop_if_damaged(home: Path, pin: Pin) -> None:
    """Throw away a kept copy that is not whole any more; sizes tell, hashing would cost minutes."""
    for name, promised in pin.files.items():
        path = home / name
        if home.exists() and not (path.is_file() and path.stat().st_size == promised.size):
            log.warning("cache_dropped", folder=str(home), reason=f"{name} is not whole")
            shutil.rmtree(home)


def _converted(
    source: Source, cache: Path | None, folder: Path, dtype: Dtype, stop: Stop, weights: bool
) -> Source:
    """Unpack a GGUF, once for each dtype and release of transformers."""
    from importlib.metadata import version

    (name,) = source.files
    releases = version("transformers"), version("gguf")
    made_by = fingerprint("gguf", source.files, dtype, weights, *releases)

    def make(partial: Path) -> Source:
        convert(source.folder / name, partial, dtype=dtype, stop=stop, weights=weights)
        names = [n for n in list_files(partial) if not n.startswith(".")]
        files = {n: sha256_file(partial / n, tick=stop.check) for n in names}
        return source.model_copy(update={"folder": partial, "files": files})

    home = _kept(cache, f"{source.uri}-{dtype}", made_by, folder)
    with _alone(home, stop):
        return reuse(home, made_by, Source, make, stage="pull")


@contextlib.contextmanager
def _alone(home: Path, stop: Stop) -> Iterator[None]:
    """Hold a folder against other processes; the kernel lets go of it if we die."""
    with refusals(str(home.parent)):
        home.parent.mkdir(parents=True, exist_ok=True)
        lock = open(home.with_name(f".{home.name}.lock"), "a", encoding="utf-8")  # noqa: SIM115
    with lock:
        waited = False
        while not _locked(lock.fileno()):
            if not waited:
                log.info("pull_waits", reason="another process pulls it", folder=str(home))
            waited = True
            stop.wait(0.2)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        what, do = f"can't be locked ({error.strerror})", "mount it with locks, or use another"
        raise JobError(ExitCode.CONFIG, "the cache's folder", what, do) from error
    return True
