"""The verbs `score` and `ingest`: from sources to a dataset."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from aligncurate.dataset.part import PartInfo
from aligncurate.dataset.reader import MANIFEST, Dataset, DatasetWriter
from aligncurate.dataset.record import schema
from aligncurate.engines import threads
from aligncurate.errors import ShardError, UserError
from aligncurate.images.decode import no_decoder_warnings
from aligncurate.images.formats import DecodeMode
from aligncurate.io import storage
from aligncurate.progress import meter, notice
from aligncurate.scoring.shard import ScoreText, Settings, ShardScorer
from aligncurate.scoring.timing import STAGES, Times
from aligncurate.sources import Shard, Source, SourceOptions, open_source
from aligncurate.sources.base import limit_shards

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder, Precision

_SHARDS = 2  # in flight: the encoder need not wait between the end of one and the beginning of the next


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
        times: where this run's time went.
    """

    dataset: Dataset | None
    rows: int
    seconds: float
    resumed: int
    failures: list[Failure]
    times: Times


def score(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    model_config: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    precision: "Precision" = "auto",
    compiled: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    decode: DecodeMode = "exact",
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
        model, pretrained, model_config, device, precision, compiled: the encoder; see `encoders.load`. Several,
            separated by commas, share one pass over the images: scores of the first are the column `score`, those
            of each further model `score_<model>`.
        batch_size: pairs encoded at once; by default what fits into the GPU's free memory, 32 on the CPU.
        workers: decoding threads; by default one per core, at most 16.
        decode: `exact` follows open_clip's own preprocessing; `fast` decodes large JPEGs at reduced size and
            resizes in uint8; `gpu` decodes JPEGs on the GPU.
        embeddings: `fp16` keeps the (first) encoder's embeddings of image and text as columns.
        embed_images: copy the images' bytes into the dataset.
        score_text: turns of conversations that are compared with the image.
        limit: only the first so many pairs.
        retry_errors: in a finished or interrupted dataset, do the failed rows again.
        source: how to read the sources.
        quiet: show no progress.

    Raises UserError for what the user must change; rows that cannot be scored get a status instead.
    """
    from aligncurate.encoders import load as encoders

    opened = _open(sources, source)
    _check_numbers(batch_size=batch_size, workers=workers, limit=limit)
    loaded = encoders.load_all(model, pretrained, model_config, device, precision, compiled=compiled)
    _check_decode(decode, loaded[0][1])
    batch = batch_size or _earlier_batch(out) or min(_default_batch(encoder) for _, encoder in loaded)
    for _, encoder in loaded:
        encoder.towers.batch = batch
    settings = Settings(
        decode, batch, workers or _workers(), score_text, embeddings == "fp16", embed_images, retry_errors
    )
    options = {"batch_size": batch, "decode": decode, "embeddings": embeddings, "score_text": score_text}
    return _run("score", opened, out, loaded, options, settings, limit, source, quiet)


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
    settings = Settings("exact", 256, workers or _workers(), "all", False, embed_images, retry_errors)
    return _run("ingest", opened, out, [], {}, settings, limit, source, quiet)


def _workers() -> int:
    return min(16, os.cpu_count() or 1)


def _check_decode(mode: DecodeMode, encoder: "Encoder") -> None:
    if mode == "gpu" and encoder.device.type != "cuda":
        raise UserError("--decode gpu: it needs a CUDA device; use --decode fast here.")


def _earlier_batch(out: str | Path) -> int | None:
    """The batch size that an earlier run of the same folder chose: all of its parts must share one."""
    try:
        return int(json.loads((Path(out) / MANIFEST).read_text("utf-8"))["options"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):  # no such run, or nothing that this one could finish
        return None


def _default_batch(encoder: "Encoder") -> int:
    if encoder.device.type != "cuda":
        return 32
    return encoder.towers.fitting_batch(encoder.preprocess.size or 224, encoder.identity["context_length"])


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
    encoders: "Sequence[tuple[str, Encoder]]",
    options: dict[str, Any],
    settings: Settings,
    limit: int | None,
    source_options: SourceOptions | None,
    quiet: bool,
) -> Summary:
    for text in source.notices:
        notice(text, quiet=quiet)
    reading = vars(source_options or SourceOptions())
    if reading["image_root"] is not None:  # the same folder, wherever the command is given
        reading = {**reading, "image_root": storage.absolute(reading["image_root"])}
    head = {
        "verb": verb,
        "options": {**options, "embed_images": settings.embed_images, "limit": limit, **reading},
        "inputs": source.describe(),
        "encoder": encoders[0][1].identity if encoders else None,
        "thresholds": None,
        "history": [],
    }
    if len(encoders) > 1:
        head["encoders"] = {column: encoder.identity for column, encoder in encoders}
    width = _embedding_width(encoders[0][1]) if settings.embeddings else 0
    further = {column: pa.float32() for column, _ in encoders[1:]}
    columns = schema(source.extras | further, embed_images=settings.embed_images, embedding=width)
    writer = DatasetWriter(out, head, columns, mended=settings.retry_errors)
    shards = limit_shards(source, limit)
    with ExitStack() as stack:
        stack.enter_context(no_decoder_warnings())
        stack.enter_context(writer.open())
        parts, todo = _split(writer, shards, settings.retry_errors)
        if todo:
            writer.reopen()
        shown = stack.enter_context(meter(verb, _total(source, shards), quiet=quiet))
        shown.skip(sum(part.rows for part in parts.values()))
        resumed = len(parts)
        scorer = ShardScorer(source, writer, encoders, settings, shown)
        stack.callback(scorer.close)
        failures = []
        for outcome in threads.run(scorer.part, todo, workers=_SHARDS):
            if outcome.result is not None:
                parts[outcome.shard.index] = outcome.result
            else:
                failures.append(Failure(str(outcome.shard), str(outcome.error)))
        dataset = None if failures else writer.finish([parts[shard.index] for shard in shards])
        times = scorer.clock.times(shown.seconds, _threads(bool(encoders), settings, len(todo)))
        return Summary(dataset, shown.done, shown.seconds, resumed, failures, times)


def _threads(encoding: bool, settings: Settings, shards: int) -> dict[str, int]:
    """How many threads can be in each stage at once."""
    own = max(1, min(shards, _SHARDS))
    # A shard's own thread reads its pairs, and lets the GPU decode; the pool reads their images and decodes the others.
    decoding = settings.workers + (own if settings.mode == "gpu" else 0)
    found = dict.fromkeys(STAGES, own) | {"read": settings.workers + own, "decode": decoding, "encode": 1}
    return found if encoding else {stage: found[stage] for stage in ("read", "decode", "write")}


def _split(
    writer: DatasetWriter, shards: Sequence[Shard], retry_errors: bool
) -> tuple[dict[int, PartInfo], list[Shard]]:
    """Parts that stay, and shards to do: those without a part; with `retry_errors` failed and changed ones too."""
    parts, todo = {}, []
    for shard in shards:
        if shard.uri in writer.changed:
            writer.discard(shard.index)  # none of its rows can be trusted: their images may be others now
        part = writer.committed(shard.index)
        if part is None or (retry_errors and part.failed):
            todo.append(shard)
        else:
            parts[shard.index] = part
    return parts, todo


def _total(source: Source, shards: Sequence[Shard]) -> int | None:
    """Pairs in all, where it costs little to know: tars must be walked, so only a few local ones are."""
    tars = [shard for shard in shards if shard.stop is None]
    if len(tars) > 64 or any(storage.is_remote(shard.uri) for shard in tars):
        return None
    try:
        counts = [(shard, source.count(shard)) for shard in shards]
        return sum(count if shard.limit is None else min(count, shard.limit) for shard, count in counts)
    except (OSError, ShardError):
        return None


def _embedding_width(encoder: "Encoder") -> int:
    import torch

    size = encoder.preprocess.size or 224
    images, _ = encoder.embed(torch.zeros(1, 3, size, size), encoder.tokenize([""]))
    return int(images.shape[-1])
