"""A file that an installed Python package carries. The package itself is never imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from job.files import safe_relative
from job.pull.file import pinned
from job.pull.pin import Hashes, Pin, SourceKind, not_found


def resolve(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    """Pin ``package:name/file`` by the package's version and the sha256.

    Raises:
        JobError: 66 if the package or the file is not there.
    """
    path = locate(uri)
    version, licence = _distribution(_split(uri)[0])
    pin = pinned(path, uri, kind, hashes, where=uri, revision=version)
    return pin.model_copy(update={"license": pin.license or licence})


def locate(uri: str) -> Path:
    """Return where the file lies; the package's code does not run for it."""
    name, inside = _split(uri)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise not_found(uri, f"no package {name} is installed", f"install what brings {name}")
    path = Path(spec.submodule_search_locations[0]) / safe_relative(inside, where=uri)
    if not path.exists():
        raise not_found(uri, f"the package {name} holds no {inside}", "see its version and files")
    return path


def _split(uri: str) -> tuple[str, str]:
    name, _, inside = uri.removeprefix("package:").partition("/")
    return name, inside


def _distribution(package: str) -> tuple[str | None, str | None]:
    """Return the version and the licence of the distribution that brings a package."""
    names = importlib.metadata.packages_distributions().get(package, [])
    if not names:
        return None, None
    found = importlib.metadata.metadata(names[0]).json
    licence = found.get("license_expression") or found.get("license")
    return str(found["version"]), str(licence) if licence else None
