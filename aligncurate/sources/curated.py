"""Our own datasets as a source, so that what was ingested or filtered can be scored (again)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from aligncurate.dataset import Dataset
from aligncurate.pairs import (
    COLUMNS,
    IMAGE_EMBEDDING,
    IMAGE_STATUSES,
    TEXT_EMBEDDING,
    Pair,
    Status,
)
from aligncurate.sources.base import Shard, Source
from aligncurate.sources.pointers import has_image, read_image


class CuratedSource(Source):
    """The parts of a dataset as shards.

    Args:
        dataset: the dataset.
    """

    kind = "dataset"

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.shards = [Shard(i, str(file)) for i, file in enumerate(dataset.files)]
        gone = {*COLUMNS, IMAGE_EMBEDDING, TEXT_EMBEDDING}
        self.extras = {f.name: f.type for f in dataset.schema if f.name not in gone}

    def describe(self) -> list[dict[str, Any]]:
        return [self._dataset.fingerprint()]

    def count(self, shard: Shard) -> int:
        return self._dataset.parts[self._index(shard)].rows

    def _index(self, shard: Shard) -> int:
        # A shard of several sources is renumbered, so the part is found by its name.
        return next(i for i, file in enumerate(self._dataset.files) if str(file) == shard.uri)

    def read(self, shard: Shard) -> Iterator[Pair]:
        table = self._dataset.read(self._index(shard))
        keep = [n for n in table.column_names if n not in (IMAGE_EMBEDDING, TEXT_EMBEDDING)]
        for number, row in enumerate(
            row for batch in table.select(keep).to_batches(1_000) for row in batch.to_pylist()
        ):
            if number == shard.limit:
                return
            yield _pair(row)


def _pair(row: dict[str, Any]) -> Pair:
    extra = {k: v for k, v in row.items() if k not in COLUMNS and v is not None}
    fields: dict[str, Any] = {
        k: row.get(k) for k in COLUMNS if k not in ("status", "error", "width", "height", "sha256")
    }
    pair = Pair(**fields, extra=extra)
    status = Status(row["status"])
    if has_image(row):
        pair.load = partial(read_image, row)
    if status not in IMAGE_STATUSES or pair.load is None:
        pair.status, pair.error = status, row["error"]
    return pair
