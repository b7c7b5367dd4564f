"""The options of `filter`, stated once for the command line, the function and the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from aligncurate.errors import UserError
from aligncurate.settings import check, setting

Prefer = Literal["best", "first"]


@dataclass(frozen=True)
class FilterOptions:
    """Options of `filter`, in the order in which they are applied. Raises UserError for values that cannot be used."""

    where: str | None = setting("Keep rows for which this SQL expression is true.", None)
    uids: str | None = setting("Keep rows whose uid is in this .npy file, as DataComp publishes them.", None)
    levels: str | None = setting("Levels to keep: 5-8 or 1,3,7-8.", None)
    min_score: float | None = setting("Keep rows that score at least this.", None)
    max_score: float | None = setting("Keep rows that score at most this.", None)
    one_per_image: Prefer | None = setting(
        "Keep one row of each image: the best by score, or the first that can be used.", None
    )
    top_fraction: float | None = setting("Keep exactly this fraction of the scored rows, the best ones.", None)
    sample: int | None = setting("Keep N random rows.", None, at_least=1)
    seed: int = setting("Seed for --sample.", 0, at_least=0, at_most=2**64 - 1)
    score_column: str = setting("Column with the scores.", "score")
    rows_per_part: int | None = setting(
        "Fill parts with N rows each, instead of one part for each part of the input.", None, at_least=1
    )

    def __post_init__(self) -> None:
        check(self)
        for name, bound in (("--min-score", self.min_score), ("--max-score", self.max_score)):
            if bound is not None and not math.isfinite(bound):
                raise UserError(f"{name} {bound}: use a finite number.")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise UserError(f"--min-score {self.min_score} is above --max-score {self.max_score}; no row can match.")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise UserError(f"--top-fraction {self.top_fraction}: use a number above 0 and up to 1.")

    @property
    def keeps_all(self) -> bool:
        """Whether no option leaves out a row."""
        chosen = {**vars(self), "seed": None, "score_column": None, "rows_per_part": None}
        return all(value is None for value in chosen.values())

    @property
    def needs_scores(self) -> bool:
        """Whether an option looks at the scores."""
        by_score = self.min_score is not None or self.max_score is not None or self.top_fraction is not None
        return by_score or self.one_per_image == "best"
