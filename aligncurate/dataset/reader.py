"""A dataset opened for reading: its manifest, its parts and their rows."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.manifest import MANIFEST, SCHEMA_VERSION
from aligncurate.dataset.part import SCORE_COUNTS, PartInfo, readable, row_groups
from aligncurate.errors import UserError
from aligncurate.io.files import read_json
from aligncurate.levels import Counts

if TYPE_CHECKING:
    import polars as pl


class Dataset:
    """A finished dataset, opened for reading.

    Attributes:
        path: the folder.
        manifest: the parsed `manifest.json`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            if self.path.is_file():
                raise UserError(
                    f"{self.path}: this is a file, not a dataset folder; make a dataset from it with "
                    f"`aligncurate score {self.path} --out DIR`."
                )
            what = "has no manifest.json" if self.path.is_dir() else "is not there"
            raise UserError(
                f"{self.path}: not a dataset: it {what}; give a folder made by `aligncurate score` or `ingest`."
            )
        self.manifest = read_json(file)
        found = self.manifest.get("schema_version")
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{file}: schema version {found}, but this aligncurate reads version {SCHEMA_VERSION}; "
                "make the dataset again, or install the version that made it."
            )
        if not self.manifest["complete"]:
            raise UserError(
                f"{self.path}: this dataset is not finished; run its `aligncurate {self.manifest['verb']}` "
                "command again to resume."
            )
        self.parts = [PartInfo.from_json(line) for line in self.manifest["parts"]]

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema, the same for all parts."""
        return pq.read_schema(self.files[0]) if self.files else pa.schema([])

    @cached_property
    def files(self) -> list[Path]:
        return [self.path / part.name for part in self.parts]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def levels(self) -> int:
        """N of its levels; 0 when no row has one. Levels that came with the source count too."""
        thresholds = self.manifest.get("thresholds")
        if thresholds:
            return int(thresholds["levels"])
        highest = 0
        for file in self.files:
            metadata = pq.read_metadata(file)
            # Parquet counts the leaves of nested columns, so the place is not that of the Arrow schema.
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "level")
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group).column(column).statistics
                if found is not None and found.has_min_max:
                    highest = max(highest, int(found.max))
        return highest

    @property
    def statuses(self) -> dict[str, int]:
        """Rows by status, most frequent first."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.statuses)
        return dict(total.most_common())

    def encoder_of(self, column: str) -> dict[str, Any] | None:
        """What the manifest says of the encoder that made a column of scores; None where they came with the data."""
        encoders: dict[str, Any] = self.manifest.get("encoders") or {"score": self.manifest.get("encoder")}
        return encoders.get(column)

    def score_counts(self, column: str) -> Counts | None:
        """Counts of a column's usable scores that `score` left in the manifest; None where there are none that fit."""
        try:
            counts = Counts.from_json(self.manifest[SCORE_COUNTS][column])
        except (KeyError, TypeError, ValueError):
            return None
        return counts if counts.total == sum(part.ok for part in self.parts) else None

    def scan(self) -> pl.LazyFrame:
        """All rows as a polars LazyFrame; nothing is read yet."""
        import polars as pl

        if not self.files:
            raise UserError(f"{self.path}: the dataset has no parts.")
        return pl.scan_parquet(self.files, glob=False)  # a folder's name may hold brackets

    def read(self, index: int, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()) -> pa.Table:
        """Part number `index` as a table; columns in `encoded` as dictionaries. Raises UserError for a damaged file."""
        with readable(self.files[index], encoded) as part:
            return part.read(columns=columns, use_threads=False)

    def groups(self, index: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of part `index`, one at a time, so that embedded images need not all fit in memory."""
        return row_groups(self.files[index], columns)

    def fingerprint(self) -> dict[str, str]:
        """Names this very dataset: its folder and the checksum of its manifest."""
        data = (self.path / MANIFEST).read_bytes()
        return {
            "kind": "dataset",
            "uri": os.path.abspath(self.path),
            "manifest_sha256": hashlib.sha256(data).hexdigest(),
        }

    def derived(self, verb: str, options: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """Manifest head of a dataset that `verb` makes from this one: encoder and history ride along."""
        step = {key: self.manifest[key] for key in ("verb", "options", "inputs")}
        head = {
            "verb": verb,
            "options": dict(options),
            "inputs": [self.fingerprint()],
            "encoder": self.manifest.get("encoder"),
            **({"encoders": self.manifest["encoders"]} if "encoders" in self.manifest else {}),
            "thresholds": self.manifest.get("thresholds"),
            "history": [*self.manifest.get("history", []), step],
        }
        return head | changes


def open_dataset(path: str | Path) -> Dataset:
    """The dataset in folder `path`. Raises UserError when there is none, or it is unfinished."""
    return Dataset(path)
