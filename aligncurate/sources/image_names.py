"""Names of images: the ways to write the same one, the files it may mean, and files with similar names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from posixpath import normpath
from unicodedata import is_normalized, normalize
from urllib.parse import unquote

from aligncurate.images.formats import EXTENSIONS
from aligncurate.io import storage

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "JPG", "JPEG", "PNG")
"""Endings that are tried for names without one."""

_MOST_NAMES = 100_000  # of a folder, among which a similar name is looked for


def without_scheme(name: str) -> str:
    """A path for a `file:` URI; any other name as it is."""
    name = name.strip().strip("\ufeff")
    if name[:5].lower() != "file:":
        return name
    path = unquote(name[5:])
    path = path[2:] if path.startswith("//") else path
    return path.removeprefix("localhost") if path.startswith("localhost/") else path


def spellings(name: str) -> list[str]:
    """The ways to write the same name, as it is given first."""
    if name.isascii() and "\\" not in name and "%" not in name:
        return [name]
    found = [name, name.replace("\\", "/")]
    found += [unquote(spelling) for spelling in found]
    found += [normalize(form, spelling) for spelling in found for form in ("NFC", "NFD")] if not name.isascii() else []
    return list(dict.fromkeys(found))


def paths_in(folder: str, name: str) -> Iterator[str]:
    """The paths of `name` in `folder`, in its spellings; none if all lead out of it."""
    for spelling in spellings(name):
        path = normpath(spelling)
        if path.startswith("/"):
            inside = folder.rstrip("/") + "/"
            if path.startswith(inside):
                yield path
            elif first_existing([storage.join(folder, path.lstrip("/"))]):
                yield storage.join(folder, path.lstrip("/"))
        elif path != ".." and not path.startswith("../"):
            yield storage.join(folder, path)


def first_existing(paths: Sequence[str]) -> list[str]:
    """The first of `paths` that exists, or cannot be looked at: reading it reports why."""
    for path in paths:
        try:
            if storage.exists(path):
                return [path]
        except (FileNotFoundError, ValueError):  # ValueError: an impossible name
            continue
        except OSError:
            return [path]
    return []


def files_of(paths: Sequence[str]) -> list[str]:
    """The file that one of `paths` means; several, if it lacks an ending and they differ by that."""
    found = first_existing(paths)
    if found and (ending_of(found[0]) in EXTENSIONS or not os.path.isdir(found[0])):
        return found
    return _with_ending(paths) or found


def _with_ending(paths: Sequence[str]) -> list[str]:
    """The image files that differ from the first of `paths` only by an ending that it lacks."""
    if not paths or ending_of(paths[0]) in EXTENSIONS:
        return []
    found = [file for ending in ENDINGS for file in first_existing([f"{paths[0]}.{ending}"])]
    return sorted({file.lower(): file for file in reversed(found)}.values())


def similar_name(path: str) -> str | None:
    """An image beside `path` whose name differs by its ending or by capitals; None if there is none."""
    names = _names_in(storage.parent(path))
    stem = storage.basename(path)
    return names.get(_folded(stem)) or names.get(_folded(stem.rpartition(".")[0] or stem))


@lru_cache(maxsize=16)
def _names_in(folder: str) -> dict[str, str]:
    """The images of a folder, by folded name and by folded name without ending."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_NAMES) if ending_of(entry.name) in EXTENSIONS)
    except (OSError, ValueError):
        return {}
    return {_folded(n.rpartition(".")[0]): n for n in names} | {_folded(n): n for n in names}


def _folded(name: str) -> str:
    return normalize("NFC", name).casefold()


def ending_of(name: str) -> str:
    """What follows the last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def plain(name: str) -> str:
    """A member's name in the one form that all its spellings share."""
    name = normpath(name.lstrip("/"))
    return name if is_normalized("NFC", name) else normalize("NFC", name)


def shortened(name: str) -> str:
    """A name as messages show it."""
    return name if len(name) <= 300 else f"{name[:300]}…"
