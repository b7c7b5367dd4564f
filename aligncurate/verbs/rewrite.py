"""Write a dataset from another one, part by part: part i of the input becomes part i of the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore
from typing import Any

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.engines import threads
from aligncurate.errors import UserError
from aligncurate.progress import Meter, meter

_CORES = os.cpu_count() or 1
_THREADS = _CORES + (_CORES + 1) // 2  # while some wait for the disk to sync their part, others compute


def rewrite(
    dataset: Dataset,
    out: str | Path,
    head: Mapping[str, Any],
    change: Callable[[int, Iterable[pa.Table]], Iterable[pa.Table]],
    *,
    schema: pa.Schema | None = None,
    quiet: bool = False,
) -> Dataset:
    """Write a new dataset whose parts are those of `dataset`, changed.

    Args:
        dataset: the input.
        out: the new dataset's folder; parts that an interrupted run committed there are kept.
        head: the new manifest without the parts.
        change: takes a part's number and its row groups, returns the row groups of the new part.
        schema: of the new parts, where it differs from that of `dataset`.
        quiet: show no progress.

    Raises:
        UserError: `out` cannot be used, or a part of `dataset` is damaged.
    """
    check_not_in_place(dataset, out)
    shards = [{"part": part.name, "sha256": part.sha256} for part in dataset.parts]
    writer = DatasetWriter(out, head, schema or dataset.schema, shards)
    if finished := writer.finished():
        return finished
    computing = Semaphore(_CORES)  # also limits how many row groups are in memory

    def make(index: int, check: Callable[[], None]) -> PartInfo:
        with writer.part(index) as part, computing:
            tables = change(index, _checked(dataset.groups(index), check, progress))
            for table in tables if len(todo) >= _CORES else _ahead(tables):
                if table.num_rows:
                    part.write(table)
        assert part.info is not None
        return part.info

    with missing_parts(writer, dataset, quiet=quiet) as (progress, todo):
        for _ in threads.run(make, todo, workers=_THREADS):
            pass
        return writer.finish(len(shards))


@contextmanager
def missing_parts(writer: DatasetWriter, dataset: Dataset, *, quiet: bool) -> Iterator[tuple[Meter, list[int]]]:
    """Open a writer for the parts that are made of those of `dataset`: a meter, and the numbers of parts to make."""
    with writer.open():
        done = writer.committed(len(dataset.parts))
        with meter(str(writer.head["verb"]), dataset.rows, quiet=quiet, unit="rows") as progress:
            progress.skip(sum(dataset.parts[i].rows for i in done))
            todo = [i for i in range(len(dataset.parts)) if i not in done]
            if todo:
                writer.reopen()
            yield progress, todo


def check_not_in_place(dataset: Dataset, out: str | Path) -> None:
    """Raises UserError if `out` is a folder of the dataset."""
    if any(os.path.realpath(out) == os.path.realpath(folder) for folder in dataset.folders):
        raise UserError(f"{out}: --out is the dataset itself; nothing is changed in place, choose a new folder.")


def _checked(tables: Iterable[pa.Table], check: Callable[[], None], progress: Meter) -> Iterator[pa.Table]:
    for table in tables:
        check()
        yield table
        progress.add(table.num_rows, table.num_rows, 0)


def _ahead(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, each computed while the one before is written: two cores for a part, where parts are few."""
    upcoming = iter(tables)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting = pool.submit(next, upcoming, None)
        while (table := waiting.result()) is not None:
            waiting = pool.submit(next, upcoming, None)
            yield table
