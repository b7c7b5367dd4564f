"""Checks the images of a part: the bytes behind each row's pointer against the row's sha256."""

from __future__ import annotations

from collections.abc import Callable

from aligncurate.dataset.part import open_part
from aligncurate.dataset.pointers import POINTER_COLUMNS, ChangedImageError, Pointer, read_images
from aligncurate.dataset.record import Status
from aligncurate.io.paths import AnyPath
from aligncurate.verbs.verify.result import BadImage, ImageProblem

_BATCH = 256  # rows at a time: they may hold their images


def check_images(folder: AnyPath, file: AnyPath, check: Callable[[], None]) -> tuple[int, list[BadImage]]:
    """Read every image of a part: how many there are, and those that are not what the part says.

    Images without a sha256 are those of rows that failed, and are not read; a row that is `ok` has one.
    """
    images, bad = 0, []
    with open_part(file) as part:
        wanted = [n for n in (*POINTER_COLUMNS, "key", "status", "image") if n in part.schema_arrow.names]
        for batch in part.iter_batches(_BATCH, columns=wanted, use_threads=False):
            check()
            rows = [row for row in batch.to_pylist() if _has_image(row)]
            images += len(rows)
            for row, data in zip(rows, read_images(rows), strict=True):
                if data is None or isinstance(data, OSError):
                    pointer = Pointer.of(row)
                    problem, error = _problem(data)
                    home = (pointer and pointer.file) or str(file)
                    bad.append(BadImage(str(folder), str(file), row["key"] or "", home, problem, error))
    return images, bad


def _has_image(row: dict[str, object]) -> bool:
    return row["status"] == Status.OK or (row["sha256"] is not None and row["status"] != Status.URL_ONLY)


def _problem(error: OSError | None) -> tuple[ImageProblem, str]:
    if error is None:
        return "unreadable", "the row does not say where its image is"
    what: ImageProblem = "unreadable"
    if isinstance(error, FileNotFoundError):
        what = "missing"
    elif isinstance(error, ChangedImageError):
        what = "changed"
    return what, error.strerror or str(error)
