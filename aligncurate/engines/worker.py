"""A worker process' side of a run, whatever started it: its loop over shards, and the way to its parent."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from threading import Event
from traceback import format_exception
from typing import Any, Protocol

from aligncurate.engines.contract import Cancelled
from aligncurate.engines.shared_memory import SharedMemory

TRIES = 3
"""For a shard whose worker dies."""


class Send(Protocol):
    """Sends a message to the parent: its kind, then what belongs to it. Nothing is sent of what cannot be pickled."""

    def __call__(self, kind: str, *message: Any) -> None: ...


class Parent:
    """A worker's connection to the process that runs the engine.

    Args:
        send: sends a message there.
        number: of this worker, from 0.
        memories: that both see; none if the parent may be on another machine.
    """

    def __init__(self, send: Send, number: int, memories: Sequence[SharedMemory] = ()) -> None:
        self.number = number
        self.memories = memories
        self._send = send
        self._numbers = count()
        self._asked: dict[int, Future[Any]] = {}

    def tell(self, message: Any) -> None:
        """Tell the parent something."""
        self._send("told", message)

    def ask(self, question: Any) -> Future[Any]:
        """Ask the parent; the answer comes later, and cannot be cancelled: until then the parent reads the memories."""
        number, future = next(self._numbers), Future[Any]()
        future.set_running_or_notify_cancel()
        self._asked[number] = future
        self._send("asked", number, question)
        return future

    def answered(self, number: int, answer: Any, error: BaseException | None) -> None:
        future = self._asked.pop(number)
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)

    def stopped(self) -> None:
        """Nothing will be answered any more."""
        for number in list(self._asked):
            self.answered(number, None, Cancelled())


_parent: Parent | None = None


def parent() -> Parent:
    """The connection to the parent; only in a worker process."""
    assert _parent is not None
    return _parent


def connect(to: Parent) -> None:
    """Make `to` the parent of this process."""
    global _parent
    _parent = to


def work(received: SimpleQueue[Any], send: Send, stopped: Event) -> None:
    """Call the function that is received first with each shard after it; send what it returns or raises.

    Ends once `stopped` is set and something, which is ignored, is received.
    """

    def check() -> None:
        if stopped.is_set():
            raise Cancelled

    function = received.get()
    while True:
        shard = received.get()
        if stopped.is_set():
            return
        try:
            send("done", function(shard, check))
        except Cancelled:
            return
        except Exception as error:
            send("failed", _portable(error))


def _portable(error: Exception) -> Exception:
    """The error, or its traceback as text if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(format_exception(error)))
