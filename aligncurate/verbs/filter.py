"""The verb `filter`: choose rows by SQL, by level, by exact top fraction, and at random."""

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
    """Keep some rows of a dataset. The options combine in the order of the arguments.

    Args:
        dataset: what to choose from.
        out: folder of the new dataset.
        where: SQL expression over the columns, as polars understands it, decided row by row.
        levels: levels to keep, such as `5-8` or `1,3,7-8`.
        top_fraction: keep exactly the best ceil(fraction * n) of the n scored rows; of equal scores the first.
        sample: then keep so many rows, each equally likely; all when there are fewer.
        seed: of the sample; the same seed takes the same rows, however the work is split.
        score_column: for `top_fraction`.

    Raises UserError for expressions and numbers that cannot be used.
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
    """The levels that `5-8` or `1,3,7-8` names. Raises UserError for anything else."""
    found: set[int] = set()
    for piece in text.split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UserError(f"--levels {text}: write levels as 5-8 or 1,3,7-8.")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise UserError(f"--levels {text}: {piece.strip()} names no levels; they count from 1 up.")
        found.update(range(first, min(last, 127) + 1))
    return sorted(found)


@dataclass(frozen=True)
class _Top:
    """Rows with a score above `threshold`, and of those at it the first `ties[i]` of each part i."""

    threshold: np.float32
    ties: dict[int, int]


class _Selection:
    """Decides, part by part, which rows stay; needs only the columns that the options name."""

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
            raise UserError(f"{dataset.path}: its pairs have no levels yet; run `aligncurate bucket` first.")
        self._top = self._find_top(top_fraction) if top_fraction is not None else None
        self._last = self._find_last(sample) if sample is not None else None

    def mask(self, index: int) -> Mask:
        """Which rows of part `index` stay, bool [rows]."""
        mask = self._top_mask(index)
        if self._last is not None:
            mask &= self._hashes(index) <= self._last
        return mask

    def _base(self, index: int) -> Mask:
        """After `where` and `levels`."""
        mask = np.ones(self._dataset.parts[index].rows, bool)
        if self._where is not None:
            mask &= _where_mask(self._dataset.files[index], self._where, len(mask))
        if self._levels is not None:
            column = self._dataset.read(index, ["level"])["level"].fill_null(0).to_numpy()
            mask &= np.isin(column, self._levels)
        return mask

    def _scores(self, index: int) -> NDArray[np.float32]:
        """Scores of part `index`, NaN where there is none."""
        return usable_scores(self._dataset.read(index, ["status", self._column]), self._column)

    def _scored(self) -> Iterator[NDArray[np.float32]]:
        for index in range(len(self._dataset.parts)):
            scores = self._scores(index)[self._base(index)]
            yield scores[~np.isnan(scores)]

    def _find_top(self, fraction: float) -> _Top:
        if not 0 < fraction <= 1:
            raise UserError(f"--top-fraction {fraction}: use a number above 0 and up to 1.")
        check_score_column(self._dataset, self._column)
        counts = Counts.of(self._scored())
        if not counts.total:
            raise UserError(f"{self._dataset.path}: no row with a {self._column} is left to take the top of.")
        keep = math.ceil(Fraction(str(fraction)) * counts.total)  # 0.3 of 10 is 3, whatever 0.3 is in binary
        threshold = order_statistics(self._scored, [counts.total - keep], counts)[0]
        tallies = [(int((s > threshold).sum()), int((s == threshold).sum())) for s in self._scored()]
        left = keep - sum(above for above, _ in tallies)
        ties = {}
        for index, (_, equal) in enumerate(tallies):
            ties[index] = min(equal, left)
            left -= ties[index]
        return _Top(threshold, ties)

    def _top_mask(self, index: int) -> Mask:
        mask = self._base(index)
        if self._top is None:
            return mask
        scores = self._scores(index)
        equal: Mask = mask & (scores == self._top.threshold)
        equal &= np.cumsum(equal) <= self._top.ties[index]
        above: Mask = mask & (scores > self._top.threshold)
        return above | equal

    def _hashes(self, index: int) -> NDArray[np.uint64]:
        """A random number per row that depends on the seed and the row's place alone."""
        rows = np.arange(self._starts[index], self._starts[index + 1], dtype=np.uint64)
        return _mix(rows + _mix(np.uint64(self._seed) + np.zeros(1, np.uint64)))

    def _find_last(self, sample: int) -> np.uint64:
        """The largest of the `sample` smallest hashes among the rows that are left."""
        if sample < 1:
            raise UserError(f"--sample {sample}: use a number of at least 1.")
        if self._seed < 0:
            raise UserError(f"--seed {self._seed}: use a number of at least 0.")
        smallest = np.empty(0, np.uint64)
        for index in range(len(self._dataset.parts)):
            found = np.concatenate([smallest, self._hashes(index)[self._top_mask(index)]])
            smallest = np.partition(found, sample - 1)[:sample] if len(found) > sample else found
        return smallest.max() if len(smallest) else np.uint64(0)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finisher (Steele, Lea, Flood 2014): a bijection, so no two rows tie."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _check_where(dataset: Dataset, where: str) -> None:
    """Raise UserError that says what is wrong with a condition; it must decide each row by itself.

    Parts are filtered one by one, so anything that looks at several rows would give another answer.
    """
    import polars as pl

    look = pl.DataFrame({f.name: [None, None] for f in dataset.schema}, schema=dataset.scan().collect_schema())
    try:
        if _SEVERAL_ROWS.search(_LITERALS.sub("", where)):
            raise UserError(f"--where {where}: each row must be decided by itself; windows and subqueries cannot.")
        found = look.lazy().sql(f"SELECT ({where}\n) AS keep FROM self").collect()["keep"]
    except pl.exceptions.ColumnNotFoundError as error:
        name = str(error).partition('"')[2].partition('"')[0]
        close = get_close_matches(name, dataset.schema.names, n=1)
        hint = f"; did you mean {close[0]}" if close else ""
        columns = ", ".join(dataset.schema.names)
        raise UserError(f"--where {where}: there is no column {name}{hint}. Columns: {columns}.") from None
    except pl.exceptions.SQLSyntaxError as error:
        first = str(error).splitlines()[0]
        if "GROUP BY" in first:
            raise UserError(f"--where {where}: each row must be decided by itself; aggregates cannot.") from None
        raise UserError(f"--where {where}: {first}.") from None
    except pl.exceptions.PolarsError as error:
        raise UserError(f"--where {where}: {str(error).splitlines()[0]}.") from None
    if found.dtype != pl.Boolean:
        raise UserError(f"--where {where}: this gives {found.dtype}, not true or false; compare it with something.")
    if len(found) != 2:
        raise UserError(f"--where {where}: each row must be decided by itself; aggregates cannot.")


def _where_mask(file: Path, where: str, rows: int) -> Mask:
    """For which rows of a part the condition is true."""
    import polars as pl

    frame = pl.scan_parquet(file, glob=False).with_row_index(_INDEX)
    found = frame.sql(f"SELECT {_INDEX} FROM self WHERE ({where}\n)").collect()[_INDEX]
    mask = np.zeros(rows, bool)
    mask[found.to_numpy()] = True
    return mask
