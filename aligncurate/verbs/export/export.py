"""The verb `export`: checks its options, claims the output folder and calls the writer of a format."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any, Literal, get_args

from aligncurate.dataset.joined import Datasets, open_datasets
from aligncurate.errors import UserError
from aligncurate.io.files import absolute, as_path, atomic_file, claim, read_json, write_json
from aligncurate.io.paths import AnyPath
from aligncurate.progress import meter, notice
from aligncurate.verbs.export.datacomp import write_datacomp
from aligncurate.verbs.export.llava import images_in, write_llava
from aligncurate.verbs.export.plan import count_exportable
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.export.webdataset import write_webdataset

Format = Literal["webdataset", "llava-json", "datacomp-uids"]

RECORD = "export.json"
FAILURES = "failed.jsonl"


def export(
    dataset: Datasets,
    out: str | AnyPath,
    *,
    format: Format = "webdataset",
    shard_size: int = 10_000,
    per_level: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Exported:
    """Export a dataset's `ok` and `text_only` rows in a format that other tools read.

    Args:
        dataset: what to export; several folders are read as one.
        out: a new folder, or that of an interrupted export, which is then completed.
        format: `webdataset` writes tars with the images' original bytes, `.txt` and `.json`, and a
            Parquet file like img2dataset's beside each; `llava-json` writes images and `annotations.json` with
            `conversations` and AlignGPT's `similarity` (level - 1); `datacomp-uids` writes `uids.npy`.
        shard_size: pairs per tar.
        per_level: write the tars of each level into a folder of its own.
        workers: number of processes that write tars; by default one per CPU core, or only this one for a small dataset.
        quiet: show no progress.

    Raises:
        UserError: the options contradict each other, or the folder holds other files or a different export.
    """
    opened = open_datasets(dataset)
    if format not in get_args(Format):
        raise UserError(f"--format {format}: use one of {', '.join(get_args(Format))}.")
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: use a number of at least 1.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: use a number of at least 1.")
    if per_level and format != "webdataset":
        raise UserError(f"--per-level works only with --format webdataset, not {format}.")
    if per_level and not opened.levels:
        raise UserError(f"{opened.name}: --per-level needs levels; run `aligncurate bucket` first.")
    if format == "llava-json" and not opened.levels:
        notice(
            "the dataset has no levels, so the annotations get no `similarity`; run `aligncurate bucket` first.",
            quiet=quiet,
        )
    done = Exported(absolute(as_path(out)), skipped=opened.rows - count_exportable(opened))
    record = {"format": format, "shard_size": shard_size, "per_level": per_level, "dataset": opened.fingerprint()}
    before = _earlier(done.path, record)
    if before.get("complete") and not before["failed"] and _all_there(done.path, before):
        done.nothing_new, done.rows, done.files = True, before["rows"], before["files"]
        done.bytes = before["bytes"]
        return done  # before anything is written: the disk may be read-only
    with ExitStack() as stack:
        stack.enter_context(claim(done.path, [RECORD], deep=True))  # levels and images have folders of their own
        if not _earlier(done.path, record):
            write_json(done.path / RECORD, {**record, "complete": False})
        progress = stack.enter_context(meter("export", count_exportable(opened), quiet=quiet))
        if format == "webdataset":
            write_webdataset(opened, done, shard_size, per_level, workers, progress)
        elif format == "llava-json":
            write_llava(opened, done, progress)
        else:
            write_datacomp(opened, done, progress)
        _write_failures(done)
        write_json(
            done.path / RECORD,
            {
                **record,
                "complete": True,
                "rows": done.rows,
                "failed": len(done.failed),
                "files": done.files,
                "bytes": done.bytes,
                **({"images": images_in(done.path)} if format == "llava-json" else {}),
            },
        )
    return done


def _write_failures(done: Exported) -> None:
    """Write the list of failed rows; if there are none, delete that of an earlier run."""
    file = done.path / FAILURES
    if not done.failed:
        file.unlink(missing_ok=True)
        return
    with atomic_file(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.failed), "utf-8")


def _all_there(folder: AnyPath, record: dict[str, Any]) -> bool:
    """Whether the files of a finished export still exist; of LLaVA's images, as many of the same size together."""
    if "files" not in record or (record["format"] == "llava-json" and record.get("images") != images_in(folder)):
        return False  # an older record does not list them
    tables = [f"{file.removesuffix('.tar')}.parquet" for file in record["files"] if file.endswith(".tar")]
    return all((folder / file).is_file() for file in [*record["files"], *tables])


def _earlier(folder: AnyPath, record: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run recorded of this export; empty if there is none.

    Raises UserError if the folder holds a different one.
    """
    file = folder / RECORD
    try:
        before = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    different = [key for key, value in record.items() if before.get(key) != value]
    if different:
        hints = [_difference(key, before.get(key), record[key]) for key in different]
        raise UserError(
            f"{folder}: this folder holds a different export ({', '.join(hints)}); "
            "choose a new folder, or delete this one."
        )
    return before


def _difference(key: str, before: Any, now: Any) -> str:
    """What differs between two exports: an option, or the dataset."""
    if key != "dataset":
        return f"--{key.replace('_', '-')} was {before}, now {now}"
    paths = [value.get("uri") if isinstance(value, dict) else None for value in (before, now)]
    return "the dataset has changed" if paths[0] == paths[1] else f"the dataset was {paths[0]}, now {paths[1]}"
