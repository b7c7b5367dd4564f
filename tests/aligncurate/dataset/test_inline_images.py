"""Images written into a field as base64 or as a `data:` URI."""

from __future__ import annotations

import base64
import io
from urllib.parse import quote_from_bytes

import pytest
from PIL import Image

from aligncurate.dataset.pointers import images_in

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000")


def forms(data: bytes) -> list[object]:
    text = base64.b64encode(data).decode()
    return [
        text,
        f"  {text}\n",
        text.encode(),
        base64.encodebytes(data).decode(),
        base64.urlsafe_b64encode(data).decode().rstrip("="),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=utf-8;base64,{text}".replace("+", "%2B"),
        f"data:image/png,{quote_from_bytes(data)}",
        {"type": "base64", "media_type": "image/png", "data": text},
        {"url": f"data:image/png;base64,{text}", "detail": "low"},
        {"bytes": data, "path": "x.png"},
        [text],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_a_text_are_decoded(kind) -> None:
    for side in (1, 9):
        buffer = io.BytesIO()
        Image.effect_noise((side, side), 64).save(buffer, kind)
        for form in forms(buffer.getvalue()):
            assert images_in(form) == [buffer.getvalue()], form


def test_names_stay_names() -> None:
    for name in ("a.jpg", "/9j/photo.jpg", "iVBORw0KGgo", "Qk1", "x" * 300, "data/0.png", "data:image/png;base64,@@"):
        assert images_in(name) == images_in(f" {name} ") == images_in({"path": name, "bytes": None}) == [name]
    assert images_in(7) == ["7"] and images_in([None, "", {}, {"path": None}]) == []
