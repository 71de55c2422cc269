"""The manifests as kustomize would build them: resources, then strategic-merge patches.

Only what our own overlays use is understood; a test holds the outcome against `kubectl kustomize`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parent / "manifests"

# Kubernetes merges these lists by a key; all others are replaced as a whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
}


def build(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a kustomization, its patches applied."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    objects: list[dict[str, Any]] = []
    for resource in spec.get("resources", []):
        path = folder / resource
        objects += build(path.resolve()) if path.is_dir() else _read(path)
    for patch in spec.get("patches", []):
        for change in _read(folder / patch["path"]):
            objects = [merge(it, change) if _same(it, change) else it for it in objects]
    return objects


def merge(base: Any, patch: Any, *, field: str = "") -> Any:
    """Return ``base`` with ``patch`` merged in: maps by key, known lists by theirs; null deletes."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value, field=key)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and field in MERGE_KEYS:
        return _merge_list(base, patch, MERGE_KEYS[field])
    return copy.deepcopy(patch)


def _merge_list(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    merged = list(base)
    places = {item[key]: place for place, item in enumerate(merged)}
    for item in patch:
        if item[key] in places:
            place = places[item[key]]
            merged[place] = merge(merged[place], item)
        else:
            merged.append(copy.deepcopy(item))
    return merged


def _read(path: Path) -> list[dict[str, Any]]:
    return [it for it in yaml.safe_load_all(path.read_text(encoding="utf-8")) if it]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["kind"] == other["kind"] and one["metadata"]["name"] == other["metadata"]["name"]
    )
