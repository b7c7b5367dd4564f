"""Writes the rows of a part in row groups, and counts their scores for `bucket`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aligncurate.dataset.part import PartWriter
from aligncurate.dataset.receipt import SCORE_COUNTS
from aligncurate.dataset.record import Pair, to_table, usable_scores
from aligncurate.levels import Counts
from aligncurate.scoring.timing import StageClock

ROWS_PER_GROUP = 10_000
ROWS_PER_GROUP_WITH_IMAGES = 512  # image bytes wait in memory until their row group is written


class RowWriter:
    """Collects pairs and writes them, a row group at a time.

    Args:
        part: where they go.
        score_columns: columns to count, for the part's facts.
        embed_images: rows hold image bytes, so row groups are small.
        clock: measures the writing.
    """

    def __init__(self, part: PartWriter, score_columns: Sequence[str], embed_images: bool, clock: StageClock) -> None:
        self._part, self._clock = part, clock
        self._size = ROWS_PER_GROUP_WITH_IMAGES if embed_images else ROWS_PER_GROUP
        self._counts = {column: Counts.of([]) for column in score_columns}
        self._waiting: list[Pair] = []

    def add(self, pairs: Iterable[Pair]) -> None:
        self._waiting += pairs
        while len(self._waiting) >= self._size:
            self._write(self._waiting[: self._size])
            self._waiting = self._waiting[self._size :]

    def finish(self) -> None:
        """Write what is left, and note the counts in the part's facts."""
        if self._waiting:
            self._write(self._waiting)
        if self._counts:
            self._part.facts[SCORE_COUNTS] = {column: counts.to_json() for column, counts in self._counts.items()}

    def _write(self, pairs: list[Pair]) -> None:
        with self._clock.stage("write"):
            table = to_table(pairs, self._part.schema)
            for column in self._counts:
                self._counts[column] += Counts.of([usable_scores(table, column)])
            self._part.write(table)
