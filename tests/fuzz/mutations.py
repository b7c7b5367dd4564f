"""Random damage to bytes."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 1 << 63)
_TEXTS = (
    b"1e999", b"-1", b"99999999999999999999999999", b"NaN", b"Infinity", b"null", b"true", b'""', b"{}", b"[]",
    b'"\\ud800"', b'"\\u0000"', b'"\\u001b[31m\\u202e"', b"[" * 3000, b'{"a":' * 2000, b'"' + b"x" * 70_000 + b'"',
    b"../../../etc/passwd", b"/proc/self/environ", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x00", b'"', b",", b"\t",
)  # fmt: skip
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')


@dataclass(frozen=True)
class Damage:
    """Damaged bytes.

    Attributes:
        data: the bytes.
        first: the first byte that may differ from the original.
        what: in words.
    """

    data: bytes
    first: int
    what: str


def damage(data: bytes, rng: random.Random, *, text: bool = False) -> Damage:
    """Damage `data` in one random way; as `text`, often by another value in place of a JSON value or a word."""
    ways = [_flip, _flip, _truncate, _zero, _delete, _repeat, _insert, _extreme, _extreme]
    if text:
        ways += [_value] * 9
    done = rng.choice(ways)(data, rng)
    return done if done.data != data else _truncate(data, rng)


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(max(1, len(data)))
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 512, 4096)))


def _flip(data: bytes, rng: random.Random) -> Damage:
    changed = bytearray(data)
    places = sorted(rng.randrange(max(1, len(data))) for _ in range(rng.choice((1, 1, 2, 8))))
    for place in places:
        if changed:
            changed[place] ^= 1 << rng.randrange(8)
    return Damage(bytes(changed), places[0], f"bits flipped at {places}")


def _truncate(data: bytes, rng: random.Random) -> Damage:
    at = rng.randrange(max(1, len(data)))
    return Damage(data[:at], at, f"cut at {at}")


def _zero(data: bytes, rng: random.Random) -> Damage:
    start, stop = _span(data, rng)
    return Damage(data[:start] + bytes(stop - start) + data[stop:], start, f"zeros at {start}..{stop}")


def _delete(data: bytes, rng: random.Random) -> Damage:
    start, stop = _span(data, rng)
    return Damage(data[:start] + data[stop:], start, f"deleted {start}..{stop}")


def _repeat(data: bytes, rng: random.Random) -> Damage:
    start, stop = _span(data, rng)
    return Damage(
        data[:stop] + data[start:stop] * rng.choice((1, 2, 20)) + data[stop:], stop, f"repeated {start}..{stop}"
    )


def _insert(data: bytes, rng: random.Random) -> Damage:
    start, _ = _span(data, rng)
    junk = rng.randbytes(rng.choice((1, 3, 16, 700)))
    return Damage(data[:start] + junk + data[start:], start, f"{len(junk)} random bytes at {start}")


def _extreme(data: bytes, rng: random.Random) -> Damage:
    start = rng.randrange(max(1, len(data)))
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    number = (rng.choice(_EXTREMES) & ((1 << 8 * size) - 1)).to_bytes(size, order)  # type: ignore[arg-type]
    return Damage((data[:start] + number + data[start + size :])[: len(data)], start, f"{number.hex()} at {start}")


def _value(data: bytes, rng: random.Random) -> Damage:
    values = list(_VALUE.finditer(data))
    if not values:
        return _insert(data, rng)
    match, new = rng.choice(values), rng.choice(_TEXTS)
    shown = new if len(new) < 40 else new[:40] + b"..."
    return Damage(data[: match.start()] + new + data[match.end() :], match.start(), f"{shown!r} for {match[0][:40]!r}")
