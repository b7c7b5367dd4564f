"""Datasets of aligncurate as a source, so that ingested or filtered pairs can be scored (again)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from aligncurate.dataset.pointers import Pointer
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import COLUMNS, IMAGE_STATUSES, OWN_EMBEDDINGS, Pair, Status
from aligncurate.sources.base import Shard, Source


class CuratedSource(Source):
    """A dataset whose parts are the shards."""

    kind = "dataset"

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self._dataset = dataset
        self.shards = [Shard(i, str(file)) for i, file in enumerate(dataset.files)]
        # Shards are renumbered if there are several sources, so a part is found by its name.
        self._numbers = {shard.uri: shard.index for shard in self.shards}
        self.extras = {f.name: f.type for f in dataset.schema if f.name not in COLUMNS}

    @property
    def alone(self) -> bool:
        return True

    def describe(self) -> list[dict[str, Any]]:
        return [self._dataset.fingerprint()]

    def count(self, shard: Shard, most: int | None = None) -> int:
        return self._dataset.parts[self._numbers[shard.uri]].rows

    def read(self, shard: Shard) -> Iterator[Pair]:
        embeddings = [name for name in OWN_EMBEDDINGS if _holds_vectors(self.extras.get(name))]
        number = 0
        for table in self._dataset.groups(self._numbers[shard.uri]):
            for batch in table.to_batches(256):
                found = [_vectors(batch[name]) for name in embeddings]
                for row, *vectors in zip(batch.drop_columns(embeddings).to_pylist(), *found, strict=True):
                    if number == shard.limit:
                        return
                    if row["key"] is None:  # of a dataset from elsewhere
                        row["key"] = f"row-{number}"
                    pair = _pair(row)
                    for name, vector in zip(embeddings, vectors, strict=True):
                        setattr(pair, name, vector)
                    yield pair
                    number += 1


def _holds_vectors(kind: pa.DataType | None) -> bool:
    return kind is not None and pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type)


def _vectors(column: pa.Array) -> list[Any]:
    """The embedding of each row as an array, None where there is none: as lists of numbers they would be slow."""
    return [value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column]


def _pair(row: dict[str, Any]) -> Pair:
    extra = {k: v for k, v in row.items() if k not in COLUMNS and v is not None}
    fields: dict[str, Any] = {
        k: row.get(k) for k in COLUMNS if k not in ("status", "error", "width", "height", "sha256")
    }
    pair = Pair(**fields, extra=extra, stored=row)
    if row["status"] not in iter(Status):
        pair.fail(Status.INVALID_ROW, f"the status of row {row['key']} is {row['status']}, which no dataset has")
        return pair
    status = Status(row["status"])
    pointer = Pointer.of(row)
    if pointer and (pointer.sha256 or pointer.image):  # no other pointer of a dataset from elsewhere is followed
        pair.load = pointer.read
    # Whether a conversation has text to score depends on --score-text, so it is checked again.
    again = status in IMAGE_STATUSES or (status is Status.MISSING_CAPTION and pair.conversations is not None)
    if not again or pair.load is None:
        pair.status, pair.error = status, row["error"]
    return pair
