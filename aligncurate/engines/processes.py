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
from traceback import format_exception, print_exc
from typing import Any, BinaryIO, TypeVar

from aligncurate.engines import threads as local
from aligncurate.errors import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LAST_WORDS = 5  # seconds for a process that closed its pipe to end
_START = "import sys; sys.path[:] = {path!r}; from aligncurate.engines.processes import work; work()"


def run(
    function: Callable[[Item], Result], shards: Iterable[Item], processes: int
) -> Iterator[local.Outcome[Item, Result]]:
    """Call `function(shard)` for every shard, in so many processes; outcomes come as they are ready.

    Function, shards and results are pickled, so the function is a module's own, or an instance of a module's own class.
    Errors are those of `local.run`. The processes end with this one, however it ends.
    """
    workers = [_Worker() for _ in range(processes)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def call(shard: Item, check: Callable[[], None]) -> Result:
        worker = free.get()
        try:
            answer: Result = worker.call(function, shard)
            return answer
        except EOFError:
            check()  # the run is stopped, and the workers with it
            raise WorkerError(f"a worker process ended with exit code {worker.exit_code()}") from None
        finally:
            free.put(worker)

    def stop() -> None:
        for worker in workers:
            worker.stop()

    try:
        yield from local.run(call, shards, threads=processes, on_stop=stop)
    finally:
        stop()


class _Worker:
    """A process that calls one function."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._ready = False

    def call(self, function: Callable[..., Any], shard: Any) -> Any:
        """What the function, the same in every call, gives or raises. Raises EOFError when the process is gone."""
        try:
            if not self._ready:
                pickle.dump(function, self._to)
                self._ready = True
            pickle.dump(shard, self._to)
            self._to.flush()
            done, answer = pickle.load(self._from)
        except (pickle.UnpicklingError, ValueError, OSError):  # cut off, or closed by `stop`
            raise EOFError from None
        if not done:
            raise answer
        return answer

    def exit_code(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_LAST_WORDS)
        self._process.kill()  # it lives, and does not say what it should
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
            answer = pickle.dumps((True, function(shard)))
        except Exception as error:
            answer = _pickled(error)
        answers.write(answer)
        answers.flush()


def _pickled(error: Exception) -> bytes:
    """The answer for an error; its traceback as text, where the error itself does not survive the journey."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps((False, RuntimeError("".join(format_exception(error)))))


def _receive(source: BinaryIO, messages: "SimpleQueue[Any]") -> None:
    try:
        while True:
            messages.put(pickle.load(source))
    except EOFError:
        os._exit(0)  # the parent is gone, perhaps killed; nothing may be written after it
    except BaseException:  # a message cut off by the parent's end, or one that cannot be understood here
        print_exc()
        os._exit(1)
