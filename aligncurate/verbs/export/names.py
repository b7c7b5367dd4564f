"""File names of exported pairs."""

from __future__ import annotations

import re
from typing import Any

from aligncurate.images.formats import EXTENSIONS, extension
from aligncurate.io import storage
from aligncurate.io.tar import Buffer

_UNSAFE = re.compile(r'[.\x00-\x1f\x7f\\:*?"<>|]')  # webdataset splits names at dots; the rest trouble file systems


def image_ending(row: dict[str, Any], data: Buffer) -> str:
    """The image's own file ending, or the usual one for its bytes."""
    _, dot, ending = storage.basename(row["image_path"] or "").lower().rpartition(".")
    # Without a dot it is no file name: `png` may be the column of a Parquet file, with JPEGs in it.
    return ending if dot and ending in EXTENSIONS else (extension(data) or "jpg")


def safe_name(key: str) -> str:
    """A key as a file name: webdataset reads a name up to its first dot. The `.json` keeps the key as it is."""
    return _UNSAFE.sub("_", key).strip("/") or "pair"


def free_name(key: str, taken: set[str]) -> str:
    """`key`, or the first of key-2, key-3, … that is not taken; takes it."""
    free, number = key, 1
    while free in taken:
        number += 1
        free = f"{key}-{number}"
    taken.add(free)
    return free
