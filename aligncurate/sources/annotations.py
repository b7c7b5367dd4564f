"""Annotation files: LLaVA-style JSON and JSONL, other JSON with one object per row, and COCO captions."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from aligncurate.dataset.record import Pair
from aligncurate.errors import NoPairsError, UserError
from aligncurate.io import storage
from aligncurate.sources.coerce import infer_extras
from aligncurate.sources.fields import Naming
from aligncurate.sources.rows import RowFile, RowReader, spread

_PEEK = 1_000  # rows of a JSONL file from which the types of its extra columns are inferred


class AnnotationRows(RowFile):
    """A JSON or JSONL file of captions or conversations. Raises UserError if it is not one."""

    def __init__(self, uri: str, naming: Naming, rows_per_shard: int) -> None:
        self.uri = uri
        self._rows = _open(uri, rows_per_shard)
        self.rows = self._rows.count
        if not self.rows:
            raise NoPairsError(f"{uri}: the file has no rows.")
        head = [row for row in self._rows.peek() if isinstance(row, dict)]
        some = [row for row in self._rows.spread() if isinstance(row, dict)]
        self.recognise(dict.fromkeys(name for row in head for name in row), some, naming)
        self.extras = infer_extras({k: v for k, v in row.items() if k not in self.fields.used} for row in head)

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        for number, row in enumerate(self._rows.read(start, stop), start):
            if isinstance(row, dict):
                yield from reader.pairs(row, number)
            else:
                yield reader.broken(number, f"row {number} is not a JSON object ({row})")


class _MemoryRows:
    """The rows of a JSON file, all in memory."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self.count = len(items)

    def peek(self) -> list[Any]:
        """Rows from which the types of the extra columns are inferred."""
        return self._items

    def spread(self) -> list[Any]:
        """Some rows from throughout the file."""
        return [self._items[i] for i in spread(self.count)]

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Rows start..stop-1: dictionaries, or what is wrong with a row that is not one."""
        for item in self._items[start:stop]:
            yield item if isinstance(item, dict) else f"found a {type(item).__name__}"


class _JsonlRows(_MemoryRows):
    """The rows of a JSONL file, read from disk; only the offset of each shard's first line is kept."""

    def __init__(self, uri: str, per_shard: int) -> None:
        self._uri, self._per_shard = uri, per_shard
        self._offsets = []
        self.count = 0
        with storage.open_file(uri) as file:
            offset = 0
            for line in file:
                if line.strip():
                    if self.count % per_shard == 0:
                        self._offsets.append(offset)
                    self.count += 1
                offset += len(line)

    def peek(self) -> list[Any]:
        return list(self.read(0, min(self.count, _PEEK)))

    def spread(self) -> list[Any]:
        # Lines are found by the offsets of the shards' first ones, so some lines from there on are taken.
        starts = {self._per_shard * shard for shard in spread(len(self._offsets), 32)}
        ends = {start: min(start + (256 if start == 0 else 8), self.count) for start in sorted(starts)}
        ends[min(max(*ends.values(), self.count - 64), self.count - 1)] = self.count
        return [row for start, end in ends.items() for row in self.read(start, end)]

    def read(self, start: int, stop: int) -> Iterator[Any]:
        with storage.open_file(self._uri) as file:
            file.seek(self._offsets[start // self._per_shard])
            number = start - start % self._per_shard
            for line in file:
                if not line.strip():
                    continue
                if number >= stop:
                    return
                if number >= start:
                    yield _parse(line)
                number += 1


def _loads(data: bytes) -> Any:
    """Parse JSON, with or without the byte order mark that Windows programs write. Raises ValueError."""
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse(line: bytes) -> Any:
    try:
        row = _loads(line)
    except ValueError as error:
        return str(error)
    return row if isinstance(row, dict) else f"found a {type(row).__name__}"


def _open(uri: str, per_shard: int) -> _MemoryRows:
    if uri.lower().endswith((".jsonl", ".ndjson")):
        lines = _JsonlRows(uri, per_shard)
        first = next(lines.read(0, 1), None) if lines.count else None
        if isinstance(first, str) and not any(isinstance(row, dict) for row in lines.peek()):
            raise UserError(f"{uri}: not a JSONL file ({first}).")
        return lines
    try:
        data = _loads(storage.read(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not a JSON file ({error}).") from None
    if isinstance(data, dict) and isinstance(data.get("annotations"), list) and isinstance(data.get("images"), list):
        return _MemoryRows(_coco(uri, data))
    if isinstance(data, dict):
        lists = [v for v in data.values() if isinstance(v, list)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list):
        raise NoPairsError(f"{uri}: this JSON is neither a list of rows nor COCO captions.")
    if data and not any(isinstance(row, dict) for row in data):
        raise NoPairsError(f"{uri}: the items of this list are not objects; each needs an image and a caption.")
    return _MemoryRows(data)


def _coco(uri: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per caption, with the fields of its image; its key is `<image name>-<caption id>`."""
    images = {image["id"]: image for image in data["images"] if isinstance(image, dict) and "id" in image}
    annotations = [item if isinstance(item, dict) else {} for item in data["annotations"]]
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise NoPairsError(f"{uri}: this COCO file has no captions; use the captions_*.json file.")
    rows = []
    for annotation in annotations:
        number = annotation.get("image_id")
        image = images.get(number, {}) if isinstance(number, (int, str)) else {}
        name = image.get("file_name")
        stem = str(name).rpartition(".")[0].rpartition("/")[2] if name else str(number)
        extras = {k: v for k, v in image.items() if k not in ("id", "width", "height", "file_name")}
        key = f"{stem}-{annotation['id']}" if "id" in annotation else None
        caption = annotation.get("caption")
        rows.append({"key": key, "image": name, "caption": caption, "image_id": number, **extras})
    return rows
