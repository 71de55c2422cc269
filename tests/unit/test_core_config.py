"""The job file: what it accepts, and how it says what is wrong."""

import re
from pathlib import Path

import pytest

from job.config import JobConfig, load_job, parse
from job.errors import ExitCode, JobError

MINIMAL = """
name: nightly
device: cpu
store: store
model: {source: base}
data: {source: rows.jsonl}
"""


def refusal(text: str) -> JobError:
    with pytest.raises(JobError) as caught:
        parse(text, JobConfig, where="job.yaml")
    return caught.value


def test_a_minimal_file_is_enough() -> None:
    """Name, device, store, model and data are all that has to be said."""
    job = parse(MINIMAL, JobConfig, where="job.yaml")
    assert (job.lora.rank, job.train.method, job.merge.format) == (16, "sft", "base")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trian: {}", r"trian: is not a known key; did you mean train\?"),
        ("lora: {rnak: 4}", r"lora.rnak: is not a known key; did you mean rank\?"),
        ("lora: {rank: 0}", r"lora.rank: .*greater than or equal to 1, got 0"),
        ("lora: {rank: many}", r"lora.rank: .*integer.*got 'many'"),
        ("lora: {dropout: 0.1, target_parameters: [a]}", r"lora: dropout can't be had with"),
        ("lora: {target_modules: q_proj}", r"^[^\n]*: lora.target_modules: must be"),
        ("data: {source: a, held_out: [1]}", r"^[^\n]*: data.held_out: must be"),
        ("name: Not_DNS", r"name: must be a DNS label"),
        ("device: gpu", r"device: .*'cuda' or 'cpu', got 'gpu'"),
        ("seed: -1", r"seed: .*greater than or equal to 0"),
        ("model: {source: 'hf://only-one-part'}", r"model.source: must be hf://owner/repo"),
        ("model: {source: ''}", r"model.source: must not be empty"),
        ("data: {source: a, held_out: 1.5}", r"data.held_out.*: must be a share"),
        ("data: {source: a, mapping: {prompt: q}}", r"data.mapping: prompt and completion belong"),
        ("data: {source: a, mapping: {}}", r"data.mapping: give exactly one of"),
        (
            "publish: {hub: {adapter: a/b, merged: a/b}}",
            r"publish.hub: adapter and merged need two",
        ),
        ("merge: {format: none}\npublish: {hub: {merged: a/b}}", r"needs a merge"),
        ("judge: {prompts: [{user: ''}]}", r"judge.prompts.0.user: .*at least 1 character"),
        ("store: gs://bucket", r"store must be s3://"),
        ("train: {epochs: 2, epochs: 3}", r"is no YAML: epochs is named twice"),
        (
            "merge: {format: mxfp4-preserve}\nlora: {target_parameters: [x.experts.down_proj]}",
            r"mxfp4-preserve can't hold what lora.target_parameters adds",
        ),
        (
            "track: {mlflow: {tracking_uri: 'https://me:secret@mlflow.example'}}",
            r"track.mlflow.tracking_uri: holds a password; set MLFLOW_TRACKING_USERNAME",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend(change: str, words: str) -> None:
    """Each fault names its field, what is wrong with it, and exits with 78."""
    keys = {line.split(":")[0] for line in change.splitlines()}
    kept = [line for line in MINIMAL.splitlines() if line.split(":")[0] not in keys]
    error = refusal("\n".join([*kept, change]))
    assert error.code is ExitCode.CONFIG
    assert re.search(words, str(error))
    assert "\n" not in str(error)


def test_all_faults_are_told_at_once() -> None:
    """Nobody should mend one fault to be told of the next."""
    error = refusal("name: A\ndevice: cpu\nlora: {rank: 0}\n")
    for field in ("name:", "store:", "model:", "data:", "lora.rank:"):
        assert f"  {field}" in str(error)


@pytest.mark.parametrize("text", ["", "- a\n", "{", "name: [unclosed"])
def test_a_file_without_settings_is_config(text: str) -> None:
    """An empty file, a list or broken YAML is code 78, in words."""
    assert refusal(text).code is ExitCode.CONFIG


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """A job file that is not there is 66."""
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "none.yaml")
    assert caught.value.code is ExitCode.NOT_FOUND


def test_the_run_is_named_after_the_meaning_of_the_file() -> None:
    """Comments and order change nothing; a setting does."""
    one = parse(MINIMAL, JobConfig, where="a")
    two = parse("# words\n" + "\n".join(reversed(MINIMAL.splitlines())), JobConfig, where="b")
    other = parse(MINIMAL + "seed: 1\n", JobConfig, where="c")
    assert one.run_name == two.run_name
    assert one.run_name != other.run_name
    assert re.fullmatch(r"nightly-[0-9a-f]{8}", one.run_name)


def test_no_field_can_hold_a_secret() -> None:
    """Credentials come from the environment: the file has no place for one."""

    def names(kind: type) -> list[str]:
        found = []
        for name, field in kind.model_fields.items():
            found.append(name)
            for option in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if hasattr(option, "model_fields"):
                    found += names(option)
        return found

    assert not [n for n in names(JobConfig) if re.search("secret|password|credential|api_key", n)]
