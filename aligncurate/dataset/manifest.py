"""The manifest of a dataset: its file name, what every manifest records, and reading it with care."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from aligncurate import __version__
from aligncurate.dataset.checked import check_depth, take, take_objects
from aligncurate.dataset.receipt import SCORE_COUNTS, PartInfo
from aligncurate.errors import UserError
from aligncurate.io.files import parse_json
from aligncurate.io.paths import AnyPath
from aligncurate.levels import Thresholds

SCHEMA_VERSION = 2
READABLE = (1, 2)
"""Version 1 has its parts on top and no receipts."""

MANIFEST = "manifest.json"
THRESHOLDS = "thresholds.json"
IMAGE_ROOT = "image_root"
"""The one option that a run with --retry-errors may correct."""

LOST = "delete it and run the command that made the dataset again, which keeps the finished parts"
"""What to do about a damaged manifest, for the end of a sentence: it cannot say how it is made again."""

SHARDS = "shards"
"""How many parts an unfinished dataset will have."""

SEAL = "sha256"
"""The field with the digest of all others, for `aligncurate verify`."""

_SHARED = ("schema_version", "verb", "options", "encoder", "encoders", "thresholds", "columns")
_WRITING = ("pyarrow", "polars")


def manifest_head(head: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The manifest without its parts: `head` and what every manifest records, as it reads back from JSON."""
    columns = {field.name: str(field.type) for field in schema}
    arrow = base64.b64encode(schema.serialize().to_pybytes()).decode()
    whole = {"schema_version": SCHEMA_VERSION, **head, "written_with": library_versions(_WRITING)}
    parsed: dict[str, Any] = json.loads(json.dumps({**whole, "columns": columns, "arrow_schema": arrow}))
    return parsed


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of aligncurate and of the libraries `names` that are installed."""
    found = {"aligncurate": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def options_digest(head: Mapping[str, Any]) -> str:
    """Digest of what all parts of a dataset share, for their receipts."""
    shared = {name: head.get(name) for name in _SHARED}
    shared["options"] = {k: v for k, v in head["options"].items() if k != IMAGE_ROOT}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """Digest of everything else in a manifest."""
    others = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def arrow_schema(manifest: Mapping[str, Any]) -> pa.Schema | None:
    """The schema of the parts; None if an earlier version wrote the manifest. Raises ValueError if it is damaged."""
    text = manifest.get("arrow_schema")
    if text is None:
        return None
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
    except (OSError, pa.ArrowException) as error:  # Arrow's errors of reading are OSErrors
        raise ValueError(f"arrow_schema: {error}") from None


def read_manifest(folder: AnyPath) -> dict[str, Any]:
    """The manifest in `folder`, of any version that can be read, finished or not.

    Raises:
        UserError: it is damaged, or of another version.
        OSError: it cannot be read.
    """
    file = folder / MANIFEST
    data = file.read_bytes()
    try:
        manifest = parse_json(data, file)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(';')[0]}; {LOST}.") from None
    found = manifest.get("schema_version")
    if found not in READABLE:
        raise UserError(
            f"{file}: schema version {str(found)[:20]}, but this aligncurate reads version {SCHEMA_VERSION}; "
            "make the dataset again, or install the version that made it."
        )
    try:
        _check(manifest, file)
    except UserError:
        raise
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"{file}: damaged ({error}); {LOST}.") from None
    return manifest


def _check(manifest: Mapping[str, Any], file: AnyPath) -> None:
    """Raises ValueError unless all fields that are read later have the right types."""
    check_depth(manifest)
    take(manifest, "complete", bool)
    for step in (manifest, *take_objects({"history": [], **manifest}, "history")):
        if take(step, "verb", str) == "bucket":
            take(take(step, "options", dict), "thresholds", str)
        take(step, "options", dict)
        for line in take_objects(step, "inputs"):
            for entry in take_objects({"files": [], **line}, "files"):
                take(entry, "uri", str)
    for encoder in (manifest.get("encoder"), *take({"encoders": {}, **manifest}, "encoders", dict).values()):
        if encoder is not None:
            take(encoder, "model", str)
            take(encoder, "precision", str)
            if not {"pretrained", "weights_sha256"} <= encoder.keys():
                raise ValueError("an encoder without pretrained or weights_sha256")
    if (cut := manifest.get("thresholds")) is not None:
        levels = Thresholds.from_json(cut, f"{file}: damaged thresholds").levels
        if take(cut, "levels", int) != levels:
            raise ValueError("thresholds for another number of levels")
    for environment in take_objects({"computed_with": [], **manifest}, "computed_with"):
        take(environment, "device", dict)
        take(environment, "versions", dict)
    take({"written_with": {}, **manifest}, "written_with", dict)
    take({SCORE_COUNTS: {}, **manifest}, SCORE_COUNTS, dict)
    parts = [PartInfo.from_json(line) for line in take_objects(manifest, "parts")]
    if len({part.name for part in parts}) < len(parts):
        raise ValueError("a part is listed twice")
    columns = take({"columns": {}, **manifest}, "columns", dict)
    if "arrow_schema" in manifest:
        take(manifest, "arrow_schema", str)
    schema = arrow_schema(manifest)
    if schema is not None and set(schema.names) != columns.keys():
        raise ValueError("columns and arrow_schema name different columns")
