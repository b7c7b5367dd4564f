"""Access to local files and any fsspec URI: list, open, read whole or by range; transient faults are retried."""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from aligncurate.errors import UserError
from aligncurate.io import remote, retries
from aligncurate.io.files import check_name

MAX_IMAGE_BYTES = 1 << 29
"""Of an image's file; a larger one is not read."""

_AT_ONCE = 32  # requests

_HUB_CACHE = re.compile(r"/(?:models|datasets|spaces)--[^/]+/snapshots/")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_remote(uri: str) -> bool:
    """Whether `uri` is read through fsspec (s3://, gs://, memory://, …) and not the local file system."""
    return bool(_SCHEME.match(uri))


def absolute(uri: str) -> str:
    """`uri` in the form that datasets store: local paths are absolute and have no `file://`.

    Raises UserError for a name that is not UTF-8.
    """
    uri = uri.removeprefix("file://")
    return check_name(uri if is_remote(uri) else os.path.abspath(Path(uri).expanduser()))


def join(folder: str, name: str) -> str:
    """The file `name` in `folder`, local or remote."""
    return f"{folder.rstrip('/')}/{name}"


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    return uri.rstrip("/").rpartition("/")[0] or "/"


def basename(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


class TooLargeError(OSError):
    """A file has more bytes than its reader takes; it was not read."""


class _LocalFile(io.FileIO):
    """A regular file whose reads are retried when a disk or network mount fails for a moment."""

    def __init__(self, path: str) -> None:
        retries.local(lambda: super(_LocalFile, self).__init__(path, "rb", opener=_open_regular))

    def readinto(self, buffer: Any) -> int | None:
        return retries.local(lambda: super(_LocalFile, self).readinto(buffer))

    def readall(self) -> bytes:
        return retries.local(lambda: super(_LocalFile, self).readall())


def _open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Raises OSError for a pipe, device, socket or folder, and waits for none."""
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced since
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "this is a pipe, device or socket, not a file", path)


def open_file(uri: str) -> BinaryIO:
    """Open `uri`, a regular file, for reading bytes. Opening and reading raise OSError."""
    return remote.open_file(uri) if is_remote(uri) else io.BufferedReader(_LocalFile(uri))


@contextmanager
def open_for_arrow(uri: str) -> Iterator[str | BinaryIO]:
    """What Arrow reads a file from: its path, or an open file."""
    if not is_remote(uri):
        yield uri
        return
    with remote.open_file(uri) as file:
        yield file


def size(uri: str) -> int:
    """Size of `uri` in bytes. Raises OSError."""
    if not is_remote(uri):
        return retries.local(lambda: os.stat(uri).st_size)
    found = remote.info(uri).get("size")
    if found is None:
        raise OSError(errno.ESPIPE, f"{uri}: the server does not tell its size")
    return int(found)


def pin(uri: str) -> dict[str, Any]:
    """What tells that a file or folder has changed, as it is now. Raises OSError.

    Locally `bytes`, `mtime_ns` and `inode`; remotely `bytes` and `etag`, or `modified` where there is no ETag.
    """
    if is_remote(uri):
        return remote.pin_of(remote.info(uri))
    found = retries.local(lambda: os.stat(uri))
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def pins(uris: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """`pin` of many files, None for those that are absent or cannot be looked at now.

    Remote folders that can be listed are listed once; other remote files are asked for several at a time.
    """
    listed = remote.pins_in_folders([uri for uri in uris if is_remote(uri)])

    def look(uri: str) -> dict[str, Any] | None:
        if uri in listed:
            return listed[uri]
        try:
            return pin(uri)
        except (OSError, ValueError):
            return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        remaining = pool.map(look, uris) if any(map(is_remote, uris)) else map(look, uris)
        return dict(zip(uris, remaining, strict=True))


def version(uri: str) -> object:
    """A value that changes when a local file is replaced; None for remote files. Raises OSError."""
    if is_remote(uri):
        return None
    found = retries.local(lambda: os.stat(uri))
    return found.st_ino, found.st_size, found.st_mtime_ns


def exists(uri: str) -> bool:
    """Whether `uri` is a file or folder: False only if that is certain. Raises OSError."""
    try:
        if is_remote(uri):
            remote.info(uri)
        else:
            retries.local(lambda: os.stat(uri))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and not is_remote(uri):
            return False
        raise
    except ValueError:  # an impossible name
        return False
    return True


def read(uri: str, most: int | None = None) -> bytes:
    """All bytes of `uri`. Raises OSError, and TooLargeError instead of reading more than `most` bytes."""
    with open_file(uri) as file:
        if most is None:
            return file.read()
        data = file.read(most + 1) if _end(file) <= most else None
    if data is None or len(data) > most:
        raise TooLargeError(f"{uri} has more bytes than the limit of {most:,}")
    return data


def _end(file: BinaryIO) -> int:
    """The size of an open file; 0 if a server does not tell it."""
    try:
        end = file.seek(0, io.SEEK_END)
    except OSError:
        return 0
    file.seek(0)
    return end


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes of `uri` from `offset`. Raises OSError, also if the file is too short."""
    if is_remote(uri):
        data = remote.read_range(uri, offset, length)
    else:
        descriptor = _descriptor(uri)  # the variable keeps it open, even if the cache drops it meanwhile
        # A damaged file may claim any length, and memory is taken before reading.
        length_there = min(length, max(0, os.fstat(descriptor.number).st_size - offset))
        data = retries.local(lambda: os.pread(descriptor.number, length_there, offset))
    _check_length(uri, offset, len(data), length)
    return data


def read_into(uri: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with bytes of `uri` from `offset`. Raises OSError, also if the file is too short."""
    if is_remote(uri):
        buffer[:] = read_range(uri, offset, len(buffer))
        return
    descriptor = _descriptor(uri)
    done = retries.local(lambda: os.preadv(descriptor.number, [buffer], offset))
    _check_length(uri, offset, done, len(buffer))


def _check_length(uri: str, offset: int, read: int, length: int) -> None:
    if read != length:
        raise OSError(errno.ENODATA, f"{uri} ends after {read} of the {length} bytes at offset {offset}")


class _Descriptor:
    """A file descriptor that is closed once the cache and all readers have dropped it."""

    def __init__(self, path: str) -> None:
        self.number = retries.local(lambda: _open_regular(path))

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


def leads_out(path: str, folders: Iterable[str]) -> bool:
    """Whether a local path, with its links resolved, lies in none of the folders.

    The links of a Hugging Face cache, from `snapshots` to `blobs` of the same repository, stay inside.
    """
    real = os.path.realpath(path)
    roots = [os.path.realpath(folder) for folder in folders if not is_remote(folder)]
    roots += [root.partition("/snapshots/")[0] for root in roots if _HUB_CACHE.search(root)]
    return not any(real == root or real.startswith(f"{root.rstrip('/')}/") for root in roots)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder. Raises OSError."""
    try:
        return remote.is_folder(uri) if is_remote(uri) else stat.S_ISDIR(retries.local(lambda: os.stat(uri)).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def list_files(folder: str) -> list[str]:
    """The files in `folder` itself, sorted by name, without those that begin with a dot or underscore."""
    if not is_remote(folder):
        names = [p.name for p in retries.local(lambda: list(Path(folder).iterdir())) if p.is_file()]
    else:
        names = [basename(entry["name"]) for entry in remote.entries(folder) if entry["type"] == "file"]
    return _visible(folder, names)


def list_folders(folder: str) -> list[str]:
    """The folders in `folder` itself, sorted by name, without those that begin with a dot or underscore."""
    if not is_remote(folder):
        names = [p.name for p in retries.local(lambda: list(Path(folder).iterdir())) if p.is_dir()]
    else:
        names = [basename(entry["name"]) for entry in remote.entries(folder) if entry["type"] == "directory"]
    return _visible(folder, names)


def _visible(folder: str, names: Iterable[str]) -> list[str]:
    return [join(folder, name) for name in sorted(names) if not name.startswith((".", "_"))]


def expand(pattern: str) -> list[str]:
    """The files that match `pattern`, or the one folder.

    Braces (`{00000..00099}.tar`) expand in order, `*` and `?` to sorted names. Remote names from braces are trusted:
    one that does not exist is reported when it is read, instead of asking for each of many.

    Raises:
        UserError: nothing matches, or an expanded name does not exist.
        OSError: it cannot be found out now.
    """
    pattern = absolute(pattern)
    try:
        uris = list(braceexpand(pattern))
    except ValueError:  # unbalanced braces are taken literally
        uris = [pattern]
    if (len(uris) == 1 or not is_remote(pattern)) and exists(pattern):
        return [pattern]
    files: list[str] = []
    for uri in uris:
        if _is_wildcard(uri):
            matches = _matches(uri)
            if not matches:
                raise UserError(f"{uri}: no file matches.")
            files += matches
        elif (is_remote(uri) and len(uris) > 1) or exists(uri):
            files.append(uri)
        else:
            raise UserError(f"{uri}: there is no such file or folder{_nearby(uri)}")
    return files


def _is_wildcard(uri: str) -> bool:
    return "*" in uri or "?" in uri


def _matches(pattern: str) -> list[str]:
    """The files and folders that match a wildcard, sorted. Raises OSError, where fsspec's `glob` leaves out files."""
    if "**" in pattern:
        return remote.glob(pattern) if is_remote(pattern) else sorted(fsspec.filesystem("file").glob(pattern))
    folder, _, name = pattern.rpartition("/")
    matches = re.compile(fnmatch.translate(name)).match
    found = []
    for parent_folder in _matches(folder) if _is_wildcard(folder) else [folder or "/"]:
        try:
            names = _names_in(parent_folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found += [join(parent_folder, entry) for entry in sorted(names) if matches(entry)]
    return found


def _names_in(folder: str) -> list[str]:
    if is_remote(folder):
        return [basename(entry["name"]) for entry in remote.entries(folder)]
    return retries.local(lambda: os.listdir(folder))


def _nearby(uri: str) -> str:
    """The end of a message: a similar name in the same folder, if there is one."""
    from difflib import get_close_matches

    if is_remote(uri) or not Path(parent(uri)).is_dir():
        return "."
    close = get_close_matches(basename(uri), os.listdir(parent(uri)), n=1)
    return f"; did you mean {join(parent(uri), close[0])}?" if close else "."
