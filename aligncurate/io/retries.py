"""The one retry policy: what counts as absent, what is tried again, how often, and how long a request may take.

Absent is only what a 404 or ENOENT says. Refusals (401, 403, other 4xx) are final too. Everything else of a remote file
system (429, 5xx, resets, short bodies, time-outs) and of a failing local disk or network mount is tried again.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from aligncurate.errors import UserError

Value = TypeVar("Value")

WAITS = (0.3, 1.5, 6.0)
"""Seconds between tries; each is multiplied by a random number from 0.5 to 1.5, so that readers return one by one."""

DEFAULT_TIMEOUT = 30.0
_STALLED = 2.0  # seconds without an answer
_TRANSIENT_STATUS = {408, 425, 429}  # and 500 or more
_ABSENT_STATUS = {404, 410}
_TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "EPIPE", "EMFILE", "ENFILE",
        "ENOMEM", "ENOBUFS", "ENODEV", "ENXIO", "ENOLINK", "ESHUTDOWN", "EPROTO", "EKEYEXPIRED",
    )
    if hasattr(errno, name)
}  # fmt: skip
_FINAL = (UserError, PermissionError, IsADirectoryError, NotImplementedError, TypeError, ImportError)

_timeout = DEFAULT_TIMEOUT
_stopped = Event()
_waiting: dict[object, float] = {}  # requests without an answer, and since when
_lock = Lock()


class Stopped(Exception):
    """The run was interrupted while a request was waiting."""


def set_timeout(seconds: float) -> None:
    """Set how long a remote request, of at most 8 MiB, may take."""
    global _timeout
    _timeout = seconds


@contextmanager
def stopped() -> Iterator[None]:
    """In the block, all requests that wait for an answer or for another try end: they raise Stopped."""
    _stopped.set()
    try:
        yield
    finally:
        _stopped.clear()


def is_stalled() -> bool:
    """Whether a request has been waiting for more than two seconds."""
    with _lock:
        return any(time.monotonic() - since > _STALLED for since in _waiting.values())


def is_absent(error: BaseException) -> bool:
    """Whether an error says for certain that there is no such file.

    fsspec's HTTP file system raises FileNotFoundError for any failure, caused by what really happened.
    """
    status = _status(error)
    if status is not None:
        return status in _ABSENT_STATUS
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        cause = error.__cause__
        return cause is None or isinstance(cause, LookupError) or is_absent(cause)
    return False


def is_transient(error: BaseException) -> bool:
    """Whether an OSError may be gone at the next try: an answer 429 or 5xx, a time-out, EIO, ESTALE and the like."""
    return isinstance(error, OSError) and (isinstance(error, TimeoutError) or error.errno in _TRANSIENT_ERRNO)


def local(call: Callable[[], Value]) -> Value:
    """The value of `call`, which reads from the local file system; transient errors are retried."""
    for wait in WAITS:
        try:
            return call()
        except OSError as error:
            if not is_transient(error):
                raise
        _pause(wait)
    return call()


def remote(uri: str, call: Callable[[], Value], *, patience: float = 1.0) -> Value:
    """The value of `call`, which makes a request about `uri`; retried, and given up when it takes too long.

    Args:
        uri: for messages.
        call: makes the request.
        patience: how many times longer than another request it may take.

    Raises:
        FileNotFoundError: there is no such file, for certain.
        OSError: any other fault, always with an errno (pyarrow raises OSErrors without one for damaged files).
        UserError: as `call` raises it.
    """
    for wait in (*WAITS, None):
        try:
            return _in_time(call, _timeout * patience)
        except (UserError, Stopped):
            raise
        except Exception as error:
            fault = _fault(uri, error)
            if wait is None or not is_transient(fault):
                raise fault from (None if fault is error else error)
        _pause(wait)
    raise AssertionError


def _pause(seconds: float) -> None:
    if _stopped.wait(seconds * random.uniform(0.5, 1.5)):
        raise Stopped


def _in_time(call: Callable[[], Value], seconds: float) -> Value:
    """The value of `call`, made in a thread that is left behind if it takes too long.

    Not every file system has time-outs, and none of theirs can be interrupted.
    """
    answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    request = object()
    began = time.monotonic()
    with _lock:
        _waiting[request] = began
    try:
        Thread(target=answer, daemon=True).start()
        while True:
            if _stopped.is_set():
                raise Stopped
            left = began + seconds - time.monotonic()
            try:
                succeeded, value = answers.get(timeout=max(0.0, min(left, 0.2)))
                break
            except Empty:
                if left <= 0:
                    raise TimeoutError(f"no answer within {seconds:g} s") from None
    finally:
        with _lock:
            del _waiting[request]
    if not succeeded:
        raise value
    result: Value = value
    return result


def _fault(uri: str, error: Exception) -> OSError:
    """An error of a remote file system as an OSError that says whether it is final."""
    text = " ".join(str(error).split()).rstrip(".")
    if is_absent(error):
        return error if isinstance(error, FileNotFoundError) and error.errno else _absent(uri)
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # not certain: see `is_absent`
        return _fault(uri, error.__cause__) if isinstance(error.__cause__, Exception) else _failed(uri, "unknown")
    status = _status(error)
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access refused ({cause})", uri)
    if status is not None and status < 500 and status not in _TRANSIENT_STATUS:
        return OSError(errno.EINVAL, f"{uri}: request refused ({cause})")
    if isinstance(error, _FINAL):
        if isinstance(error, OSError):
            error.errno = error.errno or errno.EACCES
            return error
        fault = _failed(uri, cause)
        fault.errno = errno.EINVAL
        return fault
    if isinstance(error, OSError) and error.errno and text:
        return error
    return _failed(uri, cause)


def _absent(uri: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)


def _failed(uri: str, cause: str) -> OSError:
    fault = OSError(f"{uri}: its file system failed ({cause})")
    fault.errno = errno.EIO
    return fault


def _status(error: BaseException) -> int | None:
    """The HTTP status that a network library's error carries."""
    response = getattr(error, "response", None)
    found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    if isinstance(response, dict):  # botocore
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((int(s) for s in found if isinstance(s, int) and 100 <= s < 600), None)
