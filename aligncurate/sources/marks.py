"""Marks in a text that say where its image is, in the forms of many projects; all of them become `<image>`."""

from __future__ import annotations

import re

IMAGE = "<image>"
"""Marks an image's place in a text."""

# All but one begin with `<`, which makes the search fast.
_MARKS = re.compile(
    r"<(?:img><)?(?:ImageHere|IMG_CONTEXT)>(?:</img>)?"  # MiniGPT-4, InternVL
    r"|<(?:\|vision_start\|><)?\|image_pad\|>(?:<\|image_pad\|>)*(?:<\|vision_end\|>)?"  # Qwen2-VL
    r"|<\|(?:image|img)(?:_?\d+)?\|>"  # Llama 3.2, Phi-3
    r"|<image(?:[-_ ]?\d+|[-_]?placeholder)?>"  # LLaVA, DeepSeek-VL
    r"|<start_of_image>|<image_soft_token>"  # Gemma 3
    r"|<__dj__image>",  # Data-Juicer
    re.IGNORECASE,
)
_NAMED = re.compile(r"<img>\s*([^<>\n]*?)\s*</img>", re.IGNORECASE)  # Qwen-VL
_EMPTY = re.compile(r"\(?<image>\./</image>\)?")  # MiniCPM-V
_PIXTRAL = re.compile(r"\[IMG\](?![^\[\]]*\[/IMG\])")  # with [/IMG] it is a link in a forum
_VIDEO = re.compile(r"<video>|<VideoHere>|<\|video(?:_pad)?\|>|<__dj__video>", re.IGNORECASE)
_END_OF_CHUNK = re.compile(r"<\|__dj__eoc\|>")


def unify_marks(text: str) -> tuple[str, list[str]]:
    """`text` with every mark as IMAGE, and the images that marks name (`<img>a.jpg</img>`)."""
    names: list[str] = []
    if "</" in text:
        names = [name for name in _NAMED.findall(text) if name]
        text = _EMPTY.sub(IMAGE, _NAMED.sub(IMAGE, text))
    if "[IMG]" in text:
        text = _PIXTRAL.sub(IMAGE, text)
    return _MARKS.sub(IMAGE, text) if "<" in text else text, names


def without_marks(text: str) -> str:
    """`text` without marks of images."""
    if "<" not in text and "[IMG]" not in text:
        return text
    return _END_OF_CHUNK.sub("", unify_marks(text)[0].replace(IMAGE, ""))


def marks_video(text: str) -> bool:
    """Whether a mark of a video is in `text`."""
    return _VIDEO.search(text) is not None
