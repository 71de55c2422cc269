"""A real node on this machine: kubelet, containerd, runc and a bridge, below a real control plane.

Needs root and what ``tests/node/tools.sh`` installs. The image is built from docker/Dockerfile,
pushed to a registry of our own, and pulled by digest. Pods reach this machine at the bridge's
address only: there are the API server, the registry and, behind a proxy, an S3 server.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from controlplane import ROOT, ControlPlane
from processes import Server, free_ports, listens

FOLDER = ROOT / ".tools/node"
BRIDGE, SUBNET, ADDRESS = "lorajob0", "10.223.87.0/24", "10.223.87.1"
# Always the same one: the address is ours alone, and image names hold it.
REGISTRY_PORT = 5087
REGISTRY = f"{ADDRESS}:{REGISTRY_PORT}"
PAUSE = f"{REGISTRY}/pause:1"
NODE = "node-1"
RUN = Path("/run/lora-job-node")  # sockets: their paths must be short
NEEDED_GB = 15
GPU_LABEL = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
# What the image is made from: as long as none of it changes, it need not be built again.
IMAGE_INPUTS = ("docker/Dockerfile", "requirements/image-cpu.txt", "tests/node", "job")


def why_not() -> str | None:
    """Return why no node can run here, with the mend, or None."""
    if os.geteuid() != 0:
        return "a real node needs root (kubelet, containerd); run as root"
    missing = [name for name in ("containerd", "runc", "buildah", "ip") if not shutil.which(name)]
    kubelet = ROOT / ".tools/kubernetes/1.34/kubelet"
    if missing or not kubelet.exists():
        return f"missing: {', '.join(missing) or 'kubelet'}; run tests/node/tools.sh"
    FOLDER.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(FOLDER).free / 1e9
    if free < NEEDED_GB:
        return f"{free:.0f} GB are free under {FOLDER}, {NEEDED_GB} GB are needed; make room"
    return None


class NodeMachine:
    """The node and what it needs. Start it with :func:`node_machine`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        RUN.mkdir(parents=True, exist_ok=True)
        self._make_bridge()
        self.plane = ControlPlane(folder / "plane", "1.34", address=ADDRESS)
        [self._kubelet_port] = free_ports(1, ADDRESS)
        self._registry = self._registry_server()
        self._containerd = self._containerd_server()
        self._kubelet = self._kubelet_server()
        self.image = ""

    def start(self) -> None:
        """Start everything; returns when the node is ready and has the image."""
        self._containerd.start().ready(lambda: self._ctr("version").returncode == 0)
        self._remove_containers()
        self._registry.start().ready(lambda: listens(REGISTRY_PORT, ADDRESS))
        self.image = self._image()
        self.plane.start()
        self._kubelet.start()
        ready = self.plane.wait_for(f"/api/v1/nodes/{NODE}", is_ready, within_s=120)
        assert ready, self._kubelet.tail()
        self.set_gpus(1)

    def stop(self) -> None:
        """Stop pods, servers and bridge; every mount below our folder goes too."""
        self._kubelet.stop()
        if self._containerd.running:
            self._remove_containers()
        for server in (self._containerd, self._registry):
            server.stop()
        self.plane.stop()
        _unmount_below(self.folder, RUN)
        _remove_cgroups()
        _run("ip", "link", "delete", BRIDGE)

    def set_gpus(self, count: int) -> None:
        """Let the node say that it has so many GPUs, of the kind that the overlays ask for."""
        path = f"/api/v1/nodes/{NODE}"
        self.plane.patch(path, {"metadata": {"labels": GPU_LABEL}})
        room = {"nvidia.com/gpu": str(count)}
        status = {"status": {"capacity": room, "allocatable": room}}
        self.plane.patch(f"{path}/status", status, kind="strategic")

        def shown(node: dict[str, Any]) -> bool:
            return node["status"]["allocatable"].get("nvidia.com/gpu") == str(count)

        self.plane.wait_for(path, shown)

    @contextlib.contextmanager
    def cordoned(self) -> Iterator[None]:
        """Let the node take no new pods, as `kubectl cordon` does, for a while."""
        path = f"/api/v1/nodes/{NODE}"
        self.plane.patch(path, {"spec": {"unschedulable": True}})
        try:
            yield
        finally:
            self.plane.patch(path, {"spec": {"unschedulable": None}})

    @contextlib.contextmanager
    def dead(self, namespace: str, pod: str) -> Iterator[None]:
        """Let the node fall silent, and the pod's process with it; at the end it is back, empty."""
        self._kubelet.stop(number=signal.SIGKILL)
        self.kill(namespace, pod)
        try:
            yield
        finally:
            path = f"/api/v1/nodes/{NODE}"
            self._kubelet.start()
            self.plane.wait_for(path, is_ready, within_s=120)
            self.plane.patch(path, {"spec": {"taints": None}})
            self.set_gpus(1)

    def kill(self, namespace: str, pod: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the first process of a pod's container, from outside."""
        os.kill(self.main_pid(namespace, pod), number)

    def main_pid(self, namespace: str, pod: str) -> int:
        """Return the id, on this machine, of the first process of a pod's container."""
        status = self.plane.get(f"/api/v1/namespaces/{namespace}/pods/{pod}")["status"]
        container = status["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        listed = self._ctr("tasks", "list").stdout.splitlines()
        pids = {line.split()[0]: int(line.split()[1]) for line in listed[1:]}
        return pids[container]

    # The image

    def _image(self) -> str:
        """Return the image by digest; build it if what it is made from has changed."""
        digest = _digest_of(IMAGE_INPUTS)
        said = self.folder / "image.json"
        known = json.loads(said.read_text()) if said.exists() else {}
        if known.get("inputs") != digest or known["image"] not in self._images():
            known = {"inputs": digest, "image": self._build_image()}
            said.write_text(json.dumps(known))
        return str(known["image"])

    def _build_image(self) -> str:
        log, build = self.folder / "image.log", self.folder / "build"
        command = [str(ROOT / "tests/node/image.sh"), str(build), f"{REGISTRY}/lora-job:test"]
        with log.open("wb") as errors:
            built = subprocess.run(
                command, check=False, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        if built.returncode:
            raise RuntimeError(f"the image does not build:\n{log.read_text()[-4000:]}")
        image = built.stdout.split()[-1]
        keep = bool(os.environ.get("KEEP_NODE_BUILD"))
        if not keep:
            shutil.rmtree(build)
        before = self._images()
        for name in (image, PAUSE):
            self._ctr("images", "pull", "--plain-http", name, check=True)
        for name in before - {image, PAUSE}:
            self._ctr("images", "remove", "--sync", name)
        if not keep:
            shutil.rmtree(self.folder / "registry")
        return image

    def _images(self) -> set[str]:
        return set(self._ctr("images", "list", "--quiet").stdout.split())

    # Processes

    def _make_bridge(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "address", "add", f"{ADDRESS}/{SUBNET.split('/')[1]}", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")

    def _ctr(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", str(RUN / "containerd.sock"), "--namespace", "k8s.io"]
        done = subprocess.run([*command, *words], check=False, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"ctr {' '.join(words)}: {done.stderr[-2000:]}")
        return done

    def _remove_containers(self) -> None:
        for container in self._ctr("containers", "list", "--quiet").stdout.split():
            self._ctr("tasks", "kill", "--signal", "SIGKILL", "--all", container)
            self._ctr("tasks", "delete", "--force", container)
            self._ctr("containers", "delete", container)

    def _registry_server(self) -> Server:
        settings = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(self.folder / "registry")}},
            "http": {"addr": REGISTRY},
        }
        path = self.folder / "registry.yaml"
        path.write_text(yaml.safe_dump(settings))
        program = ROOT / ".tools/bin/registry"
        return Server(
            [program, "serve", path], self.folder / "registry.log", OTEL_TRACES_EXPORTER="none"
        )

    def _containerd_server(self) -> Server:
        networks = self.folder / "networks"
        networks.mkdir(exist_ok=True)
        leases = {"type": "host-local", "dataDir": str(RUN / "leases")}
        ranges = [[{"subnet": SUBNET, "rangeStart": ADDRESS + "0"}]]
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": False,
            "ipam": leases | {"ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]},
        }
        conflist = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}
        (networks / "pods.conflist").write_text(json.dumps(conflist))
        registries = self.folder / "registries" / REGISTRY
        registries.mkdir(parents=True, exist_ok=True)
        (registries / "hosts.toml").write_text(f'server = "http://{REGISTRY}"\n')
        path = self.folder / "containerd.toml"
        path.write_text(
            f'version = 2\nroot = "{self.folder / "containerd"}"\nstate = "{RUN / "state"}"\n'
            f'[grpc]\naddress = "{RUN / "containerd.sock"}"\n'
            '[plugins."io.containerd.grpc.v1.cri"]\n'
            f'sandbox_image = "{PAUSE}"\n'
            # Without CAP_SYS_RESOURCE runc can't lower a score below its own.
            "restrict_oom_score_adj = true\n"
            '[plugins."io.containerd.grpc.v1.cri".cni]\n'
            f'bin_dir = "/usr/lib/cni"\nconf_dir = "{networks}"\n'
            '[plugins."io.containerd.grpc.v1.cri".registry]\n'
            f'config_path = "{registries.parent}"\n'
        )
        command = ["containerd", "--config", path, "--log-level", "warn"]
        return Server(command, self.folder / "containerd.log")

    def _kubelet_server(self) -> Server:
        authority = self.plane.authority
        pair = authority.client(f"system:node:{NODE}", "system:nodes")
        serving = authority.server(NODE, [ADDRESS])
        root = self.folder / "kubelet"
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": ADDRESS,
            "port": self._kubelet_port,
            "healthzPort": 0,
            "tlsCertFile": str(serving.certificate),
            "tlsPrivateKeyFile": str(serving.key),
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{RUN / 'containerd.sock'}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "clusterDNS": [ADDRESS],
            "podLogsDir": str(self.folder / "logs"),
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "nodeStatusUpdateFrequency": "5s",
            "nodeStatusReportFrequency": "5s",
            "serializeImagePulls": False,
        }
        path = self.folder / "kubelet.yaml"
        path.write_text(yaml.safe_dump(settings))
        kubeconfig = self.plane.kubeconfig(NODE, pair=(pair.certificate, pair.key))
        command = [
            ROOT / ".tools/kubernetes/1.34/kubelet",
            f"--config={path}",
            f"--kubeconfig={kubeconfig}",
            f"--root-dir={root}",
            f"--cert-dir={root / 'pki'}",
            f"--hostname-override={NODE}",
            f"--node-ip={ADDRESS}",
        ]
        return Server(command, self.folder / "kubelet.log")


@contextlib.contextmanager
def node_machine(folder: Path = FOLDER) -> Iterator[NodeMachine]:
    """Run a node, the only one of this machine; it is gone afterwards, also after a failure.

    What stays in ``folder`` is the image as containerd has it, 4 GB, so that the next start is quick
    unless the code has changed; with KEEP_NODE_BUILD=1 also the builder's layers and the registry,
    another 4 GB: then a change of code costs seconds, not minutes.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in ("plane", "kubelet", "logs"):
            _unmount_below(folder / leftover)
            shutil.rmtree(folder / leftover, ignore_errors=True)
        machine = NodeMachine(folder)
        try:
            machine.start()
            yield machine
        finally:
            machine.stop()


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def is_ready(item: dict[str, Any]) -> bool:
    """Return whether a node, or a pod, is ready."""
    conditions = item.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _digest_of(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            in_image = file.suffix in {".py", ".sh", ".txt", ".html"} or file.name == "Dockerfile"
            if file.is_file() and in_image and not file.name.startswith(("test_", "conftest")):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _mounts() -> list[str]:
    return [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]


def _unmount_below(*folders: Path) -> None:
    for mount in sorted(_mounts(), key=len, reverse=True):
        if any(mount.startswith(f"{folder}/") for folder in folders):
            _run("umount", "--lazy", mount)


def _remove_cgroups() -> None:
    for top in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for group, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(group).rmdir()
