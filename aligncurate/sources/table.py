"""CSV and TSV tables in any common dialect, with or without a header line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from aligncurate.dataset.record import EXTRA, Pair
from aligncurate.errors import NoPairsError, UserError
from aligncurate.io.files import readable
from aligncurate.sources.captions import CAPTIONS
from aligncurate.sources.coerce import unique_names
from aligncurate.sources.dialect import Lines, Record, detect, names_image, records
from aligncurate.sources.encoding import TextFile
from aligncurate.sources.fields import IMAGES, KEYS, URLS, Naming, is_url
from aligncurate.sources.options import SourceOptions
from aligncurate.sources.rows import RowFile, RowReader

_SAMPLE_LINES, _SAMPLE_BYTES, _LEAST_LINES = 200, 1 << 20, 5
_SPREAD_ROWS, _SPREAD_BYTES = 1_024, 1 << 26  # that say what is in the file
_LONGEST_LINE = 1 << 28
# `007` and numbers too long for a float stay text.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,14})")
_FLOAT = re.compile(r"[+-]?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][+-]?\d+)?|nan|-?inf", re.IGNORECASE)


class TableRows(RowFile):
    """A CSV or TSV file. Raises UserError if it cannot be parsed, or has no columns with images and texts.

    Encoding, separator, quotes and header are detected, unless `options` name them. Without a header line the columns
    are `column_1`, `column_2`, …, and one with web addresses is `url`. The file is read from disk; only where each
    shard begins is kept.
    """

    def __init__(self, uri: str, naming: Naming, options: SourceOptions) -> None:
        self.uri = uri
        self._per_shard = options.rows_per_shard
        self._file = TextFile(uri, options.encoding)
        with closing(self._file.open()) as file:
            sample = _first_lines(file)
        if not sample:
            raise NoPairsError(f"{uri}: the file has no rows.")
        known = (*IMAGES, *CAPTIONS, *KEYS, *URLS)
        self._dialect = detect(sample, self._file.decode, map(str.lower, known), _separator(options.separator))
        head = list(records(Lines(sample, self._file.decode), self._dialect))
        self._named = bool(options.columns)
        self._names, self._has_header = _header(uri, head[0].cells, options.columns)
        if self._has_header:
            head = head[1:]
        else:
            self._names = self._names or _names(head)
            naming = _guess(head, self._names, naming)
        self._numbers: dict[str, type[int] | type[float]] = {}
        self._index(naming)

    def _index(self, naming: Naming) -> None:
        """Go through the file once: where shards begin, which columns are numbers, which lines are bad."""
        self._begins: list[tuple[int, int]] = []  # (offset, line number) of each shard
        self.rows = 0
        numbers = _NumberColumns(len(self._names))
        some = _Spread()
        problem, bad = None, 0
        for record in self._records(None, 1, observe=True):
            if self.rows % self._per_shard == 0:
                self._begins.append((record.offset, record.line))
            self.rows += 1
            wrong = self._problem(record)
            if wrong is None:
                numbers.observe(record.cells)
                some.observe(record.cells)
            else:
                problem, bad = problem or wrong, bad + 1
        if bad and bad == self.rows:
            raise UserError(f"{self.uri}: cannot be parsed as a table ({problem}).")
        if notice := self._file.settle():
            self.notices = [notice]
            if not self._named:
                self._names = self._file.decode_again(self._names)
            some.kept = [self._file.decode_again(cells) for cells in some.kept]
        self._names = unique_names(map(readable, self._names))
        self.recognise(self._names, [self._row(cells) for cells in some.kept], naming)
        fields = self.fields
        texts = {fields.image, fields.caption, fields.turns, fields.key, *(fields.asked or ())}
        found = {self._names[place]: kind for place, kind in numbers.found.items()}
        self._numbers = {name: kind for name, kind in found.items() if name not in texts}
        kinds = {int: pa.int64(), float: pa.float64()}
        types = {n: kinds[self._numbers[n]] if n in self._numbers else pa.string() for n in self._names}
        self.extras = fields.extra_types(types)
        if bad or not {"score", "level", EXTRA}.isdisjoint(self._names):
            self.extras[EXTRA] = pa.string()

    def _records(self, offset: int | None, line: int, *, observe: bool = False) -> Iterator[Record]:
        """The records from `offset` on; from the first line on without the header."""
        with closing(self._file.open(offset)) as file:
            begin = self._file.start if offset is None else offset
            lines = _lines(file, self._file if observe else None)
            found = records(Lines(lines, self._file.decode, begin, line), self._dialect)
            if offset is None and self._has_header:
                next(found, None)
            yield from found

    def _problem(self, record: Record) -> str | None:
        """Why a record cannot be used; cells that are missing at its end count as empty."""
        width = len(self._names)
        if record.error is not None:
            return record.error
        if len(record.cells) <= width or not any(cell.strip() for cell in record.cells[width:]):
            return None
        separator = {"\t": "tabs"}.get(self._dialect.separator, f"'{self._dialect.separator}'")
        return (
            f"line {record.line} has {len(record.cells)} cells, the first line has {width}; "
            f"quote texts with {separator} in them"
        )

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        shard = start // self._per_shard
        found = self._records(*self._begins[shard])
        for number, record in enumerate(islice(found, stop - shard * self._per_shard), shard * self._per_shard):
            if number < start:
                continue
            wrong = self._problem(record)
            if wrong is None:
                yield from reader.pairs(self._row(record.cells), number)
            else:
                yield self._bad(reader.broken(number, wrong), record)

    def _bad(self, pair: Pair, record: Record) -> Pair:
        """A line that cannot be parsed keeps its text: the caption if its cells can be told apart, else the line."""
        if len(record.cells) == len(self._names) and self.fields.caption:
            pair.caption = record.cells[self._names.index(self.fields.caption)].strip()
        pair.extra = {"line": self._dialect.separator.join(record.cells)}
        return pair

    def _row(self, cells: Sequence[str]) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(self._names)
        for name, cell in zip(self._names, cells, strict=False):
            if cell:
                kind = self._numbers.get(name)
                row[name] = cell if kind is None else kind(cell)
        return row


class _Spread:
    """Some rows from throughout a table: the first ones, and others further and further apart."""

    def __init__(self) -> None:
        self.kept: list[Sequence[str]] = []
        self._bytes, self._seen, self._step = 0, 0, 1

    def observe(self, cells: Sequence[str]) -> None:
        self._seen += 1
        if self._seen % self._step or self._bytes > _SPREAD_BYTES:
            return
        self.kept.append(cells)
        self._bytes += sum(map(len, cells))
        if len(self.kept) >= _SPREAD_ROWS:
            self.kept[_SPREAD_ROWS // 2 :] = self.kept[_SPREAD_ROWS // 2 :: 2]
            self._step *= 2


class _NumberColumns:
    """The columns in which all cells are numbers, learned cell by cell."""

    def __init__(self, columns: int) -> None:
        self._open = set(range(columns))
        self.found: dict[int, type[int] | type[float]] = {}

    def observe(self, cells: Sequence[str]) -> None:
        for place in list(self._open):
            cell = cells[place] if place < len(cells) else ""
            if not cell:
                continue
            if _INTEGER.fullmatch(cell):
                self.found.setdefault(place, int)
            elif _FLOAT.fullmatch(cell):
                self.found[place] = float
            else:
                self.found.pop(place, None)
                self._open.remove(place)


def _lines(file: BinaryIO, watch: TextFile | None) -> Iterator[bytes]:
    """The lines of a file; the rest of one that is too long for memory is left out."""
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            raise UserError(f"{getattr(file, 'name', 'the table')}: a line has more than {_LONGEST_LINE >> 20} MiB.")
        if watch is not None:
            watch.observe(line)
        yield line


def _first_lines(file: BinaryIO) -> list[bytes]:
    """The first lines that are not blank, and the blank ones before them."""
    lines: list[bytes] = []
    size = 0
    for line in _lines(file, None):
        lines.append(line)
        size += len(line)
        if len(lines) >= _SAMPLE_LINES or (size > _SAMPLE_BYTES and len(lines) >= _LEAST_LINES):
            break
    return lines if any(line.strip() for line in lines) else []


def _separator(given: str | None) -> str | None:
    if given is None:
        return None
    separator = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(separator) != 1 or separator in '"\r\n':
        raise UserError(f"--separator {given}: use one character, or `tab`.")
    return separator


def _header(uri: str, first: Sequence[str], columns: Sequence[str] | None) -> tuple[list[str], bool]:
    """(names of the columns, whether the first line has them); no names if neither line nor option has."""
    cells = [cell.replace("\0", "").strip() for cell in first]
    if columns:
        if len(columns) != len(cells):
            raise UserError(f"{uri}: --columns has {len(columns)} names, the first line has {len(cells)} cells.")
        return unique_names(columns), cells == list(columns)
    if any(names_image(cell) for cell in cells):
        return [], False
    return unique_names(cell or f"column_{i}" for i, cell in enumerate(cells, 1)), True


def _names(head: Sequence[Record]) -> list[str]:
    """Names of the columns of a table without a header line."""
    first = head[0].cells
    return unique_names("url" if is_url(cell) else f"column_{i}" for i, cell in enumerate(first, 1))


def _guess(head: Sequence[Record], names: Sequence[str], naming: Naming) -> Naming:
    """For a table without a header: images are the column that names some, captions the one with the longest texts."""
    first = head[0].cells
    images = [n for n, cell in zip(names, first, strict=False) if names_image(cell) and not is_url(cell)]
    image = naming.image_column or next(iter(images), None)
    urls = {n for n, cell in zip(names, first, strict=False) if is_url(cell)}
    lengths = {n: sum(len(r.cells[i]) for r in head if i < len(r.cells)) for i, n in enumerate(names)}
    texts = [n for n in names if n != image and n not in urls]
    longest = max(texts, key=lambda n: lengths[n], default=None)
    return replace(naming, image_column=image, caption_column=naming.caption_column or longest)
