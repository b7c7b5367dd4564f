"""Conversations in the usual forms (LLaVA, OpenAI, transformers, Cauldron) as turns with a role and a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aligncurate.dataset.pointers import IMAGE_KEYS
from aligncurate.dataset.record import Pair, Status
from aligncurate.sources.captions import clean, parsed, set_caption, text_of
from aligncurate.sources.marks import IMAGE, unify_marks

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "question": "user", "query": "user", "instruction": "user",
    "prompt": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "chatbot": "assistant", "ai": "assistant", "gpt4": "assistant", "gpt-4": "assistant",
    "gpt4v": "assistant", "gpt-4v": "assistant", "gpt-4o": "assistant", "answer": "assistant", "response": "assistant",
    "output": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
"""Usual names of roles, in lower case, and what they are called here."""

_ROLE_KEYS = ("from", "role", "speaker", "author")
_TEXT_KEYS = ("value", "content", "text", "message", "parts")
# In a part without a type.
_IMAGES = ("image", "image_url", "image_path", "image_file", "img", "inline_data", "file_data")


def parse_conversation(turns: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Turns as `[{role, text}]`, and the images named inside them (paths, URLs, bytes or image objects).

    Reads LLaVA's `{from, value}`, `{role, content}` whose content is text or a list of typed parts, Cauldron's `{user,
    assistant}`, and any of these as JSON text. Roles are renamed by ROLES, whatever their case; unknown roles are kept.
    Marks of images become `<image>`.

    Raises:
        ValueError: not a list of turns, a turn without role or text, or with a part that is no text or image; turns
            count from 0.
    """
    read: list[dict[str, str]] = []
    images: list[Any] = []
    for number, turn in enumerate(_turns(turns)):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is not an object")
        for role, content in _spoken(turn):
            said, inside = _text(content, number)
            if said is None or not isinstance(role, str):
                raise ValueError(f"turn {number} has no role or no text")
            role = role.strip()
            text, named = unify_marks(said.replace("\ufeff", ""))
            images += inside + named
            read.append({"role": ROLES.get(role.rstrip(": ").lower(), role), "text": text})
    return read, images


def is_conversation(value: Any) -> bool:
    """Whether a field holds turns, rather than texts."""
    value = parsed(value) if isinstance(value, str) else value
    turns = [value] if isinstance(value, Mapping) else value
    return isinstance(turns, (list, tuple)) and any(isinstance(turn, Mapping) for turn in turns)


def other_fields(turns: Any) -> list[dict[str, Any]]:
    """What the turns of a conversation hold besides roles and texts, for each turn; empty if there is nothing."""
    rest = []
    for turn in _turns(turns):
        role, content = _first(turn, _ROLE_KEYS), _first(turn, _TEXT_KEYS)
        read = {role, content} if role or content else {name for name in turn if name.lower() in ROLES}
        rest.append({name: value for name, value in turn.items() if value is not None and name not in read})
    return rest if any(rest) else []


def _turns(value: Any) -> Sequence[Any]:
    value = parsed(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if isinstance(column, (list, tuple))}
        if not columns.keys() & _ROLE_KEYS or len({len(column) for column in columns.values()}) != 1:
            return [value]
        # A list of roles and one of texts, as Hugging Face stores lists of objects.
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, (list, tuple)):
        raise ValueError("the conversation is not a list of turns")
    return value


def _spoken(turn: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(role, content) of what is said in a turn: once, or in a turn like `{user, assistant}` by each of them."""
    role, content = _first(turn, _ROLE_KEYS), _first(turn, _TEXT_KEYS)
    roles = [] if role or content else [name for name in turn if name.lower() in ROLES]
    yield from ((name, turn[name]) for name in roles if turn[name] is not None)
    if not roles:
        yield role and turn[role], content and turn[content]


def _first(turn: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that `turn` has a value for."""
    for key in keys:
        if turn.get(key) is not None:
            return key
    return None


def _text(content: Any, number: int) -> tuple[str | None, list[Any]]:
    """A turn's content as one text, and the images that its parts name.

    Each image part puts an IMAGE at the front, unless the text has its own: then the text says where images go.
    """
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple)):
        return text_of(content), []
    texts, images, marks = [], [], 0
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise ValueError(f"turn {number} has a part that is not an object")
        kind = str(part.get("type") or "").lower()
        image = _image(part, kind)
        if "image" in kind or kind == "img" or image is not None:
            marks += 1
            images += [image] if image is not None else []
            text = part.get("text")
        elif "video" in kind:
            text = "<video>"
        elif kind.endswith("text") or "text" in part:
            text = next((part[key] for key in ("text", "content", "value") if part.get(key) is not None), None)
        else:
            raise ValueError(f"turn {number} has a part of type {kind or 'unknown'}, which is neither text nor image")
        texts.append(text_of(text) or "")
    text = "".join(texts)
    return (text if IMAGE in unify_marks(text)[0] else f"{IMAGE}\n" * marks + text), images


def _image(part: Mapping[str, Any], kind: str) -> Any:
    """The image that a part of this kind names; None if it names none."""
    keys = (*_IMAGES, *IMAGE_KEYS, "source", "content", "value") if "image" in kind or kind == "img" else _IMAGES
    if kind and keys is _IMAGES:
        return None
    image: Any = next((part[key] for key in keys if part.get(key) is not None), None)
    while isinstance(image, Mapping):
        image = next((image[key] for key in IMAGE_KEYS if image.get(key) is not None), None)
    return image


def set_conversation(pair: Pair, turns: list[dict[str, str]]) -> None:
    """Keep a conversation; one that is only an image and its text becomes a caption."""
    if len(turns) == 2 and clean(turns[0]["text"]) == IMAGE and [t["role"] for t in turns] == ["user", "assistant"]:
        set_caption(pair, turns[1]["text"])
        return
    for number, turn in enumerate(turns):
        try:
            turn["text"].encode()
        except UnicodeEncodeError as error:
            pair.fail(Status.INVALID_CAPTION, f"turn {number} is not valid UTF-8 at character {error.start}")
    pair.conversations = turns
