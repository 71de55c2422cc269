"""docs/job-file.md is made from the config itself: UPDATE_DOCS=1 writes it."""

import os
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from job.config import JobConfig

PAGE = Path(__file__).parents[2] / "docs" / "job-file.md"
HEAD = """# The job file

Every key, what it may be, and its default. Unknown keys are refused. The examples are in
[examples/](../examples/README.md).
"""


def words(annotation: object) -> str:
    """Return a type as a reader of YAML knows it."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return words(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        kinds = [words(one) for one in typing.get_args(annotation) if one is not type(None)]
        return " or ".join(kinds)
    if origin is list:
        return f"list of {words(typing.get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true, false"}
    return names.get(annotation, "section")


def table(kind: type[BaseModel], path: str = "") -> list[str]:
    """Return the table of one section and of the sections below it."""
    lines = [f"\n## {path or 'the file'}\n"]
    if kind.__doc__:
        lines += [kind.__doc__.strip().splitlines()[0], ""]
    lines += ["| key | is | default | |", "|---|---|---|---|"]
    below = []
    for name, field in kind.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        below += [(section, f"{path}.{name}".lstrip(".")) for section in sections]
        default = "required" if field.default is PydanticUndefined else repr(field.default)
        if sections and field.default is not PydanticUndefined:
            default = "none" if field.default in (None, []) else "see below"
        if default == "None":
            default = "none"
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {words(field.annotation)} | {default} | {text} |")
    for section, name in below:
        lines += table(section, name)
    return lines


def test_the_page_says_what_the_config_says() -> None:
    """A setting that is added or changed shows up on its page."""
    text = HEAD + "\n".join(table(JobConfig)) + "\n"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text
