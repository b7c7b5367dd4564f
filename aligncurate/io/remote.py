"""Files that are read and written through fsspec (s3://, gs://, https://, memory://, …)."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from aligncurate.errors import UserError
from aligncurate.io import retries

Value = TypeVar("Value")

_MOST = 1 << 23  # bytes of one request, which must be there within the time-out
_BUFFER = 1 << 16
_TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")


def request(uri: str, call: Callable[[Any, str], Value], size: int = 0) -> Value:
    """`call(file system, path in it)`, retried. Raises OSError, and UserError for an unknown kind of file system.

    `size`: bytes that it moves; more than 8 MiB get more time.
    """
    return retries.remote(uri, lambda: call(*_filesystem(uri)), patience=max(1.0, size / _MOST))


def _filesystem(uri: str) -> tuple[Any, str]:
    try:  # listings are not kept, since other machines write too
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(uri, use_listings_cache=False))
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri}: {str(error).rstrip('.')}.") from None


def info(uri: str) -> dict[str, Any]:
    """What the file system says of a file or folder."""
    found: dict[str, Any] = request(uri, lambda filesystem, path: filesystem.info(path))
    return found


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder; of web servers, a page that links to files."""
    found = info(uri)
    if not uri.startswith(("http://", "https://")):
        return bool(found["type"] == "directory")
    if not (uri.endswith("/") or found.get("mimetype") == "text/html"):
        return False
    return bool(entries(uri))


def entries(folder: str) -> list[dict[str, Any]]:
    """What is in a folder: `name`, `type`, and what else the file system tells of each."""
    return request(folder, lambda filesystem, path: list(filesystem.ls(path, detail=True)))


def sizes(folder: str) -> dict[str, int]:
    """The names of the files in a folder itself, and their bytes."""
    return {
        entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries(folder) if entry["type"] == "file"
    }


def pin_of(found: dict[str, Any]) -> dict[str, Any]:
    """Of what a file system says of a file, that which tells that it has changed."""
    etag = found.get("ETag") or found.get("etag")
    if etag:
        return {"bytes": found.get("size"), "etag": str(etag).strip('"')}  # listings may lack the quotes
    modified = next((found[name] for name in _TIMES if found.get(name)), None)
    return {"bytes": found.get("size"), "modified": _moment(modified)}


def _moment(time: Any) -> str | None:
    """A time in one form: some file systems list it as a number and say it of one file as a date."""
    if isinstance(time, int | float):
        time = datetime.fromtimestamp(time, UTC)
    return time.astimezone(UTC).isoformat() if isinstance(time, datetime) else time


def pins_in_folders(uris: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The pins of those files that lie, several together, in a folder that can be listed."""
    folders: dict[str, dict[str, str]] = {}
    for uri in uris:
        folder, _, name = uri.rpartition("/")
        if not uri.startswith(("http://", "https://")):  # a page of links has no pins
            folders.setdefault(folder, {})[name] = uri
    found = {}
    for folder, names in folders.items():
        if len(names) > 1:
            try:
                listing = entries(folder)
            except OSError:  # there may be no right to list it; then each file is asked for
                continue
            for entry in listing:
                name = entry["name"].rpartition("/")[2]
                if name in names:
                    found[names[name]] = pin_of(entry)
    return found


def read(uri: str) -> bytes:
    """All bytes of a file. Raises OSError, also if fewer arrive than it has."""
    with open_file(uri) as file:
        return file.read()


def upload(uri: str, file: Path) -> None:
    """Write a copy of a local file. Raises OSError; then nothing has changed, or all of it is there."""
    if uri.startswith(("http://", "https://")):
        raise UserError(f"{uri}: a web server can be read but not written to; use s3://, gs:// or a local folder.")
    request(uri, lambda filesystem, path: filesystem.put_file(str(file), path), size=file.stat().st_size)


def delete(uri: str) -> None:
    """Delete a file. Raises OSError; where there is none, some file systems raise FileNotFoundError."""
    request(uri, lambda filesystem, path: filesystem.rm_file(path))


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, or fewer if the file ends before. Raises OSError."""
    pieces = []
    for start in range(offset, offset + length, _MOST):
        size = min(_MOST, offset + length - start)
        piece = request(uri, lambda filesystem, path: _piece(filesystem, path, start, size))  # noqa: B023, called here
        pieces.append(piece)
        if len(piece) < size:
            break
    return b"".join(pieces)


def _piece(filesystem: Any, path: str, start: int, size: int) -> bytes:
    data: bytes = filesystem.cat_file(path, start=start, end=start + size)
    if len(data) > size:  # a server without ranges sends the whole file
        data = data[start : start + size]
    if len(data) < size and start + size <= (filesystem.info(path).get("size") or 0):
        raise ConnectionError(f"only {len(data)} of {size} bytes arrived")
    return data


class _RemoteFile(io.RawIOBase):
    """A remote file, opened again at the same place after a fault. All its errors are OSErrors."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._position = 0
        self._length: int | None = None
        self._file: Any = request(uri, self._open)

    def _open(self, filesystem: Any, path: str) -> Any:
        file = filesystem.open(path, "rb")
        length = file.size if hasattr(file, "size") else filesystem.info(path).get("size")
        if self._length not in (None, length):
            raise OSError(errno.EINVAL, f"{self._uri}: the file was replaced while it was read")
        self._length = length
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._length is None:
            raise OSError(errno.ESPIPE, f"{self._uri}: the server does not tell its size")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length or 0}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), _MOST)
        data = request(self._uri, lambda filesystem, path: self._read(filesystem, path, wanted))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, filesystem: Any, path: str, wanted: int) -> bytes:
        # Kept only if reading succeeds: after a time-out, the thread that was left behind may still use it.
        file, self._file = self._file or self._open(filesystem, path), None
        if file.tell() != self._position:
            file.seek(self._position)
        data: bytes = file.read(wanted)
        if not data and self._position < (self._length or 0):
            raise ConnectionError(f"the file ended after {self._position} of {self._length} bytes")
        self._file = file
        return data

    def close(self) -> None:
        if not self.closed and self._file is not None:
            with suppress(Exception):
                self._file.close()
        super().close()


def open_file(uri: str) -> BinaryIO:
    """Open for reading. Opening and reading raise OSError."""
    return cast("BinaryIO", io.BufferedReader(_RemoteFile(uri), _BUFFER))
