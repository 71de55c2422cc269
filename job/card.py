"""The model card (README.md) of an adapter, or of the merged model: what it is and how to use it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from job.artifacts import Adapter, Answer, Dataset, Merged, Source, Verdict
from job.config import JobConfig

MAX_ANSWERS, MAX_ANSWER_CHARACTERS = 3, 600
# The Hub takes no other names (it has more, but they come from bases on the Hub, as they are).
LICENSES = {
    "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "other",
}  # fmt: skip

USE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")"""
USE_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{where}")"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that a card tells."""

    job: JobConfig
    version: str
    model: Source
    data: Source
    dataset: Dataset
    adapter: Adapter
    merged: Merged | None
    verdict: Verdict


def hub_id(source: Source) -> str | None:
    """Return the repository of a source on the Hub, or None for a source from elsewhere."""
    on_hub = source.uri.startswith("hf://")
    return source.uri.removeprefix("hf://").partition("@")[0] if on_hub else None


def base_name(source: Source) -> str:
    """Return what adapter_config.json calls the base: its Hub id, or its URI."""
    return hub_id(source) or source.uri


def card(facts: Facts, lineage: dict[str, Any], *, merged: bool) -> str:
    """Return README.md of the merged model, or of the adapter."""
    parts = [
        f"---\n{_front_matter(facts, merged)}---\n",
        f"# {facts.job.name}{', merged' if merged else ''}\n",
        _summary(facts, merged),
        "## Use\n",
        _use(facts, merged),
        "## Result\n",
        _table(_results(facts)),
        *(["## Answers\n"] if facts.verdict.answers else []),
        *map(_answer, facts.verdict.answers[:MAX_ANSWERS]),
        "## Lineage\n",
        _table(_lineage(facts, lineage)),
        "Made with lora-job; its manifest.json has the sha256 of every file.\n",
    ]
    return "\n".join(parts)


def _front_matter(facts: Facts, merged: bool) -> str:
    base, data = hub_id(facts.model), hub_id(facts.data)
    meta: dict[str, Any] = {"library_name": "transformers" if merged else "peft"}
    meta["pipeline_tag"] = "text-generation"
    if base:
        relation = "finetune" if merged else "adapter"
        meta |= {"base_model": base, "base_model_relation": relation}
    if data:
        meta["datasets"] = [data]
    meta |= _license(facts.model)
    meta["tags"] = ["lora", "sft", "lora-job"]
    return yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)


def _license(base: Source) -> dict[str, str]:
    """Return the card's licence: the base's, as a name that the Hub knows, or as other."""
    known = (base.license or "").strip().lower()
    if not known:
        return {}
    if known in LICENSES or hub_id(base):
        return {"license": known}
    return {"license": "other", "license_name": re.sub("[^a-z0-9.]+", "-", known)[:60].strip("-")}


def _summary(facts: Facts, merged: bool) -> str:
    return (
        f"A LoRA adapter{' merged into its base' if merged else ''}, version `{facts.version}`, "
        f"trained from `{base_name(facts.model)}` on `{hub_id(facts.data) or facts.data.uri}` "
        f"by supervised fine-tuning. "
        f"Licence of the base: {facts.model.license or 'unknown: see the base'}.\n"
    )


def _use(facts: Facts, merged: bool) -> str:
    hub, base = facts.job.publish.hub, hub_id(facts.model)
    quoted = f'"{base}", revision="{facts.model.revision}"' if base else '"BASE"'
    if merged:
        code = USE_MERGED.format(where=hub.merged or "DIR/merged")
    else:
        code = USE_ADAPTER.format(where=hub.adapter or "DIR/adapter", base=quoted)
    # A folder of this machine means nothing elsewhere.
    store = facts.job.store.rstrip("/") if facts.job.store.startswith("s3://") else "STORE"
    elsewhere = "" if base else f" `BASE` is the folder of `{facts.model.uri}`."
    return (
        f"```python\n{code}\n```\n\n"
        f"A verified copy into `DIR`, adapter and merged model:\n\n"
        f"```sh\nlora-job fetch {store}/{facts.job.name}@{facts.version} DIR\n```\n{elsewhere}\n"
    )


def _results(facts: Facts) -> list[tuple[str, str]]:
    adapter, verdict, dataset = facts.adapter, facts.verdict, facts.dataset
    losses = {"before": verdict.held_out_loss_before, "after": verdict.held_out_loss_after}
    rows = [
        (f"Held-out loss, {when}", f"{loss:.4f} (perplexity {math.exp(min(loss, 50)):.2f})")
        for when, loss in losses.items()
        if loss is not None
    ]
    if rows:
        rows.append(("Held-out tokens", f"{verdict.num_held_out_tokens:,}"))
    early = " (ended early, by max_duration_s)" if adapter.steps < adapter.planned_steps else ""
    rows += [
        ("Training loss, last", f"{adapter.final_loss:.4f}"),
        ("Steps", f"{adapter.steps} of {adapter.planned_steps}{early}"),
        ("Trained on", f"{adapter.num_tokens:,} tokens, {dataset.num_examples:,} examples"),
        ("Speed", f"{adapter.tokens_per_s:,.0f} tokens/s, {adapter.duration_s:,.0f} s"),
    ]
    if facts.merged is not None:
        report = facts.merged.report
        proof = [f"{100 * report['delta_kept']:.2f} % of the delta kept"]
        proof += [f"{key} {value:.3g}" for key, value in report.get("logits", {}).items()]
        rows.append((f"Merge ({facts.merged.format}), proven", ", ".join(proof)))
    return rows


def _lineage(facts: Facts, lineage: dict[str, Any]) -> list[tuple[str, str]]:
    lora = facts.job.lora
    return [
        ("Base", f"`{facts.model.uri}`"),
        ("Data", f"`{facts.data.uri}`"),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"),
        ("Learning rate", f"{facts.job.train.learning_rate:g}, {facts.job.train.scheduler}"),
        ("Seed", str(facts.job.seed)),
        ("Run", f"`{lineage['run']}`, attempt {lineage['epoch']}"),
        ("Job file", f"`{lineage['config_sha256'][:16]}`"),
        ("Adapter's sha256", f"`{facts.adapter.sha256}`"),
        ("Image", f"`{lineage['image'] or 'none'}`"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in lineage["versions"].items())),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _answer(answer: Answer) -> str:
    language = f" (reasoning in {answer.reasoning_language})" if answer.reasoning_language else ""
    turns = [
        ("Asked" + language, answer.user),
        ("Before", f"{answer.analysis_before}\n\n{answer.before}"),
        ("After", f"{answer.analysis_after}\n\n{answer.after}"),
    ]
    return "\n".join(f"{head}:\n\n{_fenced(text.strip())}" for head, text in turns)


def _fenced(text: str) -> str:
    """Return a model's words so that nothing in them is read as part of the card."""
    cut = text[:MAX_ANSWER_CHARACTERS] + ("…" if len(text) > MAX_ANSWER_CHARACTERS else "")
    longest = max((len(run) for run in re.findall("`+", cut)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{cut}\n{fence}\n"
