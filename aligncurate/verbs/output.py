"""What a run of `score` or `ingest` writes: the manifest's head, the columns, and what each part is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from aligncurate.dataset.joined import open_datasets
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import SCORE_COUNTS
from aligncurate.dataset.record import OWN_EMBEDDINGS, schema
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.io import storage
from aligncurate.io.paths import AnyPath
from aligncurate.progress import notice
from aligncurate.scoring.options import ScoreOptions
from aligncurate.settings import recorded
from aligncurate.sources.base import Shard, Source, limit_shards
from aligncurate.sources.curated import CuratedSource
from aligncurate.sources.notes import limit_taken
from aligncurate.sources.options import SourceOptions


def dataset_writer(
    verb: str,
    source: Source,
    out: str | AnyPath,
    encoders: Mapping[str, Mapping[str, Any]],
    options: ScoreOptions,
    recorded_options: Mapping[str, Any],
    *,
    environments: Sequence[Mapping[str, Any]],
    width: int,
    quiet: bool,
) -> tuple[DatasetWriter, list[Shard], dict[str, Any]]:
    """The writer of a dataset, the shards that it is made of, and the counts of scores that the inputs bring along.

    Args:
        verb, source, out, options: as for `make_dataset`.
        encoders: their identities, by the column for their scores.
        recorded_options: what the manifest records of all options.
        environments: where scores are computed; none for `ingest`.
        width: of the embeddings that are stored; 0 for none.
        quiet: no notices.
    """
    head: dict[str, Any] = {
        "verb": verb,
        "options": dict(recorded_options),
        "inputs": source.describe(),
        "encoder": next(iter(encoders.values()), None),
        "thresholds": None,
        "history": [],
    }
    kept, counts = _provenance(verb, head["inputs"], quiet=quiet)
    head |= kept
    if environments:
        head["computed_with"] = list(environments)
    if len(encoders) > 1:
        head["encoders"] = dict(encoders)
    score_columns = {column: pa.float32() for column in list(encoders)[1:]}
    extras = dict(source.extras)
    if encoders and any(line["kind"] == CuratedSource.kind for line in head["inputs"]):
        stale = [name for name in OWN_EMBEDDINGS if extras.pop(name, None)]  # of the encoder that scored the dataset
        if stale and not width:
            notice(f"the dataset's {' and '.join(stale)} are not kept; --embeddings stores new ones", quiet=quiet)
    columns = schema(extras | score_columns, embed_images=options.embed_images, embedding=width)
    shards = limit_shards(source, options.limit)
    if options.limit is not None and (taken := limit_taken(source, shards, options.limit)):
        notice(taken, quiet=quiet)
    writer = DatasetWriter(
        out,
        head,
        columns,
        shard_identities(shards, head["inputs"]),
        retry_errors=options.retry_errors,
        mixed_devices=options.mixed_devices,
    )
    return writer, shards, counts


def _provenance(
    verb: str, inputs: Sequence[Mapping[str, Any]], *, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the manifest takes over from the datasets among the inputs, and the counts of their scores.

    `ingest` keeps scores and levels, so also where they come from. Raises UserError where the datasets contradict each
    other.
    """
    folders = [line["uri"] for line in inputs if line["kind"] == CuratedSource.kind]
    if verb == "ingest" and len(folders) == len(inputs) and folders:
        datasets = open_datasets(folders)
        return datasets.provenance(), datasets.manifest.get(SCORE_COUNTS, {})
    if verb == "ingest" and (scored := [folder for folder in folders if Dataset(folder).manifest.get("encoder")]):
        notice(
            f"the scores of {scored[0]} are kept beside those of the other inputs, if they have any; score the new "
            "dataset before you compare them.",
            quiet=quiet,
        )
    return {"history": [step for folder in folders for step in Dataset(folder).provenance()["history"]]}, {}


def shard_identities(shards: Sequence[Shard], inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each shard is, for its receipt: its file, as the source describes it, and its rows."""
    files = {file["uri"]: file for line in inputs for file in line.get("files", [])}
    return [
        {**files.get(shard.uri, {}), "uri": shard.uri, "start": shard.start, "stop": shard.stop, "limit": shard.limit}
        for shard in shards
    ]


def recorded_source(options: SourceOptions) -> dict[str, Any]:
    """What the manifest records of the source's options."""
    record = recorded(options)
    if options.image_root is not None:  # the same folder, whatever the current folder is
        record["image_root"] = storage.absolute(options.image_root)
    return record
