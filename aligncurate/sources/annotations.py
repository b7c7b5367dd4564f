"""Annotation files: LLaVA-style JSON and JSONL, other row-wise JSON, and COCO captions."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from aligncurate.dataset.record import Pair, infer_extras
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.sources.image_root import ImageRoot, find_root
from aligncurate.sources.rows import Naming, RowFile, RowReader, find_fields, image_names

_PEEK = 1_000  # rows of a JSONL file that decide the types of its extra columns
_COCO_FOLDERS = ("images", "train2017", "val2017", "../images", "../train2017", "../val2017", "../train2014",
                 "../val2014")  # fmt: skip


class AnnotationRows(RowFile):
    """A JSON or JSONL file: captions, conversations, or COCO's captions. Raises UserError when it is none of these."""

    def __init__(self, uri: str, naming: Naming, rows_per_shard: int) -> None:
        self.uri = uri
        self._file = _open(uri, rows_per_shard)
        self.rows = self._file.rows
        if not self.rows:
            raise UserError(f"{uri}: no rows at all.")
        head = [row for row in self._file.peek() if isinstance(row, dict)]
        self.fields = find_fields(uri, dict.fromkeys(name for row in head for name in row), naming)
        self.extras = infer_extras({k: v for k, v in row.items() if k not in self.fields.used} for row in head)
        base, some = storage.parent(uri), image_names(head[:20], self.fields)
        self.root = ImageRoot(naming.image_root or find_root(base, some, _COCO_FOLDERS))

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        for number, row in enumerate(self._file.read(start, stop), start):
            if isinstance(row, dict):
                yield reader.pair(row, number)
            else:
                yield reader.broken(number, f"row {number} is not a JSON object: {row}")


class _File:
    """Rows that are held in memory."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self.rows = len(items)

    def peek(self) -> list[Any]:
        """The rows that decide the types of the extra columns."""
        return self._items

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Rows start..stop-1: dictionaries, or a sentence for what is none."""
        for item in self._items[start:stop]:
            yield item if isinstance(item, dict) else f"it is a {type(item).__name__}"


class _Lines(_File):
    """Rows of a JSONL file, found by the offset of every shard's first line."""

    def __init__(self, uri: str, per_shard: int) -> None:
        self._uri, self._per_shard = uri, per_shard
        self._offsets = []
        self.rows = 0
        with storage.open_file(uri) as file:
            offset = 0
            for line in file:
                if line.strip():
                    if self.rows % per_shard == 0:
                        self._offsets.append(offset)
                    self.rows += 1
                offset += len(line)

    def peek(self) -> list[Any]:
        return list(self.read(0, min(self.rows, _PEEK)))

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
    """JSON, also with the mark that Windows programs begin files with. Raises ValueError."""
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parse(line: bytes) -> Any:
    try:
        found = _loads(line)
    except ValueError as error:
        return str(error)
    return found if isinstance(found, dict) else f"it is a {type(found).__name__}"


def _open(uri: str, per_shard: int) -> _File:
    if uri.lower().endswith((".jsonl", ".ndjson")):
        file = _Lines(uri, per_shard)
        first = next(file.read(0, 1), None) if file.rows else None
        if isinstance(first, str) and not any(isinstance(row, dict) for row in file.peek()):
            raise UserError(f"{uri}: not a JSONL file ({first}).")
        return file
    try:
        found = _loads(storage.read(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not a JSON file ({error}).") from None
    if isinstance(found, dict) and isinstance(found.get("annotations"), list) and isinstance(found.get("images"), list):
        return _File(_coco(uri, found))
    if isinstance(found, dict):
        lists = [v for v in found.values() if isinstance(v, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise UserError(f"{uri}: neither a list of rows nor COCO captions.")
    if found and not any(isinstance(row, dict) for row in found):
        raise UserError(f"{uri}: a list, but its items are no objects with an image and a caption.")
    return _File(found)


def _coco(uri: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per caption, with its image's fields; the key is `<image name>-<caption id>`."""
    images = {image["id"]: image for image in data["images"] if isinstance(image, dict) and "id" in image}
    notes = [note if isinstance(note, dict) else {} for note in data["annotations"]]
    if notes and not any("caption" in note for note in notes):
        raise UserError(f"{uri}: a COCO file without captions; give its captions_*.json.")
    rows = []
    for note in notes:
        number = note.get("image_id")
        image = images.get(number, {}) if isinstance(number, (int, str)) else {}
        name = image.get("file_name")
        stem = str(name).rpartition(".")[0].rpartition("/")[2] if name else str(number)
        ride = {k: v for k, v in image.items() if k not in ("id", "width", "height", "file_name")}
        key = f"{stem}-{note['id']}" if "id" in note else None
        rows.append({"key": key, "image": name, "caption": note.get("caption"), "image_id": number, **ride})
    return rows
