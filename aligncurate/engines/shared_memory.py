"""Memory that a worker process and its parent both see, for arrays that are too large for a pipe."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Spec = tuple[tuple[int, ...], str]
"""Shape and dtype of an array."""

_ALIGNED = 64  # bytes; where an array begins


class SharedMemory:
    """A file without a name, in memory on Linux: it is gone with the last process that has it, however that ends.

    It grows as needed. /dev/shm is not used: containers often limit it to 64 MB.

    Args:
        descriptor: of the parent's memory, inherited by the worker; None to make a new one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _new_file() if descriptor is None else descriptor
        self._map = mmap.mmap(-1, 1)
        self._size = 0

    def arrays(self, specs: Sequence[Spec]) -> list[NDArray[np.generic]]:
        """Arrays that lie one after another in this memory; the same specs give the same bytes in both processes."""
        sizes = [int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in specs]
        *begins, end = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
        if end > self._size:
            if os.fstat(self.descriptor).st_size < end:
                os.ftruncate(self.descriptor, end)
            self._map, self._size = mmap.mmap(self.descriptor, end), end  # arrays keep the map that they are in
        return [np.ndarray(shape, dtype, self._map, begin) for begin, (shape, dtype) in zip(begins, specs, strict=True)]

    def close(self) -> None:
        """Give it up; arrays that are in use stay valid."""
        with suppress(OSError):
            os.close(self.descriptor)


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aligncurate")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
