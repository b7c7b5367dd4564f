"""A part: one Parquet file of a dataset, how it is written, committed, read and described."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.record import FINE, Status
from aligncurate.errors import UserError
from aligncurate.io.files import TEMPORARY
from aligncurate.io.parquet import first_line

_FACTS = b"aligncurate.facts"
SCORE_COUNTS = "score_counts"
_BUFFER = 1 << 20  # bytes that are hashed and written at once
_BATCH = 10_000  # values that Arrow encodes at once; its 1,024 make more work
_INCOMPRESSIBLE = ("score", "sha256", "image", "status")  # random, compressed already, or a few bits per row
_MEASURED = ("row", "width", "height", "score", "level", "status")  # columns whose range is worth knowing when scanning


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one part."""

    name: str
    rows: int
    bytes: int
    sha256: str
    statuses: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the verb noted. The counts of scores (`score_counts`) are in the part itself; the manifest has their sum."""

    @property
    def ok(self) -> int:
        return self.statuses.get(Status.OK, 0)

    @property
    def failed(self) -> int:
        return self.rows - sum(self.statuses.get(s, 0) for s in FINE)

    def to_json(self) -> dict[str, Any]:
        line = {"name": self.name, "rows": self.rows, "ok": self.ok, "bytes": self.bytes}
        line |= {"sha256": self.sha256, "statuses": self.statuses}
        return line | {name: fact for name, fact in self.facts.items() if name != SCORE_COUNTS}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        known = ("name", "rows", "bytes", "sha256", "statuses")
        facts = {k: v for k, v in line.items() if k not in (*known, "ok")}
        return cls(**{k: line[k] for k in known}, facts=facts)


def part_name(index: int) -> str:
    """File name of the part that input shard `index` becomes."""
    return f"part-{index:05d}.parquet"


def row_groups(file: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a part, one at a time. Raises UserError when the file is damaged."""
    with open_part(file) as part:
        for group in range(part.num_row_groups):
            yield part.read_row_group(group, columns=columns, use_threads=False)


@contextmanager
def open_part(file: Path, encoded: Sequence[str] = (), *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """A part opened for reading; columns in `encoded` come as dictionaries. Raises UserError when it is damaged.

    With a buffer of `buffer_size` bytes, if not 0, large columns of a row group are read in pieces.
    """
    try:
        with pq.ParquetFile(file, read_dictionary=list(encoded), buffer_size=buffer_size, pre_buffer=False) as part:
            yield part
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: the part is damaged ({first_line(error)}); make the dataset again.") from None


class PartWriter:
    """Writes one part under a temporary name and commits it atomically.

    Use as a context manager: leaving it normally commits and sets `info`; an exception leaves nothing behind.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.facts: dict[str, Any] = {}
        self.info: PartInfo | None = None
        self._temporary = path.with_name(f"{TEMPORARY}{path.name}")
        self._statuses: Counter[str] = Counter()
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._file = _HashingFile(self._temporary)
        # Arrow writes many small pieces; buffered, they reach Python as one call per MiB.
        self._sink = pa.BufferedOutputStream(pa.PythonFile(self._file, "w"), _BUFFER)
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows as one row group."""
        self._parquet = self._parquet or _parquet_writer(self._sink, self.schema)
        self._parquet.write_table(table)
        for item in table["status"].value_counts().to_pylist():
            self._statuses[item["values"]] += item["counts"]

    def _note(self) -> bytes:
        """What the part says of itself, so that a resumed run knows it without a second file."""
        return json.dumps({"statuses": dict(sorted(self._statuses.items())), "facts": self.facts}).encode()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._parquet = self._parquet or _parquet_writer(self._sink, self.schema)  # for a part without rows
                self._parquet.add_key_value_metadata({_FACTS: self._note()})
                self._parquet.close()
                self._sink.flush()
                self._file.commit(self.path)
                statuses = dict(sorted(self._statuses.items()))
                digest = self._file.digest.hexdigest()
                rows = sum(statuses.values())
                self.info = PartInfo(self.path.name, rows, self._file.count, digest, statuses, self.facts)
        finally:
            if self.info is None:
                self._file.abandon()
                if self._parquet is not None:
                    with suppress(Exception):  # Arrow insists on writing a footer, which goes nowhere now
                        self._parquet.close()


def _parquet_writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """The one way in which parts are encoded. `python -m benchmarks.levels` measures what it costs."""
    leaves = dict(_leaves(schema))
    integers = [leaf for leaf, kind in leaves.items() if pa.types.is_integer(kind)]
    return pq.ParquetWriter(
        file,
        schema,
        # Integers as packed differences are smaller than with zstd, in a third of its time.
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
        compression={leaf: "none" if leaf in (*integers, *_INCOMPRESSIBLE) else "zstd" for leaf in leaves},
        # Keys, captions and the like do not repeat, so a dictionary for them only takes time and space.
        use_dictionary=[n for n in ("source", "status", "error") if n in schema.names],
        # Nobody filters by the minimum and maximum of captions or hashes, and finding them is slow.
        write_statistics=[n for n in _MEASURED if n in schema.names],
        write_batch_size=_BATCH,
    )


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Parquet's name and the type of each column that the fields are stored in."""
    for column in fields:
        name, kind = prefix + column.name, column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        if pa.types.is_struct(kind):
            yield from _leaves(kind, f"{name}.")
        else:
            yield name, kind


class _HashingFile:
    """A file that hashes what is written to it, for Arrow to write into."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.count = 0
        self.closed = False

    def write(self, data: Any) -> int:
        if self._file.closed:  # abandoned
            return len(memoryview(data))
        self.digest.update(data)
        self.count += len(memoryview(data))
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.count

    def close(self) -> None:
        """Arrow closes its sink; the file stays open until it is committed."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def commit(self, path: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(path)

    def abandon(self) -> None:
        if not self._file.closed:
            # A full disk fails again when the buffer is flushed; the first error is on its way up already.
            with suppress(OSError):
                self._file.close()
        self._path.unlink(missing_ok=True)


def read_part_info(path: Path, known: Mapping[str, PartInfo]) -> PartInfo | None:
    """What a committed part holds, or None when there is none. Reads the file only if `known` lacks it."""
    if not path.is_file():
        return None
    if path.name in known and known[path.name].bytes == path.stat().st_size:
        return known[path.name]
    note = read_note(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = sum(note["statuses"].values())
    return PartInfo(path.name, rows, path.stat().st_size, digest, note["statuses"], note["facts"])


def read_note(path: Path) -> dict[str, Any]:
    """What a part says of itself: `statuses` and `facts`."""
    try:
        note: dict[str, Any] = json.loads((pq.read_metadata(path).metadata or {})[_FACTS])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a part that aligncurate wrote ({error!r}); delete it.") from None
    return note
