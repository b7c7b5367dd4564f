"""How to read a source, as the command line and `open_source` take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from aligncurate.settings import check, setting

Format = Literal["webdataset", "parquet", "annotations", "table", "imagefolder", "dataset"]
Several = Literal["all", "first"]
"""What becomes of several captions in one field: a pair for each, or one for the first."""

FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; None is auto-detected. Raises UserError for values that cannot be used."""

    format: Format | None = setting("Input format.", None, group="Source", shown="auto-detected")
    caption_column: str | None = setting("Column, field or file ending of the caption.", None, shown="auto-detected")
    image_column: str | None = setting("Column, field or file ending of the image.", None, shown="auto-detected")
    image_root: str | None = setting(
        "Folder that image paths are relative to, or a tar (or a folder of tars) that holds the images.",
        None,
        shown="next to the input file",
    )
    captions: Several = setting(
        "Several captions of a row, or of an image in COCO: a pair for each of them, or one for the first.", "all"
    )
    separator: str | None = setting("Column separator of CSV and TSV files.", None, shown="auto-detected")
    encoding: str | None = setting("Encoding of CSV and TSV files, e.g. cp1252.", None, shown="auto-detected")
    columns: tuple[str, ...] | None = setting(
        "Column names of a CSV or TSV file without a header line, separated by commas.", None, shown="auto-detected"
    )
    rows_per_shard: int = setting("Rows of a big file that go into one part.", 10_000, at_least=1)

    timeout: float = setting(
        "Seconds that a remote request may take; it is tried four times.", 30.0, recorded=False, at_least=0.1
    )

    def __post_init__(self) -> None:
        check(self)
