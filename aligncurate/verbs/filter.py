"""The verb `filter`: keeps rows by an SQL condition, by level, by exact top fraction, or at random."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import usable_scores
from aligncurate.errors import UserError
from aligncurate.levels import Counts, order_statistics
from aligncurate.verbs.bucket import check_score_column
from aligncurate.verbs.rewrite import rewrite

Mask = NDArray[np.bool_]

_INDEX = "aligncurate_row"
_LITERALS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")
_WINDOWS = "over|row_number|rank|dense_rank|ntile|lag|lead|first_value|last_value|nth_value"
_SEVERAL_ROWS = re.compile(rf"\b(?:{_WINDOWS})\s*\(|\bselect\b", re.IGNORECASE)


def filter(
    dataset: str | Path | Dataset,
    out: str | Path,
    *,
    where: str | None = None,
    levels: str | None = None,
    top_fraction: float | None = None,
    sample: int | None = None,
    seed: int = 0,
    score_column: str = "score",
    quiet: bool = False,
) -> Dataset:
    """Keep some rows of a dataset. Options are applied in the order of the arguments.

    Args:
        dataset: the dataset to filter.
        out: folder of the new dataset.
        where: SQL condition on the columns of one row, in the SQL of polars.
        levels: levels to keep, such as `5-8` or `1,3,7-8`.
        top_fraction: keep exactly the best ceil(fraction * n) of the n scored rows; among equal scores the first rows.
        sample: keep this many of the remaining rows, each equally likely; all if there are fewer.
        seed: seed of the sample; the same seed keeps the same rows.
        score_column: the column that `top_fraction` ranks.
        quiet: show no progress.

    Raises:
        UserError: no option is given, or one cannot be used.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    selection = _Selection(opened, where, levels, top_fraction, sample, seed, score_column)
    options = {
        "where": where,
        "levels": levels,
        "top_fraction": top_fraction,
        "sample": sample,
        "seed": seed if sample is not None else None,
        "score_column": score_column,
    }

    def keep(index: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        mask = selection.mask(index)
        start = 0
        for table in tables:
            yield table.filter(pa.array(mask[start : start + table.num_rows]))
            start += table.num_rows

    return rewrite(opened, out, opened.derived("filter", options), keep, quiet=quiet)


def parse_levels(text: str) -> list[int]:
    """Parse a list of levels such as `5-8` or `1,3,7-8`. Raises UserError for anything else."""
    levels: set[int] = set()
    for piece in text.split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UserError(f"--levels {text}: write levels like 5-8 or 1,3,7-8.")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise UserError(f"--levels {text}: {piece.strip()} is not a valid level or range; levels start at 1.")
        levels.update(range(first, min(last, 127) + 1))
    return sorted(levels)


@dataclass(frozen=True)
class _Top:
    """All rows with a score above `threshold`, and the first `ties[i]` rows of part i with exactly that score."""

    threshold: np.float32
    ties: dict[int, int]


class _Selection:
    """Selects the rows to keep, part by part; reads only the columns that the options need."""

    def __init__(
        self,
        dataset: Dataset,
        where: str | None,
        levels: str | None,
        top_fraction: float | None,
        sample: int | None,
        seed: int,
        score_column: str,
    ) -> None:
        if where is None and levels is None and top_fraction is None and sample is None:
            raise UserError("nothing to filter by; give --where, --levels, --top-fraction or --sample.")
        self._dataset, self._column, self._seed = dataset, score_column, seed
        self._starts = np.cumsum([0, *(part.rows for part in dataset.parts)])
        if where is not None:
            _check_where(dataset, where)
        self._where = where
        self._levels = parse_levels(levels) if levels is not None else None
        if self._levels is not None and not dataset.levels:
            raise UserError(f"{dataset.path}: this dataset has no levels; run `aligncurate bucket` first.")
        self._top = self._find_top(top_fraction) if top_fraction is not None else None
        self._last = self._find_last(sample) if sample is not None else None

    def mask(self, index: int) -> Mask:
        """Which rows of part `index` are kept: bool [rows]."""
        mask = self._top_mask(index)
        if self._last is not None:
            mask &= self._hashes(index) <= self._last
        return mask

    def _base(self, index: int) -> Mask:
        """Which rows pass `where` and `levels`."""
        mask = np.ones(self._dataset.parts[index].rows, bool)
        if self._where is not None:
            mask &= _where_mask(self._dataset.files[index], self._where, len(mask))
        if self._levels is not None:
            column = self._dataset.read(index, ["level"])["level"].fill_null(0).to_numpy()
            mask &= np.isin(column, self._levels)
        return mask

    def _scores(self, index: int) -> NDArray[np.float32]:
        """Scores of part `index`, NaN for rows without one."""
        return usable_scores(self._dataset.read(index, ["status", self._column]), self._column)

    def _base_scores(self) -> Iterator[NDArray[np.float32]]:
        for index in range(len(self._dataset.parts)):
            scores = self._scores(index)[self._base(index)]
            yield scores[~np.isnan(scores)]

    def _find_top(self, fraction: float) -> _Top:
        if not 0 < fraction <= 1:
            raise UserError(f"--top-fraction {fraction}: use a number above 0 and up to 1.")
        check_score_column(self._dataset, self._column)
        counts = Counts.of(self._base_scores())
        if not counts.total:
            raise UserError(f"{self._dataset.path}: no row that matches the other options has a {self._column}.")
        keep = math.ceil(Fraction(str(fraction)) * counts.total)  # with floats, 0.55 of 100 would give 56
        threshold = order_statistics(self._base_scores, [counts.total - keep], counts)[0]
        tallies = [(int((s > threshold).sum()), int((s == threshold).sum())) for s in self._base_scores()]
        left = keep - sum(above for above, _ in tallies)
        ties = {}
        for index, (_, equal) in enumerate(tallies):
            ties[index] = min(equal, left)
            left -= ties[index]
        return _Top(threshold, ties)

    def _top_mask(self, index: int) -> Mask:
        """Which rows pass `where`, `levels` and `top_fraction`."""
        mask = self._base(index)
        if self._top is None:
            return mask
        scores = self._scores(index)
        equal: Mask = mask & (scores == self._top.threshold)
        equal &= np.cumsum(equal) <= self._top.ties[index]
        above: Mask = mask & (scores > self._top.threshold)
        return above | equal

    def _hashes(self, index: int) -> NDArray[np.uint64]:
        """A random number per row that depends only on the seed and the row's number in the dataset."""
        rows = np.arange(self._starts[index], self._starts[index + 1], dtype=np.uint64)
        return _mix(rows + _mix(np.uint64(self._seed) + np.zeros(1, np.uint64)))

    def _find_last(self, sample: int) -> np.uint64:
        """The largest of the `sample` smallest hashes of the remaining rows."""
        if sample < 1:
            raise UserError(f"--sample {sample}: use a number of at least 1.")
        if self._seed < 0:
            raise UserError(f"--seed {self._seed}: use a number of at least 0.")
        smallest = np.empty(0, np.uint64)
        for index in range(len(self._dataset.parts)):
            hashes = np.concatenate([smallest, self._hashes(index)[self._top_mask(index)]])
            smallest = np.partition(hashes, sample - 1)[:sample] if len(hashes) > sample else hashes
        return smallest.max() if len(smallest) else np.uint64(0)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection, so all rows get different numbers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _check_where(dataset: Dataset, where: str) -> None:
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


def _where_mask(file: Path, where: str, rows: int) -> Mask:
    """Which rows of a part satisfy the condition."""
    import polars as pl

    frame = pl.scan_parquet(file, glob=False).with_row_index(_INDEX)
    matches = frame.sql(f"SELECT {_INDEX} FROM self WHERE ({where}\n)").collect()[_INDEX]
    mask = np.zeros(rows, bool)
    mask[matches.to_numpy()] = True
    return mask
