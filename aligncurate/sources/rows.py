"""Files of rows (Parquet, tables, annotations) as sources: which field is the image, the text, the key."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from aligncurate.dataset.pointers import images_in
from aligncurate.dataset.record import COLUMNS, Pair, Status, as_level, as_score
from aligncurate.errors import UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.sources.base import Shard, Source, cut, merge_extras
from aligncurate.sources.captions import CAPTIONS, set_caption
from aligncurate.sources.conversations import parse_conversation, set_conversation
from aligncurate.sources.image_root import ImageRoot

IMAGES = ("image", "image_bytes", "jpg", "png", "images", "image_path", "img", "img_path", "filename",
          "file_name", "filepath", "file", "path")  # fmt: skip
"""Usual names of image columns, the most likely first."""

KEYS = ("key", "id", "uid", "image_id")
TURNS = ("conversations", "messages")


@dataclass(frozen=True)
class Naming:
    """What the user says of the rows; None is found out by looking.

    Attributes:
        caption_column, image_column: column names, where they are not the usual ones.
        image_root: folder or tar that image paths are relative to; by default the file's folder, or one near it.
    """

    caption_column: str | None = None
    image_column: str | None = None
    image_root: str | None = None


@dataclass(frozen=True)
class Fields:
    """Which field of a row holds what; None where there is none."""

    image: str | None
    caption: str | None
    turns: str | None
    key: str | None

    @property
    def used(self) -> frozenset[str]:
        """Fields that do not ride along as extras."""
        named = {self.image, self.caption, self.turns} - {None}
        return frozenset(n for n in named if n) | frozenset(COLUMNS)


def find_fields(uri: str, names: Iterable[str], naming: Naming) -> Fields:
    """Choose the fields among `names`, by the given names or by what they are usually called.

    Raises UserError that lists the columns when an asked-for column, or any text or image, is not there.
    """
    columns = list(names)
    lower = {c.lower(): c for c in reversed(columns)}

    def pick(wanted: str | None, usual: tuple[str, ...], option: str) -> str | None:
        if wanted is None:
            return next((lower[n.lower()] for n in usual if n.lower() in lower), None)
        if wanted not in columns:
            raise UserError(f"{uri}: {option} {wanted}: there is no such column; it has {', '.join(columns)}.")
        return wanted

    turns = pick(None, TURNS, "")
    caption = pick(naming.caption_column, CAPTIONS, "--caption-column")
    image = pick(naming.image_column, IMAGES, "--image-column")
    if image == caption:
        image = None
    if turns is None and (caption is None or image is None):
        missing = "captions (--caption-column)" if caption is None else "images (--image-column)"
        hint = ""
        if image is None and any(n in lower for n in ("url", "image_url", "urls")):
            hint = " Its images are addresses: download them first, for example with img2dataset."
        raise UserError(f"{uri}: no column with {missing} was found; it has {', '.join(columns) or 'none'}.{hint}")
    return Fields(image, caption, turns, pick(None, KEYS, ""))


class RowFile(ABC):
    """One file of rows.

    Attributes:
        uri: the file.
        rows: how many it has.
        fields: where things are in a row.
        root: where images named by path are.
        extras: its other columns, with their types.
    """

    uri: str
    rows: int
    fields: Fields
    root: ImageRoot
    extras: dict[str, pa.DataType]

    @abstractmethod
    def pairs(self, start: int, stop: int, reader: "RowReader") -> Iterator[Pair]:
        """Rows start..stop-1 as the pairs that `reader` makes of them."""


class RowSource(Source):
    """Files of rows of one kind, in order, each cut after `rows_per_shard` rows. Raises UserError if all are empty."""

    def __init__(self, kind: str, files: Sequence[RowFile], rows_per_shard: int) -> None:
        self.kind = kind
        self.shards = []
        for file in files:
            self.shards += cut(file.uri, file.rows, rows_per_shard, len(self.shards))
        if not self.shards:
            raise UserError(f"{', '.join(file.uri for file in files[:3])}: no rows at all.")
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
    """Turns the rows of one shard into pairs; keys that repeat within it get their row number.

    Args:
        uri: the file that the rows are from.
        fields: where things are.
        root: where images named by path are.
    """

    def __init__(self, uri: str, fields: Fields, root: ImageRoot) -> None:
        self._uri = uri
        self._fields = fields
        self._root = root
        self._seen: set[str] = set()

    def pair(self, row: Mapping[str, Any], number: int) -> Pair:
        """The pair in row `number` of the file."""
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
                f"{len(images)} images in one row; rows with several are not supported yet",
            )
        elif not images and pair.conversations is not None:
            pair.fail(Status.TEXT_ONLY, "")
            pair.error = None
        elif not images:
            pair.fail(Status.MISSING_IMAGE, "the row names no image")
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
    """File name without directories and ending, without dots, which webdataset keys cannot have."""
    name = PurePosixPath(path).name
    stem, _, ending = name.rpartition(".")
    known = ending.lower() in EXTENSIONS | {"parquet", "csv", "tsv", "json", "jsonl"}
    return (stem if stem and known else name).replace(".", "_")


def image_names(rows: Iterable[Mapping[str, Any]], fields: Fields) -> list[str]:
    """The image paths that some rows name, to find their folder by."""
    names = []
    for row in rows:
        found = images_in(row.get(fields.image)) if fields.image else []
        if not found and fields.turns and row.get(fields.turns):
            try:
                found = [str(image) for image in parse_conversation(row[fields.turns])[1]]
            except ValueError:
                continue
        names += [name for name in found if isinstance(name, str)]
    return names
