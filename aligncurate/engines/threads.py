"""Runs a function over shards in threads of this process.

Threads, not processes: decoding, Arrow and torch release the interpreter lock, and one process means one copy
of the encoder. Two threads are enough to read the next shard while the encoder works on this one.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Generic, TypeVar

from aligncurate.errors import ShardError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(Exception):
    """The run was stopped; what the function was doing is thrown away."""


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of one shard: its result, or the error that kept it from being read."""

    shard: Item
    result: Result | None
    error: ShardError | None


def run(
    function: Callable[[Item, Callable[[], None]], Result],
    shards: Iterable[Item],
    threads: int = 1,
    on_stop: Callable[[], None] = lambda: None,
) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard, `threads` at a time; outcomes come as they are ready.

    `check` is for the function to call now and then: it raises Cancelled once the run has been stopped. `on_stop` is
    called then too, and at the end.
    A ShardError is that shard's outcome, and the others go on; any other error stops the run.
    """
    stopping = Event()

    def check() -> None:
        if stopping.is_set():
            raise Cancelled

    waiting = iter(shards)
    running: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool:
        try:
            while True:
                # Only as many as can run are submitted: a million shards are not queued up.
                while len(running) < threads and (shard := next(waiting, None)) is not None:
                    running[pool.submit(function, shard, check)] = shard
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    shard = running.pop(future)
                    try:
                        yield Outcome(shard, future.result(), None)
                    except ShardError as error:
                        yield Outcome(shard, None, error)
        finally:
            stopping.set()
            on_stop()
