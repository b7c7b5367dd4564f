"""The manifest of a dataset: its file name, what every manifest records, and how those of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from aligncurate import __version__

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
THRESHOLDS = "thresholds.json"


def manifest_head(head: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The manifest without its parts: `head` and what every manifest records, as it reads back from JSON."""
    columns = {field.name: str(field.type) for field in schema}
    whole = {"schema_version": SCHEMA_VERSION, **head, "versions": library_versions(), "columns": columns}
    parsed: dict[str, Any] = json.loads(json.dumps(whole))
    return parsed


def library_versions() -> dict[str, str]:
    """Versions of the libraries that scores and parts depend on."""
    names = ("torch", "torchvision", "open_clip_torch", "pillow", "simplejpeg", "numpy", "pyarrow", "polars")
    found = {"aligncurate": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in now:
        old, new = before.get(name), now[name]
        if old == new:
            continue
        if name == "inputs" and (changed := changed_files(old or [], new)):
            found += [f"{uri} has changed since" for uri in sorted(changed)[:3]]
        elif isinstance(old, dict) and isinstance(new, dict):
            keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            found += [f"{k}: {_short(old.get(k))} before, {_short(new.get(k))} now" for k in keys]
        else:
            found.append(f"{name}: {_short(old)} before, {_short(new)} now")
    return list(dict.fromkeys(found))


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
    """Input files that are the same by name and differ in size; empty when the inputs differ in other ways."""
    old = {f["uri"]: f["bytes"] for line in before for f in line.get("files", [])}
    new = {f["uri"]: f["bytes"] for line in now for f in line.get("files", [])}
    return {uri for uri in new if old[uri] != new[uri]} if old.keys() == new.keys() else set()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
