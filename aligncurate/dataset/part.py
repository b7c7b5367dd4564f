"""A part: one Parquet file of a dataset, how it is written, committed, read and described."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.receipt import DATA, PartInfo, Receipt, mend, part_name, receipt_name
from aligncurate.dataset.record import COLUMNS, is_stored_as
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.files import json_bytes, publish, sync, unfinished, write_json
from aligncurate.io.parquet import PARQUET_ERRORS, first_line, is_damage
from aligncurate.io.paths import AnyPath

_BUFFER = 1 << 20  # bytes that are hashed and written at once
_BATCH = 10_000  # values that Arrow encodes at once; its 1,024 make more work
_INCOMPRESSIBLE = ("score", "sha256", "image", "status")  # random, compressed already, or a few bits per row
_MEASURED = ("row", "width", "height", "score", "level", "status")  # columns whose range is worth knowing when scanning


def row_groups(
    file: AnyPath,
    columns: Sequence[str] | None = None,
    *,
    only: Sequence[int] | None = None,
    use_threads: bool = False,
) -> Iterator[pa.Table]:
    """The row groups of a part, or those with the numbers `only`, one at a time.

    Raises UserError when the file is damaged.
    """
    with open_part(file) as part:
        for group in range(part.num_row_groups) if only is None else only:
            yield part.read_row_group(group, columns=columns, use_threads=use_threads)


@contextmanager
def open_part(file: AnyPath, encoded: Sequence[str] = (), *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """A part opened for reading, its pages' checksums verified; columns in `encoded` come as dictionaries.

    With a buffer of `buffer_size` bytes, if not 0, large columns of a row group are read in pieces.

    Raises UserError when it is damaged or missing, or lacks a column that every dataset has.
    """
    try:
        with (
            storage.open_for_arrow(str(file)) as source,
            pq.ParquetFile(
                source,
                read_dictionary=list(encoded),
                buffer_size=buffer_size,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as part,
        ):
            _check_columns(file, part.schema_arrow)
            yield part
    except PARQUET_ERRORS as error:
        if not is_damage(error):
            raise UserError(f"{file}: the part cannot be read ({getattr(error, 'strerror', error)}).") from None
        raise UserError(f"{file}: the part is damaged ({first_line(error)}); {mend(_folder(file))}.") from None


def _folder(part: AnyPath) -> AnyPath:
    """The dataset's folder; earlier versions wrote parts on top."""
    return part.parent.parent if part.parent.name == DATA else part.parent


def _check_columns(file: AnyPath, schema: pa.Schema) -> None:
    """Raises UserError unless a part, which others may have written, has the columns of every dataset."""
    for name, kind in COLUMNS.items():
        found = schema.field(name).type if schema.names.count(name) == 1 else None
        if found is None and (name != "image" or name in schema.names):
            problem = "has column {} twice" if name in schema.names else "has no column {}"
            raise UserError(f"{file}: the part {problem.format(name)}; {mend(_folder(file))}.")
        if found is not None and pa.types.is_null(found) and name != "status":
            continue  # a column without any value
        if found is not None and not is_stored_as(found, kind):
            raise UserError(f"{file}: column {name} is {found}, not {kind}; {mend(_folder(file))}.")


class PartWriter:
    """Writes one part under a temporary name, and commits it with its receipt.

    Use as a context manager: leaving it normally commits and sets `info`; an exception leaves nothing behind.

    Args:
        folder: of the dataset.
        index: the number of the part.
        schema: of its rows.
        shard: what the part is made from, for its receipt.
        options: digest of what all parts share, for its receipt.
    """

    def __init__(
        self, folder: AnyPath, index: int, schema: pa.Schema, shard: Mapping[str, Any] | None = None, options: str = ""
    ) -> None:
        self.schema = schema
        self.facts: dict[str, Any] = {}
        self.info: PartInfo | None = None
        self._folder, self._index, self._shard, self._options = folder, index, dict(shard or {}), options
        self._statuses: Counter[str] = Counter()
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._temporary = unfinished(self._folder / part_name(self._index), self._folder)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._parquet = self._parquet or _parquet_writer(self._sink, self.schema)  # for a part without rows
                self._parquet.close()
                self._sink.flush()
                self._file.finish()
                statuses = dict(sorted(self._statuses.items()))
                digest = self._file.digest.hexdigest()
                name, rows = part_name(self._index), sum(statuses.values())
                info = PartInfo(name, rows, self._file.count, digest, statuses, self.facts)
                commit(self._folder, self._index, self._temporary, Receipt(info, self._shard, self._options))
                self.info = info.without_counts()
        finally:
            if self.info is None:
                self._file.abandon()
                if self._parquet is not None:
                    with suppress(Exception):  # Arrow insists on writing a footer, which goes nowhere now
                        self._parquet.close()


def commit(folder: AnyPath, index: int, temporary: AnyPath, receipt: Receipt) -> None:
    """Publish part `index`, whose bytes are on disk as `temporary` (see `publish`), then its receipt.

    A power cut may lose what is not synced yet. A part without a receipt, or with an empty one, is made again, and a
    receipt without a part commits nothing, so receipts and the names of new parts are synced at the end
    (`DatasetWriter.finish`). The receipt of another part goes first, and the new part must be on disk before its own
    is; that of the same bytes stays, so that another run which is finishing the dataset always finds one.
    """
    part, paper = folder / part_name(index), folder / receipt_name(index)
    before = _bytes_of(paper)
    if before not in (None, json_bytes(receipt.to_json(), one_line=True)):
        paper.unlink(missing_ok=True)
        sync(paper.parent)
    replaces = before is not None or (isinstance(part, Path) and part.exists())
    publish(temporary, part, durable=False)
    if replaces:
        sync(part.parent)
    write_receipt(folder, index, receipt)


def write_receipt(folder: AnyPath, index: int, receipt: Receipt) -> None:
    """Write the receipt of part `index`; it may not be on disk yet."""
    write_json(folder / receipt_name(index), receipt.to_json(), folder=folder, durable=False, one_line=True)


def _bytes_of(file: AnyPath) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


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
        write_page_checksum=True,
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
        """Arrow closes its sink; the file stays open until it is finished."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        if not self._file.closed:
            # A full disk fails again when the buffer is flushed; the first error is on its way up already.
            with suppress(OSError):
                self._file.close()
        self._path.unlink(missing_ok=True)
