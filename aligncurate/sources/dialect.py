"""How a table is written, detected from its first lines; and its lines parsed one record at a time."""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from aligncurate.images.formats import EXTENSIONS
from aligncurate.sources.fields import is_url

SEPARATORS = ("\t", ",", ";", "|")

_MOST_LINES = 1_000  # of one record: a quotation mark that is never closed must not swallow the file
_FEW = 3  # lines with a stray quotation mark, from which on a table is taken as one that never quotes

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images in base64 are longer than its 128 KB


@dataclass(frozen=True)
class Dialect:
    """How cells are separated and quoted.

    Attributes:
        separator: one character.
        quotes: whether `"` quotes cells.
        escapes: whether `\\` escapes a quotation mark; otherwise it is written twice.
    """

    separator: str
    quotes: bool = True
    escapes: bool = False


@dataclass(slots=True)
class Record:
    """One record of a table.

    Attributes:
        offset: of its first byte.
        line: number of its first line, from 1.
        cells: its cells; as they are written if it cannot be parsed.
        error: why it cannot be parsed.
        quoted: whether quotation marks were read as such, so that the cells are not as they are written.
    """

    offset: int
    line: int
    cells: list[str]
    error: str | None = None
    quoted: bool = False


class Lines:
    """Lines of a table with their numbers and offsets; lines that were read too far can be given back."""

    def __init__(self, lines: Iterable[bytes], decode: Callable[[bytes], str], offset: int = 0, line: int = 1) -> None:
        self._lines, self._decode = iter(lines), decode
        self._offset, self._line = offset, line
        self._returned: deque[tuple[int, int, str]] = deque()

    def take(self) -> tuple[int, int, str] | None:
        """(offset, number, text) of the next line, with its line ending; None at the end."""
        if self._returned:
            return self._returned.popleft()
        raw = next(self._lines, None)
        if raw is None:
            return None
        taken = self._offset, self._line, self._decode(raw)
        self._offset += len(raw)
        self._line += 1
        return taken

    def give_back(self, lines: Sequence[tuple[int, int, str]]) -> None:
        self._returned.extendleft(reversed(lines))


def records(lines: Lines, dialect: Dialect) -> Iterator[Record]:
    """The records of a table. A line that cannot be parsed is one on its own, and the next line begins another."""
    while (taken := lines.take()) is not None:
        offset, number, text = taken
        if not text.strip():
            continue
        if dialect.quotes and ('"' in text or (dialect.escapes and "\\" in text)):
            yield _quoted(lines, dialect, offset, number, text)
        else:
            yield Record(offset, number, _split(text, dialect))


def _split(text: str, dialect: Dialect) -> list[str]:
    return text.rstrip("\r\n").split(dialect.separator)


def _quoted(lines: Lines, dialect: Dialect, offset: int, number: int, text: str) -> Record:
    """The record that begins with a line with quotation marks; it may go on over the next lines."""
    more: list[tuple[int, int, str]] = []

    def feed() -> Iterator[str]:
        yield text
        while len(more) < _MOST_LINES and (taken := lines.take()) is not None:
            more.append(taken)
            yield taken[2]

    options = {"doublequote": False, "escapechar": "\\"} if dialect.escapes else {}
    spaces = f'{dialect.separator} "' in text
    reader = csv.reader(feed(), delimiter=dialect.separator, strict=True, skipinitialspace=spaces, **options)  # type: ignore[arg-type]
    try:
        cells = next(reader)
    except csv.Error as error:
        cause = "is not closed" if "end of data" in str(error) else "is followed by text"
    else:
        if not _looks_swallowed(cells, [line for _, _, line in more], dialect):
            return Record(offset, number, cells, quoted=cells != _split(text, dialect))
        cause = "is not closed"
    lines.give_back(more)
    literal = _split(text, dialect)
    return Record(
        offset, number, literal, f"line {number}: a quotation mark {cause}; inside a quoted text it is written twice"
    )


def _looks_swallowed(cells: Sequence[str], lines: Sequence[str], dialect: Dialect) -> bool:
    """Whether the further lines of a record look like records themselves: images are named in the same place."""
    places = [i for i, cell in enumerate(cells) if names_image(cell)]
    for line in lines:
        other = _split(line, dialect)
        if len(other) == len(cells) and any(names_image(other[i]) for i in places):
            return True
    return False


def detect(lines: Sequence[bytes], decode: Callable[[bytes], str], known: Iterable[str], given: str | None) -> Dialect:
    """The dialect in which most of the first lines have as many cells as the first of them.

    Args:
        lines: the first lines of the file.
        decode: from bytes to text.
        known: usual names of columns, in lower case.
        given: the separator, if the user named it.
    """
    names = set(known)

    def parsed(dialect: Dialect) -> list[Record]:
        return list(records(Lines(lines, decode), dialect))

    def fits(found: Sequence[Record]) -> int:
        return sum(r.error is None and len(r.cells) == len(found[0].cells) for r in found)

    def rank(separator: str) -> tuple[float, int]:
        found = parsed(Dialect(separator))
        first = [cell.strip() for cell in found[0].cells] if found else []
        if len(first) < 2:
            return 0.0, 0
        telling = sum(names_image(cell) or cell.lower() in names for cell in first)
        return round(fits(found) / len(found), 1), telling

    separator = given or max(SEPARATORS, key=rank)
    dialect = Dialect(separator)
    standard = parsed(dialect)
    escapes = any(b'\\"' in line for line in lines)
    if escapes and fits(parsed(replace(dialect, escapes=True))) > fits(standard):
        return replace(dialect, escapes=True)
    stray = sum(r.error is not None for r in standard)
    never = not any(r.quoted for r in standard) and stray >= _FEW
    plain = parsed(replace(dialect, quotes=False))
    if stray and (separator == "\t" or never) and fits(plain) > fits(standard):
        return replace(dialect, quotes=False)
    return dialect


def names_image(cell: str) -> bool:
    """Whether a cell is the name, address or content of an image."""
    cell = cell.strip()
    if cell.startswith("data:image/") or is_url(cell):
        return True
    return "." in cell and cell.rpartition(".")[2].lower() in EXTENSIONS
