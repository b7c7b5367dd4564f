"""Which rows of a dataset are exported, and into which tar each one goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aligncurate.dataset.part import open_part
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE
from aligncurate.io.parquet import page_buffer


def count_exportable(dataset: Dataset) -> int:
    """Number of rows with status `ok` or `text_only`; all others are left out of an export."""
    return sum(part.statuses.get(status, 0) for part in dataset.parts for status in FINE)


def is_exportable(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of a table are exported: bool [rows]."""
    return pc.is_in(table["status"], pa.array(sorted(FINE)))


def exportable_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The exported rows of the whole dataset, in order, with those of the columns that the dataset has."""
    for path, part in zip(dataset.files, dataset.parts, strict=True):
        with open_part(path, buffer_size=page_buffer(part.bytes)) as file:
            for group in range(file.num_row_groups):
                mask = is_exportable(file.read_row_group(group, ["status"], use_threads=False))
                for batch in group_batches(file, group, mask, columns):
                    yield from batch.to_pylist()


_BATCH_ROWS, _BATCH_BYTES = 500, 1 << 26  # of a batch, whichever is less


def group_batches(
    file: pq.ParquetFile, group: int, mask: pa.ChunkedArray, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group for which `mask` [rows] is true, a bounded batch at a time; no batch is empty."""
    metadata = file.metadata.row_group(group)
    rows = _BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
    names = [name for name in file.schema_arrow.names if name in columns]
    start = 0
    for batch in file.iter_batches(max(1, min(_BATCH_ROWS, rows)), [group], columns=names, use_threads=False):
        kept = (
            pa.Table.from_batches([batch]).cast(without_views(batch.schema)).filter(mask.slice(start, batch.num_rows))
        )
        start += batch.num_rows
        yield from kept.to_batches()


def without_views(schema: pa.Schema) -> pa.Schema:
    """A schema with plain text and bytes for views, which Arrow can neither filter nor all readers read."""
    return pa.schema([field.with_type(_without_views(field.type)) for field in schema])


def _without_views(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_without_views(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_without_views(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    return kind


@dataclass
class Tar:
    """One tar to write.

    Attributes:
        name: relative to the export's folder, without `.tar`.
        level: the level of all its rows, None where there is none or levels are mixed.
        pieces: its rows, as (part, how many exportable rows of that part and level come before, how many to take).
        rows: number of rows in all pieces.
    """

    name: str
    level: int | None
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.name}.tar"


def plan_tars(dataset: Dataset, shard_size: int, per_level: bool) -> list[Tar]:
    """Assign rows to tars. The same dataset and options always give the same tars, so an export can be resumed."""
    filling: dict[int | None, Tar] = {}
    numbers: dict[int | None, int] = {}
    tars: list[Tar] = []
    for part in range(len(dataset.parts)):
        levels = _exportable_levels(dataset, part)
        counts: dict[int | None, int] = {None: len(levels)}
        if per_level:
            counts = {item["values"]: item["counts"] for item in levels.value_counts().to_pylist()}
        for level in sorted(counts, key=lambda v: -1 if v is None else v):
            start, left = 0, counts[level]
            while left:
                tar = filling.get(level)
                if tar is None or tar.rows == shard_size:
                    number = numbers.get(level, 0)
                    numbers[level] = number + 1
                    folder = f"level-{level}/" if level is not None else ("no-level/" if per_level else "")
                    tar = filling[level] = Tar(f"{folder}{number:05d}", level)
                    tars.append(tar)
                take = min(left, shard_size - tar.rows)
                tar.pieces.append((part, start, take))
                tar.rows += take
                start, left = start + take, left - take
    return tars


def _exportable_levels(dataset: Dataset, part: int) -> pa.ChunkedArray:
    table = dataset.read(part, ["status", "level"])
    return table.filter(is_exportable(table))["level"]
