"""Export as webdataset tars with the original image bytes, and an img2dataset-style Parquet beside each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aligncurate.dataset.part import readable
from aligncurate.dataset.pointers import POINTER_COLUMNS, read_images
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import IMAGE_EMBEDDING, TEXT_EMBEDDING
from aligncurate.engines import processes, threads
from aligncurate.io.files import atomic_file
from aligncurate.io.tar import Buffer, TarWriter
from aligncurate.progress import Meter
from aligncurate.verbs.export.names import free_name, image_ending, safe_name
from aligncurate.verbs.export.plan import Tar, plan_tars
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.rows import is_exportable
from aligncurate.verbs.export.strict_json import strict_json

_BUFFER = 1 << 20  # bytes of a tar that are written at once
_HIDDEN = {*POINTER_COLUMNS, "image", "error", IMAGE_EMBEDDING, TEXT_EMBEDDING} - {"source"}  # not in the JSON
_WORTH_PROCESSES = 10_000  # pairs; fewer are written before processes have started


def write_webdataset(
    dataset: Dataset, done: Exported, shard_size: int, per_level: bool, workers: int | None, shown: Meter
) -> None:
    tars = plan_tars(dataset, shard_size, per_level)
    if workers is None:
        workers = os.cpu_count() or 1 if dataset.rows >= _WORTH_PROCESSES else 1
    workers = min(workers, len(tars))
    for tar in tars:
        (done.path / tar.name).parent.mkdir(parents=True, exist_ok=True)

    # In memory at once are the rows of one tar per process, without their images.
    write = _Write(dataset, done.path, per_level)
    results = []
    for outcome in (processes if workers > 1 else threads).run(write, tars, workers=max(1, workers)):
        assert outcome.result is not None
        tar, rows, size, failed = outcome.result
        shown.add(tar.rows, rows, len(failed))
        results.append(outcome.result)
    for tar, rows, size, failed in sorted(results, key=lambda r: r[0].name):
        done.rows += rows
        done.bytes += size
        done.failed += failed
        done.files.append(f"{tar.name}.tar")


@dataclass(frozen=True)
class _Write:
    """Writes one tar of an export, unless it is there."""

    dataset: Dataset
    target: Path
    per_level: bool

    def __call__(self, tar: Tar, check: Callable[[], None] = lambda: None) -> _Written:
        beside = self.target / f"{tar.name}.parquet"
        there = beside.is_file() and (self.target / f"{tar.name}.tar").is_file()
        # The Parquet is written last, so it is the mark that the tar is whole; what failed is tried again.
        if not there or _note(beside)["failed"]:
            _write_tar(self.dataset, tar, self.per_level, self.target, check)
        note = _note(beside)
        return tar, note["rows"], note["bytes"], note["failed"]


_Written = tuple[Tar, int, int, list[dict[str, str]]]
"""A tar, how many rows and bytes of images it holds, and what could not be read."""


def _note(beside: Path) -> dict[str, Any]:
    """What the Parquet beside a tar says of it: its rows, bytes of images, and images that could not be read."""
    metadata = pq.read_metadata(beside)
    return {"rows": metadata.num_rows, **json.loads(metadata.metadata[b"aligncurate.export"])}


def _tar_batches(dataset: Dataset, tar: Tar, per_level: bool) -> Iterator[pa.RecordBatch]:
    for part, skip, left in tar.pieces:
        with readable(dataset.files[part]) as file:
            for group in range(file.num_row_groups):
                # Other columns, embedded images among them, are read only where the group has rows for this tar.
                mask = _matching(file.read_row_group(group, ["status", "level"], use_threads=False), tar, per_level)
                found = pc.sum(mask, min_count=0).as_py()
                take = min(max(found - skip, 0), left)
                if take:
                    rows = file.read_row_group(group, use_threads=False).filter(mask)
                    yield from rows.slice(skip, take).to_batches(500)
                skip, left = max(skip - found, 0), left - take
                if not left:
                    break


def _matching(table: pa.Table, tar: Tar, per_level: bool) -> pa.ChunkedArray:
    """Which rows are good and, with `per_level`, of the tar's level."""
    good, level = is_exportable(table), table["level"]
    if not per_level:
        return good
    return pc.and_(good, pc.is_null(level) if tar.level is None else pc.equal(level, tar.level))


def _write_tar(dataset: Dataset, tar: Tar, per_level: bool, target: Path, check: Callable[[], None]) -> None:
    schema = pa.schema([f for f in dataset.schema if f.name != "image"])
    written: list[pa.RecordBatch] = []
    failed: list[dict[str, str]] = []
    names: set[str] = set()
    size = 0
    with atomic_file(target / f"{tar.name}.tar") as temporary, temporary.open("wb", _BUFFER) as file:
        members = TarWriter(file)
        flushed = 0
        for batch in _tar_batches(dataset, tar, per_level):
            check()
            there = []
            rows = batch.to_pylist()
            for row, data in zip(rows, read_images(rows), strict=True):
                there.append(not isinstance(data, OSError))
                if isinstance(data, OSError):
                    failed.append({"key": row["key"], "error": str(data)})
                    continue
                size += len(data or b"")
                key = free_name(safe_name(row["key"]), names)
                for ending, content in sorted(_sample(row, data).items()):
                    members.add(f"{key}.{ending}", content)
            written.append(batch.select(schema.names).filter(pa.array(there)))
            flushed = _start_flush(file, flushed)
        members.end()
    note = json.dumps({"failed": failed, "bytes": size}).encode()
    table = pa.Table.from_batches(written, schema).replace_schema_metadata({b"aligncurate.export": note})
    with atomic_file(target / f"{tar.name}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _start_flush(file: BufferedWriter, start: int) -> int:
    """Let the disk write what follows byte `start` while the next pairs are read; returns where that ends.

    Without it, the disk would idle until the tar is synced, and we while it is. Linux starts writing when told that
    the data will not be needed; bytes that are on their way to the disk stay in the cache.
    """
    end = file.tell()
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def _sample(row: dict[str, Any], data: Buffer | None) -> dict[str, Buffer]:
    """A webdataset sample's files by their endings: the image, `txt` for captions, everything else in `json`."""
    sample: dict[str, Buffer] = {}
    if data is not None:
        sample[image_ending(row, data)] = data
    if row["caption"] is not None:
        sample["txt"] = row["caption"].encode()
    kept = {k: v for k, v in row.items() if v is not None and k not in _HIDDEN}
    kept["sha256"] = row["sha256"].hex() if row["sha256"] else None
    sample["json"] = strict_json(kept).encode()
    return sample
