"""The engine for work that holds the interpreter lock: worker processes.

The workers are plain subprocesses, not `multiprocessing`'s: those import the caller's main script again, which fails
for scripts without `if __name__ == "__main__"`. A worker that dies, killed for its memory or by a decoder's fault, is
replaced, and its shard is tried again.

While it works on a shard, the function may call back (`aligncurate.engines.worker.parent`): `tell` its parent
something, or `ask` it for what only the parent has, such as a GPU. Large arrays go through memory that both see.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic
from traceback import print_exc
from typing import Any, BinaryIO

from aligncurate.engines import threads
from aligncurate.engines.contract import Cancelled, Check, Function, Item, Outcome, Result
from aligncurate.engines.shared_memory import SharedMemory
from aligncurate.engines.worker import TRIES, Parent, Send, connect, work
from aligncurate.errors import ShardError, WorkerError

Memories = Sequence[SharedMemory]

_STOP_SECONDS = 1.0  # that workers have to clean up after a run was stopped
_EXIT_SECONDS = 5  # that a process has to end after it closed its pipe
_START = """import sys
sys.path[:] = {path!r}
from aligncurate.engines.processes import serve
serve({number}, {descriptors})"""


def run(
    function: Function[Item, Result],
    shards: Iterable[Item],
    *,
    workers: int,
    memories: int = 0,
    on_message: Callable[[Any], None] = lambda message: None,
    answer: Callable[[Any, Memories], Future[Any]] | None = None,
    finish: Callable[[Sequence[Item]], bool] = lambda running: False,
) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard in processes; see `aligncurate.engines.contract`.

    The function, shards and results are pickled, so the function must be defined in a module: a plain function or an
    instance of a class. Workers end when this process does, however it ends. Raises WorkerError when a worker cannot
    start; a shard whose workers keep dying becomes an outcome with a ShardError.

    Args:
        function: makes a result of a shard; it may call `aligncurate.engines.worker.parent()`.
        shards: what it is called with.
        workers: number of processes.
        memories: how many shared memories each worker has.
        on_message: called with what a worker tells, in one thread per worker.
        answer: called with what a worker asks and its memories, in one thread per worker.
        finish: after Ctrl-C, whether the shards in hand are waited for.
    """
    processes = [_Worker(number, memories, on_message, answer) for number in range(workers)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in processes:
        free.put(worker)

    def call(shard: Item, check: Check) -> Result:
        worker = free.get()
        try:
            for _ in range(TRIES):
                try:
                    result: Result = worker.call(function, shard)
                    return result
                except EOFError:
                    check()  # a stopped run has ended its workers
                    code = worker.exit_code()
                    cause = f"worker process ended {_how(code)}"
                    if code >= 0 and not worker.has_started:  # and never will
                        raise WorkerError(f"a {cause}") from None
                    worker.start()
            raise ShardError(f"{shard}: its {cause}, in each of {TRIES} tries")
        finally:
            free.put(worker)

    def stop() -> None:
        for worker in processes:
            worker.stop()
        deadline = monotonic() + _STOP_SECONDS
        for worker in processes:
            worker.end(deadline)

    try:
        yield from threads.run(call, shards, workers=workers, on_stop=stop, finish=finish)
    finally:
        stop()
        for worker in processes:
            worker.close()


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "with signal 9 (killed, perhaps because memory ran out)"
    return f"with signal {-code}" if code < 0 else f"with exit code {code}"


class _Worker:
    """The parent's side of a process that calls one function."""

    def __init__(
        self,
        number: int,
        memories: int,
        on_message: Callable[[Any], None],
        answer: Callable[[Any, Memories], Future[Any]] | None,
    ) -> None:
        self._number = number
        self._memories = [SharedMemory() for _ in range(memories)]
        self._on_message, self._answer = on_message, answer
        self._sending = Lock()
        self.start()

    def start(self) -> None:
        """Start the process, or a new one in place of one that died."""
        descriptors = [memory.descriptor for memory in self._memories]
        command = [sys.executable, "-c", _START.format(path=sys.path, number=self._number, descriptors=descriptors)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._has_function = self.has_started = False

    def call(self, function: Function[Any, Any], shard: Any) -> Any:
        """Return or raise what the function does; it is the same in every call.

        Raises EOFError when the process is gone.
        """
        try:
            if not self._has_function:
                self._send(function)
                self._has_function = True
            self._send(("shard", shard))
            while (message := pickle.load(self._from))[0] not in ("done", "failed"):
                if message[0] == "started":
                    self.has_started = True
                elif message[0] == "told":
                    self._on_message(*message[1:])
                else:
                    self._ask(*message[1:])
        except (pickle.UnpicklingError, ValueError, BrokenPipeError):  # cut off, or closed by `stop`
            raise EOFError from None
        if message[0] == "failed":
            raise message[1]
        return message[1]

    def _ask(self, number: int, question: Any) -> None:
        assert self._answer is not None
        to = self._to  # of the process that asks; one that has died gets no answer

        def send(future: Future[Any]) -> None:
            error = future.exception() if not future.cancelled() else Cancelled()
            with suppress(OSError, ValueError), self._sending:
                to.write(_pickled("answer", number, future.result() if error is None else None, error))
                to.flush()

        self._answer(question, self._memories).add_done_callback(send)

    def _send(self, message: Any) -> None:
        with self._sending:
            pickle.dump(message, self._to)
            self._to.flush()

    def exit_code(self) -> int:
        """Of a process that has ended, or is ending."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.kill()  # it closed its pipe but did not end
        code = self._process.wait()
        self._close_pipes()
        return code

    def stop(self) -> None:
        """Ask the process to end: what it has in hand is cancelled."""
        with suppress(OSError, ValueError):
            self._send(("stop",))

    def end(self, deadline: float) -> None:
        """Wait until `deadline` for the end of a stopped process, then kill it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - monotonic()))
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Give back what an ended process had."""
        self._close_pipes()
        for memory in self._memories:
            memory.close()

    def _close_pipes(self) -> None:
        for pipe in (self._to, self._from):
            with suppress(OSError):
                pipe.close()


def serve(number: int, descriptors: Sequence[int]) -> None:
    """A worker's main loop: receives a function, then shards, and sends what the function returns or raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers, sending = os.fdopen(os.dup(1), "wb"), Lock()
    os.dup2(2, 1)  # what a library prints must not end up among the answers

    def send(kind: str, *message: Any) -> None:
        pickled = _pickled(kind, *message)
        with sending:
            answers.write(pickled)
            answers.flush()

    parent = Parent(send, number, [SharedMemory(descriptor) for descriptor in descriptors])
    connect(parent)
    stopped = Event()
    received: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(sys.stdin.buffer, received, send, parent, stopped), daemon=True).start()
    work(received, send, stopped)
    os._exit(0)  # without waiting for threads that hang


def _receive(source: BinaryIO, received: SimpleQueue[Any], send: Send, parent: Parent, stopped: Event) -> None:
    """Pass on what the parent sends, until it stops the run."""
    try:
        received.put(pickle.load(source))
        send("started")
        while True:
            kind, *message = pickle.load(source)
            if kind == "answer":
                parent.answered(*message)
            elif kind == "shard":
                received.put(*message)
            else:
                stopped.set()
                received.put(None)
                parent.stopped()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # the parent is gone, perhaps killed amid a message; nothing may be written after it
    except BaseException:  # a message that cannot be unpickled here
        print_exc()
        os._exit(1)


def _pickled(*message: Any) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
