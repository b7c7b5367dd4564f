"""What `score` and `ingest` would do, without doing it: `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligncurate.dataset.manifest import MANIFEST, arrow_schema, read_manifest
from aligncurate.dataset.receipt import RECEIPTS
from aligncurate.dataset.record import IMAGE_EMBEDDING
from aligncurate.encoders.device import find_device, scoring_environment
from aligncurate.encoders.load import expected_identity, requested
from aligncurate.encoders.model_choice import check_model, check_weights, resolve_names
from aligncurate.io.files import absolute, as_path, check_free
from aligncurate.io.paths import AnyPath
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import recorded
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.from_sources import count_rows, open_sources
from aligncurate.verbs.output import dataset_writer, recorded_source
from aligncurate.verbs.score import earlier_batch


@dataclass(frozen=True)
class Input:
    """The files of one kind.

    Attributes:
        kind: the format, as `--format` takes it.
        files: their paths or URIs, in order.
        bytes: size of all files, None where it is not known without reading them.
    """

    kind: str
    files: list[str]
    bytes: int | None


@dataclass(frozen=True)
class DryRun:
    """What a run would read and write.

    Attributes:
        inputs: by kind, in the order in which they are read.
        rows: of all inputs, None where they would have to be read to count them.
        parts: that the dataset will have.
        done: how many of them earlier runs made.
        notices: what the run would tell about its inputs.
    """

    inputs: list[Input]
    rows: int | None
    parts: int
    done: int
    notices: list[str]


def dry_run(
    sources: str | Path | Sequence[str | Path],
    out: str | AnyPath,
    options: IngestOptions,
    source_options: SourceOptions,
) -> DryRun:
    """See what `score`, given its options, or `ingest` would do; nothing is written and no model is loaded.

    Raises UserError as the run would, also for an output folder that holds something else.
    """
    source = open_sources(sources, source_options)
    inputs = []
    for line in source.describe():
        files = line.get("files", [line])
        sizes = [file.get("bytes") for file in files]
        total = None if None in sizes else sum(sizes)
        inputs.append(Input(line["kind"], [file["uri"] for file in files], total))
    folder = absolute(as_path(out))
    check_free(folder, [MANIFEST, RECEIPTS])
    before = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if isinstance(options, ScoreOptions):
        verb, scoring, encoders = "score", options, _encoders(options, before)
        options = replace(options, batch_size=options.batch_size or earlier_batch(out))
        environments = [scoring_environment(find_device(options.device))] if before else []
    else:
        verb, scoring, encoders, environments = "ingest", ScoreOptions(**vars(options)), {}, []
    writer, shards, _ = dataset_writer(
        verb,
        source,
        out,
        encoders,
        replace(scoring, embed_images=scoring.embed_images or source.inline),
        recorded(options) | recorded_source(source_options),
        environments=environments,
        width=_width(before) if scoring.embeddings != "none" else 0,
        quiet=False,
    )
    writer.finished()  # refuses what `open` would refuse
    parts = writer.committed(len(shards)) if before else {}
    done = sum(not (options.retry_errors and part.failed) for part in parts.values())
    return DryRun(inputs, count_rows(source, shards), len(shards), done, list(source.notices))


def _encoders(options: ScoreOptions, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Identities of the encoders, as far as they show without loading them, else as in an earlier manifest.

    Raises UserError for a model or weights that do not exist.
    """
    earlier = before.get("encoders") or {"score": before.get("encoder")}
    requests = requested(options.model, options.pretrained, options.model_config or ())
    for request in requests.values():
        model, weights, config = resolve_names(*request)
        if config is None:
            check_model(model)
            check_weights(model, weights)
    return {
        column: expected_identity(request, options.precision, options.compiled, earlier.get(column) or {})
        for column, request in requests.items()
    }


def _width(before: Mapping[str, Any]) -> int:
    """Size of the embeddings in an earlier dataset; without any, the options differ."""
    columns = arrow_schema(before)
    stored = columns is not None and IMAGE_EMBEDDING in columns.names
    return int(columns.field(IMAGE_EMBEDDING).type.list_size) if columns is not None and stored else 1
