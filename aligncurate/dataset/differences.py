"""How the manifests of two runs differ, in words, and what a later run may correct."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aligncurate.dataset.manifest import IMAGE_ROOT
from aligncurate.settings import option_name

_LONGEST = 80  # characters of a value in a message
_NAMED = ("columns", "arrow_schema", "inputs", "written_with")  # compared in their own way


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
    if not _continued("computed_with", before, now):
        found += _environment_differences(before.get("computed_with") or [], now.get("computed_with") or [])
    made_by = [manifest.get("written_with", {}).get("aligncurate") for manifest in (before, now)]
    if made_by[0] != made_by[1]:
        found.append(f"made with aligncurate {made_by[0]}, now {made_by[1]}")
    if not found:  # other inputs and options give other columns and another history
        found += [
            f"column {column}: {old or 'absent'}, now {new or 'absent'}" for column, old, new in changed("columns")
        ]
        others = [name for name in now if name not in _NAMED and before.get(name) != now[name]]
        found += [f"a different {name}" for name in others if not _continued(name, before, now)]
    return found


def _continued(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a list only grew at its end, as datasets that are added to the inputs bring their own history."""
    old, new = before.get(name) or [], now.get(name) or []
    grown = has_grown(before.get("inputs") or [], now["inputs"])
    return name in ("history", "computed_with") and grown and bool(new[: len(old)] == old)


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


def has_grown(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are new inputs after all the earlier ones."""
    old, new = _in_order(before), _in_order(now)
    return len(new) > len(old) and new[: len(old)] == old


def _in_order(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    return [(line.get("kind"), uri) for line in lines for uri in _inputs([line])]


def _input_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the inputs differ. New ones after all others are no difference: they become further parts."""
    old, new = _inputs(before), _inputs(now)
    grown = has_grown(before, now)
    changes = {
        "changed since": [uri for uri in new if uri in old and _has_changed(old[uri], new[uri])],
        "been added, but not after the others": [] if grown else [uri for uri in new if uri not in old],
        "been removed": [uri for uri in old if uri not in new],
    }
    found = []
    for what, uris in changes.items():
        if uris:
            more = f" and {len(uris) - 3:,} more" if len(uris) > 3 else ""
            found.append(f"inputs: {', '.join(uris[:3])}{more} {'has' if len(uris) == 1 else 'have'} {what}")
    same = grown or _in_order(before) == _in_order(now)
    return found or ([] if same else ["inputs: read in a different order or format"])


def _inputs(lines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What tells whether an input has changed, by its URI: of a file its size and the like, a dataset's checksum."""
    found = {line["uri"]: {"manifest_sha256": line.get("manifest_sha256")} for line in lines if "uri" in line}
    return found | {file["uri"]: file for line in lines for file in line.get("files", [])}


def _has_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether something that is known of a file both times differs."""
    return any(None not in (before[k], now[k]) and before[k] != now[k] for k in before.keys() & now.keys())


def _encoder_differences(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    if not old or not new:
        return [f"{name} has been {'added' if new else 'removed'}"] if old != new else []
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    plain = [key for key in keys if not isinstance(new.get(key), dict) and key != "weights_sha256"]
    found = [f"{name}'s {key} was {_short(old.get(key))}, now {_short(new.get(key))}" for key in plain]
    if "weights_sha256" in keys:
        found.append(f"{name}'s weights differ")
    return found + [f"{name}'s {key} differs" for key in keys if isinstance(new.get(key), dict)]


def _environment_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where scores were computed: libraries and devices."""
    if list(before) == list(now):
        return []
    if not before or not now:
        return ["a different computed_with"]
    old, new = before[-1], now[-1]
    versions = [mapping.get("versions", {}) for mapping in (old, new)]
    names = [name for name in {**versions[0], **versions[1]} if versions[0].get(name) != versions[1].get(name)]
    found = [
        f"made with {name} {versions[0].get(name, '(none)')}, now {versions[1].get(name, '(none)')}" for name in names
    ]
    if old.get("device") != new.get("device") or not found:
        found.append(f"scored on {device_text(old)}, now {device_text(new)}; --mixed-devices allows that")
    return found


def device_text(environment: Mapping[str, Any]) -> str:
    """The device of an environment in a message."""
    return ", ".join(
        f"{k} {v}" if k not in ("kind", "name") else str(v) for k, v in environment.get("device", {}).items()
    )


def _threshold_difference(old: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    values = now["thresholds"]["values"] if now["thresholds"] else []
    if now["options"].get("thresholds") == "frozen":
        return "the --thresholds file has changed"
    differing = sum(a != b for a, b in zip(values, old.get("values", []), strict=False))
    which = f"{differing} of {len(values)} thresholds changed because "
    return f"{which if differing else ''}the scores differ"


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
    """Input files of the same name that have changed; empty if the inputs differ in other ways."""
    old = {file["uri"]: file for line in before for file in line.get("files", [])}
    new = {file["uri"]: file for line in now for file in line.get("files", [])}
    return {uri for uri in new if _has_changed(old[uri], new[uri])} if old.keys() == new.keys() else set()


def with_corrections(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier manifest with what `--retry-errors` may correct as it is now: changed files, and the image root."""
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
