"""The verb `export`: checks its options, claims the output folder and calls the writer of a format."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.io.files import TEMPORARY, atomic_file, claim, delete_unfinished, read_json, write_json
from aligncurate.progress import meter, notice
from aligncurate.verbs.export.datacomp import write_datacomp
from aligncurate.verbs.export.llava import write_llava
from aligncurate.verbs.export.plan import count_exportable
from aligncurate.verbs.export.result import Exported
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
    """Export a dataset's `ok` and `text_only` rows in a format that other tools read.

    Args:
        dataset: what to export.
        out: a new folder, or that of an interrupted export, which is then completed.
        format: `webdataset` writes tars with the images' original bytes, `.txt` and `.json`, and an
            Parquet file like img2dataset's beside each; `llava-json` writes images and `annotations.json` with
            `conversations` and AlignGPT's `similarity` (level - 1); `datacomp-uids` writes `uids.npy`.
        shard_size: pairs per tar.
        per_level: write the tars of each level into a folder of its own.
        workers: number of processes that write tars; by default one per CPU core, or only this one for a small dataset.
        quiet: show no progress.

    Raises:
        UserError: the options contradict each other, or the folder holds other files or a different export.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    if format not in get_args(Format):
        raise UserError(f"--format {format}: use one of {', '.join(get_args(Format))}.")
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: use a number of at least 1.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: use a number of at least 1.")
    if per_level and format != "webdataset":
        raise UserError(f"--per-level works only with --format webdataset, not {format}.")
    if per_level and not opened.levels:
        raise UserError(f"{opened.path}: --per-level needs levels; run `aligncurate bucket` first.")
    if format == "llava-json" and not opened.levels:
        notice(
            "the dataset has no levels, so the annotations get no `similarity`; run `aligncurate bucket` first.",
            quiet=quiet,
        )
    done = Exported(Path(os.path.abspath(out)), skipped=opened.rows - count_exportable(opened))
    record = {"format": format, "shard_size": shard_size, "per_level": per_level, "dataset": opened.fingerprint()}
    with ExitStack() as stack:
        stack.enter_context(claim(done.path, [RECORD]))
        delete_unfinished(done.path.rglob(f"{TEMPORARY}*"))  # levels and images have folders of their own
        _check_record(done.path, record)
        progress = stack.enter_context(meter("export", count_exportable(opened), quiet=quiet))
        if format == "webdataset":
            write_webdataset(opened, done, shard_size, per_level, workers, progress)
        elif format == "llava-json":
            write_llava(opened, done, progress)
        else:
            write_datacomp(opened, done, progress)
        _write_failures(done)
        write_json(done.path / RECORD, {**record, "complete": True, "rows": done.rows, "failed": len(done.failed)})
    return done


def _write_failures(done: Exported) -> None:
    """Write the list of failed rows; if there are none, delete that of an earlier run."""
    file = done.path / FAILURES
    if not done.failed:
        file.unlink(missing_ok=True)
        return
    with atomic_file(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.failed), "utf-8")


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Record the export in `folder`. Raises UserError if the folder holds a different one."""
    file = folder / RECORD
    if not file.is_file():
        write_json(file, {**record, "complete": False})
        return
    before = read_json(file)
    if any(before.get(key) != value for key, value in record.items()):
        raise UserError(f"{folder}: this folder holds a different export; choose a new folder, or delete this one.")
