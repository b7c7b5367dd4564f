"""The verb `export`: webdataset shards, LLaVA JSON with the official AlignGPT field, DataComp uid lists."""

import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aligncurate.dataset.part import readable
from aligncurate.dataset.pointers import POINTER_COLUMNS, has_image, read_image, read_images
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE, IMAGE_EMBEDDING, TEXT_EMBEDDING, Status
from aligncurate.engines import processes
from aligncurate.engines import threads as local
from aligncurate.errors import UserError
from aligncurate.images.decode import EXTENSIONS, extension
from aligncurate.io import storage
from aligncurate.io.bulk import BulkFile
from aligncurate.io.files import atomic_file, lock, make_folder, write_json
from aligncurate.io.tar import Buffer, TarWriter
from aligncurate.progress import Meter, meter, notice

Format = Literal["webdataset", "llava-json", "datacomp-uids"]

RECORD = "export.json"
FAILURES = "failed.jsonl"
_HIDDEN = {*POINTER_COLUMNS, "image", "error", IMAGE_EMBEDDING, TEXT_EMBEDDING} - {"source"}  # not in the JSON
_WORTH_PROCESSES = 10_000  # pairs; fewer are written before processes have started
_PER_FOLDER = 10_000  # images in one folder of a LLaVA export
_NO_KEY = re.compile(r'[.\x00-\x1f\x7f\\:*?"<>|]')  # webdataset splits names at dots; the rest trouble file systems
_NAME_BYTES = 180  # of a file name, which most file systems end at 255


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        path: the folder.
        rows: pairs written.
        skipped: rows of the dataset that could not be scored, which are not exported.
        failed: rows whose image could not be read any more; listed in `failed.jsonl`.
        files: what was written, relative to `path`.
    """

    path: Path
    rows: int = 0
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bytes: int = 0


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
    done = Exported(Path(os.path.abspath(out)), skipped=opened.rows - _exportable(opened))
    record = {"format": format, "shard_size": shard_size, "per_level": per_level, "dataset": opened.fingerprint()}
    with ExitStack() as stack:
        _take(done.path, record, stack)
        shown = stack.enter_context(meter("export", _exportable(opened), quiet=quiet))
        if format == "webdataset":
            _webdataset(opened, done, shard_size, per_level, workers, shown)
        elif format == "llava-json":
            _llava(opened, done, shown)
        else:
            _datacomp(opened, done, shown)
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


def _exportable(dataset: Dataset) -> int:
    return sum(part.statuses.get(status, 0) for part in dataset.parts for status in FINE)


def _is_good(table: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(table["status"], pa.array(sorted(FINE)))


def _good(table: pa.Table) -> pa.Table:
    return table.filter(_is_good(table))


def _rows(dataset: Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Good rows of the whole dataset, in order."""
    for index in range(len(dataset.parts)):
        for table in dataset.groups(index, columns):
            for batch in _good(table).to_batches(500):
                yield from batch.to_pylist()


# webdataset


@dataclass
class _Tar:
    """One tar to write: pieces of parts, as (part, first good row of it, how many)."""

    name: str
    level: int | None
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0


def _webdataset(
    dataset: Dataset, done: Exported, shard_size: int, per_level: bool, workers: int | None, shown: Meter
) -> None:
    tars = _plan(dataset, shard_size, per_level)
    if workers is None:
        workers = os.cpu_count() or 1 if dataset.rows >= _WORTH_PROCESSES else 1
    workers = min(workers, len(tars))
    for tar in tars:
        (done.path / tar.name).parent.mkdir(parents=True, exist_ok=True)

    # In memory at once are the rows of one tar per process, without their images.
    write = _Write(dataset, done.path, per_level)
    results = []
    for outcome in processes.run(write, tars, workers) if workers > 1 else local.run(write, tars):
        assert outcome.result is not None
        tar, rows, size, failed = outcome.result
        shown.add(tar.rows, rows, len(failed))
        results.append(outcome.result)
    for tar, rows, size, failed in sorted(results, key=lambda r: r[0].name):
        done.rows += rows
        done.bytes += size
        done.failed += failed
        done.files.append(f"{tar.name}.tar")


@dataclass(frozen=True)
class _Write:
    """Writes one tar of an export, unless it is there."""

    dataset: Dataset
    target: Path
    per_level: bool

    def __call__(self, tar: _Tar, check: Callable[[], None] = lambda: None) -> "_Written":
        beside = self.target / f"{tar.name}.parquet"
        there = beside.is_file() and (self.target / f"{tar.name}.tar").is_file()
        # The Parquet is written last, so it is the mark that the tar is whole; what failed is tried again.
        if not there or _note(beside)["failed"]:
            _write_tar(self.dataset, tar, self.per_level, self.target, check)
        note = _note(beside)
        return tar, note["rows"], note["bytes"], note["failed"]


_Written = tuple[_Tar, int, int, list[dict[str, str]]]
"""A tar, how many rows and bytes of images it holds, and what could not be read."""


def _note(beside: Path) -> dict[str, Any]:
    """What the Parquet beside a tar says of it: its rows, bytes of images, and images that could not be read."""
    metadata = pq.read_metadata(beside)
    return {"rows": metadata.num_rows, **json.loads(metadata.metadata[b"aligncurate.export"])}


def _plan(dataset: Dataset, shard_size: int, per_level: bool) -> list[_Tar]:
    """Which rows go into which tar; depends on the dataset and options alone."""
    filling: dict[int | None, _Tar] = {}
    numbers: dict[int | None, int] = {}
    tars: list[_Tar] = []
    for part in range(len(dataset.parts)):
        levels = _good(dataset.read(part, ["status", "level"]))["level"]
        counts: dict[int | None, int] = {None: len(levels)}
        if per_level:
            counts = {item["values"]: item["counts"] for item in levels.value_counts().to_pylist()}
        for level in sorted(counts, key=lambda v: -1 if v is None else v):
            start, left = 0, counts[level]
            while left:
                tar = filling.get(level)
                if tar is None or tar.rows == shard_size:
                    number = numbers.get(level, 0)
                    numbers[level] = number + 1
                    folder = f"level-{level}/" if level is not None else ("no-level/" if per_level else "")
                    tar = filling[level] = _Tar(f"{folder}{number:05d}", level)
                    tars.append(tar)
                take = min(left, shard_size - tar.rows)
                tar.pieces.append((part, start, take))
                tar.rows += take
                start, left = start + take, left - take
    return tars


def _tar_batches(dataset: Dataset, tar: _Tar, per_level: bool) -> Iterator[pa.RecordBatch]:
    for part, skip, left in tar.pieces:
        with readable(dataset.files[part]) as file:
            for group in range(file.num_row_groups):
                # Other columns, embedded images among them, are read only where the group has rows for this tar.
                mask = _matching(file.read_row_group(group, ["status", "level"], use_threads=False), tar, per_level)
                found = pc.sum(mask, min_count=0).as_py()
                take = min(max(found - skip, 0), left)
                if take:
                    rows = file.read_row_group(group, use_threads=False).filter(mask)
                    yield from rows.slice(skip, take).to_batches(500)
                skip, left = max(skip - found, 0), left - take
                if not left:
                    break


def _matching(table: pa.Table, tar: _Tar, per_level: bool) -> pa.ChunkedArray:
    """Which rows are good and, with `per_level`, of the tar's level."""
    good, level = _is_good(table), table["level"]
    if not per_level:
        return good
    return pc.and_(good, pc.is_null(level) if tar.level is None else pc.equal(level, tar.level))


def _write_tar(dataset: Dataset, tar: _Tar, per_level: bool, target: Path, check: Callable[[], None]) -> None:
    schema = pa.schema([f for f in dataset.schema if f.name != "image"])
    written: list[pa.RecordBatch] = []
    failed: list[dict[str, str]] = []
    names: set[str] = set()
    size = 0
    with atomic_file(target / f"{tar.name}.tar") as temporary, BulkFile(temporary) as file:
        members = TarWriter(file)
        for batch in _tar_batches(dataset, tar, per_level):
            check()
            there = []
            rows = batch.to_pylist()
            for row, data in zip(rows, read_images(rows), strict=True):
                there.append(not isinstance(data, OSError))
                if isinstance(data, OSError):
                    failed.append({"key": row["key"], "error": str(data)})
                    continue
                size += len(data or b"")
                key = _free(_safe(row["key"]), names)
                for ending, content in sorted(_sample(row, data).items()):
                    members.add(f"{key}.{ending}", content)
            written.append(batch.select(schema.names).filter(pa.array(there)))
        members.end()
    note = json.dumps({"failed": failed, "bytes": size}).encode()
    table = pa.Table.from_batches(written, schema).replace_schema_metadata({b"aligncurate.export": note})
    with atomic_file(target / f"{tar.name}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _sample(row: dict[str, Any], data: Buffer | None) -> dict[str, Buffer]:
    """A webdataset sample's files by their endings: the image, `txt` for captions, everything else in `json`."""
    sample: dict[str, Buffer] = {}
    if data is not None:
        sample[_ending(row, data)] = data
    if row["caption"] is not None:
        sample["txt"] = row["caption"].encode()
    kept = {k: v for k, v in row.items() if v is not None and k not in _HIDDEN}
    kept["sha256"] = row["sha256"].hex() if row["sha256"] else None
    sample["json"] = _json(kept).encode()
    return sample


def _plain(value: Any) -> Any:
    """JSON for what JSON has no type for: bytes as hex, the rest as text."""
    return value.hex() if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain, allow_nan=False).encode


def _json(value: Any) -> str:
    """Strict JSON; floats that are not finite, which it does not have, are null."""
    try:
        return _encode(value)
    except ValueError:  # rare, so that only such rows are gone through in Python
        return _encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _ending(row: dict[str, Any], data: Buffer) -> str:
    """The image's own file ending, or the usual one for its bytes."""
    _, dot, ending = storage.basename(row["image_path"] or "").lower().rpartition(".")
    # Without a dot it is no file name: `png` may be the column of a Parquet file, with JPEGs in it.
    return ending if dot and ending in EXTENSIONS else (extension(data) or "jpg")


def _safe(key: str) -> str:
    """A key as a file name: webdataset reads a name up to its first dot. The `.json` keeps the key as it is."""
    return _NO_KEY.sub("_", key).strip("/") or "pair"


def _free(key: str, taken: set[str]) -> str:
    """`key`, or the first of key-2, key-3, … that is not taken; takes it."""
    free, number = key, 1
    while free in taken:
        number += 1
        free = f"{key}-{number}"
    taken.add(free)
    return free


# LLaVA


def _llava(dataset: Dataset, done: Exported, shown: Meter) -> None:
    names: set[str] = set()
    images: dict[bytes, str] = {}  # an image that several rows share is written once
    with atomic_file(done.path / "annotations.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in _rows(dataset):
            try:
                new = has_image(row) and row["sha256"] not in images
                data = read_image(row) if new else None
            except OSError as error:
                done.failed.append({"key": row["key"], "error": str(error)})
                shown.add(1, 0, 1)
                continue
            if data is not None:
                images[row["sha256"]] = _llava_image(row, data, done, names, len(images))
            name = images[row["sha256"]] if has_image(row) else None
            file.write(",\n" if done.rows else "\n")
            file.write(json.dumps(_llava_row(row, name), ensure_ascii=False))
            done.rows += 1
            shown.add(1, 1, 0)
        file.write("\n]\n")
    done.files.append("annotations.json")


def _llava_image(row: dict[str, Any], data: bytes, done: Exported, names: set[str], number: int) -> str:
    """Write an image; its path relative to the export's folder."""
    folder = f"images/{number // _PER_FOLDER:05d}"
    stem = _safe(row["key"]).replace("/", "_").encode()[:_NAME_BYTES].decode(errors="ignore")
    name = f"{_free(f'{folder}/{stem}', names)}.{_ending(row, data)}"
    path = done.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # An earlier try may have given this name to another image, if one before it could not be read then.
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    done.bytes += len(data)
    return name


def _llava_row(row: dict[str, Any], image: str | None) -> dict[str, Any]:
    """An entry of the official AlignGPT annotation file. Its `similarity` counts levels from 0."""
    entry: dict[str, Any] = {"id": row["key"]}
    if image is not None:
        entry["image"] = image
    roles = {"user": "human", "assistant": "gpt"}
    turns = row["conversations"]
    if turns is None:
        turns = [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": row["caption"]}]
    if image is not None and not any("<image>" in turn["text"] for turn in turns):
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        turns = [{**t, "text": f"<image>\n{t['text']}"} if i == first else t for i, t in enumerate(turns)]
    entry["conversations"] = [{"from": roles.get(t["role"], t["role"]), "value": t["text"]} for t in turns]
    if row["level"] is not None:
        entry["similarity"] = row["level"] - 1
    return entry


# DataComp


def _datacomp(dataset: Dataset, done: Exported, shown: Meter) -> None:
    columns = ["status", "sha256", "caption", *(["uid"] if "uid" in dataset.schema.names else [])]
    halves = array("Q")
    for row in _rows(dataset, columns):
        if row["status"] != Status.OK:
            continue
        uid = datacomp_uid(row)
        halves.extend((int(uid[:16], 16), int(uid[16:], 16)))
        shown.add(1, 1, 0)
    uids = np.array(halves, np.uint64).view(np.dtype("u8,u8"))
    uids.sort()
    with atomic_file(done.path / "uids.npy") as temporary, temporary.open("wb") as file:
        np.save(file, uids)
    done.rows = len(uids)
    done.files.append("uids.npy")


def datacomp_uid(row: dict[str, Any]) -> str:
    """The row's uid, 32 hex digits: its own, or the first half of sha256(image sha256 + caption)."""
    own = row.get("uid")
    if isinstance(own, str) and re.fullmatch(r"[0-9a-fA-F]{32}", own):
        return own.lower()
    return hashlib.sha256(row["sha256"] + (row["caption"] or "").encode()).hexdigest()[:32]
