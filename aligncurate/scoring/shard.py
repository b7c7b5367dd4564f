"""One shard of a source to one scored part: read, decode, tokenize, encode and write, all at the same time.

Pairs are read in order; their images are fetched, decoded and resized a little ahead, and gathered into windows of
several batches. A window's packet goes to the encoders, which may be in another process, and while they work on it the
next is being made and the one before is written. Windows begin with the shard and depend on nothing that ran before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from traceback import extract_tb
from typing import Any

import numpy as np

from aligncurate.dataset.part import PartWriter
from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.record import NOT_FAILED, Pair, Status
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.errors import ShardError, UserError
from aligncurate.images.decode import no_decoder_warnings
from aligncurate.io import retries
from aligncurate.io.retries import Stopped
from aligncurate.scoring import fast_against_exact
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.packet import EncoderInputs, Link, Packet, Progress, Scores, WorkerLink
from aligncurate.scoring.prepare import PreparedPair, Preparer
from aligncurate.scoring.retry import earlier_rows
from aligncurate.scoring.rows import RowWriter
from aligncurate.scoring.timing import StageClock
from aligncurate.sources.base import Shard, Source

_LARGEST_WINDOW = 512  # pairs, whose texts are grouped by length; more if a batch is larger
_BATCHES = 8  # per window


@dataclass(frozen=True)
class PartResult:
    """A part that was made, and what its process found out on the way since the last one.

    Attributes:
        seconds: by stage, of a worker process.
        counted: see `Source.take_counts`.
    """

    part: PartInfo
    seconds: dict[str, float]
    counted: list[Counter[str]]


@dataclass
class Window:
    """Consecutive pairs of a shard; those to encode are the rows of a packet, in order."""

    pairs: list[PreparedPair]
    encoded: list[PreparedPair]
    compared: list[int]
    scores: Future[Scores] | None


class ShardScorer:
    """Makes the parts of a run; shared by the threads of a process.

    Args:
        source: where pairs come from.
        writer: where parts go.
        inputs: what the encoders take.
        options: of the run.
        threads: how many threads decode images.
        link: reaches the encoders.
        clock: measures each stage.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        inputs: EncoderInputs,
        options: ScoreOptions,
        threads: int,
        link: Link,
        clock: StageClock,
    ) -> None:
        self._source, self._writer, self._inputs, self._options = source, writer, inputs, options
        self._link, self._clock = link, clock
        self._preparer = Preparer(
            inputs.columns, inputs.preprocesses, options, clock, image_root_changed=writer.image_root_changed
        )
        self._window = max(inputs.batch, min(_BATCHES * inputs.batch, _LARGEST_WINDOW))
        # The next window is decoded while this one is being loaded.
        self._ahead = self._window + 2 * threads
        # Pairs that wait for a thread, with their images' bytes where the source has these at hand.
        self._queue = 4 * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def close(self, *, wait: bool = True) -> None:
        """End the threads; `wait` False leaves behind what hangs."""
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=True)

    def part(self, shard: Shard, check: Callable[[], None]) -> PartResult:
        """Make and commit the part of `shard`. Raises ShardError when its file cannot be read at all."""
        earlier, facts = earlier_rows(self._writer, shard) if self._options.retry_errors else (iter(()), {})
        encoding: deque[Window] = deque()
        with self._writer.part(shard.index) as part:
            part.facts.update(facts)
            rows = RowWriter(part, self._inputs.columns or ["score"], self._options.embed_images, self._clock)
            try:
                for pairs in self._windows(self._prepared(shard, earlier, check)):
                    encoding.append(self._submit(pairs))
                    if len(encoding) == 2:
                        self._finish(shard, encoding.popleft(), part, rows)
                while encoding:
                    check()
                    self._finish(shard, encoding.popleft(), part, rows)
            finally:
                for window in encoding:
                    if window.scores is not None:
                        window.scores.cancel()
            rows.finish()
            self._source.check_unchanged(shard)
        assert part.info is not None
        return PartResult(part.info, {}, [])

    def _read(self, shard: Shard) -> Iterator[Pair]:
        try:
            pairs = iter(self._source.read(shard))
            while True:
                with self._clock.stage("read"):
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
        prepare = self._preparer.prepare
        try:
            for number, pair in enumerate(self._read(shard)):
                check()
                if self._pool is None:
                    yield prepare(pair, next(earlier, None), number < compared)
                    continue
                waiting.append(self._pool.submit(prepare, pair, next(earlier, None), number < compared))
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

    def _submit(self, pairs: list[PreparedPair]) -> Window:
        """Tokenize, gather the pixels of those pairs that have some, and hand them to the encoders."""
        encoded = [pair for pair in pairs if pair.to_encode]
        if not encoded:
            return Window(pairs, [], [], None)
        with self._clock.stage("tokenize"):
            texts = [pair.text for pair in encoded]
            tokens = [tokenize(texts).numpy().astype(np.int32) for tokenize in self._inputs.tokenizers]
        with self._clock.stage("copy"):
            memory, pixels = self._gather(encoded)
            files = {row: pair.jpeg for row, pair in enumerate(encoded) if pair.jpeg is not None}
            exact = {row: pair.exact_pixels for row, pair in enumerate(encoded) if pair.exact_pixels is not None}
            stacked = np.stack([pixels.numpy() for pixels in exact.values()]) if exact else None
            packet = Packet(pixels, tokens, files, list(exact), stacked, memory)
        for pair in encoded:
            pair.pixels = pair.exact_pixels = pair.jpeg = None
        return Window(pairs, encoded, packet.compared, self._link.submit(packet))

    def _gather(self, pairs: list[PreparedPair]) -> tuple[int, list[np.ndarray[Any, Any]]]:
        """The pixels of all pairs, per kind; empty where the GPU decodes."""
        decoded = next((pair.pixels for pair in pairs if pair.pixels is not None), None)
        if decoded is not None:
            each = [((len(pairs), *tensor.shape), str(tensor.numpy().dtype)) for tensor in decoded]
        else:
            sizes = [preprocess.size or 0 for preprocess in self._inputs.preprocesses]
            each = [((len(pairs), 3, size, size), "uint8") for size in sizes]
        memory, pixels = self._link.arrays(each)
        for row, pair in enumerate(pairs):
            for kind, tensor in enumerate(pair.pixels or ()):
                pixels[kind][row] = tensor.numpy()
        return memory, pixels

    def _finish(self, shard: Shard, window: Window, part: PartWriter, rows: RowWriter) -> None:
        """Wait for a window's scores and write its rows."""
        if window.scores is not None:
            self._store(window, window.scores.result(), part)
        pairs = [prepared.pair for prepared in window.pairs]
        taken_over = sum(prepared.taken_over for prepared in window.pairs)
        ok = sum(p.pair.status is Status.OK and not p.taken_over for p in window.pairs)
        failed = sum(pair.status not in NOT_FAILED for pair in pairs)
        self._link.report(Progress(shard.index, len(pairs), ok, failed, taken_over))
        rows.add(pairs)

    def _store(self, window: Window, scores: Scores, part: PartWriter) -> None:
        """Set the scores of a window's pairs, and the part's facts."""
        usable = np.all(np.isfinite(scores.columns), axis=0).tolist()
        own = scores.columns.T.tolist()
        for row, prepared in enumerate(window.encoded):
            pair = prepared.pair
            if row in scores.failures:
                status, cause = scores.failures[row]
                pair.fail(Status(status), cause)
            elif not usable[row]:
                pair.fail(Status.READ_ERROR, "the encoder gave a score that is not finite")
            else:
                pair.score = own[row][0]
                pair.extra.update(zip(self._inputs.columns[1:], own[row][1:], strict=True))
                if scores.images is not None and scores.texts is not None:
                    pair.image_embedding, pair.text_embedding = scores.images[row], scores.texts[row]
        compared = [i for i, row in enumerate(window.compared) if row not in scores.failures]
        if compared:
            fast = scores.columns[0][[window.compared[i] for i in compared]]
            fast_against_exact.add_comparison(part.facts, scores.exact[compared], fast)
        if scores.batch < self._inputs.batch:  # memory ran out, in this part or before it
            part.facts["batch_size"] = scores.batch


@dataclass
class WorkerJob:
    """Makes parts in a worker process; the encoders are in its parent.

    Attributes:
        threads: that decode images in each worker.
        timeout: of remote reads, in seconds.
    """

    source: Source
    writer: DatasetWriter
    inputs: EncoderInputs
    options: ScoreOptions
    threads: int
    timeout: float
    _scorer: ShardScorer | None = field(default=None, init=False)
    _clock: StageClock = field(default_factory=StageClock, init=False)

    def __call__(self, shard: Shard, check: Callable[[], None]) -> PartResult:
        if self._scorer is None:
            self._scorer = self._begin()
        with no_decoder_warnings():
            made = self._scorer.part(shard, check)
        return PartResult(made.part, self._clock.take(), self.source.take_counts())

    def _begin(self) -> ShardScorer:
        retries.set_timeout(self.timeout)
        if self.inputs.columns:
            import torch

            torch.set_num_threads(1)  # one image at a time is resized; the cores have other workers
        return ShardScorer(self.source, self.writer, self.inputs, self.options, self.threads, WorkerLink(), self._clock)
