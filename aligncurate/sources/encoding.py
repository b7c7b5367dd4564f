"""The encoding of a text file: byte order marks, UTF-16 without one, and files from before UTF-8."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Sequence
from typing import BinaryIO

from aligncurate.errors import UserError
from aligncurate.io import storage

_HEAD = 1 << 16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}  # UTF-32 first: its mark begins with that of UTF-16
_HIGH = re.compile(rb"[\x80-\xff]+")
_LIKELY = 3  # encodings that a message names
_WESTERN = 0.7  # share of lone letters with accents among all runs of bytes that are not ASCII


class TextFile:
    """The bytes of a text file in an encoding whose lines end with the byte `\\n`.

    Files in UTF-16 and UTF-32, and with the line endings of old Macs, are held in memory as UTF-8.

    Args:
        uri: the file.
        encoding: as the user named it; otherwise it is detected.

    Attributes:
        encoding: of the bytes; `settle` corrects it once all lines have been seen.
        start: offset of the first byte after a byte order mark.
        copied: whether offsets are not those of the file itself.

    Raises UserError for an unknown encoding.
    """

    def __init__(self, uri: str, encoding: str | None) -> None:
        self._uri, self._given = uri, encoding
        self._data: bytes | None = None
        self._valid = self._invalid = self._runs = self._lone = 0
        self._sample = b""  # lines that are not UTF-8
        self.encoding, self.start = encoding or "utf-8", 0
        with storage.open_file(uri) as file:
            head = file.read(_HEAD)
        if encoding is None:
            for mark, name in _MARKS.items():
                if head.startswith(mark):
                    self.encoding, self.start = name, len(mark)
                    break
            else:
                self.encoding = _without_mark(head) or "utf-8"
        elif not _is_known(encoding):
            raise UserError(f"--encoding {encoding}: unknown; use a name such as utf-8, cp1252, gb18030 or shift_jis.")
        elif head.startswith(codecs.BOM_UTF8):
            self.start = len(codecs.BOM_UTF8)
        macintosh = b"\r" in head and b"\n" not in head
        if macintosh or "a\n".encode(self.encoding) != b"a\n":
            self._copy()

    @property
    def copied(self) -> bool:
        return self._data is not None

    def open(self, offset: int | None = None) -> BinaryIO:
        """The file at `offset`, by default at the first line."""
        file = storage.open_file(self._uri) if self._data is None else io.BytesIO(self._data)
        file.seek(self.start if offset is None else offset)
        return file

    def decode(self, line: bytes) -> str:
        """A line as text; bytes that its encoding does not have become lone surrogates."""
        return line.decode(self.encoding, "surrogateescape")

    def observe(self, line: bytes) -> None:
        """Take note of a line, for `settle`."""
        if line.isascii():
            return
        try:
            line.decode()
            self._valid += 1
        except UnicodeDecodeError:
            self._invalid += 1
            if len(self._sample) < _HEAD:
                self._sample += line[:_HEAD]
            runs = _HIGH.findall(line)
            self._runs += len(runs)
            self._lone += sum(len(run) == 1 for run in runs)

    def settle(self) -> str | None:
        """Choose the encoding by all lines that were observed.

        Returns what to tell the user, if anything: where no line is UTF-8, that the file is taken for one from Windows
        in a Western language, or which encodings are likely; none of these is chosen.
        """
        if self._given is not None or self._invalid <= self._valid or self._data is not None:
            return None
        likely = _likely(self._sample)
        if self._valid or self._lone <= _WESTERN * self._runs:
            lines = f"{self._invalid:,} line{' is' if self._invalid == 1 else 's are'}"
            if not likely:
                return f"{self._uri}: {lines} not UTF-8; name the file's encoding with --encoding."
            others = f" (or {', '.join(likely[1:])})" if likely[1:] else ""
            return f"{self._uri}: {lines} not UTF-8; the file is likely --encoding {likely[0]}{others}."
        self.encoding = "cp1252"
        other = f", for example to {likely[0]}" if likely and "cp1252" not in likely else ""
        return f"{self._uri}: not UTF-8; read as cp1252 (Western Windows). Set --encoding{other} if accents are wrong."

    def decode_again(self, texts: Sequence[str]) -> list[str]:
        """Texts that were decoded as UTF-8, in the encoding that `settle` chose."""
        return [self.decode(text.encode("utf-8", "surrogateescape")) for text in texts]

    def _copy(self) -> None:
        data = storage.read(self._uri)[self.start :]
        try:
            text = data.decode(self.encoding, "surrogatepass" if self.encoding.startswith("utf") else "surrogateescape")
        except UnicodeDecodeError:
            text = data.decode(self.encoding, "replace")
        text = text.removeprefix("\ufeff")
        if "\n" not in text:
            text = text.replace("\r", "\n")
        self._data = text.encode("utf-8", "surrogatepass")
        self.encoding, self.start = "utf-8", 0


def _is_known(name: str) -> bool:
    try:
        codecs.lookup(name)
        return isinstance("a".encode(name), bytes)
    except (LookupError, ValueError, TypeError):
        return False


def _likely(sample: bytes) -> list[str]:
    """Some encodings in which text is likely to have these bytes, the likeliest first."""
    from charset_normalizer import from_bytes  # reads tables of all languages

    return [match.encoding for match in from_bytes(sample, enable_fallback=False)][:_LIKELY]


def _without_mark(head: bytes) -> str | None:
    """UTF-16 of mostly ASCII text has a zero in every second byte."""
    half = len(head) // 2
    if half < 2:
        return None
    if head[1::2].count(0) > 0.6 * half and head[::2].count(0) < 0.1 * half:
        return "utf-16-le"
    if head[::2].count(0) > 0.6 * half and head[1::2].count(0) < 0.1 * half:
        return "utf-16-be"
    return None
