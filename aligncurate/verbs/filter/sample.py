"""A random sample of exact size: the rows with the smallest hashes, found by counting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.verbs.filter.masks import Mask, Selection
from aligncurate.verbs.scores import ahead

Keys = NDArray[np.uint64]

_DIGIT = 16  # bits counted in a pass
_COLLECTED = 1 << 22  # keys that are sorted in memory, 32 MiB


class Sample:
    """Exactly `count` rows of another selection, each equally likely; all of them if there are fewer.

    Every row has a hash of the seed and its number in the dataset; those with the smallest hashes are kept. So the
    sample does not depend on threads, and memory depends neither on `count` nor on the number of rows.

    Attributes:
        available: number of rows that the sample is taken from.
    """

    def __init__(self, dataset: Dataset, before: Selection, count: int, seed: int) -> None:
        self._before, self._seed = before, seed
        self._starts = np.cumsum([0, *(part.rows for part in dataset.parts)])

        def scan() -> Iterator[Keys]:
            return ahead(lambda index: self._hashes(index)[before.mask(index)], len(dataset.parts))

        self._last, self.available = smallest(scan, count)

    def mask(self, index: int) -> Mask:
        return np.asarray(self._before.mask(index) & (self._hashes(index) <= self._last))

    def _hashes(self, index: int) -> Keys:
        rows = np.arange(self._starts[index], self._starts[index + 1], dtype=np.uint64)
        return row_hashes(rows, self._seed)


def row_hashes(rows: Keys, seed: int) -> Keys:
    """A random number for each row number, different for all rows and for every seed from 0 to 2**64 - 1."""
    return _mix(rows + _mix(np.asarray([seed], np.uint64)))


def _mix(values: Keys) -> Keys:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection, so all rows get different numbers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def smallest(scan: Callable[[], Iterable[Keys]], count: int, *, collected: int = _COLLECTED) -> tuple[np.uint64, int]:
    """The largest of the `count` smallest keys, and the number of all keys.

    A pass counts the keys by their first 16 bits, a further one those in the bin that holds the boundary by the next
    16 bits, until a bin holds so few keys that they can be sorted: two passes up to 2e11 random keys.

    Args:
        scan: all keys, no two alike, as arrays in any order; called once per pass.
        count: at least 1.
        collected: most keys that are sorted.
    """
    prefix, shift, rank, total = 0, 64, count, 0
    while shift:
        shift -= _DIGIT
        counts = np.zeros(1 << _DIGIT, np.int64)
        for keys in scan():
            digits = _inside(keys, prefix, shift + _DIGIT) >> np.uint64(shift)
            counts += np.bincount((digits & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << _DIGIT)
        ends = np.cumsum(counts)
        total = total or int(ends[-1])
        if count >= total:
            return np.uint64(2**64 - 1), total
        place = int(np.searchsorted(ends, rank))
        rank -= int(ends[place] - counts[place])
        prefix = prefix << _DIGIT | place
        if counts[place] <= collected:
            keys = np.concatenate([_inside(keys, prefix, shift) for keys in scan()])
            return np.partition(keys, rank - 1)[rank - 1], total
    return np.uint64(prefix), total


def _inside(keys: Keys, prefix: int, shift: int) -> Keys:
    """The keys that are `prefix` without their last `shift` bits."""
    return keys if shift == 64 else keys[(keys >> np.uint64(shift)) == np.uint64(prefix)]
