"""Runs a function over shards in processes, where threads would wait for Python's interpreter lock.

The workers are plain subprocesses, not `multiprocessing`'s: those import the caller's main script once more, which a
script without `if __name__ == "__main__"` does not survive.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from aligncurate.engines import local

Item = TypeVar("Item")
Result = TypeVar("Result")

_START = "import sys; sys.path[:] = {path!r}; from aligncurate.engines.processes import work; work()"


def run(
    function: Callable[[Item], Result], shards: Iterable[Item], processes: int
) -> Iterator[local.Outcome[Item, Result]]:
    """Call `function(shard)` for every shard, in so many processes; outcomes come as they are ready.

    Function, shards and results are pickled, so the function is a module's own, or an instance of a module's own class.
    Errors are those of `local.run`. The processes end with this one, however it ends.
    """
    workers = [_Worker(function) for _ in range(processes)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def call(shard: Item, check: Callable[[], None]) -> Result:
        worker = free.get()
        try:
            answer: Result = worker.call(shard)
        except EOFError:
            check()  # the run is stopped, and the workers with it
            raise RuntimeError(f"a worker process ended with exit code {worker.exit_code()}") from None
        free.put(worker)
        return answer

    def stop() -> None:
        for worker in workers:
            worker.stop()

    try:
        yield from local.run(call, shards, threads=processes, on_stop=stop)
    finally:
        stop()


class _Worker:
    """A process that calls one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._send(function)

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._to)
            self._to.flush()
        except (ValueError, OSError):
            raise EOFError from None

    def call(self, shard: Any) -> Any:
        """What the function gives, or raises. Raises EOFError when the process is gone."""
        self._send(shard)
        try:
            done, answer = pickle.load(self._from)
        except (pickle.UnpicklingError, ValueError, OSError):  # cut off, or closed by `stop`
            raise EOFError from None
        if not done:
            raise answer
        return answer

    def exit_code(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with suppress(BrokenPipeError):
                pipe.close()


def work() -> None:
    """A worker's life: a function, then shards, each answered by (True, result) or (False, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    messages: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(sys.stdin.buffer, messages), daemon=True).start()
    function = messages.get()
    while True:
        shard = messages.get()
        try:
            answer = True, function(shard)
        except Exception as error:
            answer = False, error
        pickle.dump(answer, answers)
        answers.flush()


def _receive(source: BinaryIO, messages: "SimpleQueue[Any]") -> None:
    try:
        while True:
            messages.put(pickle.load(source))
    except EOFError:
        os._exit(0)  # the parent is gone, perhaps killed; nothing may be written after it
