"""The rows of a JSON file in any usual form: lines, an array, an array inside an object, or one object after another.

Files are read from disk through a window; only where each shard begins, and how, is kept. Behind a row that is not JSON
the next rows are found again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from io import SEEK_END
from itertools import islice
from typing import Any, BinaryIO, Literal, NamedTuple

from aligncurate.errors import NoPairsError, UserError
from aligncurate.sources.encoding import TextFile
from aligncurate.sources.fields import IMAGES, TURNS
from aligncurate.sources.rows import spread

_WINDOW = 1 << 20  # bytes read at a time
_LARGEST = 1 << 28  # bytes of one row
_SAMPLE = 20  # lines that say whether a file has a row per line
_HELD = 1 << 26  # bytes of such rows that are held at once
_PEEK = 1_000  # rows from which the types of extra columns are inferred
_KEPT = 1 << 20  # characters of a row that is not JSON
_DEEPEST = 100  # levels of objects and lists in one row

_SPACE = re.compile(r"[\s\x1e,]*")  # between rows; \x1e as in JSON text sequences
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_FIRST_NAME = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
# Boundaries are found in bytes taken for Latin-1, so that places in the text are those in the file.
_BOUNDS = json.JSONDecoder(strict=False, parse_int=len, parse_float=len)
_VALUES = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Broken:
    """What stands where a row should be.

    Attributes:
        cause: what is wrong with it.
        text: as it is written, if it is not too long.
    """

    cause: str
    text: str = ""


class JsonRows:
    """The rows of a JSON file.

    Args:
        uri: the file.
        per_shard: rows per shard.

    Attributes:
        count: number of rows.
        whole: a file that is one object without a list of rows, such as COCO's; there are no rows then.

    Raises UserError if the file is not JSON at all.
    """

    def __init__(self, uri: str, per_shard: int) -> None:
        self._uri, self._per_shard = uri, per_shard
        self._file = TextFile(uri, None)
        self._form: _Form = "lines"
        self._starts: list[_Start] = []
        self.count = 0
        self.whole: dict[str, Any] | None = None
        if self._has_lines():
            self._index_lines()
        else:
            self._index_values()

    def peek(self) -> list[dict[str, Any]]:
        """Rows from which the types of the extra columns are inferred."""
        return [row for row in self.read(0, min(self.count, self._few(_PEEK))) if isinstance(row, dict)]

    def spread(self) -> list[dict[str, Any]]:
        """Some rows from throughout the file, where shards begin."""
        starts = {self._per_shard * shard for shard in spread(len(self._starts), 32)}
        ends = {start: min(start + self._few(8 if start else 256), self.count) for start in sorted(starts)}
        ends[min(max(*ends.values(), self.count - self._few(64)), self.count - 1)] = self.count
        return [row for start, end in ends.items() for row in self.read(start, end) if isinstance(row, dict)]

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | Broken]:
        """Rows start..stop-1."""
        while start < stop:
            shard = start // self._per_shard
            end = min(stop, (shard + 1) * self._per_shard)
            skipped = start - shard * self._per_shard
            begin = self._starts[shard]
            with closing(self._file.open(begin.offset)) as file:
                rows = map(_parse, _lines(file)) if self._form == "lines" else _Scanner(file, self._form, begin).rows()
                yield from islice(rows, skipped, skipped + end - start)
            start = end

    def _few(self, rows: int) -> int:
        """`rows`, or fewer if rows are so long that they would take much memory."""
        with closing(self._file.open()) as file:
            length = file.seek(0, SEEK_END) // max(self.count, 1)
        return max(1, min(rows, _HELD // max(length, 1)))

    def _has_lines(self) -> bool:
        """Whether most of the first lines are objects of their own."""
        named = self._uri.lower().endswith((".jsonl", ".ndjson"))
        with closing(self._file.open()) as file:
            head = file.read(_WINDOW)
        lines = [line for line in head.split(b"\n") if line.strip()]
        if len(head) == _WINDOW:
            lines = lines[:-1]  # the last one is cut
        parsed = [_parse(line) for line in lines[:_SAMPLE]]
        objects = sum(isinstance(row, dict) for row in parsed)
        if not parsed or (len(lines) == 1 and (objects or not named)):
            return named and not head.strip()
        if lines[0].lstrip().startswith(b"["):  # else an array with its items in lines
            return objects > 0 and isinstance(parsed[0], Broken) and parsed[0].cause == "found a list"
        return 2 * objects > len(parsed) or (named and objects > 0 and lines[0].strip() != b"{")

    def _index_lines(self) -> None:
        with closing(self._file.open()) as file:
            offset = self._file.start
            while line := file.readline(_LARGEST):
                if line.strip():
                    if self.count % self._per_shard == 0:
                        self._starts.append(_Start(offset))
                    self.count += 1
                offset += len(line)

    def _index_values(self) -> None:
        with closing(self._file.open()) as file:
            begin = _Start(self._file.start)
            first = _Scanner(file, "values", begin).peek()
            file.seek(begin.offset)
            if first == "[":
                self._form = "array"
                array: _Array | None = _Scanner(file, "array", begin).array(self._per_shard)
            elif first == "{":
                self._form = "member"
                array = self._inside(_Scanner(file, "member", begin), file)
            else:
                raise _refusal(self._uri, file.read(_WINDOW))
            if array is None:
                file.seek(begin.offset)
                self.whole = _whole(self._uri, file.read())
                return
        self._starts, self.count = array.starts, array.count
        if array.count and not array.objects:
            if array.error:
                raise UserError(f"{self._uri}: not a JSON file ({array.error}).")
            raise NoPairsError(
                f"{self._uri}: the items of this list are not objects; each needs an image and a caption."
            )

    def _inside(self, scanner: _Scanner, file: BinaryIO) -> _Array | None:
        """The only list of objects in the object that the file is; None if there is no such list."""
        arrays = scanner.members(self._per_shard)
        if arrays is None or scanner.peek():
            self._form = "values"
            file.seek(self._file.start)
            return _Scanner(file, "values", _Start(self._file.start)).array(self._per_shard)
        lists = {name: array for name, array in arrays.items() if array is not None}
        row = any(name in TURNS or (name in IMAGES and not array) for name, array in arrays.items())
        only = next(iter(lists.values())) if len(lists) == 1 and not row else None
        return only if only is not None and only.objects else None


_Form = Literal["lines", "array", "member", "values"]


class _Start(NamedTuple):
    """How a shard begins: all that what was read before it says about its rows.

    Attributes:
        offset: in the file.
        name: of the first member of the first object, as it is written; None before that object.
        listed: whether a list is open.
    """

    offset: int
    name: str | None = None
    listed: bool = False


@dataclass
class _Array:
    """Where the items of a list are.

    Attributes:
        starts: of the shards.
        count: number of items.
        objects: how many of them are objects.
        error: what is wrong with the first that is not JSON.
    """

    starts: list[_Start]
    count: int = 0
    objects: int = 0
    error: str | None = None


class _Scanner:
    """Goes through JSON values in a window over a file, taken for Latin-1: a character for each byte.

    Args:
        file: at the next value, or a separator before it.
        form: what the values are in.
        start: what is known of that place.
    """

    def __init__(self, file: BinaryIO, form: _Form, start: _Start) -> None:
        self._file, self._form = file, form
        self._base, self._first_name, self._listed = start
        self._text, self._at, self._ended = "", 0, False
        self._begin = 0  # of the last value in the text

    def rows(self) -> Iterator[dict[str, Any] | Broken]:
        """The rows from here to the end of their list."""
        for _, value in self._items():
            if isinstance(value, Broken):
                yield Broken(value.cause, value.text.encode("latin-1").decode("utf-8", "surrogateescape"))
            else:
                yield _parse(self._text[self._begin : self._at].encode("latin-1"))

    def array(self, per_shard: int) -> _Array:
        """Where the items of the list that begins here are, or the values from here on if they are in no list."""
        array = _Array([])
        self._first_name, self._listed = None, self._form != "values"
        if self._listed:
            self.peek()
            self._at += 1
        for offset, value in self._items():
            if array.count % per_shard == 0:
                array.starts.append(_Start(offset, self._first_name, self._listed))
            array.count += 1
            array.objects += isinstance(value, dict)
            if isinstance(value, Broken):
                array.error = array.error or value.cause
        return array

    def members(self, per_shard: int) -> dict[str, _Array | None] | None:
        """The members of the object that begins here, and where they are lists; None if it is not JSON."""
        arrays: dict[str, _Array | None] = {}
        self.peek()
        self._at += 1
        while self.peek() != "}":
            name = self._value()
            if not isinstance(name, str) or self.peek() != ":":
                return None
            self._at += 1
            if self.peek() == "[":
                arrays[name] = array = self.array(per_shard)
                if not self.peek():  # cut off
                    return arrays if array.objects else None
            elif isinstance(self._value(), Broken):
                return None
            else:
                arrays[name] = None
        self._at += 1
        return arrays

    def peek(self) -> str:
        """The next character that is neither blank nor a comma; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def _items(self) -> Iterator[tuple[int, Any]]:
        """(place, value) of the values from here to the end of their list."""
        value: Any = None
        while self.peek():
            if self._listed and self.peek() == "]":
                self._at += 1
                if self._form == "member" or not self.peek():
                    return
                if self.peek() == "[":  # files that were put together
                    self._at += 1
                    continue
                self._listed = False  # what follows is no row, and told as such
            place = self._base + self._at
            value = self._value()
            yield place, value
        if self._listed and not isinstance(value, Broken):
            yield self._base + self._at, Broken("the file is cut off here")

    def _value(self) -> Any:
        """The next value, or what is wrong with it."""
        while True:
            try:
                value, end = _BOUNDS.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near = len(self._text) - error.pos < 16 or error.msg.startswith("Unterminated")
                if near and len(self._text) - self._at < _LARGEST and self._fill():
                    continue
                return self._skip(error.msg[0].lower() + error.msg[1:])
            except RecursionError:
                return self._skip("nested too deeply")
            if end == len(self._text) and self._fill():  # a number may go on
                continue
            self._begin, self._at = self._at, end
            if self._first_name is None and (found := _FIRST_NAME.match(self._text, self._begin)):
                self._first_name = found[1]
            if isinstance(value, (dict, list)) and _is_too_deep(self._text, self._begin, end):
                return Broken("nested too deeply", self._text[self._begin : end])
            return value

    def _skip(self, cause: str) -> Broken:
        """Go on behind a value that is not JSON: at the next object that begins as the first one did."""
        name = '"' if self._first_name is None else re.escape(self._first_name) + r"\s*:"
        pattern = re.compile(rf"[,\n\x1e]\s*(?=\{{\s*{name})")
        place, kept = self._at + 1, ""
        while (found := pattern.search(self._text, place)) is None:
            # The last characters stay: they may be the beginning of a match.
            cut = max(self._at, len(self._text) - 4_096)
            kept, self._at = (kept + self._text[self._at : cut])[:_KEPT], cut
            if not self._fill():
                kept, self._at = (kept + self._text[self._at :])[:_KEPT], len(self._text)
                return Broken(cause, kept)
            place = self._at
        kept, self._at = (kept + self._text[self._at : found.start()])[:_KEPT], found.end()
        return Broken(cause, kept)

    def _fill(self) -> bool:
        """Read more, and drop what lies behind. False at the end of the file."""
        if self._ended:
            return False
        data = self._file.read(max(_WINDOW, len(self._text) - self._at))
        self._ended = not data
        self._base += self._at
        self._text, self._at = self._text[self._at :] + data.decode("latin-1"), 0
        return bool(data)


def _is_too_deep(text: str, start: int, end: int) -> bool:
    """Whether a value is nested more deeply than what reads the dataset can be expected to follow."""
    if text.count("[", start, end) + text.count("{", start, end) <= _DEEPEST:
        return False
    depth = most = 0
    for token in _TOKENS.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        most = max(most, depth)
    return most > _DEEPEST


def _name(value: Any) -> str:
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_LARGEST):
        if line.strip():
            yield line


def _parse(line: bytes) -> dict[str, Any] | Broken:
    text = line.decode("utf-8", "surrogateescape").strip().lstrip("\x1e").removesuffix(",")
    try:
        row = _VALUES.decode(text)
    except RecursionError:
        cause = "nested too deeply"
    except json.JSONDecodeError as error:
        cause = f"{error.msg[0].lower()}{error.msg[1:]} at character {error.pos}"
    except ValueError:
        cause = "a number has too many digits"
    else:
        cause = "nested too deeply" if _is_too_deep(text, 0, len(text)) else f"found a {_name(row)}"
        if isinstance(row, dict) and cause != "nested too deeply":
            return row
    return Broken(cause, text[:_KEPT])


def _refusal(uri: str, data: bytes) -> UserError:
    """Why a file that does not begin with a list or an object cannot be read."""
    try:
        _VALUES.decode(data.decode())
    except ValueError as error:
        return UserError(f"{uri}: not a JSON file ({error}).")
    return NoPairsError(f"{uri}: this JSON is neither a list of rows nor COCO captions.")


def _whole(uri: str, data: bytes) -> dict[str, Any]:
    try:
        value = _VALUES.decode(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: not a JSON file ({error}).") from None
    assert isinstance(value, dict)
    return value
