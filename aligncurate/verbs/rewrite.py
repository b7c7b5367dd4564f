"""From one dataset to the next: part i of the input becomes part i of the output."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from aligncurate.dataset.part import PartInfo, PartWriter
from aligncurate.dataset.reader import Dataset, DatasetWriter
from aligncurate.engines import threads
from aligncurate.errors import UserError
from aligncurate.progress import Meter, meter

_THREADS = min(8, 2 * (os.cpu_count() or 1))  # at any time some wait for the disk


def rewrite(
    dataset: Dataset,
    out: str | Path,
    head: Mapping[str, Any],
    change: Callable[[int, Iterable[pa.Table]], Iterable[pa.Table]],
    *,
    quiet: bool = False,
) -> Dataset:
    """Write a new dataset whose parts are those of `dataset`, changed.

    Args:
        dataset: the input.
        out: the new dataset's folder; parts that an interrupted run committed there are kept.
        head: its manifest without the parts.
        change: given a part's number and its row groups, gives the row groups of the new part.
        quiet: show no progress.

    Raises UserError when `out` cannot be used.
    """

    def write(index: int, tables: Iterable[pa.Table], part: PartWriter) -> None:
        for table in change(index, tables):
            if table.num_rows:
                part.write(table)

    return _each_part(dataset, out, head, None, write, quiet=quiet)


def replace_column(
    dataset: Dataset,
    out: str | Path,
    head: Mapping[str, Any],
    column: str,
    reads: Sequence[str],
    values: Callable[[pa.Table], pa.Array],
    *,
    quiet: bool = False,
) -> Dataset:
    """Write a new dataset that differs from `dataset` in one column.

    What is stored of the others is copied, not decoded, so this is about as fast as copying files.

    Args:
        dataset, out, head, quiet: as for `rewrite`.
        column: what changes.
        reads: the columns that its values are made of.
        values: given these columns of a row group, gives the new values.
    """

    def write(index: int, tables: Iterable[pa.Table], part: PartWriter) -> None:
        part.copy(dataset.files[index], dataset.parts[index].statuses, column, map(values, tables))

    return _each_part(dataset, out, head, reads, write, quiet=quiet)


def _each_part(
    dataset: Dataset,
    out: str | Path,
    head: Mapping[str, Any],
    reads: Sequence[str] | None,
    write: Callable[[int, Iterable[pa.Table], PartWriter], None],
    *,
    quiet: bool,
) -> Dataset:
    if os.path.abspath(out) == os.path.abspath(dataset.path):
        raise UserError(f"{out}: --out is the dataset itself; nothing is changed in place, name a new folder.")
    writer = DatasetWriter(out, head, dataset.schema)

    def make(index: int, check: Callable[[], None]) -> PartInfo:
        with writer.part(index) as part:
            write(index, _checked(dataset.groups(index, reads), check, shown), part)
        assert part.info is not None
        return part.info

    with writer.open():
        done = {i: info for i in range(len(dataset.parts)) if (info := writer.committed(i)) is not None}
        with meter(str(head["verb"]), dataset.rows, quiet=quiet, unit="rows") as shown:
            shown.skip(sum(dataset.parts[i].rows for i in done))
            todo = [i for i in range(len(dataset.parts)) if i not in done]
            for outcome in threads.run(make, todo, workers=_THREADS):
                assert outcome.result is not None
                done[outcome.shard] = outcome.result
        return writer.finish([done[i] for i in range(len(dataset.parts))])


def _checked(tables: Iterable[pa.Table], check: Callable[[], None], shown: Meter) -> Iterator[pa.Table]:
    for table in tables:
        check()
        yield table
        shown.add(table.num_rows, table.num_rows, 0)
