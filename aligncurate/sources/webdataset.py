"""Tars of webdataset and img2dataset: a tar is a shard, each of its samples a pair."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.dataset.record import COLUMNS, OWN_EMBEDDINGS, Pair, Status
from aligncurate.errors import ShardError, UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage
from aligncurate.io.tar import tar_members
from aligncurate.sources.base import Shard, Source, merge_extras
from aligncurate.sources.captions import CAPTIONS, set_caption
from aligncurate.sources.coerce import as_level, as_score, infer_extras
from aligncurate.sources.conversations import parse_conversation, set_conversation

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's own rule: key, then all extensions
_METADATA = re.compile(r"^__[^/]*__$")  # webdataset's rule for members that belong to no sample
_TEXTS = ("txt", "caption", "text")
_PEEK = 200  # samples that decide the types of the extra columns
_OWN = frozenset(COLUMNS) | {"messages", *OWN_EMBEDDINGS}


@dataclass
class _Sample:
    """The members with one key."""

    key: str
    image: tarfile.TarInfo | None = None
    images: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)
    data: bytes | None = None
    broken: str | None = None


class WebDatasetSource(Source):
    """The samples of tars, in the order of the tars and of their members.

    Args:
        uris: the tars; compressed ones raise UserError.
        caption_field: take the caption from the member with this extension, or from this field of the `.json` member.
    """

    kind = "webdataset"

    def __init__(self, uris: list[str], caption_field: str | None = None) -> None:
        for uri in uris:
            if uri.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
                raise UserError(f"{uri}: compressed tars are not supported; decompress it first (gunzip).")
        self._caption = caption_field
        self.shards = [Shard(i, uri) for i, uri in enumerate(uris)]
        self.extras = self._peek()

    def _peek(self) -> dict[str, pa.DataType]:
        """Types of the extra columns, from the first samples, the same for all shards."""
        if not self.shards:
            return {}
        first = self.shards[0].uri
        rows = []
        try:
            for number, sample in enumerate(self._samples(first, contents="json")):
                with suppress(ValueError):  # reported in the status of its row
                    rows.append(_json(sample))
                if number + 1 == _PEEK:
                    break
        except (OSError, ShardError):
            pass  # reported when the shard is read; its extra columns go to the `extra` column
        columns = infer_extras({k: v for k, v in row.items() if k not in _OWN} for row in rows)
        beside = _sidecar(first)
        if beside is not None:
            fields = {f.name: f.type for f in beside.schema if f.name not in _OWN}
            known = infer_extras([{n: _example(t) for n, t in fields.items()}])
            columns = merge_extras([columns, known])
        return columns

    def count(self, shard: Shard, most: int | None = None) -> int:
        return sum(1 for _ in islice(self._samples(shard.uri, contents="none"), most))

    def read(self, shard: Shard) -> Iterator[Pair]:
        beside = _sidecar(shard.uri)
        rows = {} if beside is None else _by_key(beside)
        seen: set[str] = set()
        for number, sample in enumerate(self._samples(shard.uri, contents="all")):
            if shard.limit is not None and number == shard.limit:
                return
            yield self._pair(shard.uri, sample, rows, seen)

    def _pair(self, uri: str, sample: _Sample, rows: dict[str, dict[str, Any]], seen: set[str]) -> Pair:
        pair = Pair(sample.key, uri)
        if sample.broken:
            pair.fail(Status.READ_ERROR, sample.broken)
        if sample.key in seen:
            pair.fail(
                Status.DUPLICATE_KEY,
                f"duplicate key {sample.key} in this tar; the files of a sample must be next to each other",
            )
        seen.add(sample.key)
        if sample.image is not None:
            member = sample.image
            pair.image_path, pair.image_offset, pair.image_length = (
                member.name, member.offset_data, member.size,
            )  # fmt: skip
            if sample.data is not None:
                pair.load = partial(bytes, sample.data)
            else:
                pair.load = partial(storage.read_range, uri, member.offset_data, member.size)
        if sample.images > 1:
            pair.fail(Status.MULTI_IMAGE, f"{sample.images} images in one sample; split it into pairs")
            pair.load = None
        self._fill(pair, sample, rows)
        if sample.image is None and pair.conversations is not None:
            pair.fail(Status.TEXT_ONLY, "")
            pair.error = pair.error or None
        elif sample.image is None:
            pair.fail(Status.MISSING_IMAGE, "the sample has no image")
        return pair

    def _fill(self, pair: Pair, sample: _Sample, rows: dict[str, dict[str, Any]]) -> None:
        """Set the texts, scores and extra columns of `pair`."""
        try:
            meta = _json(sample)
        except ValueError as error:
            meta = {}
            pair.fail(Status.INVALID_ROW, f"the .json member cannot be used: {error}")
        meta = rows.get(sample.key, {}) | meta
        key = meta.get("key")
        if isinstance(key, str) and key:
            pair.key = key
        turns = meta.get("conversations", meta.get("messages"))
        if turns:
            try:
                set_conversation(pair, parse_conversation(turns)[0])
            except ValueError as error:
                pair.fail(Status.INVALID_ROW, str(error))
        elif pair.status is not Status.READ_ERROR:
            set_caption(pair, self._find_caption(sample, meta))
        pair.score, pair.level = as_score(meta.get("score")), as_level(meta.get("level"))
        pair.extra = {k: v for k, v in meta.items() if k not in _OWN}

    def _find_caption(self, sample: _Sample, meta: dict[str, Any]) -> Any:
        if self._caption is not None:
            return sample.texts.get(self._caption, meta.get(self._caption))
        for name in _TEXTS:
            if name in sample.texts:
                return sample.texts[name]
        return next((meta[name] for name in CAPTIONS if name in meta), None)

    def _samples(self, uri: str, contents: str) -> Iterator[_Sample]:
        """Group members by key; `contents` says which text members are read: `all`, `json` or `none`."""
        inline = contents == "all" and storage.is_remote(uri)  # later, each image would take a request
        sample: _Sample | None = None
        with storage.open_file(uri) as file:
            end = storage.size(uri)
            for member in tar_members(file, uri):
                if isinstance(member, str):
                    if sample is not None:
                        yield sample
                    yield _Sample(storage.basename(uri), broken=member)
                    return
                match = _NAME.match(member.name)
                if match is None or match[1].endswith("/") or member.isdir() or _METADATA.match(member.name):
                    continue
                key, extension = match[1], match[2].lower()
                if sample is None or sample.key != key or _repeats(sample, extension):
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                if not member.isfile():
                    sample.broken = f"{member.name} is a link or a device, not a file"
                    continue
                cut = member.offset_data + member.size > end
                if cut:
                    sample.broken = f"the tar ends in the middle of {member.name}; copy it again"
                if extension.rpartition(".")[2] in EXTENSIONS:
                    sample.images += 1
                    sample.image = sample.image or member
                    if inline and sample.images == 1 and not cut:
                        sample.data = _content(file, member)
                elif not cut and (contents == "all" or (contents == "json" and extension == "json")):
                    sample.texts[extension] = _content(file, member)
                else:
                    sample.texts[extension] = b""
        if sample is not None:
            yield sample


def _repeats(sample: _Sample, extension: str) -> bool:
    """Whether a member with this extension begins another sample with the same key."""
    if extension in EXTENSIONS:
        return sample.image is not None and sample.image.name.lower().endswith(f".{extension}")
    return extension in sample.texts


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _json(sample: _Sample) -> dict[str, Any]:
    text = sample.texts.get("json")
    if not text:
        return {}
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def _sidecar(uri: str) -> pa.Table | None:
    """The Parquet file that img2dataset writes beside a tar; None if there is none or it cannot be read."""
    beside = uri.removesuffix(".tar") + ".parquet"
    try:
        if not storage.exists(beside):
            return None
        with storage.open_file(beside) as file:
            table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException):
        return None
    return table if "key" in table.column_names else None


def _by_key(table: pa.Table) -> dict[str, dict[str, Any]]:
    keep = [n for n in table.column_names if n == "key" or n not in _OWN or n in ("score", "level")]
    rows = table.select(keep).to_pylist()
    return {str(row["key"]): {k: v for k, v in row.items() if v is not None} for row in rows}


def _example(kind: pa.DataType) -> Any:
    """A value of the Python type that JSON has for an Arrow type."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ""
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    if pa.types.is_floating(kind):
        return 0.0
    return [_example(kind.value_type)] if pa.types.is_list(kind) else None
