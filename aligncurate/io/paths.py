"""Paths of files and folders, local or behind an fsspec URI (s3://, gs://, …), with one interface: that of pathlib."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from aligncurate.io import remote


class RemotePath:
    """A file or folder that is reached through fsspec; the part of pathlib's `Path` that datasets and exports need.

    Every request is retried. All errors are OSErrors. Folders of an object store begin to exist with their first file.
    """

    __slots__ = ("uri",)

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"RemotePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri}/{name}")

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rpartition("/")[0])

    @property
    def scheme(self) -> str:
        """The kind of store, such as `s3`."""
        return self.uri.partition(":")[0]

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def exists(self) -> bool:
        """Whether there is such a file or folder: False only if that is certain."""
        with suppress(FileNotFoundError):
            remote.info(self.uri)
            return True
        return False

    def is_file(self) -> bool:
        with suppress(FileNotFoundError):
            return bool(remote.info(self.uri)["type"] == "file")
        return False

    def is_dir(self) -> bool:
        with suppress(FileNotFoundError):
            return remote.is_folder(self.uri)
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        for entry in remote.entries(self.uri):
            name = entry["name"].rstrip("/")
            if entry["type"] == "file" and self.uri.endswith(name):  # an object store lists a file as itself
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.uri)
            yield self / name.rpartition("/")[2]

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: writing a file makes its folders."""

    def read_bytes(self) -> bytes:
        return remote.read(self.uri)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_from(self, file: Path) -> None:
        """Make this a copy of a local file, at once: until it is whole, there is the old file or none."""
        remote.upload(self.uri, file)

    def copy_from(self, file: RemotePath) -> None:
        """Make this a copy of a file in the same store, which makes it, at once."""
        remote.copy(file.uri, self.uri)

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            remote.delete(self.uri)
        except FileNotFoundError:
            if not missing_ok:
                raise


AnyPath = Path | RemotePath


def identity(path: AnyPath) -> str:
    """Text that is equal for two paths of one folder: links are followed."""
    return str(path) if isinstance(path, RemotePath) else os.path.realpath(path)


def names(folder: AnyPath) -> list[str]:
    """What is in a folder, sorted; nothing if it does not exist."""
    with suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir())
    return []


def sizes(folder: AnyPath) -> dict[str, int]:
    """The names of the files in a folder itself, and their bytes, with one listing; none if it does not exist."""
    try:
        if isinstance(folder, RemotePath):
            return remote.sizes(folder.uri)
        with os.scandir(folder) as entries:
            found = {}
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted since
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
            return found
    except FileNotFoundError:
        return {}
