"""What survives a power cut: bytes are synced before the rename that publishes them, names before what lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import aligncurate
from aligncurate.io.files import write_json
from tests.support.inputs import pairs, write_tar

Call = tuple[str, str]  # ("sync" or "publish", path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Every fsync and every rename, in order."""
    recorded: list[Call] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        recorded.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source: str | Path, target: str | Path) -> None:
        recorded.append(("publish", str(target)))
        # Receipts are synced together, before the manifest: one that a power cut took only makes its part again.
        is_receipt = Path(target).parent.name == ".receipts"
        assert is_receipt or ("sync", str(source)) in recorded, f"{target} is published before its bytes are synced"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(Path, "replace", lambda self, target: spy_replace(self, target))
    yield recorded


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not name open files")


def place_of(calls: list[Call], call: Call, after: int = -1) -> int:
    return calls.index(call, after + 1)


def test_json_is_synced_then_published_then_its_folder_is_synced(tmp_path: Path, calls: list[Call]) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert [kind for kind, _ in calls] == ["sync", "publish", "sync"]
    assert calls[1:] == [("publish", str(tmp_path / "a.json")), ("sync", str(tmp_path))]


def test_parts_are_whole_and_named_before_the_manifest_lists_them(tmp_path: Path, calls: list[Call]) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    dataset = aligncurate.ingest(tmp_path / "a.tar", tmp_path / "out", quiet=True).dataset
    assert dataset is not None
    (part,) = dataset.files
    published = place_of(calls, ("publish", str(part)))
    named = place_of(calls, ("sync", str(part.parent)), published)
    complete = max(n for n, call in enumerate(calls) if call == ("publish", str(tmp_path / "out/manifest.json")))
    assert published < named < complete
    receipt = ("sync", str(tmp_path / "out/.receipts/part-00000.json"))
    assert published < place_of(calls, receipt) < complete
    assert place_of(calls, ("sync", str(tmp_path / "out")), complete) == len(calls) - 1


def test_a_tar_is_whole_before_the_parquet_that_marks_it(tmp_path: Path, calls: list[Call]) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True)
    calls.clear()
    aligncurate.export(tmp_path / "in", tmp_path / "out", quiet=True)
    out = tmp_path / "out"
    tar = place_of(calls, ("publish", str(out / "00000.tar")))
    named = place_of(calls, ("sync", str(out)), tar)
    mark = place_of(calls, ("publish", str(out / "00000.parquet")))
    assert tar < named < mark
    record = max(n for n, call in enumerate(calls) if call == ("publish", str(out / "export.json")))
    assert place_of(calls, ("sync", str(out)), mark) < record
