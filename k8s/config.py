"""The cluster file: where and how a job runs, and nothing about what is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from job.config import Section, parse
from job.errors import ExitCode, JobError

Platform = Literal["gke", "eks-karpenter", "eks-managed", "aks", "gpu-operator"]

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|[kKMGTPE]i?)?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
LABEL_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
IMAGE = r"^[^\s@]+(@sha256:[0-9a-f]{64})?$"
LABEL_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"^([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{LABEL_PART}$")
LABEL_VALUE = re.compile(rf"^({LABEL_PART})?$")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
SECRET_REF = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+$")
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSW|CREDENTIAL)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|://[^/\s:@]+:[^/\s@]+@|PRIVATE KEY-----"
)


def _shaped(pattern: str, words: str) -> AfterValidator:
    """Return a check of a text's form that says how to write it, and not its pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not valid; {words}")
        return value

    return AfterValidator(check)


Quantity = Annotated[str, _shaped(QUANTITY, "write it as Kubernetes does, such as 8 or 64Gi")]
DnsName = Annotated[str, _shaped(DNS_NAME, "use a-z, 0-9, - and ., at most 253 characters")]
LabelName = Annotated[str, _shaped(LABEL_NAME, "use a-z, 0-9 and -, at most 63 characters")]
Image = Annotated[str, _shaped(IMAGE, "write it as registry/name@sha256: and 64 hex digits")]
HostPath = Annotated[str, _shaped(r"^/[^:]+$", "write a path from the root on, such as /data")]


class CacheSection(Section):
    """Where base weights stay between runs; mounted at /cache."""

    claim: DnsName | None = None
    """A PersistentVolumeClaim of the namespace."""
    host_path: HostPath | None = None
    """A folder of the node. Pod Security `restricted` and `baseline` refuse such pods."""

    @model_validator(mode="after")
    def _one_of_them(self) -> CacheSection:
        if (self.claim is None) == (self.host_path is None):
            raise ValueError("give exactly one of claim and host_path")
        return self


class ClusterConfig(Section):
    """One cluster file."""

    platform: Platform
    """Which overlay of k8s/manifests: how this cluster labels and taints its H100 nodes."""
    image: Image
    """The training image, best by digest: `registry/lora-job@sha256:…`."""
    capacity: Literal["on-demand", "spot"] = "on-demand"
    namespace: LabelName = "lora-job"
    context: str | None = None
    """Context of the kubeconfig; the current one by itself, or the pod's own inside a cluster."""
    require_digest: bool = False
    """Refuse an image that is not named by digest."""
    image_pull_secret: DnsName | None = None
    gpus: Annotated[int, Field(ge=0, le=8)] = 1
    cpu: Quantity | None = None
    memory: Quantity | None = None
    """Request and limit; /dev/shm is a part of it."""
    ephemeral_storage: Quantity | None = None
    """Request and limit: disk for base, checkpoints and merged model; `lora-job check` estimates it."""
    shm_size: Quantity | None = None
    service_account: DnsName | None = None
    """For workload identity; its token is not mounted."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Environment from Secrets: `HF_TOKEN: hub/token` is key `token` of Secret `hub`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment that is no secret, such as AWS_ENDPOINT_URL."""
    node_selector: dict[str, str | None] = Field(default_factory=dict)
    """Labels to ask for besides the platform's; null drops one of the platform's."""
    queue: LabelName | None = None
    """Kueue's LocalQueue."""
    queue_priority: DnsName | None = None
    """Kueue's WorkloadPriorityClass."""
    priority_class: DnsName | None = None
    """The pod's PriorityClass."""
    cache: CacheSection | None = None
    grace_period_s: Annotated[int, Field(ge=1, le=86_400)] | None = None
    """SIGTERM to SIGKILL; a save and its upload must fit into it."""
    active_deadline_s: Annotated[int, Field(ge=1)] | None = None
    """Ends the Job, Pending time, back-off and retries counted."""
    backoff_limit: Annotated[int, Field(ge=0, le=20)] | None = None
    ttl_s: Annotated[int, Field(ge=0)] | None = None
    """Seconds that a finished Job and its pods stay."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """For the cost in `status` and `list`; any currency."""

    @field_validator("node_selector")
    @classmethod
    def _labels(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for key, text in value.items():
            if not LABEL_KEY.fullmatch(key):
                raise ValueError(f"{key!r} is no label; write it such as example.com/gpu: h100")
            if not LABEL_VALUE.fullmatch(text or ""):
                do = "use letters, digits, -, _ and ., at most 63 characters"
                raise ValueError(f"label {key} can't be {text!r}; {do}")
        return value

    @field_validator("secrets")
    @classmethod
    def _references(cls, value: dict[str, str]) -> dict[str, str]:
        for name, reference in value.items():
            if not ENV_NAME.match(name):
                raise ValueError(f"variable {name!r} has no valid name; use letters, digits and _")
            if not SECRET_REF.match(reference):
                # The value itself is not repeated: somebody may have put the secret here.
                raise ValueError(
                    f"variable {name} must be SECRET/KEY: a Secret and one of its keys"
                )
        return value

    @field_validator("env")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not ENV_NAME.match(name):
                raise ValueError(f"variable {name!r} has no valid name; use letters, digits and _")
            if name.startswith("LORA_JOB_"):
                raise ValueError(f"variable {name} is set by the manifests; leave it out")
            if SECRET_NAME.search(name) or SECRET_VALUE.search(text):
                raise ValueError(f"variable {name} looks like a secret; refer to it under secrets")
        return value

    @model_validator(mode="after")
    def _one_place_each(self) -> ClusterConfig:
        for name in sorted(set(self.secrets) & set(self.env)):
            raise ValueError(f"variable {name} stands in secrets and in env; take one out")
        return self

    @property
    def has_digest(self) -> bool:
        """Whether the image is named by its content."""
        return "@sha256:" in self.image


def load_cluster(path: Path) -> ClusterConfig:
    """Read and check a cluster file.

    Raises:
        JobError: 66 if it is not there, 78 with every fault at once, or for an image without a
            digest where one is required.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "is not UTF-8"
        raise JobError(ExitCode.NOT_FOUND, str(path), what, "name a cluster file") from error
    cluster = parse(text, ClusterConfig, where=str(path), guide="docs/cluster.md")
    if cluster.require_digest and not cluster.has_digest:
        raise JobError(
            ExitCode.CONFIG,
            f"{path}: image",
            f"{cluster.image} has no digest, and require_digest is set",
            "use what `make image push` prints, …@sha256:…",
        )
    return cluster


def refuse_secrets(text: str, *, where: str) -> None:
    """Refuse a job file that holds a credential: it would lie readable in a ConfigMap.

    Raises:
        JobError: 78; the credential is not repeated.
    """
    if SECRET_VALUE.search(text):
        raise JobError(
            ExitCode.CONFIG,
            where,
            "holds what looks like a credential",
            "take it out and refer to a Secret in the cluster file's secrets",
        )
