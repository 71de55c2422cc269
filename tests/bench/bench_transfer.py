"""A version up (read back) and down, against rclone copy + check --download, and s5cmd.

All three move the same files to and from the same SeaweedFS on this machine, in one run:

    python tests/bench/bench_transfer.py --megabytes 2000

Up: write, then read every byte back and compare. Down: fetch, then verify. s5cmd verifies nothing;
its lines are its plain copies.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import servers  # noqa: E402

from job.fetch import fetch  # noqa: E402
from job.progress import Progress  # noqa: E402
from job.stop import Stop  # noqa: E402
from job.store import open_store  # noqa: E402
from job.store.runs import take  # noqa: E402
from job.store.versions import write_version  # noqa: E402

SHARDS = 7
VERSION = "20261120T010203Z-e1-0123abcd"
Timed = Callable[[], object]


def make_files(folder: Path, size: int) -> dict[str, Path]:
    """Write an adapter of 2 % and a merged model in seven shards, of random bytes."""
    sizes = {"adapter/adapter_model.safetensors": size // 50}
    shard = (size - size // 50) // SHARDS
    sizes |= {f"merged/model-{n}-of-{SHARDS}.safetensors": shard for n in range(1, SHARDS + 1)}
    for name, count in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as handle:
            chunks = range(0, count, 1 << 24)
            handle.writelines(os.urandom(min(1 << 24, count - start)) for start in chunks)
    (folder / "adapter/adapter_config.json").write_text("{}")
    return {part: folder / part for part in ("adapter", "merged")}


def ours(root: str, folders: dict[str, Path], target: Path) -> tuple[Timed, Timed]:
    """Return publish and fetch as the job and a person do them."""
    stop = Stop()
    store = open_store(root, stop=stop)
    attempt = take(store, "bench-1", owner="b", job_text=b"", stop=stop, progress=Progress())

    def up() -> None:
        write_version(attempt, "bench", VERSION, folders, {}, stop=stop)
        attempt.end({"code": 0})

    return up, lambda: fetch(f"{root}/bench@{VERSION}", target, stop=Stop())


def rclone(
    server: servers.S3Server, bucket: str, source: Path, target: Path
) -> tuple[Timed, Timed]:
    """Return rclone's copy and check, with its defaults but for the server."""
    config = server.folder / "rclone.conf"
    keys = f"access_key_id = {server.access_key}\nsecret_access_key = {server.secret_key}\n"
    kind = f"[s]\ntype = s3\nprovider = SeaweedFS\nendpoint = {server.endpoint}\n"
    config.write_text(kind + keys)
    command = [servers.program("rclone"), f"--config={config}", "--quiet"]

    def copy(one: str, other: str) -> None:
        subprocess.run([*command, "copy", one, other], check=True)
        subprocess.run([*command, "check", "--download", one, other], check=True)

    remote = f"s:{bucket}/rclone"
    return lambda: copy(str(source), remote), lambda: copy(remote, str(target))


def s5cmd(server: servers.S3Server, bucket: str, source: Path, target: Path) -> tuple[Timed, Timed]:
    """Return s5cmd's plain copies."""
    command = [servers.program("s5cmd"), "--endpoint-url", server.endpoint, "--log", "error", "cp"]
    environment = {**os.environ, **server.environment()}

    def copy(one: str, other: str) -> None:
        subprocess.run([*command, one, other], check=True, env=environment)

    remote = f"s3://{bucket}/s5cmd/"
    return lambda: copy(f"{source}/", remote), lambda: copy(f"{remote}*", f"{target}/")


@contextlib.contextmanager
def environment_of(server: servers.S3Server) -> Iterator[None]:
    """Lead boto3 in this process to ``server``."""
    before = dict(os.environ)
    os.environ.update(server.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def bench(name: str, calls: tuple[Timed, Timed], size: int, target: Path) -> str:
    """Time one tool up and down, and return its row."""
    cells = []
    for call in calls:
        began, used = time.perf_counter(), cpu_seconds()
        call()
        seconds, used = time.perf_counter() - began, cpu_seconds() - used
        cells.append(f"{seconds:7.2f} s {size / seconds / 1e6:5.0f} MB/s {used:6.2f} s CPU")
    shutil.rmtree(target)
    return f"{name:<32} {'   '.join(cells)}"


def cpu_seconds() -> float:
    """Return the processor time of this process and of the children that it waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, whose))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = int(os.environ.get("BENCH_MEGABYTES", "2000"))
    parser.add_argument("--megabytes", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    size = arguments.megabytes * 1_000_000
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folders = make_files(Path(name, "source"), size)
        print(f"{arguments.megabytes} MB in {SHARDS + 2} files, SeaweedFS on this machine")
        print(f"{'':<32} {'up, verified':>34}   {'down, verified':>34}")
        for _ in range(arguments.rounds):
            with servers.seaweedfs() as server, environment_of(server):
                source, target = Path(name, "source"), Path(name, "target")
                for label, calls in (
                    ("lora-job", ours(f"s3://{server.bucket}/x", folders, target)),
                    (
                        "rclone copy, check --download",
                        rclone(server, server.bucket, source, target),
                    ),
                    ("s5cmd cp (verifies nothing)", s5cmd(server, server.bucket, source, target)),
                ):
                    print(bench(label, calls, size, target), flush=True)


if __name__ == "__main__":
    main()
