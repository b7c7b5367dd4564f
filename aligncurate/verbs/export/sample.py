"""How an exported pair is written: the names of its files and its strict JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from aligncurate.images.formats import EXTENSIONS, extension
from aligncurate.io import storage
from aligncurate.io.tar import Buffer

_UNSAFE = re.compile(r'[.\x00-\x1f\x7f\\:*?"<>|]')  # webdataset splits names at dots; file systems refuse the others


def image_ending(row: dict[str, Any], data: Buffer) -> str:
    """The file extension of the image's own name, or else the usual one for its format."""
    _, dot, ending = storage.basename(row["image_path"] or "").lower().rpartition(".")
    # Without a dot it is not a file name: `png` may be the column of a Parquet file that holds JPEGs.
    return ending if dot and ending in EXTENSIONS else (extension(data) or "jpg")


def safe_name(key: str | None) -> str:
    """A key as a file name without dots, because webdataset ends a key at the first one.

    The `.json` of the pair holds the original key. A row without a key, of a dataset from elsewhere, is a `pair`.
    """
    return _UNSAFE.sub("_", key or "").strip("/") or "pair"


def free_name(key: str, taken: set[str]) -> str:
    """The first of key, key-2, key-3, … that is not in `taken`; it is added to `taken`."""
    free, number = key, 1
    while free in taken:
        number += 1
        free = f"{key}-{number}"
    taken.add(free)
    return free


def strict_json(value: Any) -> str:
    """Strict JSON: NaN and infinity, which it cannot hold, become null; bytes become hex digits, other types text."""
    try:
        return _encode(value)
    except ValueError:  # not finite; rare, so only such values are searched, which is slow
        return _encode(_finite(value))


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain, allow_nan=False).encode


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
