"""What an export reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        path: the folder.
        rows: pairs written.
        skipped: rows of the dataset that could not be scored, which are not exported.
        failed: rows whose image could not be read any more; listed in `failed.jsonl`.
        files: what was written, relative to `path`.
    """

    path: Path
    rows: int = 0
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bytes: int = 0
