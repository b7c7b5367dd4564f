"""From a dataset's row back to its image's original bytes."""

import hashlib
from collections.abc import Mapping
from typing import Any

from aligncurate import storage
from aligncurate.sources import parquet

POINTER_COLUMNS = ("source", "image_path", "image_offset", "image_length", "row", "sha256")
"""What `read_image` needs of a row; with embedded images also `image`."""


def has_image(row: Mapping[str, Any]) -> bool:
    """Whether the row points at an image at all."""
    return row.get("image") is not None or row.get("image_path") is not None


def read_image(row: Mapping[str, Any], *, verify: bool = True) -> bytes:
    """The original bytes of the image that a row points at.

    Args:
        row: with POINTER_COLUMNS, and `image` where images are embedded.
        verify: compare with the row's sha256.

    Raises OSError when the source is gone, or no longer holds the bytes that were scored.
    """
    data = _read(row)
    expected = row.get("sha256")
    if verify and expected is not None and hashlib.sha256(data).digest() != expected:
        raise OSError(f"{row['source']}: the image {row['image_path']} is not the one that was scored")
    return data


def _read(row: Mapping[str, Any]) -> bytes:
    if row.get("image") is not None:
        return bytes(row["image"])
    path = row.get("image_path")
    if path is None:
        raise OSError("the row points at no image")
    if row.get("image_offset") is not None:
        return storage.read_range(row["source"], row["image_offset"], row["image_length"])
    if not (storage.is_remote(path) or path.startswith("/")):
        # A name that is no path is the Parquet column that holds the bytes.
        return parquet.read_image(row["source"], path, row["row"])
    return storage.read(path)
