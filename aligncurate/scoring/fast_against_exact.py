"""How far fast decoding changes scores, measured on the first pairs of a run, which are decoded exactly too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIRS = 64
"""How many pairs of the first shard are decoded both ways."""

_FACT = "fast_against_exact"


def add_comparison(facts: dict[str, Any], exact: NDArray[np.float32], fast: NDArray[np.float32]) -> None:
    """Add the score changes of some pairs to a part's facts: how many pairs, their mean and largest change."""
    changes = np.abs(exact - fast).astype(float)
    changes = changes[np.isfinite(changes)]
    if not len(changes):
        return
    before = facts.get(_FACT, {"pairs": 0, "mean": 0.0, "max": 0.0})
    pairs = before["pairs"] + len(changes)
    facts[_FACT] = {
        "pairs": pairs,
        "mean": float(before["mean"] * before["pairs"] + changes.sum()) / pairs,
        "max": float(max(before["max"], *changes)),
    }
