"""Captions: the columns they are found in, several in one field, cleaned, and the text of a pair that is scored."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from tokenize import STRING, TokenError, generate_tokens
from typing import Any

from aligncurate.dataset.record import Pair, Status
from aligncurate.progress import count
from aligncurate.sources.marks import without_marks
from aligncurate.sources.options import Several

CAPTIONS = (
    "caption", "text", "caption_text", "alt_text", "TEXT", "captions", "sentence", "sentences", "description", "title",
    "texts", "descriptions", "caption_list", "raw", "txt",
)  # fmt: skip
"""Usual names of caption columns, the most likely first."""

_TEXT_KEYS = ("caption", "text", "raw", "sentence", "value", "content", "description", "title")
_INVISIBLE = "\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufffe\0"
_EDGES = "".join(re.findall(rf"[\s{_INVISIBLE}]", "".join(map(chr, range(1 << 16)))))  # what `clean` takes away


def clean(text: str) -> str:
    """`text` without byte order marks, and without blanks and invisible characters at its ends."""
    return text.replace("\ufeff", "").strip(_EDGES)


def captions_in(value: Any) -> list[Any]:
    """The captions in a field, at least one: the items of a list, or of text that is one (`["a", "b"]`).

    Empty ones are left out; None stands for no caption at all.
    """
    items = parsed(value) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return [value]
    flat = [one for item in items for one in (item if isinstance(item, (list, tuple)) else [item])]
    if isinstance(value, str) and not all(isinstance(item, str) for item in flat):
        return [value]  # it only looks like a list, such as `[1]`
    return [item for item in flat if not _is_empty(item)] or [None]


def parsed(text: str) -> Any:
    """The list or object that a text is in JSON, or as Python prints it; any other text as it is."""
    text = text.strip()
    if not text.startswith(("[", "{")):
        return text
    for read in (json.loads, _from_python):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TokenError):
            value = read(text)
            return value if isinstance(value, (list, tuple, dict)) else text
    return text


def _from_python(text: str) -> Any:
    """The value of a Python literal, also without commas, as numpy prints lists: `['a' 'b']` has two items."""
    words: list[str] = []
    before = ""
    for token in generate_tokens(StringIO(text).readline):
        ends = before[-1:] and before[-1] in "'\"}])"
        if ends and (token.type == STRING or token.string in ("{", "[", "(")):
            words.append(",")
        words.append(token.string.strip())
        before = words[-1] or before
    return literal_eval(" ".join(words))


def with_captions(pair: Pair, value: Any, several: Several) -> list[Pair]:
    """The pairs of one row: `pair` with its caption, or a copy for each of several captions.

    Args:
        pair: the row's pair, without a caption.
        value: of the caption field.
        several: with `all`, the keys of several pairs are `key-0`, `key-1`, …
    """
    captions = captions_in(value)
    if len(captions) == 1 or several == "first":
        pairs = [pair]
    else:
        pairs = [replace(pair, key=f"{pair.key}-{i}", extra=dict(pair.extra)) for i in range(len(captions))]
    for one, caption in zip(pairs, captions, strict=False):
        set_caption(one, caption)
    return pairs


def several_remark(rows: int, several: Several) -> str:
    """What to tell the user about `rows` rows with several captions."""
    if several == "first":
        return f"{count(rows, 'row')} had several captions, of which only the first was taken (--captions first)"
    return f"{count(rows, 'row')} had several captions; each became a row, with keys `key-0`, `key-1`, …"


def set_caption(pair: Pair, value: Any) -> None:
    """Set the caption from one input value, or the status that explains why there is none."""
    if _is_empty(value) and not isinstance(value, (str, bytes)):
        pair.fail(Status.MISSING_CAPTION, "there is no caption")
        return
    text = text_of(value)
    if text is None:  # kept as JSON
        names = f"an object with {', '.join(map(str, value))}" if isinstance(value, Mapping) else "a list of lists"
        pair.fail(Status.INVALID_CAPTION, f"the caption is {names}, not a text")
        text = json.dumps(value, ensure_ascii=False, default=str)
    text = clean(without_marks(text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        pair.fail(Status.INVALID_CAPTION, f"the caption is not valid UTF-8 at character {error.start}")
        text = text.encode("utf-8", "replace").decode()
    pair.caption = text
    if not text:
        pair.fail(Status.MISSING_CAPTION, "the caption is empty")
    if isinstance(value, Mapping) and (rest := {k: v for k, v in value.items() if v is not None and v != text}):
        pair.extra["caption_fields"] = rest


def text_of(value: Any) -> str | None:
    """A value as text: numbers, `true` and `false` as in JSON, an object by its one text; None if it is no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        if value.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):  # as Windows writes "Unicode"
            with suppress(UnicodeDecodeError):
                return value.decode("utf-16")
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        texts = {name: text for name, text in value.items() if isinstance(text, str) and clean(text)}
        known = next((texts[name] for name in _TEXT_KEYS if name in texts), None)
        return known if known is not None or len(texts) != 1 else next(iter(texts.values()))
    return None if value is None or isinstance(value, (list, tuple)) else str(value)


def scored_text(pair: Pair, which: str) -> str | None:
    """The text that is compared with the image.

    Args:
        pair: with a caption or a conversation; a caption is always taken whole.
        which: turns of a conversation to join: `assistant`, `user` or `all`.
    """
    if pair.conversations is None:
        return pair.caption
    texts = [t["text"] for t in pair.conversations if which == "all" or t["role"] == which]
    return " ".join(clean(without_marks(text)) for text in texts).strip()


def _is_empty(value: Any) -> bool:
    """Whether a value is no caption: null, NaN, an empty list or object, or a text with nothing that can be seen."""
    if isinstance(value, (str, bytes)):
        return not clean(value if isinstance(value, str) else value.decode("utf-8", "replace"))
    return value is None or value != value or (isinstance(value, (list, tuple, Mapping)) and not value)
