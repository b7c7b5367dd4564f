"""Bytes to pixels: limits checked before decoding, then open_clip's own preprocessing or a faster one."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError

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

Decode = Literal["exact", "fast", "gpu"]

_FAST = ("bicubic", "bilinear")
# `fast` decodes to no less than this many times the encoder's input: at 1 the scores move more than twice as far,
# at 2 hardly any photo is reduced (docs/performance.md).
_MARGIN = 1.5

_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height


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
        """Pixels as a plain open_clip loop makes them, uint8 [3, size, size] before normalisation.

        A transform that does not end in open_clip's usual two steps gives its own floats.
        """
        import torch

        image = _eight_bit(image)
        steps = getattr(self.transform, "transforms", [])
        if not _splits(steps):
            return self.transform(image)
        for step in steps[:-2]:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def fast(self, rgb: NDArray[np.uint8], original: tuple[int, int]) -> "torch.Tensor":
        """Nearly the same pixels, sooner: torch resizes in uint8 with vector code.

        Args:
            rgb: the image [height, width, 3], maybe decoded at reduced size.
            original: its height and width at full size.
        """
        import torch

        return fit(torch.from_numpy(rgb).permute(2, 0, 1), original, self.size or 0, self.interpolation)

    @property
    def shape(self) -> str:
        """Equal for encoders that want the same pixels, whatever they do to normalise them."""
        steps = getattr(self.transform, "transforms", None)
        return repr(steps[:-2] if steps and _splits(steps) else self.transform)

    @property
    def has_fast(self) -> bool:
        """Whether `fast` knows this preprocessing; for any other, exact decoding stands in."""
        return self.size is not None and self.resize_mode == "shortest" and self.interpolation in _FAST

    def normalize(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Pixels [..., 3, H, W] as float32 for the encoder: uint8 as open_clip normalises them, floats as they are."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def check(self, width: int, height: int) -> None:
        """Raise ImageError for shapes whose resized form would not fit in memory (20,000 x 1 pixels, say)."""
        if self.size is None or self.resize_mode != "shortest":
            return
        scale = self.size / min(width, height)
        if width * height * scale * scale > MAX_PIXELS:
            raise ImageError(
                Status.TOO_LARGE, f"{width}x{height} pixels: too narrow to be resized to {self.size} pixels"
            )


def _splits(steps: Sequence[Any]) -> bool:
    """Whether a transform ends in ToTensor and Normalize, which `Preprocess.normalize` does for a whole batch."""
    return [type(s).__name__.removeprefix("Maybe") for s in steps[-2:]] == ["ToTensor", "Normalize"]


@contextmanager
def decoders_unheard() -> Iterator[None]:
    """Keep decoders' warnings from the user.

    Pillow's on size, EXIF and palettes say nothing that a row's status does not; torchvision's says that its
    decoders will move to another package.

    Warning filters belong to the whole process, so this goes around a run, not around each image.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
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


def decode(data: bytes, image: Image.Image, wanted: Sequence[Preprocess], mode: Decode) -> "list[torch.Tensor]":
    """Pixels for each encoder, uint8 [3, size, size] (see `Preprocess.exact`), from decoding once.

    Args:
        data, image: the file, and what `open_image` made of it.
        wanted: what the encoders want.
        mode: `exact`, or `fast`: JPEGs at reduced size, resized in uint8; `gpu` here is `fast`.

    Raises ImageError for damaged images.
    """
    for preprocess in wanted:
        preprocess.check(*image.size)
    try:
        if mode != "exact" and all(preprocess.has_fast for preprocess in wanted):
            edge = round(_MARGIN * max(preprocess.size or 0 for preprocess in wanted))
            rgb, original = _fast_rgb(data, image, edge)
            return [preprocess.fast(rgb, original) for preprocess in wanted]
        image.load()
        turned = _turned(image)
        return [preprocess.exact(turned) for preprocess in wanted]
    except Exception as error:  # see open_image
        raise ImageError(Status.DECODE_ERROR, f"the image is damaged: {error}") from None


def load_rgb(data: bytes) -> Image.Image:
    """Decode an image file at full size: upright, RGB, 16-bit grey scaled to 8 bits.

    Raises:
        ImageError: not an image, damaged, or more than MAX_PIXELS pixels.
    """
    image, _, _ = open_image(data)
    try:
        image.load()
        return _eight_bit(_turned(image)).convert("RGB")
    except Exception as error:  # see open_image
        raise ImageError(Status.DECODE_ERROR, f"the image is damaged: {error}") from None


def _fast_rgb(data: bytes, image: Image.Image, edge: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The upright image [height, width, 3], and its height and width at full size.

    A JPEG's short edge is decoded no smaller than `edge`, where the file has that much. simplejpeg was the quickest
    decoder measured (docs/performance.md). What it refuses (any damage) and what must be turned goes to Pillow,
    which also has the last word on whether a file is damaged.
    """
    width, height = image.size
    if image.format == "JPEG":
        if upright(image):
            with suppress(ValueError):
                rgb = simplejpeg.decode_jpeg(data, "RGB", min_height=edge, min_width=edge, min_factor=2)
                return rgb, (height, width)
        scale = edge / min(width, height)
        image.draft(image.mode, (max(1, round(width * scale)), max(1, round(height * scale))))
    if _orientation(image) in _TURNED and image.format != "TIFF":  # see open_image
        width, height = height, width
    image.load()
    return np.array(_eight_bit(_turned(image)).convert("RGB")), (height, width)


def fit(image: "torch.Tensor", original: tuple[int, int], size: int, interpolation: str) -> "torch.Tensor":
    """The middle square of an image [3, H, W], resized as open_clip does it: short edge to `size`, then cut.

    uint8 or float, on any device; the result [3, size, size] has the same type. `original` is the full height
    and width of an image that was decoded at reduced size, by which the long edge is rounded as open_clip rounds it.
    """
    from torch.nn.functional import interpolate

    short = min(original)
    tall, wide = (max(size, int(size * edge / short)) for edge in original)
    if (tall, wide) != tuple(image.shape[1:]):
        image = interpolate(image[None], (tall, wide), mode=interpolation, antialias=True)[0]
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return image[:, top : top + size, left : left + size]


def upright(image: Image.Image) -> bool:
    """Whether an image needs no EXIF rotation."""
    return _orientation(image) == 1


def _turned(image: Image.Image) -> Image.Image:
    """The image with its EXIF rotation applied."""
    return image if upright(image) else ImageOps.exif_transpose(image)


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


def extension(data: bytes | memoryview) -> str | None:
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
