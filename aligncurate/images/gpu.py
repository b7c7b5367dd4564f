"""JPEGs decoded, resized and cropped on a GPU, for `--decode gpu`; other files are decoded on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aligncurate.images.decode import is_upright
from aligncurate.images.preprocess import Preprocess, resize_and_crop

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def decodable(data: bytes, image: Image.Image, preprocesses: Sequence[Preprocess]) -> bool:
    """Whether the GPU can decode a file: a complete, upright, grey or color JPEG, for encoders with fast resizing.

    A GPU's decoder accepts a truncated JPEG, which Pillow would call damaged, so the end marker is checked here.
    """
    complete = data.rstrip(b"\0").endswith(b"\xff\xd9")
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and is_upright(image)
    return complete and plain and all(preprocess.has_fast for preprocess in preprocesses)


def decode_jpegs(
    files: Sequence[bytes], preprocesses: Sequence[Preprocess], device: torch.device
) -> list[list[Tensor]]:
    """Pixels of JPEGs for each kind of preprocessing, uint8 [3, size, size] on `device`.

    nvJPEG through torchvision on a GPU, libjpeg on the CPU. Raises RuntimeError when any of them is damaged.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    raw = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in files]
    images: Any = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
    return [[_resize(image, preprocess) for preprocess in preprocesses] for image in images]


def _resize(image: Tensor, preprocess: Preprocess) -> Tensor:
    import torch

    height, width = image.shape[1:]
    resized = resize_and_crop(image.float(), (height, width), preprocess.size or 0, preprocess.interpolation)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
