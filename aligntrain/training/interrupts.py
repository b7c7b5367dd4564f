"""Stopping a run on SIGTERM or Ctrl-C after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT (Ctrl-C) in a list, so that the loop can stop after the current step.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield caught
        return

    def note(number: int, _: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
