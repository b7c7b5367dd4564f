"""Makes the damaged parts of a dataset again: withdraws their receipts, and runs the command that made the dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from aligncurate.dataset.manifest import MANIFEST, SEAL, THRESHOLDS, options_digest, seal
from aligncurate.dataset.part import open_part, write_receipt
from aligncurate.dataset.receipt import (
    RECEIPTS,
    SCORE_COUNTS,
    UNKNOWN_SHARD,
    Receipt,
    receipt_name,
)
from aligncurate.dataset.record import usable_scores
from aligncurate.io.files import atomic_file, claim, sync, write_json
from aligncurate.io.paths import AnyPath
from aligncurate.levels import Counts
from aligncurate.verbs.verify.check import Checked
from aligncurate.verbs.verify.rerun import Rerun


def write_thresholds(checked: Checked) -> None:
    """Write `thresholds.json` again from the manifest."""
    assert checked.manifest is not None
    write_json(checked.folder / THRESHOLDS, checked.manifest["thresholds"])


def repair_parts(checked: Checked, rerun: Rerun, *, quiet: bool) -> None:
    """Make damaged parts, receipts and lines of the manifest again.

    Intact parts keep their bytes: those without a true receipt get one. If the run is refused or stopped, the folder is
    again as it was, except for parts that are whole by then.

    Raises UserError if the run is refused, RunError if it fails.
    """
    with _undone_if_it_fails(checked.folder) as undo:
        with claim(checked.folder, [MANIFEST]):
            _withdraw(checked, undo)
        rerun(quiet=quiet)


def _withdraw(checked: Checked, undo: _Undo) -> None:
    folder, manifest = checked.folder, checked.manifest
    assert manifest is not None
    damaged = {damage.part for damage in checked.damages if damage.mend == "part" and damage.part is not None}
    (folder / RECEIPTS).mkdir(exist_ok=True)
    for number in damaged:
        undo.keep(receipt_name(number))
        (folder / receipt_name(number)).unlink(missing_ok=True)
    digest = options_digest(manifest)
    for number, info in checked.infos.items():
        if number not in damaged:
            undo.keep(receipt_name(number))
            facts = {**info.facts, SCORE_COUNTS: _counts(folder / info.name, manifest)}
            write_receipt(folder, number, Receipt(replace(info, facts=facts), UNKNOWN_SHARD, digest))
    sync(folder / RECEIPTS)
    undo.keep(MANIFEST)  # after the receipts: a run that is killed here leaves a dataset with damage that is found
    head = {name: value for name, value in manifest.items() if name not in (SCORE_COUNTS, SEAL)}
    unfinished = {**head, "complete": False, "parts": []}
    write_json(folder / MANIFEST, {**unfinished, SEAL: seal(unfinished)})


def _counts(file: AnyPath, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a part's scores, as the verb counted them."""
    with open_part(file) as part:
        columns = [f.name for f in part.schema_arrow if f.name.startswith("score") and pa.types.is_floating(f.type)]
        if manifest["verb"] in ("score", "ingest"):  # other columns came with the source
            columns = list(manifest.get("encoders") or ["score"])
        table = part.read([*columns, "status"], use_threads=False)
    return {column: Counts.of([usable_scores(table, column)]).to_json() for column in columns}


class _Undo:
    """The files of a folder as they were before they were changed."""

    def __init__(self, folder: AnyPath) -> None:
        self._folder = folder
        self._before: dict[str, bytes | None] = {}

    def keep(self, name: str) -> None:
        """Remember a file that is about to be changed."""
        file = self._folder / name
        self._before[name] = file.read_bytes() if file.exists() else None

    def restore(self) -> None:
        """Bring all of them back."""
        for name, data in self._before.items():
            file = self._folder / name
            if data is None:
                file.unlink(missing_ok=True)
                continue
            with atomic_file(file, folder=self._folder) as temporary:
                temporary.write_bytes(data)


@contextmanager
def _undone_if_it_fails(folder: AnyPath) -> Iterator[_Undo]:
    undo = _Undo(folder)
    try:
        yield undo
    except BaseException:
        undo.restore()
        raise
