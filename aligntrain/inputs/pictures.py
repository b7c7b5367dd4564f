"""Images as users give them: files, URLs or images of Pillow."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from transformers.image_utils import load_image

from aligncurate.dataset.pointers import inline_image
from aligncurate.errors import ImageError, UserError
from aligncurate.images.decode import load_rgb
from aligncurate.io import storage


def open_picture(given: str | Path | bytes | Image.Image) -> Image.Image:
    """An image, upright, as RGB.

    Args:
        given: an image of Pillow; the path of a file; a URL; a `data:` URI or base64; or a file's bytes. All but the
            first are read as datasets are: in the same formats, within the same limits.

    Raises:
        UserError: there is no such image, or it cannot be read.
    """
    if isinstance(given, Image.Image):
        return load_image(given)  # type: ignore[no-any-return]
    if not isinstance(given, str | Path | bytes):
        raise UserError(f"an image is given as {type(given).__name__}; give a Pillow image, a path or a URL.")
    data = inline_image(given) if isinstance(given, str) else given if isinstance(given, bytes) else None
    name = str(given) if data is None else "the image"
    try:
        return load_rgb(storage.read(storage.absolute(name), storage.MAX_IMAGE_BYTES) if data is None else data)
    except OSError as error:
        raise UserError(f"{name}: the image cannot be read ({error.strerror or error}).") from None
    except ImageError as error:
        raise UserError(f"{name}: {error}.") from None
