"""Texts as datasets write them: captions, turns of conversations, and the placeholders for images."""

import re
from collections.abc import Mapping, Sequence
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
"""Names that caption columns go by, the likeliest first."""

IMAGES = ("image", "image_bytes", "jpg", "png", "images", "image_path", "img", "img_path", "filename",
          "file_name", "filepath", "file", "path")  # fmt: skip
"""Names that image columns go by, the likeliest first."""

_PLACEHOLDERS = re.compile(r"<image>|<__dj__image>|<\|__dj__eoc\|>|<IMG_CONTEXT>")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_IMAGE_TOKENS = re.compile(r"<image>|<IMG_CONTEXT>")


def set_caption(pair: Pair, value: Any) -> None:
    """Set the caption from an input value, or the status that says why there is none."""
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


def conversation(turns: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Turns as `[{role, text}]`, and the image paths named inside them.

    Reads LLaVA's `{from, value}`, and `{role, content}` whose content is text or a list of typed parts.
    Raises ValueError for anything else.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise ValueError("the conversation is not a list of turns")
    found: list[dict[str, str]] = []
    images: list[str] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is not an object")
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content", turn.get("text")))
        if isinstance(text, list):
            parts: list[str] = []
            shown = len(images)
            for part in text:
                if not isinstance(part, Mapping):
                    raise ValueError(f"turn {number} has a part that is not an object")
                if part.get("type") in ("image_url", "image"):
                    url = part.get("image_url", part.get("image"))
                    if isinstance(url, Mapping):
                        url = url.get("url")
                    if url is not None:
                        images.append(str(url))
                else:
                    parts.append(str(part.get("text", "")))
            text = "".join(parts)
            if len(images) > shown and not _IMAGE_TOKENS.search(text):  # the text says nothing of the parts' order
                text = "<image>\n" * (len(images) - shown) + text
        if not isinstance(text, str) or not isinstance(role, str):
            raise ValueError(f"turn {number} has no role or no text")
        found.append({"role": _ROLES.get(role, role), "text": _IMAGE_TOKENS.sub("<image>", text)})
    return found, images


def set_conversation(pair: Pair, turns: list[dict[str, str]]) -> None:
    """Keep a conversation; one that is only an image and its text is a caption."""
    if (
        len(turns) == 2
        and turns[0]["text"].strip() == "<image>"
        and [t["role"] for t in turns] == ["user", "assistant"]
    ):
        set_caption(pair, turns[1]["text"])
        return
    for number, turn in enumerate(turns):
        try:
            turn["text"].encode()
        except UnicodeEncodeError as error:
            pair.fail(Status.INVALID_CAPTION, f"turn {number} is not valid UTF-8 at character {error.start}")
    pair.conversations = turns


def scored_text(pair: Pair, which: str) -> str | None:
    """The text that is compared with the image.

    Args:
        which: turns of conversations to join: `assistant`, `user` or `all`. A caption is always taken whole.
    """
    if pair.conversations is None:
        return pair.caption
    texts = [t["text"] for t in pair.conversations if which == "all" or t["role"] == which]
    return " ".join(_PLACEHOLDERS.sub("", text).strip() for text in texts).strip()
