"""Bytes to pixels: limits checked before decoding, then open_clip's own preprocessing or a faster one."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from aligncurate.pairs import Status

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs."""

_ENDINGS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "DIB": "bmp",
    "TIFF": "tif", "PPM": "ppm", "AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico", "TGA": "tga", "PCX": "pcx",
    "DDS": "dds", "QOI": "qoi",
}  # fmt: skip
EXTENSIONS = frozenset({*_ENDINGS.values(), "jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm", "j2k", "jpx"})
"""File name endings that are taken for images."""

Decode = Literal["exact", "fast"]

_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height


class ImageError(Exception):
    """An image that cannot be used, with the status that its row gets."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Preprocess:
    """What an encoder wants of an image.

    Attributes:
        transform: open_clip's own: a Pillow image to a float tensor [3, size, size].
        size: edge of the square input, in pixels; None where the input is not square.
        mean, std: per channel, of values in 0..1.
        resize_mode: `shortest`, `longest` or `squash`, as open_clip names them.
        interpolation: `bicubic` or `bilinear`.
    """

    transform: Callable[[Image.Image], "torch.Tensor"]
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str
    interpolation: str

    def exact(self, image: Image.Image) -> "torch.Tensor":
        """Pixels as a plain open_clip loop makes them, float32 [3, size, size]."""
        return self.transform(_eight_bit(image))

    def fast(self, image: Image.Image) -> "torch.Tensor":
        """Nearly the same pixels, sooner: JPEGs are decoded at reduced size, and only the crop is resized."""
        import torch

        if self.size is None or self.resize_mode != "shortest":
            return self.exact(image)
        rgb = _eight_bit(image).convert("RGB")
        width, height = rgb.size
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        crop = rgb.resize((self.size, self.size), filters[self.interpolation], box=(left, top, left + edge, top + edge))
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        shift = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        pixels = np.asarray(crop, np.float32) * scale - shift
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def draft_size(self, width: int, height: int) -> tuple[int, int]:
        """Smallest decoded size that loses nothing in resizing to the encoder's input."""
        edge = self.size or max(width, height)
        scale = edge / min(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def check(self, width: int, height: int) -> None:
        """Raise ImageError for shapes whose resized form would not fit in memory (20,000 x 1 pixels, say)."""
        if self.size is None or self.resize_mode != "shortest":
            return
        scale = self.size / min(width, height)
        if width * height * scale * scale > MAX_PIXELS:
            raise ImageError(
                Status.TOO_LARGE, f"{width}x{height} pixels: too narrow to be resized to {self.size} pixels"
            )


@contextmanager
def pillow_unheard() -> Iterator[None]:
    """Keep Pillow's warnings from the user: on size, EXIF and palettes they say nothing that a row's status does not.

    Warning filters belong to the whole process, so this goes around a run, not around each image.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def open_image(data: bytes) -> tuple[Image.Image, int, int]:
    """The image in `data`, not decoded yet, and its width and height after EXIF rotation.

    Raises ImageError for what is no image or has more than MAX_PIXELS pixels.
    """
    if not data:
        raise ImageError(Status.DECODE_ERROR, "the image file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ImageError(Status.TOO_LARGE, f"more than {MAX_PIXELS:,} pixels") from None
    except Exception:  # broken files make Pillow raise nearly anything; each is this row's error only
        raise ImageError(Status.DECODE_ERROR, _no_image(data)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(Status.TOO_LARGE, f"{width}x{height} pixels: more than {MAX_PIXELS:,} in all")
    if _orientation(image) in _TURNED and image.format != "TIFF":  # of a TIFF Pillow gives the upright size
        width, height = height, width
    return image, width, height


def decode(image: Image.Image, preprocess: Preprocess, mode: Decode) -> "torch.Tensor":
    """Pixels for the encoder, float32 [3, size, size]. Raises ImageError for damaged images."""
    preprocess.check(*image.size)
    try:
        if mode == "fast" and image.format == "JPEG":
            image.draft(image.mode, preprocess.draft_size(*image.size))
        image.load()
        upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
        return preprocess.fast(upright) if mode == "fast" else preprocess.exact(upright)
    except Exception as error:  # see open_image
        raise ImageError(Status.DECODE_ERROR, f"the image is damaged: {error}") from None


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking a PNG for its EXIF decodes the whole image
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey images scaled to 8 bits; Pillow's own conversion would clip nearly all of them to white."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.uint16)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _no_image(data: bytes) -> str:
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<svg")):
        return "this is a web page or XML, not an image"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:64]):
        return "this is text, not an image"
    return "not an image in any format that Pillow knows"


def extension(data: bytes) -> str | None:
    """The usual file ending for the image format of `data`, without the dot; None when it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = str(image.format)
    except Exception:  # see open_image
        return None
    return _ENDINGS.get(kind, kind.lower())


def preprocess_of(transform: Any, config: dict[str, Any]) -> Preprocess:
    """A Preprocess from open_clip's transform and its preprocessing config."""
    size = config["size"]
    if not isinstance(size, int):
        size = size[0] if size[0] == size[1] else None
    return Preprocess(
        transform,
        size,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["resize_mode"],
        config["interpolation"],
    )
