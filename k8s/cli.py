"""``lora-job``: the verbs of a cluster, beside those of ``job``. Imports wait for their verb."""

from __future__ import annotations

from job import cli as job_cli

DESCRIPTION = "A base model and a data set become a proven LoRA adapter: here, or on a cluster."


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and call the verb; return its exit code."""
    from k8s import verbs

    parser = job_cli.Parser(prog="lora-job", description=DESCRIPTION)
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    job_cli.add_parsers(subparsers)
    verbs.add_parsers(subparsers)
    return job_cli.dispatch(parser, argv)
