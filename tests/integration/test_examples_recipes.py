"""Every recipe parses and begins with its command; every small.yaml runs the whole way."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from job.artifacts import Receipt
from job.cli import Parser, add_parsers
from job.config import JobConfig, load_job
from job.run import Where, run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.name != "cluster.yaml")
LANGUAGES = {"English", "German", "French", "Spanish", "Italian", "Portuguese"}


def _rows(name: str) -> list[dict[str, Any]]:
    text = (EXAMPLES / "multilingual-reasoner" / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_parses_and_begins_with_its_command(path: Path) -> None:
    """The first lines are commands that this command line takes, naming this very file."""
    load_job(path)
    first = path.read_text(encoding="utf-8").splitlines()
    commands = [found[1] for line in first[:2] if (found := re.match(r"# .*(lora-job .+)", line))]
    assert commands or first[0].startswith("# make demo")
    parser = Parser(prog="lora-job")
    add_parsers(parser.add_subparsers(dest="verb"))
    for command in commands:
        words = shlex.split(re.split(r"\s{2,}", command)[0])
        assert (ROOT / words[2]).resolve() == path
        if words[1] in ("run", "check"):
            parser.parse_args(words[1:])


def test_full_is_the_demo_over_the_whole_epoch() -> None:
    """`make demo FULL=1` differs from `make demo` in how long it trains, and in its name."""
    demo, full = (
        load_job(EXAMPLES / "multilingual-reasoner" / f"{n}.yaml") for n in ("demo", "full")
    )
    same = {"name": "x", "train": full.train, "publish": full.publish}
    assert demo.model_copy(update=same) == full.model_copy(update={"name": "x"})
    assert full.train.model_dump(exclude={"max_steps"}) == demo.train.model_dump(
        exclude={"max_steps"}
    )


@pytest.mark.parametrize(
    "name", ["multilingual-reasoner", "multilingual-reasoner-mlflow", "chat-model"]
)
def test_small_takes_the_same_way_as_the_full_size(name: str) -> None:
    """A small.yaml sets what its job.yaml sets: sizes differ, and where things lie."""
    job, small = (
        yaml.safe_load((EXAMPLES / name / f"{n}.yaml").read_text()) for n in ("job", "small")
    )
    for section in ("lora", "train", "track"):
        kinds = set(job[section]) ^ set(small[section])
        assert kinds <= {"epochs", "max_steps"}, (section, kinds)
    assert job["model"].keys() == small["model"].keys()
    assert job["model"].get("chat_template") == small["model"].get("chat_template")
    assert job["data"].get("mapping") == small["data"].get("mapping")
    assert job["data"].get("packing") == small["data"].get("packing")


def test_the_shipped_data_has_the_schema_of_multilingual_thinking() -> None:
    """Every row: the six columns, three messages that say what the columns say, short and whole."""
    rows = [*_rows("train.jsonl"), *_rows("held_out.jsonl")]
    for row in rows:
        assert list(row) == [
            "reasoning_language", "developer", "user", "analysis", "final", "messages",
        ]  # fmt: skip
        system = f"reasoning language: {row['reasoning_language']}\n\n{row['developer']}"
        assert row["messages"] == [
            {"content": system, "role": "system", "thinking": None},
            {"content": row["user"], "role": "user", "thinking": None},
            {"content": row["final"], "role": "assistant", "thinking": row["analysis"]},
        ]
        for column in ("user", "analysis", "final"):
            assert row[column] == row[column].strip()
            assert row[column][-1] in ".?"
            assert "{" not in row[column]
            assert "  " not in row[column]
    counts = Counter(row["reasoning_language"] for row in rows)
    assert set(counts) == LANGUAGES
    assert min(counts.values()) >= 60
    assert len(rows) >= 330


def test_no_held_out_question_is_trained_on() -> None:
    """The held-out rows are fixed: seven a language, and asked nowhere in training."""
    train, held_out = _rows("train.jsonl"), _rows("held_out.jsonl")
    assert Counter(row["reasoning_language"] for row in held_out) == dict.fromkeys(LANGUAGES, 7)
    assert not {row["user"] for row in train} & {row["user"] for row in held_out}
    keys = [(row["reasoning_language"], row["user"]) for row in train]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_sums_in_the_data_are_right(language: str) -> None:
    """Whatever a row computes, it computes rightly, and its answer says the result."""
    found = 0
    for row in (r for r in _rows("train.jsonl") if r["reasoning_language"] == language):
        for a, sign, b, result in re.findall(r"(\d+) ([+−×]) (\d+) = (\d+)", row["analysis"]):
            right = {"+": int(a) + int(b), "−": int(a) - int(b), "×": int(a) * int(b)}[sign]
            assert right == int(result)
            assert result in row["final"]
            found += 1
    assert found >= 15


SMALL = {
    "multilingual-reasoner": ("gpt_oss", {"mxfp4": True}),
    "multilingual-reasoner-mlflow": ("gpt_oss", {"mxfp4": True}),
    "chat-model": ("qwen2", {"template": None}),
    "own-data": ("llama", {}),
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_small_recipe_runs_to_a_proven_version(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pull, prepare, train, merge, judge and publish end with 0, and leave what they should."""
    arch, how = SMALL[name]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    job = _small(name, tiny.tiny_model(tmp_path / "model", arch, **how), tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json"), allow_unicode=True))
    ending = run(path, Where(work=tmp_path / "work"))
    assert ending.code == 0
    assert ending.receipt is not None
    _check_version(job, ending.receipt, tmp_path)


def _small(name: str, model: Path, folder: Path) -> JobConfig:
    """Return a small.yaml with its model made, and its folders under ``folder``."""
    raw = yaml.safe_load((EXAMPLES / name / "small.yaml").read_text(encoding="utf-8"))
    raw["model"]["source"] = str(model)
    raw["store"] = str(folder / "store")
    for key in ("source", "held_out"):
        if isinstance(raw["data"].get(key), str):
            raw["data"][key] = str(ROOT / raw["data"][key])
    if "mlflow" in raw.get("track", {}):
        raw["track"]["mlflow"]["tracking_uri"] = f"sqlite:///{folder}/mlflow.db"
    return JobConfig.model_validate(raw)


def _check_version(job: JobConfig, receipt: Receipt, folder: Path) -> None:
    version = folder / "store" / job.name / "versions" / receipt.version
    for part in ("adapter", "merged"):
        assert list((version / part).glob("*.safetensors")), part
    assert receipt.channel == job.publish.channel
    work = folder / "work" / receipt.run
    verdict = json.loads((work / "judge" / "artifact.json").read_text(encoding="utf-8"))
    assert verdict["held_out_loss_after"] < verdict["held_out_loss_before"]
    assert len(verdict["answers"]) == len(job.judge.prompts)
    (report,) = (folder / "store" / "_runs" / receipt.run / "attempts").glob("*/report.html")
    assert "Held-out loss" in report.read_text(encoding="utf-8")
    if job.model.chat_template is not None:
        for part in ("adapter", "merged"):
            template = (version / part / "chat_template.jinja").read_text(encoding="utf-8")
            assert template == job.model.chat_template
    if job.track.tensorboard is not None:
        assert list(work.rglob("events.out.tfevents.*"))
    if job.track.trackio is not None:
        assert list((folder / "trackio").glob("*.db"))
    if job.track.mlflow is not None:
        assert (folder / "mlflow.db").exists()
