"""Parquet footers: one column of a file is changed without decoding the others.

Arrow can only decode a file's columns and encode them anew, which for captions, hashes and pointers is nearly all the
work of a verb that changes none of them. Here the stored bytes of the other columns are copied as they are; only the
footer, which says where they lie, is made anew. It is a struct (`FileMetaData` in the Parquet format's
`parquet.thrift`) in Thrift's compact protocol.
"""

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

MAGIC = b"PAR1"
_TAIL = 8  # bytes after the footer: its length and the magic
_CHUNK = 1 << 23  # bytes copied at once

# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12

Struct = dict[int, tuple[int, Any]]
"""Fields of a Thrift struct by their number: (type, value). Lists are (type of the elements, elements)."""

# Numbers of the fields in parquet.thrift that are looked at.
_SCHEMA, _GROUPS, _METADATA = 2, 4, 5  # FileMetaData
_ELEMENT_NAME, _ELEMENT_CHILDREN = 4, 5  # SchemaElement
_CHUNKS, _GROUP_SIZE, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_STORED = 1, 2, 3, 5, 6  # RowGroup
_CHUNK_OFFSET, _CHUNK_META, _INDEXES = 2, 3, (4, 5, 6, 7)  # ColumnChunk
_PATH, _SIZE, _STORED, _BLOOM = 3, 6, 7, 14  # ColumnMetaData
_PAGES, _INDEX_PAGES, _DICTIONARY = 9, 10, 11  # ColumnMetaData: offsets in the file


class Sink(Protocol):
    """What a file is written to."""

    def write(self, data: bytes) -> Any: ...


def read_footer(file: BinaryIO) -> Struct:
    """The `FileMetaData` of a Parquet file. Raises ValueError when there is none."""
    size = file.seek(0, 2)
    file.seek(max(size - _TAIL, 0))
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < _TAIL or tail[4:] != MAGIC or length > size - _TAIL - len(MAGIC):
        raise ValueError("not a Parquet file")
    file.seek(size - _TAIL - length)
    try:
        return _Reader(file.read(length)).struct()
    except (IndexError, RecursionError):
        raise ValueError("the Parquet footer is cut off") from None


def write_footer(footer: Struct) -> bytes:
    """The footer as it ends a file, with its length and the magic."""
    out = bytearray()
    _write_struct(out, footer)
    return bytes(out) + len(out).to_bytes(4, "little") + MAGIC


def replace_column(source: Path, column: str, replacement: bytes, metadata: Mapping[bytes, bytes], sink: Sink) -> None:
    """Write the Parquet file `source` to `sink` with one column changed; all else is copied as it is stored.

    Args:
        source: a file without page indexes and Bloom filters.
        column: name of a column at the schema's top that is stored in one leaf.
        replacement: a Parquet file with this column alone, of the same type and in row groups of the same lengths.
        metadata: entries of the file's key-value metadata to set.
        sink: where the new file goes, from its beginning.

    Raises ValueError when `source` is damaged or the two files do not fit together, OSError when it cannot be read.
    """
    with source.open("rb") as file:
        footer, new = read_footer(file), read_footer(BytesIO(replacement))
        if _element(footer, column) != _element(new, column):
            raise ValueError(f"column {column} has another type")
        groups, new_groups = _items(footer, _GROUPS), _items(new, _GROUPS)
        if [_value(g, _GROUP_ROWS) for g in groups] != [_value(g, _GROUP_ROWS) for g in new_groups]:
            raise ValueError("the row groups have other lengths")
        spans: list[tuple[bool, int, int]] = []  # whether of the replacement, from where, up to where
        end = len(MAGIC)
        for group, new_group in zip(groups, new_groups, strict=True):
            end = _replace_in_group(group, column, _items(new_group, _CHUNKS)[0], spans, end)
        _set_metadata(footer, metadata)

        sink.write(MAGIC)
        for replaced, start, stop in _joined(spans):
            if replaced:
                sink.write(replacement[start:stop])
            else:
                for piece in _pieces(file, start, stop):
                    sink.write(piece)
        sink.write(write_footer(footer))


def _replace_in_group(group: Struct, column: str, new: Struct, spans: list[tuple[bool, int, int]], end: int) -> int:
    """Put a new chunk into a row group, which begins at `end`; add where its bytes are to `spans`. Returns its end."""
    if group.get(_GROUP_OFFSET, (_I64, 0))[1]:
        _set(group, _GROUP_OFFSET, end)
    chunks = _items(group, _CHUNKS)
    found = False
    for place, chunk in enumerate(chunks):
        replaced = _value(_value(chunk, _CHUNK_META), _PATH)[1] == [column.encode()]
        if replaced:
            for total, part in ((_GROUP_SIZE, _SIZE), (_GROUP_STORED, _STORED)):
                more = _value(_value(new, _CHUNK_META), part) - _value(_value(chunk, _CHUNK_META), part)
                _set(group, total, _value(group, total) + more)
            chunks[place] = chunk = new
            found = True
        meta = _value(chunk, _CHUNK_META)
        if any(n in chunk for n in _INDEXES) or _BLOOM in meta:
            raise ValueError("the file has page indexes or Bloom filters")
        # A chunk without rows has no pages, which offset 0 says.
        offsets = {n: meta[n][1] for n in (_PAGES, _INDEX_PAGES, _DICTIONARY) if n in meta and meta[n][1]}
        start = min(offsets.values(), default=0)
        spans.append((replaced, start, start + _value(meta, _STORED)))
        for n, offset in offsets.items():
            _set(meta, n, offset + end - start)
        if chunk.get(_CHUNK_OFFSET, (_I64, 0))[1]:
            _set(chunk, _CHUNK_OFFSET, _value(chunk, _CHUNK_OFFSET) + end - start)
        end += _value(meta, _STORED)
    if not found:
        raise ValueError(f"no column {column}")
    return end


def _joined(spans: list[tuple[bool, int, int]]) -> Iterator[tuple[bool, int, int]]:
    """Spans that follow each other in the same file as one."""
    whole = None
    for span in spans:
        if whole is not None and whole[0] == span[0] and whole[2] == span[1]:
            whole = (whole[0], whole[1], span[2])
            continue
        if whole is not None:
            yield whole
        whole = span
    if whole is not None:
        yield whole


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop:
        piece = file.read(min(_CHUNK, stop - start))
        if not piece:
            raise ValueError("the file ends before its last column does")
        start += len(piece)
        yield piece


def _value(fields: Struct, number: int) -> Any:
    try:
        return fields[number][1]
    except KeyError:
        raise ValueError(f"the Parquet footer lacks field {number}") from None


def _set(fields: Struct, number: int, value: Any) -> None:
    if number in fields:
        fields[number] = (fields[number][0], value)


def _items(fields: Struct, number: int) -> list[Any]:
    """Elements of a list, which may be changed in place."""
    items: list[Any] = _value(fields, number)[1]
    return items


def _element(footer: Struct, column: str) -> Struct | None:
    """What the schema says of a column."""
    inside = 0  # elements to come that are inside of another one: they follow it
    for element in _items(footer, _SCHEMA)[1:]:
        children = element.get(_ELEMENT_CHILDREN, (_I32, 0))[1]
        if inside:
            inside += children - 1
        elif _value(element, _ELEMENT_NAME) == column.encode():
            found: Struct = element
            return found
        else:
            inside = children
    return None


def _set_metadata(footer: Struct, metadata: Mapping[bytes, bytes]) -> None:
    """Set entries of the key-value metadata; others stay."""
    entries = {e[1][1]: e for e in _items(footer, _METADATA)} if _METADATA in footer else {}
    entries |= {key: {1: (_BINARY, key), 2: (_BINARY, value)} for key, value in metadata.items()}
    footer[_METADATA] = (_LIST, (_STRUCT, list(entries.values())))


class _Reader:
    """Reads the compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = (head & 15, self._field(head & 15))
        return fields

    def _field(self, kind: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            item = self._byte if head & 15 in (_TRUE, _FALSE) else lambda: self._field(head & 15)
            return head & 15, [item() for _ in range(count)]
        if kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise ValueError(f"the Parquet footer has a field of type {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise IndexError
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()  # zigzag: the sign is the last bit
        return (value >> 1) ^ -(value & 1)


def _write_struct(out: bytearray, fields: Struct) -> None:
    before = 0
    for number, (kind, value) in sorted(fields.items()):
        if number - before < 16:
            out.append((number - before) << 4 | kind)
        else:
            out.append(kind)
            _write_integer(out, number)
        before = number
        if kind not in (_TRUE, _FALSE):
            _write_field(out, kind, value)
    out.append(0)


def _write_field(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_I16, _I32, _I64):
        _write_integer(out, value)
    elif kind == _BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == _STRUCT:
        _write_struct(out, value)
    elif kind in (_LIST, _SET):
        inner, items = value
        out.append(min(len(items), 15) << 4 | inner)
        if len(items) >= 15:
            _write_varint(out, len(items))
        for item in items:
            if inner in (_TRUE, _FALSE):
                out.append(item)
            else:
                _write_field(out, inner, item)
    elif kind == _BYTE:
        out.append(value)
    else:
        out += value  # a double's eight bytes


def _write_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _write_integer(out: bytearray, value: int) -> None:
    _write_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)
