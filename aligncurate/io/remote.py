"""Files that are read and written through fsspec (s3://, gs://, https://, memory://, …)."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.asyn import AsyncFileSystem

from aligncurate.errors import UserError
from aligncurate.io import retries
from aligncurate.io.daemons import in_thread

_MOST = 1 << 23  # bytes of one request, which must be there within the time-out
_FIRST = 1 << 18  # bytes of a file's first request, and after a jump; they double while it is read in order
_GAP = 1 << 20  # bytes that may be left out when a file is read in order
_UNKNOWN = 1 << 30  # bytes, in place of a size that the server does not tell
_BUFFER = 1 << 16
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")


def request(
    uri: str,
    method: str,
    *before: Any,
    size: int = 0,
    check: Callable[[Any], None] = lambda answer: None,
    **options: Any,
) -> Any:
    """What a method of the file system of `uri` answers, retried.

    Args:
        uri: a file or folder.
        method: its name, such as `cat_file`.
        before: arguments that come before the path.
        size: bytes that are moved; more than 8 MiB get more time.
        check: raises an error for an answer that is not whole.
        options: further arguments.

    Raises OSError, and UserError for an unknown kind of file system.
    """

    def begin() -> Future[Any]:
        filesystem, path = _filesystem(uri)
        if isinstance(filesystem, AsyncFileSystem):
            asked = getattr(filesystem, f"_{method}")(*before, path, **options)
            return asyncio.run_coroutine_threadsafe(asked, filesystem.loop)
        return in_thread(lambda: getattr(filesystem, method)(*before, path, **options))

    return retries.remote(uri, begin, patience=max(1.0, size / _MOST), check=check)


def _filesystem(uri: str) -> tuple[Any, str]:
    try:  # listings are not kept, since other machines write too
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(uri, use_listings_cache=False))
    except ImportError as error:
        scheme = uri.partition(":")[0]
        if scheme in _EXTRAS:
            raise UserError(
                f"{uri}: {scheme}:// needs a package that is not installed; install aligncurate[{_EXTRAS[scheme]}]."
            ) from None
        raise UserError(f"{uri}: {str(error).rstrip('.')}.") from None
    except ValueError as error:
        raise UserError(f"{uri}: {str(error).rstrip('.')}.") from None


def info(uri: str) -> dict[str, Any]:
    """What the file system says of a file or folder."""
    found: dict[str, Any] = request(uri, "info")
    return found


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder; of web servers, a page that links to files."""
    found = info(uri)
    if not _is_web(uri):
        return bool(found["type"] == "directory")
    if not (uri.endswith("/") or found.get("mimetype") == "text/html"):
        return False
    return bool(entries(uri))


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def entries(folder: str) -> list[dict[str, Any]]:
    """What is in a folder: `name`, `type`, and what else the file system tells of each."""
    return list(request(folder, "ls", detail=True))


def sizes(folder: str) -> dict[str, int]:
    """The names of the files in a folder itself, and their bytes."""
    return {
        entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries(folder) if entry["type"] == "file"
    }


def glob(pattern: str) -> list[str]:
    """The files and folders that match a pattern with `**`, sorted."""
    filesystem, _ = _filesystem(pattern)
    return sorted(filesystem.unstrip_protocol(match) for match in request(pattern, "glob"))


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
        if not _is_web(uri):  # a page of links has no pins
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
    try:
        data = _read_piece(uri, 0, _FIRST)  # before its size is asked for: there may be no such file
    except OSError as error:
        if error.errno == errno.EINVAL and info(uri).get("size") == 0:  # of an empty file, no range can be read
            return b""
        raise
    if len(data) < _FIRST:
        return data
    with open_file(uri) as file:
        return file.read()


def upload(uri: str, file: Path) -> None:
    """Write a copy of a local file. Raises OSError; then nothing has changed, or all of it is there."""
    if _is_web(uri):
        raise UserError(f"{uri}: a web server can be read but not written to; use s3://, gs:// or a local folder.")
    request(uri, "put_file", str(file), size=file.stat().st_size)


def copy(source: str, uri: str) -> None:
    """Make `uri` a copy of `source`, which is in the same store. Raises OSError."""
    request(uri, "cp_file", _filesystem(source)[1], size=info(source).get("size") or 0)


def delete(uri: str) -> None:
    """Delete a file. Raises OSError; where there is none, some file systems raise FileNotFoundError."""
    request(uri, "rm_file")


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, or fewer if the file ends before; 8 MiB at a time, together. Raises OSError."""
    starts = range(offset, offset + length, _MOST)
    pieces = [(start, min(_MOST, offset + length - start)) for start in starts]
    others = [in_thread(partial(_read_piece, uri, start, size)) for start, size in pieces[1:]]
    return b"".join([_read_piece(uri, start, size) for start, size in pieces[:1]] + [each.result() for each in others])


def _read_piece(uri: str, start: int, size: int, end: int | None = None) -> bytes:
    """One request for `size` bytes from `start`; `end` is the file's size, if known."""

    def check(data: bytes) -> None:
        if len(data) < size and start + len(data) < min(start + size, end or info(uri).get("size") or 0):
            raise ConnectionError(f"only {len(data)} of {size} bytes arrived")

    data: bytes = request(uri, "cat_file", start=start, end=start + size, size=size, check=check)
    if len(data) <= size:
        return data
    return data[start : start + size]  # a server without ranges sends the whole file


class _RemoteFile(io.RawIOBase):
    """A remote file, read in blocks: while one of them is used, the next is on its way. All its errors are OSErrors.

    Of a server that has no ranges or does not tell the size, the whole file is copied to a temporary one first.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._copy: BinaryIO | None = None  # there for `close`, which is called even if opening fails
        self._next: tuple[int, int, Future[bytes]] | None = None  # start, size
        found = info(uri)
        if found.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
        self._size: int = found.get("size") or 0
        if found.get("size") is None or found.get("partial") is False:
            self._copy = self._copied(found.get("size"))
        self._position = self._start = 0
        self._block = b""
        self._step = _FIRST

    def _copied(self, size: int | None) -> BinaryIO:
        copy = TemporaryFile()  # noqa: SIM115, closed with this file

        def check(_: object) -> None:
            if size is not None and os.path.getsize(name) != size:
                raise ConnectionError(f"only {os.path.getsize(name)} of {size} bytes arrived")

        with TemporaryDirectory(prefix="aligncurate-") as folder:
            name = f"{folder}/copy"
            request(self._uri, "get_file", lpath=name, size=size or _UNKNOWN, check=check)
            with open(name, "rb") as file:
                shutil.copyfileobj(file, copy)
        self._size = copy.tell()
        return copy

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        if self._copy is not None:
            data = os.pread(self._copy.fileno(), wanted, self._position)
        else:
            if not self._start <= self._position < self._start + len(self._block):
                self._load(wanted)
            begin = self._position - self._start
            data = self._block[begin : begin + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self, wanted: int) -> None:
        """Read the block that begins at the position, or the one on its way that holds it."""
        in_order = bool(self._block) and 0 <= self._position - self._start - len(self._block) <= _GAP
        self._step = min(2 * self._step, _MOST) if in_order else _FIRST
        self._block = b""
        start, size, ahead = self._next or (0, 0, None)
        self._next = None
        if ahead is not None and start <= self._position < start + size:
            self._start, self._block = start, ahead.result()
        else:
            self._start = 0 if self._size <= _FIRST else self._position
            self._block = self._piece(self._start, max(wanted, self._step))
        end = self._start + len(self._block)
        if in_order and end < self._size:
            size = min(self._step, self._size - end)
            self._next = end, size, in_thread(partial(self._piece, end, size))

    def _piece(self, start: int, wanted: int) -> bytes:
        size = min(wanted, _MOST, self._size - start)
        try:
            data = _read_piece(self._uri, start, size, self._size)
        except OSError:
            if info(self._uri).get("size") != self._size:
                raise OSError(errno.EINVAL, f"{self._uri}: the file was replaced while it was read") from None
            raise
        return data

    def close(self) -> None:
        self._next = None
        if self._copy is not None:
            self._copy.close()
        super().close()


def open_file(uri: str) -> BinaryIO:
    """Open for reading. Opening and reading raise OSError."""
    return cast("BinaryIO", io.BufferedReader(_RemoteFile(uri), _BUFFER))
