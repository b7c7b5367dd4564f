"""Where the time of a scoring run goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

STAGES = ("read", "decode", "tokenize", "copy", "encode", "write")
"""`read` is finding pairs and fetching image bytes, `decode` ends with resized pixels, `copy` makes batches of them
and brings those to the device, `encode` runs the model, `write` makes Parquet."""


@dataclass(frozen=True)
class Times:
    """Seconds that the threads of a run spent in each stage, and how much of them there was to spend.

    Attributes:
        seconds: by stage, added up over threads.
        wall: seconds that the run took.
        threads: how many threads could be in each stage at once.
    """

    seconds: Mapping[str, float]
    wall: float
    threads: Mapping[str, int]

    @property
    def busy(self) -> dict[str, float]:
        """Share of the time, 0..1, in which the threads of each stage worked."""
        return {s: self.seconds[s] / max(self.wall * self.threads[s], 1e-9) for s in self.seconds}

    @property
    def bottleneck(self) -> str:
        """The stage whose threads had least to wait: only a faster one would make the run shorter."""
        return max(self.busy, key=lambda stage: self.busy[stage])


class Clock:
    """Adds up what the threads of a run spend in each stage."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            with self._lock:
                self._seconds[name] += taken

    def times(self, wall: float, threads: Mapping[str, int]) -> Times:
        return Times({s: round(t, 3) for s, t in self._seconds.items() if s in threads}, wall, threads)
