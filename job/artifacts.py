"""What stages hand to each other: frozen, on disk, and reused while its fingerprint holds.

A stage works in ``<stage>.partial`` and its folder is renamed when it is whole, so that
``<stage>`` exists only finished. An interrupted ``.partial`` is kept for the next attempt if its
fingerprint is the same (training and merging go on inside it), else it is thrown away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from job.files import fsync_tree, to_json, write_bytes

log = structlog.get_logger()


class Artifact(BaseModel):
    """A stage's result. ``folder`` is where it lies now; everything else is relative to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path

    def moved(self, folder: Path) -> Self:
        """Return the same artifact, lying in ``folder``."""
        return self.model_copy(update={"folder": folder})


class Source(Artifact):
    """A model or a data set on this machine, with what it is exactly."""

    uri: str
    """With its revision pinned: ``hf://owner/repo@<commit>``, ``s3://…``, ``file:…``."""
    revision: str | None = None
    """Commit (Hub), or version (package)."""
    files: dict[str, str]
    """Relative name → sha256 of every file, the pinned identity of the source."""
    license: str | None = None
    """As the source's card says, for the model card."""


class Dataset(Artifact):
    """Tokens, ready to train on.

    ``train.arrow`` and ``held_out.arrow`` (Arrow IPC streams, memory-mapped by
    ``datasets.Dataset.from_file``) have the columns ``input_ids: list<int32>``,
    ``labels: list<int32>`` (-100 where there is no loss) and ``lengths: list<int32>``: the
    lengths of the documents packed into the row, [number of tokens] if unpacked.
    ``tokenizer/`` is the base's tokenizer, with the job file's chat template if it has one:
    what publishing and merging copy. ``data_report.json`` says what became of every row.
    """

    digest: str
    """sha256 of train.arrow and held_out.arrow."""
    num_rows: int
    """Rows of train.arrow (packs, if packed)."""
    num_examples: int
    num_tokens: int
    num_supervised_tokens: int
    num_held_out: int
    """Rows of held_out.arrow; 0 where nothing is held out, and then there is no such file."""
    stop_token_ids: list[int]
    """What ends a turn under this template; generation stops there."""
    pad_token_id: int
    thinking: str
    """``data.thinking``: how generate splits analysis from answer."""


class Adapter(Artifact):
    """A trained adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    Also ``history.jsonl``: a line for every logged step (step, loss, learning_rate, grad_norm,
    tokens_per_s, padding, …), and ``delta_norms.json``: norm of s·B·A for each adapted weight.
    """

    sha256: str
    """Of adapter_model.safetensors."""
    steps: int
    planned_steps: int
    """More than ``steps`` if max_duration_s ended training early."""
    num_tokens: int
    """Real (not padding) tokens trained on."""
    final_loss: float
    tokens_per_s: float
    duration_s: float
    """Over all attempts."""


class Merged(Artifact):
    """The merged model in safetensors shards, with ``merge_report.json``: the proof."""

    format: str
    num_parameters: int
    size_bytes: int
    report: dict[str, Any]
    """merge_report.json: keys landed, largest differences, KL, the share of the delta kept."""


class Answer(BaseModel):
    """What the model said to one prompt."""

    model_config = ConfigDict(frozen=True)

    user: str
    reasoning_language: str | None = None
    analysis_before: str = ""
    before: str = ""
    analysis_after: str = ""
    after: str = ""


class Verdict(Artifact):
    """How the adapter compares with its base. Losses are nats per token."""

    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    num_held_out_tokens: int = 0
    answers: list[Answer] = []


class Receipt(BaseModel):
    """What was published, where, and proven how: the last word of a run that ended with 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    name: str
    version: str
    uri: str
    """Folder of the version: ``<root>/<name>/versions/<version>``."""
    published: str
    """When, in UTC."""
    adapter_sha256: str
    manifest_sha256: str
    size_bytes: int
    channel: str | None = None
    channel_state: str | None = None
    """``moved``, or ``superseded`` by a newer version that was there first."""
    hub: dict[str, str] = {}
    """Repository → commit."""


A = TypeVar("A", bound=Artifact)


def reuse(
    folder: Path, fingerprint: str, kind: type[A], make: Callable[[Path], A], *, stage: str
) -> A:
    """Return the finished artifact in ``folder`` if its fingerprint is ``fingerprint``.

    Else ``make`` it in ``folder.partial``, and rename that when it is whole.
    """
    found = _read(folder, fingerprint, kind)
    if found is not None:
        log.info("artifact_reused", stage=stage, reason="same inputs, settings and versions")
        return found
    partial = folder.with_name(f"{folder.name}.partial")
    mark = partial / ".fingerprint"
    if partial.exists() and (not mark.exists() or mark.read_text() != fingerprint):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_bytes(mark, fingerprint.encode())
    artifact = make(partial)
    write_bytes(partial / "artifact.json", to_json(artifact.model_dump(mode="json")))
    fsync_tree(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return artifact.moved(folder)


def _read(folder: Path, fingerprint: str, kind: type[A]) -> A | None:
    mark = folder / ".fingerprint"
    if not mark.exists() or mark.read_text() != fingerprint:
        return None
    try:
        return kind.model_validate_json((folder / "artifact.json").read_bytes()).moved(folder)
    except (OSError, ValidationError):
        return None
