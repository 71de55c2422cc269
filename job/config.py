"""The job file: what is trained from what, and where the result goes. No torch, no secrets.

Fields keep the names that transformers, PEFT and TRL give them. Unknown keys are refused and all
errors are told at once, each with its field and the mend.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from job.errors import ExitCode, JobError
from job.files import fingerprint

T = TypeVar("T", bound=BaseModel)

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$"
SOURCE_PATTERN = re.compile(r"^(hf://[^/@]+/[^/@]+(@[^@]+)?|s3://[^/]+/.+|package:[^/]+/.+)$")

Attention = Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_4"]
Scheduler = Literal["cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup"]
MergeFormat = Literal["base", "fp32", "bf16", "mxfp4-preserve", "none"]


class Section(BaseModel):
    """A part of the job file: frozen, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _known_source(value: str) -> str:
    if "://" in value.split("@", maxsplit=1)[0] or value.startswith("package:"):
        if not SOURCE_PATTERN.match(value):
            raise ValueError(
                "must be hf://owner/repo[@revision], s3://bucket/key, package:name/file or a path"
            )
    elif not value:
        raise ValueError("must not be empty")
    return value


class ModelSection(Section):
    """The base model."""

    source: str
    """`hf://owner/repo@revision`, `s3://bucket/prefix`, `package:name/file.gguf` or a folder."""
    attention: Attention = "auto"
    """How attention is computed; `auto` picks the fastest that is right and logs why."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the base is held in while training; `auto` is the checkpoint's own on a GPU."""
    chat_template: str | None = None
    """A Jinja chat template, in place of the tokenizer's own; needed for most base models."""

    _source = field_validator("source")(_known_source)


class Mapping(Section):
    """Which columns mean what, for data that is not in a known shape."""

    messages: str | None = None
    """Column with the list of turns."""
    role: str = "role"
    """Key of a turn's role."""
    content: str = "content"
    """Key of a turn's text."""
    thinking: str | None = None
    """Key of a turn's reasoning."""
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = {}
    """The data's role names, and what they mean here."""
    prompt: str | None = None
    """Column with the question, in place of `messages`."""
    completion: str | None = None
    """Column with the answer, in place of `messages`."""
    system: str | None = None
    """Column with the system text."""
    text: str | None = None
    """Column with plain text, trained on as it is."""

    @model_validator(mode="after")
    def _one_shape(self) -> Mapping:
        shapes = [self.messages, self.prompt, self.text]
        if sum(shape is not None for shape in shapes) != 1:
            raise ValueError("give exactly one of messages, prompt (with completion) and text")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together")
        return self


class DataLimits(Section):
    """When the data is too bad to train on (exit code 65). Shares are of the rows read."""

    max_invalid: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rows that can't be read, recognised or rendered."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rows dropped for any reason, invalid ones and too long ones included."""
    max_truncated: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Rows cut at `max_length`."""
    min_stop_coverage: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Examples whose trained part ends with a token that stops generation."""


class DataSection(Section):
    """What is trained on, and how rows become tokens."""

    source: str
    """Like `model.source`; a file or a folder of jsonl, json, parquet or csv (gzip, zstd too)."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens a training row may have."""
    packing: bool = False
    """Put several examples into one row, without a look from one into the other."""
    mapping: Mapping | None = None
    """Names of columns and roles, for data that is not recognised by itself."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: the assistant's turns, or everything."""
    thinking: Literal["keep", "drop", "tags"] = "keep"
    """Reasoning of an assistant's turn: as the template has it, left out, or as <think>…</think>."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to an example longer than `max_length`."""
    held_out: float | str | None = None
    """A share of the examples (0.05), or a source of its own, to measure loss on; never trained."""
    limits: DataLimits = DataLimits()

    _source = field_validator("source")(_known_source)

    @field_validator("held_out", mode="before")
    @classmethod
    def _share_or_source(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _known_source(value)
        if value is not None and not (isinstance(value, int | float) and 0 < value < 1):
            raise ValueError(f"must be a share between 0 and 1, or a source, got {value!r}")
        return value


class LoraSection(Section):
    """The adapter (PEFT's LoraConfig, in PEFT's words)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    target_parameters: list[str] = []
    """Parameters that are not modules, such as `7.mlp.experts.gate_up_proj`."""
    modules_to_save: list[str] = []
    """Modules trained whole and saved with the adapter."""
    use_rslora: bool = False
    expert_forward: Literal["grouped", "fold"] = "grouped"
    """Adapters of experts in training: beside the experts, or folded into a copy of them (PEFT)."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_names(cls, value: Any) -> Any:
        named = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if value != "all-linear" and not named:
            raise ValueError(f"must be all-linear or a list of names, got {value!r}")
        return value

    @model_validator(mode="after")
    def _no_dropout_on_parameters(self) -> LoraSection:
        if self.dropout and self.target_parameters:
            raise ValueError("dropout can't be had with target_parameters; set dropout: 0")
        return self


class TrainSection(Section):
    """How it is trained (TRL's SFTConfig, in its words)."""

    method: Literal["sft"] = "sft"
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """End after so many optimiser steps, in place of `epochs`."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    scheduler: Scheduler = "cosine_with_min_lr"
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The least learning rate, as a share of `learning_rate` (cosine_with_min_lr only)."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation: Annotated[int, Field(ge=1)] = 4
    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Ranks in the pod; by itself one for each GPU. A step has `batch_size` × so many more rows."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Whether ranks share the base's layers out (fsdp2): for a base that one GPU can't hold."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Whether layers are computed anew in the backward pass, which takes a third more time. auto:
    only if a step does not fit in memory without it (tried on a GPU, estimated on a CPU)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a mixture-of-experts router's balance loss; never taken from the model's config."""
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds between checkpoints: what a kill may cost."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, in place of seconds."""
    max_duration_s: Annotated[float, Field(gt=0)] | None = None
    """End training after so many seconds, over all attempts, and publish what there is."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A training that makes no step for so long hangs, and ends with 69."""
    expandable_segments: bool = False
    """Let CUDA's allocator grow its segments (less fragmentation)."""


class MergeSection(Section):
    """How base and adapter become one model, and when that counts as proven."""

    format: MergeFormat = "base"
    """The base's dtype, another one, `mxfp4-preserve` (experts byte for byte), or no merge."""
    max_logit_difference: Annotated[float, Field(gt=0)] = 1e-4
    """The largest difference of logits in fp32, merged against base + adapter."""
    max_kl_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """In bf16: KL(adapter, merged) at most this share of KL(adapter, base)."""


class Prompt(Section):
    """A question that the model is asked before and after training."""

    user: Annotated[str, Field(min_length=1)]
    system: str | None = None
    reasoning_language: str | None = None


class JudgeSection(Section):
    """What the trained model is asked, beside its held-out loss."""

    prompts: list[Prompt] = []
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0)] = 0.6


class HubSection(Section):
    """Repositories on the Hugging Face Hub, for people who live there."""

    adapter: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    merged: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    private: bool = True

    @model_validator(mode="after")
    def _two_repositories(self) -> HubSection:
        if self.adapter is not None and self.adapter == self.merged:
            raise ValueError(
                "adapter and merged need two repositories: a root with both loads wrong"
            )
        return self


class PublishSection(Section):
    """What goes where once it is proven."""

    merged: bool = True
    """Publish the merged model too, beside the adapter."""
    channel: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Pointer that moves to the new version, such as `nightly`."""
    hub: HubSection = HubSection()


class MlflowSection(Section):
    """Tracking with MLflow; its server and credentials come from the environment."""

    experiment: str = "lora-job"
    run_name: str | None = None
    tracking_uri: str | None = None

    @field_validator("tracking_uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value and "@" in urlsplit(value).netloc:
            raise ValueError(
                "holds a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value


class TrackioSection(Section):
    """Tracking with Trackio."""

    project: str = "lora-job"
    space_id: str | None = None


class TensorboardSection(Section):
    """Tracking with TensorBoard event files in the attempt's folder."""

    folder: str | None = None


class TrackSection(Section):
    """Trackers. One that fails never fails a run."""

    mlflow: MlflowSection | None = None
    trackio: TrackioSection | None = None
    tensorboard: TensorboardSection | None = None


class JobConfig(Section):
    """One job file."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """A DNS label of at most 40 characters: the adapter's name in the store."""
    device: Literal["cuda", "cpu"]
    """Required: a GPU that is not there is code 69, never a silent run on the CPU."""
    store: str
    """`s3://bucket/prefix`, or a folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    single_writer: bool = False
    """The store has no conditional writes, and nobody else writes this name."""
    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    merge: MergeSection = MergeSection()
    judge: JudgeSection = JudgeSection()
    publish: PublishSection = PublishSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _fits_together(self) -> JobConfig:
        if self.train.sharding == "fsdp2" and self.lora.expert_forward == "fold":
            raise ValueError("train.sharding: fsdp2 needs lora.expert_forward: grouped")
        if self.train.sharding == "fsdp2" and self.train.num_processes == 1:
            raise ValueError("train.sharding: fsdp2 needs more than one of train.num_processes")
        if self.merge.format == "mxfp4-preserve" and self.lora.target_parameters:
            raise ValueError(
                "merge.format: mxfp4-preserve can't hold what lora.target_parameters adds to "
                "experts; set it to base"
            )
        if self.merge.format == "none" and self.publish.hub.merged:
            raise ValueError("publish.hub.merged needs a merge; set merge.format to base")
        if "://" in self.store and not re.match(r"^s3://[^/]+", self.store):
            raise ValueError("store must be s3://bucket/prefix or a folder")
        return self

    @property
    def run_name(self) -> str:
        """The run's id: the name and 8 hex digits of what the file says beyond the defaults."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        return f"{self.name}-{fingerprint(settings)[:8]}"


def load_job(path: Path) -> JobConfig:
    """Read and check a job file.

    Relative paths in it (model, data, held-out, store) are relative to the working directory.

    Raises:
        JobError: 66 if it is not there, 78 with every fault at once if it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        what = error.strerror or "can't be read"
        raise JobError(ExitCode.NOT_FOUND, str(path), what, "name a job file") from error
    except UnicodeDecodeError as error:
        raise JobError(ExitCode.CONFIG, str(path), "is not UTF-8", "save it as UTF-8") from error
    return parse(text, JobConfig, where=str(path))


class _NoTwice(yaml.SafeLoader):
    """A mapping that names a key twice would silently lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping, or refuse it."""
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for key, _ in node.value if names.count(key.value) > 1), None)
        if twice is not None:
            what = f"{twice.value} is named twice"
            raise yaml.constructor.ConstructorError(None, None, what, twice.start_mark)
        return super().construct_mapping(node, deep=deep)


def parse(text: str, kind: type[T], *, where: str, guide: str = "docs/job-file.md") -> T:
    """Return YAML ``text`` as ``kind``.

    Raises:
        JobError: 78 with every fault at once.
    """
    try:
        raw = yaml.load(text, Loader=_NoTwice)
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise JobError(ExitCode.CONFIG, where, f"is no YAML: {what}", "mend that line") from error
    if not isinstance(raw, dict):
        do = "start from a file in examples/"
        raise JobError(ExitCode.CONFIG, where, "holds no settings", do)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [_explain(fault, kind) for fault in error.errors()]
        if len(faults) == 1:
            raise JobError(ExitCode.CONFIG, where, faults[0], f"see {guide}") from None
        do = "\n  ".join([f"see {guide}:", *faults])
        raise JobError(ExitCode.CONFIG, where, f"{len(faults)} settings are wrong", do) from None


def _explain(fault: Any, kind: type[BaseModel]) -> str:
    """Return one of pydantic's errors as *field: what; do this*."""
    path = [
        str(part) for part in fault["loc"] if not str(part).startswith(("function-", "literal["))
    ]
    field = ".".join(path) or "the file"
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{field}: is not a known key; {mend}"
    if fault["type"] == "missing":
        return f"{field}: is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{field}: {message}"
    got = f", got {fault['input']!r}" if not isinstance(fault["input"], dict | list) else ""
    if path and path[-1] in ("name", "channel") and fault["type"] == "string_pattern_mismatch":
        message = "must be a DNS label: a-z, 0-9 and -, at most 40 characters"
    return f"{field}: {message}{got}"


def _fields_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the section that ``path`` leads to."""
    for part in path:
        field = kind.model_fields.get(part)
        options = (
            [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        )
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            return []
        kind = inner[0]
    return list(kind.model_fields)
