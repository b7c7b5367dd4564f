"""The engine for work that releases the interpreter lock: threads of this process.

Decoding, Arrow and torch release the lock, and one process needs only one copy of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from time import monotonic

from aligncurate.engines.contract import Cancelled, Function, Item, Outcome, Result
from aligncurate.errors import ShardError
from aligncurate.io import retries

GRACE = 10.0
"""Seconds that shards in hand are given after Ctrl-C."""

_ENDING = 1.0  # seconds that the threads are given to end after Ctrl-C; what hangs is left behind


def run(
    function: Function[Item, Result],
    shards: Iterable[Item],
    *,
    workers: int = 1,
    on_stop: Callable[[], None] = lambda: None,
    finish: Callable[[Sequence[Item]], bool] = lambda running: False,
) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard in threads; see `aligncurate.engines.contract`.

    Args:
        function: makes a result of a shard.
        shards: what it is called with.
        workers: number of threads.
        on_stop: called when the run ends, also early, before its threads are joined.
        finish: after Ctrl-C, whether the shards in hand are waited for; a second Ctrl-C ends the run at once.

    Raises KeyboardInterrupt after Ctrl-C, within two seconds even if a thread hangs.
    """
    stopping = Event()

    def check() -> None:
        if stopping.is_set():
            raise Cancelled

    waiting = iter(shards)
    running: dict[Future[Result], Item] = {}
    deadline: float | None = None  # after Ctrl-C
    pool = ThreadPoolExecutor(workers, thread_name_prefix="shard")
    try:
        while True:
            # Submit only what can run now, so that a million shards are not queued up.
            while deadline is None and len(running) < workers and (shard := next(waiting, None)) is not None:
                running[pool.submit(function, shard, check)] = shard
            if not running and deadline is None:
                break
            try:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                done, _ = wait(running, left, FIRST_COMPLETED)
            except KeyboardInterrupt:
                if deadline is not None or not finish(list(running.values())):
                    raise
                deadline = monotonic() + GRACE
                continue
            for future in done:
                shard = running.pop(future)
                try:
                    yield Outcome(shard, future.result(), None)
                except ShardError as error:
                    yield Outcome(shard, None, error)
            if deadline is not None and not (done and running and finish(list(running.values()))):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        stopping.set()
        on_stop()
        pool.shutdown(wait=False, cancel_futures=True)
        with retries.stopped():
            wait(running, _ENDING)
        raise
    except BaseException:
        stopping.set()
        on_stop()
        pool.shutdown()
        raise
    on_stop()
    pool.shutdown()
