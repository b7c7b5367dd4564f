"""Annotation files: LLaVA-style JSON and JSONL, other JSON with one object per row, and COCO captions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from aligncurate.dataset.record import Pair
from aligncurate.errors import NoPairsError
from aligncurate.progress import count
from aligncurate.sources.captions import CAPTIONS
from aligncurate.sources.coerce import infer_extras
from aligncurate.sources.fields import IMAGES, TURNS, Naming
from aligncurate.sources.json_rows import Broken, JsonRows
from aligncurate.sources.options import Several
from aligncurate.sources.rows import RowFile, RowReader, spread


class AnnotationRows(RowFile):
    """A JSON or JSONL file of captions or conversations. Raises UserError if it is not one.

    COCO has a caption per row; with `several` = `first`, the first of each image is read.
    """

    def __init__(self, uri: str, naming: Naming, rows_per_shard: int, several: Several = "all") -> None:
        self.uri = uri
        rows = JsonRows(uri, rows_per_shard)
        if rows.whole is not None and several == "first" and _is_coco(rows.whole):
            annotations = rows.whole["annotations"]
            firsts: dict[object, Any] = {}
            for item in annotations:
                firsts.setdefault(_image_of(item), item)
            rows.whole["annotations"] = list(firsts.values())
            if left := len(annotations) - len(firsts):
                self.notices = [f"{uri}: {count(left, 'further caption')} of its images left out (--captions first)"]
        self._rows = rows if rows.whole is None else _MemoryRows(_rows_of(uri, rows.whole))
        self.rows = self._rows.count
        if not self.rows:
            raise NoPairsError(f"{uri}: the file has no rows.")
        some = self._rows.spread()
        head = list(chain(self._rows.peek(), some))
        self.recognise(dict.fromkeys(name for row in head for name in row), some, naming)
        self.extras = infer_extras(self.fields.extras(row) for row in head)

    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        for number, row in enumerate(self._rows.read(start, stop), start):
            if isinstance(row, Broken):
                pair = reader.broken(number, f"row {number} is not a JSON object ({row.cause})")
                pair.extra = {"line": row.text} if row.text else {}
                yield pair
            else:
                yield from reader.pairs(row, number)


class _MemoryRows:
    """Rows that had to be put together from all of a file."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self._items = items
        self.count = len(items)

    def peek(self) -> list[dict[str, Any]]:
        return self._items

    def spread(self) -> list[dict[str, Any]]:
        return [self._items[i] for i in spread(self.count)]

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | Broken]:
        yield from self._items[start:stop]


def _rows_of(uri: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that is one object: COCO's, columns as lists, or rows by their keys."""
    if _is_coco(data):
        return _coco(uri, data)
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    if len(lists) == 1 and not next(iter(lists.values())):
        return []
    if len(lists) == len(data) > 1 and len({len(value) for value in lists.values()}) == 1:
        return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    texts = {*CAPTIONS, *TURNS}
    if data and all(isinstance(value, dict) and not texts.isdisjoint(value) for value in data.values()):
        return [{"key": key, **row} for key, row in data.items()]
    if not {*IMAGES, *texts}.isdisjoint(data):
        return [data]
    raise NoPairsError(f"{uri}: this JSON is neither a list of rows nor COCO captions.")


def _is_coco(data: dict[str, Any]) -> bool:
    return isinstance(data.get("annotations"), list) and isinstance(data.get("images"), list)


def _image_of(annotation: Any) -> object:
    """What tells the image of a COCO annotation; one that names none is an image of its own."""
    number = annotation.get("image_id") if isinstance(annotation, dict) else None
    return number if isinstance(number, (int, str)) else id(annotation)


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
