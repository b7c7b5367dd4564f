"""Checks one dataset: its manifest, its thresholds, and each of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aligncurate.dataset.manifest import (
    LOST,
    MANIFEST,
    SEAL,
    THRESHOLDS,
    arrow_schema,
    options_digest,
    read_manifest,
    seal,
)
from aligncurate.dataset.receipt import (
    DATA,
    RECEIPTS,
    SCORE_COUNTS,
    PartInfo,
    part_name,
    read_receipt,
)
from aligncurate.engines import threads
from aligncurate.errors import UserError
from aligncurate.io.files import read_json
from aligncurate.io.paths import AnyPath, names
from aligncurate.levels import Counts, Thresholds
from aligncurate.progress import meter
from aligncurate.verbs.verify.parts import PartCheck, Record, check_part
from aligncurate.verbs.verify.result import BadImage, Damage, Mend

_NUMBER = re.compile(r"part-(\d{5,19})\.(?:parquet|json)")


@dataclass
class Checked:
    """What is wrong with one dataset.

    Attributes:
        folder: of the dataset.
        manifest: as it was read; None if it is damaged or missing.
        parts, rows, bytes, images: that are there and were checked.
        damages, bad_images: in order.
        infos: what intact parts without a true receipt hold, by number.
    """

    folder: AnyPath
    manifest: dict[str, Any] | None = None
    parts: int = 0
    rows: int = 0
    bytes: int = 0
    images: int = 0
    damages: list[Damage] = field(default_factory=list)
    bad_images: list[BadImage] = field(default_factory=list)
    infos: dict[int, PartInfo] = field(default_factory=dict)

    def add(self, name: str, problem: str, mend: Mend | None) -> None:
        """Note a damaged file of the dataset."""
        self.damages.append(Damage(str(self.folder), str(self.folder / name), problem, mend))


def check_dataset(folder: AnyPath, *, deep: bool, workers: int, quiet: bool) -> Checked:
    """Check the dataset in `folder`; `deep` reads every image too. Raises UserError if it is no dataset."""
    checked = Checked(folder)
    checked.manifest = _read_manifest(checked)
    receipts, files = _numbers(names(folder / RECEIPTS)), _numbers(names(folder / DATA))
    record = _record(checked, receipts)
    numbers = sorted({*record.lines, *receipts, *files})
    if record.complete and not receipts and record.receipts and record.lines:
        record = replace(record, receipts=False)
        problem = "is missing: copying with `*` leaves out hidden files, so copy with `cp -r OLD/. NEW`"
        checked.add(RECEIPTS, problem, "receipt")
        checked.infos.update(record.lines)
    total: dict[str, Counts] | None = None
    found: dict[int, PartCheck] = {}
    with meter(
        "verify", sum(line.rows for line in record.lines.values()) or None, quiet=quiet, unit="rows"
    ) as progress:
        run = threads.run(lambda n, check: check_part(record, n, deep=deep, check=check), numbers, workers=workers)
        for outcome in run:
            assert outcome.result is not None
            part = outcome.result
            if part.info is not None:
                checked.parts += 1
                checked.rows += part.info.rows
                checked.bytes += part.info.bytes
                progress.add(part.info.rows, part.info.rows, 0)
            checked.images += part.images
            total = _include(total, part)
            if part.damages or part.bad_images:
                found[outcome.shard] = part
    for number, part in sorted(found.items()):
        checked.damages += part.damages
        checked.bad_images += part.bad_images
        if part.info is not None and any(damage.mend == "receipt" for damage in part.damages):
            checked.infos[number] = part.info
    if checked.manifest is not None and record.complete:
        stored = checked.manifest.get(SCORE_COUNTS, {})
        if any(stored.get(column, counts.to_json()) != counts.to_json() for column, counts in (total or {}).items()):
            checked.add(MANIFEST, "its score counts are not the sum of those of the parts", "rerun")
    checked.damages = _once(checked.damages)
    return checked


def _read_manifest(checked: Checked) -> dict[str, Any] | None:
    folder = checked.folder
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        if not any((folder / name).is_dir() for name in (RECEIPTS, DATA)):
            what = "there is no manifest.json in it" if folder.is_dir() else "there is no such folder"
            raise UserError(f"{folder}: not a dataset: {what}.") from None
        checked.add(MANIFEST, "is missing: run the command that made the dataset again; it keeps the parts", None)
    except UserError as error:
        problem = str(error).removeprefix(f"{folder / MANIFEST}: ").rpartition(";")[0]
        checked.add(MANIFEST, f"{problem}; {LOST}", None)
    return None


def _record(checked: Checked, receipts: Iterable[int]) -> Record:
    """What the manifest says; notes what is wrong with it."""
    manifest, folder = checked.manifest, checked.folder
    if manifest is None:
        return Record(folder)
    parts = [PartInfo.from_json(line) for line in manifest["parts"]]
    lines = {number: part for part in parts for number in _numbers([part.name])}
    own = manifest["schema_version"] > 1
    record = Record(
        folder,
        complete=manifest["complete"],
        lines=lines,
        digest=options_digest(manifest) if own else None,
        schema=arrow_schema(manifest),
        thresholds=Thresholds.from_json(cut, "") if (cut := manifest.get("thresholds")) else None,
        inputs={file["uri"]: file for line in manifest["inputs"] for file in line.get("files", [])},
        receipts=own,
    )
    if own and _options_changed(record, receipts):
        checked.add(MANIFEST, f"its options are not those that its parts were made with; {LOST}", None)
        return replace(record, digest=None, schema=None, thresholds=None, inputs={})
    if not manifest["complete"]:
        checked.add(MANIFEST, "the dataset is not finished", "rerun")
        return record
    for problem, mend in _manifest_problems(manifest, record):
        checked.add(MANIFEST, problem, mend)
    if fault := _thresholds_problem(folder, manifest.get("thresholds"), expected=own):
        checked.add(THRESHOLDS, fault, "thresholds")
    return record


def _manifest_problems(manifest: Mapping[str, Any], record: Record) -> Iterator[tuple[str, Mend | None]]:
    if record.receipts and [part.name for part in record.lines.values()] != [
        part_name(n) for n in range(len(record.lines))
    ]:
        yield "its parts are not numbered from 0 on", "rerun"
    elif SEAL in manifest and manifest[SEAL] != seal(manifest):
        yield "it was changed after it was written", "rerun"
    if record.schema is not None and {f.name: str(f.type) for f in record.schema} != manifest.get("columns"):
        yield f"its columns and arrow_schema differ; {LOST}", None


def _options_changed(record: Record, receipts: Iterable[int]) -> bool:
    """Whether receipts are those of the parts, but none is of the manifest's options."""
    own = False
    for number in sorted(receipts):
        try:
            receipt = read_receipt(record.folder, number)
        except (UserError, OSError):
            continue
        if receipt is not None:
            if receipt.options == record.digest:
                return False
            line = record.lines.get(number)
            own = own or line is None or line.sha256 == receipt.part.sha256
    return own


def _thresholds_problem(folder: AnyPath, cut: Any, *, expected: bool) -> str | None:
    file = folder / THRESHOLDS
    if not cut:
        return None
    try:
        return None if read_json(file) == cut else "is not what the manifest says"
    except FileNotFoundError:
        return "is missing" if expected else None
    except UserError as error:
        return str(error).removeprefix(f"{file}: ").rpartition(";")[0]


def _numbers(files: Iterable[str]) -> list[int]:
    """The numbers in the names of parts or receipts; other files have none."""
    return [int(match[1]) for name in files if (match := _NUMBER.fullmatch(name.rpartition("/")[2]))]


def _include(total: dict[str, Counts] | None, part: PartCheck) -> dict[str, Counts]:
    """Sums of score counts so far, of the columns that every part has counted."""
    stored = part.counts or {}
    if total is None:
        total = {column: Counts.of([]) for column in stored}
    for column, counts in total.items():
        if column in stored:
            counts.include(stored[column])
    return {column: counts for column, counts in total.items() if column in stored}


def _once(damages: Iterable[Damage]) -> list[Damage]:
    """The damages, without further ones that only say that the manifest is to be written again."""
    kept: dict[tuple[str, Any], Damage] = {}
    for damage in damages:
        manifest = damage.file.endswith(MANIFEST) and damage.mend == "rerun"
        kept.setdefault((damage.file, "rerun" if manifest else damage.problem), damage)
    return list(kept.values())
