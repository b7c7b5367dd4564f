"""The options of `join`, stated once for the command line, the function and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aligncurate.settings import check, setting


@dataclass(frozen=True)
class JoinOptions:
    """Options of `join`. Raises UserError for values that cannot be used."""

    on: str = setting("Column of both that says which rows belong together: key, uid, url or another.", "key")
    columns: tuple[str, ...] | None = setting("Columns to add, separated by commas.", None, shown="all of the table's")
    duplicates: Literal["refuse", "first"] = setting("Rows of the table with the same value in --on.", "refuse")

    def __post_init__(self) -> None:
        check(self)
