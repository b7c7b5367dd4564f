"""Indexes kept by what they were made of, so that `train plan` and every new output folder share one.

They lie in `$XDG_CACHE_HOME/aligncurate/indexes` (`~/.cache` by default). The oldest are deleted beyond 20 GB.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from aligncurate.io.files import TEMPORARY
from aligntrain.data.sealed import DamagedError, check_files, read_sealed

_MOST_BYTES = 20 << 30


def fetch(made_of: str, file: Path) -> None:
    """Put the index that was made of this, if there is an intact one, at `file`, and its notes beside it."""
    kept = _folder() / made_of
    with suppress(OSError, DamagedError):
        check_files(kept, read_sealed(kept / file.with_suffix(".json").name)["files"])
        os.utime(kept)
        _copy(kept, file.parent, file)


def store(made_of: str, file: Path) -> None:
    """Keep the index at `file`; where the folder cannot be written to, nothing is kept."""
    with suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=TEMPORARY, dir=_folder()) as temporary:
            _copy(file.parent, Path(temporary), file)
            shutil.rmtree(_folder() / made_of, ignore_errors=True)  # damaged, or it would have been fetched
            Path(temporary).rename(_folder() / made_of)
            Path(temporary).mkdir()  # for TemporaryDirectory to delete
        _delete_oldest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aligncurate" / "indexes"


def _copy(source: Path, target: Path, file: Path) -> None:
    """Copy an index, then its notes, which make it complete; by hard link where that is possible."""
    for name in (file.name, file.with_suffix(".json").name):
        (target / name).unlink(missing_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def _delete_oldest() -> None:
    folders = sorted(_folder().iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    total = 0
    for number, folder in enumerate(folders):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if number and total > _MOST_BYTES:
            shutil.rmtree(folder)
