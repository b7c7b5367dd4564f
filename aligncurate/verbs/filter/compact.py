"""Parts of equal size from what a filter keeps (`--rows-per-part`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aligncurate.dataset.part import open_part
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.io.paths import AnyPath
from aligncurate.scoring.rows import ROWS_PER_GROUP, ROWS_PER_GROUP_WITH_IMAGES
from aligncurate.verbs.filter.masks import Mask, Selection
from aligncurate.verbs.rewrite import Watch, check_not_in_place, write_parts
from aligncurate.verbs.scores import ahead

_HELD = 4  # masks, and row groups, that are kept in memory

Key = TypeVar("Key")
Value = TypeVar("Value")
Counts = NDArray[np.int64]

Piece = tuple[int, int, int]
"""Part of the input, how many of its kept rows come before, how many to take."""


def write_compact(
    dataset: Dataset,
    out: str | AnyPath,
    head: Mapping[str, Any],
    selection: Selection,
    rows_per_part: int,
    *,
    quiet: bool,
) -> Dataset:
    """Write the selected rows, in order, into parts of `rows_per_part` rows; the last part has the rest.

    Which rows a part gets depends only on the dataset and the selection, so an interrupted run is resumed part by part.

    Raises UserError if `out` cannot be used, or a part of `dataset` is damaged.
    """
    check_not_in_place(dataset, out)
    kept = ahead(lambda index: int(selection.mask(index).sum()), len(dataset.parts))
    plan = cut(kept, rows_per_part)
    shards = []
    for pieces in plan:
        files = [dataset.parts[index] for index, _, _ in pieces]
        whole = [[part.name, part.sha256, skip, take] for part, (_, skip, take) in zip(files, pieces, strict=True)]
        shards.append({"pieces": whole})
    kept_rows = _KeptRows(dataset, selection)
    size = ROWS_PER_GROUP_WITH_IMAGES if "image" in dataset.schema.names else ROWS_PER_GROUP

    def tables(index: int, watch: Watch) -> Iterator[pa.Table]:
        return regroup(watch(kept_rows.take(plan[index])), size)

    writer = DatasetWriter(out, head, dataset.schema, shards)
    return write_parts(writer, [sum(take for _, _, take in pieces) for pieces in plan], tables, quiet=quiet)


def cut(kept: Iterable[int], rows_per_part: int) -> list[list[Piece]]:
    """The pieces of each new part, from the number of rows kept of each old part; one empty part if none are kept."""
    plan: list[list[Piece]] = [[]]
    room = rows_per_part
    for index, left in enumerate(kept):
        skip = 0
        while skip < left:
            if not room:
                plan.append([])
                room = rows_per_part
            take = min(room, left - skip)
            plan[-1].append((index, skip, take))
            skip, room = skip + take, room - take
    return plan


class _KeptRows:
    """The rows that a selection keeps, by part and row group.

    What was read last is held, because many small parts may be cut from one row group: each mask and each row group is
    computed about once.
    """

    def __init__(self, dataset: Dataset, selection: Selection) -> None:
        self._dataset, self._selection = dataset, selection
        self._layout = _Recent(self._read_layout)
        self._group = _Recent(self._read_group)

    def take(self, pieces: Iterable[Piece]) -> Iterator[pa.Table]:
        """The kept rows of some pieces, in order."""
        for index, skip, take in pieces:
            _, _, before = self._layout(index)
            for group in range(int(np.searchsorted(before, skip, side="right")) - 1, len(before) - 1):
                if before[group] >= skip + take:
                    break
                first = max(0, skip - int(before[group]))
                rows = self._group((index, group)).slice(first, skip + take - int(before[group]) - first)
                if rows.num_rows:
                    yield rows

    def _read_layout(self, index: int) -> tuple[Mask, Counts, Counts]:
        """A part's mask, the first row of each of its row groups, and the number of kept rows before each."""
        with open_part(self._dataset.files[index]) as part:
            sizes = [part.metadata.row_group(group).num_rows for group in range(part.num_row_groups)]
        mask, starts = self._selection.mask(index), np.cumsum([0, *sizes])
        return mask, starts, np.concatenate([[0], np.cumsum(mask)])[starts]

    def _read_group(self, key: tuple[int, int]) -> pa.Table:
        index, group = key
        mask, starts, _ = self._layout(index)
        (table,) = self._dataset.groups(index, only=[group])
        return table.filter(pa.array(mask[starts[group] : starts[group + 1]]))


class _Recent(Generic[Key, Value]):
    """A function whose last results are held; several threads that want the same one wait for one of them."""

    def __init__(self, function: Callable[[Key], Value]) -> None:
        self._function = function
        self._lock = Lock()
        self._results: dict[Key, Future[Value]] = {}

    def __call__(self, key: Key) -> Value:
        with self._lock:
            found = self._results.get(key)
            future: Future[Value] = found or Future()
            self._results[key] = future
            while len(self._results) > _HELD:
                del self._results[next(iter(self._results))]
        if found is None:
            try:
                future.set_result(self._function(key))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows; the last one has the rest."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        while rows >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting, rows = [joined.slice(size)], rows - size
    if rows:
        yield pa.concat_tables(waiting)
