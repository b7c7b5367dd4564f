"""What the scores of a dataset are: quantiles, a histogram, what each threshold keeps, and the levels, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import usable_scores
from aligncurate.levels import Counts, Floats, WrongCounts, assign_levels, key_scores, order_statistics
from aligncurate.verbs.inspect.result import QUANTILES, Cut, Histogram, Level
from aligncurate.verbs.scores import ahead

_BINS = 36  # two characters each on 80 columns, three on 120
_TAIL = 0.001  # share of the scores at either end that may fall into the end bins
_HELD = 1 << 26  # scores kept in memory (256 MiB) so that they need not be read twice


@dataclass(frozen=True)
class Measured:
    """Scores and levels of a dataset; the fields are those of `Inspection`."""

    scored: int
    mean: float | None
    quantiles: dict[str, float]
    histogram: Histogram | None
    cuts: list[Cut]
    levels: list[Level]


def measure(dataset: Dataset, column: str, thresholds: Floats, mismatched: Floats) -> Measured:
    """Measure a dataset in one pass over its scores; in two if nobody counted its more than 64 million scores before.

    Args:
        dataset: the dataset.
        column: its scores.
        thresholds: those of `column`, empty without levels for it.
        mismatched: scores of mismatched pairs.
    """
    scan = _Scan(dataset, column)
    counts = dataset.score_counts(column) or Counts.of(scan())
    try:
        return _measure(dataset, scan, counts, thresholds, mismatched)
    except WrongCounts:  # something else has rewritten the parts
        return _measure(dataset, scan, Counts.of(scan()), thresholds, mismatched)


class _Scan:
    """Passes over the usable scores of a dataset; the first one adds up the levels too.

    Attributes:
        levels: number of rows, lowest and highest score, sum and number of scores, by level.
    """

    def __init__(self, dataset: Dataset, column: str) -> None:
        self._dataset, self._column = dataset, column
        self._held: list[Floats] | None = None
        self.levels: dict[int | None, _LevelSum] | None = None

    def __call__(self) -> Iterator[Floats]:
        if self._held is not None:
            yield from self._held
            return
        held: list[Floats] | None = [] if self._dataset.rows <= _HELD else None
        levels: dict[int | None, _LevelSum] = {}
        for scores, sums in ahead(self._read, len(self._dataset.parts)):
            for level, each in sums.items():
                levels.setdefault(level, _LevelSum()).add(each)
            if held is not None:
                held.append(scores)
            yield scores
        self.levels, self._held = levels, held

    def _read(self, index: int) -> tuple[Floats, dict[int | None, _LevelSum]]:
        columns = ["status", self._column, *(["level"] if self._dataset.levels else [])]
        table = self._dataset.read(index, columns)
        scores = usable_scores(table, self._column)
        missing = np.isnan(scores)
        sums: dict[int | None, _LevelSum] = {}
        if self._dataset.levels:
            values = pa.table({"level": table["level"], "score": pa.array(scores, mask=missing)})
            wanted = [("score", "min"), ("score", "max"), ("score", "sum"), ("score", "count"), ([], "count_all")]
            for row in values.group_by("level", use_threads=False).aggregate(wanted).to_pylist():
                sums[row["level"]] = _LevelSum(
                    row["count_all"], row["score_min"], row["score_max"], row["score_sum"] or 0.0, row["score_count"]
                )
        return scores[~missing], sums


@dataclass
class _LevelSum:
    rows: int = 0
    low: float | None = None
    high: float | None = None
    total: float = 0.0
    scored: int = 0

    def add(self, other: _LevelSum) -> None:
        self.rows += other.rows
        self.low = min((v for v in (self.low, other.low) if v is not None), default=None)
        self.high = max((v for v in (self.high, other.high) if v is not None), default=None)
        self.total += other.total
        self.scored += other.scored


class _Tally:
    """Counts scores below each of some ascending boundaries, and adds them up, as they pass by."""

    def __init__(self, boundaries: Floats) -> None:
        self._boundaries = boundaries
        self._cells = np.zeros(len(boundaries) + 1, np.int64)
        self.sum = 0.0

    def watch(self, scans: Iterable[Floats]) -> Iterator[Floats]:
        for scores in scans:
            self.add(scores)
            yield scores

    def add(self, scores: Floats) -> None:
        cells = np.searchsorted(self._boundaries, scores, side="right")
        self._cells += np.bincount(cells, minlength=len(self._cells))
        self.sum += float(scores.sum(dtype=np.float64))

    @property
    def total(self) -> int:
        return int(self._cells.sum())

    def below(self, values: Floats) -> NDArray[np.int64]:
        """How many scores are less than each of `values`, which must be boundaries."""
        return np.asarray(np.cumsum(self._cells)[np.searchsorted(self._boundaries, values)])

    def histogram(self, inner: Floats) -> list[int]:
        return [int(n) for n in np.diff([0, *self.below(inner), self.total])]


def _measure(dataset: Dataset, scan: _Scan, counts: Counts, thresholds: Floats, mismatched: Floats) -> Measured:
    """Everything that needs the scores, in one pass over them. Raises WrongCounts when `counts` are not theirs."""
    total = counts.total
    if not total:
        return Measured(0, None, {}, None, [], _levels(dataset, scan))
    low, high = _range(counts, mismatched)
    inner = np.unique(np.linspace(low, high, _BINS + 1)[1:-1].astype(np.float32))
    boundaries = np.union1d(inner, thresholds)
    pairs, others = _Tally(boundaries), _Tally(boundaries)
    others.add(mismatched)
    ranks = [int(q * (total - 1)) for q in QUANTILES]
    values = order_statistics(lambda: pairs.watch(scan()), ranks, counts)

    ends = np.asarray([values[0], values[-1], *mismatched])  # the true ones, where no inner edge lies outside of them
    first = ends.min() if not len(inner) or ends.min() < inner[0] else low
    last = ends.max() if not len(inner) or ends.max() >= inner[-1] else high
    edges = np.asarray([first, *inner, last])
    histogram = Histogram(
        edges=edges.tolist(),
        counts=pairs.histogram(inner),
        levels=assign_levels(_middles(edges), thresholds).tolist() if len(thresholds) else [],
        mismatched=others.histogram(inner) if others.total else [],
    )
    cuts = [
        Cut(
            level=level,
            score=float(score),
            count=total - int(below),
            share=(total - int(below)) / dataset.rows,
            mismatched=1 - int(others_below) / others.total if others.total else None,
        )
        for level, (score, below, others_below) in enumerate(
            zip(thresholds, pairs.below(thresholds), others.below(thresholds), strict=True), 2
        )
    ]
    quantiles = {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
    return Measured(total, pairs.sum / total, quantiles, histogram, cuts, _levels(dataset, scan))


def _range(counts: Counts, mismatched: Floats) -> tuple[float, float]:
    """Scores between which nearly all pairs and all mismatched pairs lie."""
    ends = np.cumsum(counts.bins)
    tail = int(_TAIL * (counts.total - 1))
    first, last = np.searchsorted(ends, [tail, counts.total - 1 - tail], side="right").astype(np.uint32)
    bounds = key_scores(np.asarray([first << 16, (last << 16) | 0xFFFF], np.uint32)).astype(float)
    low, high = bounds[0], bounds[1]
    if len(mismatched):
        low = min(low, float(np.quantile(mismatched, _TAIL)))
        high = max(high, float(np.quantile(mismatched, 1 - _TAIL)))
    return low, high


def _middles(edges: NDArray[np.float64]) -> Floats:
    """Middles of the bins; of the end bins as if they were as wide as the others."""
    middles = (edges[:-1] + edges[1:]) / 2
    if len(middles) > 2:
        middles[0], middles[-1] = 2 * middles[1] - middles[2], 2 * middles[-2] - middles[-3]
    return middles.astype(np.float32)


def _levels(dataset: Dataset, scan: _Scan) -> list[Level]:
    """The levels, worst first, without examples; the rows without a level last."""
    if not dataset.levels:
        return []
    if scan.levels is None:
        for _ in scan():
            pass
    sums = scan.levels or {}
    found = []
    for level in [*range(1, dataset.levels + 1), *([None] if None in sums else [])]:
        each = sums.get(level, _LevelSum())
        share = each.rows / dataset.rows if dataset.rows else 0.0
        mean = each.total / each.scored if each.scored else None
        found.append(Level(level, each.rows, share, each.low, each.high, mean, []))
    return found
