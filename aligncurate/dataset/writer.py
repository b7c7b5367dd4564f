"""Writing a dataset: parts are committed one by one, over as many runs as it takes, then the manifest.

A part is written under a temporary name, synced and renamed, so a part that exists is complete. The manifest is written
twice: when a run starts (`complete: false`; it records the options that later runs must share) and when all parts
exist. Nothing in the folder depends on time or on which run wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from aligncurate.dataset.manifest import (
    IMAGE_ROOT,
    MANIFEST,
    THRESHOLDS,
    changed_files,
    differences,
    manifest_head,
    with_corrections,
)
from aligncurate.dataset.part import SCORE_COUNTS, PartInfo, PartWriter, part_name, read_note, read_part_info
from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.io.files import claim, read_json, sync, write_json
from aligncurate.levels import Counts


class DatasetWriter:
    """Commits the parts of one dataset, over as many runs as it takes.

    Args:
        path: the output folder.
        head: the manifest without its parts: verb, options, inputs, encoder, …
        schema: of every part.
        retry_errors: accept that input files and the image root have changed since the parts were made; opening
            the writer then sets `changed` to those files, and `image_root_changed`.
    """

    def __init__(
        self, path: str | Path, head: Mapping[str, Any], schema: pa.Schema, *, retry_errors: bool = False
    ) -> None:
        self._retry_errors = retry_errors
        self.changed: set[str] = set()
        self.image_root_changed = False
        self.path = Path(os.path.abspath(path))
        self.schema = schema
        self.head = manifest_head(head, schema)

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Claim the folder for this run and check that the parts in it were made with the same options.

        Raises:
            UserError: the folder is in use, holds other files, or parts made from other inputs or options.
        """
        with claim(self.path, [MANIFEST]):
            if (self.path / MANIFEST).is_file():
                self._check()
            else:
                self._write_manifest(complete=False, parts=[])
            yield self

    def _check(self) -> None:
        before = read_json(self.path / MANIFEST)
        corrected = with_corrections(before, self.head)
        if self._retry_errors:
            self.changed = changed_files(before.get("inputs", []), self.head["inputs"])
            self.image_root_changed = before.get("options", {}).get(IMAGE_ROOT) != self.head["options"].get(IMAGE_ROOT)
            before = corrected
        differing = differences(before, self.head)
        if differing:
            advice = "choose another --out, or delete the folder to start over."
            if not differences(corrected, self.head):
                advice = "add --retry-errors to redo only what failed or changed, or choose another --out."
            raise UserError(f"{self.path}: this folder holds a different dataset ({'; '.join(differing)}); {advice}")

    def committed(self, index: int) -> PartInfo | None:
        """The part of shard `index`, if an earlier run committed it."""
        return read_part_info(self.path / part_name(index), self._lines)

    @cached_property
    def _before(self) -> dict[str, Any]:
        """The manifest as it was when this run started."""
        return read_json(self.path / MANIFEST)

    @cached_property
    def _lines(self) -> dict[str, PartInfo]:
        """The parts in the manifest, by name; only a complete manifest lists them."""
        return {line["name"]: PartInfo.from_json(line) for line in self._before["parts"]}

    @property
    def _counted(self) -> bool:
        """Whether the parts in the manifest hold counts of their scores."""
        return SCORE_COUNTS in self._before

    def part(self, index: int) -> PartWriter:
        """A writer for the part of shard `index`; it commits when its `with` block ends without an error."""
        return PartWriter(self.path / part_name(index), self.schema)

    def discard(self, index: int) -> None:
        """Delete the part of shard `index`, whose input has changed, so that no later run keeps it."""
        (self.path / part_name(index)).unlink(missing_ok=True)

    def reopen(self) -> None:
        """Mark the dataset as unfinished before its parts change, so that a killed run leaves no wrong manifest."""
        _ = self._lines  # read the finished manifest before it is replaced
        # With the earlier image root: until every part is done, a rerun must see that it has changed.
        self._write_manifest(complete=False, parts=[], options=self._before["options"])

    def finish(self, parts: Sequence[PartInfo], **facts: Any) -> Dataset:
        """Write the final manifest with all parts, in order, and open the dataset."""
        names = {part.name for part in parts}
        for file in self.path.glob("part-*.parquet"):
            if file.name not in names:  # the input was longer in an earlier run
                file.unlink()
        if self.head.get("thresholds"):
            write_json(self.path / THRESHOLDS, self.head["thresholds"])
        if counts := self._score_counts(parts):
            facts[SCORE_COUNTS] = counts
        sync(self.path)  # the parts' names; before this, a power cut can only lose whole parts
        self._write_manifest(complete=True, parts=parts, **facts)
        return Dataset(self.path)

    def _score_counts(self, parts: Sequence[PartInfo]) -> dict[str, Any]:
        """Sums of the parts' score counts, for the columns in which every part counted all its ok rows."""
        total: dict[str, Counts] | None = None
        for part in parts:
            stored = part.facts.get(SCORE_COUNTS)
            if stored is None and self._counted and part.name in self._lines:
                stored = read_note(self.path / part.name)["facts"].get(SCORE_COUNTS)
            counted = {column: Counts.from_json(counts) for column, counts in (stored or {}).items()}
            counted = {column: counts for column, counts in counted.items() if counts.total == part.ok}
            total = counted if total is None else {c: total[c] + counted[c] for c in total if c in counted}
            if not total:
                return {}
        return {column: counts.to_json() for column, counts in (total or {}).items()}

    def _write_manifest(self, *, complete: bool, parts: Sequence[PartInfo], **facts: Any) -> None:
        file = self.path / MANIFEST
        manifest = {**self.head, "complete": complete, **facts, "parts": [p.to_json() for p in parts]}
        # Datasets made from this one know it by the checksum of the file, so what says the same keeps its bytes.
        if not file.is_file() or read_json(file) != json.loads(json.dumps(manifest)):
            write_json(file, manifest)
