"""A part's receipt: what it holds, and what it was made from. Written after the part, it commits it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from aligncurate.dataset.checked import count, take
from aligncurate.dataset.record import NOT_FAILED, Status
from aligncurate.errors import UserError
from aligncurate.io.files import parse_json
from aligncurate.io.paths import AnyPath
from aligncurate.levels import check_counts

DATA = "data"
"""Folder of the parts: nothing but Parquet, so that other tools open it."""

RECEIPTS = ".receipts"
"""Hidden, because Hugging Face `datasets` would read it as data."""

SCORE_COUNTS = "score_counts"

UNKNOWN_SHARD = {"unknown": True}
"""The shard in a receipt that `verify --repair` wrote for an intact part; the run after it fills in the right one."""

_PART_NAME = re.compile(r"(data/)?part-\d{5,19}\.parquet")  # earlier versions wrote parts on top
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KNOWN = ("name", "rows", "ok", "failed", "bytes", "sha256", "statuses")


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one part.

    Attributes:
        name: of its file, relative to the dataset's folder.
        facts: what the verb noted. Counts of scores (`score_counts`) stay in the receipt; the manifest has their sum.
    """

    name: str
    rows: int
    bytes: int
    sha256: str
    statuses: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> int:
        return self.statuses.get(Status.OK, 0)

    @property
    def failed(self) -> int:
        return self.rows - sum(self.statuses.get(s, 0) for s in NOT_FAILED)

    def without_counts(self) -> Self:
        """The same without counts of scores, of which a long run would hold too many."""
        return replace(self, facts={name: fact for name, fact in self.facts.items() if name != SCORE_COUNTS})

    def to_json(self) -> dict[str, Any]:
        """The part's line in the manifest."""
        line = {"name": self.name, "rows": self.rows, "ok": self.ok, "failed": self.failed, "bytes": self.bytes}
        line |= {"sha256": self.sha256, "statuses": self.statuses}
        return line | self.without_counts().facts

    @classmethod
    def from_json(cls, line: Any) -> Self:
        """Read what `to_json` returns. Raises ValueError when a field is missing or impossible."""
        name, digest = take(line, "name", str), take(line, "sha256", str)
        if not _PART_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a part")
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{name}: sha256 is not 64 hex digits")
        statuses = {status: count(line["statuses"], status) for status in take(line, "statuses", dict)}
        rows = count(line, "rows")
        if rows != sum(statuses.values()):
            raise ValueError(f"{name}: {rows} rows, but {sum(statuses.values())} by status")
        facts = {k: v for k, v in line.items() if k not in _KNOWN}
        return cls(name, rows, count(line, "bytes"), digest, statuses, facts)


@dataclass(frozen=True)
class Receipt:
    """What commits a part.

    Attributes:
        part: what it holds.
        shard: what it was made from: the shard's file and rows, and what its source knows of the file.
        options: digest of what all parts of the dataset share.
    """

    part: PartInfo
    shard: dict[str, Any]
    options: str

    def to_json(self) -> dict[str, Any]:
        counts = {k: v for k, v in self.part.facts.items() if k == SCORE_COUNTS}
        return {**self.part.to_json(), **counts, "shard": self.shard, "options": self.options}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` returns. Raises ValueError when a field is missing or impossible."""
        shard, options = take(data, "shard", dict), take(data, "options", str)
        for counts in take({SCORE_COUNTS: {}, **data}, SCORE_COUNTS, dict).values():
            check_counts(counts)
        return cls(PartInfo.from_json({k: v for k, v in data.items() if k not in ("shard", "options")}), shard, options)


def part_name(index: int) -> str:
    """Name of the part that input shard `index` becomes, relative to the dataset's folder."""
    return f"{DATA}/part-{index:05d}.parquet"


def receipt_name(index: int) -> str:
    """Name of the receipt of part `index`, relative to the dataset's folder."""
    return f"{RECEIPTS}/part-{index:05d}.json"


def mend(folder: AnyPath) -> str:
    """What to do about a damaged file of the dataset in `folder`, for the end of a sentence."""
    return f"mend it with `aligncurate verify {shlex.quote(str(folder))} --repair`"


def read_receipt(folder: AnyPath, index: int) -> Receipt | None:
    """The receipt of part `index`; None if there is none, or an empty one. Raises UserError when it is damaged."""
    file = folder / receipt_name(index)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    if not data:  # a power cut came before its bytes were on disk
        return None
    try:
        receipt = Receipt.from_json(parse_json(data, file))
    except UserError as error:  # no JSON object
        raise UserError(f"{str(error).rpartition(';')[0]}; {mend(folder)}.") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); {mend(folder)}.") from None
    if receipt.part.name != part_name(index):
        raise UserError(f"{file}: damaged (it names {receipt.part.name}); {mend(folder)}.")
    return receipt
