"""The texts of a row or sample, whatever it came from: a conversation, or one or more captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aligncurate.dataset.pointers import images_in
from aligncurate.dataset.record import Pair, Status
from aligncurate.sources.captions import text_of, with_captions
from aligncurate.sources.coerce import as_level
from aligncurate.sources.conversations import other_fields, parse_conversation, set_conversation
from aligncurate.sources.fields import IMAGES, is_image
from aligncurate.sources.marks import IMAGE, marks_video
from aligncurate.sources.options import Several

_VIDEOS = ("video", "videos", "video_path")


def with_texts(
    pair: Pair, turns: Any, caption: Any, several: Several, similarity: Any = None
) -> tuple[list[Pair], list[str | bytes]]:
    """The pairs of one image: `pair` with its conversation or caption, or a copy for each of several captions.

    Args:
        pair: without texts.
        turns: a conversation in any form that `parse_conversation` reads; without one `caption` is taken.
        caption: the value of the caption field.
        several: what becomes of several captions (see `with_captions`).
        similarity: the level in AlignGPT's form, counted from 0; for conversations without a level.

    Returns:
        The pairs, and the images that the conversation names.
    """
    if not turns:
        return with_captions(pair, caption, several), []
    try:
        parsed, inside = parse_conversation(turns)
    except ValueError as error:
        pair.fail(Status.INVALID_ROW, str(error) if pair.row is None else f"row {pair.row}: {error}")
        pair.extra["unread_turns"] = turns  # so that its texts are not lost
        return [pair], []
    if not parsed:
        pair.fail(Status.MISSING_CAPTION, "the conversation is empty")
        return [pair], []
    if caption:
        pair.extra["unused_caption"] = text_of(caption) or caption
    set_conversation(pair, parsed)
    if rest := other_fields(turns):
        pair.extra["turn_fields"] = rest
    if pair.level is None and isinstance(similarity, int) and not isinstance(similarity, bool):
        pair.level = as_level(similarity + 1)
    return [pair], images_in(inside)


def without_image(pair: Pair, row: Mapping[str, Any], missing: str) -> None:
    """Set the status of a pair whose row names no image: `text_only` for a conversation about none.

    Args:
        pair: with its texts.
        row: all fields of its row.
        missing: the sentence on a row that should have an image.
    """
    texts = [turn["text"] for turn in pair.conversations or ()]
    named = next((i for name in IMAGES for i in images_in(row.get(name)) if isinstance(i, str) and is_image(i)), None)
    if named is not None:
        pair.fail(Status.MISSING_IMAGE, f"it names the image {named}, but {missing}")
    elif any(IMAGE in text for text in texts):
        pair.fail(Status.MISSING_IMAGE, f"the text marks an image ({IMAGE}), but {missing}")
    elif any(row.get(name) for name in _VIDEOS) or any(marks_video(text) for text in texts):
        pair.fail(Status.MISSING_IMAGE, "it is about a video; only images are supported")
    elif pair.conversations is not None:
        pair.fail(Status.TEXT_ONLY, "")
        pair.error = None if pair.status is Status.TEXT_ONLY else pair.error
    else:
        pair.fail(Status.MISSING_IMAGE, missing)


def listed(names: Iterable[str]) -> str:
    """Field names in a sentence."""
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
