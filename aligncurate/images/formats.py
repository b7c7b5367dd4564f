"""Image file formats: which are read, what any file is by its first bytes, file extensions, ways to decode."""

from __future__ import annotations

import io
import re
from functools import cache
from typing import Literal

_EXTENSION_OF = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "DIB": "bmp",
    "TIFF": "tif", "PPM": "ppm", "AVIF": "avif", "JPEG2000": "jp2", "ICO": "ico", "TGA": "tga", "HEIF": "heic",
}  # fmt: skip
EXTENSIONS = frozenset(
    {*_EXTENSION_OF.values(), "jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm", "j2k", "jpx"}
    | {"heif", "jxl", "pcx", "dds", "qoi"}
)
"""Extensions of files that are taken for images, in lower case and without the dot; not all of them can be read."""

DecodeMode = Literal["exact", "fast", "gpu"]
"""`exact` follows open_clip's own preprocessing; `fast` decodes large JPEGs at reduced size and resizes in uint8;
`gpu` decodes JPEGs on the GPU and everything else as `fast` does."""

# Pillow's other formats are not tried: some start programs (EPS), and nobody's images are in them. TGA has no
# signature, so it comes last. MPO is read as JPEG.
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")

HEIC = "a HEIC image"


def _compiled(patterns: dict[str, bytes]) -> dict[str, re.Pattern[bytes]]:
    return {name: re.compile(pattern, re.DOTALL | re.IGNORECASE) for name, pattern in patterns.items()}


_READ_SIGNATURES = _compiled(
    {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG",
        "WebP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM.{4}\0{4}",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "AVIF": rb"....ftyp(avi[fs]|.{4,40}avi[fs])",
        "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    }
)
_OTHER_SIGNATURES = _compiled(
    {
        HEIC: rb"....ftyp(hei[cxms]|hev[cxms]|mi[fa]\d.{4,40}he(ic|ix|vc))",
        "a video": rb"....ftyp|....(moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01[\xb3\xba]|0&\xb2u",
        "an audio file": rb"ID3|OggS|fLaC|RIFF....WAVE|\xff\xfb",
        "a PostScript (EPS) file": rb"\s*%!PS|\xc5\xd0\xd3\xc6",
        "a PDF document": rb"\s*%PDF",
        "an SVG drawing": rb"\s*(<\?xml.*?)?<svg",
        "a Photoshop (PSD) file": rb"8BP[SB]",
        "a GIMP (XCF) file": rb"gimp xcf",
        "a JPEG XL image": rb"\xff\x0a|\0\0\0\x0cJXL ",
        "a QOI image": rb"qoif",
        "a DDS texture": rb"DDS ",
        "an OpenEXR image": rb"v/1\x01",
        "a Radiance HDR image": rb"#\?(RADIANCE|RGBE)",
        "a Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
        "an Apple icon (ICNS)": rb"icns",
        "a Photo CD, PCX or DCX image": rb"\x0a[\0-\x05]\x01[\x01\x02\x04\x08]|\xb1\x68\xde\x3a",
        "a FITS file": rb"SIMPLE  =",
        "a DICOM file": rb".{128}DICM",
        "an HDF5 file": rb"\x89HDF",
        "a NumPy file": rb"\x93NUMPY",
        "a Parquet file": rb"PAR1",
        "a zip archive": rb"PK[\x03\x05]",
        "a gzip file": rb"\x1f\x8b",
        "a Git LFS pointer (run `git lfs pull`)": rb"version https://git-lfs",
        "a web page": rb"\s*(<!doctype|<html|<head)",
        "a web page or XML": rb"\s*<\?xml",
        "text": rb"[\t\n\r\x20-\x7e]*$",
    }
)


def read_formats(data: bytes | memoryview) -> tuple[str, ...]:
    """Pillow's names of the formats that `data` is tried as."""
    is_heic = _OTHER_SIGNATURES[HEIC].match(data) and not signature(data)
    return ("HEIF",) if is_heic and _has_heif() else _READ


def kind_of(data: bytes | memoryview) -> str | None:
    """What a file is that is not read as an image, such as `a PDF document`; None for all others.

    Raises nothing, whatever the bytes.
    """
    head = bytes(data[:256])
    if signature(head):
        return None
    return next((kind for kind, pattern in _OTHER_SIGNATURES.items() if pattern.match(head)), None)


def signature(data: bytes | memoryview) -> str | None:
    """The name of the image format that the first bytes announce, such as `PNG`, among those that are read."""
    head = bytes(data[:64])
    for name, pattern in _READ_SIGNATURES.items():
        if pattern.match(head):
            return name
    return None


@cache
def _has_heif() -> bool:
    """Whether Pillow reads HEIC: `pillow-heif` is installed, and told to Pillow by this call."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def extension(data: bytes | memoryview) -> str | None:
    """The usual extension for the image format of `data`, without the dot; None when it is not an image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=read_formats(data)) as image:
            return _EXTENSION_OF[str(image.format)]
    except Exception:  # Pillow raises nearly anything for broken files
        return None
