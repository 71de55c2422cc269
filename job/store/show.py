"""What `lora-job versions` and `lora-job storage probe` return and print."""

from __future__ import annotations

from typing import Any, TextIO

from job.errors import ExitCode
from job.stop import Stop
from job.store import open_store
from job.store.probe import probe
from job.store.versions import channels, list_versions, parse_spec, prune


def list_or_prune(spec: str, *, keep: int | None, stop: Stop) -> dict[str, Any]:
    """Return what is published under ``STORE/NAME``, after deleting what is beyond ``keep``."""
    root, name, _ = parse_spec(spec)
    store = open_store(root, stop=stop)
    deleted = [] if keep is None else prune(store, name, keep)
    pointers = {c: pointer["version"] for c, pointer in channels(store, name).items()}
    versions = list_versions(store, name)
    return {"name": name, "versions": versions, "channels": pointers, "deleted": deleted}


def print_versions(report: dict[str, Any], out: TextIO) -> None:
    """Print one line a version, newest last, with its channels."""
    if not report["versions"]:
        print(f"{report['name']}: nothing is published", file=out)
    for row in report["versions"]:
        pointing = "".join(f"  @{channel}" for channel in row["channels"])
        parts = "+".join(row["parts"])
        size = f"{row['size_bytes'] / 1e6:,.1f} MB"
        print(f"{row['version']:<40} {size:>14}  {parts:<16}{pointing}".rstrip(), file=out)
    for version in report["deleted"]:
        print(f"{version:<40} deleted", file=out)


def probe_store(uri: str, *, stop: Stop) -> dict[str, Any]:
    """Try ``uri`` out; ``code`` is 0 if it holds everything, else 78."""
    findings = probe(open_store(uri, stop=stop))
    holds = all(finding["ok"] for finding in findings)
    code = int(ExitCode.VERIFIED if holds else ExitCode.CONFIG)
    return {"store": uri, "code": code, "findings": findings}


def print_findings(report: dict[str, Any], out: TextIO) -> None:
    """Print one line for each thing that was tried, and what it means."""
    for finding in report["findings"]:
        mark = "ok    " if finding["ok"] else "FAILED"
        detail = f": {finding['detail']} (needed for {finding['needed']})"
        print(f"{mark} {finding['check']}{'' if finding['ok'] else detail}", file=out)
    if report["code"] == 0:
        print(f"{report['store']}: can hold every promise", file=out)
    else:
        advice = "use another store, or set single_writer: true and run one Job at a time"
        print(f"{report['store']}: can't hold every promise; {advice}", file=out)
