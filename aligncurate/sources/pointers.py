"""From a dataset's row back to its image's original bytes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aligncurate import storage
from aligncurate.sources import parquet

POINTER_COLUMNS = ("source", "image_path", "image_offset", "image_length", "row", "sha256")
"""What `read_image` needs of a row; with embedded images also `image`."""

_GAP = 1 << 16  # bytes between two images that are read along rather than in two reads
_RUN = 1 << 20  # bytes read at once


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
    if verify:
        _check(row, data)
    return data


def read_images(rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | memoryview | OSError | None]:
    """What `read_image` gives for each row, in order; images that are neighbours in a tar are read at once.

    A row without an image gives None, one whose image cannot be read the error. Bytes in a memoryview are there until
    the next row is asked for.
    """
    buffer = memoryview(bytearray(_RUN))  # one for all: fresh memory would cost as much as what is copied into it
    for run in _runs(rows):
        start = run[0]["image_offset"]
        together: memoryview | None = None
        if len(run) > 1:
            try:
                length = run[-1]["image_offset"] + run[-1]["image_length"] - start
                storage.read_into(run[0]["source"], start, buffer[:length])
                together = buffer
            except OSError:
                pass  # each by itself, to know which ones are gone
        for row in run:
            data: bytes | memoryview | None = None
            try:
                if together is not None:
                    data = together[row["image_offset"] - start :][: row["image_length"]]
                elif has_image(row):
                    data = _read(row)
                if data is not None:
                    _check(row, data)
            except OSError as error:
                yield error
            else:
                yield data


def _runs(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows, cut where an image does not lie soon after the one before it."""
    run: list[Mapping[str, Any]] = []
    end = 0
    for row in rows:
        offset = row.get("image_offset") if row.get("image") is None else None
        near = run and offset is not None and row["source"] == run[0]["source"] and end <= offset <= end + _GAP
        if run and not (near and offset + row["image_length"] - run[0]["image_offset"] <= _RUN):
            yield run
            run = []
        run.append(row)
        end = -_GAP - 1 if offset is None else offset + row["image_length"]  # nothing is near what lies in no tar
    if run:
        yield run


def _check(row: Mapping[str, Any], data: bytes | memoryview) -> None:
    expected = row.get("sha256")
    if expected is not None and hashlib.sha256(data).digest() != expected:
        raise OSError(f"{row['source']}: the image {row['image_path']} is not the one that was scored")


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
