"""One shard of a source to one scored part: read, decode, tokenize, copy, encode and write, all at the same time.

A shard's own thread reads pairs, and a pool of threads fetches, decodes and resizes their images a little ahead. Pairs
are gathered into windows of several batches: while the one encoding thread works on a window, the next one is being
loaded and the one before is written. Windows begin with the shard and depend on nothing that ran before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from aligncurate.dataset.part import PartWriter
from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.record import NOT_FAILED, Pair, Status
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.io.retries import Stopped, is_stalled
from aligncurate.progress import Meter
from aligncurate.scoring import fast_against_exact
from aligncurate.scoring.encode import Embeddings, Window, WindowEncoder
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.prepare import PreparedPair, Preparer
from aligncurate.scoring.retry import earlier_rows
from aligncurate.scoring.rows import RowWriter
from aligncurate.scoring.timing import StageClock
from aligncurate.sources.base import Shard, Source

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder

_LARGEST_WINDOW = 1_024  # pairs, whose texts are grouped by length; more if a batch is larger
_BATCHES = 8  # per window


class ShardScorer:
    """Makes the parts of a run; shared by its threads.

    Args:
        source: where pairs come from.
        writer: where parts go.
        encoders: by the column for their scores. Without any, images are only measured and hashed (`ingest`).
        options: of the run; `workers` and `batch_size` are set.
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
        assert options.batch_size is not None and options.workers is not None
        self._source, self._writer, self._options, self._meter = source, writer, options, meter
        self.clock = StageClock()
        self._done: dict[int, int] = {}  # rows by shard
        self._encoder = WindowEncoder(encoders, self.clock)
        self._preparer = Preparer(
            self._encoder.columns,
            self._encoder.preprocesses,
            options,
            self.clock,
            image_root_changed=writer.image_root_changed,
        )
        self._batch = options.batch_size
        self._window = max(self._batch, min(_BATCHES * self._batch, _LARGEST_WINDOW))
        # The next window is decoded while this one is being loaded.
        self._ahead = self._window + 2 * options.workers
        # Pairs that wait for a worker, with their images' bytes where the source has these at hand.
        self._queue = 4 * options.workers
        self._decode_pool = ThreadPoolExecutor(options.workers, thread_name_prefix="decode")
        self._encode_thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def close(self, *, wait: bool = True) -> None:
        """End the threads; `wait` False leaves behind what hangs."""
        self._decode_pool.shutdown(wait, cancel_futures=True)
        self._encode_thread.shutdown(wait, cancel_futures=True)

    def seconds_left(self, shards: Sequence[Shard]) -> float | None:
        """Seconds until the first of some shards that are being scored is done; None if that is not known."""
        if not self._meter.rate or is_stalled():
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

    def part(self, shard: Shard, check: Callable[[], None]) -> PartInfo:
        """Make and commit the part of `shard`. Raises ShardError when its file cannot be read at all."""
        earlier, facts = earlier_rows(self._writer, shard) if self._options.retry_errors else (iter(()), {})
        encoding: deque[tuple[Window, Future[Embeddings]]] = deque()
        with self._writer.part(shard.index) as part:
            part.facts.update(facts)
            rows = RowWriter(part, self._encoder.columns or ["score"], self._options.embed_images, self.clock)
            try:
                for pairs in self._windows(self._prepared(shard, earlier, check)):
                    window = self._encoder.load(pairs)
                    encoding.append((window, self._encode_thread.submit(self._encoder.encode, window)))
                    if len(encoding) == 2:
                        self._finish(shard, *encoding.popleft(), part, rows)
                while encoding:
                    check()
                    self._finish(shard, *encoding.popleft(), part, rows)
            finally:
                for _, future in encoding:
                    future.cancel()
            rows.finish()
            self._source.check_unchanged(shard)
            smallest = self._encoder.smallest_batch
            if smallest is not None and smallest < self._batch:  # memory ran out, in this part or before it
                part.facts["batch_size"] = smallest
        assert part.info is not None
        return part.info

    def _read(self, shard: Shard) -> Iterator[Pair]:
        try:
            pairs = iter(self._source.read(shard))
            while True:
                with self.clock.stage("read"):
                    pair = next(pairs, None)
                if pair is None:
                    return
                yield pair
        except (ShardError, Stopped):
            raise
        except OSError as error:
            raise ShardError(f"{shard}: cannot be read: {error.strerror or error}") from None
        except UserError as error:  # the file was damaged, or has been since it was opened
            raise ShardError(str(error).rstrip(".")) from None
        except Exception as error:  # a fault of ours, or a file that nobody has thought of; other shards go on
            frame = extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {error}, at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
            raise ShardError(f"{shard}: cannot be read ({cause})") from error

    def _prepared(
        self, shard: Shard, earlier: Iterator[dict[str, Any]], check: Callable[[], None]
    ) -> Iterator[PreparedPair]:
        """Pairs of `shard` in order, prepared by the pool a little ahead of their use."""
        waiting: deque[Future[PreparedPair]] = deque()
        compared = fast_against_exact.PAIRS if shard.index == 0 and not self._options.retry_errors else 0
        try:
            for number, pair in enumerate(self._read(shard)):
                check()
                prepare = self._preparer.prepare
                waiting.append(self._decode_pool.submit(prepare, pair, next(earlier, None), number < compared))
                if len(waiting) > self._queue:
                    wait([waiting[-self._queue]])
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                check()
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _windows(self, pairs: Iterable[PreparedPair]) -> Iterator[list[PreparedPair]]:
        """Consecutive pairs, cut after a fixed number to encode, so that windows do not depend on the run."""
        window: list[PreparedPair] = []
        to_encode = 0
        for pair in pairs:
            window.append(pair)
            to_encode += pair.to_encode
            if to_encode == self._window or len(window) == 2 * self._window:
                yield window
                window, to_encode = [], 0
        if window:
            yield window

    def _finish(
        self, shard: Shard, window: Window, embeddings: Future[Embeddings], part: PartWriter, rows: RowWriter
    ) -> None:
        """Wait for a window's embeddings, then store its scores and write its rows."""
        keep = self._options.embeddings != "none"
        self._encoder.store_scores(window, embeddings.result(), part.facts, keep_embeddings=keep)
        pairs = [prepared.pair for prepared in window.pairs]
        taken_over = sum(prepared.taken_over for prepared in window.pairs)
        ok = sum(p.pair.status is Status.OK and not p.taken_over for p in window.pairs)
        self._meter.skip(taken_over)
        self._meter.add(len(pairs) - taken_over, ok, sum(pair.status not in NOT_FAILED for pair in pairs))
        rows.add(pairs)
        self._done[shard.index] = self._done.get(shard.index, 0) + len(pairs)
