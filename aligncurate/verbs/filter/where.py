"""The condition of `--where`: SQL on the columns of one row, in the SQL of polars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import count

import numpy as np
import polars as pl

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.verbs.filter.masks import Mask

_BEGIN = "SELECT ("
_POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
_UNEXPECTED = re.compile(r"Expected: (.*), found: (.*) at Line: (\d+), Column: (\d+)")
_NOT_CLOSED = re.compile(r"Unterminated .* at Line: \d+, Column: (\d+)")
_LITERALS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")
_WINDOWS = "over|row_number|rank|dense_rank|ntile|lag|lead|first_value|last_value|nth_value"
_SEVERAL_ROWS = re.compile(rf"\b(?:{_WINDOWS})\s*\(|\bselect\b", re.IGNORECASE)


class Where:
    """A condition on the rows of a dataset; reads only the columns that it uses.

    Parts are filtered one by one, so an aggregate or a window would see only the rows of one part.

    Raises UserError if the condition is invalid or uses more than one row.
    """

    def __init__(self, dataset: Dataset, where: str) -> None:
        self._dataset, self._where = dataset, where
        if not where.strip():
            raise UserError("--where: the condition is empty.")
        if _SEVERAL_ROWS.search(_LITERALS.sub("", where)):
            raise UserError(f"--where {where}: conditions work on one row at a time, without windows and subqueries.")
        example = pl.DataFrame(dataset.schema.empty_table()).clear(2)
        try:
            result = example.lazy().sql(f"{_BEGIN}{where}\n) AS keep FROM self").collect()["keep"]
            used = pl.sql_expr(f"({where}\n)").meta.root_names()
        except pl.exceptions.ColumnNotFoundError as error:
            raise UserError(f"--where {where}: {_unknown_column(str(error), where, dataset.schema.names)}") from None
        except _POLARS_ERRORS as error:
            raise UserError(f"--where {where}: {_sentence(str(error), where)}") from None
        if result.dtype != pl.Boolean:
            what = f"gives {result.dtype}, not true or false; add a comparison (score > 0.3)"
            raise UserError(f"--where {where}: {what}.")
        if len(result) != 2:
            raise UserError(f"--where {where}: conditions work on one row at a time, without aggregates.")
        self._columns = [name for name in dataset.schema.names if name in used] or ["status"]

    def mask(self, index: int) -> Mask:
        """Which rows of part `index` satisfy the condition. Raises UserError if it cannot be evaluated on them."""
        number = next(name for i in count() if (name := f"row_{i}") not in self._columns)
        frame = pl.DataFrame(self._dataset.read(index, self._columns)).with_row_index(number)
        try:
            matches = frame.lazy().sql(f"SELECT {number} FROM self WHERE ({self._where}\n)").collect()[number]
        except _POLARS_ERRORS as error:
            reason = _first_line(str(error))
            hint = "; TRY_CAST gives null instead" if reason.startswith("conversion") else ""
            raise UserError(f"--where {self._where}: fails on rows of part {index} ({reason}){hint}.") from None
        mask = np.zeros(len(frame), bool)
        mask[matches.to_numpy()] = True
        return mask


def _unknown_column(error: str, where: str, columns: Sequence[str]) -> str:
    name = error.partition('"')[2].partition('"')[0]
    if name.upper() == "NOT":
        return "something is missing after NOT."
    if f'"{name}"' in where:
        return f"no column {name}; text is written in single quotes: '{name}'."
    close = get_close_matches(name, columns, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"no column {name}{hint} Columns: {', '.join(columns)}."


def _sentence(error: str, where: str) -> str:
    """What polars says of a condition, in words that do not show the query around it."""
    first = _first_line(error)
    if "GROUP BY" in first:
        return "conditions work on one row at a time, without aggregates."
    if opened := _NOT_CLOSED.search(first):
        return f"the quote at character {int(opened[1]) - len(_BEGIN)} is never closed."
    if "multi-line comment" in first:
        return "the comment (/*) is never closed."
    if "regex parse error" in first:
        return "it has a pattern that is not a regular expression."
    if wrong := _UNEXPECTED.search(first):
        expected, found, line, column = wrong[1], wrong[2], int(wrong[3]), int(wrong[4])
        if line > where.count("\n") + 1:  # the error is in what is written behind the condition
            if expected == "end of statement":
                return "it has a ) too many." if found == ")" else "it is not a condition on a row."
            return "it ends too early." if "|" in expected else f"it ends too early; {expected} is missing."
        place = column - (len(_BEGIN) if line == 1 else 0)
        return f"{found} at character {place}{f' of line {line}' if line > 1 else ''} does not belong there."
    if "could not evaluate comparison" in first:
        return "it compares things of types that cannot be compared."
    if "{" in first or "Span" in first:  # polars shows its own parse of the condition
        return "polars has no such SQL expression."
    return f"{first.rstrip('.')}."


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0]
