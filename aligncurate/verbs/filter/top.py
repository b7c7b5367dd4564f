"""Exactly the best rows: those above an order statistic of the scores, and the first ones of equal scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.levels import Counts, Floats, order_statistics
from aligncurate.verbs.filter.masks import Mask, Selection, kept_scores, scores_of


class Top:
    """The best ceil(fraction * n) of the n scored rows of another selection; among equal scores the first rows."""

    def __init__(self, dataset: Dataset, before: Selection, fraction: float, column: str) -> None:
        def scan() -> Iterable[Floats]:
            return kept_scores(dataset, before, column)

        counts = Counts.of(scan())
        if not counts.total:
            raise UserError(f"{dataset.name}: no row that matches the other options has a {column}.")
        keep = math.ceil(Fraction(str(fraction)) * counts.total)  # with floats, 0.55 of 100 would give 56
        self._dataset, self._before, self._column = dataset, before, column
        self._threshold = order_statistics(scan, [counts.total - keep], counts)[0]
        tallies = [(int((s > self._threshold).sum()), int((s == self._threshold).sum())) for s in scan()]
        left = keep - sum(above for above, _ in tallies)
        self._ties = []  # how many of the rows with exactly the threshold are kept, for each part
        for _, equal in tallies:
            self._ties.append(min(equal, left))
            left -= self._ties[-1]

    def mask(self, index: int) -> Mask:
        before = self._before.mask(index)
        scores = scores_of(self._dataset, index, self._column)
        equal = before & (scores == self._threshold)
        equal &= np.cumsum(equal) <= self._ties[index]
        return np.asarray((before & (scores > self._threshold)) | equal)
