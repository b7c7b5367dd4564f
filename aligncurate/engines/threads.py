"""The engine for work that releases the interpreter lock: threads of this process.

Decoding, Arrow and torch release the lock, and one process needs only one copy of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event

from aligncurate.engines.contract import Cancelled, Function, Item, Outcome, Result
from aligncurate.errors import ShardError


def run(
    function: Function[Item, Result],
    shards: Iterable[Item],
    *,
    workers: int = 1,
    on_stop: Callable[[], None] = lambda: None,
) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard in threads; see `aligncurate.engines.contract`.

    `on_stop` is called when the run ends, also early, before its threads are joined.
    """
    stopping = Event()

    def check() -> None:
        if stopping.is_set():
            raise Cancelled

    waiting = iter(shards)
    running: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="shard") as pool:
        try:
            while True:
                # Submit only what can run now, so that a million shards are not queued up.
                while len(running) < workers and (shard := next(waiting, None)) is not None:
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
