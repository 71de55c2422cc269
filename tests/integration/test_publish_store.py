"""Publish into a store, and to the Hub, from small artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hubserver
import pytest
import sources
import yaml
from hubserver import Hub

from job.artifacts import Adapter, Answer, Dataset, Merged, Source, Verdict
from job.config import JobConfig
from job.context import Context
from job.errors import ExitCode, JobError
from job.files import sha256_file
from job.progress import Progress
from job.publish import announce, publish
from job.pull.select import front_matter
from job.stop import Stop
from job.store import open_store
from job.store.runs import take
from job.store.versions import write_version

COMMIT = "a" * 40
CONFIG = {
    "base_model_name_or_path": "/local/path/of/the/pod",
    "revision": None,
    "auto_mapping": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": ["7.b", "7.a"],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubserver.hub_server() as server:
        hubserver.hub_environment(server, monkeypatch)
        yield server


def context_of(folder: Path, run_id: str = "tiny-1", **changes: Any) -> Context:
    settings = {
        "name": "tiny",
        "device": "cpu",
        "store": str(folder / "store"),
        "model": {"source": str(folder / "base")},
        "data": {"source": str(folder / "rows.jsonl")},
        "publish": {"channel": "nightly"},
    }
    job = JobConfig.model_validate({**settings, **changes})
    stop, progress = Stop(), Progress()
    store = open_store(job.store, stop=stop)
    attempt = take(store, run_id, owner="me", job_text=b"", stop=stop, progress=progress)
    return Context(
        job=job, work=folder / run_id, cache=None, attempt=attempt, stop=stop, progress=progress
    )


def artifacts(folder: Path, *, on_hub: bool = True) -> dict[str, Any]:
    """Return what the stages before publish would hand over."""
    trained = sources.write_files(
        folder / "train",
        {
            "adapter_config.json": json.dumps(CONFIG).encode(),
            "adapter_model.safetensors": sources.safetensors(9000),
            "history.jsonl": b"{}\n",
        },
    )
    prepared = sources.write_files(folder / "prepare", {"tokenizer/tokenizer.json": b"{}"})
    merged = sources.write_files(
        folder / "merge",
        {**sources.model_files(), ".fingerprint": b"x", "artifact.json": b"{}"},
    )
    base = "hf://org/base@" + COMMIT if on_hub else "file:base"
    data = "hf://org/rows@" + COMMIT if on_hub else "file:rows.jsonl"
    revision = COMMIT if on_hub else None
    return {
        "model": Source(
            folder=folder, uri=base, revision=revision, files={}, license="Apache-2.0"
        ),
        "data": Source(folder=folder, uri=data, revision=revision, files={}),
        "dataset": Dataset(
            folder=prepared, digest="d", num_rows=1, num_examples=2, num_tokens=30,
            num_supervised_tokens=10, num_held_out=1, stop_token_ids=[1], pad_token_id=0,
            thinking="tags",
        ),
        "adapter": Adapter(
            folder=trained, sha256=sha256_file(trained / "adapter_model.safetensors"), steps=3,
            planned_steps=4, num_tokens=30, final_loss=1.25, tokens_per_s=10, duration_s=3,
        ),
        "merged": Merged(
            folder=merged, format="base", num_parameters=9, size_bytes=9,
            report={"delta_kept": 0.998, "logits": {"max_difference": 1e-6}},
        ),
        "verdict": Verdict(
            folder=folder, held_out_loss_before=2.0, held_out_loss_after=1.5,
            num_held_out_tokens=100,
            answers=[Answer(user="Why?", before="```x", after="| --- |\n# Not a title")],
        ),
    }  # fmt: skip


def version_of(folder: Path) -> Path:
    (found,) = (folder / "store" / "tiny" / "versions").iterdir()
    return found


def test_a_version_holds_adapter_card_merged_model_and_lineage(tmp_path: Path) -> None:
    """What is published is whole, and the receipt says where and what."""
    context = context_of(tmp_path)
    receipt = publish(context, **artifacts(tmp_path))
    version = version_of(tmp_path)
    names = {p.relative_to(version).as_posix() for p in version.rglob("*") if p.is_file()}
    assert names == {
        "manifest.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "adapter/README.md",
        *(f"merged/{name}" for name in sources.model_files()),
    }
    manifest = json.loads((version / "manifest.json").read_bytes())
    assert manifest["lineage"]["base"]["uri"] == f"hf://org/base@{COMMIT}"
    assert manifest["lineage"]["held_out_loss"] == [2.0, 1.5]
    assert receipt.uri.endswith(version.name)
    assert (receipt.channel, receipt.channel_state) == ("nightly", "moved")
    assert context.attempt.receipt() == receipt


def test_the_adapter_names_its_base_and_commit(tmp_path: Path) -> None:
    """Never a folder of the pod; sets are sorted, and the order of parameters is kept."""
    publish(context_of(tmp_path), **artifacts(tmp_path))
    config = json.loads((version_of(tmp_path) / "adapter/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == COMMIT
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["target_parameters"] == ["7.b", "7.a"]


def test_nothing_published_names_a_path_of_this_machine(tmp_path: Path) -> None:
    """Local sources appear by name only, in every file of the version."""
    publish(context_of(tmp_path), **artifacts(tmp_path, on_hub=False))
    for path in version_of(tmp_path).rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
            assert b"/local/path" not in path.read_bytes(), path


def test_the_card_is_valid_and_tells_the_story(tmp_path: Path) -> None:
    """YAML with base, data, licence and library; losses, lineage and the fetch line in the text."""
    receipt = publish(context_of(tmp_path), **artifacts(tmp_path))
    card = (version_of(tmp_path) / "adapter/README.md").read_text()
    meta = front_matter(card)
    assert meta["base_model"] == "org/base"
    assert meta["base_model_relation"] == "adapter"
    assert meta["datasets"] == ["org/rows"]
    assert meta["license"] == "apache-2.0"
    assert meta["library_name"] == "peft"
    for words in ("2.0000", "1.5000", "1.2500", COMMIT, receipt.version, "lora-job fetch"):
        assert words in card
    merged = front_matter((version_of(tmp_path) / "merged/README.md").read_text())
    assert merged["library_name"] == "transformers"


def test_a_card_of_local_sources_claims_nothing_on_the_hub(tmp_path: Path) -> None:
    """A base that is not on the Hub is no base_model of the Hub's."""
    publish(context_of(tmp_path), **artifacts(tmp_path, on_hub=False))
    card = (version_of(tmp_path) / "adapter/README.md").read_text()
    assert "base_model" not in front_matter(card)
    assert "datasets" not in front_matter(card)
    assert "`file:base`" in card


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (None, {}),
        ("MIT", {"license": "mit"}),
        ("My own: words\nand more", {"license": "other", "license_name": "my-own-words-and-more"}),
    ],
)
def test_a_licence_is_one_that_the_hub_takes(
    tmp_path: Path, licence: str | None, expected: dict[str, str]
) -> None:
    """Known names as they are, anything else as other with its name."""
    given = artifacts(tmp_path)
    given["model"] = given["model"].model_copy(update={"license": licence, "uri": "file:base"})
    publish(context_of(tmp_path), **given)
    meta = front_matter((version_of(tmp_path) / "adapter/README.md").read_text())
    assert {k: v for k, v in meta.items() if k.startswith("license")} == expected


def test_the_merged_model_stays_home_if_asked(tmp_path: Path) -> None:
    """publish.merged: false keeps it out of the store."""
    publish(context_of(tmp_path, publish={"merged": False}), **artifacts(tmp_path))
    assert not (version_of(tmp_path) / "merged").exists()


def test_an_attempt_that_died_before_the_channel_is_made_good(tmp_path: Path) -> None:
    """Published, channel unmoved: the next attempt moves it and says so."""
    context = context_of(tmp_path)
    receipt = publish(context, **artifacts(tmp_path))
    (tmp_path / "store/tiny/channels/nightly.json").unlink()
    died = receipt.model_copy(update={"channel_state": None})
    context.attempt.published(died)
    again = context_of(tmp_path)
    found = again.attempt.receipt()
    assert found == died
    assert announce(again, found) == receipt
    assert (tmp_path / "store/tiny/channels/nightly.json").exists()
    assert announce(again, receipt) == receipt


def test_the_hub_gets_the_merged_model_first(tmp_path: Path, hub: Hub) -> None:
    """Two repositories, the adapter's last, and their commits in the receipt."""
    repos = {"adapter": "org/tiny", "merged": "org/tiny-merged"}
    receipt = publish(context_of(tmp_path, publish={"hub": repos}), **artifacts(tmp_path))
    commits = [line for line in hub.requests if "/commit/" in line]
    assert ["tiny-merged" in line for line in commits] == [True, False]
    assert set(receipt.hub) == set(repos.values())
    assert "adapter_model.safetensors" in hub.files("org/tiny")
    assert "config.json" not in hub.files("org/tiny")
    card = hub.files("org/tiny")["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "org/tiny")' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"


def test_a_fenced_attempt_does_not_reach_the_hub(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer attempt took the run while the version was written: 76, and no commit."""
    context = context_of(tmp_path, publish={"hub": {"adapter": "org/tiny"}})

    def taken_meanwhile(*args: Any, **more: Any) -> Any:
        manifest = write_version(*args, **more)
        context_of(tmp_path)
        return manifest

    monkeypatch.setattr("job.publish.write_version", taken_meanwhile)
    with pytest.raises(JobError) as caught:
        publish(context, **artifacts(tmp_path))
    assert caught.value.code is ExitCode.FENCED
    assert hub.requests == []
