"""What submit and schedule send: the manifests, with fields set from the two files. Pure."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import yaml

from job.errors import TABLE, Action
from job.files import fingerprint
from k8s.kustomize import MANIFESTS, build, merge

if TYPE_CHECKING:  # the models of a job file take longer than a verb that reads none
    from job.config import JobConfig
    from k8s.config import ClusterConfig

Object = dict[str, Any]

APP = "lora-job"
SELECTOR = f"app.kubernetes.io/name={APP}"
MANAGED_BY = "app.kubernetes.io/managed-by"
STORE, JOB_NAME, PRICE = "lora-job/store", "lora-job/name", "lora-job/price-per-gpu-hour"
CONFIG, OWNED = "lora-job/config", "lora-job/owned"
SINGLE_WRITER, MADE_FROM = "lora-job/single-writer", "lora-job/made-from"
SCHEDULE = "lora-job/schedule"
QUEUE, QUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def pod_failure_policy() -> Object:
    """Return the exit-code table as a Job's podFailurePolicy, disruptions first.

    ``status`` is written out: servers before 1.36 do not know its default.
    """
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [disrupted]},
            _on_codes("Ignore", "In", _codes("ignore")),
            _on_codes("FailJob", "In", _codes("fail")),
            # All that is left: what may pass on another node, bugs, and kills from outside.
            _on_codes("Count", "NotIn", [0]),
        ]
    }


def _codes(action: Action) -> list[int]:
    return sorted(int(code) for code, row in TABLE.items() if row.action == action)


def _on_codes(action: str, operator: str, values: list[int]) -> Object:
    codes = {"containerName": "job", "operator": operator, "values": values}
    return {"action": action, "onExitCodes": codes}


def job_file(job: JobConfig) -> str:
    """Return the job file that the pod reads: what its author set, without the comments."""
    from k8s.config import refuse_secrets

    settings = job.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    refuse_secrets(text, where="the job file")
    return text


def objects(job: JobConfig, cluster: ClusterConfig, *, run: str) -> tuple[Object, Object]:
    """Return the ConfigMap and the Job of a run."""
    config, manifest = _built(job, cluster, run)
    note = {"metadata": {"annotations": {MADE_FROM: _made_from(manifest)}}}
    return config, _named(merge(manifest, note), run, cluster)


def _made_from(job: Object) -> str:
    """Return a digest of what a Job asks for: its spec, and its labels (they name the queue)."""
    # A grace period may be measured anew for each submission: it makes no other Job.
    fleeting = {"template": {"spec": {"terminationGracePeriodSeconds": None}}}
    return fingerprint([job["metadata"]["labels"], merge(job["spec"], fleeting)])


def cron_objects(
    job: JobConfig,
    cluster: ClusterConfig,
    *,
    cron: str,
    time_zone: str,
    start_deadline_s: int,
    suspend: bool = False,
) -> tuple[Object, Object]:
    """Return the ConfigMap and the CronJob of a schedule; both Jobs and pods are those of submit."""
    digest = hashlib.sha256(job_file(job).encode()).hexdigest()
    config, template = _built(job, cluster, f"{job.name}-{digest[:8]}")
    labels = {**template["metadata"]["labels"], SCHEDULE: job.name}
    metadata = {"labels": labels, "annotations": template["metadata"]["annotations"]}
    return config, {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": job.name, "namespace": cluster.namespace, **metadata},
        "spec": {
            "schedule": cron,
            "timeZone": time_zone,
            # A night that still runs (or waits in a queue) is not joined by a second one.
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": start_deadline_s,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 7,
            "suspend": suspend,
            "jobTemplate": {"metadata": metadata, "spec": template["spec"]},
        },
    }


def _manifests(cluster: ClusterConfig) -> tuple[Object, Object]:
    built = build(MANIFESTS / "overlays" / cluster.platform / cluster.capacity)
    by_kind = {item["kind"]: item for item in built}
    return by_kind["ConfigMap"], by_kind["Job"]


def default_grace_s(cluster: ClusterConfig) -> int:
    """Return the grace period that the platform's manifests give a pod."""
    _, manifest = _manifests(cluster)
    return int(manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])


def _built(job: JobConfig, cluster: ClusterConfig, name: str) -> tuple[Object, Object]:
    """Return a ConfigMap of this name, and a Job without a name that reads it."""
    config, manifest = _manifests(cluster)
    labels = {MANAGED_BY: APP, JOB_NAME: job.name, OWNED: "false"}
    patch = {"metadata": {"labels": labels}, "data": {"job.yaml": job_file(job)}}
    job_of_it = merge(manifest, _job_patch(job, cluster, config=name))
    return _named(merge(config, patch), name, cluster), job_of_it


def _named(item: Object, name: str, cluster: ClusterConfig) -> Object:
    return merge(item, {"metadata": {"name": name, "namespace": cluster.namespace}})


def _job_patch(job: JobConfig, cluster: ClusterConfig, *, config: str) -> Object:
    labels = {MANAGED_BY: APP, JOB_NAME: job.name, CONFIG: config}
    labels |= {QUEUE: cluster.queue} if cluster.queue else {}
    labels |= {QUEUE_PRIORITY: cluster.queue_priority} if cluster.queue_priority else {}
    annotations = {STORE: job.store}
    if job.single_writer:
        annotations[SINGLE_WRITER] = "true"
    if cluster.price_per_gpu_hour is not None:
        annotations[PRICE] = str(cluster.price_per_gpu_hour)
    spec: Object = {
        "podFailurePolicy": pod_failure_policy(),
        "template": {
            "metadata": {"labels": {MANAGED_BY: APP, JOB_NAME: job.name}},
            "spec": _pod(cluster, config),
        },
    }
    limits = {
        "backoffLimit": cluster.backoff_limit,
        "ttlSecondsAfterFinished": cluster.ttl_s,
        "activeDeadlineSeconds": cluster.active_deadline_s,
    }
    spec |= {key: value for key, value in limits.items() if value is not None}
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def _pod(cluster: ClusterConfig, config: str) -> Object:
    pod: Object = {
        "containers": [_container(cluster)],
        "volumes": [{"name": "job-file", "configMap": {"name": config}}],
    }
    optional = {
        "terminationGracePeriodSeconds": cluster.grace_period_s,
        "priorityClassName": cluster.priority_class,
        "serviceAccountName": cluster.service_account,
    }
    pod |= {key: value for key, value in optional.items() if value is not None}
    if cluster.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": cluster.image_pull_secret}]
    if cluster.node_selector:
        pod["nodeSelector"] = dict(cluster.node_selector)
    if cluster.shm_size:
        pod["volumes"].append({"name": "shm", "emptyDir": {"sizeLimit": cluster.shm_size}})
    if cluster.cache:
        pod["volumes"].append({"name": "cache", **_cache_volume(cluster)})
    return pod


def _cache_volume(cluster: ClusterConfig) -> Object:
    assert cluster.cache is not None
    if cluster.cache.claim:
        return {"persistentVolumeClaim": {"claimName": cluster.cache.claim}}
    return {"hostPath": {"path": cluster.cache.host_path, "type": "DirectoryOrCreate"}}


def _container(cluster: ClusterConfig) -> Object:
    container: Object = {
        "name": "job",
        "image": cluster.image,
        "env": [{"name": "LORA_JOB_IMAGE", "value": cluster.image}, *_environment(cluster)],
        "resources": _resources(cluster),
    }
    if cluster.cache:
        # A volume of its own beside the image's: base weights only.
        container["args"] = ["--cache-dir", "/cache"]
        container["volumeMounts"] = [{"name": "cache", "mountPath": "/cache"}]
    return container


def _environment(cluster: ClusterConfig) -> list[Object]:
    plain: list[Object] = [{"name": name, "value": text} for name, text in cluster.env.items()]
    for name, reference in cluster.secrets.items():
        secret, key = reference.split("/")
        source = {"secretKeyRef": {"name": secret, "key": key, "optional": False}}
        plain.append({"name": name, "valueFrom": source})
    return plain


def _resources(cluster: ClusterConfig) -> Object:
    # Null takes the GPU out of the base's requests where none is asked for.
    gpus = str(cluster.gpus) if cluster.gpus else None
    requests: Object = {"nvidia.com/gpu": gpus}
    limits: Object = {"nvidia.com/gpu": gpus}
    if cluster.cpu:
        requests["cpu"] = cluster.cpu
    if cluster.memory:
        requests["memory"] = limits["memory"] = cluster.memory
    if cluster.ephemeral_storage:
        requests["ephemeral-storage"] = limits["ephemeral-storage"] = cluster.ephemeral_storage
    return {"requests": requests, "limits": limits}


def run_name(job: JobConfig, *, new: str | None = None) -> str:
    """Return the run's id: a name and the digest of the job file; ``new`` makes another run."""
    return f"{job.run_name}-{fingerprint(new)[:5]}" if new else job.run_name


class _Dumper(yaml.SafeDumper):
    """YAML with text of several lines as people write it."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(items: list[Object]) -> str:
    """Return objects as the YAML stream that submit sends and `kubectl apply -f -` takes."""
    return yaml.dump_all(items, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
