"""The command line: fast, honest about what is missing, and the same for everybody."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.ending import EXTRAS, MESSAGE_BYTES, fit
from job.errors import TABLE, ExitCode
from job.generate import read_prompts
from k8s import cli

ROOT = Path(__file__).parents[2]


def python(*words: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *(["-c", code] if code else []), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_imports_nothing_heavy() -> None:
    """``--help`` answers without a training library, a client, or even pydantic."""
    code = (
        "import sys, contextlib\n"
        "from k8s import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'boto3', 'kubernetes', 'pydantic', 'pyarrow', 'rich'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = python(code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "submit" in done.stdout
    assert "generate" in done.stdout


@pytest.mark.parametrize("words", [["nonsense"], ["run"], ["run", "a.yaml", "--rank", "8"], []])
def test_a_wrong_command_line_is_64_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No usage dump, no traceback; and no flag for a hyperparameter."""
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    said = capsys.readouterr().err
    assert left.value.code == int(ExitCode.USAGE)
    assert len(said.splitlines()) == 1
    assert "--help" in said


def test_a_missing_job_file_is_66_in_one_line() -> None:
    """A user's mistake is a line, not a traceback."""
    done = python("-m", "job", "check", "nowhere.yaml")
    assert done.returncode == int(ExitCode.NOT_FOUND)
    assert done.stderr == "lora-job: nowhere.yaml: No such file or directory; name a job file\n"


def test_a_verb_without_its_extra_prints_the_install_line() -> None:
    """What is not installed is named with the extra that brings it."""
    code = (
        "import sys; sys.modules['boto3'] = None\n"
        "from k8s import cli\n"
        "sys.exit(cli.main(['versions', 's3://bucket/name']))"
    )
    done = python(code=code)
    assert done.returncode == int(ExitCode.USAGE)
    assert "pip install 'lora-job[store]'" in done.stderr


def test_a_run_without_its_extra_prints_the_install_line(tmp_path: Path) -> None:
    """Also deep inside a run it is a line and 64, not a bug's traceback."""
    sources = {"model": {"source": "hf://org/model"}, "data": {"source": "d"}}
    job = {"name": "n", "device": "cpu", "store": str(tmp_path / "store"), **sources}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    words = ["run", str(tmp_path / "job.yaml"), "--work", str(tmp_path / "work")]
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        f"from k8s import cli; sys.exit(cli.main({words}))"
    )
    done = python(code=code)
    assert done.returncode == int(ExitCode.USAGE), done.stderr
    assert "pip install 'lora-job[store]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_extra_that_is_named_exists() -> None:
    """The install line must work."""
    text = (ROOT / "pyproject.toml").read_text()
    for extra in set(EXTRAS.values()):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE)


def test_readme_prints_the_exit_codes_as_they_are() -> None:
    """The table in the README is the table in the code."""
    readme = (ROOT / "README.md").read_text()
    for code, row in TABLE.items():
        assert f"| {int(code)} | {row.name} | {row.means} |" in readme


def test_the_termination_message_fits_whatever_it_says() -> None:
    """At most 2,048 bytes of UTF-8, and still JSON, for any error text."""
    record = {
        "code": 65,
        "where": "data.jsonl",
        "what": "ß漢" * 5000,
        "do": "\n" * 5000,
        "receipt": {"uri": "x" * 300},
    }
    body = fit(record)
    assert len(body) <= MESSAGE_BYTES
    assert json.loads(body)["code"] == 65


def test_the_job_half_never_loads_the_cluster_half() -> None:
    """``job`` runs in a container that has no cluster client."""
    code = "import sys, job.cli, job.config, job.run; sys.exit('k8s' in sys.modules)"
    assert python(code=code).returncode == 0


def test_the_torch_free_modules_load_no_torch() -> None:
    """What the submitter takes from ``job`` must not cost it a training stack."""
    names = "config errors logs artifacts store store.s3 store.folder store.runs store.versions"
    imports = ", ".join(f"job.{name}" for name in names.split())
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert python(code=code).returncode == 0


def test_a_file_where_a_folder_should_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path through a file is the user's to mend, whichever verb meets it."""
    (tmp_path / "file").touch()
    assert cli.main(["storage", "probe", str(tmp_path / "file")]) == int(ExitCode.NOT_FOUND)
    assert "has a file where a folder should be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "m", "q", "--max-new-tokens", "0"],
        ["generate", "m", "q", "--temperature", "-1"],
        ["generate", "m", "q", "--temperature", "nan"],
        ["versions", "store/name", "--prune", "0"],
    ],
)
def test_a_number_out_of_bounds_is_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A number that makes no sense is refused before anything is loaded or deleted."""
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == int(ExitCode.USAGE)
    assert "must be at least" in capsys.readouterr().err


def test_training_rows_can_be_asked(tmp_path: Path) -> None:
    """A row with messages asks what its last user turn asks."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert [prompt.user for prompt in read_prompts(None, path)] == ["Why?"]


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "adapter", "hf://org/model", "out"],
        ["merge", "s3://bucket/adapter", "base", "out"],
        ["generate", "base", "a question", "--adapter", "hf://org/adapter"],
    ],
)
def test_an_address_where_a_folder_is_wanted_is_refused_as_it_was_typed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a path, its two slashes would become one, and the complaint would name what nobody typed."""
    with pytest.raises(SystemExit) as refused:
        cli.main(words)
    assert refused.value.code == int(ExitCode.USAGE)
    said = capsys.readouterr().err
    address = next(word for word in words if "://" in word)
    assert f"{address} is no folder" in said
    assert said.count("\n") == 1


def test_a_bugs_traceback_is_in_the_stored_log(tmp_path: Path) -> None:
    """On a spot node the pod's own stderr is gone; it is told once."""
    from job.ending import Ending
    from job.progress import Progress
    from job.shipping import shipped_log

    sent: dict[str, bytes] = {}
    attempt: Any = SimpleNamespace(epoch=1, put=sent.__setitem__)
    ending = Ending(run_id="r", began=0.0)
    with ending.recorded(Progress()), shipped_log(attempt, tmp_path):
        raise KeyError("boom")
    text = b"".join(sent.values()).decode()
    assert "Traceback" in text
    assert text.count("boom") > 0
    assert ending.code == 1


def test_a_file_system_that_fails_for_a_moment_is_no_bug() -> None:
    """Where nobody tries again it is 74, in one line."""
    from job.ending import explain
    from job.retry import TransientError

    error = explain(TransientError("Stale file handle"), where="run")
    assert error is not None
    assert error.code == 74
