"""Exact thresholds from mergeable counts, and from a score to its alignment level.

A float32 score maps to a uint32 key that sorts the same way. One pass counts the keys' high halves in 65,536 bins;
that tells in which bin each wanted rank lies. A second pass counts the low halves inside those few bins, and gives
the exact scores of those ranks. Counts are added up over any number of parts, in any order, so memory does not
grow with the data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from aligncurate.errors import UserError

Floats = NDArray[np.float32]
Scan = Callable[[], Iterable[Floats]]
"""Gives all finite scores, in any number of arrays; called once per pass."""

Method = Literal["quantile", "uniform"]

MAX_LEVELS = 127
"""Levels are stored in eight bits."""

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)


def score_keys(scores: Floats) -> NDArray[np.uint32]:
    """Keys that order as the scores do. -0.0 and 0.0 have one key, since they are equal."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def key_scores(keys: NDArray[np.uint32]) -> Floats:
    """The scores of keys; undoes `score_keys`."""
    keys = np.asarray(keys, np.uint32)
    return np.where(keys & _SIGN, keys & ~_SIGN, ~keys).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Counts:
    """How many scores have each high half of their key: int64 [65536]. Adding two gives those of both data."""

    bins: NDArray[np.int64]

    @classmethod
    def of(cls, scans: Iterable[Floats]) -> Self:
        """Counts of all scores in some arrays."""
        bins = np.zeros(_HALF, np.int64)
        for scores in scans:
            bins += np.bincount(score_keys(scores) >> 16, minlength=_HALF)
        return cls(bins)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.bins + other.bins)

    def to_json(self) -> dict[str, list[int]]:
        """The bins that are not empty, ascending, and their counts: `{"bins": [...], "counts": [...]}`."""
        bins = np.flatnonzero(self.bins)
        return {"bins": bins.tolist(), "counts": self.bins[bins].tolist()}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Counts as `to_json` gives them. Raises ValueError for anything else."""
        try:
            bins, counts = (np.asarray(data[name], np.int64) for name in ("bins", "counts"))
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"not counts of scores ({error!r})") from None
        if bins.ndim != 1 or bins.shape != counts.shape or (np.diff(bins, prepend=-1, append=_HALF) < 1).any():
            raise ValueError("not counts of scores (bins must ascend from 0 to 65535, each with its count)")
        if (counts < 1).any():
            raise ValueError("not counts of scores (each count must be at least 1)")
        full = np.zeros(_HALF, np.int64)
        full[bins] = counts
        return cls(full)

    @property
    def total(self) -> int:
        return int(self.bins.sum())


def order_statistics(scan: Scan, ranks: Sequence[int], counts: Counts | None = None) -> Floats:
    """The scores of given ranks (0-based, ascending), exactly as `numpy.sort(scores)[ranks]` gives them.

    Args:
        scan: the scores.
        ranks: each from 0 to their number less one.
        counts: of the same scores, where they are known already; saves the first pass.
    """
    if not ranks:
        return np.empty(0, np.float32)
    counts = counts or Counts.of(scan())
    ends = np.cumsum(counts.bins)
    wanted = np.asarray(ranks, np.int64)
    if wanted.min() < 0 or wanted.max() >= ends[-1]:
        raise ValueError(f"ranks {min(ranks)}..{max(ranks)} of {int(ends[-1])} scores")
    highs = np.searchsorted(ends, wanted, side="right")
    inside = wanted - (ends[highs] - counts.bins[highs])

    chosen = np.unique(highs)
    slot = np.full(_HALF, -1, np.int64)
    slot[chosen] = np.arange(len(chosen))
    lows = np.zeros(len(chosen) * _HALF, np.int64)
    for scores in scan():
        keys = score_keys(scores)
        slots = slot[keys >> 16]
        keep = slots >= 0
        places = slots[keep] * _HALF + (keys[keep] & np.uint32(_HALF - 1))
        lows += np.bincount(places, minlength=len(lows))
    ends_low = np.cumsum(lows.reshape(len(chosen), _HALF), axis=1)
    found = [np.searchsorted(ends_low[slot[h]], r, side="right") for h, r in zip(highs, inside, strict=True)]
    return key_scores((highs.astype(np.uint32) << np.uint32(16)) | np.asarray(found, np.uint32))


@dataclass(frozen=True)
class Thresholds:
    """Where levels begin: level = 1 + #{k : score >= values[k]}.

    Attributes:
        method: how they were found.
        values: N - 1 ascending scores, float32.
        score_column: the column they are for.
        count, minimum, maximum: of the scores they were found on.
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
        """Level of each score, 1..N. NaN is not a score and must not come here."""
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
        """Thresholds as `to_json` gives them. Raises UserError that names `where` for anything else."""
        try:
            if data["method"] not in get_args(Method) or not isinstance(data["encoder"], (dict, NoneType)):
                raise ValueError("method or encoder")
            fields = {k: data[k] for k in ("method", "score_column", "count", "minimum", "maximum", "encoder")}
            values = tuple(float(v) for v in data["values"])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{where}: not thresholds that `aligncurate bucket` saved ({error!r}).") from None
        if len(values) >= MAX_LEVELS:
            raise UserError(f"{where}: {len(values)} thresholds; levels go up to {MAX_LEVELS}.")
        if not values or list(values) != sorted(values) or not np.isfinite(values).all():
            raise UserError(f"{where}: the threshold values must be ascending finite numbers, at least one.")
        return cls(values=values, **fields)


def assign_levels(scores: Floats, values: Floats) -> NDArray[np.int8]:
    """1 + the number of `values` (ascending) that each score reaches."""
    return (np.searchsorted(values, scores, side="right") + 1).astype(np.int8)


def quantile_ranks(count: int, levels: int) -> list[int]:
    """Ranks ceil(k*n/N), k = 1..N-1, of n scores; with fewer scores than levels the last rank stands in."""
    return [min(-(-k * count // levels), count - 1) for k in range(1, levels)]


def uniform_thresholds(minimum: float, maximum: float, levels: int) -> Floats:
    """Thresholds between levels of equal width from `minimum` to `maximum`.

    This is what the AlignGPT paper's text says (section 3.2, "equally spaced intervals"). The edges are computed
    in double precision and rounded up to float32, so that comparing a float32 score with them decides as the
    double edge would.
    """
    edges = np.linspace(float(minimum), float(maximum), levels + 1)[1:-1]
    rounded = edges.astype(np.float32)
    return np.where(rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded).astype(np.float32)


def find_thresholds(scan: Scan, levels: int, method: Method) -> tuple[Floats, int, float, float]:
    """Threshold values by either method, with number, minimum and maximum of the scores (at least one).

    `quantile` makes levels of equal size (but for ties), exactly as sorting all scores would.
    """
    counts = Counts.of(scan())
    count = counts.total
    inner = quantile_ranks(count, levels) if method == "quantile" else []
    low, *middle, high = order_statistics(scan, [0, *inner, count - 1], counts)
    values = np.asarray(middle, np.float32) if inner else uniform_thresholds(low, high, levels)
    return values, count, float(low), float(high)
