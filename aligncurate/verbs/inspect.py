"""The verb `inspect`: measures a dataset. `aligncurate.cli.render` draws the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.levels import Counts, Floats, WrongCounts, assign_levels, key_scores, order_statistics
from aligncurate.verbs.mismatched import from_embeddings, from_encoder
from aligncurate.verbs.scores import check_score_column, iter_scores

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BINS = 36  # two characters each on 80 columns, three on 120
_TAIL = 0.001  # share of the scores at either end that may fall into the end bins
_EXAMPLE_PARTS = 16  # examples come from at most this many parts, spread over the dataset


@dataclass(frozen=True)
class Level:
    """One alignment level; `level` is None for the rows without a level. `share` is of all rows."""

    level: int | None
    count: int
    share: float
    minimum: float | None
    maximum: float | None
    mean: float | None
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """What keeping `level` and the levels above it keeps.

    Attributes:
        level: the lowest level that is kept.
        score: its threshold.
        count, share: rows that score at least `score`, and their share of all rows.
        mismatched: share of the mismatched pairs that score at least `score`.
    """

    level: int
    score: float
    count: int
    share: float
    mismatched: float | None


@dataclass(frozen=True)
class Histogram:
    """Scores per bin. A bin holds its lower edge; the last bin holds its upper edge too.

    All bins have the same width, except that the first reaches down to the smallest and the last up to the largest
    score: about 0.1% of the scores at either end may lie far out, and would squeeze all others into a few bins.

    Attributes:
        edges: ascending, one more than there are bins.
        counts: scores in each bin.
        levels: level of the middle of each bin; empty without thresholds for these scores.
        mismatched: mismatched pairs in each bin; empty where there are none.
    """

    edges: list[float]
    counts: list[int]
    levels: list[int]
    mismatched: list[int]


@dataclass(frozen=True)
class Mismatched:
    """Scores of images with another row's caption: where pairs that do not belong together score."""

    pairs: int
    mean: float


@dataclass(frozen=True)
class Inspection:
    """What a dataset holds; `to_json` gives what `aligncurate inspect --json` prints.

    Attributes:
        statuses: rows by status.
        errors: each status of failed rows with their number and an example, most frequent first.
        quantiles: exact scores at QUANTILES (rank floor(q * (n - 1))), empty without scores.
        histogram: None without scores.
        mismatched: None where the dataset has no embeddings that give its scores.
        method: how the thresholds were found, `quantile` or `uniform`.
        frozen: whether the thresholds were taken from other scores (`bucket --thresholds`).
        cuts: one per threshold, lowest first; empty without thresholds for these scores.
        levels: worst first; empty when the dataset has no levels.
    """

    path: str
    rows: int
    parts: int
    made_by: str
    encoder: str | None
    score_column: str
    scored: int
    mean: float | None
    statuses: dict[str, int]
    errors: list[dict[str, Any]]
    quantiles: dict[str, float]
    histogram: Histogram | None
    mismatched: Mismatched | None
    method: str | None
    frozen: bool
    cuts: list[Cut]
    levels: list[Level]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    dataset: str | Path | Dataset, *, examples: int = 0, mismatched: bool = False, score_column: str = "score"
) -> Inspection:
    """Count and measure a dataset.

    Reads the scores once if `score` left their counts in the manifest, else twice.

    Args:
        dataset: the dataset, or its folder.
        examples: number of captions to show for each level.
        mismatched: score mismatched captions with the dataset's encoder where it has no embeddings.
        score_column: the scores to measure.

    Raises UserError when there is no such dataset or column, or `mismatched` cannot load the encoder.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    if examples < 0:
        raise UserError(f"--examples {examples}: must be at least 0.")
    check_score_column(opened, score_column)
    thresholds = opened.manifest.get("thresholds") or {}
    mine = thresholds.get("score_column") == score_column
    values = np.asarray(thresholds["values"] if mine else [], np.float32)
    others = from_embeddings(opened, score_column)
    if mismatched and not len(others):
        others = from_encoder(opened, score_column)
    counts = opened.score_counts(score_column) or Counts.of(iter_scores(opened, score_column))
    try:
        measured = _measure(opened, score_column, counts, values, others)
    except WrongCounts:  # something else has rewritten the parts
        counts = Counts.of(iter_scores(opened, score_column))
        measured = _measure(opened, score_column, counts, values, others)
    encoder = opened.encoder_of(score_column)
    return Inspection(
        path=str(opened.path),
        rows=opened.rows,
        parts=len(opened.parts),
        made_by=opened.manifest["verb"],
        encoder=f"{encoder['model']} ({encoder['pretrained']}), {encoder['precision']}" if encoder else None,
        score_column=score_column,
        scored=counts.total,
        mean=measured.mean,
        statuses=opened.statuses,
        errors=_errors(opened),
        quantiles=measured.quantiles,
        histogram=measured.histogram,
        mismatched=Mismatched(len(others), float(others.mean(dtype=np.float64))) if len(others) else None,
        method=thresholds.get("method"),
        frozen=_frozen(opened),
        cuts=measured.cuts,
        levels=_levels(opened, score_column, opened.levels, examples) if opened.levels else [],
    )


@dataclass(frozen=True)
class _Measured:
    mean: float | None
    quantiles: dict[str, float]
    histogram: Histogram | None
    cuts: list[Cut]


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


def _measure(dataset: Dataset, column: str, counts: Counts, thresholds: Floats, mismatched: Floats) -> _Measured:
    """Everything that needs the scores, in one pass over them. Raises WrongCounts when `counts` are not theirs."""
    total = counts.total
    if not total:
        return _Measured(None, {}, None, [])
    low, high = _range(counts, mismatched)
    inner = np.unique(np.linspace(low, high, _BINS + 1)[1:-1].astype(np.float32))
    boundaries = np.union1d(inner, thresholds)
    pairs, others = _Tally(boundaries), _Tally(boundaries)
    others.add(mismatched)
    ranks = [int(q * (total - 1)) for q in QUANTILES]
    values = order_statistics(lambda: pairs.watch(iter_scores(dataset, column)), ranks, counts)

    ends = np.asarray([low, high, values[0], values[-1], *mismatched])
    edges = np.asarray([ends.min(), *inner, ends.max()])
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
    return _Measured(pairs.sum / total, quantiles, histogram, cuts)


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


def _frozen(dataset: Dataset) -> bool:
    """Whether the last `bucket` took its thresholds from a file."""
    steps = [dataset.manifest, *reversed(dataset.manifest.get("history", []))]
    return next((step["options"]["thresholds"] == "frozen" for step in steps if step["verb"] == "bucket"), False)


def _errors(dataset: Dataset) -> list[dict[str, Any]]:
    """An example of each kind of failure, most frequent first."""
    if not any(part.failed for part in dataset.parts):
        return []
    kinds = (
        dataset.scan()
        .filter(pl.col("error").is_not_null())
        .group_by("status")
        .agg(pl.len().alias("rows"), pl.col("key").first(), pl.col("source").first(), pl.col("error").first())
        .sort("rows", "status", descending=[True, False])
        .collect(engine="streaming")
    )
    return kinds.to_dicts()


def _levels(dataset: Dataset, column: str, levels: int, examples: int) -> list[Level]:
    score = pl.col(column)
    grouped = (
        dataset.scan()
        .group_by("level")
        .agg(pl.len().alias("n"), score.min().alias("low"), score.max().alias("high"), score.mean().alias("mean"))
        .collect(engine="streaming")
    )
    by_level = {row["level"]: row for row in grouped.to_dicts()}
    examples_of = _examples(dataset, column, examples) if examples else {}
    measured = []
    for level in [*range(1, levels + 1), *([None] if None in by_level else [])]:
        row = by_level.get(level, {"n": 0, "low": None, "high": None, "mean": None})
        share = row["n"] / dataset.rows if dataset.rows else 0.0
        texts = examples_of.get(level, []) if level is not None else []
        measured.append(Level(level, row["n"], share, row["low"], row["high"], row["mean"], texts))
    return measured


def _examples(dataset: Dataset, column: str, count: int) -> dict[int, list[dict[str, Any]]]:
    """A few pairs of each level, the same ones every time, from parts spread over the dataset."""
    step = max(1, len(dataset.parts) // _EXAMPLE_PARTS)
    chosen: dict[int, list[dict[str, Any]]] = {}
    columns = ["key", "level", column, "caption", "conversations"]
    for index in range(0, len(dataset.parts), step):
        for row in dataset.read(index, columns).to_pylist():
            if row["level"] is not None:
                chosen.setdefault(row["level"], []).append(row)
        for level, rows in chosen.items():
            rows.sort(key=lambda row: hashlib.blake2b(row["key"].encode(), digest_size=8).digest())
            chosen[level] = rows[:count]
    for rows in chosen.values():
        rows.sort(key=lambda row: -np.inf if row[column] is None else row[column], reverse=True)
    return {
        level: [{"key": row["key"], "score": row[column], "text": _text(row)} for row in rows]
        for level, rows in chosen.items()
    }


def _text(row: dict[str, Any]) -> str:
    if row["caption"] is not None:
        return str(row["caption"])
    return " ".join(f"{turn['role']}: {turn['text']}" for turn in row["conversations"] or [])
