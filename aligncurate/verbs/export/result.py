"""What `export` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from aligncurate.io.paths import AnyPath


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        path: the output folder.
        rows: number of pairs written.
        skipped: rows that were left out, because their status is neither `ok` nor `text_only`.
        failed: key and error of the rows whose image could not be read; `failed.jsonl` lists them too.
        files: the files written, relative to `path`.
        bytes: size of the exported images.
        kept_files, kept: of these, the tars that an earlier run had completed, and their number of pairs.
        nothing_new: an earlier run had finished this export, and nothing was written again.
    """

    path: AnyPath
    rows: int = 0
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    kept_files: list[str] = field(default_factory=list)
    kept: int = 0
    nothing_new: bool = False

    @property
    def new_files(self) -> list[str]:
        """The files that this run wrote."""
        kept = set(self.kept_files)
        return [file for file in self.files if file not in kept]
