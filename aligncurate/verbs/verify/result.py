"""What `verify` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Mend = Literal["part", "receipt", "thresholds", "rerun"]
"""How a file is mended: its part is made again, the file is written again, or the verb runs again to finish."""

ImageProblem = Literal["missing", "changed", "unreadable"]


@dataclass(frozen=True)
class Damage:
    """A file of a dataset that is not as it should be.

    Attributes:
        dataset: the folder.
        file: the file.
        problem: what is wrong, in words that go on from the file's name.
        mend: what `--repair` does about it; None if it cannot, then `problem` says what can be done.
        part: number of the part that it concerns, if it is one.
    """

    dataset: str
    file: str
    problem: str
    mend: Mend | None
    part: int | None = None


@dataclass(frozen=True)
class BadImage:
    """An image whose bytes are not those that the dataset was made from.

    Attributes:
        dataset: the folder.
        part: the file that has the row.
        key: of the row.
        file: that holds the image.
        problem: missing, changed, or unreadable.
        error: one sentence on what is wrong.
    """

    dataset: str
    part: str
    key: str
    file: str
    problem: ImageProblem
    error: str


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found in one or more datasets.

    Attributes:
        datasets: the folders.
        parts, rows, bytes: that are there and were checked.
        images: how many were read; None without `deep`.
        damages: damaged files that are left, in order.
        bad_images: images that are not those of the dataset, in order.
        repaired: files that were damaged and are whole again.
        notes: sentences on what is worth knowing, such as why a repair was not possible.
    """

    datasets: list[str]
    parts: int
    rows: int
    bytes: int
    images: int | None
    damages: list[Damage]
    bad_images: list[BadImage]
    repaired: list[str]
    notes: list[str]

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages and not self.bad_images

    @property
    def repairable(self) -> list[str]:
        """The datasets that `--repair` can mend, as far as is known before it is tried."""
        return list(dict.fromkeys(damage.dataset for damage in self.damages if damage.mend is not None))

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        return {"whole": self.whole, **asdict(self)}
