"""Which rows go into which tar, decided from the dataset and the options alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.verbs.export.rows import is_exportable


@dataclass
class Tar:
    """One tar to write: pieces of parts, as (part, first good row of it, how many)."""

    name: str
    level: int | None
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0


def plan_tars(dataset: Dataset, shard_size: int, per_level: bool) -> list[Tar]:
    """Which rows go into which tar; depends on the dataset and options alone."""
    filling: dict[int | None, Tar] = {}
    numbers: dict[int | None, int] = {}
    tars: list[Tar] = []
    for part in range(len(dataset.parts)):
        levels = _exportable_levels(dataset, part)
        counts: dict[int | None, int] = {None: len(levels)}
        if per_level:
            counts = {item["values"]: item["counts"] for item in levels.value_counts().to_pylist()}
        for level in sorted(counts, key=lambda v: -1 if v is None else v):
            start, left = 0, counts[level]
            while left:
                tar = filling.get(level)
                if tar is None or tar.rows == shard_size:
                    number = numbers.get(level, 0)
                    numbers[level] = number + 1
                    folder = f"level-{level}/" if level is not None else ("no-level/" if per_level else "")
                    tar = filling[level] = Tar(f"{folder}{number:05d}", level)
                    tars.append(tar)
                take = min(left, shard_size - tar.rows)
                tar.pieces.append((part, start, take))
                tar.rows += take
                start, left = start + take, left - take
    return tars


def _exportable_levels(dataset: Dataset, part: int) -> pa.ChunkedArray:
    table = dataset.read(part, ["status", "level"])
    return table.filter(is_exportable(table))["level"]
