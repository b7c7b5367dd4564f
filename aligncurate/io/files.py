"""Atomic file writes, and output folders held by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, mkstemp
from typing import Any

from aligncurate.errors import UserError
from aligncurate.io import remote
from aligncurate.io.paths import AnyPath, RemotePath, names
from aligncurate.progress import notice

TEMPORARY = ".tmp-"
"""Prefix of unfinished files. A killed run leaves them behind; the next run deletes them."""

LOCK = ".lock"
_PIECE = 1 << 23  # bytes copied at a time
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # some network file systems
_LIST_OF_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\de]+,\n\s*)*[-+.\de]+)\n\s*\]")  # strings have no line breaks
_PROCESS = token_hex(4)

warned_no_locks = False  # one notice per process is enough


def readable(name: str) -> str:
    """A name with what is not UTF-8 replaced."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


def check_name(path: str) -> str:
    """`path`, if JSON and Parquet can keep it. Raises UserError for a name that is not UTF-8."""
    if readable(path) != path:
        raise UserError(f"{readable(path)}: the name is not UTF-8; rename the file or folder.")
    return path


def as_path(given: str | AnyPath) -> AnyPath:
    """The path of a file or folder, local or remote. Raises UserError for a name that is not UTF-8."""
    if isinstance(given, RemotePath):
        return given
    text = str(given).removeprefix("file://")
    first, _, rest = text.partition("/")  # `Path("s3://bucket")` is `s3:/bucket`
    if _SCHEME.fullmatch(first) and not Path(first).exists():
        if not rest.strip("/"):
            raise UserError(f"{first}//: name a folder too, such as {first}//bucket/folder.")
        return RemotePath(check_name(f"{first}//{rest.lstrip('/')}"))
    check_name(os.path.abspath(text))
    return Path(text)


def absolute(path: AnyPath) -> AnyPath:
    """The path as datasets record it."""
    return path if isinstance(path, RemotePath) else Path(os.path.abspath(path))


def check_free(folder: AnyPath, own: Collection[str]) -> None:
    """Raises UserError, as `claim` would, for an output folder that cannot be used; writes nothing."""
    _check_folder(folder)
    try:
        found = names(folder)
    except NotADirectoryError:
        raise UserError(f"{folder}: --out must be a folder, but this is a file.") from None
    others = [name for name in found if name != LOCK and not name.startswith(TEMPORARY)]
    if others and not set(own).intersection(found):
        raise UserError(f"{folder}: the output folder holds other files ({others[0]}); choose a new folder.")


def _check_folder(folder: AnyPath) -> None:
    if isinstance(folder, RemotePath):
        return
    check_name(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: --out must be a folder, but this is a file.")


@contextmanager
def claim(folder: AnyPath, own: Collection[str], *, deep: bool = False, shared: bool = False) -> Iterator[None]:
    """Take `folder`, created if needed, for this run; delete the temporary files of a killed run.

    A local folder is locked. A remote one is not: two runs of one command write the same bytes.

    Args:
        folder: the output folder.
        own: records such as `manifest.json`; a folder that holds one of them may be written to again.
        deep: delete also those in the folders inside, which otherwise may belong to other runs.
        shared: with other runs that share it, whose temporary files are left alone.

    Raises:
        UserError: the path is a file, another run holds the folder, or it holds other files and none of `own`.
    """
    if isinstance(folder, RemotePath):
        check_free(folder, own)
        yield
        return
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, shared=shared):
        check_free(folder, own)
        if shared:
            yield
            return
        _delete_unfinished(folder, deep=deep)
        try:
            yield
        finally:
            _delete_unfinished(folder, deep=deep)  # of workers that were killed


def _delete_unfinished(folder: Path, *, deep: bool) -> None:
    for file in folder.rglob(f"{TEMPORARY}*") if deep else folder.glob(f"{TEMPORARY}*"):
        if not file.is_dir():
            file.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock `folder` for one run, or for all that share it; the kernel releases the lock even if a run is killed.

    On a file system without locks, a notice asks the user to start only one run.

    Raises:
        UserError: another run holds the folder.
    """
    path = folder / LOCK
    while True:
        with path.open("w") as file:
            locked = True
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
                with suppress(OSError):  # others share it: the last one deletes it
                    if shared and locked:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            return


def _warn_no_locks(folder: Path) -> None:
    global warned_no_locks
    if not warned_no_locks:
        notice(f"{folder}: this file system has no locks; do not run twice with the same output folder.")
    warned_no_locks = True


def sync(path: AnyPath) -> None:
    """Flush a file's bytes, or the names in a folder, to disk, so that they survive a power cut."""
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(path: AnyPath, folder: AnyPath | None = None) -> Path:
    """Where the bytes of `path` are gathered until `publish` makes them visible at once.

    A local file is gathered on the same file system, beside `path` or in `folder`; a remote one in the system's
    temporary folder. No other process uses its name, which matters where machines share a folder.
    """
    if not isinstance(path, RemotePath):
        return (folder if isinstance(folder, Path) else path.parent) / f"{TEMPORARY}{_PROCESS}-{path.name}"
    descriptor, name = mkstemp(prefix="aligncurate-", suffix=path.suffix)
    os.close(descriptor)
    return Path(name)


def publish(temporary: AnyPath, path: AnyPath, *, durable: bool = True) -> None:
    """Make the file `temporary` the content of `path`: by renaming it, or with one upload; a remote one is copied.

    With `durable`, wait until its bytes and its name are on disk; else a power cut soon after may leave no file, or an
    empty one.
    """
    if isinstance(temporary, RemotePath):
        assert isinstance(path, RemotePath)
        path.copy_from(temporary)
        return
    if isinstance(path, RemotePath):
        path.write_from(temporary)
        temporary.unlink()
        return
    if durable:
        sync(temporary)
    temporary.replace(path)
    if durable:
        sync(path.parent)


@contextmanager
def duplicate(file: AnyPath, path: AnyPath, folder: AnyPath) -> Iterator[AnyPath]:
    """What `publish` makes a copy of `file` at `path` from: itself, where one store has both, or a link or copy."""
    if isinstance(file, RemotePath) and isinstance(path, RemotePath) and file.scheme == path.scheme:
        yield file
        return
    temporary = unfinished(path, folder)
    try:
        link_or_copy(file, temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(file: AnyPath, target: Path) -> None:
    """Make `target` a hard link to `file` where the file system has them, else a copy."""
    target.unlink(missing_ok=True)
    if isinstance(file, RemotePath):
        with remote.open_file(file.uri) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, _PIECE)
        return
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


@contextmanager
def local_copy(file: AnyPath) -> Iterator[Path]:
    """A local file with the bytes of `file`, for libraries that read no others: itself, if it is local."""
    if not isinstance(file, RemotePath):
        yield file
        return
    with TemporaryDirectory(prefix="aligncurate-") as folder:
        copy = Path(folder) / file.name
        link_or_copy(file, copy)
        yield copy


@contextmanager
def atomic_file(path: AnyPath, *, folder: AnyPath | None = None, durable: bool = True) -> Iterator[Path]:
    """A local temporary file that becomes `path` when the block ends without an error; see `unfinished`, `publish`."""
    temporary = unfinished(path, folder)
    try:
        yield temporary
        publish(temporary, path, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(
    path: AnyPath, value: Any, *, folder: AnyPath | None = None, durable: bool = True, one_line: bool = False
) -> None:
    """Write `value` as JSON; arguments as for `atomic_file` and `json_bytes`."""
    with atomic_file(path, folder=folder, durable=durable) as written:
        written.write_bytes(json_bytes(value, one_line=one_line))


def json_bytes(value: Any, *, one_line: bool = False) -> bytes:
    """JSON, indented and with lists of numbers on one line; all on one line takes a tenth of the time."""
    text = json.dumps(value, indent=None if one_line else 1, ensure_ascii=False)
    if not one_line:
        text = _LIST_OF_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # half a character is escaped as JSON does


def use_umask(files: Iterable[Path]) -> None:
    """Give files the mode of any new file; safetensors writes them with 0600, whatever the umask."""
    for file in files:
        probe = file.with_name(f"{TEMPORARY}mode")
        probe.touch()
        file.chmod(probe.stat().st_mode & 0o777)
        probe.unlink()


def read_json(path: AnyPath) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError as `parse_json`, and OSError if the file cannot be read."""
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: AnyPath) -> dict[str, Any]:
    """The JSON object that `path` holds. Raises UserError if it is damaged, or something other than an object."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged, not a JSON file ({error}); restore it, or delete its folder and run again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object; restore it, or delete its folder and run again.")
    return value
