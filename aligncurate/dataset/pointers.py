"""From a dataset's row to the original bytes of its image."""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any, Self
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa

from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.parquet import PARQUET_ERRORS, batches, open_parquet, page_buffer

POINTER_COLUMNS = ("source", "image_path", "image_offset", "image_length", "row", "sha256")
"""The columns that `Pointer.of` needs; with embedded images also `image`."""

IMAGE_KEYS = ("bytes", "image_bytes", "path", "image_url", "url", "image", "image_path", "file_path", "file_name",
              "filename", "uri", "file_uri", "src", "base64", "b64_json", "data", "inline_data",
              "file_data")  # fmt: skip
"""The usual names of what an object of an image holds, the most direct first."""

# Base64 of JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000, by their first bytes; a name has a dot, or is shorter.
_BASE64 = re.compile(
    r"(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD[dl]h|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA[A-Z]GZ0eX|AAAADGpQ)[A-Za-z0-9+/_\-\s]{40,}={0,2}"
)
_FROM_URL = str.maketrans("-_", "+/")

MAX_GAP = 1 << 16
"""Bytes between two images of a tar that are read along rather than skipped with a second read."""

MAX_READ = 1 << 20
"""Bytes of several images that are read at once."""

_HELD = 128 << 20  # bytes of Parquet row groups kept for images still to be read from them
_AT_ONCE = 128 << 20  # bytes of images in a row group that is read at once; a larger one is read batch by batch


class ChangedImageError(OSError):
    """The bytes are there, but are not those that the row was made from."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where the original bytes of a row's image are.

    Attributes:
        source: the row's tar, Parquet file or table.
        path: the tar's member; an image file (an absolute path or URI); or the Parquet column with the bytes.
        offset, length: where the bytes lie in `source`, if it is a tar; otherwise offset is -1.
        row: row number in `source`, for a Parquet column.
        sha256: of the bytes; None if unknown.
        image: the bytes themselves, if they are embedded in the row.
        fault: why the row's pointer makes no sense, which a dataset from elsewhere may; `read` raises it.
    """

    source: str
    path: str
    offset: int
    length: int
    row: int | None
    sha256: bytes | None
    image: bytes | None
    fault: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self | None:
        """The pointer in a row with POINTER_COLUMNS, whatever they hold; None if the row has no image."""
        path, image, offset = row.get("image_path"), row.get("image"), row.get("image_offset")
        if path is None and image is None:
            return None
        offset, length = (-1, 0) if image is not None or offset is None else (offset, row.get("image_length"))
        source, fault = row.get("source") or "", _fault(row)
        return cls(source, path or "", offset, length or 0, row.get("row"), row.get("sha256"), image, fault)

    @property
    def end(self) -> int:
        """Where the bytes end in the tar."""
        return self.offset + self.length

    @property
    def file(self) -> str:
        """The file that holds the bytes: the image's own, or `source`; empty if they are embedded in the row."""
        if self.image is not None:
            return ""
        own = self.offset < 0 and (storage.is_remote(self.path) or self.path.startswith("/"))
        return self.path if own else self.source

    def read(self, *, needs_sha256: bool = True) -> bytes:
        """The image's original bytes.

        Args:
            needs_sha256: do not follow a pointer without one. A dataset from elsewhere may name any file of this
                machine, and the digest is what shows that its maker knew the bytes.

        Raises:
            OSError: the source does not exist any more or no longer holds the bytes that were scored, or the pointer
                leads nowhere; whatever else goes wrong is an OSError too, of this row only.
        """
        try:
            return self._read(needs_sha256)
        except OSError:
            raise
        except Exception as error:  # an impossible name, an unknown scheme, what a file system or a damaged file raises
            reason = str(error).rstrip(".") or type(error).__name__
            raise OSError(f"{self.source}: the image {self.path} cannot be read ({reason})") from None

    def _read(self, needs_sha256: bool) -> bytes:
        if self.fault is not None:
            raise OSError(f"{self.source}: the image {self.path} cannot be found: {self.fault}; make the dataset again")
        if needs_sha256 and self.sha256 is None:
            raise OSError(f"{self.source}: the image {self.path} has no sha256, so it is not read; score it again")
        if self.image is not None:
            data = self.image
        elif self.offset >= 0:
            if self.length > storage.MAX_IMAGE_BYTES:
                raise storage.TooLargeError(f"{self.source}: the image {self.path} has {self.length:,} bytes, too many")
            data = storage.read_range(self.source, self.offset, self.length)
        elif storage.is_remote(self.path) or self.path.startswith("/"):
            data = storage.read(self.path, storage.MAX_IMAGE_BYTES)
        else:
            assert self.row is not None
            data = _read_cell(self.source, self.path, self.row)
        self.check(data)
        return data

    def check(self, data: bytes | memoryview) -> None:
        """Raises OSError unless `data` has the pointer's sha256, if that is known."""
        if self.sha256 is not None and hashlib.sha256(data).digest() != self.sha256:
            raise ChangedImageError(f"{self.source}: the image {self.path} is not the one that was scored")


def _fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the columns that say where a row's image is; None if nothing is."""
    if row.get("image") is not None:
        return None
    path, source, offset = row["image_path"], row.get("source"), row.get("image_offset")
    if "\0" in path or "\0" in (source or ""):
        return "there is a zero byte in its name"
    number = "row" if offset is None else "image_length"
    if offset is None and (storage.is_remote(path) or path.startswith("/")):
        return None
    if not source:
        return "its source is empty"
    if offset is not None and offset < 0:
        return f"its image_offset is {offset}"
    if row.get(number) is None or row[number] < 0:
        return f"its {number} is {'empty' if row.get(number) is None else row[number]}"
    return None


def read_images(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes | memoryview | OSError | None]:
    """The bytes of each row's image, in order; neighbours in a tar are read at once.

    Gives None for a row without an image, and the error for an image that cannot be read. A memoryview is valid only
    until the next row is asked for.
    """
    buffer = memoryview(bytearray(MAX_READ))  # one for all: fresh memory would cost as much as the copy into it
    for run in _runs(Pointer.of(row) for row in rows):
        if not run:
            yield None
            continue
        start = run[0].offset
        at_once = len(run) > 1
        if at_once:
            try:
                storage.read_into(run[0].source, start, buffer[: run[-1].end - start])
            except Exception:
                at_once = False  # read one by one, to find the ones that fail
        for pointer in run:
            data: bytes | memoryview
            try:
                if at_once:
                    data = buffer[pointer.offset - start : pointer.end - start]
                    pointer.check(data)
                else:
                    data = pointer.read()
            except OSError as error:
                yield error
            else:
                yield data


def _runs(pointers: Iterable[Pointer | None]) -> Iterator[list[Pointer]]:
    """Pointers grouped so that those of a group can be read at once; an empty group for a row without an image."""
    run: list[Pointer] = []
    for pointer in pointers:
        if run and not (pointer and _are_neighbours(run, pointer)):
            yield run
            run = []
        if pointer:
            run.append(pointer)
        else:
            yield []
    if run:
        yield run


def _are_neighbours(run: list[Pointer], pointer: Pointer) -> bool:
    first, last = run[0], run[-1]
    return (
        pointer.source == first.source
        and pointer.fault is last.fault is None
        and min(pointer.offset, last.offset) >= 0
        and None not in (pointer.sha256, last.sha256)
        and last.end <= pointer.offset <= last.end + MAX_GAP
        and pointer.end - first.offset <= MAX_READ
    )


class _ImageGroup:
    """The images of a row group, of which one batch is in memory; reading backwards starts the group again."""

    def __init__(self, uri: str, column: str, group: int, size: int) -> None:
        self._place = uri, column, group, size
        self._batches = _image_batches(*self._place)
        self._batch, self._start = pa.nulls(0), 0

    def __getitem__(self, row: int) -> Any:
        if row < self._start:
            self._batches, self._batch, self._start = _image_batches(*self._place), pa.nulls(0), 0
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = pa.nulls(0)  # released before the next one is read
            try:
                self._batch = next(self._batches)
            except StopIteration:
                raise IndexError(f"there is no row {row}") from None
        return self._batch[row - self._start].as_py()


def _image_batches(uri: str, column: str, group: int, size: int) -> Iterator[pa.Array]:
    with open_parquet(uri, buffer_size=page_buffer(size)) as file:
        for _, batch in batches(file, group, 0, [column]):
            if isinstance(batch, str):
                raise OSError(batch)
            yield batch.column(column)


@lru_cache(maxsize=2)
def _image_group(uri: str, mark: object, column: str, group: int, size: int) -> _ImageGroup:
    return _ImageGroup(uri, column, group, size)


class _RowGroups:
    """The image columns of the Parquet row groups that were used last, of those that are not large.

    Training reads images in random order, from several threads, and Parquet reads no less than a row group: each is
    read once by the first thread that needs it, while others read other groups.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # bytes
        self._lock = Lock()
        self._held: OrderedDict[tuple[object, ...], Future[pa.ChunkedArray]] = OrderedDict()

    def read(self, uri: str, mark: object, column: str, group: int) -> pa.ChunkedArray:
        """The column of a row group. Raises as `open_parquet`, and KeyError if there is no such column."""
        key = (uri, mark, column, group)
        with self._lock:
            held = self._held.get(key)
            future = self._held[key] = held or Future()
            self._held.move_to_end(key)
        if held is None:
            try:
                with open_parquet(uri) as file:
                    future.set_result(file.read_row_group(group, columns=[column])[column])
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(error)
            self._drop_oldest()
        return future.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            total = 0
            for number, (key, future) in enumerate(reversed(list(self._held.items()))):
                if future.done() and future.exception() is None:
                    total += future.result().nbytes
                    if number and total > self.most:
                        del self._held[key]


_row_groups = _RowGroups(_HELD)
_reading = Lock()  # of large row groups


def keep_row_groups(most: int) -> None:
    """Keep up to this many bytes of Parquet row groups in memory, for reading images in random order."""
    _row_groups.most = most


@lru_cache(maxsize=64)
def _group_ends(uri: str, mark: object) -> tuple[list[int], list[int]]:
    """For each row group the number of the first row behind it, and its bytes."""
    with open_parquet(uri) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        return list(accumulate(group.num_rows for group in groups)), [group.total_byte_size for group in groups]


def _cell(uri: str, mark: object, column: str, group: int, row: int, size: int) -> Any:
    if size <= _AT_ONCE:
        with suppress(UserError, *PARQUET_ERRORS):  # of a damaged row group, the rows before the damage are read
            return _row_groups.read(uri, mark, column, group)[row].as_py()
    with _reading:
        return _image_group(uri, mark, column, group, size)[row]


def _read_cell(uri: str, column: str, row: int) -> bytes:
    """The image bytes in `column` at `row` of a Parquet file. Raises OSError if they do not exist any more."""
    mark = storage.version(uri)
    try:
        ends, sizes = _group_ends(uri, mark)
        group = bisect_right(ends, row)
        first = ends[group - 1] if group else 0
        images = images_in(_cell(uri, mark, column, group, row - first, sizes[group]))
    except (UserError, KeyError, IndexError, pa.ArrowException) as error:
        raise OSError(f"{uri}: column {column}, row {row}: {error}") from None
    if len(images) != 1 or not isinstance(images[0], bytes):
        raise OSError(f"{uri} has no image bytes in column {column} at row {row}")
    return images[0]


def images_in(value: Any, depth: int = 8) -> list[str | bytes]:
    """The images in a field: names (paths, URLs) or bytes.

    Reads text, in which `data:` and base64 become bytes, objects like Hugging Face's {bytes, path}, and lists of these,
    nested up to `depth`.
    """
    if isinstance(value, str):
        value = value.strip()
        return [inline_image(value) or value] if value else []
    if value is None or value != value:
        return []
    if isinstance(value, bytes):
        return [(inline_image(value.decode("ascii")) if value.isascii() else None) or value]
    if isinstance(value, Mapping):
        fields = (value[key] for key in IMAGE_KEYS if key in value and depth)
        return next((images for field in fields if (images := images_in(field, depth - 1))), [])
    if isinstance(value, (list, tuple)):
        return [image for item in value if depth for image in images_in(item, depth - 1)]
    return [str(value)]


def inline_image(text: str) -> bytes | None:
    """The bytes of an image that is written as a `data:` URI or in base64; None for a name."""
    head, comma, body = text.partition(",")
    if text[:5].lower() == "data:" and comma:
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        return _from_base64(unquote(body))
    return _from_base64(text) if _BASE64.fullmatch(text) else None


def _from_base64(text: str) -> bytes | None:
    """The bytes, from the usual alphabet or that for URLs, with or without padding; None if it is not base64."""
    plain = "".join(text.split()).translate(_FROM_URL).rstrip("=")
    try:
        return b64decode(plain + "=" * (-len(plain) % 4), validate=True) or None
    except ValueError:
        return None
