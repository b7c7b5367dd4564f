"""Masks of the rows that are kept, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import usable_scores
from aligncurate.levels import Floats
from aligncurate.verbs.scores import ahead

Mask = NDArray[np.bool_]


class Selection(Protocol):
    """Selects rows of a dataset. A selection that narrows another one asks it for its masks."""

    def mask(self, index: int) -> Mask:
        """Which rows of part `index` are kept: bool [rows]. Called from several threads."""


def scores_of(dataset: Dataset, index: int, column: str) -> Floats:
    """Scores of part `index`: float32 [rows], NaN for rows without one."""
    return usable_scores(dataset.read(index, ["status", column]), column)


def kept_scores(dataset: Dataset, selection: Selection, column: str) -> Iterator[Floats]:
    """The usable scores of the selected rows, one array per part."""

    def read(index: int) -> Floats:
        scores = scores_of(dataset, index, column)[selection.mask(index)]
        return scores[~np.isnan(scores)]

    return ahead(read, len(dataset.parts))
