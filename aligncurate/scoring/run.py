"""A run of `score` or `ingest` on one device: its shards over threads of this process, or over worker processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.engines import processes, threads
from aligncurate.engines.contract import Outcome
from aligncurate.errors import ShardError
from aligncurate.io import retries, storage
from aligncurate.progress import Meter, notice
from aligncurate.scoring.encode import EncodeService
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.packet import MEMORIES, EncoderInputs, LocalLink, Packet, Progress, Scores, received
from aligncurate.scoring.shard import PartResult, ShardScorer, WorkerJob
from aligncurate.scoring.timing import STAGES, StageClock, StageTimes
from aligncurate.sources.base import Shard, Source

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder

_SHARDS = 2  # at once in this process, so that the encoder does not wait between two shards
_SHARDS_EACH = 2  # at least, for each worker process: with fewer, threads of this process share a shard
_MANY_ROWS = 10_000  # fewer are done before worker processes have started


@dataclass(frozen=True)
class WorkerPlan:
    """What reads and decodes images: worker processes with some threads each, or the threads of this process.

    Attributes:
        processes: 0 for this process.
        threads: in each process.
    """

    processes: int
    threads: int

    @property
    def shards(self) -> int:
        """How many shards are worked on at once."""
        return self.processes or _SHARDS


class DeviceRun:
    """Makes parts with the encoders of one device.

    Args:
        source: where pairs come from.
        writer: where parts go.
        encoders: by the column for their scores. Without any, images are only measured and hashed (`ingest`).
        options: of the run, with `batch_size`.
        meter: shows progress.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        encoders: Mapping[str, Encoder],
        options: ScoreOptions,
        meter: Meter,
    ) -> None:
        assert options.batch_size is not None
        self._source, self._writer, self._options, self._meter = source, writer, options, meter
        self._clock = StageClock()
        self._done: dict[int, int] = {}  # rows by shard
        self.saved = 0
        """Rows of parts that this run has committed."""
        self._service: EncodeService | None = None
        self._inputs = EncoderInputs((), (), (), options.batch_size)
        self._on_cpu = False
        if encoders:
            keep = options.embeddings != "none"
            self._service = EncodeService(encoders, options.batch_size, self._clock, keep_embeddings=keep)
            self._inputs = self._service.inputs
            self._on_cpu = next(iter(encoders.values())).device.type == "cpu"
        self._plan = WorkerPlan(0, options.worker_count)

    def parts(
        self, shards: Sequence[Shard], finish: Callable[[Sequence[Shard]], bool]
    ) -> Iterator[Outcome[Shard, PartInfo]]:
        """Make and commit the parts of some shards; see `aligncurate.engines.contract`.

        Args:
            finish: after Ctrl-C, whether the shards in hand are waited for.
        """
        self._plan = self._choose_plan(len(shards))
        for outcome in self._made(shards, finish):
            made = outcome.result
            if made is not None:
                self.saved += made.part.rows
                self._clock.add(made.seconds)
                if made.counted:
                    self._source.add_counts(made.counted)
            yield Outcome(outcome.shard, made.part if made is not None else None, outcome.error)

    def _made(
        self, shards: Sequence[Shard], finish: Callable[[Sequence[Shard]], bool]
    ) -> Iterator[Outcome[Shard, PartResult]]:
        if self._plan.processes:
            job = self._job()
            if _is_picklable(job):
                yield from processes.run(
                    job,
                    shards,
                    workers=self._plan.processes,
                    memories=MEMORIES if self._service else 0,
                    on_message=self._advance,
                    answer=lambda question, memories: self._encode(received(question, memories)),
                    finish=finish,
                )
                return
            notice("this encoder's preprocessing cannot be sent to worker processes, so one process reads.")
            self._plan = WorkerPlan(0, self._options.worker_count)
        link = LocalLink(self._encode, self._advance)
        scorer = ShardScorer(
            self._source, self._writer, self._inputs, self._options, self._plan.threads, link, self._clock
        )
        interrupted = False
        try:
            yield from threads.run(scorer.part, shards, workers=_SHARDS, finish=finish)
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            scorer.close(wait=not interrupted)

    def _encode(self, packet: Packet) -> Future[Scores]:
        assert self._service is not None
        return self._service.submit(packet)

    def _job(self) -> WorkerJob:
        return WorkerJob(self._source, self._writer, self._inputs, self._options, self._plan.threads, retries.timeout())

    def _choose_plan(self, shards: int) -> WorkerPlan:
        """Processes where there is enough to do: one process reads at most some 4,000 pairs per second.

        An encoder on the CPU is slower than that and needs the cores itself, so it gets processes only if the user asks
        for workers. JPEGs for a GPU's decoder are read by this process.
        """
        workers = self._options.worker_count
        rows = self._meter.total
        few = rows is not None and rows - self._meter.skipped < _MANY_ROWS
        alone = few or self._options.decode == "gpu" or (self._on_cpu and self._options.workers is None)
        number = 0 if alone else min(workers, shards // _SHARDS_EACH)
        return WorkerPlan(number, max(1, workers // number)) if number > 1 else WorkerPlan(0, workers)

    def _advance(self, progress: Progress) -> None:
        self._meter.skip(progress.taken_over)
        self._meter.add(progress.rows - progress.taken_over, progress.ok, progress.failed)
        self._done[progress.shard] = self._done.get(progress.shard, 0) + progress.rows

    def close(self, *, wait: bool = True) -> None:
        """End the encoding thread; `wait` False leaves it behind if it hangs."""
        if self._service is not None:
            self._service.close(wait=wait)

    def seconds_left(self, shards: Sequence[Shard]) -> float | None:
        """Seconds until the first of some shards that are being scored is done; None if that is not known."""
        if not self._meter.rate or retries.is_stalled():
            return None
        left = [rows - self._done.get(s.index, 0) for s in shards if (rows := self._rows(s)) is not None]
        return min(left) * len(shards) / self._meter.rate if left else None

    def _rows(self, shard: Shard) -> int | None:
        """The number of pairs in a shard, if it is cheap to find out."""
        if shard.stop is not None:
            rows = shard.stop - shard.start
        elif storage.is_remote(shard.uri):
            return None
        else:
            try:
                rows = self._source.count(shard, shard.limit)
            except (OSError, ShardError):
                return None
        return rows if shard.limit is None else min(rows, shard.limit)

    def take_seconds(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        return self._clock.take()

    def times(self, shards: int) -> StageTimes:
        """How long each stage took in a run over this number of shards."""
        plan = self._plan
        own = max(1, min(shards, plan.shards))
        pool = own * plan.threads if plan.processes else plan.threads
        # A shard's own thread finds its pairs, and this process decodes for a GPU; the others read and decode images.
        decoding = pool + (own if self._options.decode == "gpu" else 0)
        counts = dict.fromkeys(STAGES, own) | {"read": pool + own, "decode": decoding, "encode": 1}
        if self._service is None:
            counts = {stage: counts[stage] for stage in ("read", "decode", "write")}
        return self._clock.times(self._meter.seconds, counts)


def _is_picklable(job: WorkerJob) -> bool:
    """Whether the job can be pickled: a transform of an encoder's own may hold anything."""
    try:
        pickle.dumps(job)
    except Exception:
        return False
    return True
