"""Where bytes live: local files and any fsspec URI, read whole or by range."""

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
    """Whether `uri` needs fsspec (s3://, gs://, memory://, …) rather than the local file system."""
    return bool(_SCHEME.match(uri))


def absolute(uri: str) -> str:
    """`uri` in the one form in which it is stored: local paths absolute and without `file://`."""
    uri = uri.removeprefix("file://")
    return uri if is_remote(uri) else os.path.abspath(Path(uri).expanduser())


def join(folder: str, name: str) -> str:
    """`name` below `folder`, for local and remote folders alike."""
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
    """Errors of the block become OSError: every network library has its own, and callers cannot know them all.

    Each has an errno, which tells it from pyarrow's OSErrors about damaged files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, OSError) and (text or not isinstance(error, TimeoutError)):  # fsspec's has no text
            error.errno = error.errno or errno.EIO
            raise
        cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
        fault = OSError(f"{uri}: its file system failed ({cause})")
        fault.errno = errno.EIO
        raise fault from error


@contextmanager
def _remote(uri: str) -> Iterator[tuple[Any, str]]:
    """The file system of `uri` and the path in it. Raises OSError for whatever fails in the block."""
    with _faults(uri):
        yield _filesystem(uri)


class _RemoteFile:
    """A file of a remote file system that raises nothing but OSError."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if not callable(found):
            return found

        def guarded(*args: Any, **options: Any) -> Any:
            with _faults(self._uri):
                return found(*args, **options)

        return guarded

    def __iter__(self) -> Iterator[bytes]:
        with _faults(self._uri):
            yield from self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(uri: str) -> BinaryIO:
    """`uri` opened for reading bytes. Raises OSError, also while it is read."""
    if not is_remote(uri):
        return Path(uri).open("rb")
    with _remote(uri) as (filesystem, path):
        return cast("BinaryIO", _RemoteFile(filesystem.open(path, "rb"), uri))


def size(uri: str) -> int:
    """Bytes in `uri`. Raises OSError."""
    if not is_remote(uri):
        return Path(uri).stat().st_size
    with _remote(uri) as (filesystem, path):
        return int(filesystem.size(path))


def version(uri: str) -> object:
    """Something that changes when a local file is replaced; None for remote files. Raises OSError."""
    if is_remote(uri):
        return None
    stat = os.stat(uri)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def exists(uri: str) -> bool:
    """Whether there is a file or folder. Raises OSError."""
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
    """`length` bytes of `uri` from `offset`. Raises OSError, also when the file ends before."""
    if is_remote(uri):
        with _remote(uri) as (filesystem, path):
            data = cast("bytes", filesystem.cat_file(path, start=offset, end=offset + length))
    else:
        descriptor = _descriptor(uri)  # held by name: the cache may let go of it while it is read from
        data = os.pread(descriptor.number, length, offset)
    _check_length(uri, offset, len(data), length)
    return data


def read_into(uri: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with bytes of `uri` from `offset`. Raises OSError, also when the file ends before."""
    if is_remote(uri):
        buffer[:] = read_range(uri, offset, len(buffer))
        return
    descriptor = _descriptor(uri)
    _check_length(uri, offset, os.preadv(descriptor.number, [buffer], offset), len(buffer))


def _check_length(uri: str, offset: int, found: int, length: int) -> None:
    if found != length:
        raise OSError(f"{uri} ends after {found} of the {length} bytes at offset {offset}")


class _Descriptor:
    """A file descriptor that closes itself when the cache lets go of it."""

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
    # Keyed by version, so that a file that was replaced is not read through its old descriptor.
    mark = version(path)
    with _lock:
        return _cached_descriptor(path, mark)


def is_folder(uri: str) -> bool:
    if not is_remote(uri):
        return Path(uri).is_dir()
    with _remote(uri) as (filesystem, path):
        return bool(filesystem.isdir(path))


def has_folders(folder: str) -> bool:
    """Whether a local folder holds folders."""
    return not is_remote(folder) and any(p.is_dir() for p in Path(folder).iterdir())


def list_files(folder: str) -> list[str]:
    """The files directly in `folder`, sorted by name; hidden ones are left out."""
    if not is_remote(folder):
        names = sorted(p.name for p in Path(folder).iterdir() if p.is_file())
    else:
        with _remote(folder) as (filesystem, path):
            entries = filesystem.ls(path, detail=True)
        names = sorted(basename(e["name"]) for e in entries if e["type"] == "file")
    return [join(folder, name) for name in names if not name.startswith((".", "_"))]


def expand(pattern: str) -> list[str]:
    """The files or the one folder that `pattern` names.

    Braces (`{00000..00099}.tar`) expand in order, `*` and `?` to sorted names. Raises UserError for what
    is not there.
    """
    pattern = absolute(pattern)
    if exists(pattern):
        return [pattern]
    found: list[str] = []
    try:
        uris = list(braceexpand(pattern))
    except ValueError:  # unbalanced braces are part of the name
        uris = [pattern]
    for uri in uris:
        if "*" in uri or "?" in uri:
            with _remote(uri) as (filesystem, path):
                matches = sorted(filesystem.glob(path))
            if not matches:
                raise UserError(f"{uri}: no file matches this pattern.")
            remote = is_remote(uri)
            found += [filesystem.unstrip_protocol(m) if remote else m for m in matches]
        elif exists(uri):
            found.append(uri)
        else:
            raise UserError(f"{uri}: there is no such file or folder{_nearby(uri)}.")
    return found


def _nearby(uri: str) -> str:
    """A hint at the file that was probably meant."""
    from difflib import get_close_matches

    if is_remote(uri) or not Path(parent(uri)).is_dir():
        return ""
    close = get_close_matches(basename(uri), os.listdir(parent(uri)), n=1)
    return f"; did you mean {join(parent(uri), close[0])}" if close else ""
