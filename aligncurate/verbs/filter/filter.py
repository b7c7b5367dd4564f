"""The verb `filter`: keeps rows by an SQL condition, level, score, image or exact top fraction, or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from aligncurate.dataset.joined import Datasets, open_datasets
from aligncurate.dataset.reader import Dataset
from aligncurate.io import storage
from aligncurate.io.paths import AnyPath
from aligncurate.settings import lists_settings, make, recorded
from aligncurate.verbs.filter.compact import write_compact
from aligncurate.verbs.filter.options import FilterOptions
from aligncurate.verbs.filter.selection import select
from aligncurate.verbs.rewrite import rewrite


@lists_settings(FilterOptions)
def filter(dataset: Datasets, out: str | AnyPath, *, quiet: bool = False, **settings: Any) -> Dataset:
    """Keep some rows of a dataset.

    Args:
        dataset: the dataset to filter; several folders are read as one.
        out: folder of the new dataset.
        quiet: show no progress and no notices.
        settings: fields of `aligncurate.verbs.filter.options.FilterOptions`, applied in their order.

    Raises:
        UserError: no option is given, or one cannot be used.
    """
    options = make(FilterOptions, settings)
    opened = open_datasets(dataset)
    selection = select(opened, options, quiet=quiet)
    record = recorded(options) | {"seed": options.seed if options.sample is not None else None}
    if options.uids is not None:  # by its content, so that a resumed run has the same
        with storage.open_file(options.uids) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        record["uids"] = f"{storage.basename(options.uids)} (sha256 {digest})"
    head = opened.derived("filter", record)
    if options.rows_per_part is not None:
        return write_compact(opened, out, head, selection, options.rows_per_part, quiet=quiet)

    def keep(index: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        mask = selection.mask(index)
        start = 0
        for table in tables:
            yield table.filter(pa.array(mask[start : start + table.num_rows]))
            start += table.num_rows

    return rewrite(opened, out, head, keep, quiet=quiet)
