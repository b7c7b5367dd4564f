"""`--retry-errors`: rows of an earlier run that did not fail are taken over, so only the others are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from aligncurate.dataset.part import row_groups
from aligncurate.dataset.record import FINE, IMAGE_EMBEDDING, TEXT_EMBEDDING, Pair, Status
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.sources.base import Shard

# A row is taken over only for the same pair: its text and where its image is must be equal.
_TEXT = ("key", "caption", "conversations")
_POINTER = ("source", "row", "image_path", "image_offset", "image_length")


def earlier_rows(writer: DatasetWriter, shard: Shard) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    """The rows of the part that an earlier run committed for `shard`, in order, and the part's facts."""
    info = writer.committed(shard.index)
    if info is None:
        return iter(()), {}
    tables = row_groups(writer.path / info.name)
    return (row for table in tables for batch in table.to_batches(256) for row in batch.to_pylist()), info.facts


def is_reusable(row: Mapping[str, Any], pair: Pair, *, image_root_changed: bool) -> bool:
    """Whether an earlier run's row is of this pair and did not fail.

    Under another image root the pointers differ, so the image only needs to have the same file name.
    """
    if row["status"] not in FINE or any(getattr(pair, name) != row[name] for name in _TEXT):
        return False
    if image_root_changed:
        return PurePath(pair.image_path or "").name == PurePath(row["image_path"] or "").name
    return all(getattr(pair, name) == row[name] for name in _POINTER)


def take_over(row: Mapping[str, Any], pair: Pair, score_columns: Sequence[str]) -> None:
    """Set on `pair` what an earlier run computed for it."""
    for name in (*_POINTER, "width", "height", "sha256", "score", "level", "error"):
        setattr(pair, name, row[name])
    pair.image = row.get("image")
    pair.status = Status(row["status"])
    pair.load = None
    for name in (IMAGE_EMBEDDING, TEXT_EMBEDDING):
        if row.get(name) is not None:
            setattr(pair, name, np.asarray(row[name], np.float16))
    pair.extra.update({column: row[column] for column in score_columns[1:]})
