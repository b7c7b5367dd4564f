"""Limits for images, checked in the file's bytes before a decoder sees them.

They bound memory and work, not seconds: a thread that decodes cannot be stopped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np

from aligncurate.dataset.record import Status
from aligncurate.errors import ImageError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit against decompression bombs."""

MAX_SCANS = 100
"""Scans of a progressive JPEG: libtiff's limit for JPEGs inside TIFFs. Encoders write about ten."""

_LARGE_SCANS = 20  # scans of a JPEG of MAX_PIXELS; a scan costs time for every pixel, however few bytes it has

_REREAD = 16  # times that the tags of a TIFF or of EXIF may refer to the same bytes; a sound file refers to them once

_MAX_XMP = 1 << 20  # bytes; Pillow looks for the rotation in it

_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SUB_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability: those that Pillow reads for a TIFF


def check_size(width: int, height: int) -> None:
    """Raises ImageError for an image of more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise ImageError(Status.TOO_LARGE, f"{width}x{height} pixels: more than the limit of {MAX_PIXELS:,}")


def check_resized_size(width: int, height: int, short_edge: int) -> None:
    """Raises ImageError for an image so narrow (20,000 x 1, say) that resizing it would exceed MAX_PIXELS."""
    scale = short_edge / min(width, height)
    if width * height * scale * scale > MAX_PIXELS:
        raise ImageError(Status.TOO_LARGE, f"{width}x{height} pixels: too narrow to resize to {short_edge} pixels")


def check_scans(data: bytes, pixels: int) -> None:
    """Raises ImageError for a JPEG with too many scans: decoding it could take minutes."""
    limit = min(MAX_SCANS, _LARGE_SCANS * MAX_PIXELS // max(1, pixels))
    if _count_starts(data) > limit and (scans := _count_scans(data)) > limit:
        raise ImageError(Status.TOO_LARGE, f"a JPEG of {scans:,} scans: more than the limit of {limit} for its size")


def _count_starts(data: bytes) -> int:
    """How often a scan's first two bytes are in a file. Four times as fast as `bytes.count`."""
    halves = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1))
    return sum(int(np.count_nonzero(half == 0xDAFF)) for half in halves)


def _count_scans(data: bytes) -> int:
    """Scans of the first image in a JPEG, without those of the thumbnails in its segments."""
    scans, position = 0, 2
    while found := _NEXT_MARKER.search(data, position):
        marker, position = found[0][-1], found.end()
        if marker == 0xD9:  # end of the image
            break
        scans += marker == 0xDA
        if marker != 0x01 and marker != 0xD8:  # all others have a length
            position += int.from_bytes(data[position : position + 2])
    return scans


_NEXT_MARKER = re.compile(rb"\xff+[^\0\xd0-\xd7\xff]", re.DOTALL)


def check_codestream(data: bytes) -> None:
    """Raises ImageError for a JPEG 2000 whose codestream is larger than the file's header says."""
    place = data.find(b"\xff\x4f\xff\x51")
    if place >= 0 and len(data) >= place + 42:
        right, lower, left, upper = struct.unpack_from(">4I", data, place + 8)
        channels = int.from_bytes(data[place + 40 : place + 42])
        check_size(max(0, right - left), max(0, lower - upper))
        if channels > 4:
            raise ImageError(Status.DECODE_ERROR, f"a JPEG 2000 image of {channels:,} channels: use RGB or grey")


def check_directories(data: bytes) -> None:
    """Raises ImageError if the tags of a TIFF, or of EXIF in the form of one, would fill memory with copies.

    Only the directories that Pillow reads are looked at: the first one and those below it.
    """
    if sum(_tag_sizes(data)) > _REREAD * len(data):
        raise ImageError(Status.TOO_LARGE, "its tags refer to the same bytes again and again")


def _tag_sizes(data: bytes) -> Iterator[int]:
    """The bytes that each tag makes Pillow read."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    head, number, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
    try:
        pending, seen = list(struct.unpack_from(order + head, data, 8 if big else 4)), set()
        while pending:
            place = pending.pop()
            if place in seen:
                continue
            seen.add(place)
            (entries,) = struct.unpack_from(order + number, data, place)
            place += struct.calcsize(number)
            for _ in range(entries):
                tag, kind, values, offset = struct.unpack_from(order + entry, data, place)
                place += struct.calcsize(order + entry)
                if tag in _SUB_DIRECTORIES:
                    pending.append(offset)
                yield max(0, min(values * _TAG_BYTES.get(kind, 0), len(data) - offset))
    except struct.error:  # the directory is cut off: Pillow ends there as well
        return


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts and color profile, which may unpack to any size and change no pixel.

    What Pillow finds the rotation in stays: EXIF, and XMP if it is short and not compressed.
    """
    kept, start, place = [], 0, 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        name = data[place + 4 : place + 8]
        xmp = data[place + 8 : place + 28].startswith(b"XML:com.adobe.xmp\0\0") and end - place <= _MAX_XMP
        if name in (b"tEXt", b"zTXt", b"iCCP") or (name == b"iTXt" and not xmp):
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]]) if kept else data
