"""Reading and writing tars.

Reading uses `tarfile`. Writing uses `TarWriter`, which gives the same bytes as `tarfile` but spends a tenth of the time
on a file, because it fills in a prepared header. We do not use webdataset's own writer, which calls `tarfile`: it would
more than halve the speed of `export`. Measured with 20,000 pairs of 50 KiB images, one process, on 2 cores of an Intel
Xeon with AMX, median of three rounds:

    writer                   CPU time   per CPU second   wall time   writer alone, per file
    TarWriter                   1.6 s           630 MB       2.2 s                   2.9 µs
    webdataset.TarWriter        3.9 s           260 MB       4.7 s                  31.9 µs
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO, Protocol

from aligncurate.io import storage

Buffer = bytes | memoryview

_NAME_BYTES = 100  # size of the header's name field
_SIZE_LIMIT = 8**11  # sizes have eleven octal digits


class Sink(Protocol):
    """A file that a tar is written to."""

    def write(self, data: Buffer, /) -> object: ...


class TarWriter:
    """Writes a tar to an open file, one member at a time.

    Time, owner and mode are constant, so the same members always give the same bytes: those of
    `tarfile.open(file, "w")` for members with mode 644 and time 0.
    """

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._size = 0
        self._padding = b""  # after the last member; written together with the next header

    def add(self, name: str, data: Buffer) -> None:
        """Append a file called `name` with the content `data`."""
        head = self._padding + header(name, len(data))
        self._file.write(head)
        self._file.write(data)
        self._size += len(head) + len(data)
        self._padding = bytes(-self._size % tarfile.BLOCKSIZE)

    def end(self) -> None:
        """Write the end marker; the caller closes the file."""
        size = self._size + len(self._padding) + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(size - self._size + -size % tarfile.RECORDSIZE))


def header(name: str, size: int) -> bytes:
    """The header blocks of a file. If one block is not enough for its name and size, `tarfile` makes them."""
    if len(name) > _NAME_BYTES or not name.isascii() or "\0" in name or name.endswith("/") or size >= _SIZE_LIMIT:
        return _slow_header(name, size)
    blank, total = _blank()
    written, digits = name.encode(), b"%011o" % size
    total += sum(written) + sum(digits)
    return b"".join(
        (written.ljust(_NAME_BYTES, b"\0"), blank[100:124], digits, blank[135:148], b"%06o\0 " % total, blank[156:])
    )


@cache
def _blank() -> tuple[bytes, int]:
    """A header without name and size, and the sum of its bytes for the checksum."""
    blank = bytearray(_slow_header("", 0))
    blank[124:135] = bytes(11)
    blank[148:156] = b" " * 8
    return bytes(blank), sum(blank)


def _slow_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def tar_members(file: BinaryIO, uri: str) -> Iterator[tarfile.TarInfo | str]:
    """The members of a tar; if it is damaged, the last item is a message that says how."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, closed below
    except tarfile.ReadError:
        what = "empty (0 bytes)" if storage.size(uri) == 0 else "not a tar"
        yield f"the file is {what}; copy it again"
        return
    with tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:
                yield f"the tar is damaged or truncated ({error}); copy it again"
                return
            if member is None:
                break
            if member.size < 0:  # tarfile would go back and read the same headers in an endless loop
                yield f"the tar is damaged ({member.name} has a negative size); copy it again"
                return
            yield member
        # tarfile treats a damaged header as the end, so check that there is an end marker.
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            yield "the tar has no end marker, so it is damaged or truncated; copy it again"
