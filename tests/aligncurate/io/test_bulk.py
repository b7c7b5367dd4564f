"""Large files written beside the caller, against plain writing; disks that refuse, end or fill up."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligncurate.io import bulk
from aligncurate.io.bulk import BulkFile

SIZE = 1 << 14


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch) -> None:
    monkeypatch.setattr(bulk, "_SIZE", SIZE)


def write(path: Path, pieces: list[bytes]) -> bytes:
    with BulkFile(path) as file:
        for piece in pieces:
            file.write(piece)
    return path.read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * SIZE) | st.sampled_from([4096, SIZE - 1, SIZE, SIZE + 1]), max_size=8))
def test_the_file_holds_what_was_written(tmp_path_factory, sizes) -> None:
    data = os.urandom(sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [data[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    assert write(tmp_path_factory.mktemp("bulk") / "file", pieces) == data


def test_memory_may_be_used_again_at_once(tmp_path) -> None:
    piece = bytearray(SIZE // 2)
    with BulkFile(tmp_path / "file") as file:
        for value in range(9):
            piece[:] = bytes([value]) * len(piece)
            file.write(memoryview(piece))
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([v]) * len(piece) for v in range(9))


@pytest.mark.skipif(not bulk._DIRECT, reason="this system has no direct writes")
@pytest.mark.parametrize("refused", ["open", "write"])
def test_file_systems_without_direct_writes(tmp_path, monkeypatch, refused) -> None:
    real_open, real_write = os.open, os.write
    refusals = []

    def refuse(flags: int) -> None:
        if flags & bulk._DIRECT:
            refusals.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")

    def opened(path, flags, *rest, **named):
        if refused == "open":
            refuse(flags)
        return real_open(path, flags, *rest, **named)

    def written(file, data):
        if refused == "write":
            refuse(bulk.fcntl.fcntl(file, bulk.fcntl.F_GETFL))
        return real_write(file, data)

    monkeypatch.setattr(bulk.os, "open", opened)
    monkeypatch.setattr(bulk.os, "write", written)
    data = os.urandom(5 * SIZE + 77)
    assert write(tmp_path / "file", [data]) == data
    assert len(refusals) == 1


def test_writes_that_are_cut_short_go_on(tmp_path, monkeypatch) -> None:
    real = os.write
    monkeypatch.setattr(bulk.os, "write", lambda file, data: real(file, data[: max(1, len(data) // 2)]))
    data = os.urandom(3 * SIZE + 5)
    assert write(tmp_path / "file", [data]) == data


def test_a_full_disk_is_told(tmp_path, monkeypatch) -> None:
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bulk.os, "write", full)
    with pytest.raises(OSError, match="No space left"), BulkFile(tmp_path / "file") as file:
        for _ in range(100):
            file.write(bytes(SIZE))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "other", [b"a few bytes"])


def test_an_error_of_the_caller_is_the_one_that_counts(tmp_path) -> None:
    with pytest.raises(KeyError, match="mine"), BulkFile(tmp_path / "file") as file:
        file.write(bytes(3 * SIZE))
        raise KeyError("mine")
