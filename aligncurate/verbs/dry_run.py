"""What `score` and `ingest` would do, without doing it: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aligncurate.dataset.receipt import read_receipt
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath
from aligncurate.sources.base import limit_shards
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.from_sources import count_rows, open_sources, shard_identities


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
    sources: str | Path | Sequence[str | Path], out: str | AnyPath, options: SourceOptions, *, limit: int | None = None
) -> DryRun:
    """See what a run would do; nothing is written and no model is loaded. Raises UserError as the run would."""
    source = open_sources(sources, options)
    inputs = []
    described = source.describe()
    for line in described:
        files = line.get("files", [line])
        sizes = [file.get("bytes") for file in files]
        total = None if None in sizes else sum(sizes)
        inputs.append(Input(line["kind"], [file["uri"] for file in files], total))
    shards = limit_shards(source, limit)
    done, folder = 0, as_path(out)
    for shard, identity in zip(shards, shard_identities(shards, described), strict=True):
        receipt = read_receipt(folder, shard.index)
        done += receipt is not None and receipt.shard == identity
    return DryRun(inputs, count_rows(source, shards), len(shards), done, list(source.notices))
