"""Files and folders that a run may leave only whole: atomic files, locked folders."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from aligncurate.errors import UserError
from aligncurate.progress import notice

TEMPORARY = ".tmp-"
"""How names begin of what is not whole yet; a killed run leaves such files, which the next one deletes."""

LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # some network file systems
_LIST_OF_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\de]+,\n\s*)*[-+.\de]+)\n\s*\]")  # strings have no line breaks
_told = False  # that a file system has no locks; once is enough


def make_folder(path: Path) -> None:
    """Make an output folder, if it is not there. Raises UserError where a file is in the way."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: --out must be a folder, but this is a file.")
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; the kernel lets go of it however the run ends.

    Where the file system has no locks, the user is told so, and must see to it that there is one run. Raises UserError
    when another run holds it.
    """
    path = folder / LOCK
    while True:
        with path.open("w") as file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another run is writing to this folder; wait for it to end.") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locked = False
                _tell_no_locks(folder)
            # Another run may have ended, and removed the file, between our opening and locking it.
            if locked and (not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _tell_no_locks(folder: Path) -> None:
    global _told
    if not _told:
        notice(f"{escape(str(folder))}: this file system has no locks; start no second run that writes to this folder.")
    _told = True


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, lists of numbers on one line, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
