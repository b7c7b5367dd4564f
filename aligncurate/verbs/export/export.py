"""The verb `export`: webdataset shards, LLaVA JSON with the official AlignGPT field, DataComp uid lists."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.io.files import atomic_file, lock, make_folder, write_json
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
        _take(done.path, record, stack)
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


def _take(target: Path, record: dict[str, Any], stack: ExitStack) -> None:
    """Check and lock the output folder, as DatasetWriter does for datasets."""
    file = target / RECORD
    make_folder(target)
    stack.enter_context(lock(target))
    if file.is_file():
        try:
            before = json.loads(file.read_text("utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{file}: the file is damaged; delete the folder and export again, or name a new folder.")
        if any(before.get(k) != v for k, v in record.items()):
            raise UserError(f"{target}: another export is here; name a new folder, or delete this one.")
    elif any(not p.name.startswith(".") for p in target.iterdir()):
        raise UserError(f"{target}: the output folder holds other files; name a new folder.")
    for leftover in target.rglob(".tmp-*"):
        leftover.unlink(missing_ok=True)
    if not file.is_file():
        write_json(file, {**record, "complete": False})
