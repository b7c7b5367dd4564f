"""From sources to a dataset: the run that `score` and `ingest` share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligncurate import __version__
from aligncurate.dataset.manifest import MANIFEST, SCHEMA_VERSION, read_manifest
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import SCORE_COUNTS
from aligncurate.dataset.record import Pair, Status, to_table
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.engines import threads
from aligncurate.errors import ShardError
from aligncurate.images.decode import no_decoder_warnings
from aligncurate.io import retries, storage
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath
from aligncurate.progress import count, duration, meter, notice
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.run import DeviceRun
from aligncurate.scoring.timing import STAGES, StageClock, StageTimes
from aligncurate.sources.base import Shard, Source
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.devices import DevicesRun, environments
from aligncurate.verbs.output import dataset_writer, recorded_source

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder

_TARS_COUNTED = 64  # for the progress bar's total; counting the pairs of more tars would take too long


@dataclass(frozen=True)
class Failure:
    """A shard that could not be read; a rerun tries it again."""

    shard: str
    error: str


@dataclass(frozen=True)
class ScoreResult:
    """What a run of `score` or `ingest` did.

    Attributes:
        dataset: the finished dataset; None while some shards are missing.
        rows, seconds: of this run only, without the rows that earlier runs committed.
        resumed: number of parts that earlier runs committed.
        failures: shards that could not be read.
        times: how long each stage of this run took.
        missing: parts that the runs of other partitions have to make.
    """

    dataset: Dataset | None
    rows: int
    seconds: float
    resumed: int
    failures: list[Failure]
    times: StageTimes
    missing: int = 0


def open_sources(sources: str | Path | Sequence[str | Path], options: SourceOptions) -> Source:
    """`open_source` for one or more paths or URIs."""
    retries.set_timeout(options.timeout)
    single = isinstance(sources, (str, Path))
    return open_source([str(sources)] if single else [str(s) for s in sources], options)  # type: ignore[union-attr]


def make_dataset(
    verb: str,
    source: Source,
    out: str | AnyPath,
    encoders: dict[str, Encoder],
    options: ScoreOptions,
    recorded_options: Mapping[str, Any],
    source_options: SourceOptions,
    *,
    devices: Sequence[str] = (),
    quiet: bool,
) -> ScoreResult:
    """Make the parts of a dataset that an earlier run has not committed, then its manifest.

    Args:
        verb: for the manifest and the progress bar.
        source: what to read.
        out: folder of the dataset.
        encoders: by the column for their scores; none for `ingest`.
        options: with `batch_size` set.
        recorded_options: what the manifest records of them.
        source_options: how `source` is read.
        devices: score on these, in processes of their own; by default with `encoders`, in this one.
        quiet: no progress and notices.

    Raises UserError if the folder holds something else.
    """
    for text in source.notices:
        notice(text, quiet=quiet)
    if source.inline and not options.embed_images:
        notice("the input holds its images (base64), so the dataset keeps them too", quiet=quiet)
        options = replace(options, embed_images=True)
    first = next(iter(encoders.values()), None)
    writer, shards, counts = dataset_writer(
        verb,
        source,
        out,
        {column: encoder.identity for column, encoder in encoders.items()},
        options,
        {**recorded_options, **recorded_source(source_options)},
        environments=environments(devices or [str(first.device)], mixed=options.mixed_devices) if first else [],
        width=_embedding_width(first) if first and options.embeddings != "none" else 0,
        quiet=quiet,
    )
    if finished := writer.finished():
        return nothing_to_do(finished)
    with ExitStack() as stack:
        stack.enter_context(no_decoder_warnings())
        stack.enter_context(writer.open(shared=options.partition is not None))
        parts = writer.committed(len(shards))
        if options.retry_errors:
            parts = {index: part for index, part in parts.items() if not part.failed}
        own, of = options.part_of
        todo = [shard for shard in shards if shard.index not in parts and shard.index % of == own]
        if todo:
            writer.reopen()
        if writer.left_out:
            what = f"{', '.join(writer.left_out)}: the dataset has no such column"
            notice(f"{what}, so it is left out; `aligncurate join` can add it.", quiet=quiet)
        mine = [shard for shard in shards if shard.index % of == own]
        progress = stack.enter_context(meter(verb, count_rows(source, mine), quiet=quiet))
        progress.skip(sum(part.rows for index, part in parts.items() if index % of == own))
        run: DeviceRun | DevicesRun
        if devices or options.engine == "ray":
            first, scores = None, bool(encoders)
            encoders.clear()  # frees the device: they are loaded again, in a process for each
            run = DevicesRun(source, writer, options, progress, devices or [options.device], scores=scores)
        else:
            run = DeviceRun(source, writer, encoders, options, progress)
        stack.push(lambda kind, *_: run.close(wait=kind is not KeyboardInterrupt))
        failures, failed = [], []
        kept = progress.skipped
        try:
            for outcome in run.parts(todo, partial(_finish, run, quiet)):
                if outcome.result is None:
                    failed.append(outcome)
                    failures.append(Failure(str(outcome.shard), str(outcome.error)))
        except KeyboardInterrupt:
            saved = kept + run.saved
            share = f"{saved:,} of {progress.total:,}" if progress.total is not None else f"{saved:,}"
            raise KeyboardInterrupt(f"{share} pairs saved in {out}; rerun the same command to resume") from None
        if failures and len(failures) <= (options.allow_missing or 0):
            for outcome in failed:
                _write_missing(writer, outcome.shard, str(outcome.error))
            left = f"{count(len(failures), 'shard')} could not be read"
            notice(f"{left}: a row of status read_error stands for each; --retry-errors tries again.", quiet=quiet)
            failures = []
        whole = not failures and (of == 1 or writer.has_all(len(shards)))
        dataset = writer.finish(len(shards), **{SCORE_COUNTS: counts}) if whole else None
        for text in source.remarks:
            notice(text, quiet=quiet)
        missing = 0 if dataset else len(shards) - len(writer.committed(len(shards))) - len(failures)
        times = run.times(len(todo))
        return ScoreResult(dataset, progress.done, progress.seconds, len(parts), failures, times, missing)


def find_finished(
    verb: str,
    source: Source,
    out: str | AnyPath,
    recorded_options: Mapping[str, Any],
    source_options: SourceOptions,
    *,
    retry_errors: bool,
) -> Dataset | None:
    """The finished dataset in `out`, if it has these inputs and options and its parts are there.

    Encoders are left to the caller, who may know them without loading them.
    """
    folder = as_path(out)
    if not (folder / MANIFEST).is_file() or not read_manifest(folder)["complete"]:
        return None
    dataset = Dataset(out)
    now: dict[str, Any] = {"verb": verb, "options": {**recorded_options, **recorded_source(source_options)}}
    now |= {"inputs": json.loads(json.dumps(source.describe())), "schema_version": SCHEMA_VERSION}
    if any(dataset.manifest[name] != value for name, value in now.items()):
        return None
    if dataset.manifest.get("written_with", {}).get("aligncurate") != __version__ or not dataset.is_whole():
        return None
    return None if retry_errors and any(part.failed for part in dataset.parts) else dataset


def _write_missing(writer: DatasetWriter, shard: Shard, cause: str) -> None:
    """Commit a part of one row for a shard that cannot be read."""
    pair = Pair(str(shard), shard.uri)
    pair.fail(Status.READ_ERROR, cause)
    with writer.part(shard.index) as part:
        part.write(to_table([pair], part.schema))


def _finish(run: DeviceRun | DevicesRun, quiet: bool, running: Sequence[Shard]) -> bool:
    """Whether shards in hand are worth finishing after Ctrl-C; says so."""
    seconds = run.seconds_left(running)
    if seconds is None or seconds > threads.GRACE:
        return False
    what = count(len(running), "shard")
    notice(f"finishing {what} in hand (about {duration(seconds)}); press Ctrl-C again to stop now.", quiet=quiet)
    return True


def nothing_to_do(dataset: Dataset) -> ScoreResult:
    """The result of a run whose dataset an earlier run has finished."""
    return ScoreResult(dataset, 0, 0.0, len(dataset.parts), [], StageClock().times(0.0, dict.fromkeys(STAGES, 1)))


def count_rows(source: Source, shards: Sequence[Shard]) -> int | None:
    """Number of pairs, if that is cheap to find out: tars must be walked, so only for a few local ones."""
    tars = [shard for shard in shards if shard.stop is None]
    if len(tars) > _TARS_COUNTED or any(storage.is_remote(shard.uri) for shard in tars):
        return None
    try:
        counts = [(shard, source.count(shard)) for shard in shards]
        return sum(count if shard.limit is None else min(count, shard.limit) for shard, count in counts)
    except (OSError, ShardError):
        return None


def _embedding_width(encoder: Encoder) -> int:
    import torch

    size = encoder.preprocess.size or 224
    images, _ = encoder.embed(torch.zeros(1, 3, size, size), encoder.tokenize([""]))
    return int(images.shape[-1])
