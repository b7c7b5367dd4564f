"""Parts of equal size from what a filter keeps (`--rows-per-part`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.io.paths import AnyPath
from aligncurate.scoring.rows import ROWS_PER_GROUP, ROWS_PER_GROUP_WITH_IMAGES
from aligncurate.verbs.filter.masks import Selection
from aligncurate.verbs.rewrite import Watch, check_not_in_place, write_parts
from aligncurate.verbs.scores import ahead

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
    size = ROWS_PER_GROUP_WITH_IMAGES if "image" in dataset.schema.names else ROWS_PER_GROUP

    def tables(index: int, watch: Watch) -> Iterator[pa.Table]:
        return regroup(watch(_rows(dataset, selection, plan[index])), size)

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


def _rows(dataset: Dataset, selection: Selection, pieces: Iterable[Piece]) -> Iterator[pa.Table]:
    for index, skip, take in pieces:
        mask = selection.mask(index)
        start = 0
        for table in dataset.groups(index):
            chosen = table.filter(pa.array(mask[start : start + table.num_rows]))
            start += table.num_rows
            rows = chosen.slice(skip, take)
            skip, take = max(0, skip - chosen.num_rows), take - rows.num_rows
            if rows.num_rows:
                yield rows
            if not take:
                break


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
