"""Parquet files with image bytes (plain, or Hugging Face's {bytes, path}) or image paths."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate, islice, repeat
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.record import Pair
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.io.parquet import batches, open_parquet, page_buffer
from aligncurate.sources.arrow_types import storable, to_python
from aligncurate.sources.coerce import unique_names
from aligncurate.sources.fields import Naming
from aligncurate.sources.rows import RowFile, RowReader, spread

_SOME_GROUPS, _SOME_ROWS = 8, 64  # that say what is in the file
_CHECKED = 1_000_000  # a footer may claim as many rows without a look at the file's size
_ROWS_PER_BYTE = 100  # at most, even if all rows are alike
_IDLE = 2  # readers of one file that wait for the shard after theirs
_BYTES_FIRST = ("image_bytes", "image", "jpg", "png", "images", "img")


class ParquetRows(RowFile):
    """A Parquet file. Raises UserError if it is not one, or has no columns with images and texts."""

    has_cells = True

    def __init__(self, uri: str, naming: Naming) -> None:
        self.uri = uri
        with open_parquet(uri) as file:
            schema = file.schema_arrow
            self._names = unique_names(schema.names)
            schema = pa.schema([f.with_name(n) for f, n in zip(schema, self._names, strict=True)])
            self._ends = _ends(uri, file)
            sizes = (file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            self._buffer_size = page_buffer(max(sizes, default=0))
        self.rows = self._ends[-1] if self._ends else 0
        self._idle: list[_Reader] = []
        self._lock = Lock()
        image = naming.image_column or _bytes_column(schema)
        self.recognise(schema.names, self._some(schema), replace(naming, image_column=image))
        self.extras = self.fields.extra_types({f.name: storable(f.type) for f in schema})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def _some(self, schema: pa.Schema) -> list[dict[str, Any]]:
        """Some rows from throughout the file, without columns that hold image bytes."""
        columns = [i for i, name in enumerate(self._names) if not _has_bytes(schema, name)]
        begins = [0, *self._ends][: len(self._ends)]
        found: list[dict[str, Any] | str] = []
        for group in spread(len(begins), _SOME_GROUPS):
            with closing(self._reader(begins[group], columns)) as reader:
                found += reader.take(min(_SOME_ROWS, self._ends[group] - begins[group]))
        return [row for row in found if isinstance(row, dict)]

    def starts(self, per_shard: int) -> list[int]:
        """Shards end with a row group where one ends near: other shards need not read it then."""
        starts = [0]
        while (target := starts[-1] + per_shard) < self.rows:
            after = bisect_left(self._ends, target)
            nearest = min(self._ends[max(after - 1, 0) : after + 1], key=lambda end: abs(end - target))
            starts.append(nearest if abs(nearest - target) <= per_shard // 4 else target)
        return starts if starts[-1] < self.rows else starts[:-1]

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        try:
            rows = self._reader_at(start)
            for number, row in enumerate(rows.take(stop - start), start):
                if isinstance(row, dict):
                    yield from reader.pairs(row, number)
                else:
                    yield reader.unreadable(number, row)
            self._keep(rows)
        except UserError as error:  # damaged since it was opened; other shards go on
            raise ShardError(str(error).rstrip(".")) from None

    def count(self, start: int, stop: int, most: int | None = None) -> int:
        """Reads only the texts, because the images are most of the bytes."""
        texts = {self.fields.caption, self.fields.turns, *(self.fields.asked or ())}
        columns = [i for i, name in enumerate(self._names) if name in texts]
        group = bisect_right(self._ends, start)
        reader = RowReader(self.uri, self.fields, None)
        with closing(self._reader([0, *self._ends][group], columns)) as rows:
            rows.skip(start - rows.position)
            numbered = enumerate(rows.take(stop - start), start)
            pairs = (p for n, row in numbered for p in (reader.pairs(row, n) if isinstance(row, dict) else [row]))
            return sum(1 for _ in islice(pairs, most))

    def _reader_at(self, start: int) -> _Reader:
        """A reader whose next row is `start`: Parquet cannot skip rows, so one that has come near goes on."""
        group = bisect_right(self._ends, start)
        first = self._ends[group - 1] if group else 0
        with self._lock:
            near = [r for r in self._idle if first <= r.position <= start]
            reader = max(near, key=lambda r: r.position, default=None)
            if reader is not None:
                self._idle.remove(reader)
        reader = reader or self._reader(first)
        reader.skip(start - reader.position)
        return reader

    def _reader(self, first: int, columns: Sequence[int] | None = None) -> _Reader:
        return _Reader(self.uri, self._names, self._ends, first, columns, self._buffer_size)

    def _keep(self, reader: _Reader) -> None:
        with self._lock:
            self._idle.append(reader)
            dropped = self._idle.pop(0) if len(self._idle) > _IDLE else None
        if dropped is not None:
            dropped.close()


class _Reader:
    """Reads the rows of a file in order, in batches of few bytes.

    Args:
        uri: the file.
        names: of its columns, as rows have them.
        ends: the row number after each row group.
        first: the row to begin with, the first of a row group.
        columns: numbers of the columns to read; all by default.
        buffer_size: see `open_parquet`.

    Attributes:
        position: number of the next row.
    """

    def __init__(
        self,
        uri: str,
        names: Sequence[str],
        ends: Sequence[int],
        first: int,
        columns: Sequence[int] | None,
        buffer_size: int,
    ) -> None:
        self._uri, self._ends, self._columns, self._buffer_size = uri, ends, columns, buffer_size
        self._names = names if columns is None else [names[i] for i in columns]
        self.position = first
        self._skipped_to = first
        self._rows = self._read(first)

    def skip(self, rows: int) -> None:
        """Go on `rows` rows further; they are read, but not made into Python objects."""
        self.position = self._skipped_to = self.position + rows

    def take(self, rows: int) -> Iterator[dict[str, Any] | str]:
        """The next `rows` rows; a row that cannot be read is an error message instead."""
        for _ in range(rows):
            row = next(self._rows)
            self.position += 1
            yield row

    def close(self) -> None:
        self._rows.close()

    def _read(self, first: int) -> Generator[dict[str, Any] | str]:
        with open_parquet(self._uri, buffer_size=self._buffer_size) as file:
            paths = self._paths(file.schema_arrow.names)
            for group in range(bisect_right(self._ends, first), len(self._ends)):
                begin = self._ends[group - 1] if group else 0
                for number, batch in batches(file, group, begin, paths):
                    end = self._ends[group] if isinstance(batch, str) else number + batch.num_rows
                    start = min(max(number, self._skipped_to), end)
                    # A reader that waits here may have been told to skip more when it goes on.
                    for place, row in enumerate(self._rows_of(batch, start - number, end - start), start):
                        if place >= self._skipped_to:
                            yield row

    def _rows_of(self, batch: pa.RecordBatch | str, start: int, count: int) -> Iterable[dict[str, Any] | str]:
        return repeat(batch, count) if isinstance(batch, str) else self._dictionaries(batch.slice(start, count))

    def _paths(self, names: Sequence[str]) -> list[str] | None:
        """The columns to read, or all where Arrow could take a name for several columns."""
        if self._columns is None or len(set(names)) < len(names) or any("." in name for name in names):
            return None
        return [names[i] for i in self._columns]

    def _dictionaries(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        read = batch.columns
        if len(read) > len(self._names) and self._columns is not None:
            read = [read[i] for i in self._columns]
        columns = [to_python(column) for column in read]
        return [dict(zip(self._names, values, strict=True)) for values in zip(*columns, strict=True)]


def _ends(uri: str, file: pq.ParquetFile) -> list[int]:
    """The row number after each row group. Raises UserError if the footer claims what cannot be."""
    rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    total = sum(rows)
    if min(rows, default=0) < 0 or (total > _CHECKED and total > _ROWS_PER_BYTE * storage.size(uri)):
        raise UserError(f"{uri}: damaged: its footer claims {total:,} rows, more than the file can hold.")
    return list(accumulate(rows))


def _bytes_column(schema: pa.Schema) -> str | None:
    """A column with image bytes, which is preferred to one with paths; None if there is none."""
    return next((n for n in _BYTES_FIRST if n in schema.names and _has_bytes(schema, n)), None)


def _has_bytes(schema: pa.Schema, name: str) -> bool:
    kind = storable(schema.field(name).type)
    if kind is not None and (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        kind = kind.value_type
    if kind is not None and pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return kind is not None and bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))
