"""What `verify` prints: a line for each damaged file, what is whole, and the command that mends the rest."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.text import Text

from aligncurate.progress import count, safe_text
from aligncurate.verbs.verify.result import BadImage, VerifyResult

_KEYS = 5  # of the bad images of a file; --json lists all

_SAYS = {"missing": "not there", "changed": "not the one of the dataset", "unreadable": "unreadable"}


def render_verified(result: VerifyResult, *, repaired: bool) -> Text:
    """The result for a terminal; `repaired` says that a repair was tried."""
    text = Text()
    for file in result.repaired:
        text.append(f"{safe_text(file)}: mended\n", "green")
    for damage in result.damages:
        text.append(safe_text(f"{damage.file}: {damage.problem}") + "\n", "red")
    for line in _image_lines(result.bad_images):
        text.append(safe_text(line) + "\n", "red")
    for note in result.notes:
        text.append(safe_text(note) + "\n", "yellow")
    images = "" if result.images is None else f", {count(result.images, 'image')}"
    checked = f"{count(result.parts, 'part')}, {count(result.rows, 'row')}{images} in {', '.join(result.datasets)}"
    if result.whole:
        return text.append(safe_text(f"whole: {checked}"))
    files = len({damage.file for damage in result.damages}) + len({image.file for image in result.bad_images})
    text.append(safe_text(f"damaged: {count(files, 'file')}; checked {checked}"))
    if result.repairable and not repaired:
        folders = " ".join(map(shlex.quote, result.repairable))
        text.append(f"\nmend with: aligncurate verify {safe_text(folders)} --repair")
    if result.bad_images:
        text.append(
            "\nbring the images back as they were, or run the command that read them again with --retry-errors, "
            "which takes them as they are now"
        )
    return text


def _image_lines(images: list[BadImage]) -> Iterator[str]:
    """A line for each file and problem."""
    groups: dict[tuple[str, str], list[BadImage]] = {}
    for image in images:
        groups.setdefault((image.file, image.problem), []).append(image)
    for (file, problem), group in groups.items():
        keys = ", ".join(image.key for image in group[:_KEYS]) + (", …" if len(group) > _KEYS else "")
        yield f"{file}: {count(len(group), 'image')} {_SAYS[problem]} ({keys})"
