"""The pair record and its Parquet schema: the only place that names columns."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


class Status(StrEnum):
    """Whether a pair can be scored, or why not. Every input row has one; rows that failed stay in the dataset."""

    OK = "ok"
    TEXT_ONLY = "text_only"  # a conversation without an image: nothing to score, but good training data
    MISSING_IMAGE = "missing_image"
    URL_ONLY = "url_only"  # metadata of an image that was not downloaded: cannot be scored, but can be filtered
    MISSING_CAPTION = "missing_caption"
    INVALID_CAPTION = "invalid_caption"  # the caption's bytes are not UTF-8
    INVALID_ROW = "invalid_row"  # the row, its JSON or its conversation cannot be parsed
    MULTI_IMAGE = "multi_image"  # more than one image in the row: not supported yet
    UNSAFE_PATH = "unsafe_path"  # an image path that leaves the image root
    DUPLICATE_KEY = "duplicate_key"  # the same sample key twice in one tar
    DECODE_ERROR = "decode_error"
    TOO_LARGE = "too_large"
    READ_ERROR = "read_error"


FINE = frozenset({Status.OK, Status.TEXT_ONLY})
"""Statuses of rows that can be exported and trained on."""

PAIRS = frozenset({Status.OK, Status.URL_ONLY})
"""Statuses of pairs, whose scores can be used: those of metadata came with it."""

NOT_FAILED = FINE | {Status.URL_ONLY}
"""Statuses of rows in which nothing is wrong; all others count as failed."""

IMAGE_STATUSES = frozenset({Status.OK, Status.MISSING_IMAGE, Status.DECODE_ERROR, Status.TOO_LARGE, Status.READ_ERROR})
"""Statuses that come from reading the image; reading it again may change them."""

TURNS = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("text", pa.string())]))

COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "source": pa.string(),
    "image_path": pa.string(),
    "image_offset": pa.int64(),
    "image_length": pa.int64(),
    "row": pa.int64(),
    "image": pa.binary(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sha256": pa.binary(32),
    "caption": pa.string(),
    "conversations": TURNS,
    "score": pa.float32(),
    "level": pa.int8(),
    "status": pa.string(),
    "error": pa.string(),
}
"""The columns of every dataset, in order. `image` exists only with --embed-images."""

EXTRA = "extra"
"""Column for input fields that have no column of their own, as a JSON object, so that no input is lost."""

IMAGE_EMBEDDING, TEXT_EMBEDDING = OWN_EMBEDDINGS = "image_embedding", "text_embedding"
"""Columns of --embeddings; without it, input columns with these names are kept like any other."""

_DESCRIPTIONS = {
    "key": "name of the pair, unique within its shard",
    "source": "URI of the shard or file that the pair came from",
    "image_path": "the image's file; for tars the member's name; for Parquet with image bytes the column",
    "image_offset": "where the image's bytes begin inside `source` (tars)",
    "image_length": "how many bytes the image has inside `source` (tars)",
    "row": "row number inside `source` (Parquet, tables, annotations)",
    "image": "the image's original bytes (with --embed-images)",
    "width": "pixels, after EXIF rotation",
    "height": "pixels, after EXIF rotation",
    "sha256": "of the image's original bytes",
    "caption": "the text of a pair; null for conversations",
    "conversations": "turns of role `user` or `assistant` and their text (instruction data)",
    "score": "cosine of the unit embeddings of image and text, -1..1",
    "level": "alignment level, 1..N, N best; null where there is no score",
    "status": "ok, or why the pair could not be scored",
    "error": "one sentence on what was wrong",
}


def describe_columns() -> list[tuple[str, str, str]]:
    """(name, type, meaning) of each column of COLUMNS, in order."""
    return [(name, _type_name(kind), _DESCRIPTIONS[name]) for name, kind in COLUMNS.items()]


def _type_name(kind: pa.DataType) -> str:
    return "list<struct<role, text>>" if kind == TURNS else str(kind)


def is_stored_as(found: pa.DataType, kind: pa.DataType) -> bool:
    """Whether a part's column of type `found` can be read as one of type `kind`: views, other widths, dictionaries."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_list(kind):
        return _is_turns(found)
    families = (_is_text, _is_bytes, pa.types.is_integer, pa.types.is_floating)
    return any(bool(is_a(kind) and is_a(found)) for is_a in families)


def _is_turns(kind: pa.DataType) -> bool:
    """Whether a type is a list of objects with a role and a text."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    item = kind.value_type if is_list else kind
    if not (is_list and pa.types.is_struct(item)):
        return False
    return all(item.get_field_index(name) >= 0 and _is_text(item.field(name).type) for name in ("role", "text"))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


@dataclass(slots=True)
class Pair:
    """One image-text pair on its way through a verb.

    `load` returns the image's original bytes (raises OSError if they cannot be read); None if the row has no image.
    `stored` is the dataset row that the pair was read from; None for other sources. The other fields are the columns of
    the same names.
    """

    key: str
    source: str
    caption: str | None = None
    conversations: list[dict[str, str]] | None = None
    load: Callable[[], bytes] | None = None
    image_path: str | None = None
    image_offset: int | None = None
    image_length: int | None = None
    row: int | None = None
    image: bytes | None = None
    width: int | None = None
    height: int | None = None
    sha256: bytes | None = None
    score: float | None = None
    level: int | None = None
    status: Status = Status.OK
    error: str | None = None
    image_embedding: Any = None  # float16 [D]
    text_embedding: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] | None = None

    def fail(self, status: Status, error: str) -> None:
        """Mark the pair as failed; a later failure does not replace the first, which is the cause."""
        if self.status is Status.OK:
            self.status, self.error = status, error


def schema(extras: Mapping[str, pa.DataType], *, embed_images: bool = False, embedding: int = 0) -> pa.Schema:
    """Schema of the parts of one dataset.

    Args:
        extras: types of the extra input columns, by name.
        embed_images: keep the `image` column.
        embedding: size of the embeddings, 0 for no embedding columns.
    """
    fields = [pa.field(n, t) for n, t in COLUMNS.items() if n != "image" or embed_images]
    fields += [pa.field(n, t) for n, t in extras.items() if not (embedding and n in OWN_EMBEDDINGS)]
    if embedding:
        kind = pa.list_(pa.float16(), embedding)
        fields += [pa.field(IMAGE_EMBEDDING, kind), pa.field(TEXT_EMBEDDING, kind)]
    return pa.schema(fields)


def to_table(pairs: Sequence[Pair], schema: pa.Schema) -> pa.Table:
    """Pairs as a table of `schema`. Input values that no column can hold go to the `extra` column, as JSON."""
    arrays = []
    extras = [p.extra for p in pairs]
    if EXTRA in schema.names:
        tests = {column.name: _storable(column.type) for column in schema}
        extras = [_split_extra(extra, tests) if extra else extra for extra in extras]
    for name, kind in zip(schema.names, schema.types, strict=True):
        own = list(map(attrgetter(name), pairs)) if name in COLUMNS or name in OWN_EMBEDDINGS else []
        if name not in COLUMNS and not any(value is not None for value in own):
            own = [extra.get(name) for extra in extras]
        arrays.append(_array(own, kind))
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # lone surrogates, from broken UTF-8 or JSON escapes
        return pa.array([_without_surrogates(value) for value in values], kind)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, (list, tuple)):  # tuples are the entries of a map
        items = [_without_surrogates(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return {k: _without_surrogates(v) for k, v in value.items()} if isinstance(value, dict) else value


def _split_extra(extra: dict[str, Any], tests: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """Fields that pass the test of the column with their name, and the others as a JSON object in EXTRA."""
    columns, rest = {}, {}
    if isinstance(extra.get(EXTRA), str):  # from one of our datasets
        extra = {**extra, **_parsed(extra[EXTRA])}
        del extra[EXTRA]
    for name, value in extra.items():
        if value is None:
            continue
        if name in tests and tests[name](value):
            columns[name] = value
        else:
            rest[name] = value
    if rest:
        text = json.dumps(rest, ensure_ascii=False, sort_keys=True, default=_as_text)
        if _SURROGATE.search(text):  # kept as text, so that two names stay two: many readers refuse JSON's own escape
            text = _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):x}", text)
            text = json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True)
        columns[EXTRA] = text
    return columns


_SURROGATE = re.compile("[\ud800-\udfff]")


def _as_text(value: Any) -> str:
    """A value that JSON has no form for: bytes that are not UTF-8 in base64, dates and decimals as they are written."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"extra_text": text}


def _storable(kind: pa.DataType) -> Callable[[Any], bool]:
    """The test whether a column of type `kind` can hold a value, other than None, unchanged."""
    if pa.types.is_string(kind):
        return lambda value: isinstance(value, str)
    if pa.types.is_boolean(kind):
        return lambda value: isinstance(value, bool)
    if pa.types.is_int64(kind):
        return lambda value: isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if pa.types.is_float64(kind):
        return lambda value: isinstance(value, float) or (isinstance(value, int) and abs(value) <= 2**53)
    if pa.types.is_list(kind) and not pa.types.is_floating(kind.value_type):
        item = _storable(kind.value_type)
        return lambda value: isinstance(value, list) and all(v is None or item(v) for v in value)
    return partial(_is_scalar, kind)  # a type that only Parquet sources have


def _is_scalar(kind: pa.DataType, value: Any) -> bool:
    try:
        pa.scalar(value, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def usable_scores(table: pa.Table, column: str) -> NDArray[np.float32]:
    """Scores of a table's rows, float32 [rows]; NaN where the row is no pair or its score is not finite."""
    values = table[column].combine_chunks().cast(pa.float32())
    scores = np.array(values.fill_null(float("nan")).to_numpy(zero_copy_only=False), np.float32)
    usable = np.asarray(pc.is_in(table["status"], pa.array(sorted(PAIRS)))) & np.isfinite(scores)
    return np.where(usable, scores, np.float32("nan"))
