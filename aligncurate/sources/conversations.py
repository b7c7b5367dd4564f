"""Conversations in the usual forms (LLaVA, OpenAI, transformers) as turns with a role and a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aligncurate.dataset.record import Pair, Status
from aligncurate.sources.captions import set_caption

IMAGE = "<image>"
"""Marks an image's place in a text."""

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
"""Usual names of roles, and what they are called here."""

_IMAGE_PARTS = ("image_url", "image")
_IMAGE_KEYS = ("image_url", "image", "url", "path")
_IMAGE_MARKS = re.compile(r"<image>|<IMG_CONTEXT>")


def parse_conversation(turns: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Turns as `[{role, text}]`, and the images named inside them (paths, URLs or image objects).

    Reads LLaVA's `{from, value}`, and `{role, content}` whose content is text or a list of typed parts. Roles are
    renamed by ROLES; unknown roles are kept.

    Raises:
        ValueError: not a list of turns, or a turn without role or text; turns count from 0.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise ValueError("the conversation is not a list of turns")
    parsed: list[dict[str, str]] = []
    images: list[Any] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is not an object")
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content", turn.get("text")))
        if isinstance(text, list):
            if not all(isinstance(part, Mapping) for part in text):
                raise ValueError(f"turn {number} has a part that is not an object")
            text, inside = _flatten(text)
            images += inside
        if not isinstance(text, str) or not isinstance(role, str):
            raise ValueError(f"turn {number} has no role or no text")
        parsed.append({"role": ROLES.get(role, role), "text": _IMAGE_MARKS.sub(IMAGE, text)})
    return parsed, images


def _flatten(parts: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """Typed parts as one text, and the images that they name.

    Each image part puts an IMAGE at the front, unless the text has its own: then the text says where images go.
    """
    texts, images, marks = [], [], 0
    for part in parts:
        if part.get("type") in _IMAGE_PARTS:
            marks += 1
            image = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            image = image.get("url") if isinstance(image, Mapping) else image
            images += [image] if image is not None else []
        else:
            texts.append(str(part.get("text") or ""))
    text = "".join(texts)
    return (text if _IMAGE_MARKS.search(text) else f"{IMAGE}\n" * marks + text), images


def set_conversation(pair: Pair, turns: list[dict[str, str]]) -> None:
    """Keep a conversation; one that is only an image and its text becomes a caption."""
    if len(turns) == 2 and turns[0]["text"].strip() == IMAGE and [t["role"] for t in turns] == ["user", "assistant"]:
        set_caption(pair, turns[1]["text"])
        return
    for number, turn in enumerate(turns):
        try:
            turn["text"].encode()
        except UnicodeEncodeError as error:
            pair.fail(Status.INVALID_CAPTION, f"turn {number} is not valid UTF-8 at character {error.start}")
    pair.conversations = turns
