"""Files that show when they are damaged: JSON with a digest of itself, and lists of other files with theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aligncurate.io.files import write_json

_SEAL = "sha256"


class DamagedError(Exception):
    """A file is missing, cut short or changed since it was written; the message names it."""


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with a digest of its content."""
    write_json(path, {**value, _SEAL: _digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object that `write_sealed` wrote. Raises DamagedError if it is not there as it was written."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise DamagedError(f"{path.name} cannot be read") from None
    if not isinstance(value, dict) or value.pop(_SEAL, None) != _digest(value):
        raise DamagedError(f"{path.name} is not as it was written")
    return value


def read_unsealed(path: Path) -> dict[str, Any] | None:
    """The JSON object of a version before seals, with neither a digest nor a list of files; None if it is another."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value and not {_SEAL, "files"} & value.keys() else None


def list_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, by name."""
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(lambda file: (file.name, _facts(file)), sorted(files)))


def check_files(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the files in a folder with what `list_files` said. Raises DamagedError for the first that differs."""
    for name, facts in listed.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{name} is missing")
        if (size := file.stat().st_size) != facts["bytes"]:
            raise DamagedError(f"{name} has {size:,} bytes, not {facts['bytes']:,}")
    try:
        now = list_files(folder / name for name in listed)
    except OSError as error:
        raise DamagedError(f"a file cannot be read ({error})") from None
    for name, facts in listed.items():
        if now[name] != facts:
            raise DamagedError(f"{name} is not as it was written")


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
