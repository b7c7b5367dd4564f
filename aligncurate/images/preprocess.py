"""An encoder's preprocessing: open_clip's own, or a faster one that is nearly the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError
from aligncurate.images.limits import check_resized_size

if TYPE_CHECKING:
    from torch import Tensor

_FAST = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocess:
    """How an encoder's images are preprocessed.

    Attributes:
        transform: open_clip's own: a Pillow image to a float tensor [3, size, size].
        size: edge of the square input, in pixels; None if the input is not square.
        mean, std: per channel, of values in 0..1.
        resize_mode: `shortest`, `longest` or `squash`, as open_clip names them.
        interpolation: `bicubic` or `bilinear`.
    """

    transform: Callable[[Image.Image], Tensor]
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str
    interpolation: str

    @classmethod
    def of(cls, transform: Any, config: dict[str, Any]) -> Preprocess:
        """From open_clip's transform and its preprocessing config."""
        size = config["size"]
        if not isinstance(size, int):
            size = size[0] if size[0] == size[1] else None
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return cls(transform, size, mean, std, config["resize_mode"], config["interpolation"])

    def exact(self, image: Image.Image) -> Tensor:
        """Pixels as a plain open_clip loop makes them, uint8 [3, size, size] before normalization.

        A transform that does not end in ToTensor and Normalize gives its own floats.
        """
        import torch

        steps = getattr(self.transform, "transforms", [])
        if not _ends_in_normalize(steps):
            return self.transform(image)
        for step in steps[:-2]:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def fast(self, rgb: NDArray[np.uint8], original: tuple[int, int]) -> Tensor:
        """Nearly the same pixels in less time: torch resizes in uint8 with vector instructions.

        Args:
            rgb: the image [height, width, 3], possibly decoded at reduced size.
            original: its height and width at full size.
        """
        import torch

        return resize_and_crop(torch.from_numpy(rgb).permute(2, 0, 1), original, self.size or 0, self.interpolation)

    @property
    def pixels_id(self) -> str:
        """Equal for encoders that take the same pixels, however they normalize them."""
        steps = getattr(self.transform, "transforms", None)
        return repr(steps[:-2] if steps and _ends_in_normalize(steps) else self.transform)

    @property
    def has_fast(self) -> bool:
        """Whether `fast` supports this preprocessing; any other is decoded exactly instead."""
        return self.size is not None and self.resize_mode == "shortest" and self.interpolation in _FAST

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels [..., 3, H, W] as float32: uint8 normalized as open_clip does it, floats unchanged."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def check(self, width: int, height: int) -> None:
        """Raises ImageError for an image that would not fit in memory once resized."""
        if self.size is not None and self.resize_mode == "shortest":
            check_resized_size(width, height, self.size)


def _ends_in_normalize(steps: Sequence[Any]) -> bool:
    """Whether a transform ends in ToTensor and Normalize, which `Preprocess.normalize` does for a whole batch."""
    from torchvision.transforms import Normalize, ToTensor

    return len(steps) >= 2 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize)


def resize_and_crop(image: Tensor, original: tuple[int, int], size: int, interpolation: str) -> Tensor:
    """An image [3, H, W] resized to a short edge of `size` and center-cropped to a square, as open_clip does it.

    uint8 or float, on any device; the result [3, size, size] has the same dtype. `original` is the full height
    and width of an image that was decoded at reduced size: it decides how the long edge is rounded.
    """
    from torch.nn.functional import interpolate

    short = min(original)
    tall, wide = (max(size, int(size * edge / short)) for edge in original)
    if (tall, wide) != tuple(image.shape[1:]):
        image = interpolate(image[None], (tall, wide), mode=interpolation, antialias=True)[0]
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return image[:, top : top + size, left : left + size]


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 12, 16 or 32 bits, or of floats, scaled to 8 bits; all others as they are.

    Pillow's own conversion would clip nearly all of them to white or black. Floats from 0 to 1 are multiplied by 255,
    floats and 32-bit integers from 0 to 255 are kept, and 32-bit integers up to 65,535 are taken for 16-bit ones.

    Raises ImageError for other values, whose scale nobody knows, and for CIELAB.
    """
    if image.mode == "LAB":
        raise ImageError(Status.DECODE_ERROR, "a CIELAB image cannot be converted to RGB; save it as RGB")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.uint16 if image.mode.startswith("I;16") else None)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        values = values >> (4 if _is_twelve_bit(image) else 8)
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif image.mode == "I" and low >= 0 and (255 < high <= 65_535 or image.format == "PPM"):
        values = values >> 8
    elif not (low >= 0 and high <= 255):  # also for NaN
        what = f"{'float' if image.mode == 'F' else '32-bit'} pixels from {low:.6g} to {high:.6g}"
        raise ImageError(Status.DECODE_ERROR, f"{what}: their scale is unknown; save the image with 8 or 16 bits")
    return Image.fromarray(values.astype(np.uint8))


def _is_twelve_bit(image: Image.Image) -> bool:
    """Whether a TIFF has 12 bits per pixel (tag 258), which Pillow gives as 0 to 4,095."""
    return image.format == "TIFF" and getattr(image, "tag_v2", {}).get(258) == (12,)
