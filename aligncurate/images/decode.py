"""Image bytes to pixels on the CPU, with limits checked before decoding."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError
from aligncurate.images.formats import DecodeMode
from aligncurate.images.limits import MAX_PIXELS, check_size
from aligncurate.images.preprocess import Preprocess, to_eight_bits

if TYPE_CHECKING:
    from torch import Tensor

# `fast` decodes to at least this many times the encoder's input: at 1 the scores change more than twice as much,
# at 2 hardly any photo is reduced (docs/performance.md).
_MARGIN = 1.5

_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height


@contextmanager
def no_decoder_warnings() -> Iterator[None]:
    """Silence the warnings of image decoders.

    Pillow's (size, EXIF, palettes) add nothing to a row's status; torchvision's announces that its decoders move to
    another package. Warning filters are global to the process, so use this around a run, not around each image.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
        yield


def open_image(data: bytes) -> tuple[Image.Image, int, int]:
    """The image in `data`, not decoded yet, and its width and height after EXIF rotation.

    Raises ImageError for data that is not an image or has more than MAX_PIXELS pixels.
    """
    if not data:
        raise ImageError(Status.DECODE_ERROR, "the image file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ImageError(Status.TOO_LARGE, f"more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception:  # Pillow raises nearly anything for broken files; it must not stop the run
        raise ImageError(Status.DECODE_ERROR, _why_not_an_image(data)) from None
    width, height = image.size
    check_size(width, height)
    if _exchanges_edges(image):
        width, height = height, width
    return image, width, height


def decode(data: bytes, image: Image.Image, preprocesses: Sequence[Preprocess], mode: DecodeMode) -> list[Tensor]:
    """Pixels for each kind of preprocessing, uint8 [3, size, size] (see `Preprocess.exact`), decoded once.

    Args:
        data, image: the file, and what `open_image` returned for it.
        preprocesses: one for each encoder, or for each kind of pixels that encoders take.
        mode: `exact`, or `fast`: JPEGs at reduced size, resized in uint8; `gpu` is `fast` here.

    Raises ImageError for damaged images.
    """
    for preprocess in preprocesses:
        preprocess.check(*image.size)
    try:
        if mode != "exact" and all(preprocess.has_fast for preprocess in preprocesses):
            edge = round(_MARGIN * max(preprocess.size or 0 for preprocess in preprocesses))
            rgb, original = _fast_rgb(data, image, edge)
            return [preprocess.fast(rgb, original) for preprocess in preprocesses]
        image.load()
        upright = _turn_upright(image)
        return [preprocess.exact(upright) for preprocess in preprocesses]
    except Exception as error:  # see open_image
        raise ImageError(Status.DECODE_ERROR, f"the image is damaged: {error}") from None


def load_rgb(data: bytes) -> Image.Image:
    """The image in a file's bytes at full size: upright, 8 bits per channel, RGB.

    Raises ImageError for data that is not an image, is damaged or has more than MAX_PIXELS pixels.
    """
    image, _, _ = open_image(data)
    try:
        image.load()
        return _upright_rgb(image)
    except Exception as error:  # see open_image
        raise ImageError(Status.DECODE_ERROR, f"the image is damaged: {error}") from None


def _fast_rgb(data: bytes, image: Image.Image, edge: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The upright image [height, width, 3], and its height and width at full size.

    A JPEG's short edge is decoded to at least `edge` pixels, if the file has that many. simplejpeg was the fastest
    decoder measured (docs/performance.md). Files that it refuses (any damage) and rotated files go to Pillow, which
    also decides whether a file is damaged.
    """
    width, height = image.size
    if image.format == "JPEG":
        if is_upright(image):
            with suppress(ValueError):
                rgb = simplejpeg.decode_jpeg(data, "RGB", min_height=edge, min_width=edge, min_factor=2)
                return rgb, (height, width)
        scale = edge / min(width, height)
        image.draft(image.mode, (max(1, round(width * scale)), max(1, round(height * scale))))
    if _exchanges_edges(image):
        width, height = height, width
    image.load()
    return np.array(_upright_rgb(image)), (height, width)


def is_upright(image: Image.Image) -> bool:
    """Whether an image needs no EXIF rotation."""
    return _orientation(image) == 1


def _turn_upright(image: Image.Image) -> Image.Image:
    """A decoded image with its EXIF rotation applied."""
    return image if is_upright(image) else ImageOps.exif_transpose(image)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded image turned upright, with 8 bits per channel, as RGB."""
    return to_eight_bits(_turn_upright(image)).convert("RGB")


def _exchanges_edges(image: Image.Image) -> bool:
    """Whether width and height change places when the image is turned upright."""
    return _orientation(image) in _TURNED and image.format != "TIFF"  # Pillow reports a TIFF's upright size


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking a PNG for its EXIF decodes the whole image
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _why_not_an_image(data: bytes) -> str:
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<svg")):
        return "this is a web page or XML, not an image"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:64]):
        return "this is text, not an image"
    return "not an image in any format that Pillow supports"
