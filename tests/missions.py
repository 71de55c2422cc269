"""A person on a cluster with a real node: types `lora-job`, looks at pods, and at the store."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import proxies
import servers
import tiny
import yaml
from node_machine import ADDRESS, NodeMachine
from submitting import rules

Object = dict[str, Any]
T = TypeVar("T")

COMMAND = Path(sys.executable).with_name("lora-job")
KEYS = {"AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET}
JOB_NAME = "batch.kubernetes.io/job-name"
BATCH = "/apis/batch/v1/namespaces/{}"
CORE = "/api/v1/namespaces/{}"


@dataclass(frozen=True)
class Bucket:
    """An S3 server that pods reach, behind a proxy that can be cut."""

    endpoint: str
    proxy: proxies.Proxy
    client: Any

    def read(self, store: str, key: str) -> Any:
        """Return the JSON object ``key`` of a store, or None if there is none."""
        path = f"{store.removeprefix(f's3://{servers.BUCKET}/')}/{key}"
        try:
            body = self.client.get_object(Bucket=servers.BUCKET, Key=path)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return json.loads(body)

    def names(self, store: str, prefix: str) -> list[str]:
        """Return the keys below ``prefix`` of a store."""
        path = f"{store.removeprefix(f's3://{servers.BUCKET}/')}/{prefix}"
        pages = self.client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=servers.BUCKET, Prefix=path)
        return [item["Key"] for page in found for item in page.get("Contents", [])]

    def put(self, path: Path, uri: str) -> None:
        """Copy a file, or the files of a flat folder, to where ``uri`` says."""
        key = uri.removeprefix(f"s3://{servers.BUCKET}/")
        files = {f"{key}/{it.name}": it for it in path.iterdir()} if path.is_dir() else {key: path}
        for place, file in files.items():
            self.client.upload_file(str(file), servers.BUCKET, place)


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    """Run SeaweedFS, and a proxy to it at the bridge's address."""
    with servers.seaweedfs() as server:
        upstream = server.endpoint.removeprefix("http://")
        with proxies.toxiproxy(folder, address=ADDRESS, s3=upstream) as made:
            client = boto3.client("s3", **server.client_options())
            yield Bucket(f"http://{made['s3'].listen}", made["s3"], client)


@dataclass(frozen=True)
class Mission:
    """One namespace with the Secret of a store, and somebody who may submit there."""

    machine: NodeMachine
    s3: Bucket
    folder: Path
    namespace: str
    kubeconfig: Path
    store: str

    # Files and commands

    def files(self, name: str, *, steps: int = 60, **changes: Any) -> tuple[Path, Path]:
        """Write a job and a cluster file; ``changes`` go into the sections that have the key."""
        base, rows = self.folder / "base", self.folder / "rows.jsonl"
        if not rows.exists():
            tiny.tiny_model(base, "llama")
            tiny.write_rows(rows, tiny.tiny_rows(24))
        train = {
            "max_steps": steps,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
            "checkpoint_every_steps": 5,
            **changes.pop("train", {}),
        }
        job = {
            "name": name,
            "device": "cpu",
            "store": self.store,
            "model": {"source": str(base)},
            "data": {"source": str(rows), "max_length": 256, "thinking": "tags", "held_out": 0.2},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.05, **changes.pop("lora", {})},
            "train": train,
            "judge": {"max_new_tokens": 4},
            "publish": {"channel": "nightly"},
        }
        cluster = {
            "platform": "gpu-operator",
            "image": self.machine.image,
            "namespace": self.namespace,
            "gpus": 0,
            "cpu": "100m",
            "memory": "3Gi",
            "ephemeral_storage": "1Gi",
            "shm_size": "64Mi",
            "grace_period_s": 60,
            "env": {
                "AWS_ENDPOINT_URL": self.s3.endpoint,
                "AWS_DEFAULT_REGION": "us-east-1",
                "OMP_NUM_THREADS": "1",
            },
            "secrets": {key: f"s3/{key.lower()}" for key in KEYS},
            **changes,
        }
        paths = self.folder / f"{name}.job.yaml", self.folder / f"{name}.cluster.yaml"
        for path, content in zip(paths, (job, cluster), strict=True):
            path.write_text(yaml.safe_dump(content))
        return paths

    @property
    def environment(self) -> dict[str, str]:
        """The person's shell: their kubeconfig, and their own credentials for the store."""
        return {
            **os.environ,
            **KEYS,
            "AWS_ENDPOINT_URL": self.s3.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "KUBECONFIG": str(self.kubeconfig),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def types(self, *words: str | Path, expect: int | None = 0) -> str:
        """Run ``lora-job`` and return its stdout; it must end with ``expect`` (None: whatever)."""
        command = [str(COMMAND), *map(str, words)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=self.environment
        )
        if expect is not None:
            assert done.returncode == expect, (words, done.returncode, done.stderr[-3000:])
        return done.stdout

    def submit(self, name: str, *flags: str, **changes: Any) -> str:
        """Submit a small job without the data checks of this machine, and return the run's id."""
        job, cluster = self.files(name, **changes)
        words = ("submit", job, "--cluster", cluster, "--no-data-checks", *flags)
        return self.types(*words).strip()

    def apply(self, name: str, **changes: Any) -> str:
        """Create what `render` prints, with its inputs where that says: as one does without submit.

        (Which refuses a GPU for a job of this CPU.)
        """
        job, cluster = self.files(name, **changes)
        text = self.types("render", job, "--cluster", cluster, "--no-data-checks")
        config, item = yaml.safe_load_all(text)
        placed = yaml.safe_load(config["data"]["job.yaml"])
        self.s3.put(self.folder / "base", placed["model"]["source"])
        self.s3.put(self.folder / "rows.jsonl", placed["data"]["source"])
        self.machine.plane.create(f"{CORE.format(self.namespace)}/configmaps", config)
        self.machine.plane.create(f"{BATCH.format(self.namespace)}/jobs", item)
        return str(item["metadata"]["name"])

    def ask(self, verb: str, run: str, *words: str) -> Object:
        """Return what a verb says about a run, as JSON."""
        said = self.types(verb, run, "-n", self.namespace, "--output", "json", *words, expect=None)
        return json.loads(said)  # type: ignore[no-any-return]

    # The cluster and the store

    def pods(self, run: str) -> list[Object]:
        """Return the run's pods, oldest first."""
        found = self.machine.plane.get(f"{CORE.format(self.namespace)}/pods")["items"]
        ours = [pod for pod in found if pod["metadata"].get("labels", {}).get(JOB_NAME) == run]
        return sorted(ours, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def job(self, run: str) -> Object:
        """Return the run's Job."""
        return self.machine.plane.get(f"{BATCH.format(self.namespace)}/jobs/{run}")  # type: ignore[no-any-return]

    def over(self, run: str, *, within_s: float = 300) -> str:
        """Wait for the Job's end: ``Complete``, or the reason that it failed for."""

        def ended(job: Object) -> str | None:
            for one in job.get("status", {}).get("conditions", []):
                if one["status"] == "True" and one["type"] in ("Complete", "Failed"):
                    return "Complete" if one["type"] == "Complete" else str(one["reason"])
            return None

        path = f"{BATCH.format(self.namespace)}/jobs/{run}"
        how = self.machine.plane.wait_for(path, ended, within_s=within_s)
        assert how is not None
        return how

    def head(self, run: str) -> Object:
        """Return the run's head in the store; empty before there is one."""
        return self.s3.read(self.store, f"_runs/{run}/head.json") or {}

    def until(self, run: str, condition: Callable[[Object], T], *, within_s: float = 180) -> T:
        """Return the first true value of ``condition`` of the run's head."""
        end = time.monotonic() + within_s
        while not (value := condition(self.head(run))):
            shown = self.head(run) or [pod["status"] for pod in self.pods(run)]
            assert time.monotonic() < end, json.dumps(shown, indent=1)[:4000]
            time.sleep(0.2)  # a store has nothing to wait on
        return value

    def checkpoint_after(self, run: str, step: int) -> int:
        """Wait for a durable checkpoint of a later step, and return that step."""

        def later(head: Object) -> int:
            found = (head.get("checkpoint") or {}).get("step", 0)
            return int(found) if found > step else 0

        return self.until(run, later)

    def receipt(self, run: str) -> Object:
        """Return the receipt of a published run."""
        return self.s3.read(self.store, f"_runs/{run}/receipt.json")  # type: ignore[no-any-return]

    def unschedulable(self, run: str) -> None:
        """Wait until a pod of the run has been looked at, and no node takes it."""

        def refused(pods: list[Object]) -> bool:
            return any(
                one.get("reason") == "Unschedulable"
                for pod in pods
                if pod["metadata"].get("labels", {}).get(JOB_NAME) == run
                for one in pod["status"].get("conditions", [])
            )

        path = f"{CORE.format(self.namespace)}/pods"
        assert self.machine.plane.wait(path, refused, within_s=120)

    def evict(self, pod: str) -> None:
        """Evict a pod as `kubectl drain` does."""
        path = f"{CORE.format(self.namespace)}/pods/{pod}/eviction"
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        self.machine.plane.create(path, body)

    def pod_gone(self, name: str) -> None:
        """Wait until a pod is over or gone."""
        path = f"{CORE.format(self.namespace)}/pods"

        def over(pods: list[Object]) -> bool:
            left = [pod for pod in pods if pod["metadata"]["name"] == name]
            return not left or left[0]["status"]["phase"] in ("Failed", "Succeeded")

        self.machine.plane.wait(path, over, within_s=120)

    def copy_of_pod(self, pod: Object, name: str, owner: str) -> None:
        """Start a pod that is like ``pod`` but of nobody's Job, and says that ``owner`` owns it."""
        spec = {**pod["spec"]}
        spec.pop("nodeName", None)
        container = {**spec["containers"][0]}
        changed = {"LORA_JOB_RUN_ID": pod["metadata"]["labels"][JOB_NAME], "LORA_JOB_OWNER": owner}
        kept = [one for one in container["env"] if one["name"] not in changed]
        container["env"] = kept + [{"name": k, "value": v} for k, v in changed.items()]
        container["resources"] = {"requests": {"cpu": "100m"}, "limits": {"memory": "3Gi"}}
        body = {"metadata": {"name": name}, "spec": {**spec, "containers": [container]}}
        self.machine.plane.create(f"{CORE.format(self.namespace)}/pods", body)

    def exit_code(self, pod: str, *, within_s: float = 180) -> int:
        """Wait for a pod's end, and return its container's exit code."""

        def code(found: Object) -> list[int]:
            states = [s["state"] for s in found["status"].get("containerStatuses", [])]
            return [s["terminated"]["exitCode"] for s in states if "terminated" in s]

        path = f"{CORE.format(self.namespace)}/pods/{pod}"
        codes = self.machine.plane.wait_for(path, code, within_s=within_s)
        return codes[0]


def start_mission(machine: NodeMachine, s3: Bucket, folder: Path, name: str) -> Mission:
    """Make a restricted namespace with the store's Secret and a submitter."""
    namespace = machine.plane.namespace(name)
    secret = {"metadata": {"name": "s3"}, "stringData": {k.lower(): v for k, v in KEYS.items()}}
    machine.plane.create(f"{CORE.format(namespace)}/secrets", secret)
    kubeconfig = machine.plane.user(namespace, rules("submitter"))
    store = f"s3://{servers.BUCKET}/{namespace}"
    return Mission(machine, s3, folder, namespace, kubeconfig, store)
