"""`--retry-errors`: rows of an earlier run that did not fail are taken over, so only the others are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from aligncurate.dataset.part import row_groups
from aligncurate.dataset.pointers import Pointer
from aligncurate.dataset.record import FINE, IMAGE_EMBEDDING, TEXT_EMBEDDING, Pair, Status
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.sources.base import Shard

_TEXT = ("key", "caption", "conversations")
_SCORES = ("score", "level")
_POINTER = ("source", "row", "image_path", "image_offset", "image_length")


def earlier_rows(writer: DatasetWriter, shard: Shard) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    """The rows of the part that an earlier run committed for `shard`, in order, and the part's facts."""
    info = writer.earlier(shard.index)
    if info is None:
        return iter(()), {}
    tables = row_groups(writer.path / info.name)
    return (row for table in tables for batch in table.to_batches(256) for row in batch.to_pylist()), info.facts


def is_reusable(row: Mapping[str, Any], pair: Pair, *, image_root_changed: bool) -> bool:
    """Whether an earlier run's row did not fail, and is of this pair: the same text, and the same bytes of the image.

    Reads the image. Where the image root has changed, it is read where the earlier run found it.
    """
    if row["status"] not in FINE or any(getattr(pair, name) != row[name] for name in _TEXT):
        return False
    try:
        if image_root_changed and row["image_path"] is not None:
            same_name = PurePath(pair.image_path or "").name == PurePath(row["image_path"]).name
            pointer = Pointer.of(row)
            return same_name and pointer is not None and pointer.sha256 is not None and bool(pointer.read())
        if pair.load is None:
            return row["sha256"] is None and bool(pair.status == row["status"])
        return pair.status in FINE and bool(hashlib.sha256(pair.load()).digest() == row["sha256"])
    except (OSError, ValueError):  # why it cannot be read is found out when the row is done again
        return False


def take_over(row: Mapping[str, Any], pair: Pair, score_columns: Sequence[str], *, image_root_changed: bool) -> None:
    """Set on `pair` what an earlier run computed for it, and under another image root where it found the image.

    A run that computes no scores (`ingest`) takes them from its input, where they may have been corrected.
    """
    pointer, scores = _POINTER if image_root_changed else (), _SCORES if score_columns else ()
    for name in (*pointer, *scores, "width", "height", "sha256", "error"):
        setattr(pair, name, row[name])
    pair.image = row.get("image")
    pair.status = Status(row["status"])
    if pair.status is not Status.OK:
        pair.score = pair.level = None
    pair.load = None
    for name in (IMAGE_EMBEDDING, TEXT_EMBEDDING):
        if row.get(name) is not None:
            setattr(pair, name, np.asarray(row[name], np.float16))
    pair.extra.update({column: row[column] for column in score_columns[1:]})
