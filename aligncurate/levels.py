"""Computes exact level thresholds from counts that can be added up, and assigns levels to scores.

A float32 score maps to a uint32 key that sorts the same way. One pass counts the keys' high halves in 65,536 bins;
they show in which bin each rank lies. A second pass counts the low halves inside those few bins, which gives the exact
scores at those ranks. Counts of any number of parts are added up in any order, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from aligncurate.errors import UserError

Floats = NDArray[np.float32]
Scan = Callable[[], Iterable[Floats]]
"""Returns all scores as arrays, in any order; called once per pass. NaN and infinite values are ignored."""

Method = Literal["quantile", "uniform"]

MAX_LEVELS = 127
"""Levels are stored in eight bits."""

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)
_BLOCK = 1 << 14  # scores counted at a time; temporary arrays of this size stay in the processor's cache

# The high half of a key depends only on the high half of the score's bits, so the passes need no keys for most scores.
_HALVES = np.arange(_HALF, dtype=np.uint32)
_KEY_HALVES = np.where(_HALVES & 0x8000, _HALVES ^ 0xFFFF, _HALVES | 0x8000)
_NOT_FINITE = (_HALVES & 0x7F80) == 0x7F80
_ZERO = 0x8000  # high half of the key of 0.0, and of the bits of -0.0, which has the same key


def score_keys(scores: Floats) -> NDArray[np.uint32]:
    """uint32 keys that sort like the scores. -0.0 and 0.0 are equal, so they have the same key."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def key_scores(keys: NDArray[np.uint32]) -> Floats:
    """The scores of keys: the inverse of `score_keys`."""
    keys = np.asarray(keys, np.uint32)
    return np.where(keys & _SIGN, keys & ~_SIGN, ~keys).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Counts:
    """Number of scores for each high half of a key, int64 [65536]. Adding two gives the counts of both together."""

    bins: NDArray[np.int64]

    @classmethod
    def of(cls, scans: Iterable[Floats]) -> Self:
        """Count the finite scores in all arrays."""
        halves = np.zeros(_HALF, np.int64)
        negative_zeros = 0
        for block in _blocks(scans):
            np.add.at(halves, (block >> 16).astype(np.intp), 1)
            negative_zeros += int(np.count_nonzero(block == _SIGN))
        halves[_NOT_FINITE] = 0
        bins = np.empty_like(halves)
        bins[_KEY_HALVES] = halves
        bins[_ZERO - 1] -= negative_zeros
        bins[_ZERO] += negative_zeros
        return cls(bins)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.bins + other.bins)

    def to_json(self) -> dict[str, list[int]]:
        """The bins that are not empty, in ascending order, and their counts: `{"bins": [...], "counts": [...]}`."""
        bins = np.flatnonzero(self.bins)
        return {"bins": bins.tolist(), "counts": self.bins[bins].tolist()}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what `to_json` returns.

        Raises:
            ValueError: `data` is something else.
        """
        counts = cls(np.zeros(_HALF, np.int64))
        counts.include(data)
        return counts

    def include(self, data: Any) -> int:
        """Add what `to_json` returned, in place: less work than `+` where most bins are empty.

        Returns:
            How many scores were added.

        Raises:
            ValueError: `data` is something else.
        """
        bins, counts = check_counts(data)
        self.bins[bins] += counts
        return int(counts.sum())

    @property
    def total(self) -> int:
        return int(self.bins.sum())


def check_counts(data: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bins and counts in what `Counts.to_json` returned. Raises ValueError if `data` is something else."""
    try:
        bins, counts = (np.asarray(data[name], np.int64) for name in ("bins", "counts"))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"invalid score counts ({error!r})") from None
    if bins.ndim != 1 or bins.shape != counts.shape or (np.diff(bins, prepend=-1, append=_HALF) < 1).any():
        raise ValueError("invalid score counts (bins must ascend from 0 to 65535 and have one count each)")
    if (counts < 1).any():
        raise ValueError("invalid score counts (each count must be at least 1)")
    return bins, counts


class WrongCounts(ValueError):
    """The given counts do not match the scores."""


def order_statistics(scan: Scan, ranks: Sequence[int], counts: Counts | None = None) -> Floats:
    """The scores at some ranks (0-based, ascending), equal to `numpy.sort(scores)[ranks]`.

    Args:
        scan: the scores.
        ranks: each from 0 to the number of scores - 1.
        counts: the counts of these scores, if they are known already, which saves the first pass.

    Raises:
        WrongCounts: the second pass counts other numbers of scores in the bins of these ranks.
        ValueError: a rank is out of range.
    """
    if not ranks:
        return np.empty(0, np.float32)
    counts = counts or Counts.of(scan())
    ends = np.cumsum(counts.bins)
    rank_array = np.asarray(ranks, np.int64)
    if rank_array.min() < 0 or rank_array.max() >= ends[-1]:
        raise ValueError(f"ranks {min(ranks)} to {max(ranks)} are out of range for {int(ends[-1])} scores")
    highs = np.searchsorted(ends, rank_array, side="right")
    inside = rank_array - (ends[highs] - counts.bins[highs])

    chosen = np.unique(highs)
    lows = _count_lows(scan(), chosen)
    if (lows.sum(axis=1) != counts.bins[chosen]).any():
        raise WrongCounts("the counts do not match the scores")
    ends_low = np.cumsum(lows, axis=1)
    slots = np.searchsorted(chosen, highs)
    low_halves = [np.searchsorted(ends_low[slot], rank, side="right") for slot, rank in zip(slots, inside, strict=True)]
    return key_scores((highs.astype(np.uint32) << np.uint32(16)) | np.asarray(low_halves, np.uint32))


def _count_lows(scans: Iterable[Floats], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of scores for each low half of a key, in the chosen bins (ascending): int64 [len(chosen), 65536]."""
    slot = np.full(_HALF, -1, np.int64)
    slot[chosen] = np.arange(len(chosen))
    may_match = (slot >= 0)[_KEY_HALVES]
    may_match[0x8000] |= slot[_ZERO] >= 0  # the bits of -0.0 lie with the negative numbers
    lows = np.zeros(len(chosen) * _HALF, np.int64)
    for block in _blocks(scans):
        keys = score_keys(block[may_match[block >> 16]].view(np.float32))
        slots = slot[keys >> 16]
        places = slots * _HALF + (keys & np.uint32(_HALF - 1))
        np.add.at(lows, places[slots >= 0], 1)
    return lows.reshape(len(chosen), _HALF)


def _blocks(scans: Iterable[Floats]) -> Iterator[NDArray[np.uint32]]:
    """The bits of all scores, at most _BLOCK at a time."""
    for scores in scans:
        bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
        for start in range(0, len(bits), _BLOCK):
            yield bits[start : start + _BLOCK]


@dataclass(frozen=True)
class Thresholds:
    """The scores at which levels begin: level = 1 + #{k : score >= values[k]}.

    Attributes:
        method: how they were computed.
        values: N - 1 ascending scores, float32.
        score_column: the column they apply to.
        count, minimum, maximum: of the scores they were computed from.
        encoder: name and weights of the encoder that made those scores.
    """

    method: Method
    values: tuple[float, ...]
    score_column: str
    count: int
    minimum: float
    maximum: float
    encoder: Mapping[str, Any] | None = None

    @property
    def levels(self) -> int:
        return len(self.values) + 1

    def assign(self, scores: Floats) -> NDArray[np.int8]:
        """Level of each score, 1..N. The scores must not be NaN."""
        return assign_levels(scores, np.asarray(self.values, np.float32))

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "levels": self.levels,
            "values": list(self.values),
            "score_column": self.score_column,
            "count": self.count,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "encoder": self.encoder,
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Self:
        """Read what `to_json` returns.

        Raises:
            UserError: `data` is something else; the message begins with `where`.
        """
        try:
            if data["method"] not in get_args(Method) or not isinstance(data["encoder"], (dict, NoneType)):
                raise ValueError("unknown method or encoder")
            fields = {k: data[k] for k in ("method", "score_column", "count", "minimum", "maximum", "encoder")}
            values = tuple(float(v) for v in data["values"])
            numbers = [float(fields[name]) for name in ("count", "minimum", "maximum")]
            if not isinstance(fields["score_column"], str) or not np.isfinite(numbers).all():
                raise ValueError("the score column is not text, or the count or a limit not a number")
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            cause = f"{type(error).__name__}: {str(error)[:100]}"
            raise UserError(f"{where}: not thresholds saved by `aligncurate bucket` ({cause}).") from None
        if len(values) >= MAX_LEVELS:
            raise UserError(f"{where}: {len(values)} thresholds are too many; use at most {MAX_LEVELS - 1}.")
        if not values or list(values) != sorted(values) or not np.isfinite(values).all():
            raise UserError(f"{where}: the thresholds must be finite numbers in ascending order, at least one.")
        return cls(values=values, **fields)


def assign_levels(scores: Floats, values: Floats) -> NDArray[np.int8]:
    """1 + the number of `values` (ascending) that are at most the score, for each score."""
    levels = np.ones(len(scores), np.int8)
    for value in values:  # for the usual 8 levels ten times as fast as a binary search per score
        levels += scores >= value
    return levels


def quantile_ranks(count: int, levels: int) -> list[int]:
    """Ranks ceil(k*n/N) of n scores, for k = 1..N-1; ranks beyond the last score become the last."""
    return [min(-(-k * count // levels), count - 1) for k in range(1, levels)]


def uniform_thresholds(minimum: float, maximum: float, levels: int) -> Floats:
    """Thresholds between levels of equal width from `minimum` to `maximum`.

    This is what the AlignGPT paper says (section 3.2, "equally spaced intervals"). The edges are computed in double
    precision and rounded up to float32, so that a float32 score is on the same side of the rounded edge as of the
    exact one.
    """
    edges = np.linspace(float(minimum), float(maximum), levels + 1)[1:-1]
    rounded = edges.astype(np.float32)
    return np.where(rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded).astype(np.float32)


def find_thresholds(
    scan: Scan, levels: int, method: Method, counts: Counts | None = None
) -> tuple[Floats, int, float, float]:
    """Thresholds by either method, then the number, minimum and maximum of the scores; there must be a score.

    `quantile` gives levels of equal size except for ties, exactly as sorting all scores would. `counts` of these scores
    save the first pass.
    """
    counts = counts or Counts.of(scan())
    count = counts.total
    inner = quantile_ranks(count, levels) if method == "quantile" else []
    low, *middle, high = order_statistics(scan, [0, *inner, count - 1], counts)
    values = np.asarray(middle, np.float32) if inner else uniform_thresholds(low, high, levels)
    return values, count, float(low), float(high)
