"""JPEGs decoded, resized and cut on a GPU, for `--decode gpu`; what it cannot take is left to the CPU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aligncurate.images.decode import Preprocess, fit, upright

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def decodable(data: bytes, image: Image.Image, wanted: Sequence[Preprocess]) -> bool:
    """Whether a file is one for the GPU: a whole, upright, grey or colour JPEG, for encoders that `fit` serves.

    A GPU's decoder makes something of a JPEG that was cut short, where Pillow would call it damaged.
    """
    whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and upright(image)
    return whole and plain and all(preprocess.has_fast for preprocess in wanted)


def decode_jpegs(files: Sequence[bytes], wanted: Sequence[Preprocess], device: "torch.device") -> "list[list[Tensor]]":
    """Pixels of JPEGs for each encoder, uint8 [3, size, size] on `device`.

    nvJPEG through torchvision on a GPU, libjpeg on the CPU. Raises RuntimeError when any of them is damaged.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    raw = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in files]
    images: Any = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
    return [[_fitted(image, preprocess) for preprocess in wanted] for image in images]


def _fitted(image: "Tensor", preprocess: Preprocess) -> "Tensor":
    import torch

    height, width = image.shape[1:]
    resized = fit(image.float(), (height, width), preprocess.size or 0, preprocess.interpolation)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
