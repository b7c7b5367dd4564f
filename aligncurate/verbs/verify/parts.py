"""Checks one part: its bytes against its receipt and the manifest, its rows against both and against the thresholds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.manifest import MANIFEST
from aligncurate.dataset.part import open_part
from aligncurate.dataset.receipt import SCORE_COUNTS, PartInfo, Receipt, part_name, read_receipt, receipt_name
from aligncurate.dataset.record import usable_scores
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.paths import AnyPath
from aligncurate.levels import Counts, Thresholds
from aligncurate.verbs.verify.images import check_images
from aligncurate.verbs.verify.result import BadImage, Damage, Mend

_READ = 1 << 20  # bytes that are hashed at once


@dataclass(frozen=True)
class Record:
    """What a dataset's manifest says that its parts must agree with.

    Attributes:
        folder: of the dataset.
        complete: whether the manifest says that the dataset is finished.
        lines: what it says of each part, by number; empty if it cannot be read or the dataset is not finished.
        digest: of the options that all parts share; None if it is not known.
        schema: of all parts; None if it is not known.
        thresholds: of the levels.
        inputs: what is known of each input file, by URI.
        receipts: whether receipts are expected; earlier versions wrote none, and some copies lack them all.
    """

    folder: AnyPath
    complete: bool = False
    lines: Mapping[int, PartInfo] = field(default_factory=dict)
    digest: str | None = None
    schema: pa.Schema | None = None
    thresholds: Thresholds | None = None
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    receipts: bool = True


@dataclass(frozen=True)
class PartCheck:
    """What became of checking a part.

    Attributes:
        info: what the part holds; None if it is damaged or not part of the dataset.
        counts: of its scores, by column, as its receipt has them.
        damages: what is wrong with the part, its receipt or its line in the manifest.
        images: how many were read.
        bad_images: those that are not the part's.
    """

    info: PartInfo | None = None
    counts: Mapping[str, Any] | None = None
    damages: list[Damage] = field(default_factory=list)
    images: int = 0
    bad_images: list[BadImage] = field(default_factory=list)


def check_part(record: Record, index: int, *, deep: bool, check: Callable[[], None]) -> PartCheck:
    """Check part `index` of a dataset, with `deep` also its images; `check` is called now and then."""
    line = record.lines.get(index)
    file = record.folder / (part_name(index) if line is None else line.name)
    receipt, fault = _receipt(record, index)

    def damage(where: AnyPath, problem: str, mend: Mend | None) -> Damage:
        return Damage(str(record.folder), str(where), problem, mend, index)

    paper, manifest = record.folder / receipt_name(index), record.folder / MANIFEST
    faults = [damage(paper, fault, "receipt")] if fault is not None else []
    if line is None and receipt is None:
        if record.complete:
            faults = [damage(file if file.exists() else paper, "belongs to no part of the dataset", "rerun")]
        return PartCheck(damages=faults)  # none: of a run that was killed before it wrote the receipt
    try:
        found = _size_and_sha256(file, check)
    except FileNotFoundError:
        return PartCheck(damages=[damage(file, "is missing", "part"), *faults])
    except OSError as error:
        return PartCheck(damages=[damage(file, f"cannot be read ({error.strerror or error})", "part"), *faults])
    by_line = line is not None and found == (line.bytes, line.sha256)
    by_receipt = receipt is not None and found == (receipt.part.bytes, receipt.part.sha256)
    if not by_line and not by_receipt:
        said = line if line is not None else receipt.part  # type: ignore[union-attr]
        return PartCheck(damages=[damage(file, _what_changed(record, found, said), "part"), *faults])
    if not by_line and record.complete:
        problem = f"has no line of {part_name(index)}" if line is None else f"its line of {line.name} is not true"
        faults.append(damage(manifest, problem, "rerun"))
    elif line is not None and receipt is not None and receipt.part.without_counts() != line:
        faults.append(damage(paper, "is not what the manifest says of the part", "receipt"))
        receipt = None
    elif receipt is not None and not by_receipt:
        faults.append(damage(paper, "is not true of the part", "receipt"))
        receipt = None
    info = receipt.part if receipt is not None else line
    assert info is not None
    wrong = [damage(file, problem, "part") for problem in _content(record, file, info)]
    images, bad_images = check_images(record.folder, file, check) if deep and not wrong else (0, [])
    faults += wrong
    counts = info.facts.get(SCORE_COUNTS) if receipt is not None else None
    return PartCheck(info, counts, faults, images, bad_images)


def _receipt(record: Record, index: int) -> tuple[Receipt | None, str | None]:
    """The receipt of a part, and what is wrong with it; a receipt that is wrong is None."""
    if not record.receipts:
        return None, None
    try:
        receipt = read_receipt(record.folder, index)
    except UserError as error:
        return None, _cause(error, record.folder / receipt_name(index))
    except OSError as error:
        return None, f"cannot be read ({error.strerror or error})"
    if receipt is None:
        there = record.complete or (record.folder / receipt_name(index)).exists()
        return None, "is missing or empty" if there else None
    if record.digest is not None and receipt.options != record.digest:
        return None, "belongs to a dataset with other options"
    known = record.inputs.get(receipt.shard.get("uri", ""), {})
    if any(receipt.shard.get(name) != value for name, value in known.items()):
        return None, f"is of another state of {receipt.shard['uri']}"
    return receipt, None


def _cause(error: UserError, file: AnyPath) -> str:
    """What is wrong with a file, out of a sentence that begins with its name and ends with what to do."""
    return str(error).removeprefix(f"{file}: ").rpartition(";")[0]


def _size_and_sha256(file: AnyPath, check: Callable[[], None]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with storage.open_file(str(file)) as stream:
        while data := stream.read(_READ):
            check()
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def _what_changed(record: Record, found: tuple[int, str], said: PartInfo) -> str:
    size, sha256 = found
    if other := next((line.name for line in record.lines.values() if line.sha256 == sha256), None):
        return f"has the content of {other}"
    if size != said.bytes:
        return f"has {size:,} bytes instead of {said.bytes:,}"
    return "its bytes have changed (their sha256 is another)"


def _content(record: Record, file: AnyPath, info: PartInfo) -> Iterator[str]:
    """What is wrong with the rows of a part whose bytes are those that were committed."""
    counted = info.facts.get(SCORE_COUNTS, {})
    try:
        with open_part(file) as part:
            schema = part.schema_arrow
            if record.schema is not None and not schema.equals(record.schema):
                yield "has other columns than the manifest says"
            if lost := [name for name in counted if name not in schema.names]:
                yield f"has no column {lost[0]}, whose scores its receipt counts"
                return
            thresholds = record.thresholds
            scores = [thresholds.score_column] if thresholds and thresholds.score_column in schema.names else []
            keys = ["key", "status", "level"]
            table = part.read(list(dict.fromkeys([*keys, *counted, *scores])), use_threads=False)
    except UserError as error:
        yield _cause(error, file)
        return
    statuses = {item["values"]: item["counts"] for item in table["status"].value_counts().to_pylist()}
    if statuses != {status: rows for status, rows in info.statuses.items() if rows}:
        yield f"has {table.num_rows:,} rows of other statuses than its receipt says"
    for column, counts in counted.items():
        if Counts.of([usable_scores(table, column)]).to_json() != counts:
            yield f"the receipt's counts of {column} are not those of its rows"
    yield from _levels(table, thresholds if scores else None)


def _levels(table: pa.Table, thresholds: Thresholds | None) -> Iterator[str]:
    """What is wrong with the levels; without thresholds, they came with the source."""
    levels = table["level"].fill_null(0).combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    given = pc.is_valid(table["level"]).combine_chunks().to_numpy(zero_copy_only=False)
    wrong = given & (levels < 1)
    if thresholds is not None:
        values = table[thresholds.score_column].combine_chunks().cast(pa.float32())
        scores = values.fill_null(float("nan")).to_numpy(zero_copy_only=False)
        finite = np.isfinite(scores)
        expected = thresholds.assign(np.where(finite, scores, np.float32(0)))
        wrong |= given & ((levels > thresholds.levels) | (finite & (levels != expected)))
        wrong |= ~given & np.isfinite(usable_scores(table, thresholds.score_column))
    if wrong.any():
        key = table["key"][int(np.flatnonzero(wrong)[0])].as_py()
        yield f"the level of {int(wrong.sum()):,} rows is not what the thresholds say, first of {key}"
