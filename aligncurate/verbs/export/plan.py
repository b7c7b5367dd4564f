"""Which rows of a dataset are exported, and into which tar each one goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE


def count_exportable(dataset: Dataset) -> int:
    """Number of rows with status `ok` or `text_only`; all others are left out of an export."""
    return sum(part.statuses.get(status, 0) for part in dataset.parts for status in FINE)


def is_exportable(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of a table are exported: bool [rows]."""
    return pc.is_in(table["status"], pa.array(sorted(FINE)))


def exportable_rows(dataset: Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The exported rows of the whole dataset, in order."""
    for index in range(len(dataset.parts)):
        for table in dataset.groups(index, columns):
            for batch in table.filter(is_exportable(table)).to_batches(500):
                yield from batch.to_pylist()


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
