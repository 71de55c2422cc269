"""The verbs that need no cluster. Flags say where; what is trained stands in the job file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from job.errors import ExitCode, JobError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is 64, in one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and leave with 64."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(int(ExitCode.USAGE))


def main(argv: list[str] | None = None) -> int:
    """``python -m job``: the verbs of this package."""
    parser = Parser(prog="python -m job", description="Train, prove and publish a LoRA adapter.")
    add_parsers(parser.add_subparsers(dest="verb", required=True, metavar="VERB"))
    return dispatch(parser, argv)


def dispatch(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parse ``argv``, call the verb, and turn what a person can mend into one line and its code."""
    arguments = parser.parse_args(argv)
    verb: Callable[[argparse.Namespace], int] = arguments.call
    try:
        return verb(arguments)
    except KeyboardInterrupt:
        return _say(JobError(ExitCode.PREEMPTED, arguments.verb, "interrupted", "start it again"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from job.ending import explain

        explained = explain(error, where=arguments.verb)
        if explained is None:
            raise
        return _say(explained)


def add_parsers(verbs: Any) -> None:
    """Add a subparser for each verb of ``job``."""
    check = _verb(verbs, "check", _check, "what would run: data, masks, memory, disk; no GPU")
    check.add_argument("job", type=Path, metavar="JOB.yaml")
    _output(check)

    run = _verb(verbs, "run", _run, "the whole pipeline, here")
    run.add_argument("job", type=Path, metavar="JOB.yaml")
    run.add_argument("--work", type=Path, default=Path("work"), help="folder for local files")
    run.add_argument("--cache-dir", type=Path, help="folder for base weights, kept between runs")
    run.add_argument("--run-id", help="go on with this run (in a cluster: the Job's name)")
    _output(run)

    merge = _verb(verbs, "merge", _merge, "the merge and its proof alone; needs no GPU")
    merge.add_argument("adapter", type=_folder, metavar="ADAPTER")
    merge.add_argument("base", type=_folder, metavar="BASE")
    merge.add_argument("out", type=_folder, metavar="OUT")
    merge.add_argument(
        "--format", default="base", choices=["base", "fp32", "bf16", "mxfp4-preserve"]
    )
    _output(merge)

    _add_generate(verbs)

    fetch = _verb(verbs, "fetch", _fetch, "a verified, resumable download of a version")
    fetch.add_argument("version", metavar="STORE/NAME[@channel|@version]")
    fetch.add_argument("folder", type=Path, metavar="DIR")
    _output(fetch)

    versions = _verb(verbs, "versions", _versions, "what is published, and which channel is where")
    versions.add_argument("name", metavar="STORE/NAME")
    versions.add_argument(
        "--prune", type=_at_least(1, int), metavar="KEEP", help="delete all but the newest KEEP"
    )
    _output(versions)

    storage = verbs.add_parser("storage", help="look at a store")
    actions = storage.add_subparsers(dest="action", required=True, metavar="ACTION")
    probe = _verb(actions, "probe", _probe, "can this store hold our promises?")
    probe.add_argument("store", metavar="STORE")
    _output(probe)


def _add_generate(verbs: Any) -> None:
    generate = _verb(verbs, "generate", _generate, "ask a model something")
    generate.add_argument("model", metavar="MODEL", help="a folder, or a source such as hf://…")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the question")
    generate.add_argument("--adapter", type=_folder, help="folder with adapter_config.json")
    generate.add_argument("--prompts", type=Path, help="a file: one question a line, or jsonl")
    generate.add_argument("--reasoning-language", metavar="X", help="think in this language")
    generate.add_argument("--system", help="the system (developer) text")
    generate.add_argument("--max-new-tokens", type=_at_least(1, int), default=512)
    generate.add_argument("--temperature", type=_at_least(0, float), default=0.6)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    _output(generate)


def _verb(verbs: Any, name: str, call: Callable[[argparse.Namespace], int], text: str) -> Any:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(call=call, verb=name)
    return parser


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder; download it, then name its folder")
    return Path(text)


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=["text", "json"], default="text", help="on stdout")


def _tell(arguments: argparse.Namespace, value: Any, show: Callable[[Any, TextIO], None]) -> None:
    """Print a result on stdout: as JSON where that was asked for, else by ``show``."""
    if arguments.output == "json":
        print(json.dumps(value, ensure_ascii=False, indent=2, default=str))
    else:
        show(value, sys.stdout)


def _say(error: JobError) -> int:
    print(f"lora-job: {error}", file=sys.stderr)
    return int(error.code)


def _stop(*, person_waits: bool = False) -> Any:
    """Return a stop that signals request, with logging set up: what every verb begins with."""
    from job import logs
    from job.stop import PERSONS_PATIENCE_S, RUNS_PATIENCE_S, Stop, install_signals

    logs.configure()
    stop = Stop(patience_s=PERSONS_PATIENCE_S if person_waits else RUNS_PATIENCE_S)
    install_signals(stop)
    return stop


def _check(arguments: argparse.Namespace) -> int:
    from job.check import check, print_report
    from job.config import load_job

    report = check(load_job(arguments.job), stop=_stop(person_waits=True))
    _tell(arguments, report, print_report)
    return int(report.get("code", 0))


def _run(arguments: argparse.Namespace) -> int:
    from job.run import Where, run
    from job.summary import print_summary

    where = Where(
        work=arguments.work,
        cache=arguments.cache_dir,
        run_id=arguments.run_id or os.environ.get("LORA_JOB_RUN_ID"),
        owner=os.environ.get("LORA_JOB_OWNER"),
    )
    ending = run(arguments.job, where)
    if (receipt := ending.receipt) is not None:
        show = lambda _, out: print_summary(receipt, where.work, out, reused=ending.reused)  # noqa: E731
        _tell(arguments, receipt.model_dump(mode="json"), show)
    return ending.code


def _merge(arguments: argparse.Namespace) -> int:
    from job.merge.stage import merge_folders

    out = arguments.out
    report = merge_folders(arguments.adapter, arguments.base, out, arguments.format, stop=_stop())
    words = f"merged and proven: {out} (the proof: {out}/merge_report.json)"
    _tell(arguments, report, lambda _, out: print(words, file=out))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from job.generate import generate, print_answers, read_prompts

    stop = _stop()
    answers = generate(
        arguments.model,
        adapter=arguments.adapter,
        prompts=read_prompts(arguments.prompt, arguments.prompts),
        reasoning_language=arguments.reasoning_language,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        device=arguments.device,
        stop=stop,
    )
    told = [answer.model_dump(mode="json") for answer in answers]
    _tell(arguments, told, lambda _, out: print_answers(answers, out))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from job.fetch import fetch

    report = fetch(arguments.version, arguments.folder, stop=_stop())
    words = f"{report['version']}: fetched and verified, in {arguments.folder}"
    _tell(arguments, report, lambda _, out: print(words, file=out))
    return 0


def _versions(arguments: argparse.Namespace) -> int:
    from job.store.show import list_or_prune, print_versions

    report = list_or_prune(arguments.name, keep=arguments.prune, stop=_stop(person_waits=True))
    _tell(arguments, report, print_versions)
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from job.store.show import print_findings, probe_store

    report = probe_store(arguments.store, stop=_stop(person_waits=True))
    _tell(arguments, report, print_findings)
    return int(report["code"])
