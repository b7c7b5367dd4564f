"""Parquet files with image bytes (plain, or Hugging Face's {bytes, path}) or image paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.record import Pair
from aligncurate.errors import ShardError, UserError
from aligncurate.io.parquet import PARQUET_ERRORS, first_line, is_damage, open_parquet
from aligncurate.sources.fields import Naming
from aligncurate.sources.rows import RowFile, RowReader, spread

_SOME_GROUPS, _SOME_ROWS = 8, 64  # that say what is in the file
_BATCH = 256  # rows read at a time; the images of a whole row group may not fit in memory
_BYTES_FIRST = ("image_bytes", "image", "jpg", "png", "images", "img")


class ParquetRows(RowFile):
    """A Parquet file. Raises UserError if it is not one, or has no columns with images and texts."""

    has_cells = True

    def __init__(self, uri: str, naming: Naming) -> None:
        self.uri = uri
        with open_parquet(uri) as file:
            schema = file.schema_arrow
            image = naming.image_column or _bytes_column(schema)
            self.rows = file.metadata.num_rows
            self.recognise(schema.names, _some(file), replace(naming, image_column=image))
            self.extras = {f.name: _in_microseconds(f.type) for f in schema if f.name not in self.fields.used}

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        try:
            with open_parquet(self.uri) as file:
                for number, row in rows(file, start, stop):
                    if isinstance(row, dict):
                        yield from reader.pairs(row, number)
                    else:
                        yield reader.unreadable(number, row)
        except UserError as error:  # damaged since it was opened; other shards go on
            raise ShardError(str(error).rstrip(".")) from None


def _some(file: pq.ParquetFile) -> list[dict[str, Any]]:
    """Some rows from throughout the file, without columns that hold image bytes."""
    schema = file.schema_arrow
    columns = [name for name in schema.names if not _has_bytes(schema, name)]
    ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
    starts = [0, *ends][: len(ends)]
    chosen = [starts[i] for i in spread(len(starts), _SOME_GROUPS)]
    found = [row for start in chosen for _, row in rows(file, start, start + _SOME_ROWS, columns)]
    return [row for row in found if isinstance(row, dict)]


def rows(
    file: pq.ParquetFile, start: int, stop: int, columns: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number, row) of rows start..stop-1; each row of a damaged row group is an error message instead.

    Only the row groups with these rows are read.
    """
    first = 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        number = first
        if first < stop and end > start:
            try:
                for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns):
                    low, high = max(start - number, 0), min(stop - number, batch.num_rows)
                    if low < high:
                        for i, row in enumerate(_pylist(batch.slice(low, high - low)), low):
                            yield number + i, row
                    number += batch.num_rows
            except PARQUET_ERRORS as error:
                if not is_damage(error):
                    raise
                for i in range(max(number, start), min(end, stop)):
                    yield i, f"the Parquet file is damaged here ({first_line(error)})"
        first = end


def _pylist(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries; bytes that are not UTF-8 become lone surrogates, which set the status of their row only."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if (kind := _in_microseconds(column.type)) != column.type:
            column = column.cast(kind, safe=False)
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            raw = column.cast(_as_bytes(column.type)).to_pylist()
            columns[name] = [_decoded(value, column.type) for value in raw]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """`kind` with all strings, including those in lists and structs, as bytes."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _as_bytes(f.type)) for f in kind])
    return kind


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value of `_as_bytes(kind)` with its strings decoded; invalid bytes become lone surrogates."""
    if value is None or _as_bytes(kind) == kind:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return [_decoded(item, kind.value_type) for item in value]
    return {f.name: _decoded(value[f.name], f.type) for f in kind}


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """`kind` in microseconds if it is in nanoseconds, as pandas writes by default: Python's times have none."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if kind == pa.time64("ns") else kind


def _bytes_column(schema: pa.Schema) -> str | None:
    """A column with image bytes, which is preferred to one with paths; None if there is none."""
    return next((n for n in _BYTES_FIRST if n in schema.names and _has_bytes(schema, n)), None)


def _has_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
