"""Images as the model's pixels: made square, resized and normalised, as in the official code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aligncurate.images.limits import MAX_PIXELS

IMAGE_MODES = ("pad", "crop")


def pixels_of(images: Sequence[Image.Image], image_processor: Any, size: int, mode: str) -> Tensor:
    """Images as normalised pixels, float32 [I, 3, size, size].

    Resized by Pillow, as in the official code, whatever backend the image processor uses.

    Args:
        images: Pillow images of any mode.
        image_processor: the vision tower's; its mean, standard deviation and resampling are used.
        size: side length in pixels.
        mode: ``pad`` to a square in the mean colour, or ``crop`` the centre square.
    """
    mean, std = (np.array(v, np.float32) for v in (image_processor.image_mean, image_processor.image_std))
    pixels = np.empty((len(images), 3, size, size), np.float32)
    for number, image in enumerate(images):
        square = _square(image.convert("RGB"), mode, mean, size, image_processor.resample)
        pixels[number] = ((np.asarray(square, np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _square(image: Image.Image, mode: str, mean: Any, size: int, resample: int) -> Image.Image:
    short, long = sorted(image.size)
    if mode == "pad" and long * long > MAX_PIXELS:
        # Cut or shrink a very long image first: its padded square or resized form would not fit in memory.
        image = image.resize([max(1, edge * size // long) for edge in image.size], Image.Resampling(resample))
    elif mode == "crop" and long * size * size > MAX_PIXELS * short:
        left, top = ((edge - min(edge, 3 * short)) // 2 for edge in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    if mode == "pad" and image.width != image.height:
        side = max(image.size)
        colour = tuple(int(channel * 255) for channel in mean.tolist())
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    short = min(image.size)
    width, height = (size * edge // short for edge in image.size)
    resized = image.resize((width, height), Image.Resampling(resample))
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))
