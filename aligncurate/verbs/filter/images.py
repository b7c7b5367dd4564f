"""One row of each image: the best by score or the first, over all parts, in several passes of bounded memory."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE
from aligncurate.errors import UserError
from aligncurate.levels import score_keys
from aligncurate.verbs.filter.masks import Mask, Selection, scores_of
from aligncurate.verbs.filter.options import Prefer
from aligncurate.verbs.scores import ahead

_ROWS = 1 << 23  # rows compared in one pass
_KEY = np.dtype([("high", np.uint64), ("low", np.uint64)])
_UNSCORED = np.uint32(0xFFFFFFFF)  # ranks behind every finite score
_POINTER = ("source", "image_path", "image_offset", "row")


class OnePerImage:
    """One row of each image among the rows of another selection; rows that name no image are all kept.

    The same image is the same sha256 of its bytes; where that is unknown, the same place in the same source. `best`
    keeps the highest score, `first` the first row with a good status; among equal rows the first is kept.

    Memory: one bit per row of the dataset, and about 100 bytes for each row of one pass. Images are divided among
    passes by their hash, one pass for every 8 million rows.

    Raises UserError if none of the rows has a score to find the best one by.
    """

    def __init__(
        self, dataset: Dataset, before: Selection, prefer: Prefer, column: str, *, rows_per_pass: int = _ROWS
    ) -> None:
        self._dataset, self._before, self._prefer, self._column = dataset, before, prefer, column
        self._starts = np.cumsum([0, *(part.rows for part in dataset.parts)])
        self._kept = [np.zeros(-(-part.rows // 8), np.uint8) for part in dataset.parts]
        passes = -(-dataset.rows // rows_per_pass)
        scored = [self._pass(turn, passes) for turn in range(passes)]
        if prefer == "best" and not any(scored):
            raise UserError(
                f"--one-per-image best: no row of {dataset.name} that matches the other options has a {column}; "
                "use --one-per-image first."
            )

    def _pass(self, turn: int, passes: int) -> bool:
        """Choose among the rows of every `passes`-th image; whether any of them has a score."""

        def read(index: int) -> tuple[NDArray[np.void], NDArray[np.uint32], NDArray[np.int64]]:
            keys, named = _image_keys(self._dataset, index)
            mask = self._before.mask(index)
            if turn == 0:
                self._keep(index, mask & ~named)
            rows = np.flatnonzero(mask & named & (keys["high"] % np.uint64(passes) == turn))
            ranking = _ranking(self._dataset, index, self._prefer, self._column)
            return keys[rows], ranking[rows], rows + self._starts[index]

        pieces = list(ahead(read, len(self._dataset.parts)))
        keys, ranking, rows = (np.concatenate(each) for each in zip(*pieces, strict=True))
        order = np.lexsort((rows, ranking, keys["low"], keys["high"]))
        keys = keys[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        chosen = np.sort(rows[order[is_first]])
        for index, (start, stop) in enumerate(pairwise(self._starts)):
            mask = np.zeros(stop - start, bool)
            mask[chosen[slice(*np.searchsorted(chosen, [start, stop]))] - start] = True
            self._keep(index, mask)
        return bool((ranking != _UNSCORED).any())

    def _keep(self, index: int, mask: Mask) -> None:
        self._kept[index] |= np.packbits(mask)

    def mask(self, index: int) -> Mask:
        return np.unpackbits(self._kept[index], count=self._dataset.parts[index].rows).astype(bool)


def _ranking(dataset: Dataset, index: int, prefer: Prefer, column: str) -> NDArray[np.uint32]:
    """A number per row of a part that is smallest for the row to keep."""
    if prefer == "first":
        good = pc.is_in(dataset.read(index, ["status"])["status"], pa.array(sorted(FINE)))
        return np.where(good.to_numpy(), np.uint32(0), np.uint32(1))
    scores = scores_of(dataset, index, column)
    return np.where(np.isnan(scores), _UNSCORED, ~score_keys(scores))


def _image_keys(dataset: Dataset, index: int) -> tuple[NDArray[np.void], Mask]:
    """The first 128 bits of each row's hash, and whether the row names an image."""
    table = dataset.read(index, ["sha256", *_POINTER])
    hashes = table["sha256"].combine_chunks()
    keys = np.zeros(len(hashes), _KEY)
    known = np.asarray(pc.is_valid(hashes))
    digests = hashes.drop_null()
    whole = np.frombuffer(digests.buffers()[1] or b"", np.uint64).reshape(-1, 4)[digests.offset :][: len(digests)]
    keys["high"][known], keys["low"][known] = whole[:, 0], whole[:, 1]
    named = known | np.asarray(pc.is_valid(table["image_path"].combine_chunks()))
    unknown = np.flatnonzero(named & ~known)
    pointers = table.select(_POINTER).take(unknown).to_pydict().values()
    for row, pointer in zip(unknown, zip(*pointers, strict=True), strict=True):
        digest = hashlib.blake2b(repr(pointer).encode(), digest_size=16).digest()
        keys[row] = tuple(np.frombuffer(digest, np.uint64))
    return keys, named
