"""The manifest of a dataset: its file name, what every manifest records, and how those of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from aligncurate import __version__
from aligncurate.settings import option_name

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
THRESHOLDS = "thresholds.json"
IMAGE_ROOT = "image_root"
"""The one option that a run with --retry-errors may correct."""

_LONGEST = 80  # characters of a value in a message


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
    """How the manifest of an earlier run differs from the head of this run's, in words; empty if they match."""
    if before.get("schema_version") != now["schema_version"]:
        return [f"made with schema version {before.get('schema_version')}, now {now['schema_version']}"]
    if before.get("verb") != now["verb"]:
        return [f"made by `aligncurate {before.get('verb')}`, now `aligncurate {now['verb']}`"]

    def changed(name: str) -> list[tuple[str, Any, Any]]:
        old, new = before.get(name) or {}, now.get(name) or {}
        return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]

    options = [_option(option_name(key), old, new) for key, old, new in changed("options")]
    found = [*options, *_input_differences(before.get("inputs") or [], now["inputs"])]
    found += _encoder_differences("the encoder", before.get("encoder"), now.get("encoder"))
    for column, old, new in changed("encoders"):
        if column != "score":  # that is `encoder`
            found += _encoder_differences(f"the {column} encoder", old, new)
    if changed("thresholds") and not options:  # other options give other thresholds
        found.append(_threshold_difference(before.get("thresholds") or {}, now))
    found += [
        f"made with {library} {old or '(none)'}, now {new or '(none)'}" for library, old, new in changed("versions")
    ]
    if not found:  # other inputs and options give other columns and another history
        found += [
            f"column {column}: {old or 'absent'}, now {new or 'absent'}" for column, old, new in changed("columns")
        ]
        found += [f"a different {name}" for name in now if name != "columns" and before.get(name) != now[name]]
    return found


def _option(name: str, old: Any, new: Any) -> str:
    if _is_default(old):
        return f"made without {name}, now with {'it' if new is True else _short(new)}"
    made = f"made with {name}" if old is True else f"made with {name} {_short(old)}"
    return f"{made}, now {'without' if _is_default(new) else _short(new)}"


def _is_default(value: Any) -> bool:
    """Whether an option was not given; `bucket` records `fitted` where --thresholds was not."""
    return value is None or value is False or value == "fitted"


def _short(value: Any) -> str:
    """A value in a message; of long ones the end, which tells paths apart."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _input_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    old, new = _inputs(before), _inputs(now)
    changes = {"changed since": [uri for uri in new if uri in old and old[uri] != new[uri]]}
    changes |= {"been added": [uri for uri in new if uri not in old], "been removed": [u for u in old if u not in new]}
    found = []
    for what, uris in changes.items():
        if uris:
            more = f" and {len(uris) - 3:,} more" if len(uris) > 3 else ""
            found.append(f"inputs: {', '.join(uris[:3])}{more} {'has' if len(uris) == 1 else 'have'} {what}")
    return found or (["inputs: read in a different order or format"] if list(before) != list(now) else [])


def _inputs(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells whether an input has changed, by its URI: a file's size, a dataset's checksum."""
    found = {line["uri"]: line.get("manifest_sha256") for line in lines if "uri" in line}
    return found | {file["uri"]: file["bytes"] for line in lines for file in line.get("files", [])}


def _encoder_differences(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    if not old or not new:
        return [f"{name} has been {'added' if new else 'removed'}"] if old != new else []
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    plain = [key for key in keys if not isinstance(new.get(key), dict) and key != "weights_sha256"]
    found = [f"{name}'s {key} was {_short(old.get(key))}, now {_short(new.get(key))}" for key in plain]
    if "weights_sha256" in keys:
        found.append(f"{name}'s weights differ")
    return found + [f"{name}'s {key} differs" for key in keys if isinstance(new.get(key), dict)]


def _threshold_difference(old: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    values = now["thresholds"]["values"] if now["thresholds"] else []
    if now["options"].get("thresholds") == "frozen":
        return "the --thresholds file has changed"
    differing = sum(a != b for a, b in zip(values, old.get("values", []), strict=False))
    which = f"{differing} of {len(values)} thresholds changed because "
    return f"{which if differing else ''}the scores differ"


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
    """Input files with the same name and another size; empty if the inputs differ in other ways."""
    old = {file["uri"]: file["bytes"] for line in before for file in line.get("files", [])}
    new = {file["uri"]: file["bytes"] for line in now for file in line.get("files", [])}
    return {uri for uri in new if old[uri] != new[uri]} if old.keys() == new.keys() else set()


def with_corrections(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier manifest with what `--retry-errors` may correct as it is now: sizes of files, and the image root."""
    changed = changed_files(before.get("inputs", []), now["inputs"])
    files = {file["uri"]: file for line in now["inputs"] for file in line.get("files", [])}
    inputs = []
    for line in before.get("inputs", []):
        if "files" in line:
            line = {**line, "files": [files[f["uri"]] if f["uri"] in changed else f for f in line["files"]]}
        inputs.append(line)
    options = dict(before.get("options", {}))
    if options.get(IMAGE_ROOT) != now["options"].get(IMAGE_ROOT):
        options[IMAGE_ROOT] = now["options"].get(IMAGE_ROOT)
    return {**before, "inputs": inputs, "options": options}
