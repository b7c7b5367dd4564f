"""From the options of `filter` to the rows that are kept: conditions on one row first, then choices among rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.progress import notice
from aligncurate.verbs.filter.images import OnePerImage
from aligncurate.verbs.filter.masks import Mask, Selection, scores_of
from aligncurate.verbs.filter.options import FilterOptions
from aligncurate.verbs.filter.sample import Sample
from aligncurate.verbs.filter.top import Top
from aligncurate.verbs.filter.where import Where
from aligncurate.verbs.scores import check_score_column
from aligncurate.verbs.uids import UID_COLUMNS, UidList, row_uids


def select(dataset: Dataset, options: FilterOptions, *, quiet: bool = False) -> Selection:
    """The rows that `options` keep. Raises UserError if there are no options, or one does not suit the dataset."""
    if options.keeps_all:
        raise UserError(
            "nothing to filter by; give --where, --uids, --levels, --min-score, --max-score, --one-per-image, "
            "--top-fraction or --sample."
        )
    if options.needs_scores:
        check_score_column(dataset, options.score_column)
    selection: Selection = _Conditions(dataset, options, quiet=quiet)
    if options.one_per_image is not None:
        selection = OnePerImage(dataset, selection, options.one_per_image, options.score_column)
    if options.top_fraction is not None:
        selection = Top(dataset, selection, options.top_fraction, options.score_column)
    if options.sample is not None:
        selection = sample = Sample(dataset, selection, options.sample, options.seed)
        if sample.available < options.sample:
            notice(f"--sample {options.sample:,}: there are only {sample.available:,} rows, all are kept.", quiet=quiet)
    return selection


def parse_levels(text: str) -> list[int]:
    """Parse a list of levels such as `5-8` or `1,3,7-8`. Raises UserError for anything else."""
    levels: set[int] = set()
    for piece in text.split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise UserError(f"--levels {text}: write levels like 5-8 or 1,3,7-8.")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise UserError(f"--levels {text}: {piece.strip()} is not a valid level or range; levels start at 1.")
        levels.update(range(min(first, 128), min(last, 128) + 1))
    return sorted(levels)


class _Conditions:
    """The rows that meet every condition that looks at one row."""

    def __init__(self, dataset: Dataset, options: FilterOptions, *, quiet: bool) -> None:
        self._dataset = dataset
        self._conditions: list[Callable[[int], Mask]] = []
        if options.where is not None:
            self._conditions.append(Where(dataset, options.where).mask)
        if options.uids is not None:
            wanted = UidList(options.uids)
            columns = [name for name in UID_COLUMNS if name in dataset.schema.names]

            def listed(index: int) -> Mask:
                uids, known = row_uids(dataset.read(index, columns))
                return np.asarray(known & wanted.holds(uids))

            self._conditions.append(listed)
        if options.levels is not None:
            levels = _levels_to_keep(dataset, options.levels, quiet=quiet)
            self._conditions.append(
                lambda index: np.isin(dataset.read(index, ["level"])["level"].fill_null(0).to_numpy(), levels)
            )
        if options.min_score is not None or options.max_score is not None:
            low = np.float32(-np.inf if options.min_score is None else options.min_score)
            high = np.float32(np.inf if options.max_score is None else options.max_score)

            def between(index: int) -> Mask:
                scores = scores_of(dataset, index, options.score_column)
                return np.asarray((scores >= low) & (scores <= high))  # false for NaN

            self._conditions.append(between)

    def mask(self, index: int) -> Mask:
        mask = np.ones(self._dataset.parts[index].rows, bool)
        for condition in self._conditions:
            mask &= condition(index)
        return mask


def _levels_to_keep(dataset: Dataset, text: str, *, quiet: bool) -> list[int]:
    levels = parse_levels(text)
    if not dataset.levels:
        raise UserError(f"{dataset.name}: this dataset has no levels; run `aligncurate bucket` first.")
    if levels[0] > dataset.levels:
        raise UserError(f"--levels {text}: the levels of {dataset.name} are 1 to {dataset.levels}.")
    if levels[-1] > dataset.levels:
        notice(f"--levels {text}: the levels of {dataset.name} are 1 to {dataset.levels}.", quiet=quiet)
    return levels
