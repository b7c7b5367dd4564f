"""Threads for calls that may never return: they end with the process, and are used again while it lives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

Value = TypeVar("Value")

_idle: list[SimpleQueue[tuple[Callable[[], Any], Future[Any]]]] = []
_lock = Lock()


def in_thread(call: Callable[[], Value]) -> Future[Value]:
    """Begin `call` in a thread of its own; a `ThreadPoolExecutor` would wait for one that hangs before Python ends."""
    future: Future[Value] = Future()
    with _lock:
        tasks = _idle.pop() if _idle else None
    if tasks is None:
        tasks = SimpleQueue()
        Thread(target=_work, args=(tasks,), daemon=True, name="request").start()
    tasks.put((call, future))
    return future


def _work(tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]]) -> None:
    while True:
        call, future = tasks.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del call, future  # their images stay in memory else
        with _lock:
            _idle.append(tasks)
