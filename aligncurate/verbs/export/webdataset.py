"""Export as webdataset: tars with the original image bytes, and beside each a Parquet file as img2dataset writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aligncurate.dataset.part import open_part
from aligncurate.dataset.pointers import POINTER_COLUMNS, read_images
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import IMAGE_EMBEDDING, TEXT_EMBEDDING
from aligncurate.engines import processes, threads
from aligncurate.errors import RunError
from aligncurate.io import storage
from aligncurate.io.files import atomic_file
from aligncurate.io.parquet import page_buffer
from aligncurate.io.paths import AnyPath
from aligncurate.io.tar import Buffer, TarWriter
from aligncurate.progress import Meter
from aligncurate.verbs.export.plan import Tar, group_batches, is_exportable, plan_tars, without_views
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.sample import free_name, image_ending, safe_name, strict_json

_BUFFER = 1 << 20  # a tar is written this many bytes at a time
_HIDDEN = (IMAGE_EMBEDDING, TEXT_EMBEDDING)  # in the Parquet file beside the tar only
_NOT_IN_JSON = {*POINTER_COLUMNS, "image", "error"} - {"source"}
_MANY_ROWS = 10_000  # fewer are exported before worker processes have started


def write_webdataset(
    dataset: Dataset, done: Exported, shard_size: int, per_level: bool, workers: int | None, progress: Meter
) -> None:
    """Write the tars, a few at a time; those that an interrupted run completed are kept."""
    tars = plan_tars(dataset, shard_size, per_level)
    if workers is None:
        workers = os.cpu_count() or 1 if dataset.rows >= _MANY_ROWS else 1
    workers = min(workers, len(tars))
    for tar in tars:
        (done.path / tar.name).parent.mkdir(parents=True, exist_ok=True)

    # Each worker holds the rows of one tar in memory, without their images.
    write = _TarJob(dataset, done.path, per_level)
    results = []
    for outcome in (processes if workers > 1 else threads).run(write, tars, workers=max(1, workers)):
        if outcome.result is None:  # its workers kept dying
            raise RunError(f"{outcome.error}; run again to go on.")
        tar, rows, _, failed, _ = outcome.result
        progress.add(tar.rows, rows, len(failed))
        results.append(outcome.result)
    for tar, rows, size, failed, kept in sorted(results, key=lambda r: r[0].name):
        done.rows += rows
        done.bytes += size
        done.failed += failed
        done.files.append(f"{tar.name}.tar")
        if kept:
            done.kept_files.append(done.files[-1])
            done.kept += rows


@dataclass(frozen=True)
class _TarJob:
    """Writes one tar of an export, unless an earlier run has; picklable, as worker processes need it."""

    dataset: Dataset
    target: AnyPath
    per_level: bool

    def __call__(self, tar: Tar, check: Callable[[], None] = lambda: None) -> _Written:
        beside = self.target / f"{tar.name}.parquet"
        complete = beside.is_file() and (self.target / f"{tar.name}.tar").is_file()
        # The Parquet file is written last, so a tar that has one is complete. Rows that failed are tried again.
        kept = complete and not _note(beside)["failed"]
        if not kept:
            _write_tar(self.dataset, tar, self.per_level, self.target, check)
        note = _note(beside)
        return tar, note["rows"], note["bytes"], note["failed"], kept


_Written = tuple[Tar, int, int, list[dict[str, str]], bool]
"""A tar, its number of rows, the bytes of its images, the rows whose image could not be read, whether it was there."""


def _note(beside: AnyPath) -> dict[str, Any]:
    """Rows, image bytes and failed rows of a tar, from the Parquet file beside it."""
    with storage.open_for_arrow(str(beside)) as file:
        metadata = pq.read_metadata(file)
    return {"rows": metadata.num_rows, **json.loads(metadata.metadata[b"aligncurate.export"])}


def _tar_batches(dataset: Dataset, tar: Tar, per_level: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a tar, a few hundred at a time."""
    for part, skip, left in tar.pieces:
        with open_part(dataset.files[part], buffer_size=page_buffer(dataset.parts[part].bytes)) as file:
            for group in range(file.num_row_groups):
                # All other columns, which may be embedded images, are read only if the group has rows for this tar.
                mask = _matching(file.read_row_group(group, ["status", "level"], use_threads=False), tar, per_level)
                matches = pc.sum(mask, min_count=0).as_py()
                take = min(max(matches - skip, 0), left)
                if take:
                    rank = np.cumsum(mask.to_numpy())  # 1 for the first match
                    wanted = mask.to_numpy() & (rank > skip) & (rank <= skip + take)
                    yield from group_batches(file, group, pa.chunked_array([wanted]), dataset.schema.names)
                skip, left = max(skip - matches, 0), left - take
                if not left:
                    break


def _matching(table: pa.Table, tar: Tar, per_level: bool) -> pa.ChunkedArray:
    """Which rows are exported and, with `per_level`, have the tar's level: bool [rows]."""
    exported, level = is_exportable(table), table["level"]
    if not per_level:
        return exported
    return pc.and_(exported, pc.is_null(level) if tar.level is None else pc.equal(level, tar.level))


def _write_tar(dataset: Dataset, tar: Tar, per_level: bool, target: AnyPath, check: Callable[[], None]) -> None:
    schema = without_views(pa.schema([f for f in dataset.schema if f.name != "image"]))
    written: list[pa.RecordBatch] = []
    failed: list[dict[str, str]] = []
    names: set[str] = set()
    size = 0
    with atomic_file(target / f"{tar.name}.tar") as temporary, temporary.open("wb", _BUFFER) as file:
        members = TarWriter(file)
        flushed = 0
        for batch in _tar_batches(dataset, tar, per_level):
            check()
            readable_image = []
            rows = batch.select([name for name in batch.schema.names if name not in _HIDDEN]).to_pylist()
            for row, data in zip(rows, read_images(rows), strict=True):
                readable_image.append(not isinstance(data, OSError))
                if isinstance(data, OSError):
                    failed.append({"key": row["key"] or "", "error": str(data)})
                    continue
                size += len(data or b"")
                key = free_name(safe_name(row["key"]), names)
                for ending, content in sorted(_sample(row, data).items()):
                    members.add(f"{key}.{ending}", content)
            written.append(_completed(batch.filter(pa.array(readable_image)), schema))
            flushed = _start_flush(file, flushed)
        members.end()
    note = json.dumps({"failed": failed, "bytes": size}).encode()
    table = pa.Table.from_batches(written, schema).replace_schema_metadata({b"aligncurate.export": note})
    with atomic_file(target / f"{tar.name}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _completed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of `schema`, nulls where it lacks one: of several datasets, one may have it only."""
    names = batch.schema.names
    columns = [batch[f.name] if f.name in names else pa.nulls(batch.num_rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _start_flush(file: BinaryIO, start: int) -> int:
    """Start writing the file's bytes from `start` on to disk, without waiting; returns where they end.

    Otherwise the disk idles until the final sync, and this process idles during it. Linux starts to write data that it
    is told will not be needed.
    """
    end = os.fstat(file.fileno()).st_size
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def _sample(row: dict[str, Any], data: Buffer | None) -> dict[str, Buffer]:
    """The files of a webdataset sample by extension: the image, `txt` (the caption), `json` (all other columns)."""
    sample: dict[str, Buffer] = {}
    if data is not None:
        sample[image_ending(row, data)] = data
    if row["caption"] is not None:
        sample["txt"] = row["caption"].encode()
    kept = {k: v for k, v in row.items() if v is not None and k not in _NOT_IN_JSON}
    kept["sha256"] = row["sha256"].hex() if row["sha256"] else None
    sample["json"] = strict_json(kept).encode()
    return sample
