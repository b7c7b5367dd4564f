"""Size limits for images, checked before any pixel is decoded."""

from __future__ import annotations

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs."""


def check_size(width: int, height: int) -> None:
    """Raises ImageError for an image of more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise ImageError(Status.TOO_LARGE, f"{width}x{height} pixels: more than the limit of {MAX_PIXELS:,}")


def check_resized_size(width: int, height: int, short_edge: int) -> None:
    """Raises ImageError for an image so narrow (20,000 x 1, say) that resizing it would exceed MAX_PIXELS."""
    scale = short_edge / min(width, height)
    if width * height * scale * scale > MAX_PIXELS:
        raise ImageError(Status.TOO_LARGE, f"{width}x{height} pixels: too narrow to resize to {short_edge} pixels")
