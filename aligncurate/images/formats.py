"""Image file formats by their file extensions, and the ways to decode them."""

from __future__ import annotations

import io
from typing import Literal

_EXTENSION_OF = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "DIB": "bmp",
    "TIFF": "tif", "PPM": "ppm", "AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico", "TGA": "tga", "PCX": "pcx",
    "DDS": "dds", "QOI": "qoi",
}  # fmt: skip
EXTENSIONS = frozenset({*_EXTENSION_OF.values(), "jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm", "j2k", "jpx"})
"""Extensions of files that are read as images, in lower case and without the dot."""

DecodeMode = Literal["exact", "fast", "gpu"]
"""`exact` follows open_clip's own preprocessing; `fast` decodes large JPEGs at reduced size and resizes in uint8;
`gpu` decodes JPEGs on the GPU and everything else as `fast` does."""


def extension(data: bytes | memoryview) -> str | None:
    """The usual extension for the image format of `data`, without the dot; None when it is not an image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            name = str(image.format)
    except Exception:  # Pillow raises nearly anything for broken files
        return None
    return _EXTENSION_OF.get(name, name.lower())
