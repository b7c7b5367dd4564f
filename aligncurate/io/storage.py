"""Access to local files and any fsspec URI: list, open, read whole or by range."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Self, cast

import fsspec
from braceexpand import braceexpand

from aligncurate.errors import UserError

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_remote(uri: str) -> bool:
    """Whether `uri` is read through fsspec (s3://, gs://, memory://, …) and not the local file system."""
    return bool(_SCHEME.match(uri))


def absolute(uri: str) -> str:
    """`uri` in the form that datasets store: local paths are absolute and have no `file://`."""
    uri = uri.removeprefix("file://")
    return uri if is_remote(uri) else os.path.abspath(Path(uri).expanduser())


def join(folder: str, name: str) -> str:
    """The file `name` in `folder`, local or remote."""
    return f"{folder.rstrip('/')}/{name}"


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    return uri.rstrip("/").rpartition("/")[0] or "/"


def basename(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(uri))
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri}: {str(error).rstrip('.')}.") from None


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Turn errors of the block into OSError, so that callers need not know the exceptions of every network library.

    All get an errno, because pyarrow raises OSError without one for damaged files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, OSError) and (text or not isinstance(error, TimeoutError)):  # that of fsspec has no text
            error.errno = error.errno or errno.EIO
            raise
        cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
        fault = OSError(f"{uri}: its file system failed ({cause})")
        fault.errno = errno.EIO
        raise fault from error


@contextmanager
def _remote(uri: str) -> Iterator[tuple[Any, str]]:
    """The file system of `uri` and the path in it. Any error in the block becomes OSError."""
    with _faults(uri):
        yield _filesystem(uri)


class _RemoteFile:
    """A remote file whose errors are all OSErrors."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._file, name)
        if not callable(attribute):
            return attribute

        def guarded(*args: Any, **options: Any) -> Any:
            with _faults(self._uri):
                return attribute(*args, **options)

        return guarded

    def __iter__(self) -> Iterator[bytes]:
        with _faults(self._uri):
            yield from self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(uri: str) -> BinaryIO:
    """Open `uri` for reading bytes. Opening and reading raise OSError."""
    if not is_remote(uri):
        return Path(uri).open("rb")
    with _remote(uri) as (filesystem, path):
        return cast("BinaryIO", _RemoteFile(filesystem.open(path, "rb"), uri))


def size(uri: str) -> int:
    """Size of `uri` in bytes. Raises OSError."""
    if not is_remote(uri):
        return Path(uri).stat().st_size
    with _remote(uri) as (filesystem, path):
        return int(filesystem.size(path))


def version(uri: str) -> object:
    """A value that changes when a local file is replaced; None for remote files. Raises OSError."""
    if is_remote(uri):
        return None
    stat = os.stat(uri)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def exists(uri: str) -> bool:
    """Whether `uri` is a file or folder. Raises OSError."""
    if not is_remote(uri):
        try:
            return Path(uri).exists()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise
    with _remote(uri) as (filesystem, path):
        return bool(filesystem.exists(path))


def read(uri: str) -> bytes:
    """All bytes of `uri`. Raises OSError."""
    with open_file(uri) as file:
        return file.read()


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes of `uri` from `offset`. Raises OSError, also if the file is too short."""
    if is_remote(uri):
        with _remote(uri) as (filesystem, path):
            data = cast("bytes", filesystem.cat_file(path, start=offset, end=offset + length))
    else:
        descriptor = _descriptor(uri)  # the variable keeps it open, even if the cache drops it meanwhile
        data = os.pread(descriptor.number, length, offset)
    _check_length(uri, offset, len(data), length)
    return data


def read_into(uri: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with bytes of `uri` from `offset`. Raises OSError, also if the file is too short."""
    if is_remote(uri):
        buffer[:] = read_range(uri, offset, len(buffer))
        return
    descriptor = _descriptor(uri)
    _check_length(uri, offset, os.preadv(descriptor.number, [buffer], offset), len(buffer))


def _check_length(uri: str, offset: int, read: int, length: int) -> None:
    if read != length:
        raise OSError(f"{uri} ends after {read} of the {length} bytes at offset {offset}")


class _Descriptor:
    """A file descriptor that is closed once the cache and all readers have dropped it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_lock = Lock()


@lru_cache(maxsize=64)
def _cached_descriptor(path: str, mark: object) -> _Descriptor:
    return _Descriptor(path)


def _descriptor(path: str) -> _Descriptor:
    # The version is part of the key, so that a replaced file is not read through its old descriptor.
    mark = version(path)
    with _lock:
        return _cached_descriptor(path, mark)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder. Raises OSError."""
    if not is_remote(uri):
        return Path(uri).is_dir()
    with _remote(uri) as (filesystem, path):
        return bool(filesystem.isdir(path))


def list_files(folder: str) -> list[str]:
    """The files in `folder` itself, sorted by name, without those that begin with a dot or underscore."""
    if not is_remote(folder):
        names = sorted(p.name for p in Path(folder).iterdir() if p.is_file())
    else:
        with _remote(folder) as (filesystem, path):
            entries = filesystem.ls(path, detail=True)
        names = sorted(basename(e["name"]) for e in entries if e["type"] == "file")
    return [join(folder, name) for name in names if not name.startswith((".", "_"))]


def list_folders(folder: str) -> list[str]:
    """The folders in `folder` itself, sorted by name, without those that begin with a dot or underscore."""
    if not is_remote(folder):
        names = sorted(p.name for p in Path(folder).iterdir() if p.is_dir())
    else:
        with _remote(folder) as (filesystem, path):
            entries = filesystem.ls(path, detail=True)
        names = sorted(basename(e["name"]) for e in entries if e["type"] == "directory")
    return [join(folder, name) for name in names if not name.startswith((".", "_"))]


def expand(pattern: str) -> list[str]:
    """The files that match `pattern`, or the one folder.

    Braces (`{00000..00099}.tar`) expand in order, `*` and `?` to sorted names.

    Raises:
        UserError: nothing matches, or an expanded name does not exist.
    """
    pattern = absolute(pattern)
    if exists(pattern):
        return [pattern]
    files: list[str] = []
    try:
        uris = list(braceexpand(pattern))
    except ValueError:  # unbalanced braces are taken literally
        uris = [pattern]
    for uri in uris:
        if "*" in uri or "?" in uri:
            with _remote(uri) as (filesystem, path):
                matches = sorted(filesystem.glob(path))
            if not matches:
                raise UserError(f"{uri}: no file matches.")
            remote = is_remote(uri)
            files += [filesystem.unstrip_protocol(m) if remote else m for m in matches]
        elif exists(uri):
            files.append(uri)
        else:
            raise UserError(f"{uri}: there is no such file or folder{_nearby(uri)}")
    return files


def _nearby(uri: str) -> str:
    """The end of a message: a similar name in the same folder, if there is one."""
    from difflib import get_close_matches

    if is_remote(uri) or not Path(parent(uri)).is_dir():
        return "."
    close = get_close_matches(basename(uri), os.listdir(parent(uri)), n=1)
    return f"; did you mean {join(parent(uri), close[0])}?" if close else "."
