"""Write a dataset from another one, part by part, and count its scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Semaphore
from typing import Any

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import SCORE_COUNTS, PartInfo
from aligncurate.dataset.record import usable_scores
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.engines import threads
from aligncurate.errors import UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath, identity
from aligncurate.levels import Counts, Floats
from aligncurate.progress import Meter, meter

Watch = Callable[[Iterable[pa.Table]], Iterator[pa.Table]]
"""Passes tables on, shows their progress, and stops when the run stops."""

_CORES = os.cpu_count() or 1
_THREADS = _CORES + (_CORES + 1) // 2  # while some wait for the disk to sync their part, others compute


def rewrite(
    dataset: Dataset,
    out: str | AnyPath,
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
    rows = [part.rows for part in dataset.parts]
    return write_parts(writer, rows, lambda index, watch: change(index, watch(dataset.groups(index))), quiet=quiet)


def write_parts(
    writer: DatasetWriter,
    rows: Sequence[int],
    tables: Callable[[int, Watch], Iterable[pa.Table]],
    *,
    quiet: bool = False,
) -> Dataset:
    """Write the parts of a dataset that earlier runs have not committed, then its manifest.

    Args:
        writer: of the dataset.
        rows: rows that are read for each part, for the progress.
        tables: the row groups of a part, by its number; what it reads for them, it passes through the second argument.
        quiet: show no progress.

    Raises:
        UserError: the folder cannot be used.
    """
    if finished := writer.finished():
        return finished
    computing = Semaphore(_CORES)  # also limits how many row groups are in memory
    scores = [f.name for f in writer.schema if f.name.startswith("score") and pa.types.is_floating(f.type)]

    def make(index: int, check: Callable[[], None]) -> PartInfo:
        with writer.part(index) as part, computing:
            written: dict[str, list[Floats]] = {column: [] for column in scores}
            made = tables(index, lambda read: _checked(read, check, progress))
            for table in made if len(todo) >= _CORES else _ahead(made):
                if table.num_rows:
                    part.write(table)
                    for column in scores:
                        written[column].append(usable_scores(table, column))
            # Counted at once: bins cost more than the scores of a row group.
            part.facts[SCORE_COUNTS] = {column: Counts.of(each).to_json() for column, each in written.items()}
        assert part.info is not None
        return part.info

    with missing_parts(writer, rows, quiet=quiet) as (progress, todo):
        for _ in threads.run(make, todo, workers=_THREADS):
            pass
        return writer.finish(len(rows))


@contextmanager
def missing_parts(writer: DatasetWriter, rows: Sequence[int], *, quiet: bool) -> Iterator[tuple[Meter, list[int]]]:
    """Open a writer for as many parts as there are `rows`: a meter of these, and the numbers of parts to make."""
    with writer.open():
        done = writer.committed(len(rows))
        with meter(str(writer.head["verb"]), sum(rows), quiet=quiet, unit="rows") as progress:
            progress.skip(sum(rows[i] for i in done))
            todo = [i for i in range(len(rows)) if i not in done]
            if todo:
                writer.reopen()
            yield progress, todo


def check_not_in_place(dataset: Dataset, out: str | AnyPath) -> None:
    """Raises UserError if `out` is a folder of the dataset."""
    if any(identity(as_path(out)) == identity(folder) for folder in dataset.folders):
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
