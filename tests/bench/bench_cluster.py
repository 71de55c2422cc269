"""How the verbs of a cluster answer when its namespace holds thousands of finished runs.

    PYTHONPATH=tests python tests/bench/bench_cluster.py [--runs 5000]

A real control plane, and kwok in place of kubelets: Jobs are created as submit creates them, the
scheduler places their pods, kwok ends them as kubelets would (kwok.yaml), the Job controller
ends the Jobs. Each verb is a process of its own, measured as a whole: wall time and the most memory
it held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import servers
import yaml
from controlplane import ROOT, ControlPlane, control_plane
from processes import Server, free_ports
from submitting import DIGEST, rules

from job.config import JobConfig, parse
from k8s.cluster import Cluster
from k8s.config import ClusterConfig
from k8s.connect import connect
from k8s.render import objects
from k8s.submit import ensure_config, own

Object = dict[str, Any]

NAMESPACE = "lora-job"
IMPORTS = "imports alone"
LIMIT_S, LIMIT_MB = 1.0, 150
"""Beyond the imports; in all."""
NODES, BAD = 40, 10
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
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


@contextlib.contextmanager
def kwok(plane: ControlPlane, folder: Path) -> Iterator[None]:
    """Let kwok be the kubelet of all nodes."""
    command = [
        ROOT / ".tools/bin/kwok",
        f"--kubeconfig={plane.admin}",
        f"--config={Path(__file__).with_name('kwok.yaml')}",
        "--manage-all-nodes",
        f"--server-address=127.0.0.1:{free_ports(1)[0]}",
    ]
    for number in range(NODES):
        plane.add_node(f"gpu-{number}", labels=H100)
    server = Server(command, folder / "kwok.log").start()
    try:
        yield
    finally:
        server.stop()


def _submit(cluster: Cluster, index: int, store: str) -> str:
    """Create a run as submit does after its checks; one of ten is to fail. Return its name."""
    name = "bad" if index % BAD == BAD - 1 else "good"
    job = parse(JOB.format(name=name, store=store), JobConfig, where="bench")
    settings = ClusterConfig(platform="gpu-operator", image=DIGEST, namespace=NAMESPACE)
    config, manifest = objects(job, settings, run=f"{name}-{index:05}")
    ensure_config(cluster, config)
    made = cluster.create(manifest).body
    own(cluster, config["metadata"]["name"], made)
    return str(made["metadata"]["name"])


def submit_runs(plane: ControlPlane, count: int, store: str) -> list[str]:
    """Submit ``count`` runs, wait for the end of all, and return their names."""
    cluster = connect(namespace=NAMESPACE)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda index: _submit(cluster, index, store), range(count)))
    print(f"{count} runs submitted in {time.monotonic() - began:.0f} s", file=sys.stderr)
    while not _over(plane, count // BAD):
        time.sleep(2)
    print(f"the last of them over after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return runs


def _over(plane: ControlPlane, bad: int) -> bool:
    """Whether all Jobs but ``bad`` have succeeded, and those have failed."""
    query = f"fieldSelector=status.successful!=1&limit={bad + 1}"
    page = plane.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs?{query}")
    conditions = [job["status"].get("conditions", []) for job in page["items"]]
    failed = [any(it["type"] == "Failed" for it in of_one) for of_one in conditions]
    return len(failed) == bad and all(failed)


# A process starts with the memory of the one that forks it: this one is small.
WATCH = """
import os, subprocess, sys, time
began = time.monotonic()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss / 1024)
"""


def measure(name: str, command: list[str], times: int) -> Figure:
    """Run a command several times, after one run that warms the disk's cache."""
    seconds, megabytes = [], []
    for turn in range(times + 1):
        watch = [sys.executable, "-S", "-c", WATCH, *command]
        done = subprocess.run(watch, capture_output=True, text=True, check=True)
        code, took, peak = map(float, done.stdout.split())
        if code:
            raise RuntimeError(f"{command}: {code:.0f}\n{done.stderr[-3000:]}")
        if turn:
            seconds.append(took)
            megabytes.append(peak)
    return Figure(name, seconds, megabytes)


def _verbs(runs: list[str], job: Path, cluster: Path) -> dict[str, list[str]]:
    lora_job = [sys.executable, "-m", "k8s.cli"]
    script = Path(sys.executable).with_name("lora-job")
    if script.exists():
        lora_job = [str(script)]
    where = ["-n", NAMESPACE]
    files = [str(job), "--cluster", str(cluster)]
    return {
        IMPORTS: [sys.executable, "-c", "import kubernetes.client, boto3, yaml"],
        "list": [*lora_job, "list", *where],
        "list --limit 100": [*lora_job, "list", "--limit", "100", *where],
        "status, the newest": [*lora_job, "status", runs[-1], *where],
        "status, the oldest": [*lora_job, "status", runs[0], *where],
        "why, a failed one": [*lora_job, "why", runs[BAD - 1], *where],
        "submit --new": [*lora_job, "submit", *files, "--new", "--no-data-checks"],
    }


def _measure_all(folder: Path, arguments: argparse.Namespace) -> list[Figure]:
    """Start everything, fill the namespace, and measure the verbs."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(servers.seaweedfs())
        plane = stack.enter_context(control_plane(folder / "plane", arguments.minor))
        stack.enter_context(kwok(plane, folder))
        store = f"s3://{server.bucket}/adapters"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        plane.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
        plane.wait(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", bool)
        os.environ |= server.environment()
        os.environ["KUBECONFIG"] = str(plane.user(NAMESPACE, rules("submitter")))
        runs = submit_runs(plane, arguments.runs, store)
        job, cluster = folder / "job.yaml", folder / "cluster.yaml"
        job.write_text(JOB.format(name="bench", store=store))
        settings = {"platform": "gpu-operator", "image": DIGEST, "namespace": NAMESPACE}
        cluster.write_text(yaml.safe_dump(settings))
        verbs = _verbs(runs, job, cluster).items()
        return [measure(verb, command, arguments.times) for verb, command in verbs]


def _excess(figures: list[Figure]) -> list[str]:
    """Return what is over the limits."""
    medians = {one.name: statistics.median(one.seconds) for one in figures}
    imports = medians.pop(IMPORTS)
    slow = [name for name, seconds in medians.items() if seconds - imports > LIMIT_S]
    large = [one.name for one in figures if max(one.megabytes) > LIMIT_MB]
    return [f"{it}: over {LIMIT_S} s beyond the imports" for it in slow] + [
        f"{it}: over {LIMIT_MB} MB" for it in large
    ]


def main() -> int:
    """Submit the runs, measure, and print a table; 1 if a limit is passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--minor", default="1.34")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = _measure_all(Path(name), arguments)
    print(f"| {arguments.runs} finished runs".ljust(28), "| median s |    max s |   max MB |")
    print(f"|{'-' * 28}|---------:|---------:|---------:|")
    print("\n".join(figure.line() for figure in figures))
    excess = _excess(figures)
    for line in excess:
        print(line, file=sys.stderr)
    return 1 if excess else 0


if __name__ == "__main__":
    sys.exit(main())
