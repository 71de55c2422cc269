"""How the verbs of a cluster answer when its namespace holds thousands of finished runs.

    PYTHONPATH=tests python tests/bench/bench_cluster.py [--runs 5000]

A real API server and etcd; the runs are written as a week of them would have left them: a Job, its
job file and one pod each. The controllers are off, since nothing is to happen to them. Each verb is
a process of its own, measured as a whole: wall time and the most memory it held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import servers
import yaml
from controlplane import ControlPlane, control_plane
from submitting import DIGEST, rules

from job.config import JobConfig, parse
from k8s.config import ClusterConfig
from k8s.render import objects

Object = dict[str, Any]

NAMESPACE = "lora-job"
LIMIT_S, LIMIT_MB = 2.0, 150
WEEK_S = 6 * 86_400
JOB = """
name: {name}
device: cuda
store: {store}
model: {{source: "hf://Qwen/Qwen3-0.6B@main"}}
data: {{source: "hf://HuggingFaceH4/Multilingual-Thinking"}}
"""


@dataclass(frozen=True)
class Figure:
    """One verb, over several runs of it."""

    name: str
    seconds: list[float]
    megabytes: list[float]

    def line(self) -> str:
        """Return a row of the table."""
        median = statistics.median(self.seconds)
        return f"| {self.name:<26} | {median:8.2f} | {max(self.seconds):8.2f} | {max(self.megabytes):8.0f} |"


def _time(age_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age_s))


def _status(age_s: float, code: int) -> Object:
    kinds = ["FailureTarget", "Failed"] if code else ["SuccessCriteriaMet", "Complete"]
    reason = "PodFailurePolicy" if code else "CompletionsReached"
    moment = _time(age_s)
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": moment}
        for kind in kinds
    ]
    status: Object = {"startTime": _time(age_s + 3600), "conditions": conditions}
    return status | ({"failed": 1} if code else {"succeeded": 1, "completionTime": moment})


def _write_run(plane: ControlPlane, index: int, total: int, store: str) -> str:
    """Write one run as it is after its end, a code 65 among ten; return its name."""
    job = parse(JOB.format(name=f"run-{index:05}", store=store), JobConfig, where="bench")
    settings = ClusterConfig(platform="gpu-operator", image=DIGEST, namespace=NAMESPACE)
    config, manifest = objects(job, settings, run=job.run_name)
    code, age_s = (65 if index % 10 == 9 else 0), WEEK_S * (total - index) / total
    core, batch = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/batch/v1/namespaces/{NAMESPACE}"
    plane.create(f"{core}/configmaps", config)
    made = plane.create(f"{batch}/jobs", manifest)
    plane.patch(f"{batch}/jobs/{job.run_name}/status", {"status": _status(age_s, code)})
    template = made["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job.run_name, "controller": True}
    metadata = {
        "name": f"{job.run_name}-x",
        "labels": template["metadata"]["labels"],
        "ownerReferences": [owner | {"uid": made["metadata"]["uid"]}],
    }
    plane.create(f"{core}/pods", {"metadata": metadata, "spec": template["spec"]})
    record = {"run": job.run_name, "code": code, "stage": "publish", "step": 100, "epoch": 1}
    plane.end_pod(NAMESPACE, metadata["name"], code, message=json.dumps(record))
    return job.run_name


def write_runs(plane: ControlPlane, count: int, store: str) -> list[str]:
    """Write ``count`` finished runs, and return their names."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda index: _write_run(plane, index, count, store), range(count)))


def measure(name: str, command: list[str], environment: dict[str, str], times: int) -> Figure:
    """Run a command several times, after one run that warms the disk's cache."""
    seconds, megabytes = [], []
    for turn in range(times + 1):
        began = time.monotonic()
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stderr is not None
        out, errors = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{command}: {child.returncode}\n{(out + errors).decode()[-3000:]}")
        if turn:
            seconds.append(time.monotonic() - began)
            megabytes.append(usage.ru_maxrss / 1024)
    return Figure(name, seconds, megabytes)


def _verbs(runs: list[str], job: Path, cluster: Path) -> dict[str, list[str]]:
    lora_job = [sys.executable, "-m", "k8s.cli"]
    script = Path(sys.executable).with_name("lora-job")
    if script.exists():
        lora_job = [str(script)]
    where = ["-n", NAMESPACE]
    files = [str(job), "--cluster", str(cluster)]
    return {
        "imports alone": [sys.executable, "-c", "import kubernetes.client, boto3, yaml"],
        "list": [*lora_job, "list", *where],
        "list --limit 100": [*lora_job, "list", "--limit", "100", *where],
        "status, the newest": [*lora_job, "status", runs[-1], *where],
        "status, the oldest": [*lora_job, "status", runs[0], *where],
        "why, a failed one": [*lora_job, "why", runs[9], *where],
        "submit --new": [*lora_job, "submit", *files, "--new", "--no-data-checks"],
    }


def main() -> int:
    """Write the runs, measure, and print a table; 1 if a limit is passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--minor", default="1.34")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, servers.seaweedfs() as server:
        folder, store = Path(name), f"s3://{server.bucket}/adapters"
        with control_plane(folder / "plane", arguments.minor, controllers=False) as plane:
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            plane.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
            account = {"metadata": {"name": "default"}}
            plane.create(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", account)
            began = time.monotonic()
            runs = write_runs(plane, arguments.runs, store)
            print(f"{len(runs)} runs written in {time.monotonic() - began:.0f} s", file=sys.stderr)
            job, cluster = folder / "job.yaml", folder / "cluster.yaml"
            job.write_text(JOB.format(name="bench", store=store))
            settings = {"platform": "gpu-operator", "image": DIGEST, "namespace": NAMESPACE}
            cluster.write_text(yaml.safe_dump(settings))
            environment = {
                **os.environ,
                **server.environment(),
                "KUBECONFIG": str(plane.user(NAMESPACE, rules("submitter"))),
            }
            figures = [
                measure(verb, command, environment, arguments.times)
                for verb, command in _verbs(runs, job, cluster).items()
            ]
    print(f"| {arguments.runs} finished runs".ljust(28), "| median s |    max s |   max MB |")
    print(f"|{'-' * 28}|---------:|---------:|---------:|")
    print("\n".join(figure.line() for figure in figures))
    slow = [one.name for one in figures[1:] if statistics.median(one.seconds) > LIMIT_S]
    large = [one.name for one in figures[1:] if max(one.megabytes) > LIMIT_MB]
    if slow or large:
        print(f"over {LIMIT_S} s: {slow}; over {LIMIT_MB} MB: {large}", file=sys.stderr)
    return 1 if slow or large else 0


if __name__ == "__main__":
    sys.exit(main())
