"""report.html: one attempt in one file, to be looked at anywhere, with nothing to load.

It is made from the artifacts that lie in the run's work folder, finished or not, so that an
attempt that failed has one too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from job.charts import heat_map, line_chart, short
from job.context import Context

LIBRARIES = ("torch", "transformers", "trl", "peft")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
CHARTS = (  # title, key in history.jsonl, unit, whether the axis begins at 0
    ("Loss", "loss", "nats a token", False),
    ("Learning rate", "learning_rate", "", True),
    ("Throughput", "tokens_per_s", "tokens/s", True),
    ("Gradient norm", "grad_norm", "", True),
)


def render(context: Context) -> str:
    """Return the page for this attempt as it is now; an error on its way out is told in it."""
    parts, error = _parts(context.work), sys.exception()
    attempt, job = context.attempt, context.job.model_dump(mode="json")
    outcome = f"ended in {context.progress.snapshot()['stage']}: {error}" if error else None
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(attempt.started))
    banner = f'<p class="banner">{escape(outcome)}</p>' if outcome else ""
    head = (
        f"<header><h1>{escape(str(job['name']))}</h1>"
        f'<p class="quiet">run {escape(attempt.run_id)}, attempt {attempt.epoch}, begun {when}</p>{banner}</header>'
    )
    sections = [
        head,
        _tiles(parts),
        _training(parts["history"]),
        _deltas(parts["delta_norms"]),
        _answers(parts["verdict"].get("answers", [])),
        _data(parts["data_report"]),
        _lineage(job, parts),
    ]
    style = files("job").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(str(job['name']))}: {escape(attempt.run_id)}</title><style>{style}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _parts(work: Path) -> dict[str, Any]:
    """Return what the stages left; empty where there is none."""
    inputs = _json(work / "pull" / "inputs.json")
    return {
        "model": inputs.get("model", {}),
        "data": inputs.get("data", {}),
        "dataset": _json(work / "prepare" / "artifact.json"),
        "data_report": _json(_newest(work, "prepare") / "data_report.json"),
        "adapter": _json(work / "train" / "artifact.json"),
        "history": _lines(_newest(work, "train") / "history.jsonl"),
        "startup": dict(_json(work / "train" / "startup.json").get("parts", [])),
        "delta_norms": _json(work / "train" / "delta_norms.json"),
        "merged": _json(work / "merge" / "artifact.json"),
        "verdict": _json(work / "judge" / "artifact.json"),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a jsonl file that are whole: the last may be half written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _newest(work: Path, stage: str) -> Path:
    """Return a stage's folder, or the one that it still worked in."""
    return work / stage if (work / stage).exists() else work / f"{stage}.partial"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _tiles(parts: Mapping[str, Any]) -> str:
    """Return the few figures that a person looks for first."""
    verdict, adapter, merged = parts["verdict"], parts["adapter"], parts["merged"]
    tiles = []
    before, after = verdict.get("held_out_loss_before"), verdict.get("held_out_loss_after")
    if before is not None and after is not None:
        tokens = verdict["num_held_out_tokens"]
        said = f"from {before:.3f} ({after - before:+.3f}), {tokens:,} tokens"
        tiles.append(("Held-out loss", f"{after:.3f}", said))
    if adapter:
        steps, planned = adapter["steps"], adapter["planned_steps"]
        early = f", of {planned} planned: the time was up" if steps < planned else ""
        tiles.append(("Trained", f"{short(adapter['num_tokens'])} tokens", f"{steps} steps{early}"))
        duration = f"{adapter['duration_s']:,.0f} s in all"
        tiles.append(("Throughput", f"{short(adapter['tokens_per_s'])} tokens/s", duration))
    if seconds := parts.get("startup"):
        said = ", ".join(f"{k[:-2]} {short(s)}" for k, s in seconds.items() if k != "total_s")
        tiles.append(("First step", f"after {seconds['total_s']:,.0f} s", said.replace("_", " ")))
    if merged:
        figures = merged["report"].get("logits", {})
        said = ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in _numbers(figures).items())
        tiles.append(("Merge", f"{merged['format']}, proven", said))
    cards = "".join(
        f'<div class="tile"><span>{escape(head)}</span><b>{escape(figure)}</b>'
        f"<small>{escape(text)}</small></div>"
        for head, figure, text in tiles
    )
    return f'<div class="tiles">{cards}</div>' if cards else ""


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if type(value) in (int, float)}


def _training(history: list[dict[str, Any]]) -> str:
    charts = "".join(
        f"<figure><figcaption>{title}{unit and f', {unit}'}</figcaption>"
        f"{line_chart(_points(history, key), unit=unit, from_zero=zero)}</figure>"
        for title, key, unit, zero in CHARTS
    )
    return _section("Training", f'<div class="charts">{charts}</div>' if history else "")


def _points(history: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    lines = (line for line in history if isinstance(line.get(key), int | float))
    return [(float(line["step"]), float(line[key])) for line in lines]


def _deltas(norms: Mapping[str, float]) -> str:
    """Return what was learned where: the norm of s·B·A by layer and kind of weight."""
    by_kind: dict[str, dict[int, float]] = {}
    others = []
    for name, norm in norms.items():
        found = LAYER.search(name)
        if found:
            kind = found[2].removesuffix(".weight")
            by_kind.setdefault(kind, {})[int(found[1])] = norm
        else:
            others.append((name, short(norm)))
    body = heat_map(by_kind) if by_kind else ""
    rest = f'<div class="card">{_table(others)}</div>' if others else ""
    return _section("What the adapter changed, by layer (norm of s·B·A)", body + rest)


def _answers(answers: Iterable[Mapping[str, Any]]) -> str:
    return _section("Answers before and after", "".join(map(_answer, answers)))


def _answer(answer: Mapping[str, Any]) -> str:
    language = answer.get("reasoning_language")
    note = f'<span class="quiet"> reason in {escape(language)}</span>' if language else ""
    columns = "".join(
        f"<div><h4>{head}</h4>{_analysis(str(answer[analysis]))}<p>{_text(str(answer[said]))}</p></div>"
        for head, analysis, said in (
            ("Before", "analysis_before", "before"),
            ("After", "analysis_after", "after"),
        )
    )
    question = f"<h3>{_text(str(answer['user']))}{note}</h3>"
    return f'<article>{question}<div class="pair">{columns}</div></article>'


def _analysis(text: str) -> str:
    return f'<p class="analysis">{_text(text)}</p>' if text else ""


def _text(text: str) -> str:
    return escape(text) if text.strip() else '<span class="quiet">(nothing)</span>'


def _data(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    rows = [
        (name.replace("_", " "), f"{report[name]:,}")
        for name in (
            "rows_read", "rows_kept", "rows_dropped", "examples", "packs", "held_out_examples",
            "tokens", "supervised_tokens", "tokens_lost", "longest",
        )
        if name in report
    ]  # fmt: skip
    if "stop_coverage" in report:
        rows.append(("end with a stop token", f"{report['stop_coverage']:.1%}"))
    dropped = [
        (
            f"{entry['count']:,} rows",
            f"{entry['reason']} ({', '.join(map(str, entry['rows'][:5]))})",
        )
        for entry in report.get("dropped", [])
    ]
    lengths = f"<figure><figcaption>Tokens an example</figcaption>{_bars(report)}</figure>"
    samples = "".join(map(_sample, report.get("samples", [])))
    more = f'<h3>Dropped</h3><div class="card">{_table(dropped)}</div>' if dropped else ""
    return _section(
        "Data", f'<div class="charts"><div>{_table(rows)}</div>{lengths}</div>{more}{samples}'
    )


def _bars(report: Mapping[str, Any]) -> str:
    bars = report.get("length_histogram", [])
    most = max((bar["count"] for bar in bars), default=1)
    rows = "".join(
        f"<tr><th>{'≤' + str(bar['up_to']) if bar['up_to'] else 'more'}</th>"
        f'<td><meter max="{most}" value="{bar["count"]}"></meter> {bar["count"]:,}</td></tr>'
        for bar in bars
    )
    return f'<table class="facts">{rows}</table>'


def _sample(sample: Mapping[str, Any]) -> str:
    """Return an example as the model saw it; what it was trained to say is marked."""
    text = "".join(
        f"<mark>{escape(part['text'])}</mark>" if part["trained"] else escape(part["text"])
        for part in sample.get("segments", [])
    )
    head = f"{escape(str(sample.get('row', '')))}, as rendered: what is marked carries loss"
    return f"<details><summary>{head}</summary><pre>{text}</pre></details>"


def _lineage(job: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    rows = []
    for head in ("model", "data"):
        source = parts[head] or {"uri": job[head]["source"]}
        rows.append((head, source["uri"]))
        found = {"revision": source.get("revision"), "licence": source.get("license")}
        rows += [(f"{head} {name}", str(value)) for name, value in found.items() if value]
    rows += [
        (name, str(value))
        for name, value in (
            ("data digest", parts["dataset"].get("digest")),
            ("adapter sha256", parts["adapter"].get("sha256")),
            ("seed", job["seed"]),
            ("image", os.environ.get("LORA_JOB_IMAGE")),
            *((library, _version(library)) for library in LIBRARIES),
        )
        if value is not None
    ]
    text = escape(yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True))
    whole = (
        f"<details><summary>The job file, with every default</summary><pre>{text}</pre></details>"
    )
    return _section("Where it comes from", f'<div class="card">{_table(rows)}</div>{whole}')


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="facts">{body}</table>' if body else ""
