"""The condition of `--where`: SQL on the columns of one row, in the SQL of polars."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.verbs.filter.masks import Mask

_INDEX = "aligncurate_row"
_LITERALS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")
_WINDOWS = "over|row_number|rank|dense_rank|ntile|lag|lead|first_value|last_value|nth_value"
_SEVERAL_ROWS = re.compile(rf"\b(?:{_WINDOWS})\s*\(|\bselect\b", re.IGNORECASE)


def check_where(dataset: Dataset, where: str) -> None:
    """Raise UserError if a condition is invalid or uses more than one row.

    Parts are filtered one by one, so an aggregate or a window would see only the rows of one part.
    """
    import polars as pl

    example = pl.DataFrame({f.name: [None, None] for f in dataset.schema}, schema=dataset.scan().collect_schema())
    try:
        if _SEVERAL_ROWS.search(_LITERALS.sub("", where)):
            raise UserError(f"--where {where}: conditions work on one row at a time, without windows and subqueries.")
        result = example.lazy().sql(f"SELECT ({where}\n) AS keep FROM self").collect()["keep"]
    except pl.exceptions.ColumnNotFoundError as error:
        name = str(error).partition('"')[2].partition('"')[0]
        close = get_close_matches(name, dataset.schema.names, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        columns = ", ".join(dataset.schema.names)
        raise UserError(f"--where {where}: no column {name}{hint} Columns: {columns}.") from None
    except pl.exceptions.SQLSyntaxError as error:
        first = str(error).splitlines()[0]
        if "GROUP BY" in first:
            raise UserError(f"--where {where}: conditions work on one row at a time, without aggregates.") from None
        raise UserError(f"--where {where}: {first}.") from None
    except pl.exceptions.PolarsError as error:
        raise UserError(f"--where {where}: {str(error).splitlines()[0]}.") from None
    if result.dtype != pl.Boolean:
        raise UserError(f"--where {where}: gives {result.dtype}, not true or false; add a comparison (score > 0.3).")
    if len(result) != 2:
        raise UserError(f"--where {where}: conditions work on one row at a time, without aggregates.")


def where_mask(file: Path, where: str, rows: int) -> Mask:
    """Which rows of a part satisfy the condition."""
    import polars as pl

    frame = pl.scan_parquet(file, glob=False).with_row_index(_INDEX)
    matches = frame.sql(f"SELECT {_INDEX} FROM self WHERE ({where}\n)").collect()[_INDEX]
    mask = np.zeros(rows, bool)
    mask[matches.to_numpy()] = True
    return mask
