"""What is renamed into place was synced before, and its folder is synced after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import aligncurate
from aligncurate.io.files import atomic_file, write_json
from tests.support.inputs import pairs, write_tar


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """Every fsync and rename, in order, with the path it was for."""
    log: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        log.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        log.append(("rename", os.path.realpath(path)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return log


def check(log: list[tuple[str, str]], target: Path) -> None:
    """`target` was written under a temporary name, synced, renamed; then its folder was synced."""
    temporary = os.path.realpath(target.with_name(f".tmp-{target.name}"))
    renamed = log.index(("rename", temporary))
    assert ("fsync", temporary) in log[:renamed], f"{target} was not synced before it was renamed"
    assert ("fsync", os.path.realpath(target.parent)) in log[renamed:], f"the folder of {target} was not synced"


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name open files")


def test_atomic_files(tmp_path, calls) -> None:
    with atomic_file(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"1")
    assert [kind for kind, _ in calls] == ["fsync", "rename", "fsync"]
    check(calls, tmp_path / "a.bin")
    write_json(tmp_path / "a.json", {})
    check(calls, tmp_path / "a.json")


def test_parts_are_synced_before_the_manifest_lists_them(tmp_path, calls) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    dataset = aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True).dataset
    for file in dataset.files:
        check(calls, file)
    check(calls, tmp_path / "in/manifest.json")
    # The parts' names are on disk before the manifest that lists them is renamed for the last time.
    manifest = os.path.realpath(tmp_path / "in/.tmp-manifest.json")
    last = max(i for i, call in enumerate(calls) if call == ("rename", manifest))
    part = max(i for i, (kind, path) in enumerate(calls) if kind == "rename" and "part-" in path)
    assert ("fsync", os.path.realpath(tmp_path / "in")) in calls[part:last]


def test_exports(tmp_path, calls) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    dataset = aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True).dataset
    aligncurate.export(dataset, tmp_path / "out", workers=1, quiet=True)
    for name in ("00000.tar", "00000.parquet", "export.json"):
        check(calls, tmp_path / "out" / name)
