"""Find the fields of a file of rows that hold images, texts and keys: by their usual names, then by what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from aligncurate.dataset.pointers import images_in
from aligncurate.errors import NoPairsError, UserError
from aligncurate.images.formats import EXTENSIONS
from aligncurate.sources.captions import CAPTIONS, text_of
from aligncurate.sources.coerce import as_level, as_score, extra_name
from aligncurate.sources.conversations import is_conversation

IMAGES = ("image", "image_bytes", "jpg", "png", "images", "image_path", "img", "img_path", "filename", "file_name",
          "filepath", "file", "path", "image_file", "image_name", "image_paths", "images_path", "image_filename",
          "image_file_name", "img_name", "img_file", "img_paths", "imgs", "file_path", "picture", "pictures", "photo",
          "photos", "pic", "pics", "image_base64", "image_b64", "base64")  # fmt: skip
"""Usual names of image columns, the most likely first."""

KEYS = ("key", "id", "uid", "image_id", "__key__", "sample_id")

URLS = ("url", "image_url", "img_url", "urls", "image_link", "image_uri")
"""Usual names of columns with the web addresses of images."""

_LAST_IMAGES = ("image_url", "img_url", "image_uri", "image_id", "img_id")  # if nothing else names images
_TURNS = ("conversations", "messages")
_MAYBE_TURNS = ("conversation", "dialog", "dialogs", "dialogue", "dialogues", "turns", "texts", "chat", "chats",
                "contents", "items")  # fmt: skip
TURNS = (*_TURNS, *_MAYBE_TURNS)
"""Usual names of fields with conversations."""

_ASKED = (("question", "answer"), ("query", "response"), ("instruction", "output"), ("prompt", "response"),
          ("prompt", "completion"), ("question", "response"), ("instruction", "response"))  # fmt: skip


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
    """The names of the fields that a row's image, texts and key are in; None if it has no such field.

    Attributes:
        url: the field with the image's web address, which is kept as an extra column.
        asked: the fields of a question and its answer, which make a conversation.
        all: every field of the file, for messages.
        others: further usual fields for images, for rows in which `image` is empty.
    """

    image: str | None
    caption: str | None
    turns: str | None
    key: str | None
    url: str | None = None
    asked: tuple[str, str] | None = None
    all: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def extras(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row that are kept as extra columns, by the names of these.

        Its score and level are not among them if they can be kept as such.
        """
        kept = {}
        for name, value in row.items():
            if name in self._texts or (name == "score" and as_score(value) is not None):
                continue
            if name == "level" and as_level(value) is not None:
                continue
            if name.lower() == "image" and images_in(value) and isinstance(images_in(value)[0], bytes):
                continue  # an image that is not chosen
            kept[self._extra_name(name)] = value
        return kept

    def extra_types(self, types: Mapping[str, pa.DataType | None]) -> dict[str, pa.DataType]:
        """The extra columns of a file whose columns have these types; None for what no column can hold."""
        kept = {}
        for name, kind in types.items():
            if name in self._texts or kind is None or (name.lower() == "image" and not pa.types.is_string(kind)):
                continue
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if not (name in ("score", "level") and number):
                kept[self._extra_name(name)] = kind
        return kept

    @cached_property
    def _texts(self) -> frozenset[str]:
        """Fields whose values become columns of ours."""
        key = self.key if self.key == "key" else None
        named = {self.image, self.caption, self.turns, key, *(self.asked or ())}
        return frozenset(n for n in named if n)

    def _extra_name(self, name: str) -> str:
        new = extra_name(name)
        return new if new == name or new not in self.all else f"{new}_2"


def find_fields(uri: str, names: Iterable[str], naming: Naming, rows: Sequence[Mapping[str, Any]] = ()) -> Fields:
    """Choose the fields among `names`: the columns that the user named, or those with the usual names.

    Args:
        uri: the file, for messages.
        names: its columns.
        naming: what the user named.
        rows: some of its rows; conversations and images under other names are found by them.

    Raises UserError, with the columns there are, if a named column is missing or none fits.
    """
    columns = list(names)
    lower = {c.lower(): c for c in reversed(columns)} | {c: c for c in columns if c.islower()}

    def pick(given: str | None, usual: tuple[str, ...], option: str) -> str | None:
        if given is None:
            return next((lower[n.lower()] for n in usual if n.lower() in lower), None)
        if given not in columns:
            raise UserError(f"{uri}: {option} {given}: no such column; it has {', '.join(columns)}.")
        return given

    turns = pick(None, _TURNS, "") or next(
        (lower[n] for n in _MAYBE_TURNS if n in lower and any(is_conversation(row.get(lower[n])) for row in rows)), None
    )
    caption = pick(
        naming.caption_column, tuple(n for n in CAPTIONS if lower.get(n.lower()) != turns), "--caption-column"
    )
    pair = next((pair for pair in _ASKED if all(n in lower for n in pair)), None) if turns is caption is None else None
    asked = (lower[pair[0]], lower[pair[1]]) if pair else None
    image = pick(naming.image_column, IMAGES, "--image-column")
    if image is None:
        texts = {turns, caption, *(asked or ())}
        image = _named_by_rows([c for c in columns if c not in texts], rows)
        if image is None and (turns or asked):
            image = pick(None, _LAST_IMAGES, "")
    if image == caption:
        image = None
    url = pick(None, URLS, "")
    if turns is None and asked is None and (caption is None or (image is None and url is None)):
        missing = "captions (--caption-column)" if caption is None else "images (--image-column)"
        raise NoPairsError(f"{uri}: no column with {missing} found; it has {', '.join(columns) or 'none'}.")
    others = [lower[n] for n in (*IMAGES, *_LAST_IMAGES) if n in lower and naming.image_column is None]
    others = [name for name in dict.fromkeys(others) if name not in (image, caption, turns, *(asked or ()))]
    return Fields(image, caption, turns, pick(None, KEYS, ""), url, asked, tuple(columns), tuple(others))


def turns_of(row: Mapping[str, Any], fields: Fields) -> Any:
    """The conversation of a row: its turns, or its question and answer; None if it has neither."""
    turns = row.get(fields.turns) if fields.turns else None
    if fields.asked is None or turns:
        return turns
    question, answer = (row.get(name) for name in fields.asked)
    context = text_of(row.get("input")) if fields.asked[0].lower() == "instruction" else None
    if context:
        question = f"{text_of(question) or ''}\n{context}"
    history = row.get("history")
    earlier = [turn for turn in history if len(turn) == 2] if isinstance(history, list) else []
    return [
        {"role": role, "content": content}
        for said in (*earlier, (question, answer))
        for role, content in zip(("user", "assistant"), said, strict=True)
    ]


def _named_by_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first column in which the rows name image files or hold images; keys only if no other does."""
    return next(
        (
            column
            for column in sorted(columns, key=lambda column: column.lower() in KEYS)
            if any(is_image(image) for row in rows for image in images_in(row.get(column)))
        ),
        None,
    )


def is_image(image: str | bytes) -> bool:
    """Whether an image in a field is one beyond doubt: its bytes, or a name with the ending of one."""
    if isinstance(image, bytes):
        return True
    return "://" not in image and "\n" not in image and image.rpartition(".")[2].lower() in EXTENSIONS and "." in image


def is_url(value: Any) -> bool:
    """Whether a field holds a web address."""
    return isinstance(value, str) and value.strip().lower().startswith(("http://", "https://"))
