"""Files of rows (Parquet, tables, annotations): find the image, text and key fields; make pairs of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from aligncurate.dataset.pointers import images_in
from aligncurate.dataset.record import COLUMNS, Pair, Status
from aligncurate.errors import UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.sources.base import Shard, Source, cut, merge_extras
from aligncurate.sources.captions import CAPTIONS, set_caption
from aligncurate.sources.coerce import as_level, as_score
from aligncurate.sources.conversations import parse_conversation, set_conversation
from aligncurate.sources.image_root import ImageRoot

IMAGES = ("image", "image_bytes", "jpg", "png", "images", "image_path", "img", "img_path", "filename",
          "file_name", "filepath", "file", "path")  # fmt: skip
"""Usual names of image columns, the most likely first."""

KEYS = ("key", "id", "uid", "image_id")
TURNS = ("conversations", "messages")


@dataclass(frozen=True)
class Naming:
    """How the user says the rows are to be read; None means auto-detect.

    Attributes:
        caption_column, image_column: names of the columns.
        image_root: folder or tar with the images; by default the file's folder or one near it.
    """

    caption_column: str | None = None
    image_column: str | None = None
    image_root: str | None = None


@dataclass(frozen=True)
class Fields:
    """The names of the fields that a row's image, texts and key are in; None if it has no such field."""

    image: str | None
    caption: str | None
    turns: str | None
    key: str | None

    @property
    def used(self) -> frozenset[str]:
        """Fields that are not kept as extra columns."""
        named = {self.image, self.caption, self.turns} - {None}
        return frozenset(n for n in named if n) | frozenset(COLUMNS)


def find_fields(uri: str, names: Iterable[str], naming: Naming) -> Fields:
    """Choose the fields among `names`: the columns that the user named, or those with the usual names.

    Raises UserError, with the columns there are, if a named column is missing or none fits.
    """
    columns = list(names)
    lower = {c.lower(): c for c in reversed(columns)}

    def pick(given: str | None, usual: tuple[str, ...], option: str) -> str | None:
        if given is None:
            return next((lower[n.lower()] for n in usual if n.lower() in lower), None)
        if given not in columns:
            raise UserError(f"{uri}: {option} {given}: no such column; it has {', '.join(columns)}.")
        return given

    turns = pick(None, TURNS, "")
    caption = pick(naming.caption_column, CAPTIONS, "--caption-column")
    image = pick(naming.image_column, IMAGES, "--image-column")
    if image == caption:
        image = None
    if turns is None and (caption is None or image is None):
        missing = "captions (--caption-column)" if caption is None else "images (--image-column)"
        hint = ""
        if image is None and any(n in lower for n in ("url", "image_url", "urls")):
            hint = " Its images are URLs; download them first, for example with img2dataset."
        raise UserError(f"{uri}: no column with {missing} found; it has {', '.join(columns) or 'none'}.{hint}")
    return Fields(image, caption, turns, pick(None, KEYS, ""))


class RowFile(ABC):
    """One file of rows.

    Attributes:
        uri: the file.
        rows: number of rows.
        fields: the names of its fields.
        root: where images are found by name.
        extras: extra columns, with their types.
    """

    uri: str
    rows: int
    fields: Fields
    root: ImageRoot
    extras: dict[str, pa.DataType]

    @abstractmethod
    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        """Rows start..stop-1 as pairs, made by `reader`."""


class RowSource(Source):
    """Files of one format, each cut into shards of `rows_per_shard` rows. Raises UserError if all are empty."""

    def __init__(self, kind: str, files: Sequence[RowFile], rows_per_shard: int) -> None:
        self.kind = kind
        self.shards = []
        for file in files:
            self.shards += cut(file.uri, file.rows, rows_per_shard, len(self.shards))
        if not self.shards:
            raise UserError(f"{', '.join(file.uri for file in files[:3])}: no rows in the input.")
        self._files = {file.uri: file for file in files}
        self.extras = merge_extras([file.extras for file in files])

    def count(self, shard: Shard, most: int | None = None) -> int:
        assert shard.stop is not None
        return shard.stop - shard.start

    def read(self, shard: Shard) -> Iterator[Pair]:
        assert shard.stop is not None
        stop = shard.stop if shard.limit is None else min(shard.stop, shard.start + shard.limit)
        file = self._files[shard.uri]
        yield from file.pairs(shard.start, stop, RowReader(file.uri, file.fields, file.root))


class RowReader:
    """Turns the rows of one shard into pairs; a repeated key gets its row number appended.

    Args:
        uri: the file with the rows.
        fields: the names of its fields.
        root: where images are found by name.
    """

    def __init__(self, uri: str, fields: Fields, root: ImageRoot) -> None:
        self._uri = uri
        self._fields = fields
        self._root = root
        self._seen: set[str] = set()

    def pair(self, row: Mapping[str, Any], number: int) -> Pair:
        """The pair made of `row`, which has this number in the file."""
        fields = self._fields
        pair = Pair("", self._uri, row=number)
        images = images_in(row.get(fields.image)) if fields.image else []
        turns = row.get(fields.turns) if fields.turns else None
        if turns:
            try:
                parsed, inside = parse_conversation(turns)
                set_conversation(pair, parsed)
                images = images or [str(image) for image in inside]
            except ValueError as error:
                pair.fail(Status.INVALID_ROW, f"row {number}: {error}")
        else:
            set_caption(pair, row.get(fields.caption) if fields.caption else None)
        self._attach(pair, images)
        pair.key = self._key(row, images, number)
        pair.extra = {k: v for k, v in row.items() if k not in fields.used}
        pair.score, pair.level = as_score(row.get("score")), as_level(row.get("level"))
        return pair

    def broken(self, number: int, error: str) -> Pair:
        """The pair for a row that cannot be parsed."""
        pair = Pair(self._unique(f"{_stem(self._uri)}-{number}", number), self._uri, row=number)
        pair.fail(Status.INVALID_ROW, error)
        return pair

    def unreadable(self, number: int, error: str) -> Pair:
        """The pair for a row whose bytes are damaged."""
        pair = Pair(self._unique(f"{_stem(self._uri)}-{number}", number), self._uri, row=number)
        pair.fail(Status.READ_ERROR, error)
        return pair

    def _attach(self, pair: Pair, images: list[str | bytes]) -> None:
        if len(images) > 1:
            pair.fail(
                Status.MULTI_IMAGE,
                f"{len(images)} images in one row; only one image per row is supported",
            )
        elif not images and pair.conversations is not None:
            pair.fail(Status.TEXT_ONLY, "")
            pair.error = None
        elif not images:
            pair.fail(Status.MISSING_IMAGE, "the row has no image")
        elif isinstance(images[0], bytes):
            pair.load = partial(bytes, images[0])
            pair.image_path = self._fields.image
        else:
            self._root.attach(pair, images[0])

    def _key(self, row: Mapping[str, Any], images: list[str | bytes], number: int) -> str:
        given = row.get(self._fields.key) if self._fields.key else None
        if given is not None and str(given):
            return self._unique(str(given), number)
        named = len(images) == 1 and isinstance(images[0], str)
        stem = _stem(str(images[0])) if named else _stem(self._uri)
        return self._unique(f"{stem}-{number}", number)

    def _unique(self, key: str, number: int) -> str:
        while key in self._seen:
            key = f"{key}-{number}"
        self._seen.add(key)
        return key


def _stem(path: str) -> str:
    """File name without folder and extension; dots become `_`, because webdataset keys cannot have any."""
    name = PurePosixPath(path).name
    stem, _, ending = name.rpartition(".")
    known = ending.lower() in EXTENSIONS | {"parquet", "csv", "tsv", "json", "jsonl"}
    return (stem if stem and known else name).replace(".", "_")


def image_names(rows: Iterable[Mapping[str, Any]], fields: Fields) -> list[str]:
    """The image paths in some rows, for `find_root`."""
    names = []
    for row in rows:
        images = images_in(row.get(fields.image)) if fields.image else []
        if not images and fields.turns and row.get(fields.turns):
            try:
                images = [str(image) for image in parse_conversation(row[fields.turns])[1]]
            except ValueError:
                continue
        names += [name for name in images if isinstance(name, str)]
    return names
