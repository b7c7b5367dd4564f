"""The engine for clusters: Ray actors, one per GPU or processor core, on any number of machines.

Only shards' names, what workers tell and results travel. A free actor gets one shard at a time. An actor that dies, or
whose machine does, is replaced, and its shard is tried again. Actors that Ray cannot place yet keep nobody waiting:
they start when a machine joins the cluster.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from aligncurate import __version__
from aligncurate.engines import threads
from aligncurate.engines.contract import Cancelled, Check, Function, Item, Outcome, Result
from aligncurate.engines.worker import TRIES, Parent, connect, work
from aligncurate.errors import ShardError, UserError, WorkerError
from aligncurate.progress import notice

_STOP_SECONDS = 1.0  # that actors have to clean up after a run was stopped
_TELL_SECONDS = 0.5  # between two messages of an actor, so that the parent of hundreds keeps up


def run(
    function: Function[Item, Result],
    shards: Iterable[Item],
    *,
    workers: int | None,
    on_message: Callable[[Any], None] = lambda message: None,
    finish: Callable[[Sequence[Item]], bool] = lambda running: False,
    num_gpus: float = 0,
    address: str | None = None,
) -> Generator[Outcome[Item, Result]]:
    """Call `function(shard, check)` for every shard in Ray actors; see `aligncurate.engines.contract`.

    The function, shards and results are pickled, so the function must be defined in a module that every machine has.
    Actors end when this process does, however it ends. Raises UserError without Ray or its cluster, WorkerError when
    actors cannot start; a shard whose actors keep dying becomes an outcome with a ShardError.

    Args:
        function: makes a result of a shard; it may tell `aligncurate.engines.worker.parent()` something.
        shards: what it is called with.
        workers: number of actors; those without a place wait for one. None: as many as there are places now.
        on_message: called with what actors tell, in one thread per actor.
        finish: after Ctrl-C, whether the shards in hand are waited for.
        num_gpus: GPUs of each actor.
        address: of the cluster, such as `auto`; by default Ray starts on this machine, unless it is running here.
    """
    with _connected(address):
        workers = workers or _places(num_gpus)
        actors = _Actors(function, on_message, workers, num_gpus)
        try:
            yield from threads.run(actors.call, shards, workers=workers, on_stop=actors.stop, finish=finish)
        finally:
            actors.stop()


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to Ray: the caller's, or one of our own."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--engine ray needs Ray; run `pip install 'aligncurate[ray]'`.") from None
    if ray.is_initialized():
        yield
        return
    _check_listens(address)
    local = {"include_dashboard": False} if address is None and not os.environ.get("RAY_ADDRESS") else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:  # no cluster, no such address, other versions
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {cause}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str | None) -> None:
    """Raises UserError for a `host:port` where nothing listens; Ray itself would try for minutes, then exit."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=30).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from None


def _places(num_gpus: float) -> int:
    """How many actors the cluster has room for, at least one."""
    import ray

    resources = ray.cluster_resources()
    places = resources.get("CPU", 0)
    return max(1, int(min(places, resources.get("GPU", 0) / num_gpus) if num_gpus else places))


@dataclass(frozen=True)
class _Actor:
    """The parent's side of an actor.

    Attributes:
        number: from 0; that of the actor that it replaces.
        handle: Ray's.
        started: a reference to the result of its start.
        failures: actors in a row, with those that it replaces, that did not start.
    """

    number: int
    handle: Any
    started: Any
    failures: int = 0


class _Actors:
    """Actors that call one function; `call` is used by several threads."""

    def __init__(
        self, function: Function[Any, Any], on_message: Callable[[Any], None], number: int, num_gpus: float
    ) -> None:
        import ray

        path = os.environ.get("PYTHONPATH")
        self._make = ray.remote(concurrency_groups={"stop": 1})(_Worker).options(
            num_cpus=1,
            num_gpus=num_gpus,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
        )
        self._function = ray.put(pickle.dumps(function))
        self._on_message = on_message
        self._free: SimpleQueue[_Actor | None] = SimpleQueue()  # None: the run was stopped
        self._all: dict[Any, _Actor] = {}
        self._lock = Lock()
        self._stopped = False
        if num_gpus and not ray.cluster_resources().get("GPU"):
            notice("the Ray cluster has no GPU yet; the run starts when a machine with one joins.")
        for i in range(number):
            self._add(i)

    def _add(self, number: int, failures: int = 0) -> None:
        with self._lock:
            if self._stopped:
                return
            handle = self._make.remote()
            actor = _Actor(
                number,
                handle,
                handle.start.remote(number, self._function, sys.path, os.getcwd(), __version__),
                failures,
            )
            self._all[handle] = actor
        actor.started.future().add_done_callback(lambda _: self._free.put(actor))

    def call(self, shard: Any, check: Check) -> Any:
        """Return or raise what the function does."""
        from ray.exceptions import RayError

        for _ in range(TRIES):
            actor = self._take()
            try:
                result = self._called(actor.handle, shard)
            except RayError as error:
                self._lose(actor.handle)
                check()  # a stopped run has ended its actors
                self._add(actor.number)
                cause = f"Ray worker {_how(error)}"
            except BaseException:
                self._free.put(actor)
                raise
            else:
                self._free.put(actor)
                return result
        raise ShardError(f"{shard}: its {cause}, in each of {TRIES} tries")

    def _take(self) -> _Actor:
        """A free actor that has started and lives. Raises WorkerError if none can start."""
        import ray
        from ray.exceptions import RayActorError, RayError

        while actor := self._free.get():
            try:
                ray.get(actor.started)
                ray.get(actor.handle.ping.remote())  # it may have died since, which is not the next shard's fault
                return replace(actor, failures=0)
            except RayActorError as error:
                self._lose(actor.handle)
                if actor.failures + 1 == TRIES:
                    raise WorkerError(f"a Ray worker {_how(error)} before it started") from None
                self._add(actor.number, actor.failures + 1)
            except RayError as error:  # what it cannot load, or an environment that cannot be made
                if cause := getattr(error, "cause", None):
                    error = cause
                raise WorkerError(f"a Ray worker cannot start: {error}") from None
        raise Cancelled

    def _called(self, handle: Any, shard: Any) -> Any:
        import ray

        for told in handle.call.options(num_returns="streaming").remote(shard):
            for kind, message in map(pickle.loads, ray.get(told)):
                if kind == "told":
                    self._on_message(message)
                elif kind == "failed":
                    raise message
                else:
                    return message
        raise Cancelled

    def _lose(self, handle: Any) -> None:
        """End an actor that seems dead: it may only be out of reach."""
        import ray

        with self._lock:
            self._all.pop(handle, None)
        with suppress(Exception):
            ray.kill(handle)

    def stop(self) -> None:
        """Cancel what the actors have in hand, then end them."""
        import ray

        with self._lock:
            self._stopped = True
            actors, self._all = list(self._all.values()), {}
        if not actors:
            return
        started, _ = ray.wait([actor.started for actor in actors], num_returns=len(actors), timeout=0)
        running = [actor for actor in actors if actor.started in started]
        ended = [actor.handle.stop.options(concurrency_group="stop").remote(_STOP_SECONDS) for actor in running]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=_STOP_SECONDS)
        for actor in actors:
            ray.kill(actor.handle)
            self._free.put(None)


def _how(error: Exception) -> str:
    return "was on a machine that left the cluster" if "node has died" in str(error) else "process ended"


class _Worker:
    """The actor. Its function runs in a thread, so that what it tells can be sent meanwhile."""

    def start(self, number: int, function: bytes, path: Sequence[str], folder: str, version: str) -> None:
        """Load the function. The parent finds modules in `path`, runs in `folder`, and has aligncurate `version`."""
        if version != __version__:
            raise WorkerError(f"it has aligncurate {__version__}, the driver {version}; install the same on all.")
        sys.path.extend(entry for entry in path if entry not in sys.path)
        with suppress(OSError):  # relative paths mean the same on machines that have the folder
            os.chdir(folder)
        self._received: SimpleQueue[Any] = SimpleQueue()
        self._sent: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._stopped = Event()
        self._received.put(pickle.loads(function))
        connect(Parent(self._send, number))
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def _send(self, kind: str, *message: Any) -> None:
        self._sent.put((kind, pickle.dumps((kind, *message))))

    def _work(self) -> None:
        work(self._received, self._send, self._stopped)
        self._sent.put(("stopped", b""))

    def ping(self) -> None:
        """Show that it lives."""

    def call(self, shard: Any) -> Generator[list[bytes]]:
        """What the function tells, returns or raises, a few messages at a time."""
        self._received.put(shard)
        messages: list[bytes] = []
        due = monotonic()
        while True:
            try:
                kind, message = self._sent.get(timeout=max(0.0, due - monotonic()) if messages else None)
            except Empty:
                yield messages
                messages, due = [], monotonic() + _TELL_SECONDS
                continue
            if kind == "stopped":
                return
            messages.append(message)
            if kind != "told":
                yield messages
                return

    def stop(self, seconds: float) -> None:
        """Cancel the function, and wait until it has ended."""
        self._stopped.set()
        self._received.put(None)
        self._thread.join(seconds)
