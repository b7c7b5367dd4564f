"""The engine for work that holds the interpreter lock: worker processes.

The workers are plain subprocesses, not `multiprocessing`'s: those import the caller's main script again, which fails
for scripts without `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from traceback import format_exception, print_exc
from typing import Any, BinaryIO

from aligncurate.engines import threads
from aligncurate.engines.contract import Check, Function, Item, Outcome, Result
from aligncurate.errors import WorkerError

_EXIT_SECONDS = 5  # that a process has to end after it closed its pipe
_START = "import sys; sys.path[:] = {path!r}; from aligncurate.engines.processes import serve; serve()"


def run(function: Function[Item, Result], shards: Iterable[Item], *, workers: int) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard in processes; see `aligncurate.engines.contract`.

    The function, shards and results are pickled, so the function must be defined in a module: a plain function or an
    instance of a class. In a worker `check` does nothing: a stopped run kills its workers. Workers also end when this
    process does, however it ends. Raises WorkerError when a worker dies.
    """
    processes = [_Worker() for _ in range(workers)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in processes:
        free.put(worker)

    def call(shard: Item, check: Check) -> Result:
        worker = free.get()
        try:
            result: Result = worker.call(function, shard)
            return result
        except EOFError:
            check()  # a stopped run has killed its workers
            raise WorkerError(f"a worker process ended with exit code {worker.exit_code()}") from None
        finally:
            free.put(worker)

    def stop() -> None:
        for worker in processes:
            worker.stop()

    try:
        yield from threads.run(call, shards, workers=workers, on_stop=stop)
    finally:
        stop()


class _Worker:
    """The parent's side of a process that calls one function."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._has_function = False

    def call(self, function: Function[Any, Any], shard: Any) -> Any:
        """Return or raise what the function does; it is the same in every call.

        Raises EOFError when the process is gone.
        """
        try:
            if not self._has_function:
                pickle.dump(function, self._to)
                self._has_function = True
            pickle.dump(shard, self._to)
            self._to.flush()
            succeeded, answer = pickle.load(self._from)
        except (pickle.UnpicklingError, ValueError, OSError):  # cut off, or closed by `stop`
            raise EOFError from None
        if not succeeded:
            raise answer
        return answer

    def exit_code(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_EXIT_SECONDS)
        self._process.kill()  # it closed its pipe but did not end
        return self._process.wait()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with suppress(BrokenPipeError):
                pipe.close()


def serve() -> None:
    """A worker's main loop: receives a function, then shards; answers each with (True, result) or (False, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    messages: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(sys.stdin.buffer, messages), daemon=True).start()
    function = messages.get()
    while True:
        shard = messages.get()
        try:
            answer = pickle.dumps((True, function(shard, _check)))
        except Exception as error:
            answer = _pickle_error(error)
        answers.write(answer)
        answers.flush()


def _check() -> None:
    """A stopped run kills its workers, so there is nothing to check in one."""


def _pickle_error(error: Exception) -> bytes:
    """The answer for an error; its traceback as text if the error itself cannot be pickled and unpickled."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps((False, RuntimeError("".join(format_exception(error)))))


def _receive(source: BinaryIO, messages: SimpleQueue[Any]) -> None:
    try:
        while True:
            messages.put(pickle.load(source))
    except EOFError:
        os._exit(0)  # the parent is gone, perhaps killed; nothing may be written after it
    except BaseException:  # a message that was cut off when the parent ended, or that cannot be unpickled here
        print_exc()
        os._exit(1)
