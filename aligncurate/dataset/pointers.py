"""From a dataset's row back to its image's original bytes."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow as pa

from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.parquet import open_parquet

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
        return _read_cell(row["source"], path, row["row"])
    return storage.read(path)


_reading = Lock()  # one thread reads a row group, the others find it in the cache


@lru_cache(maxsize=2)
def _image_group(uri: str, mark: object, column: str, group: int) -> list[Any]:
    with open_parquet(uri) as file:
        return list(file.read_row_group(group, columns=[column])[column].to_pylist())


@lru_cache(maxsize=64)
def _group_ends(uri: str, mark: object) -> list[int]:
    with open_parquet(uri) as file:
        sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        return list(accumulate(sizes))


def _read_cell(uri: str, column: str, row: int) -> bytes:
    """The image bytes in `column` at `row` of a Parquet file. Raises OSError when they are not there any more."""
    mark = storage.version(uri)
    try:
        with _reading:
            ends = _group_ends(uri, mark)
            group = bisect_right(ends, row)
            first = ends[group - 1] if group else 0
            found = images_in(_image_group(uri, mark, column, group)[row - first])
    except (UserError, KeyError, IndexError, pa.ArrowException) as error:
        raise OSError(f"{uri}: column {column}, row {row}: {error}") from None
    if len(found) != 1 or not isinstance(found[0], bytes):
        raise OSError(f"{uri} has no image bytes in column {column} at row {row}")
    return found[0]


def images_in(value: Any) -> list[str | bytes]:
    """The images in a field: paths, bytes, Hugging Face's {bytes, path}, or a list of these."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "":
        return []
    if isinstance(value, (bytes, str)):
        return [value]
    if isinstance(value, Mapping):
        data = value.get("bytes")
        return [data] if data is not None else images_in(value.get("path"))
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in images_in(item)]
    return [str(value)]
