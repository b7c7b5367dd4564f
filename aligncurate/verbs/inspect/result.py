"""What `inspect` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


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
        path: the folder; of several datasets that were measured as one, all `folders`.
        made_by: the verb that made it, or the verbs that made them.
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
    folders: list[str]
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
