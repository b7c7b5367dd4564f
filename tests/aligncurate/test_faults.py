"""Failing remote file systems, file systems without locks, and dying worker processes."""

from __future__ import annotations

import errno
import fcntl
import io
import subprocess
import sys
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractFileSystem

import aligncurate
from aligncurate.errors import UserError, WorkerError
from aligncurate.io import files, storage
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.export import export as exporting
from tests.support.inputs import cli, complaint, jpeg, pairs, write_tar


class _Breaking(io.BytesIO):
    """A file that raises an error when a byte in `lost` is read."""

    lost = range(600, sys.maxsize)

    def read(self, size: int | None = -1) -> bytes:
        end = sys.maxsize if size is None or size < 0 else self.tell() + size
        if self.tell() < self.lost.stop and end > self.lost.start:
            raise RuntimeError("connection\nlost.")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        raise RuntimeError("connection\nlost.")

    __next__ = readline  # type: ignore[assignment]


class _Faulty(AbstractFileSystem):
    """Raises errors that are not OSErrors: for `open…` when the file is read, for other names at once."""

    protocol = "faulty"
    content = b""

    def _open(self, path: str, *_: Any, **__: Any) -> io.BytesIO:
        self._break(path)
        return _Breaking(self.content)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._break(path)
        return {"name": path, "size": len(self.content), "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return bool(self.info(path))

    def _break(self, path: str) -> None:
        if "timeout" in path:
            raise TimeoutError
        if "gone" in path:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        if "open" not in path:
            raise RuntimeError("connection\nlost.")

    def cat_file(self, path: str, start: int = 0, end: int | None = None, **_: Any) -> bytes:
        with self._open(path) as file:
            file.seek(start)
            return file.read(None if end is None else end - start)

    ls = glob = isdir = lambda self, path, **_: self._break(path)


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation("faulty", _Faulty, clobber=True)
    monkeypatch.setattr(_Faulty, "content", b"line\n" * 1000)


def lines(uri: str) -> list[bytes]:
    with storage.open_file(uri) as file:
        return list(file)


REMOTE = {
    "read": storage.read,
    "read_range": lambda uri: storage.read_range(uri, 0, 10),
    "open_file": storage.open_file,
    "size": storage.size,
    "exists": storage.exists,
    "is_folder": storage.is_folder,
    "list_files": storage.list_files,
    "expand": lambda uri: storage.expand(f"{uri}*"),
}


@pytest.mark.parametrize("name", REMOTE)
def test_faults_of_a_remote_file_system_are_os_errors(faulty, name) -> None:
    with pytest.raises(OSError, match=r"^faulty://a\*?: its file system failed \(RuntimeError: connection lost\)$"):
        REMOTE[name]("faulty://a")


@pytest.mark.parametrize("call", [storage.read, lines], ids=["read", "lines"])
def test_faults_while_a_remote_file_is_read_are_os_errors(faulty, monkeypatch, call) -> None:
    monkeypatch.setattr(_Faulty, "content", b"line\n" * 100_000)
    monkeypatch.setattr(_Breaking, "lost", range(1 << 18, sys.maxsize))
    with pytest.raises(OSError, match=r"^faulty://open: its file system failed \(RuntimeError: connection lost\)$"):
        call("faulty://open")
    with storage.open_file("faulty://open") as file:  # what can be read is read
        assert file.read(5) == b"line\n" and file.tell() == 5 and file.seek(2) == 2 and not file.closed
    assert file.closed


def test_clear_errors_are_not_changed(faulty) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        storage.read("faulty://gone")
    with pytest.raises(OSError, match=r"faulty://timeout: its file system failed \(TimeoutError\)"):
        storage.size("faulty://timeout")
    with pytest.raises(UserError, match="nosuch"):
        storage.read("nosuch://a")


def test_remote_faults_end_a_command_with_one_sentence(faulty, tmp_path, monkeypatch) -> None:
    found = complaint(cli("ingest", "faulty://a.tar", "--out", tmp_path / "out"), 1)
    assert found == "faulty://a.tar: its file system failed (RuntimeError: connection lost)."
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [jpeg(0)], "caption": ["a"]}), buffer)
    monkeypatch.setattr(_Faulty, "content", buffer.getvalue())
    found = complaint(cli("ingest", "faulty://open.parquet", "--format", "parquet", "--out", tmp_path / "out"), 1)
    assert "faulty://open.parquet: its file system failed" in found  # also when Arrow does the reading


def test_a_network_fault_in_a_parquet_file_is_not_taken_for_damage(faulty, tmp_path, monkeypatch) -> None:
    """Damaged rows are kept as failed; after a network fault a rerun must read the rows again."""
    buffer = io.BytesIO()
    pictures = [jpeg(seed, width=300, height=300) for seed in range(20)]
    pq.write_table(pa.table({"image": pictures, "caption": ["a"] * 20}), buffer)
    assert len(buffer.getvalue()) > 2**17  # the footer is read with the 64 KiB before it
    monkeypatch.setattr(_Faulty, "content", buffer.getvalue())
    monkeypatch.setattr(_Breaking, "lost", range(0))
    source = open_source("faulty://open.parquet", SourceOptions(format="parquet"))
    for lost in (range(600, 700), range(600, sys.maxsize)):  # among the rows, and also in the footer
        monkeypatch.setattr(_Breaking, "lost", lost)
        with pytest.raises(OSError, match=r"its file system failed \(RuntimeError: connection lost\)$"):
            list(source.read(source.shards[0]))
    monkeypatch.setattr(_Breaking, "lost", range(0))
    assert [pair.status for pair in source.read(source.shards[0])] == ["ok"] * 20


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_one_notice(tmp_path, monkeypatch, capsys, number) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "warned_no_locks", False)
    for _ in range(2):
        with files.lock(tmp_path):
            pass
    assert capsys.readouterr().err.count("has no locks") == 1
    assert not list(tmp_path.iterdir())
    write_tar(tmp_path / "a.tar", pairs(2))
    assert aligncurate.ingest(tmp_path / "a.tar", tmp_path / "out", quiet=True).rows == 2


def test_other_errors_of_locking_are_errors(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="the disk is broken"), files.lock(tmp_path):
        pass


def test_a_dead_worker_process_ends_a_command_with_one_sentence(tmp_path, monkeypatch) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "in", "--quiet")

    def die(*_: object, **__: object) -> None:
        raise WorkerError("a worker process ended with exit code -9")

    monkeypatch.setattr(exporting, "export", die)
    found = complaint(cli("export", tmp_path / "in", "--out", tmp_path / "out"), 1)
    assert found.startswith("a worker process ended with exit code -9. Finished parts are kept")

    def blunder(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(exporting, "export", blunder)
    with pytest.raises(AssertionError, match="a traceback instead of a sentence"):
        cli("export", tmp_path / "in", "--out", tmp_path / "out")


SMALL_DISK = """
import resource, signal, sys
from aligncurate import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    export(sys.argv[1], sys.argv[2], format="datacomp-uids", quiet=True)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("size", [300, 500, 1_000])
def test_a_uid_list_that_does_not_fit_on_the_disk_is_an_error(tmp_path, size) -> None:
    write_tar(tmp_path / "a.tar", pairs(80))
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True)
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "in"), str(tmp_path / "out"), str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert not (tmp_path / "out/uids.npy").exists()
    assert aligncurate.export(tmp_path / "in", tmp_path / "out", format="datacomp-uids", quiet=True).rows == 80
    assert len(np.load(tmp_path / "out/uids.npy")) == 80
