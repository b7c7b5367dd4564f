"""The verb `export`: webdataset shards, LLaVA JSON with the official AlignGPT field, DataComp uid lists."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.io.files import atomic_file, claim, read_json, write_json
from aligncurate.progress import meter, notice
from aligncurate.verbs.export.datacomp import write_datacomp
from aligncurate.verbs.export.llava import write_llava
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.rows import count_exportable
from aligncurate.verbs.export.webdataset import write_webdataset

Format = Literal["webdataset", "llava-json", "datacomp-uids"]

RECORD = "export.json"
FAILURES = "failed.jsonl"


def export(
    dataset: str | Path | Dataset,
    out: str | Path,
    *,
    format: Format = "webdataset",
    shard_size: int = 10_000,
    per_level: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Exported:
    """Write a dataset's good rows (`ok` and `text_only`) in a form that other tools read.

    Args:
        dataset: what to export.
        out: a new folder; an interrupted export is finished.
        format: `webdataset` writes tars with the images' original bytes, `.txt` and `.json`, and an
            img2dataset-style Parquet beside each; `llava-json` writes images and `annotations.json` with
            `conversations` and AlignGPT's `similarity` (level - 1); `datacomp-uids` writes `uids.npy`.
        shard_size: pairs per tar.
        per_level: a folder of tars for each level.
        workers: processes that write tars; by default one per core, and for few pairs none but this one.
        quiet: show no progress.

    Raises UserError when the folder holds something else, or the options do not fit together.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    if format not in get_args(Format):
        raise UserError(f"--format {format}: use one of {', '.join(get_args(Format))}.")
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: use a number of at least 1.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: use a number of at least 1.")
    if per_level and format != "webdataset":
        raise UserError(f"--per-level goes with --format webdataset, not {format}.")
    if per_level and not opened.levels:
        raise UserError(f"{opened.path}: --per-level needs levels; run `aligncurate bucket` first.")
    if format == "llava-json" and not opened.levels:
        notice(
            "the dataset has no levels, so the entries get no `similarity`; `aligncurate bucket` makes them.",
            quiet=quiet,
        )
    done = Exported(Path(os.path.abspath(out)), skipped=opened.rows - count_exportable(opened))
    record = {"format": format, "shard_size": shard_size, "per_level": per_level, "dataset": opened.fingerprint()}
    with ExitStack() as stack:
        stack.enter_context(claim(done.path, [RECORD]))
        _check_record(done.path, record)
        shown = stack.enter_context(meter("export", count_exportable(opened), quiet=quiet))
        if format == "webdataset":
            write_webdataset(opened, done, shard_size, per_level, workers, shown)
        elif format == "llava-json":
            write_llava(opened, done, shown)
        else:
            write_datacomp(opened, done, shown)
        _note_failures(done)
        write_json(done.path / RECORD, {**record, "complete": True, "rows": done.rows, "failed": len(done.failed)})
    return done


def _note_failures(done: Exported) -> None:
    """List the rows whose image is gone, or clear the list of an earlier try."""
    file = done.path / FAILURES
    if not done.failed:
        file.unlink(missing_ok=True)
        return
    with atomic_file(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.failed), "utf-8")


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Check that `folder` is new or holds this very export; note the export in it."""
    file = folder / RECORD
    if not file.is_file():
        write_json(file, {**record, "complete": False})
        return
    before = read_json(file)
    if any(before.get(key) != value for key, value in record.items()):
        raise UserError(f"{folder}: this folder holds a different export; choose a new folder, or delete this one.")
