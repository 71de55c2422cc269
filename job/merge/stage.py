"""Merge base and adapter into a model that others can serve, and prove that it is their sum."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from job.artifacts import Adapter, Dataset, Merged, Source, reuse
from job.config import MergeFormat, MergeSection
from job.context import Context
from job.errors import ExitCode, JobError
from job.files import fingerprint, sha256_file, write_bytes, write_json
from job.merge.adapter import WEIGHTS
from job.merge.checkpoint import read_json, shard_files
from job.merge.plan import Plan, make_plan
from job.merge.stream import write_model
from job.stop import Stop

REPORT = "merge_report.json"
LAYOUT = 1
"""Raised when what the merge writes changes: an artifact of an older one is not reused."""
LEFT_OUT = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".md", ".onnx")
TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What one merge is made from."""

    base: Path
    adapter: Path
    limits: MergeSection
    stop: Stop
    dataset: Dataset | None = None
    """Its tokenizer goes with the model; the logits are compared on its rows."""
    progress: Callable[[int, int], None] = lambda *_: None


def merge(context: Context, model: Source, dataset: Dataset, adapter: Adapter) -> Merged | None:
    """Merge the adapter into the base as the job file says, or not at all for ``format: none``.

    Raises:
        JobError: 70 for a merge that is not proven, 71 for a disk that does not hold it, 78 for a
            format that this base can't be merged into.
    """
    section = context.job.merge
    if section.format == "none":
        return None
    with context.stage("merge"):
        began = time.monotonic()

        def tell(done: int, total: int) -> None:
            left = (total - done) * (time.monotonic() - began) / max(done, 1)
            context.progress.update(bytes_done=done, bytes=total, eta_s=round(left))

        inputs = _Inputs(
            base=model.folder, adapter=adapter.folder, limits=section, stop=context.stop,
            dataset=dataset, progress=tell,
        )  # fmt: skip
        mark = _fingerprint(section, adapter.sha256, model.files, dataset.digest)
        return reuse(context.work / "merge", mark, Merged, partial(_make, inputs), stage="merge")


def merge_folders(
    adapter: Path, base: Path, out: Path, merge_format: MergeFormat, stop: Stop
) -> dict[str, Any]:
    """Merge two folders into a third: ``lora-job merge ADAPTER BASE OUT``.

    A try that was interrupted goes on in ``OUT.partial``. Returns the report.

    Raises:
        JobError: as :func:`merge`, and 64 for an ``out`` that holds something else.
    """
    if (
        out.exists()
        and not (out / ".fingerprint").exists()
        and (out.is_file() or any(out.iterdir()))
    ):
        raise JobError(ExitCode.USAGE, str(out), "is not empty", "name a new folder")
    if merge_format == "none":
        raise JobError(ExitCode.USAGE, "--format", "none is no merge", "take base, fp32 or bf16")
    section = MergeSection(format=merge_format)
    inputs = _Inputs(base=base, adapter=adapter, limits=section, stop=stop)
    # Plan first: a wrong folder is told before its gigabytes are hashed.
    make_plan(adapter, base, merge_format)
    _require_its_base(adapter, base, stop)
    files = {p.name: _identity(p) for p in (*shard_files(base), base / "config.json")}
    mark = _fingerprint(section, sha256_file(adapter / WEIGHTS, tick=stop.check), files, "")
    return reuse(out, mark, Merged, partial(_make, inputs), stage="merge").report


def _require_its_base(adapter: Path, base: Path, stop: Stop) -> None:
    """Refuse another base than the one that was trained on, as far as that can be known.

    The tensors of a wrong base of the same shapes add up as well as those of the right one. The
    manifest of a fetched version, beside the adapter's folder, has the hashes of its base.

    Raises:
        JobError: 70 for a model that was merged already, or for other weights than the version's.
    """
    if (base / REPORT).exists():
        what, do = "was merged already", "name the base that it was made from"
        raise JobError(ExitCode.NOT_PROVEN, str(base), what, do)
    manifest = adapter.resolve().parent / "manifest.json"
    if not manifest.is_file():
        return
    origin = read_json(manifest).get("lineage", {}).get("base", {})
    for name, sha256 in origin.get("weights_sha256", {}).items():
        if not (base / name).is_file() or sha256_file(base / name, tick=stop.check) != sha256:
            what = f"is not the base that this adapter was trained on ({origin['uri']}): {name}"
            raise JobError(ExitCode.NOT_PROVEN, str(base), what, "name that base")


def _identity(path: Path) -> str:
    """Return size and time of a file: enough to know an interrupted merge's base again."""
    found = path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def _fingerprint(section: MergeSection, adapter: str, base: dict[str, str], data: str) -> str:
    versions = [version(name) for name in ("peft", "transformers")]
    return fingerprint(LAYOUT, section.model_dump(mode="json"), adapter, base, data, versions)


def _make(inputs: _Inputs, folder: Path) -> Merged:
    """Plan, write, prove by tensors, prove by logits, report: all inside ``folder``."""
    began = time.monotonic()
    plan = make_plan(inputs.adapter, inputs.base, inputs.limits.format)
    figures = write_model(plan, folder, stop=inputs.stop, progress=inputs.progress)
    written = time.monotonic()
    _copy_files(plan, inputs, folder)
    logits = _prove_logits(plan, inputs, folder)
    report = {
        **_summary(plan, figures),
        "logits": logits,
        "limits": inputs.limits.model_dump(mode="json"),
        "seconds": {
            "weights": round(written - began, 2), "logits": round(time.monotonic() - written, 2),
        },
    }  # fmt: skip
    tensors = {name: _figures(one) for name, one in figures.items() if one["delta_square"]}
    write_json(folder / REPORT, {**report, "tensors": tensors})
    log.info(
        "merge_proven", **{key: report[key] for key in ("keys_landed", "delta_kept")}, **logits
    )
    return Merged(
        folder=folder,
        format=inputs.limits.format,
        num_parameters=report["num_parameters"],
        size_bytes=plan.size,
        report=report,
    )


def _prove_logits(plan: Plan, inputs: _Inputs, folder: Path) -> dict[str, float]:
    from job.merge import logits

    config = read_json(folder / "config.json")
    prompts = logits.dataset_prompts(inputs.dataset.folder) if inputs.dataset else []
    prompts = prompts or logits.fixed_prompts(
        int((config.get("text_config") or config)["vocab_size"])
    )
    found = logits.compare(plan, folder, prompts, stop=inputs.stop)
    logits.judge(found, plan, inputs.limits)
    return asdict(found)


def _summary(plan: Plan, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the totals of the tensor proof."""
    squares = sum(one["delta_square"] for one in figures.values())
    layers: dict[str, float] = defaultdict(float)
    for name, one in figures.items():
        number = [part for part in name.split(".") if part.isdigit()]
        layers[number[0] if number else name] += one["delta_square"]
    return {
        "format": plan.format,
        "num_parameters": int(sum(one["weights"] for one in figures.values())),
        "keys_landed": len(plan.adapter.slots),
        "tensors_changed": sum(1 for output in plan.outputs if output.delta is not None),
        "tensors_copied": sum(1 for output in plan.outputs if output.copied),
        "size_bytes": plan.size,
        "config_edits": plan.config_edits,
        "decided_in_fp64": int(sum(one["decided"] for one in figures.values())),
        "delta_norm": math.sqrt(squares),
        "delta_kept": sum(o["kept"] for o in figures.values()) / squares if squares else 1.0,
        "delta_norms": {name: math.sqrt(value) for name, value in layers.items() if value},
    }


def _figures(one: dict[str, float]) -> dict[str, float]:
    return {
        "weights": int(one["weights"]),
        "delta_norm": math.sqrt(one["delta_square"]),
        "delta_kept": one["kept"] / one["delta_square"],
        "decided_in_fp64": int(one["decided"]),
    }


def _copy_files(plan: Plan, inputs: _Inputs, folder: Path) -> None:
    """Copy what belongs to the base and its tokenizer; config.json changes only where it must."""
    given = inputs.dataset.folder / "tokenizer" if inputs.dataset else None
    own = not (given and given.is_dir())
    files = {p.name: p for p in inputs.base.iterdir() if _belongs(p, own_tokenizer=own)}
    if given and not own:
        files |= {path.name: path for path in given.iterdir() if path.is_file()}
    edits = {"config.json": plan.config_edits}
    generation = inputs.base / "generation_config.json"
    stops = inputs.dataset.stop_token_ids if inputs.dataset else []
    if generation.is_file():
        edits[generation.name] = _stop_tokens(read_json(generation), stops)
    elif new := _stop_tokens(read_json(inputs.base / "config.json"), stops):
        # Without this file a server stops where config.json says, which is not at a turn's end.
        write_json(folder / generation.name, new)
    for name in files.keys() - edits.keys():
        shutil.copyfile(files[name], folder / name)
    for name, changes in edits.items():
        _write_config(inputs.base / name, folder / name, changes)


def _belongs(path: Path, *, own_tokenizer: bool) -> bool:
    hidden = path.name.startswith((".", "artifact.json"))
    tokenizer = path.name.startswith(TOKENIZER) or path.suffix == ".model"
    wanted = own_tokenizer or not tokenizer
    return path.is_file() and not hidden and not path.name.endswith(LEFT_OUT) and wanted


def _write_config(source: Path, target: Path, edits: dict[str, Any]) -> None:
    """Copy a JSON file byte for byte, or with the few keys that are edited (None removes one)."""
    if not edits:
        write_bytes(target, source.read_bytes())
        return
    removed = [key for key, value in edits.items() if value is None]
    merged = {k: v for k, v in (read_json(source) | edits).items() if k not in removed}
    write_bytes(target, json.dumps(merged, indent=2, ensure_ascii=False).encode() + b"\n")


def _stop_tokens(generation: dict[str, Any], stop_token_ids: list[int]) -> dict[str, Any]:
    """Return the edit that lets a base model, now a chat model, stop where its turns end."""
    said = generation.get("eos_token_id")
    known = said if isinstance(said, list) else [said] if said is not None else []
    new = [token for token in stop_token_ids if token not in known]
    return {"eos_token_id": known + new} if new else {}
