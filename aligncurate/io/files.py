"""Atomic file writes, and output folders held by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aligncurate.errors import UserError
from aligncurate.progress import notice

TEMPORARY = ".tmp-"
"""Prefix of unfinished files. A killed run leaves them behind; the next run deletes them."""

LOCK = ".lock"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # some network file systems
_LIST_OF_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\de]+,\n\s*)*[-+.\de]+)\n\s*\]")  # strings have no line breaks
warned_no_locks = False  # one notice per process is enough


def readable(name: str) -> str:
    """A name with what is not UTF-8 replaced."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


def check_name(path: str) -> str:
    """`path`, if JSON and Parquet can keep it. Raises UserError for a name that is not UTF-8."""
    if readable(path) != path:
        raise UserError(f"{readable(path)}: the name is not UTF-8; rename the file or folder.")
    return path


def refuse_remote(folder: Path) -> Path:
    """`folder`, if it is local. Raises UserError for a URI, of which a Path makes a folder called `s3:`."""
    check_name(str(folder.absolute()))
    scheme = next((part for part in folder.parts if _SCHEME.fullmatch(part)), None)
    if scheme and not Path(*folder.parts[: folder.parts.index(scheme) + 1]).exists():
        raise UserError(
            f"--out {scheme}//{'/'.join(folder.parts[folder.parts.index(scheme) + 1 :])}: only local folders can be "
            "written; write to one and copy it."
        )
    return folder


def check_free(folder: Path, own: Collection[str]) -> None:
    """Raises UserError, as `claim` would, for an output folder that cannot be used; writes nothing."""
    _check_folder(folder)
    if folder.exists() and not any((folder / name).exists() for name in own):
        names = sorted(path.name for path in folder.iterdir())
        others = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
        if others:
            raise UserError(f"{folder}: the output folder holds other files ({others[0]}); choose a new folder.")


def _check_folder(folder: Path) -> None:
    refuse_remote(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: --out must be a folder, but this is a file.")


@contextmanager
def claim(folder: Path, own: Collection[str]) -> Iterator[None]:
    """Create `folder` if needed and lock it for this run; delete the temporary files of a killed run.

    Args:
        folder: the output folder.
        own: records such as `manifest.json`; a folder that holds one of them may be written to again.

    Raises:
        UserError: the path is a file, another run holds the folder, or it holds other files and none of `own`.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        check_free(folder, own)
        delete_unfinished(folder.glob(f"{TEMPORARY}*"))  # not below: other runs may write to folders inside this one
        yield


def delete_unfinished(files: Iterable[Path]) -> None:
    """Delete temporary files that a killed run left."""
    for file in files:
        if not file.is_dir():
            file.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for one run; the kernel releases the lock even if the run is killed.

    On a file system without locks, a notice asks the user to start only one run.

    Raises:
        UserError: another run holds the folder.
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
                _warn_no_locks(folder)
            # Between our opening and locking it, another run may have ended and deleted the file.
            if locked and (not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _warn_no_locks(folder: Path) -> None:
    global warned_no_locks
    if not warned_no_locks:
        notice(f"{folder}: this file system has no locks; do not run twice with the same output folder.")
    warned_no_locks = True


def sync(path: Path) -> None:
    """Flush a file's bytes, or the names in a folder, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, temporary: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends without an error.

    Args:
        path: the file.
        temporary: where to write first, on the same file system; by default beside `path`.
        durable: wait until it is on disk; if False, a power cut soon after may leave no file, or an empty one.
    """
    temporary = temporary or path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(
    path: Path, value: Any, *, temporary: Path | None = None, durable: bool = True, one_line: bool = False
) -> None:
    """Write `value` as JSON, indented and with lists of numbers on one line; other arguments as for `atomic_file`.

    With `one_line`, all is on one line, which takes a tenth of the time.
    """
    text = json.dumps(value, indent=None if one_line else 1, ensure_ascii=False)
    if not one_line:
        text = _LIST_OF_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    with atomic_file(path, temporary=temporary, durable=durable) as written:
        written.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))  # half a character is escaped as JSON does


def use_umask(files: Iterable[Path]) -> None:
    """Give files the mode of any new file; safetensors writes them with 0600, whatever the umask."""
    for file in files:
        probe = file.with_name(f"{TEMPORARY}mode")
        probe.touch()
        file.chmod(probe.stat().st_mode & 0o777)
        probe.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: the file is damaged, or holds something other than an object.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged, not a JSON file ({error}); restore it, or delete its folder and run again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object; restore it, or delete its folder and run again.")
    return value
