"""What a person wants to see when a run has ended well."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TextIO, TypeVar

from job.artifacts import Adapter, Answer, Artifact, Merged, Receipt, Verdict

A = TypeVar("A", bound=Artifact)
WIDTH = 96
ANOTHER = "for another run of it, change the job file or give --run-id ANOTHER-NAME"


def print_summary(receipt: Receipt, work: Path, out: TextIO, *, reused: bool) -> None:
    """Print losses, answers, the proof, where the version is, and what to try next.

    Of a run that was published before (``reused``) no figures: they would pass for new ones.
    """
    folder = work.resolve() / receipt.run
    verdict, merged = _read(folder / "judge", Verdict), _read(folder / "merge", Merged)
    print(file=out)
    if reused:
        words = f"at {receipt.published}, verified again now; nothing was trained; {ANOTHER}"
        _row(out, "Published", words)
        _row(out, "Version", receipt.uri)
    else:
        _print_figures(_read(folder / "train", Adapter), verdict, merged, out)
        _print_startup(folder / "train" / "startup.json", out)
        _row(out, "Published", f"{receipt.uri}, read back and verified")
    if receipt.channel:
        _row(out, "Channel", f"{receipt.channel}: {receipt.channel_state}")
    for repository, commit in receipt.hub.items():
        _row(out, "Hub", f"{repository} at {commit[:12]}")
    _print_next(receipt, verdict, merged is not None, out)


def _read(folder: Path, kind: type[A]) -> A | None:
    path = folder / "artifact.json"
    return kind.model_validate_json(path.read_bytes()) if path.exists() else None


def _row(out: TextIO, head: str, text: str) -> None:
    _fill(out, text, f"{head:<16}")


def _fill(out: TextIO, text: str, head: str) -> None:
    wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = head, " " * len(head)
    print(wrapper.fill(text), file=out)


def _print_figures(
    adapter: Adapter | None, verdict: Verdict | None, merged: Merged | None, out: TextIO
) -> None:
    if adapter is not None:
        trained = f"{adapter.num_tokens:,} tokens in {adapter.steps} steps"
        speed = f"{adapter.duration_s:.0f} s, {adapter.tokens_per_s:.0f} tokens/s"
        _row(out, "Trained", f"{trained}, {speed}")
    if verdict is not None:
        _print_verdict(verdict, out)
    if merged is not None:
        _row(out, "Merged", _proof(merged))


def _print_startup(path: Path, out: TextIO) -> None:
    seconds = dict(json.loads(path.read_bytes())["parts"]) if path.exists() else {}
    if seconds:
        total = seconds.pop("total_s")
        parts = ", ".join(f"{part[:-2].replace('_', ' ')} {s:g}" for part, s in seconds.items())
        _row(out, "Started", f"the first step was done after {total:.0f} s: {parts}")


def _print_verdict(verdict: Verdict, out: TextIO) -> None:
    before, after = verdict.held_out_loss_before, verdict.held_out_loss_after
    if before is not None and after is not None:
        change = f"{after - before:+.3f} nats per token, {verdict.num_held_out_tokens:,} tokens"
        _row(out, "Held-out loss", f"before {before:.3f}   after {after:.3f}   ({change})")
    for answer in verdict.answers:
        _print_answer(answer, out)
    print(file=out)


def _print_answer(answer: Answer, out: TextIO) -> None:
    language = f"  [reason in {answer.reasoning_language}]" if answer.reasoning_language else ""
    print(f"\nQ: {answer.user}{language}", file=out)
    for head, analysis, text in (
        ("  before: ", answer.analysis_before, answer.before),
        ("  after:  ", answer.analysis_after, answer.after),
    ):
        said = f"({' '.join(analysis.split())}) {text}" if analysis else text
        _fill(out, textwrap.shorten(said or "(nothing)", 320, placeholder=" …"), head)


def _proof(merged: Merged) -> str:
    figures = merged.report.get("logits", {})
    text = f"base + adapter, proven, {merged.num_parameters / 1e6:,.0f} M parameters"
    if "max_difference" in figures:
        text += f": logits differ by at most {figures['max_difference']:.1e}"
    if "kl_merged" in figures:
        text += f", KL {figures['kl_merged']:.1e} (the adapter's own: {figures['kl_base']:.2f})"
    return text


def _print_next(receipt: Receipt, verdict: Verdict | None, merged: bool, out: TextIO) -> None:
    store = receipt.uri.split(f"/{receipt.name}/versions/")[0]
    asked = verdict.answers[0].user if verdict and verdict.answers else "What is a LoRA adapter?"
    program = sys.argv[0] if sys.argv[0].endswith("lora-job") else "lora-job"
    spec = f"{store}/{receipt.name}@{receipt.channel or receipt.version}"
    print(f"\nTry next\n  {program} fetch {spec} my-adapter", file=out)
    if merged:
        print(f'  {program} generate my-adapter/merged "{asked}"', file=out)
