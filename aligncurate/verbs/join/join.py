"""The verb `join`: adds columns of a Parquet or CSV file to the rows of a dataset, by key, uid or another column."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from aligncurate.dataset.joined import Datasets, open_datasets
from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath
from aligncurate.settings import lists_settings, make, recorded
from aligncurate.verbs.join.options import JoinOptions
from aligncurate.verbs.join.table import Table
from aligncurate.verbs.rewrite import rewrite
from aligncurate.verbs.scores import ahead
from aligncurate.verbs.uids import UID_COLUMNS, row_uids


@dataclass(frozen=True)
class Joined:
    """What `join` did.

    Attributes:
        dataset: the new dataset.
        matched: rows that were found in the table.
        unmatched: rows that were not, with nulls in the new columns.
        columns: the columns that were added.
        repeated: rows of the table that were left out, because an earlier one has the same value.
    """

    dataset: Dataset
    matched: int
    unmatched: int
    columns: list[str]
    repeated: int


@lists_settings(JoinOptions)
def join(
    dataset: Datasets, table: str | AnyPath, out: str | AnyPath, *, quiet: bool = False, **settings: Any
) -> Joined:
    """Add columns of another table to a dataset. Rows without a match stay, with nulls in these columns.

    The table's chosen columns are held in memory, with 24 bytes more for each of its rows; the dataset is read part by
    part.

    Args:
        dataset: the dataset; several folders are read as one.
        table: a Parquet, CSV or TSV file.
        out: folder of the new dataset.
        quiet: show no progress.
        settings: fields of `aligncurate.verbs.join.options.JoinOptions`.

    Raises:
        UserError: the table or an option cannot be used, or no row is in the table.
    """
    options = make(JoinOptions, settings)
    opened = open_datasets(dataset)
    _check_column(opened, options.on)
    table = as_path(table)
    added = Table(table, options, taken=opened.schema.names)
    with storage.open_file(str(table)) as file:
        record = {"table": {"name": table.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}}  # type: ignore[arg-type]
    columns = (
        [options.on] if options.on in opened.schema.names else [n for n in UID_COLUMNS if n in opened.schema.names]
    )

    def count(index: int) -> int:
        values = _values(opened.read(index, columns), options.on)
        return int((added.find(values) >= 0).sum())

    matched = sum(ahead(count, len(opened.parts)))
    if not matched:
        raise UserError(
            f"{table}: none of the {opened.rows:,} rows of {opened.name} is in it; is --on {options.on} right?"
        )

    def add(_: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for rows in tables:
            matches = added.find(_values(rows, options.on))
            for column, values in zip(added.schema, added.take(matches), strict=True):
                rows = rows.append_column(column, values)
            yield rows

    schema = pa.schema([*opened.schema, *added.schema])
    joined = rewrite(opened, out, opened.derived("join", recorded(options) | record), add, schema=schema, quiet=quiet)
    return Joined(joined, matched, opened.rows - matched, added.schema.names, added.repeated)


def _check_column(dataset: Dataset, name: str) -> None:
    """Raise UserError unless rows can be told by column `name`."""
    if name not in dataset.schema.names and name != "uid":
        raise UserError(f"--on {name}: {dataset.name} has no such column; it has {', '.join(dataset.schema.names)}.")
    if name in dataset.schema.names:
        kind = dataset.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise UserError(f"--on {name}: a column of {kind} cannot tell rows apart; use one of text or integers.")


def _values(rows: pa.Table, name: str) -> pa.Array:
    """The values to look up, as text. Rows without a column `uid` have the uid that `export` would give them."""
    if name != "uid" or name in rows.schema.names:
        return rows[name].combine_chunks().cast(pa.large_string())
    uids, known = row_uids(rows.select([column for column in UID_COLUMNS if column in rows.schema.names]))
    return pa.array([f"{a:016x}{b:016x}" for a, b in uids.tolist()], pa.large_string(), mask=np.logical_not(known))
