"""One source shard to one scored part: read, decode, tokenize, copy, encode and write, each beside the others.

A shard's own thread reads pairs, and a pool of threads fetches, decodes and resizes their images a little ahead. Pairs
are gathered into windows of several batches; while the one encoding thread works on a window, the next one is made
ready and the one before is written. Windows begin at the start of a shard and depend on nothing that ran before.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aligncurate.dataset.part import SCORE_COUNTS, PartInfo, PartWriter, row_groups
from aligncurate.dataset.reader import DatasetWriter
from aligncurate.dataset.record import FINE, IMAGE_EMBEDDING, TEXT_EMBEDDING, Pair, Status, to_table, usable_scores
from aligncurate.errors import ImageError, ShardError
from aligncurate.images import gpu
from aligncurate.images.decode import decode, open_image
from aligncurate.images.formats import DecodeMode
from aligncurate.levels import Counts
from aligncurate.progress import Meter
from aligncurate.scoring.timing import Clock
from aligncurate.sources import Shard, Source
from aligncurate.sources.captions import scored_text

if TYPE_CHECKING:
    from torch import Tensor

    from aligncurate.encoders.load import Encoder

ScoreText = Literal["assistant", "user", "all"]

_ROWS_PER_GROUP = 10_000
_ROWS_PER_GROUP_WITH_IMAGES = 512  # image bytes wait in memory until their row group is written
# A row of an earlier run is taken over only for a pair that is the very same: its text and where its image lies.
_SAME = ("key", "caption", "conversations", "source", "image_path", "image_offset", "image_length", "row")
_CHECKED = 64  # pairs of the first shard that faster decoding also decodes exactly, to say how far it strays
_WINDOW = 1_024  # most pairs of a window, whose texts are grouped by length
_BATCHES = 8  # of a window
_ON_GPU = 128  # JPEGs that a GPU decodes at once


@dataclass(frozen=True)
class Settings:
    """How shards are scored.

    Attributes:
        mode: how images are decoded.
        batch_size: pairs that go through an encoder at once.
        workers: threads that fetch and decode images.
        score_text: turns of conversations that are compared with the image.
        embeddings: keep those of the first encoder.
        embed_images: keep the images' bytes.
        retry_errors: take over the good rows of committed parts.
    """

    mode: DecodeMode
    batch_size: int
    workers: int
    score_text: ScoreText
    embeddings: bool
    embed_images: bool
    retry_errors: bool


@dataclass
class _Item:
    """A pair on its way through the stages."""

    pair: Pair
    pixels: "list[Tensor] | None" = None  # one for each kind of preprocessing
    exact: "Tensor | None" = None
    file: bytes | None = None  # for the GPU to decode
    text: str = ""
    kept: bool = False  # taken over from an earlier run


@dataclass
class _Window:
    """Consecutive items, and what of them goes through the encoders."""

    items: list[_Item]
    chosen: list[_Item]
    pixels: "list[Tensor]"  # one for each kind of preprocessing, on the device
    tokens: "list[Tensor]"  # one for each encoder
    checked: list[int]  # places in `chosen` of the items decoded exactly too
    exact: "Tensor | None"


@dataclass
class _Embedded:
    """What the encoders made of a window: unit embeddings (images, texts), and those of the exact images."""

    each: "list[tuple[Tensor, Tensor]]"
    exact: "Tensor | None"


class ShardScorer:
    """Makes parts; shared by the threads of a run.

    Args:
        source: where pairs come from.
        writer: where parts go.
        encoders: by the column for their scores. Without any, images are only measured and hashed (`ingest`).
        settings: how.
        meter: shows progress.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        encoders: "Sequence[tuple[str, Encoder]]",
        settings: Settings,
        meter: Meter,
    ) -> None:
        self._source, self._writer, self._settings, self._meter = source, writer, settings, meter
        self._columns = [column for column, _ in encoders]
        self._encoders = [encoder for _, encoder in encoders]
        kinds = {e.preprocess.pixels_id: e.preprocess for e in self._encoders}  # encoders may want the same pixels
        self._wanted = list(kinds.values())
        self._kind = [list(kinds).index(e.preprocess.pixels_id) for e in self._encoders]
        self._window = max(settings.batch_size, min(_BATCHES * settings.batch_size, _WINDOW))
        self.clock = Clock()
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="decode")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._encoding.shutdown(cancel_futures=True)

    def part(self, shard: Shard, check: Callable[[], None]) -> PartInfo:
        """Commit the part of `shard`. Raises ShardError when its file cannot be read at all."""
        done, facts = self._reusable(shard)
        encoding: deque[tuple[_Window, Future[_Embedded]]] = deque()
        with self._writer.part(shard.index) as part:
            part.facts.update(facts)
            rows = _Rows(part, self._columns, self._settings.embed_images, self.clock)
            try:
                for items in self._windows(self._items(shard, done, check)):
                    window = self._ready(items)
                    encoding.append((window, self._encoding.submit(self._embed, window)))
                    if len(encoding) == 2:
                        self._finish(*encoding.popleft(), rows)
                while encoding:
                    check()
                    self._finish(*encoding.popleft(), rows)
            finally:
                for _, future in encoding:
                    future.cancel()
            rows.end()
            smallest = min((encoder.towers.batch for encoder in self._encoders), default=self._settings.batch_size)
            if smallest < self._settings.batch_size:  # memory ran out, in this part or before it
                part.facts["batch_size"] = smallest
        assert part.info is not None
        return part.info

    def _reusable(self, shard: Shard) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
        """Rows of the committed part, which --retry-errors keeps where they did not fail, and what else it says."""
        info = self._writer.committed(shard.index) if self._settings.retry_errors else None
        if info is None:
            return iter(()), {}
        tables = row_groups(self._writer.path / info.name)
        return (row for table in tables for batch in table.to_batches(256) for row in batch.to_pylist()), info.facts

    def _items(self, shard: Shard, done: Iterator[dict[str, Any]], check: Callable[[], None]) -> Iterator[_Item]:
        """Pairs of `shard` in order, decoded by the pool a little ahead of their use."""
        waiting: deque[Future[_Item]] = deque()
        # The next window is decoded while this one is being made ready.
        ahead = self._window + 2 * self._settings.workers
        try:
            for number, pair in enumerate(self._read(shard)):
                check()
                checked = shard.index == 0 and number < _CHECKED and not self._settings.retry_errors
                waiting.append(self._pool.submit(self._prepare, pair, next(done, None), checked))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                check()
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _read(self, shard: Shard) -> Iterator[Pair]:
        try:
            pairs = iter(self._source.read(shard))
            while True:
                with self.clock.stage("read"):
                    pair = next(pairs, None)
                if pair is None:
                    return
                yield pair
        except OSError as error:
            raise ShardError(f"{shard}: cannot be read: {error.strerror or error}") from None

    def _prepare(self, pair: Pair, row: dict[str, Any] | None, checked: bool) -> _Item:
        """Read, measure, hash and decode; whatever is wrong becomes the pair's status."""
        item = _Item(pair)
        if row is not None and row["status"] in FINE and all(getattr(pair, n) == row[n] for n in _SAME):
            self._restore(pair, row)
            item.kept = True
            return item
        # Scores and levels of the input are kept by `ingest`; scoring makes them anew.
        if self._encoders:
            pair.score = pair.level = None
            pair.extra.update(dict.fromkeys(self._columns[1:]))
        text = scored_text(pair, self._settings.score_text)
        if pair.load is not None and pair.status not in (Status.UNSAFE_PATH, Status.MULTI_IMAGE):
            try:
                self._see(item, checked)
            except ImageError as error:
                pair.fail(Status(error.status), str(error))
            except (FileNotFoundError, NotADirectoryError):
                pair.fail(Status.MISSING_IMAGE, f"there is no image {pair.image_path}")
            except (OSError, ValueError) as error:  # ValueError: a name that no file can have
                reason = getattr(error, "strerror", None) or error
                pair.fail(Status.READ_ERROR, f"the image cannot be read: {reason}")
        if pair.conversations is not None and not text:
            pair.fail(Status.MISSING_CAPTION, f"the conversation has no text to score ({self._settings.score_text})")
        item.text = text or ""
        if pair.status is not Status.OK:
            item.pixels = item.exact = item.file = pair.score = pair.level = None
        return item

    def _see(self, item: _Item, checked: bool) -> None:
        pair, mode = item.pair, self._settings.mode
        assert pair.load is not None
        with self.clock.stage("read"):
            data = pair.load()
        pair.load = None  # let the bytes go as soon as nothing needs them
        with self.clock.stage("decode"):
            pair.sha256 = hashlib.sha256(data).digest()
            if self._settings.embed_images:
                pair.image = data
            image, pair.width, pair.height = open_image(data)
            if not self._encoders or pair.status is not Status.OK:
                return
            if mode == "gpu" and gpu.decodable(data, image, self._wanted):
                for preprocess in self._wanted:
                    preprocess.check(*image.size)
                item.file = data
            else:
                item.pixels = decode(data, image, self._wanted, mode)
            if checked and mode != "exact":
                item.exact = decode(data, open_image(data)[0], self._wanted[:1], "exact")[0]

    def _restore(self, pair: Pair, row: dict[str, Any]) -> None:
        """Take over what an earlier run found for this pair."""
        for name in ("width", "height", "sha256", "score", "level", "error"):
            setattr(pair, name, row[name])
        pair.image = row.get("image")
        pair.status = Status(row["status"])
        pair.load = None
        for name in (IMAGE_EMBEDDING, TEXT_EMBEDDING):
            if row.get(name) is not None:
                setattr(pair, name, np.asarray(row[name], np.float16))
        pair.extra.update({column: row[column] for column in self._columns[1:]})

    def _windows(self, items: Iterable[_Item]) -> Iterator[list[_Item]]:
        """Consecutive items with so many to encode among them: the same whatever ran before."""
        window: list[_Item] = []
        waiting = 0
        for item in items:
            window.append(item)
            waiting += item.pixels is not None or item.file is not None
            if waiting == self._window or len(window) == 2 * self._window:
                yield window
                window, waiting = [], 0
        if window:
            yield window

    def _ready(self, items: list[_Item]) -> _Window:
        """Tokens, and pixels on the device."""
        files = [item for item in items if item.file is not None]
        for start in range(0, len(files), _ON_GPU):
            with self.clock.stage("decode"):
                self._decode_on_gpu(files[start : start + _ON_GPU])
        chosen = [item for item in items if item.pixels is not None]
        if not chosen:
            return _Window(items, [], [], [], [], None)
        import torch

        with self.clock.stage("tokenize"):
            texts = [item.text for item in chosen]
            tokens = [encoder.tokenize(texts) for encoder in self._encoders]
        towers = self._encoders[0].towers
        with self.clock.stage("copy"):
            kinds = range(len(self._wanted))
            pixels = [towers.upload([i.pixels[kind] for i in chosen if i.pixels is not None]) for kind in kinds]
            checked = [i for i, item in enumerate(chosen) if item.exact is not None]
            exact = torch.stack([x for i in checked if (x := chosen[i].exact) is not None]) if checked else None
        for item in chosen:
            item.pixels = item.exact = None
        return _Window(items, chosen, pixels, tokens, checked, exact)

    def _decode_on_gpu(self, items: list[_Item]) -> None:
        """Pixels of files; when the GPU's decoder refuses one of them, the CPU decodes them all and says which."""
        files = [item.file for item in items if item.file is not None]
        try:
            found = gpu.decode_jpegs(files, self._wanted, self._encoders[0].device)
        except RuntimeError:
            found = []
        for number, (item, data) in enumerate(zip(items, files, strict=True)):
            item.file = None
            try:
                item.pixels = found[number] if found else decode(data, open_image(data)[0], self._wanted, "fast")
            except ImageError as error:
                item.pair.fail(Status(error.status), str(error))
                item.exact = None

    def _embed(self, window: _Window) -> _Embedded:
        """Runs in the encoding thread: the device has one batch at a time, whichever shard it is from."""
        if not window.chosen:
            return _Embedded([], None)
        with self.clock.stage("encode"):
            each = [
                encoder.embed(window.pixels[kind], tokens)
                for encoder, kind, tokens in zip(self._encoders, self._kind, window.tokens, strict=True)
            ]
            exact = None
            if window.exact is not None:
                exact, _ = self._encoders[0].embed(window.exact, window.tokens[0][window.checked])
        return _Embedded(each, exact)

    def _finish(self, window: _Window, embedded: Future[_Embedded], rows: "_Rows") -> None:
        """Give the window's pairs their scores, and write them."""
        found = embedded.result()
        scores = [(images * texts).sum(-1).numpy() for images, texts in found.each]
        for number, item in enumerate(window.chosen):
            own = [column[number] for column in scores]
            if not np.isfinite(own).all():
                item.pair.fail(Status.READ_ERROR, "the encoder gave no finite score")
                continue
            item.pair.score = float(own[0])
            item.pair.extra.update({c: float(s) for c, s in zip(self._columns[1:], own[1:], strict=True)})
            if self._settings.embeddings:
                images, texts = found.each[0]
                item.pair.image_embedding = images[number].numpy().astype(np.float16)
                item.pair.text_embedding = texts[number].numpy().astype(np.float16)
        if found.exact is not None:
            exact = (found.exact * found.each[0][1][window.checked]).sum(-1).numpy()
            _compare(exact, scores[0][window.checked], rows.facts)
        pairs = [item.pair for item in window.items]
        kept = sum(item.kept for item in window.items)
        ok = sum(item.pair.status is Status.OK and not item.kept for item in window.items)
        self._meter.skip(kept)
        self._meter.add(len(pairs) - kept, ok, sum(pair.status not in FINE for pair in pairs))
        rows.add(pairs)


class _Rows:
    """Writes a part's rows in groups, and counts their scores for `bucket`."""

    def __init__(self, part: PartWriter, columns: Sequence[str], embed_images: bool, clock: Clock) -> None:
        self.facts = part.facts
        self._part, self._clock = part, clock
        self._size = _ROWS_PER_GROUP_WITH_IMAGES if embed_images else _ROWS_PER_GROUP
        self._counts = {column: Counts.of([]) for column in columns}
        self._waiting: list[Pair] = []

    def add(self, pairs: list[Pair]) -> None:
        self._waiting += pairs
        while len(self._waiting) >= self._size:
            self._write(self._waiting[: self._size])
            self._waiting = self._waiting[self._size :]

    def end(self) -> None:
        if self._waiting:
            self._write(self._waiting)
        if self._counts:
            self.facts[SCORE_COUNTS] = {column: counts.to_json() for column, counts in self._counts.items()}

    def _write(self, pairs: list[Pair]) -> None:
        with self._clock.stage("write"):
            table = to_table(pairs, self._part.schema)
            for column in self._counts:
                self._counts[column] += Counts.of([usable_scores(table, column)])
            self._part.write(table)


def _compare(exact: Any, other: Any, facts: dict[str, Any]) -> None:
    """Note how far faster decoding strays, on the pairs that were decoded both ways."""
    changes = np.abs(exact - other).astype(float)
    changes = changes[np.isfinite(changes)]
    if not len(changes):
        return
    before = facts.get("fast_against_exact", {"pairs": 0, "mean": 0.0, "max": 0.0})
    pairs = before["pairs"] + len(changes)
    facts["fast_against_exact"] = {
        "pairs": pairs,
        "mean": float(before["mean"] * before["pairs"] + changes.sum()) / pairs,
        "max": float(max(before["max"], *changes)),
    }
