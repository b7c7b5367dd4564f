"""Which rows are exported: those with nothing wrong, statuses `ok` and `text_only`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE


def count_exportable(dataset: Dataset) -> int:
    """Number of rows that are exported."""
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
