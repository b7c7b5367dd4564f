"""CSV and TSV tables, with or without a header line."""

import csv
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aligncurate import storage
from aligncurate.errors import UserError
from aligncurate.images import EXTENSIONS
from aligncurate.pairs import Pair, Status
from aligncurate.sources.base import Shard, Source, cut, merge_extras
from aligncurate.sources.images import ImageRoot, find_root
from aligncurate.sources.rows import Fields, RowReader, find_fields, image_names

if TYPE_CHECKING:
    import polars as pl


class TableSource(Source):
    """Rows of CSV and TSV files, in order.

    A file whose first line already names an image has no header: its columns are `column_1`, `column_2`, …

    Args: as for ParquetSource.
    """

    kind = "table"

    def __init__(
        self,
        uris: list[str],
        rows_per_shard: int,
        caption_column: str | None = None,
        image_column: str | None = None,
        image_root: str | None = None,
    ) -> None:
        self.shards = []
        self._tables = {uri: _Table(uri, caption_column, image_column, image_root) for uri in uris}
        for uri, table in self._tables.items():
            self.shards += cut(uri, len(table.frame), rows_per_shard, len(self.shards))
        if not self.shards:
            raise UserError(f"{', '.join(uris[:3])}: no rows at all.")
        self.extras = merge_extras([table.extras for table in self._tables.values()])

    def count(self, shard: Shard, most: int | None = None) -> int:
        assert shard.stop is not None
        return shard.stop - shard.start

    def read(self, shard: Shard) -> Iterator[Pair]:
        assert shard.stop is not None
        stop = shard.stop if shard.limit is None else min(shard.stop, shard.start + shard.limit)
        table = self._tables[shard.uri]
        reader = RowReader(shard.uri, table.fields, table.root)
        for i, row in enumerate(table.frame[shard.start : stop].iter_rows(named=True)):
            pair = reader.pair(row, shard.start + i)
            if table.damaged and "\ufffd" in (pair.caption or ""):
                pair.status, pair.error = Status.INVALID_CAPTION, "the caption is not valid UTF-8"
            yield pair


class _Table:
    """One file, read when first needed."""

    def __init__(self, uri: str, caption_column: str | None, image_column: str | None, image_root: str | None) -> None:
        self.uri = uri
        self._caption, self._image, self._root = caption_column, image_column, image_root

    @cached_property
    def _data(self) -> bytes:
        return storage.read(self.uri)

    @cached_property
    def damaged(self) -> bool:
        """Whether the file has bytes that are not UTF-8."""
        try:
            self._data.decode()
        except UnicodeDecodeError:
            return True
        return False

    @cached_property
    def frame(self) -> "pl.DataFrame":
        """All rows; what is neither image, caption nor key has numbers where they are written as such."""
        fields = self.fields
        texts = {fields.image, fields.caption, fields.key}
        return self._cells.with_columns(_typed(column) for column in self._cells if column.name not in texts)

    @cached_property
    def _cells(self) -> "pl.DataFrame":
        """All rows as text."""
        import polars as pl

        separator = "\t" if self.uri.lower().endswith(".tsv") else ","
        if not self._data.strip():
            raise UserError(f"{self.uri}: no rows at all.")
        lines = [line for line in self._data.split(b"\n") if line.strip()]
        header = not _names_image(lines[0].decode("utf-8-sig", "replace"), separator)
        # Many TSVs never quote, so that a quotation mark in a caption would swallow lines.
        even = separator == "\t" and len({line.count(b"\t") for line in lines}) == 1
        last: Exception | None = None
        for quote in ('"', None) if separator == "\t" else ('"',):
            try:
                frame = pl.read_csv(
                    self._data,
                    separator=separator,
                    has_header=header,
                    quote_char=quote,
                    encoding="utf8-lossy",
                    infer_schema=False,
                )
                names = (
                    [n.strip() for n in frame.columns] if header else [f"column_{i + 1}" for i in range(frame.width)]
                )
                frame = frame.rename(dict(zip(frame.columns, names, strict=True)))
            except pl.exceptions.PolarsError as error:
                last = error
                continue
            if quote is None or not even or len(frame) == len(lines) - header:
                return frame
        raise UserError(f"{self.uri}: not a table that can be read ({self._why(separator, last)}).")

    def _why(self, separator: str, error: Exception | None) -> str:
        """The first line with too many cells, or what polars says."""
        text = self._data.decode("utf-8-sig", "replace")
        cells = csv.reader(text.splitlines(keepends=True), delimiter=separator)
        width = len(next(cells, []))
        for row in cells:
            if len(row) > width:
                return f"line {cells.line_num} has {len(row)} cells, the first has {width}; quote texts with commas"
        return str(error).splitlines()[0]

    @cached_property
    def fields(self) -> Fields:
        names = self._cells.columns
        image, caption = self._image, self._caption
        if names[0] == "column_1":
            image, caption = image or self._guess_image(), caption or self._guess_caption()
        return find_fields(self.uri, names, caption, image)

    def _guess_image(self) -> str:
        first = self._cells.row(0, named=True)
        return next(n for n, v in first.items() if _is_image_name(str(v).strip()))

    def _guess_caption(self) -> str | None:
        """The column with the longest texts."""
        image = self._guess_image()
        lengths = {n: self._cells[n].str.len_chars().mean() or 0 for n in self._cells.columns if n != image}
        return max(lengths, key=lambda n: float(str(lengths[n]))) if lengths else None

    @cached_property
    def root(self) -> ImageRoot:
        base = storage.parent(self.uri)
        names = image_names(self.frame.head(8).iter_rows(named=True), self.fields)
        return ImageRoot(self._root or find_root(base, names))

    @property
    def extras(self) -> dict[str, pa.DataType]:
        """Types of the columns that ride along."""
        types: dict[str, Any] = {f.name: f.type for f in self.frame.head(0).to_arrow().schema}
        found = {n: t for n, t in types.items() if n not in self.fields.used}
        return {n: pa.string() if pa.types.is_large_string(t) else t for n, t in found.items()}


def _typed(column: "pl.Series") -> "pl.Series":
    """The column as numbers, if all its cells are numbers; `007` and longer digits than a float holds are text."""
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
