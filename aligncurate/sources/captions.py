"""Captions: the columns they are found in, cleaned of placeholders, and the text of a pair that is scored."""

from __future__ import annotations

import re
from typing import Any

from aligncurate.dataset.record import Pair, Status

CAPTIONS = (
    "caption",
    "text",
    "caption_text",
    "alt_text",
    "TEXT",
    "captions",
    "sentence",
    "description",
    "title",
)
"""Usual names of caption columns, the most likely first."""

_PLACEHOLDERS = re.compile(r"<image>|<__dj__image>|<\|__dj__eoc\|>|<IMG_CONTEXT>")


def set_caption(pair: Pair, value: Any) -> None:
    """Set the caption from an input value, or the status that explains why there is none."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value is None or (isinstance(value, float) and value != value):
        pair.fail(Status.MISSING_CAPTION, "there is no caption")
        return
    text = _PLACEHOLDERS.sub("", str(value)).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        pair.caption = text.encode("utf-8", "replace").decode()
        pair.fail(Status.INVALID_CAPTION, f"the caption is not valid UTF-8 at character {error.start}")
        return
    pair.caption = text
    if not text:
        pair.fail(Status.MISSING_CAPTION, "the caption is empty")


def scored_text(pair: Pair, which: str) -> str | None:
    """The text that is compared with the image.

    Args:
        pair: with a caption or a conversation; a caption is always taken whole.
        which: turns of a conversation to join: `assistant`, `user` or `all`.
    """
    if pair.conversations is None:
        return pair.caption
    texts = [t["text"] for t in pair.conversations if which == "all" or t["role"] == which]
    return " ".join(_PLACEHOLDERS.sub("", text).strip() for text in texts).strip()
