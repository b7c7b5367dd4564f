"""Files of rows (Parquet, tables, annotations): make pairs of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from aligncurate.dataset.pointers import images_in
from aligncurate.dataset.record import EXTRA, Pair, Status
from aligncurate.errors import AlignCurateError, UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.progress import count
from aligncurate.sources import notes
from aligncurate.sources.base import Shard, Source, merge_extras
from aligncurate.sources.captions import captions_in, several_remark, text_of
from aligncurate.sources.coerce import as_level, as_score
from aligncurate.sources.conversations import parse_conversation
from aligncurate.sources.fields import Fields, Naming, find_fields, is_image, is_url, turns_of
from aligncurate.sources.image_root import ImageRoot
from aligncurate.sources.options import Several
from aligncurate.sources.texts import listed, with_texts, without_image

DOWNLOAD = "download it first, for example with img2dataset"
_SPREAD = 512  # rows throughout a file that say what is in it


class RowFile(ABC):
    """One file of rows.

    Attributes:
        uri: the file.
        rows: number of rows.
        fields: the names of its fields.
        root: where images are found by name.
        extras: extra columns, with their types.
        several: whether rows have several captions.
        inline: whether images are inside texts (base64), so that they can't be pointed at.
        has_cells: whether a pointer can lead to one field of one row.
        notices: messages to show the user before the run.
    """

    uri: str
    rows: int
    fields: Fields
    root: ImageRoot
    extras: dict[str, pa.DataType]
    several: bool
    inline: bool
    has_cells = False
    notices: Sequence[str] = ()

    @property
    def only_urls(self) -> bool:
        """Whether the file has captions, and of images only the URLs."""
        return self.fields.image is None and self.fields.url is not None and self.fields.caption is not None

    def starts(self, per_shard: int) -> Sequence[int]:
        """The first row of each shard, where shards have about `per_shard` rows."""
        return range(0, self.rows, per_shard)

    @abstractmethod
    def pairs(self, start: int, stop: int, reader: RowReader) -> Iterator[Pair]:
        """The pairs of rows start..stop-1, made by `reader`."""

    def recognise(self, columns: Iterable[str], rows: Sequence[Mapping[str, Any]], naming: Naming) -> None:
        """Set `fields`, `root`, `several` and `inline`.

        Args:
            columns: the file's columns.
            rows: some rows from throughout the file (see `spread`); they may lack columns of image bytes.
            naming: what the user named.

        Raises UserError if no columns with images and texts are found.
        """
        self.fields = find_fields(self.uri, columns, naming, rows)
        images = [_images(row, self.fields, _inside(row, self.fields))[0] for row in rows]
        written = [_inside(row, self.fields) for row in rows] if self.has_cells else images
        self.inline = any(isinstance(image, bytes) for some in written for image in images_in(some))
        names = [image for some in images for image in some if isinstance(image, str)]
        root = naming.image_root
        self.root = ImageRoot([root], given=True) if root else ImageRoot.near(storage.parent(self.uri), names)
        caption = self.fields.caption
        self.several = caption is not None and any(len(captions_in(row.get(caption))) > 1 for row in rows)

    def count(self, start: int, stop: int, most: int | None = None) -> int:
        """Number of pairs of rows start..stop-1, where rows have several captions; counting may stop at `most`."""
        reader = RowReader(self.uri, self.fields, None)
        return sum(1 for _ in islice(self.pairs(start, stop, reader), most))


def spread(rows: int, most: int = _SPREAD) -> list[int]:
    """At most `most` row numbers, in order: the first ones, and others from all of the file."""
    half = most // 2
    return sorted({*range(min(rows, half)), *(i * (rows - 1) // (half - 1) for i in range(half) if rows)})


class RowSource(Source):
    """Files of one format, each cut into shards of `rows_per_shard` rows. Raises UserError if all are empty."""

    def __init__(self, kind: str, files: Sequence[RowFile], rows_per_shard: int, several: Several = "all") -> None:
        super().__init__()
        self.kind = kind
        self.shards = []
        for file in files:
            for start, stop in pairwise([*file.starts(rows_per_shard), file.rows]):
                self.shards.append(Shard(len(self.shards), file.uri, start, stop))
        if not self.shards:
            raise UserError(f"{', '.join(file.uri for file in files[:3])}: no rows in the input.")
        self._files = {file.uri: file for file in files}
        self._several = several
        nested = kind == "parquet" or any(file.fields.turns or file.fields.asked for file in files)
        self.extras = merge_extras([*(file.extras for file in files), {EXTRA: pa.string()} if nested else {}])
        self.inline = any(file.inline for file in files)
        self.notices = [notice for file in files for notice in file.notices]

    def count(self, shard: Shard, most: int | None = None) -> int:
        assert shard.stop is not None
        file = self._files[shard.uri]
        # Without `most` this is for a progress bar, so what some rows have is taken for what all have.
        if self._several == "all" and (file.several or most is not None):
            return file.count(shard.start, shard.stop, most)
        return shard.stop - shard.start

    def read(self, shard: Shard) -> Iterator[Pair]:
        assert shard.stop is not None
        stop = shard.stop if shard.limit is None else min(shard.stop, shard.start + shard.limit)
        file = self._files[shard.uri]
        reader = RowReader(file.uri, file.fields, file.root, self._several)
        self._counts.append(reader.counts)
        yield from islice(file.pairs(shard.start, stop, reader), shard.limit)

    @property
    def alone(self) -> bool:
        return not any(counts["named"] for counts in self._counts)

    @property
    def remarks(self) -> Sequence[str]:
        several, repeated = (sum(counts[name] for counts in self._counts) for name in ("several", "repeated"))
        remarks = [several_remark(several, self._several)] if several else []
        if repeated:
            remarks.append(f"{count(repeated, 'key')} occurred before; the row number was added to make them differ")
        for file in self._files.values():
            if unasked := +file.root.unasked:
                where = f"taken from {notes.some(list(unasked))}; pass --image-root if they are elsewhere"
                remarks.append(f"{file.uri}: {count(unasked.total(), 'image')} not found as files, {where}")
        return remarks


class RowReader:
    """Turns the rows of one shard into pairs; a repeated key gets its row number appended.

    Args:
        uri: the file with the rows.
        fields: the names of its fields.
        root: where images are found by name; None if they are not looked for.
        several: what becomes of several captions in a row.

    Attributes:
        counts: rows with `several` captions and with `repeated` keys; pairs whose image is only `named`.
    """

    def __init__(self, uri: str, fields: Fields, root: ImageRoot | None, several: Several = "all") -> None:
        self.uri = uri
        self.counts: Counter[str] = Counter()
        self._fields = fields
        self._root = root
        self._several = several
        self._seen: set[str] = set()

    def pairs(self, row: Mapping[str, Any], number: int) -> list[Pair]:
        """The pairs made of `row`, which has this number in the file: one for each of its captions.

        Whatever is wrong with a row becomes its status. Raises OSError if images cannot be looked for.
        """
        try:
            return self._pairs(row, number)
        except (OSError, AlignCurateError):
            raise
        except Exception as error:  # nothing in one row may end the run
            return [self.broken(number, f"row {number} cannot be read ({type(error).__name__}: {error})")]

    def _pairs(self, row: Mapping[str, Any], number: int) -> list[Pair]:
        fields = self._fields
        pair = Pair("", self.uri, row=number)
        pair.score, pair.level = as_score(row.get("score")), as_level(row.get("level"))
        pair.extra = fields.extras(row)
        caption = row.get(fields.caption) if fields.caption else None
        pairs, inside = with_texts(pair, turns_of(row, fields), caption, self._several, row.get("similarity"))
        images, where = _images(row, fields, inside)
        key = self._key(row, images, number)
        self.counts["several"] += len(pairs) > 1 or (pair.conversations is None and len(captions_in(caption)) > 1)
        for one in pairs:
            one.key = self._unique(f"{key}{one.key}", number)
            self._attach(one, row, images, where)
        return pairs

    def broken(self, number: int, error: str) -> Pair:
        """The pair for a row that cannot be parsed."""
        pair = Pair(self._unique(f"{_stem(self.uri)}-{number}", number), self.uri, row=number)
        pair.fail(Status.INVALID_ROW, error)
        return pair

    def unreadable(self, number: int, error: str) -> Pair:
        """The pair for a row whose bytes are damaged."""
        pair = Pair(self._unique(f"{_stem(self.uri)}-{number}", number), self.uri, row=number)
        pair.fail(Status.READ_ERROR, error)
        return pair

    def _attach(self, pair: Pair, row: Mapping[str, Any], images: list[str | bytes], where: str | None) -> None:
        fields = self._fields
        if len(images) > 1:
            pair.fail(Status.MULTI_IMAGE, f"{len(images)} images in one row; only one image per row is supported")
            pair.extra["named_images"] = [image for image in images if isinstance(image, str)] or None
        elif images and isinstance(images[0], bytes):
            pair.load = partial(bytes, images[0])
            pair.image_path = where
        elif fields.url and is_url(row.get(fields.url)) and all(map(is_url, images)):
            pair.fail(Status.URL_ONLY, f"only the image's URL is known ({fields.url}); {DOWNLOAD}")
        elif images and self._root is not None:
            self.counts["named"] += 1
            self._root.attach(pair, str(images[0]))
        elif images:
            return
        elif fields.image and not _is_nothing(row.get(fields.image)):
            pair.fail(Status.MISSING_IMAGE, f"{fields.image} holds nothing that can be read as an image")
        elif fields.image:
            without_image(pair, row, f"the row has no image ({fields.image} is empty)")
        else:
            without_image(pair, row, f"the row names none; it has {listed(fields.all)} (--image-column)")

    def _key(self, row: Mapping[str, Any], images: list[str | bytes], number: int) -> str:
        given = text_of(row.get(self._fields.key)) if self._fields.key else None
        if given:
            return given
        named = len(images) == 1 and isinstance(images[0], str)
        stem = _stem(str(images[0])) if named else _stem(self.uri)
        return f"{stem}-{number}"

    def _unique(self, key: str, number: int) -> str:
        self.counts["repeated"] += key in self._seen
        while key in self._seen:
            key = f"{key}-{number}"
        self._seen.add(key)
        return key


def _images(row: Mapping[str, Any], fields: Fields, inside: Sequence[Any] = ()) -> tuple[list[str | bytes], str | None]:
    """The images of a row, and the field that has them: an image field, or the conversation, if it names more."""
    images, where = images_in(row.get(fields.image)) if fields.image else [], fields.image
    for name in fields.others if not images else ():
        if found := [image for image in images_in(row.get(name)) if is_image(image)]:
            images, where = found, name
            break
    named = images_in(inside)
    return (named, fields.turns) if len(named) > len(images) else (images, where)


def _inside(row: Mapping[str, Any], fields: Fields) -> list[Any]:
    """The images that a row's conversation names."""
    try:
        turns = turns_of(row, fields)
        return parse_conversation(turns)[1] if turns else []
    except Exception:  # whatever is wrong with a row is said where it is read
        return []


def _is_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_nothing, value))
    return value is None or value == "" or value != value


def _stem(path: str) -> str:
    """File name without folder and extension; dots become `_`, because webdataset keys cannot have any."""
    name = PurePosixPath(path).name
    stem, _, ending = name.rpartition(".")
    known = ending.lower() in EXTENSIONS | {"parquet", "csv", "tsv", "json", "jsonl"}
    return (stem if stem and known else name).replace(".", "_")
