"""The one retry policy: what is tried again, how often, and how long a request may take.

Final is what `faults` says is absent or refused. Everything else of a remote file system (429, 5xx, resets, short
bodies, time-outs) and of a failing local disk or network mount is tried again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeVar

from aligncurate.errors import UserError
from aligncurate.io.faults import TRANSIENT, fault_of

Value = TypeVar("Value")

WAITS = (0.3, 1.5, 6.0)
"""Seconds between tries; each is multiplied by a random number from 0.5 to 1.5, so that readers return one by one."""

DEFAULT_TIMEOUT = 30.0
_STALLED = 2.0  # seconds without an answer
_timeout = DEFAULT_TIMEOUT
_stopped = Event()
_waiting: dict[object, float] = {}  # requests without an answer, and since when
_lock = Lock()


class Stopped(Exception):
    """The run was interrupted while a request was waiting."""


def timeout() -> float:
    """How long a remote request may take, in seconds."""
    return _timeout


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


def is_transient(error: BaseException) -> bool:
    """Whether an OSError may be gone at the next try: an answer 429 or 5xx, a time-out, EIO, ESTALE and the like."""
    return isinstance(error, OSError) and (isinstance(error, TimeoutError) or error.errno in TRANSIENT)


def local(call: Callable[[], Value]) -> Value:
    """The value of `call`, which reads from the local file system; transient errors are retried."""
    for pause in WAITS:
        try:
            return call()
        except OSError as error:
            if not is_transient(error):
                raise
        _pause(pause)
    return call()


def remote(
    uri: str,
    begin: Callable[[], Future[Value]],
    *,
    patience: float = 1.0,
    check: Callable[[Value], None] = lambda value: None,
) -> Value:
    """The answer to a request about `uri`; retried, and given up when it takes too long.

    Args:
        uri: for messages.
        begin: makes the request.
        patience: how many times longer than another request it may take.
        check: raises an error for an answer that is not whole; then the request is made again.

    Raises:
        FileNotFoundError: there is no such file, for certain.
        OSError: any other fault, always with an errno (pyarrow raises OSErrors without one for damaged files).
        UserError: as `begin` raises it.
    """
    for pause in (*WAITS, None):
        try:
            value = _in_time(begin(), _timeout * patience)
            check(value)
            return value
        except (UserError, Stopped):
            raise
        except Exception as error:
            fault = fault_of(uri, error)
            if pause is None or not is_transient(fault):
                raise fault from (None if fault is error else error)
        _pause(pause)
    raise AssertionError


def _pause(seconds: float) -> None:
    if _stopped.wait(seconds * random.uniform(0.5, 1.5)):
        raise Stopped


def _in_time(answer: Future[Value], seconds: float) -> Value:
    """The answer to a request. One that does not come in time is cancelled, so that it can do nothing later."""
    request = object()
    began = time.monotonic()
    with _lock:
        _waiting[request] = began
    try:
        while not answer.done():
            if _stopped.is_set():
                raise Stopped
            left = began + seconds - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {seconds:g} s")
            wait([answer], min(left, 0.2))
        return answer.result()
    finally:
        answer.cancel()
        with _lock:
            del _waiting[request]
