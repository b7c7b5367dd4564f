"""Tells what a file is by its first bytes: its name may say something else."""

from __future__ import annotations

import bz2
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO

from aligncurate.io import storage

_HEAD = 4096  # bytes that are looked at
_INSIDE = 1024  # decompressed bytes that are looked at
_BLANK_TAR = 1 << 20  # bytes; a larger file that begins with zeros is no empty tar but a download that was never filled


@dataclass(frozen=True)
class Content:
    """What a file is.

    Attributes:
        kind: `tar`, `parquet`, `json`, `text` or `image`; `damaged` if nothing is recognised; None for anything else.
        name: what to call it in a sentence, with its article.
        advice: what to do about it, where it cannot be read.
    """

    kind: str | None
    name: str
    advice: str

    def instead_of(self, expected: str) -> str:
        """A sentence without its full stop, for a file that should be `expected`."""
        what = f"not {expected}" if self is UNKNOWN else f"this is {self.name}, not {expected}"
        return f"{what}; {self.advice}"


_COPY = "copy or download it again"
_UNPACK = "unpack it and give the folder"
_TABLE = "write it as Parquet, JSONL or CSV"
_CAPTIONS = "give its folder with a caption file beside each image, or a table that names images and captions"

EMPTY = Content("damaged", "an empty file (0 bytes)", _COPY)
TAR = Content("tar", "a tar", "use --format webdataset")
PARQUET = Content("parquet", "a Parquet file", "use --format parquet")
JSON = Content("json", "JSON", "if it is data and not the error of a server, use --format annotations")
TEXT = Content("text", "text", _COPY)
UNKNOWN = Content("damaged", "of no known format", _COPY)
_ZEROS = Content("damaged", "a file that begins with zeros, as an interrupted download leaves", _COPY)
_SPECIAL = Content(None, "a pipe, a device or a folder, not a file", "give a file")
_PAGE = Content(None, "an HTML page", "a server may have sent it in place of the file: download it again")
_XML = Content(None, "an XML document", "a server may have sent it in place of the file: download it again")
_POINTER = Content(None, "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`")
_ANNEX = Content(None, "a git-annex pointer, not the file itself", "fetch the file with `git annex get`")

_MAGIC: tuple[tuple[bytes, Content], ...] = (
    (b"PAR1", PARQUET),
    (b"PARE", Content(None, "an encrypted Parquet file", "decrypt it first")),
    (b"ARROW1\0\0", Content(None, "an Arrow (Feather) file", _TABLE)),
    (b"\xff\xff\xff\xff", Content(None, "an Arrow stream, as `datasets` saves to disk", "write it with to_parquet()")),
    (b"ORC", Content(None, "an ORC file", _TABLE)),
    (b"Obj\x01", Content(None, "an Avro file", _TABLE)),
    (b"SQLite format 3\0", Content(None, "an SQLite database", _TABLE)),
    (b"\x89HDF\r\n\x1a\n", Content(None, "an HDF5 file", _TABLE)),
    (b"\x93NUMPY", Content(None, "a NumPy array", _TABLE)),
    (b"%PDF-", Content(None, "a PDF document", "give images and their captions")),
    (b"PK\x03\x04", Content(None, "a zip archive", f"{_UNPACK} (unzip)")),
    (b"PK\x05\x06", Content(None, "an empty zip archive", _COPY)),
    (b"7z\xbc\xaf\x27\x1c", Content(None, "a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Content(None, "a RAR archive", _UNPACK)),
)
_POINTERS: tuple[tuple[bytes, Content], ...] = (
    (b"version https://git-lfs", _POINTER),
    (b"/annex/objects/", _ANNEX),
)

_IMAGES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "BMP"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(hei[cfxs]|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
)
_VIDEO = re.compile(rb"....ftyp|RIFF....AVI |\x1a\x45\xdf\xa3", re.DOTALL)


def _by_zlib(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data, _INSIDE)


def _by_bz2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, _INSIDE)


def _by_lzma(data: bytes) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 27).decompress(data, _INSIDE)


# The magic bytes of a compression, its name, the command that undoes it, and how to look inside.
_COMPRESSED: tuple[tuple[bytes, str, str, Callable[[bytes], bytes] | None], ...] = (
    (b"\x1f\x8b", "gzip", "gunzip", _by_zlib),
    (b"BZh", "bzip2", "bunzip2", _by_bz2),
    (b"\xfd7zXZ\0", "xz", "unxz", _by_lzma),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd", None),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4", None),
)


def what_is(uri: str) -> Content:
    """What the file at `uri` is, whatever its name says. Raises OSError."""
    if not storage.is_remote(uri) and Path(uri).exists() and not Path(uri).is_file():
        return _SPECIAL
    with storage.open_file(uri) as file:
        size = file.seek(0, SEEK_END)
        file.seek(0)
        return content_of(file, size)


def content_of(file: BinaryIO, size: int) -> Content:
    """What an open file of `size` bytes is. It is read from its start, and left there. Raises OSError."""
    head = file.read(_HEAD)
    file.seek(0)
    content = _recognise(head)
    return _ZEROS if content is TAR and not any(head) and size > _BLANK_TAR else content


def _recognise(head: bytes) -> Content:
    if not head:
        return EMPTY
    if _is_tar(head):  # before all others: a tar begins with the name of its first member
        return TAR
    for magic, content in _POINTERS:
        if head.startswith(magic):
            return content
    text = _is_text(head)  # which may begin with `ORC` or `PAR1`
    for magic, content in _MAGIC:
        if head.startswith(magic) and not (text and magic.isascii()):
            return content
    for magic, name, command, look_inside in _COMPRESSED:
        if head.startswith(magic) and not (text and magic.isascii()):
            return Content(None, _compressed(head, name, look_inside), f"decompress it first (`{command} -c`)")
    if image := image_format(head):
        return Content("image", f"an image ({image})", _CAPTIONS)
    if _VIDEO.match(head):
        return Content(None, "a video", "give images and their captions")
    return _text(head)


def image_format(head: bytes) -> str | None:
    """The format of an image that begins with `head`; None if it is no image of a usual format."""
    return next((name for pattern, name in _IMAGES if pattern.match(head)), None)


def _compressed(head: bytes, name: str, look_inside: Callable[[bytes], bytes] | None) -> str:
    try:
        inside = _recognise(look_inside(head)) if look_inside else UNKNOWN
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        inside = UNKNOWN
    what = {"tar": "tar", "parquet": "Parquet file", "json": "JSON file", "text": "text"}.get(inside.kind or "", "file")
    return f"a {name}-compressed {what}"


def _is_tar(head: bytes) -> bool:
    block = head[: tarfile.BLOCKSIZE]
    if block == bytes(tarfile.BLOCKSIZE):  # the end marker: a tar without members
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return False
    return True


def _is_text(head: bytes) -> bool:
    return b"\0" not in head and sum(byte >= 32 or byte in b"\t\n\r\f\x1b" for byte in head) > 0.95 * len(head)


def _text(head: bytes) -> Content:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        head = head.decode("utf-16", "replace").encode("utf-8", "replace")
    if not _is_text(head):
        return UNKNOWN
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = start[:_INSIDE].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return _PAGE
    if lower.startswith(b"<?xml"):
        return _PAGE if b"<html" in lower else _XML
    return JSON if re.match(rb"""\{\s*(["}]|$)|\[\s*([\[{"\]\d-]|$)""", start) else TEXT
