"""One source shard to one scored part: read, decode, batch, encode, write."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aligncurate import storage
from aligncurate.dataset import Dataset, DatasetWriter, PartInfo, row_groups
from aligncurate.engines import local
from aligncurate.errors import ShardError, UserError
from aligncurate.images import Decode, ImageError, decode, open_image, pillow_unheard
from aligncurate.pairs import (
    FINE,
    IMAGE_EMBEDDING,
    TEXT_EMBEDDING,
    Pair,
    Status,
    schema,
    to_table,
)
from aligncurate.progress import Meter, meter, notice
from aligncurate.sources import Shard, Source, SourceOptions, open_source
from aligncurate.sources.base import limit_shards
from aligncurate.sources.texts import scored_text

if TYPE_CHECKING:
    import torch

    from aligncurate.encoders import Encoder, Precision

ScoreText = Literal["assistant", "user", "all"]

_ROWS_PER_GROUP = 10_000
_ROWS_PER_GROUP_WITH_IMAGES = 512  # image bytes wait in memory until their row group is written
# A row of an earlier run is taken over only for a pair that is the very same: its text and where its image lies.
_SAME = ("key", "caption", "conversations", "source", "image_path", "image_offset", "image_length", "row")
_CHECKED = 64  # pairs of the first shard that `--decode fast` also decodes exactly, to say how far it strays


@dataclass(frozen=True)
class Failure:
    """A shard that could not be read; a rerun tries it again."""

    shard: str
    error: str


@dataclass(frozen=True)
class Summary:
    """What a scoring or ingesting run did.

    Attributes:
        dataset: the finished dataset; None while some shards are missing.
        rows, seconds: done by this run, without what earlier runs had committed.
        resumed: parts that earlier runs had committed.
        failures: shards that could not be read.
    """

    dataset: Dataset | None
    rows: int
    seconds: float
    resumed: int
    failures: list[Failure]


@dataclass
class _Prepared:
    """A pair after reading and decoding."""

    pair: Pair
    pixels: "torch.Tensor | None" = None
    exact: "torch.Tensor | None" = None
    text: str = ""
    kept: bool = False  # taken over from an earlier run


class _ShardScorer:
    """Makes parts; shared by the threads of a run.

    Without an encoder images are only measured and hashed, which is what `ingest` does.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        encoder: "Encoder | None",
        *,
        mode: Decode,
        batch_size: int,
        workers: int,
        score_text: ScoreText,
        embeddings: bool,
        embed_images: bool,
        retry_errors: bool,
        shown: Meter,
    ) -> None:
        self._source, self._writer, self._encoder = source, writer, encoder
        self._mode, self._batch_size, self._score_text = mode, batch_size, score_text
        self._embeddings, self._embed_images = embeddings, embed_images
        self._retry = retry_errors
        self._meter = shown
        self._lookahead = batch_size + 2 * workers  # enough to keep the workers busy while a batch is encoded
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._encoding = Lock()  # one batch on the device at a time, whichever shard it is from

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def part(self, shard: Shard, check: Callable[[], None]) -> PartInfo:
        """Commit the part of `shard`. Raises ShardError when its file cannot be read at all."""
        done, facts = self._reusable(shard)
        with self._writer.part(shard.index) as part:
            part.facts.update(facts)
            rows: list[Pair] = []
            limit = _ROWS_PER_GROUP_WITH_IMAGES if self._embed_images else _ROWS_PER_GROUP
            for batch in self._batches(self._prepared(shard, done, check)):
                rows += self._encode(batch, part.facts, shard)
                ok = sum(p.pair.status is Status.OK and not p.kept for p in batch)
                kept = sum(p.kept for p in batch)
                self._meter.skip(kept)
                self._meter.add(len(batch) - kept, ok, sum(p.pair.status not in FINE for p in batch))
                while len(rows) >= limit:
                    part.write(to_table(rows[:limit], self._writer.schema))
                    rows = rows[limit:]
            if rows:
                part.write(to_table(rows, self._writer.schema))
        assert part.info is not None
        return part.info

    def _reusable(self, shard: Shard) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
        """Rows of the committed part, which --retry-errors keeps where they did not fail, and what else it says."""
        info = self._writer.committed(shard.index) if self._retry else None
        if info is None:
            return iter(()), {}
        tables = row_groups(self._writer.path / info.name)
        return (row for table in tables for batch in table.to_batches(256) for row in batch.to_pylist()), info.facts

    def _prepared(self, shard: Shard, done: Iterator[dict[str, Any]], check: Callable[[], None]) -> Iterator[_Prepared]:
        """Pairs of `shard` in order, decoded by the pool a little ahead of their use."""
        waiting: deque[Future[_Prepared]] = deque()
        try:
            for number, pair in enumerate(self._read(shard)):
                check()
                checked = shard.index == 0 and number < _CHECKED and not self._retry
                waiting.append(self._pool.submit(self._prepare, pair, next(done, None), checked))
                if len(waiting) > self._lookahead:
                    yield waiting.popleft().result()
            while waiting:
                check()
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _read(self, shard: Shard) -> Iterator[Pair]:
        try:
            yield from self._source.read(shard)
        except OSError as error:
            raise ShardError(f"{shard}: cannot be read: {error.strerror or error}") from None

    def _prepare(self, pair: Pair, row: dict[str, Any] | None, checked: bool) -> _Prepared:
        """Read, measure, hash and decode; whatever is wrong becomes the pair's status."""
        prepared = _Prepared(pair)
        if row is not None and row["status"] in FINE and all(getattr(pair, n) == row[n] for n in _SAME):
            _restore(pair, row)
            prepared.kept = True
            return prepared
        # Scores and levels of the input are kept by `ingest`; scoring makes them anew.
        if self._encoder is not None:
            pair.score = pair.level = None
        text = scored_text(pair, self._score_text)
        if pair.load is not None and pair.status not in (Status.UNSAFE_PATH, Status.MULTI_IMAGE):
            try:
                self._see(prepared, checked)
            except ImageError as error:
                pair.fail(error.status, str(error))
            except (FileNotFoundError, NotADirectoryError):
                pair.fail(Status.MISSING_IMAGE, f"there is no image {pair.image_path}")
            except (OSError, ValueError) as error:  # ValueError: a name that no file can have
                reason = getattr(error, "strerror", None) or error
                pair.fail(Status.READ_ERROR, f"the image cannot be read: {reason}")
        if pair.conversations is not None and not text:
            pair.fail(Status.MISSING_CAPTION, f"the conversation has no text to score ({self._score_text})")
        prepared.text = text or ""
        if pair.status is not Status.OK:
            prepared.pixels = prepared.exact = pair.score = pair.level = None
        return prepared

    def _see(self, prepared: _Prepared, checked: bool) -> None:
        pair = prepared.pair
        assert pair.load is not None
        data = pair.load()
        pair.load = None  # let the bytes go as soon as nothing needs them
        pair.sha256 = hashlib.sha256(data).digest()
        if self._embed_images:
            pair.image = data
        image, pair.width, pair.height = open_image(data)
        if self._encoder is not None and pair.status is Status.OK:
            prepared.pixels = decode(image, self._encoder.preprocess, self._mode)
            if checked and self._mode == "fast":
                prepared.exact = decode(open_image(data)[0], self._encoder.preprocess, "exact")

    def _batches(self, prepared: Iterable[_Prepared]) -> Iterator[list[_Prepared]]:
        """Consecutive pairs with `batch_size` to encode among them: the same whatever ran before."""
        batch: list[_Prepared] = []
        waiting = 0
        for item in prepared:
            batch.append(item)
            waiting += item.pixels is not None
            if waiting == self._batch_size or len(batch) == 10 * self._batch_size:
                yield batch
                batch, waiting = [], 0
        if batch:
            yield batch

    def _encode(self, batch: list[_Prepared], facts: dict[str, Any], shard: Shard) -> list[Pair]:
        pairs = [item.pair for item in batch]
        chosen = [item for item in batch if item.pixels is not None]
        if self._encoder is None or not chosen:
            return pairs
        import torch

        pixels = torch.stack([item.pixels for item in chosen if item.pixels is not None])
        tokens = self._encoder.tokenize([item.text for item in chosen])
        with self._encoding:
            images, texts = self._encoder.embed(pixels, tokens)
        scores = (images * texts).sum(-1).numpy()
        for item, score, image, text in zip(chosen, scores, images, texts, strict=True):
            if not np.isfinite(score):
                item.pair.fail(Status.READ_ERROR, "the encoder gave no finite score")
                continue
            item.pair.score = float(score)
            if self._embeddings:
                item.pair.image_embedding = image.numpy().astype(np.float16)
                item.pair.text_embedding = text.numpy().astype(np.float16)
        self._compare(chosen, tokens, texts, facts)
        for item in chosen:
            item.pixels = item.exact = None
        return pairs

    def _compare(
        self, chosen: list[_Prepared], tokens: "torch.Tensor", texts: "torch.Tensor", facts: dict[str, Any]
    ) -> None:
        """Note how far fast decoding strays, on the pairs that were decoded both ways."""
        import torch

        both = [i for i, item in enumerate(chosen) if item.exact is not None and item.pair.score is not None]
        if not both or self._encoder is None:
            return
        pixels = torch.stack([x for i in both if (x := chosen[i].exact) is not None])
        with self._encoding:
            images, _ = self._encoder.embed(pixels, tokens[both])
        exact = (images * texts[both]).sum(-1).numpy()
        changes = [abs(float(e) - float(chosen[i].pair.score or 0.0)) for e, i in zip(exact, both, strict=True)]
        before = facts.get("fast_against_exact", {"pairs": 0, "mean": 0.0, "max": 0.0})
        pairs = before["pairs"] + len(changes)
        facts["fast_against_exact"] = {
            "pairs": pairs,
            "mean": (before["mean"] * before["pairs"] + sum(changes)) / pairs,
            "max": max(before["max"], *changes),
        }


def _restore(pair: Pair, row: dict[str, Any]) -> None:
    """Take over what an earlier run found for this pair."""
    for name in ("width", "height", "sha256", "score", "level", "error"):
        setattr(pair, name, row[name])
    pair.image = row.get("image")
    pair.status = Status(row["status"])
    pair.load = None
    for name in (IMAGE_EMBEDDING, TEXT_EMBEDDING):
        if row.get(name) is not None:
            setattr(pair, name, np.asarray(row[name], np.float16))


def score(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    model_config: str | Path | None = None,
    device: str = "auto",
    precision: "Precision" = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    decode: Decode = "exact",
    embeddings: Literal["none", "fp16"] = "none",
    embed_images: bool = False,
    score_text: ScoreText = "assistant",
    limit: int | None = None,
    retry_errors: bool = False,
    source: SourceOptions | None = None,
    quiet: bool = False,
) -> Summary:
    """Score image-text pairs: cosine of an image-text encoder's unit embeddings.

    Args:
        sources: what to read; see `open_source`.
        out: folder of the new dataset. A folder that an interrupted run left is finished.
        model, pretrained, model_config, device, precision: the encoder; see `encoders.load`.
        batch_size: pairs encoded at once; by default 256 on a GPU, 32 on the CPU.
        workers: decoding threads; by default one per core, at most 16.
        decode: `exact` follows open_clip's own preprocessing; `fast` decodes JPEGs at reduced size.
        embeddings: `fp16` keeps the embeddings of image and text as columns.
        embed_images: copy the images' bytes into the dataset.
        score_text: turns of conversations that are compared with the image.
        limit: only the first so many pairs.
        retry_errors: in a finished or interrupted dataset, do the failed rows again.
        source: how to read the sources.
        quiet: show no progress.

    Raises UserError for what the user must change; rows that cannot be scored get a status instead.
    """
    from aligncurate import encoders

    opened = _open(sources, source)
    _check_numbers(batch_size=batch_size, workers=workers, limit=limit)
    encoder = encoders.load(model, pretrained, model_config, device, precision)
    batch = batch_size or (256 if encoder.device.type == "cuda" else 32)
    options = {
        "batch_size": batch,
        "decode": decode,
        "embeddings": embeddings,
        "score_text": score_text,
    }
    return _run(
        "score",
        opened,
        out,
        encoder,
        options,
        mode=decode,
        batch_size=batch,
        workers=workers,
        score_text=score_text,
        embeddings=embeddings == "fp16",
        embed_images=embed_images,
        limit=limit,
        retry_errors=retry_errors,
        source_options=source,
        quiet=quiet,
    )


def ingest(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    embed_images: bool = False,
    limit: int | None = None,
    retry_errors: bool = False,
    source: SourceOptions | None = None,
    quiet: bool = False,
) -> Summary:
    """Make a dataset without scores: images are measured and hashed, no model is loaded. Args as for `score`."""
    opened = _open(sources, source)
    _check_numbers(workers=workers, limit=limit)
    return _run(
        "ingest",
        opened,
        out,
        None,
        {},
        mode="exact",
        batch_size=256,
        workers=workers,
        score_text="all",
        embeddings=False,
        embed_images=embed_images,
        limit=limit,
        retry_errors=retry_errors,
        source_options=source,
        quiet=quiet,
    )


def _open(sources: str | Path | Sequence[str | Path], options: SourceOptions | None) -> Source:
    single = isinstance(sources, (str, Path))
    return open_source([str(sources)] if single else [str(s) for s in sources], options)  # type: ignore[union-attr]


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use a number of at least 1.")


def _run(
    verb: str,
    source: Source,
    out: str | Path,
    encoder: "Encoder | None",
    options: dict[str, Any],
    *,
    mode: Decode,
    batch_size: int,
    workers: int | None,
    score_text: ScoreText,
    embeddings: bool,
    embed_images: bool,
    limit: int | None,
    retry_errors: bool,
    source_options: SourceOptions | None,
    quiet: bool,
) -> Summary:
    for text in source.notices:
        notice(text, quiet=quiet)
    reading = vars(source_options or SourceOptions())
    if reading["image_root"] is not None:  # the same folder, wherever the command is given
        reading = {**reading, "image_root": storage.absolute(reading["image_root"])}
    width = _embedding_width(encoder) if embeddings else 0
    head = {
        "verb": verb,
        "options": {**options, "embed_images": embed_images, "limit": limit, **reading},
        "inputs": source.describe(),
        "encoder": encoder.identity if encoder else None,
        "thresholds": None,
        "history": [],
    }
    columns = schema(source.extras, embed_images=embed_images, embedding=width)
    writer = DatasetWriter(out, head, columns, mended=retry_errors)
    shards = limit_shards(source, limit)
    with ExitStack() as stack:
        stack.enter_context(pillow_unheard())
        stack.enter_context(writer.open())
        parts, todo = _split(writer, shards, retry_errors)
        if todo:
            writer.reopen()
        shown = stack.enter_context(meter(verb, _total(source, shards), quiet=quiet))
        shown.skip(sum(part.rows for part in parts.values()))
        resumed = len(parts)
        scorer = _ShardScorer(
            source,
            writer,
            encoder,
            mode=mode,
            batch_size=batch_size,
            workers=workers or min(16, os.cpu_count() or 1),
            score_text=score_text,
            embeddings=embeddings,
            embed_images=embed_images,
            retry_errors=retry_errors,
            shown=shown,
        )
        stack.callback(scorer.close)
        failures = []
        for outcome in local.run(scorer.part, todo, threads=2):
            if outcome.result is not None:
                parts[outcome.shard.index] = outcome.result
            else:
                failures.append(Failure(str(outcome.shard), str(outcome.error)))
        dataset = None if failures else writer.finish([parts[shard.index] for shard in shards])
        return Summary(dataset, shown.done, shown.seconds, resumed, failures)


def _split(
    writer: DatasetWriter, shards: Sequence[Shard], retry_errors: bool
) -> tuple[dict[int, PartInfo], list[Shard]]:
    """Parts that stay, and shards to do: those without a part; with `retry_errors` failed and changed ones too."""
    parts, todo = {}, []
    for shard in shards:
        part = writer.committed(shard.index)
        if part is None or shard.uri in writer.changed or (retry_errors and part.failed):
            todo.append(shard)
        else:
            parts[shard.index] = part
    return parts, todo


def _total(source: Source, shards: Sequence[Shard]) -> int | None:
    """Pairs in all, where it costs little to know: tars must be walked, so only a few of them are."""
    if len(shards) > 64 and any(shard.stop is None for shard in shards):
        return None
    try:
        return sum(min(source.count(s), s.limit or s_max) for s in shards for s_max in (2**62,))
    except (OSError, ShardError):
        return None


def _embedding_width(encoder: "Encoder | None") -> int:
    assert encoder is not None
    import torch

    size = encoder.preprocess.size or 224
    images, _ = encoder.embed(torch.zeros(1, 3, size, size), encoder.tokenize([""]))
    return int(images.shape[-1])
