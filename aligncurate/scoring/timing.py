"""How long the stages of a scoring run take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

STAGES = ("read", "decode", "tokenize", "copy", "encode", "write")
"""`read` finds pairs and fetches image bytes, `decode` includes resizing, `copy` makes batches and moves them to the
device, `encode` runs the model, `write` makes Parquet."""


@dataclass(frozen=True)
class StageTimes:
    """How long the threads of a run spent in each stage.

    Attributes:
        seconds: by stage, summed over threads.
        wall: seconds that the run took.
        threads: how many threads could be in each stage at once.
    """

    seconds: Mapping[str, float]
    wall: float
    threads: Mapping[str, int]

    @property
    def busy(self) -> dict[str, float]:
        """Share of the run, 0..1, during which the threads of each stage worked."""
        return {s: self.seconds[s] / max(self.wall * self.threads[s], 1e-9) for s in self.seconds}

    @property
    def bottleneck(self) -> str:
        """The stage whose threads waited least: only speeding it up makes the run faster."""
        return max(self.busy, key=lambda stage: self.busy[stage])


class StageClock:
    """Sums up the time that the threads of a run spend in each stage."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[StageClock], tuple[()]]:
        return StageClock, ()  # each process has its own

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            with self._lock:
                self._seconds[name] += taken

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another process measured."""
        with self._lock:
            for stage, taken in seconds.items():
                self._seconds[stage] += taken

    def take(self) -> dict[str, float]:
        """The seconds by stage so far, which then begin again at 0."""
        with self._lock:
            taken, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return taken

    def times(self, wall: float, threads: Mapping[str, int]) -> StageTimes:
        """The times so far of the stages in `threads`; see `StageTimes`."""
        return StageTimes({s: round(t, 3) for s, t in self._seconds.items() if s in threads}, wall, threads)
