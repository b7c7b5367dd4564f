"""CSV and TSV tables, with or without a header line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.sources.fields import Naming
from aligncurate.sources.rows import RowFile, RowReader, spread

if TYPE_CHECKING:
    import polars as pl


class TableRows(RowFile):
    """A CSV or TSV file. Raises UserError if it cannot be parsed, or has no columns with images and texts.

    If the first line already names an image there is no header: the columns are `column_1`, `column_2`, …
    """

    def __init__(self, uri: str, naming: Naming) -> None:
        self.uri = uri
        data = storage.read(uri)
        self._damaged = not _is_utf8(data)
        cells = _cells(uri, data)
        if cells.columns[0] == "column_1":
            naming = _guess(cells, naming)
        self.recognise(cells.columns, [cells.row(i, named=True) for i in spread(len(cells))], naming)
        # Only extra columns are parsed as numbers; captions and keys stay as written.
        texts = {self.fields.image, self.fields.caption, self.fields.key, self.fields.turns, *(self.fields.asked or ())}
        self._frame = cells.with_columns(_typed(column) for column in cells if column.name not in texts)
        self.rows = len(self._frame)
        types = {f.name: f.type for f in self._frame.head(0).to_arrow().schema if f.name not in self.fields.used}
        self.extras = {n: pa.string() if pa.types.is_large_string(t) else t for n, t in types.items()}

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        for number, row in enumerate(self._frame[start:stop].iter_rows(named=True), start):
            for pair in reader.pairs(row, number):
                if self._damaged and "\ufffd" in (pair.caption or ""):
                    pair.status, pair.error = Status.INVALID_CAPTION, "the caption is not valid UTF-8"
                yield pair


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cells(uri: str, data: bytes) -> pl.DataFrame:
    """The table with every cell as text."""
    import polars as pl

    separator = "\t" if uri.lower().endswith(".tsv") else ","
    if not data.strip():
        raise UserError(f"{uri}: the file has no rows.")
    lines = [line for line in data.split(b"\n") if line.strip()]
    header = not _names_image(lines[0].decode("utf-8-sig", "replace"), separator)
    # Many TSVs never quote, so a lone quotation mark in a caption would swallow the lines after it.
    even = separator == "\t" and len({line.count(b"\t") for line in lines}) == 1
    last: Exception | None = None
    for quote in ('"', None) if separator == "\t" else ('"',):
        try:
            frame = pl.read_csv(
                data,
                separator=separator,
                has_header=header,
                quote_char=quote,
                encoding="utf8-lossy",
                infer_schema=False,
            )
            names = (
                [n.replace("\0", "").strip() for n in frame.columns]
                if header
                else [f"column_{i + 1}" for i in range(frame.width)]
            )
            frame = frame.rename(dict(zip(frame.columns, names, strict=True)))
        except pl.exceptions.PolarsError as error:
            last = error
            continue
        if quote is None or not even or len(frame) == len(lines) - header:
            return frame
    raise UserError(f"{uri}: cannot be parsed as a table ({_why(data, separator, last)}).")


def _why(data: bytes, separator: str, error: Exception | None) -> str:
    """Names the first line with too many cells; if there is none, the error of polars."""
    text = data.decode("utf-8-sig", "replace")
    cells = csv.reader(text.splitlines(keepends=True), delimiter=separator)
    width = len(next(cells, []))
    for row in cells:
        if len(row) > width:
            return f"line {cells.line_num} has {len(row)} cells, the first line has {width}; quote texts with commas"
    return str(error).splitlines()[0]


def _guess(cells: pl.DataFrame, naming: Naming) -> Naming:
    """For a table without a header: images are the column that names some, captions the one with the longest texts."""
    first = next(cells.iter_rows(named=True), {})
    image = naming.image_column or next((n for n, v in first.items() if _is_image_name(str(v).strip())), None)
    lengths = {n: cells[n].str.len_chars().mean() or 0 for n in cells.columns if n != image}
    longest = max(lengths, key=lambda n: float(str(lengths[n])), default=None)
    return replace(naming, image_column=image, caption_column=naming.caption_column or longest)


def _typed(column: pl.Series) -> pl.Series:
    """The column as numbers if all its cells are; `007` and numbers too long for a float stay text."""
    import polars as pl

    if column.null_count() == len(column) or column.str.contains(r"^\s*[+-]?(0\d|\d{16})").any():
        return column
    for kind in (pl.Int64, pl.Float64):
        numbers = column.cast(kind, strict=False)
        if numbers.null_count() == column.null_count():
            return numbers
    return column


def _names_image(line: str, separator: str) -> bool:
    return any(_is_image_name(cell.strip().strip('"')) for cell in line.split(separator))


def _is_image_name(cell: str) -> bool:
    return "." in cell and cell.rpartition(".")[2].lower() in EXTENSIONS
