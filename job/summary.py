"""What a person wants to see when a run has ended well."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TextIO

from job.artifacts import Adapter, Answer, Artifact, Merged, Receipt, Verdict

WIDTH = 96


def print_summary(receipt: Receipt, work: Path, out: TextIO) -> None:
    """Print losses, answers, the proof, where the version is, and what to try next."""
    folder = work.resolve() / receipt.run
    verdict = _read(folder / "judge", Verdict)
    adapter = _read(folder / "train", Adapter)
    merged = _read(folder / "merge", Merged)
    print(file=out)
    if isinstance(adapter, Adapter):
        _row(
            out,
            "Trained",
            f"{adapter.num_tokens:,} tokens in {adapter.steps} steps, "
            f"{adapter.duration_s:.0f} s, {adapter.tokens_per_s:.0f} tokens/s",
        )
    if isinstance(verdict, Verdict):
        _print_verdict(verdict, out)
    if isinstance(merged, Merged):
        _row(out, "Merged", _proof(merged))
    _row(out, "Published", f"{receipt.uri}, read back and verified")
    if receipt.channel:
        _row(out, "Channel", f"{receipt.channel}: {receipt.channel_state}")
    for repository, commit in receipt.hub.items():
        _row(out, "Hub", f"{repository} at {commit[:12]}")
    _print_next(receipt, verdict, merged is not None, out)


def _read(folder: Path, kind: type[Artifact]) -> Artifact | None:
    path = folder / "artifact.json"
    return kind.model_validate_json(path.read_bytes()) if path.exists() else None


def _row(out: TextIO, head: str, text: str) -> None:
    indent = " " * 16
    print(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{head:<16}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        file=out,
    )


def _print_verdict(verdict: Verdict, out: TextIO) -> None:
    before, after = verdict.held_out_loss_before, verdict.held_out_loss_after
    if before is not None and after is not None:
        _row(
            out,
            "Held-out loss",
            f"before {before:.3f}   after {after:.3f}   "
            f"({after - before:+.3f} nats per token, {verdict.num_held_out_tokens:,} tokens)",
        )
    for answer in verdict.answers:
        _print_answer(answer, out)
    print(file=out)


def _print_answer(answer: Answer, out: TextIO) -> None:
    language = f"  [reason in {answer.reasoning_language}]" if answer.reasoning_language else ""
    print(f"\nQ: {answer.user}{language}", file=out)
    for head, analysis, text in (
        ("before", answer.analysis_before, answer.before),
        ("after", answer.analysis_after, answer.after),
    ):
        said = f"({' '.join(analysis.split())}) {text}" if analysis else text
        shown = textwrap.shorten(said or "(nothing)", 320, placeholder=" …")
        print(
            textwrap.fill(
                shown, WIDTH, initial_indent=f"  {head + ':':<8}", subsequent_indent=" " * 10
            ),
            file=out,
        )


def _proof(merged: Merged) -> str:
    figures = merged.report.get("logits", {})
    text = f"base + adapter, proven, {merged.num_parameters / 1e6:,.0f} M parameters"
    if "max_difference" in figures:
        text += f": logits differ by at most {figures['max_difference']:.1e}"
    if "kl_merged" in figures:
        text += f", KL {figures['kl_merged']:.1e} (the adapter's own: {figures['kl_base']:.2f})"
    return text


def _print_next(receipt: Receipt, verdict: Artifact | None, merged: bool, out: TextIO) -> None:
    store = receipt.uri.split(f"/{receipt.name}/versions/")[0]
    reference = f"@{receipt.channel}" if receipt.channel else f"@{receipt.version}"
    question = "What is the capital of Australia?"
    if isinstance(verdict, Verdict) and verdict.answers:
        question = verdict.answers[0].user
    program = sys.argv[0] if sys.argv[0].endswith("lora-job") else "lora-job"
    print("\nTry next", file=out)
    print(f"  {program} fetch {store}/{receipt.name}{reference} my-adapter", file=out)
    if merged:
        print(f'  {program} generate my-adapter/merged "{question}"', file=out)
