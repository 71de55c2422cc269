"""Publish: what was trained and proven becomes a version in the store, and copies on the Hub."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Adapter, Dataset, Merged, Receipt, Source, Verdict
from job.card import Facts, base_name, card, hub_id
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import fingerprint, list_files, write_bytes, write_json
from job.hub import publish_folder
from job.store.manifest import delete_folders
from job.store.versions import move_channel, version_folder, version_name, write_version

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

LIBRARIES = (
    "lora-job", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors",
    "tokenizers",
)  # fmt: skip
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Lists that PEFT keeps as sets: sorted, so that equal adapters have equal bytes. The order of
# target_parameters means something, and stays.
SORTED = ("target_modules", "modules_to_save", "exclude_modules")


def publish(
    context: Context,
    model: Source,
    data: Source,
    dataset: Dataset,
    adapter: Adapter,
    merged: Merged | None,
    verdict: Verdict,
) -> Receipt:
    """Write the version, read it back, copy it to the Hub, and let the channel point to it.

    Raises:
        JobError: 70 if what was read back is not what was sent, 74 unreachable, 76 fenced,
            77 not allowed.
    """
    with context.stage("publish"):
        attempt, job = context.attempt, context.job
        version = version_name(attempt.started, attempt.epoch, adapter.sha256)
        facts = Facts(
            job=job,
            version=version,
            model=model,
            data=data,
            dataset=dataset,
            adapter=adapter,
            merged=merged,
            verdict=verdict,
        )
        lineage = lineage_of(context, facts)
        folders = _assemble(context.work / "publish", facts, lineage)
        stored = {n: f for n, f in folders.items() if n == "adapter" or job.publish.merged}
        attempt.publishing(version)
        manifest = write_version(attempt, job.name, version, stored, lineage, stop=context.stop)
        receipt = Receipt(
            run=attempt.run_id,
            name=job.name,
            version=version,
            uri=f"{attempt.store.uri}/{version_folder(job.name, version)}",
            published=datetime.now(UTC).isoformat(timespec="seconds"),
            adapter_sha256=adapter.sha256,
            manifest_sha256=manifest.sha256,
            size_bytes=manifest.size_bytes,
            channel=job.publish.channel,
            hub=_to_hub(context, folders, version),
        )
        attempt.published(receipt)
        log.info("version_published", uri=receipt.uri, size_bytes=receipt.size_bytes)
        _forget_begun(context, version)
        return announce(context, receipt)


def _forget_begun(context: Context, published: str) -> None:
    """Delete what attempts of this run wrote that died before theirs was the published version."""
    attempt = context.attempt
    others = [version for version in attempt.begun if version != published]
    try:
        delete_folders(attempt.store, f"{context.job.name}/versions", iter(others))
    except JobError as error:
        log.warning("begun_versions_kept", versions=others, reason=str(error))


def announce(context: Context, receipt: Receipt) -> Receipt:
    """Let the channel point to a published version, if it has not been done, and note it.

    The head says ``published`` already, so only the run's holder comes here. An attempt that died
    just before this is made good by the next one.
    """
    attempt = context.attempt
    if receipt.channel is None or receipt.channel_state is not None:
        attempt.published(receipt)
        return receipt
    order = (attempt.scheduled, attempt.epoch)
    state = move_channel(attempt.store, receipt.name, receipt.channel, receipt.version, order)
    log.info("channel_asked", channel=receipt.channel, state=state, version=receipt.version)
    receipt = receipt.model_copy(update={"channel_state": state})
    attempt.published(receipt)
    return receipt


def lineage_of(context: Context, facts: Facts) -> dict[str, Any]:
    """Return where a version comes from, for its manifest: enough to make it again."""
    attempt, settings = context.attempt, _settings(facts.job)
    adapter, verdict = facts.adapter, facts.verdict
    return {
        "run": attempt.run_id,
        "epoch": attempt.epoch,
        "base": {**_source(facts.model), "weights_sha256": _weights(facts.model)},
        "data": _source(facts.data),
        "held_out": _held_out(context),
        "dataset_digest": facts.dataset.digest,
        "config": settings,
        "config_sha256": fingerprint(settings),
        "image": os.environ.get("LORA_JOB_IMAGE"),
        "seed": facts.job.seed,
        "versions": _versions(),
        "steps": [adapter.steps, adapter.planned_steps],
        "num_tokens": adapter.num_tokens,
        "final_loss": adapter.final_loss,
        "save_s": attempt.save_s,
        "held_out_loss": [verdict.held_out_loss_before, verdict.held_out_loss_after],
        "merge_format": facts.merged.format if facts.merged else None,
        "adapter_sha256": adapter.sha256,
    }


def _held_out(context: Context) -> Any:
    """Return the share that was held out, or what its own source was pinned to."""
    pinned = context.attempt.inputs(dict).get("held_out")
    return pinned["uri"] if pinned else context.job.data.held_out


def _settings(job: JobConfig) -> dict[str, Any]:
    """Return the resolved job file without this machine's paths: they would lead nowhere."""
    settings = job.model_dump(mode="json")
    for section, key in (("model", "source"), ("data", "source"), ("data", "held_out")):
        settings[section][key] = _portable(settings[section][key])
    settings["store"] = _portable(settings["store"])
    return settings


def _portable(value: Any) -> Any:
    if not isinstance(value, str) or "://" in value or value.startswith("package:"):
        return value
    return f"file:{Path(value).name}"


def _source(source: Source) -> dict[str, Any]:
    named = source.model_dump(include={"uri", "revision", "license"})
    return {**named, "files_sha256": fingerprint(source.files)}


def _weights(model: Source) -> dict[str, str]:
    """Return the base's weights, file by file: what `lora-job merge` knows it again by."""
    return {name: sha for name, sha in model.files.items() if name.endswith(".safetensors")}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _assemble(folder: Path, facts: Facts, lineage: dict[str, Any]) -> dict[str, Path]:
    """Lay out ``adapter/`` and ``merged/`` as they will be published; big files are linked."""
    if folder.exists():
        shutil.rmtree(folder)
    adapter = folder / "adapter"
    _link(facts.adapter.folder / WEIGHTS, adapter / WEIGHTS)
    write_json(adapter / CONFIG, adapter_config(facts.adapter.folder, facts.model))
    _link_all(facts.dataset.folder / "tokenizer", adapter)
    write_bytes(adapter / "README.md", card(facts, lineage, merged=False).encode())
    if facts.merged is None:
        return {"adapter": adapter}
    merged = folder / "merged"
    _link_all(facts.merged.folder, merged)
    write_bytes(merged / "README.md", card(facts, lineage, merged=True).encode())
    return {"adapter": adapter, "merged": merged}


def adapter_config(folder: Path, model: Source) -> dict[str, Any]:
    """Return adapter_config.json with the base's own name and commit, and its sets in order.

    Raises:
        JobError: 70 if it would lead a reader to code or to a folder of this machine.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    config["base_model_name_or_path"] = base_name(model)
    config["revision"] = model.revision if hub_id(model) else None
    config["inference_mode"] = True
    for key in SORTED:
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    if config.get("auto_mapping"):
        do = "train a base that transformers knows"
        raise JobError(ExitCode.NOT_PROVEN, CONFIG, "names code to import (auto_mapping)", do)
    return config


def _link_all(source: Path, folder: Path) -> None:
    for name in list_files(source):
        if name != "artifact.json" and not name.startswith("."):
            _link(source / name, folder / name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _to_hub(context: Context, folders: dict[str, Path], version: str) -> dict[str, str]:
    """Copy the merged model, then the adapter: whoever sees the adapter finds the rest there."""
    hub = context.job.publish.hub
    wanted = [("merged", hub.merged), ("adapter", hub.adapter)]
    # The Hub knows no fence: look at the head once more, that a zombie stops here.
    context.attempt.publishing(version)
    return {
        repo_id: publish_folder(
            repo_id,
            folders[part],
            private=hub.private,
            message=f"{context.job.name} {version}",
            stop=context.stop,
        )
        for part, repo_id in wanted
        if repo_id is not None
    }
