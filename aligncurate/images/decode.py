"""Image bytes to pixels on the CPU, with limits checked before decoding."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError
from aligncurate.images.formats import HEIC, DecodeMode, kind_of, read_formats, signature
from aligncurate.images.limits import (
    MAX_PIXELS,
    check_codestream,
    check_directories,
    check_scans,
    check_size,
    without_texts,
)
from aligncurate.images.preprocess import Preprocess, to_eight_bits

if TYPE_CHECKING:
    from torch import Tensor

# `fast` decodes to at least this many times the encoder's input: at 1 the scores change more than twice as much,
# at 2 hardly any photo is reduced (docs/performance.md).
_MARGIN = 1.5

_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    Raises ImageError for data that is not an image of a format that is read, or is beyond one of the limits.
    """
    if not data:
        raise ImageError(Status.DECODE_ERROR, "the image file is empty (0 bytes)")
    with _image_errors(lambda error: _why_not_an_image(data, error)):
        name = signature(data)
        if name == "TIFF":
            check_directories(data)
        image = Image.open(io.BytesIO(without_texts(data) if name == "PNG" else data), formats=read_formats(data))
        width, height = image.size
        check_size(width, height)
        if image.format in ("JPEG", "MPO"):
            check_scans(data, width * height)
        elif image.format == "JPEG2000":
            check_codestream(data)
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
    with _image_errors(_why_damaged):
        if mode != "exact" and all(preprocess.has_fast for preprocess in preprocesses):
            edge = round(_MARGIN * max(preprocess.size or 0 for preprocess in preprocesses))
            rgb, original = _fast_rgb(data, image, edge)
            return [preprocess.fast(rgb, original) for preprocess in preprocesses]
        upright = _load_upright(image)
        return [preprocess.exact(upright) for preprocess in preprocesses]


def load_rgb(data: bytes) -> Image.Image:
    """The image in a file's bytes at full size: upright, 8 bits per channel, RGB.

    Raises ImageError for data that is not an image, is damaged or is beyond one of the limits.
    """
    image, _, _ = open_image(data)
    with _image_errors(_why_damaged):
        return _load_upright(image).convert("RGB")


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
    return np.array(_load_upright(image).convert("RGB")), (height, width)


def is_upright(image: Image.Image) -> bool:
    """Whether an image needs no EXIF rotation."""
    return _orientation(image) == 1


def _load_upright(image: Image.Image) -> Image.Image:
    """The image decoded, with its EXIF rotation applied and 8 bits per channel."""
    image.load()
    check_size(*image.size)  # an icon may hold a PNG of another size than it says
    turn = _TURNS.get(_orientation(image)) if image.format != "TIFF" else None  # Pillow turns TIFFs when loading
    return to_eight_bits(image if turn is None else image.transpose(turn))


def _exchanges_edges(image: Image.Image) -> bool:
    """Whether width and height change places when the image is turned upright."""
    return _orientation(image) in _TURNED and image.format != "TIFF"  # Pillow reports a TIFF's upright size


def _orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    if exif is None and (image.format == "PNG" or (image.format == "JPEG" and "xmp" not in image.info)):
        return 1  # asking a PNG for its EXIF decodes the whole image
    try:
        if exif:
            check_directories(exif.removeprefix(b"Exif\0\0"))
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


@contextmanager
def _image_errors(sentence: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever a decoder raises into ImageError: Pillow raises nearly anything, and one file must not stop a run.

    Args:
        sentence: says why a file cannot be decoded.
    """
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(Status.TOO_LARGE, f"more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception as error:
        raise ImageError(Status.DECODE_ERROR, sentence(error)) from None


def _why_damaged(error: Exception) -> str:
    return f"the image is damaged: {error}"


def _why_not_an_image(data: bytes, error: Exception) -> str:
    if name := signature(data):
        if name == "WebP" and len(data) < (size := int.from_bytes(data[4:8], "little") + 8):
            return f"the WebP file is cut off: it has {len(data):,} of {size:,} bytes"
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        return f"a {name} file that is damaged, cut off or of a kind that cannot be read{why}"
    kind = kind_of(data)
    if kind == HEIC:
        return "a HEIC image; install `pillow-heif` to read it"
    return f"this is {kind}, not an image that can be read" if kind else "not an image in any format that is read"
