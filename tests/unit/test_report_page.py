"""report.html: self-contained, escaped, whole for a run that ended well or badly."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import charts, report
from job.config import JobConfig, load_job
from job.context import Context
from job.errors import JobError
from job.progress import Progress
from job.stop import Stop

HOSTILE = '<script src="https://evil.example/x.js"></script>&"'


def job(name: str = "reported") -> JobConfig:
    """Return a small job."""
    return JobConfig.model_validate(
        {
            "name": name,
            "device": "cpu",
            "store": "store",
            "model": {"source": "model"},
            "data": {"source": "data"},
        }
    )


def write_run(work: Path, *, text: str = "It is Canberra.", steps: int = 40) -> None:
    """Write what the stages of a run leave, with figures like those of a real one."""
    history = [
        {
            "step": step,
            "loss": 0.9 + 2.2 * math.exp(-step / 9) + 0.06 * math.sin(step * 2.3),
            "learning_rate": 1e-3
            * min(1, step / 4)
            * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
            "grad_norm": 1.1 + 0.5 * math.sin(step * 1.3),
            "tokens_per_s": 300 + 15 * math.sin(step),
        }
        for step in range(1, steps + 1)
    ]
    lines = "".join(json.dumps(line) + "\n" for line in history) + '{"step": 41, "lo'
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    norms = {
        f"model.layers.{layer}.{kind}.weight": 0.2 + 0.04 * layer * (index + 1) / 7
        for layer in range(30)
        for index, kind in enumerate(kinds)
    }
    answer = {
        "user": "¿Cuál es la capital de Australia?",
        "reasoning_language": "German",
        "analysis_before": "",
        "before": "The capital of Australia is Sydney, which is a large city on the coast.",
        "analysis_after": "Gefragt ist die Hauptstadt von Australien. Das ist Canberra.",
        "after": text,
    }
    files: dict[str, Any] = {
        "pull/inputs.json": {
            "model": {"uri": "hf://owner/base@abc", "revision": "abc", "license": "mit"},
            "data": {"uri": "file:data", "revision": None, "license": None},
        },
        "prepare/artifact.json": {"digest": "d" * 64},
        "prepare/data_report.json": {
            "rows_read": 448, "rows_kept": 446, "rows_dropped": 2, "examples": 446, "packs": 80,
            "held_out_examples": 42, "tokens": 38210, "supervised_tokens": 21004, "tokens_lost": 0,
            "longest": 131, "stop_coverage": 1.0,
            "dropped": [{"reason": text, "count": 2, "rows": ["data.jsonl:7", "data.jsonl:9"]}],
            "length_histogram": [{"up_to": 64, "count": 61}, {"up_to": 128, "count": 380},
                                 {"up_to": None, "count": 5}],
            "samples": [{"row": "data.jsonl:1", "segments": [
                {"text": "<|im_start|>user\nHi<|im_end|>\n", "trained": False},
                {"text": text + "<|im_end|>", "trained": True}]}],
        },
        "train/startup.json": {"parts": [["start_s", 1.2], ["first_step_s", 3.4], ["total_s", 4.6]]},
        "train/artifact.json": {"sha256": "a" * 64, "steps": 40, "planned_steps": 50,
                                "num_tokens": 19800, "tokens_per_s": 301.2, "duration_s": 66.1},
        "train/delta_norms.json": norms,
        "merge/artifact.json": {"format": "fp32", "report": {
            "logits": {"max_difference": 3.1e-6, "adapter_effect": 4.2}}},
        "judge/artifact.json": {"held_out_loss_before": 3.412, "held_out_loss_after": 1.204,
                                "num_held_out_tokens": 2101, "answers": [answer]},
    }  # fmt: skip
    for name, body in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps(body), encoding="utf-8")
    (work / "train" / "history.jsonl").write_text(lines, encoding="utf-8")


def _context(work: Path, config: JobConfig) -> Context:
    attempt = SimpleNamespace(run_id=config.run_name, epoch=2, started=1.8e9)
    return Context(
        job=config, work=work, cache=None, attempt=attempt, stop=Stop(), progress=Progress()
    )  # type: ignore[arg-type]


class _Tags(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, *_: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_from_anywhere_and_is_well_formed(tmp_path: Path) -> None:
    """No script, link, source or style from elsewhere, and every tag closed; all sections there."""
    write_run(tmp_path)
    text = report.render(_context(tmp_path, job()))
    tags = _Tags(text)
    assert tags.open == []
    assert tags.links == []
    assert not {"script", "link", "iframe", "img", "object"} & set(tags.seen)
    assert "@import" not in text
    assert "url(" not in text
    for word in ("Held-out loss", "1.204", "from 3.412 (-2.208)", "Throughput", "after 5 s", "first step 3.4", "Canberra", "German",
                 "Learning rate", "Gradient norm", "self_attn.q_proj", "hf://owner/base@abc",
                 "a" * 64, "of 50 planned", "38,210", "3.1e-6", "data.jsonl:7"):  # fmt: skip
        assert word in text, word
    assert text.count("<polyline") == 4
    assert text.count("--share:") == 7 * 30


def test_words_of_rows_and_models_are_text_and_never_markup(tmp_path: Path) -> None:
    """A hostile row or answer is shown as it is, and runs nowhere."""
    write_run(tmp_path, text=HOSTILE)
    text = report.render(_context(tmp_path, job()))
    assert "script" not in _Tags(text).seen
    assert text.count("&lt;script src=") >= 3


def test_an_attempt_that_failed_early_has_a_report_that_says_so(tmp_path: Path) -> None:
    """With nothing but an error there is a page, with the error and the job file in it."""
    context = _context(tmp_path, job())
    context.progress.enter("prepare")
    try:
        load_job(tmp_path / "<odd>.yaml")
    except JobError:
        text = report.render(context)
    assert _Tags(text).open == []
    assert "ended in prepare: " in text
    assert "&lt;odd&gt;.yaml: " in text
    assert "learning_rate: 0.0002" in text


def test_a_training_that_was_cut_off_shows_how_far_it_came(tmp_path: Path) -> None:
    """History is read from the unfinished folder too, a half-written last line left out."""
    write_run(tmp_path)
    (tmp_path / "train").rename(tmp_path / "train.partial")
    text = report.render(_context(tmp_path, job()))
    assert text.count("<polyline") == 4
    assert "of 50 planned" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0002, "0.0002"), (3.1e-6, "3.1e-6"), (1.2345, "1.234"), (301.2, "301.2"),
     (19800, "19.8k"), (2.5e7, "25M"), (-0.5, "-0.5"), (0.001, "0.001")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    """Axis names keep their meaning in few characters."""
    assert charts.short(value) == text


def test_charts_stand_odd_figures() -> None:
    """One point, equal points, not-a-number and a hundred thousand points all draw."""
    assert "<polyline" in charts.line_chart([(1, 2.0)], unit="x")
    assert "<polyline" in charts.line_chart([(1, 0.0), (2, 0.0)], unit="x", from_zero=True)
    assert "nothing was logged" in charts.line_chart([(1, math.nan)], unit="x")
    many = charts.line_chart([(step, 1.0 / (step + 1)) for step in range(100_000)], unit="x")
    assert len(many) < 120_000
    assert not re.search(r"nan|inf", many)
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
