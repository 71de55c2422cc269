"""Cluster files and kubeconfigs that are wrong: one clear line, the mend, the code, no traceback."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import JobConfig, parse
from job.errors import JobError
from k8s import cli
from k8s.config import CacheSection, ClusterConfig, load_cluster
from k8s.inputs import local_inputs, place, send
from k8s.render import job_file

ROOT = Path(__file__).parents[2]
DIGEST = f"registry.example/lora-job@sha256:{'a' * 64}"
TOKEN = "hf_" + "a" * 34
JOB = """
name: night
device: cuda
store: s3://models/adapters
model: {source: "hf://Qwen/Qwen3-0.6B"}
data: {source: "hf://org/data"}
"""

Types = Callable[..., tuple[int, str, str]]


@pytest.fixture
def types(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Types:
    """Run a verb; return its exit code, stdout and stderr."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


def _files(folder: Path, *, job: str = JOB, **cluster: Any) -> list[str | Path]:
    (folder / "job.yaml").write_text(job)
    raw = {"platform": "gke", "image": DIGEST, **cluster}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(raw))
    return [folder / "job.yaml", "--cluster", folder / "cluster.yaml"]


def _kubeconfig(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": {"token": "x"}}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "me"}}],
        **changes,
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


def test_all_faults_of_a_cluster_file_at_once(types: Types, tmp_path: Path) -> None:
    """An unknown key names the near one; the platform, and too many GPUs, are told with it."""
    words = _files(tmp_path, platform="gcp", memroy="8Gi", gpus=9)
    code, out, err = types("render", *words)
    assert (code, out) == (78, "")
    assert "memroy: is not a known key; did you mean memory?" in err
    assert "gpus" in err
    assert "platform" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": "registry.example/lora-job@sha256:12"}, "image"),
        ({"secrets": {"HF_TOKEN": TOKEN}}, "HF_TOKEN must be SECRET/KEY"),
        ({"env": {"HF_TOKEN": "x"}}, "HF_TOKEN looks like a secret"),
        ({"env": {"URL": "https://me:pass@host"}}, "URL looks like a secret"),
        ({"env": {"LORA_JOB_OWNER": "x"}}, "set by the manifests"),
        ({"secrets": {"A": "s/k"}, "env": {"A": "x"}}, "A stands in secrets and in env"),
        ({"cache": {"claim": "a", "host_path": "/b"}}, "exactly one of claim and host_path"),
        ({"memory": "64GB"}, "memory: '64GB' is not valid; write it as Kubernetes does, such as"),
        ({"namespace": "Not_A_Name"}, "namespace: 'Not_A_Name' is not valid; use a-z"),
        ({"node_selector": {"a b": "c"}}, "node_selector: 'a b' is no label"),
        ({"node_selector": {"a.b/c": "d e"}}, "node_selector: label a.b/c can't be 'd e'"),
    ],
)
def test_wrong_settings_are_refused(
    types: Types, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """78, naming the field; a secret that stands in the file is not repeated."""
    code, out, err = types("render", *_files(tmp_path, **changes))
    assert (code, out) == (78, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert "pattern" not in err
    assert TOKEN not in err
    assert "pass@" not in err


def test_a_cluster_file_that_is_not_there(types: Types, tmp_path: Path) -> None:
    """66."""
    words = _files(tmp_path)
    (tmp_path / "cluster.yaml").unlink()
    assert types("render", *words)[0] == 66


def test_image_without_digest_is_refused_where_one_is_required(tmp_path: Path) -> None:
    """require_digest makes the warning an error."""
    _files(tmp_path, image="registry.example/lora-job:latest")
    assert not load_cluster(tmp_path / "cluster.yaml").has_digest
    _files(tmp_path, image="registry.example/lora-job:latest", require_digest=True)
    with pytest.raises(JobError, match="make image push") as caught:
        load_cluster(tmp_path / "cluster.yaml")
    assert caught.value.code == 78


@pytest.mark.parametrize("name", ["Night", "a" * 41, "night_1", "-night"])
def test_names_too_long_or_no_dns_label(types: Types, tmp_path: Path, name: str) -> None:
    """78 with the rule."""
    code, _, err = types("render", *_files(tmp_path, job=JOB.replace("night", name)))
    assert code == 78
    assert "DNS label" in err


@pytest.mark.parametrize(
    "secret", [TOKEN, "AKIA" + "A" * 16, "s3://key:secret@bucket/x", "-----BEGIN PRIVATE KEY-----"]
)
def test_a_credential_in_the_job_file_is_refused(secret: str) -> None:
    """It would lie readable in a ConfigMap; it is not repeated."""
    job = parse(JOB, JobConfig, where="job")
    data = job.data.model_copy(update={"source": f"./{secret}"})
    with pytest.raises(JobError) as caught:
        job_file(job.model_copy(update={"data": data}))
    assert caught.value.code == 78
    assert secret not in str(caught.value)


def test_no_kubeconfig(types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """66 with the file that was looked for."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    code, _, err = types("status", "run")
    assert code == 66
    assert "there is no kubeconfig" in err
    assert str(tmp_path / "absent") in err


def test_no_such_context(types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """66 with the contexts that are there."""
    _kubeconfig(tmp_path, monkeypatch)
    code, _, err = types("list", "--context", "prod")
    assert code == 66
    assert "no context prod" in err
    assert "use one of: here" in err


@pytest.mark.parametrize("text", ["a: [", "hello", "contexts: [1]"])
def test_a_file_that_is_no_kubeconfig(
    types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """78, in one line."""
    path = _kubeconfig(tmp_path, monkeypatch)
    path.write_text(text)
    code, _, err = types("list")
    assert (code, "is no kubeconfig" in err) == (78, True)


def test_a_credential_plugin_that_is_not_installed(
    types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """77: gke-gcloud-auth-plugin and its like are named."""
    run = {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-auth-plugin"}
    _kubeconfig(tmp_path, monkeypatch, users=[{"name": "me", "user": {"exec": run}}])
    code, _, err = types("list")
    assert code == 77
    assert "no-such-auth-plugin" in err


def test_server_unreachable(types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """74 with the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
    _kubeconfig(tmp_path, monkeypatch, clusters=[{"name": "c", "cluster": {"server": server}}])
    code, _, err = types("list")
    assert code == 74
    assert f"{server}: can't be reached" in err


@pytest.mark.parametrize("verb", ["status", "why", "cancel"])
def test_a_name_that_no_run_has(
    types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """66, before a server is asked for something that is another path."""
    _kubeconfig(tmp_path, monkeypatch)
    code, _, err = types(verb, "Bad/Name")
    assert (code, len(err.splitlines())) == (66, 2 if verb == "cancel" else 1), err
    assert "Bad/Name: there is no such run" in err


def test_submit_creates_nothing_when_a_file_is_wrong(
    types: Types, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are checked before anything is asked of a server."""
    _kubeconfig(tmp_path, monkeypatch)
    assert types("submit", *_files(tmp_path, gpus=99))[0] == 78


def _remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder be the store, whatever the job file names."""
    from job.stop import Stop
    from job.store.folder import FolderStore

    (tmp_path / "remote").mkdir()
    remote = FolderStore(tmp_path / "remote", stop=Stop())
    monkeypatch.setattr("job.store.open_store", lambda *_, **__: remote)


def test_local_data_goes_to_the_store_under_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file and a folder become `_inputs/<sha256>`; what is there is not sent again."""
    from job.stop import Stop

    _remote(tmp_path, monkeypatch)
    (tmp_path / "held").mkdir()
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "held/a.jsonl").write_text("{}\n")
    source = f'{{source: "{tmp_path}/train.jsonl", held_out: "{tmp_path}/held"}}'
    job = parse(JOB.replace('{source: "hf://org/data"}', source), JobConfig, where="job")
    assert set(local_inputs(job)) == {"data.source", "data.held_out"}
    said: list[str] = []
    placed, inputs = place(job, stop=Stop())
    assert placed.data.source.startswith("s3://models/adapters/_inputs/")
    assert placed.data.source.endswith("/train.jsonl")
    assert not local_inputs(placed)
    assert not list((tmp_path / "remote").rglob("train.jsonl"))
    for _ in range(2):
        send(placed, inputs, stop=Stop(), say=said.append)
    assert len(said) == 2
    for one in inputs:
        for name, file in one.files.items():
            assert (tmp_path / "remote" / one.folder / name).read_bytes() == file.read_bytes()
    assert place(job, stop=Stop())[0].run_name == placed.run_name != job.run_name
    assert "_inputs" in job_file(placed)


def test_a_model_in_a_package_goes_to_the_store_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has none of this machine's packages."""
    from job.stop import Stop

    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier/small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    text = JOB.replace("hf://Qwen/Qwen3-0.6B", "package:carrier/small.gguf")
    placed, [one] = place(parse(text, JobConfig, where="job"), stop=Stop())
    assert placed.model.source == f"s3://models/adapters/{one.folder}/small.gguf"
    assert one.files["small.gguf"].read_bytes() == b"GGUF"
    gone = parse(text.replace("carrier", "nobody_has_it"), JobConfig, where="job")
    with pytest.raises(JobError, match="no package nobody_has_it"):
        place(gone, stop=Stop())


def test_a_file_that_changes_before_it_is_sent_is_65(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bytes lie under the hash of others."""
    from job.stop import Stop

    _remote(tmp_path, monkeypatch)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    job = parse(JOB.replace("hf://org/data", str(rows)), JobConfig, where="job")
    placed, inputs = place(job, stop=Stop())
    rows.write_text("[]\n")
    with pytest.raises(JobError, match="has changed since") as caught:
        send(placed, inputs, stop=Stop(), say=lambda _: None)
    assert caught.value.code == 65
    assert not list((tmp_path / "remote").rglob("rows.jsonl"))


def test_local_data_beside_a_store_on_a_claim_is_78(tmp_path: Path) -> None:
    """Only pods see the claim; nothing of this machine can be put there."""
    from job.stop import Stop

    text = JOB.replace("hf://org/data", str(tmp_path)).replace("s3://models/adapters", "/cache/out")
    with pytest.raises(JobError, match="no pod sees this machine") as caught:
        place(parse(text, JobConfig, where="job"), stop=Stop())
    assert caught.value.code == 78
    on_claim = text.replace(str(tmp_path), "/cache/rows.jsonl")
    assert place(parse(on_claim, JobConfig, where="job"), stop=Stop())[1] == []


def test_local_data_that_is_not_there_is_66(tmp_path: Path) -> None:
    """Named with its field."""
    from job.stop import Stop

    job = parse(JOB.replace("hf://org/data", f"{tmp_path}/no.jsonl"), JobConfig, where="job")
    with pytest.raises(JobError, match=r"data\.source") as caught:
        place(job, stop=Stop())
    assert caught.value.code == 66


def test_the_cluster_file_keeps_its_promises() -> None:
    """Frozen, and safe by itself: on-demand, one GPU, the namespace of the set-up manifests."""
    cluster = ClusterConfig.model_validate({"platform": "aks", "image": DIGEST})
    assert (cluster.capacity, cluster.gpus, cluster.namespace) == ("on-demand", 1, "lora-job")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/cluster.yaml")), ids=str)
def test_every_recipe_renders_with_the_cluster_file_beside_it(types: Types, path: Path) -> None:
    """`lora-job submit examples/…/job.yaml` needs no flag."""
    code, out, err = types("render", path.parent / "job.yaml")
    assert code == 0, err
    assert [item["kind"] for item in yaml.safe_load_all(out)] == ["ConfigMap", "Job"]


def test_the_guide_names_every_setting_and_every_cause() -> None:
    """docs/cluster.md has each key of a cluster file, and each answer of `why` with its mend."""
    from k8s import pending, why

    guide = (ROOT / "docs/cluster.md").read_text()
    keys = [*ClusterConfig.model_fields, *CacheSection.model_fields]
    assert [key for key in keys if f"`{key}`" not in guide and f"`cache.{key}`" not in guide] == []
    sources = [Path(module.__file__).read_text() for module in (pending, why)]
    causes = {cause for text in sources for cause in re.findall(r'Answer\(\s*"([a-z-]+)"', text)}
    assert len(causes) > 25
    assert [cause for cause in sorted(causes) if f"`{cause}`" not in guide] == []
