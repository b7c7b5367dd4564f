"""From one dataset to the next: part i of the input becomes part i of the output."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from aligncurate.dataset import Dataset, DatasetWriter, PartInfo
from aligncurate.engines import local
from aligncurate.errors import UserError
from aligncurate.progress import Meter, meter

_THREADS = min(8, 2 * (os.cpu_count() or 1))  # at any time some wait for the disk

Rewrite = Callable[[int, Iterable[pa.Table]], Iterable[pa.Table]]
"""Given a part's number and its row groups, the row groups of the new part."""


def derive(
    dataset: Dataset, out: str | Path, head: Mapping[str, Any], rewrite: Rewrite, *, quiet: bool = False
) -> Dataset:
    """Write a new dataset whose parts are those of `dataset`, rewritten.

    Parts that an interrupted run committed are kept. Raises UserError when `out` cannot be used.
    """
    if os.path.abspath(out) == os.path.abspath(dataset.path):
        raise UserError(f"{out}: --out is the dataset itself; nothing is changed in place, name a new folder.")
    writer = DatasetWriter(out, head, dataset.schema)

    def part(index: int, check: Callable[[], None]) -> PartInfo:
        with writer.part(index) as target:
            for table in rewrite(index, _checked(dataset.groups(index), check, shown)):
                if table.num_rows:
                    target.write(table)
        assert target.info is not None
        return target.info

    with writer.open():
        done = {i: info for i in range(len(dataset.parts)) if (info := writer.committed(i)) is not None}
        with meter(str(head["verb"]), dataset.rows, quiet=quiet, unit="rows") as shown:
            shown.skip(sum(dataset.parts[i].rows for i in done))
            todo = [i for i in range(len(dataset.parts)) if i not in done]
            for outcome in local.run(part, todo, threads=_THREADS):
                assert outcome.result is not None
                done[outcome.shard] = outcome.result
        return writer.finish([done[i] for i in range(len(dataset.parts))])


def _checked(tables: Iterable[pa.Table], check: Callable[[], None], shown: Meter) -> Iterator[pa.Table]:
    for table in tables:
        check()
        yield table
        shown.add(table.num_rows, table.num_rows, 0)
