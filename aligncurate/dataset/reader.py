"""A dataset opened for reading: its manifest, its parts and their rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aligncurate.dataset.manifest import MANIFEST, read_manifest
from aligncurate.dataset.part import open_part, row_groups
from aligncurate.dataset.receipt import SCORE_COUNTS, PartInfo
from aligncurate.errors import UserError
from aligncurate.io.files import absolute, as_path
from aligncurate.io.paths import AnyPath, sizes
from aligncurate.levels import Counts

if TYPE_CHECKING:
    import polars as pl


class Dataset:
    """A finished dataset, opened for reading.

    Attributes:
        path: the folder, local or remote.
        manifest: the parsed `manifest.json`.
        parts: what the manifest records of each part, in order.

    Raises:
        UserError: the folder is not a dataset, is not finished, or has another schema version.
    """

    def __init__(self, path: str | AnyPath) -> None:
        self.path = as_path(path)
        try:
            self.manifest = read_manifest(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path}: {_not_a_dataset(self.path)}") from None
        if not self.manifest["complete"]:
            raise UserError(
                f"{self.path}: this dataset is not finished; run its `aligncurate {self.manifest['verb']}` "
                "command again to resume."
            )
        self.parts = [PartInfo.from_json(line) for line in self.manifest["parts"]]

    @property
    def name(self) -> str:
        """The folder, for messages; of several datasets opened as one, all folders."""
        return ", ".join(str(folder) for folder in self.folders)

    @property
    def folders(self) -> list[AnyPath]:
        """The folder; of several datasets opened as one, all of them."""
        return [self.path]

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema that all parts share."""
        if not self.files:
            return pa.schema([])
        with open_part(self.files[0]) as part:
            return part.schema_arrow

    @cached_property
    def files(self) -> list[AnyPath]:
        """The parts' files, in order."""
        return [self.path / part.name for part in self.parts]

    def is_whole(self) -> bool:
        """Whether every part's file is there with its size."""
        there: dict[str, int] = {}
        for folder in {file.parent for file in self.files}:
            there |= {str(folder / name): size for name, size in sizes(folder).items()}
        return all(there.get(str(file)) == part.bytes for file, part in zip(self.files, self.parts, strict=True))

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return sum(part.rows for part in self.parts)

    @cached_property
    def levels(self) -> int:
        """Number of levels N, also of levels that came with the source; 0 if no row has a level."""
        thresholds = self.manifest.get("thresholds")
        if thresholds:
            return int(thresholds["levels"])
        highest = 0
        for file in self.files:
            with open_part(file) as part:
                metadata = part.metadata
            # Parquet numbers the leaves of nested columns, so the number differs from that in the Arrow schema.
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "level")
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(column).statistics
                if statistics is not None and statistics.has_min_max:
                    highest = max(highest, int(statistics.max))
        return highest

    @property
    def statuses(self) -> dict[str, int]:
        """Rows by status, most frequent first."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.statuses)
        return dict(total.most_common())

    def encoder_of(self, column: str) -> dict[str, Any] | None:
        """What the manifest records of the encoder of a score column; None if the scores came with the data."""
        encoders: dict[str, Any] = self.manifest.get("encoders") or {"score": self.manifest.get("encoder")}
        return encoders.get(column)

    def score_counts(self, column: str) -> Counts | None:
        """Counts of a column's usable scores that `score` wrote to the manifest; None if missing or not of all rows."""
        try:
            counts = Counts.from_json(self.manifest[SCORE_COUNTS][column])
        except (KeyError, TypeError, ValueError):
            return None
        return counts if counts.total == sum(part.ok for part in self.parts) else None

    def scan(self, index: int | None = None) -> pl.LazyFrame:
        """All rows, or those of part `index`, as a polars LazyFrame, which reads nothing yet.

        Reads what a query needs, a row group at a time, and verifies it: polars' own reader ignores checksums.

        Raises:
            UserError: there are no parts; also while rows are collected, if a part is damaged.
        """
        import polars as pl
        from polars.io.plugins import register_io_source

        if not self.files:
            raise UserError(f"{self.name}: the dataset has no parts.")
        chosen = range(len(self.files)) if index is None else [index]

        def frames(
            columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, _: int | None
        ) -> Iterator[pl.DataFrame]:
            for number in chosen:
                for table in self.groups(number, columns, use_threads=True):
                    frame = pl.DataFrame(table.slice(0, rows))
                    rows = None if rows is None else rows - len(frame)
                    yield frame if predicate is None else frame.filter(predicate)
                    if rows == 0:
                        return

        return register_io_source(frames, schema=pl.DataFrame(self.schema.empty_table()).schema)

    def read(self, index: int, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()) -> pa.Table:
        """Part `index` as a table; columns in `encoded` as dictionaries. Raises UserError if the file is damaged."""
        with open_part(self.files[index], encoded) as part:
            return part.read(columns=columns, use_threads=False)

    def groups(
        self,
        index: int,
        columns: Sequence[str] | None = None,
        *,
        only: Sequence[int] | None = None,
        use_threads: bool = False,
    ) -> Iterator[pa.Table]:
        """The row groups of part `index`, or those with the numbers `only`, one at a time.

        Raises UserError if the file is damaged.
        """
        return row_groups(self.files[index], columns, only=only, use_threads=use_threads)

    def fingerprint(self) -> dict[str, str]:
        """The dataset as an input in a manifest: its folder and the checksum of its manifest."""
        data = (self.path / MANIFEST).read_bytes()
        return {
            "kind": "dataset",
            "uri": str(absolute(self.path)),
            "manifest_sha256": hashlib.sha256(data).hexdigest(),
        }

    def fingerprints(self) -> list[dict[str, str]]:
        """The inputs in the manifest of a dataset made from this one."""
        return [self.fingerprint()]

    def provenance(self) -> dict[str, Any]:
        """Where the scores and levels come from: encoders, devices, thresholds, and the verbs up to this dataset."""
        step = {key: self.manifest[key] for key in ("verb", "options", "inputs")}
        kept: dict[str, Any] = {name: self.manifest.get(name) for name in ("encoder", "thresholds")}
        kept |= {name: self.manifest[name] for name in ("encoders", "computed_with") if name in self.manifest}
        return {**kept, "history": [*self.manifest.get("history", []), step]}

    def derived(self, verb: str, options: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """The manifest head of a dataset that `verb` makes from this one, with its provenance."""
        head = {"verb": verb, "options": dict(options), "inputs": self.fingerprints()}
        return head | self.provenance() | changes


def _not_a_dataset(path: AnyPath) -> str:
    """Why there is no manifest in `path`, and what to do."""
    if path.is_file():
        return (
            f"this is a file, not a dataset folder; make a dataset from it with `aligncurate score {path} --out DIR`."
        )
    what = "the folder has no manifest.json" if path.is_dir() else "no such folder"
    return f"not a dataset: {what}; give a folder made by `aligncurate score` or `ingest`."


def open_dataset(path: str | AnyPath) -> Dataset:
    """Open the dataset in folder `path`. Raises UserError if it is not a dataset or not finished."""
    return Dataset(path)
