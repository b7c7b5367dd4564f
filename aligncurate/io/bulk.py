"""Writes large files at the disk's speed, while the caller prepares what comes next."""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

_SIZE = 1 << 22  # bytes of a buffer
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class BulkFile:
    """A new file that is written past the system's cache, by a thread of its own.

    The cache would have every byte copied once more, page by page, and would push out of memory what is needed more
    than a file that is done with. Where the file system cannot do without it, it is used. Use as a context manager;
    leaving it writes what is left, but does not sync. Errors of the disk (OSError) come from a later `write`, or then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._file = _open(self._path)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._writing: Future[None] | None = None
        # Two, so that one is filled while the other is written. Direct writes want memory that begins at a page.
        self._buffer, self._other = mmap.mmap(-1, _SIZE), mmap.mmap(-1, _SIZE)
        self._filled = 0
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which may change afterwards."""
        size = len(data)
        if size <= _SIZE - self._filled:
            self._buffer[self._filled : self._filled + size] = data
            self._filled += size
            return
        view = memoryview(data)
        while view:
            taken = view[: _SIZE - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == _SIZE:
                self._wait()
                self._writing = self._writer.submit(_write_all, self._file, self._buffer)
                self._buffer, self._other = self._other, self._buffer
                self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
                _use_cache(self._file)  # the last bytes are no whole pages
                _write_all(self._file, memoryview(self._buffer)[: self._filled])
        finally:
            self._writer.shutdown()
            os.close(self._file)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if not _DIRECT or error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _use_cache(file: int) -> None:
    if _DIRECT:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)


def _write_all(file: int, data: mmap.mmap | memoryview) -> None:
    left = memoryview(data)
    while left:
        try:
            written = os.write(file, left)
        except OSError as error:
            # Some file systems let a file be opened so, and then want other sizes than pages.
            if error.errno != errno.EINVAL or not _DIRECT or not fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT:
                raise
            _use_cache(file)
            continue
        left = left[written:]
        if left:  # cut short by a full disk or a signal: what is left need not begin at a page
            _use_cache(file)
