"""One screen about a run, and one line for each of many."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TextIO

from k8s.cluster import Cluster
from k8s.refusals import ForbiddenError
from k8s.render import SELECTOR
from k8s.runs import Run, assemble, observe, require_namespace
from k8s.stored import Stored


def span(duration_s: float | None) -> str:
    """Return seconds as people say them: ``1 h 05 min``."""
    if duration_s is None:
        return "-"
    minutes, rest = divmod(int(max(duration_s, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _utc(stamp: float | None) -> str:
    """Return seconds since 1970 as a short UTC time."""
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%MZ") if stamp else "-"


def print_status(run: Run, out: TextIO, *, now: float) -> None:
    """Print one run: where it is, how far, what it cost, and how the last attempt ended."""
    rows = [("Run", run.name), ("State", _state(run, now)), *_figures(run)]
    rows.append(("Attempt", _attempts(run)))
    if run.last_end and run.state != "succeeded":
        rows.append(("Last end", _end(run.last_end)))
    rows.append(("GPU-hours", f"{run.gpu_hours:.2f}" + (f", cost {run.cost}" if run.cost else "")))
    if run.receipt:
        rows.append(("Published", f"{run.receipt['uri']}"))
        rows.append(("Channel", _channel(run.receipt)))
    if run.note:
        rows.append(("Note", run.note))
    for label, text in rows:
        if text:
            print(f"{label:<11}{text}", file=out)


def _state(run: Run, now: float) -> str:
    if run.is_over:
        return f"{run.state} {_utc(run.ended)}, after {_took(run, now)}"
    since = run.started if run.state == "running" else run.created
    return f"{run.state} for {span(now - since) if since else '-'}"


def _took(run: Run, now: float) -> str:
    begin = run.started or run.created
    return span((run.ended or now) - begin) if begin else "-"


def _figures(run: Run) -> Iterable[tuple[str, str]]:
    figures = run.progress
    step, steps = figures.get("step"), figures.get("num_steps")
    yield "Stage", str(figures.get("stage") or "")
    if step is not None:
        loss = f", loss {figures['loss']:.4f}" if figures.get("loss") is not None else ""
        speed = f", {figures['tokens_per_s']:,.0f} tokens/s" if figures.get("tokens_per_s") else ""
        yield "Step", f"{step}{f' of {steps}' if steps else ''}{loss}{speed}"
    if run.state == "running" and figures.get("eta_s") is not None:
        yield "ETA", span(figures["eta_s"])
    if run.checkpoint is not None:
        yield "Checkpoint", f"step {run.checkpoint}"


def _attempts(run: Run) -> str:
    last = run.attempts[-1] if run.attempts else None
    return f"{run.number}" + (f", pod {last.pod} on {last.node or 'no node yet'}" if last else "")


def _end(end: dict[str, Any]) -> str:
    said = "; ".join(str(end[key]) for key in ("what", "do") if end.get(key))
    return f"{end.get('code')} {end.get('name', '')}: {said}"


def _channel(receipt: dict[str, Any]) -> str:
    return f"{receipt['channel']}: {receipt['channel_state']}" if receipt.get("channel") else ""


def list_runs(cluster: Cluster, *, selector: str | None, limit: int) -> list[Run]:
    """Return the newest runs, newest first."""
    labels = ",".join(filter(None, (SELECTOR, selector)))
    newest = cluster.newest("Job", limit, labelSelector=labels)
    if not newest:
        with contextlib.suppress(ForbiddenError):
            require_namespace(cluster)
    with ThreadPoolExecutor(8) as pool:  # two requests a run, over what may be a long way
        runs = pool.map(lambda name: _light(cluster, name), newest)
        return [run for run in runs if run is not None]


def _light(cluster: Cluster, name: str) -> Run | None:
    """Return a run from its Job and pods alone: a list asks no store."""
    job, pods = observe(cluster, name)
    return assemble(name, job, pods, Stored(), now=time.time()) if job else None


def print_list(runs: list[Run], out: TextIO, *, now: float) -> None:
    """Print a line for each run."""
    rows = [("RUN", "STATE", "AGE", "TOOK", "ATTEMPTS", "GPU-HOURS", "COST", "LAST END")]
    for run in runs:
        end = run.last_end or {}
        last = f"{end.get('code')} {end.get('name') or ''}".strip() if end else ""
        rows.append(
            (
                run.name,
                run.state,
                span(now - run.created) if run.created else "-",
                _took(run, now),
                str(len(run.attempts)),
                f"{run.gpu_hours:.2f}",
                "" if run.cost is None else f"{run.cost:.2f}",
                last,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        print(line.rstrip(), file=out)
