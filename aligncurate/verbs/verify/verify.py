"""The verb `verify`: checks datasets file by file, and makes again what is damaged."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from aligncurate.dataset.manifest import LOST, MANIFEST
from aligncurate.errors import RunError, UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath, RemotePath
from aligncurate.progress import notice
from aligncurate.sources.curated import CuratedSource
from aligncurate.verbs.verify.check import Checked, check_dataset
from aligncurate.verbs.verify.repair import repair_parts, write_thresholds
from aligncurate.verbs.verify.rerun import rerun_of
from aligncurate.verbs.verify.result import VerifyResult


def verify(
    datasets: str | AnyPath | Sequence[str | AnyPath],
    *,
    deep: bool = False,
    repair: bool = False,
    inputs: Sequence[str | Path] = (),
    workers: int | None = None,
    quiet: bool = False,
) -> VerifyResult:
    """Check that datasets are what was written: every part against its receipt, the manifest and the thresholds.

    Args:
        datasets: folders, finished or not; folders of earlier versions have no receipts.
        deep: also read every image and compare it with its sha256.
        repair: make again what is damaged, by running the command that made the dataset for these parts only. If
            that cannot be done, nothing is changed and a note says why.
        inputs: for `repair`, files that a manifest knows only by name and sha256: weights, joined tables, uid lists.
        workers: parts that are checked at once; by default one per core.
        quiet: show no progress and no notices.

    Raises:
        UserError: a folder is no dataset, or an option cannot be used. Damage is not an error, but in the result.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: use a number of at least 1.")
    if inputs and not repair:
        raise UserError(f"--input {inputs[0]} is for --repair; add it.")
    folders = [as_path(d) for d in ([datasets] if isinstance(datasets, str | Path | RemotePath) else datasets)]
    if not folders:
        raise UserError("no dataset given; name at least one dataset folder.")
    threads = workers or os.cpu_count() or 1
    found = [check_dataset(folder, deep=deep, workers=threads, quiet=quiet) for folder in folders]
    repaired: list[str] = []
    notes: list[str] = []
    if repair:
        for number in sorted(range(len(found)), key=lambda n: _steps(found[n])):  # what others were made from first
            found[number] = _repaired(found[number], list(map(Path, inputs)), threads, repaired, notes, quiet=quiet)
    return VerifyResult(
        datasets=[str(folder) for folder in folders],
        parts=sum(each.parts for each in found),
        rows=sum(each.rows for each in found),
        bytes=sum(each.bytes for each in found),
        images=sum(each.images for each in found) if deep else None,
        damages=[damage for each in found for damage in each.damages],
        bad_images=[image for each in found for image in each.bad_images],
        repaired=repaired,
        notes=notes,
    )


def _steps(checked: Checked) -> int:
    return len((checked.manifest or {}).get("history", []))


def _repaired(
    before: Checked, inputs: Sequence[Path], workers: int, repaired: list[str], notes: list[str], *, quiet: bool
) -> Checked:
    """Repair a dataset, and check it again; adds to the files that are whole again, and to the notes."""
    kinds = {damage.mend for damage in before.damages}
    if before.manifest is None or None in kinds or not kinds:
        return before
    try:
        if "thresholds" in kinds:
            write_thresholds(before)
        if kinds - {"thresholds"}:
            _check_inputs(before, workers, quiet=quiet)
            rerun = rerun_of(before.folder, before.manifest, inputs)
            notice(f"running again: {rerun.command()}", quiet=quiet)
            repair_parts(before, rerun, quiet=quiet)
    except (UserError, RunError) as error:
        lost = any(damage.file.endswith(MANIFEST) for damage in before.damages)
        advice = f"; if manifest.json is wrong, {LOST}" if lost and before.manifest["complete"] else ""
        notes.append(f"{before.folder}: not repaired: {str(error).rstrip('.')}{advice}.")
    after = check_dataset(before.folder, deep=False, workers=workers, quiet=quiet)
    left = {damage.file for damage in after.damages}
    repaired += dict.fromkeys(damage.file for damage in before.damages if damage.file not in left)
    notes += _other_content(before, after)
    after.images, after.bad_images = before.images, before.bad_images
    return after


def _check_inputs(checked: Checked, workers: int, *, quiet: bool) -> None:
    """Raises UserError if a dataset that this one was made from is damaged: its damage would be copied."""
    assert checked.manifest is not None
    folders = [line["uri"] for line in checked.manifest["inputs"] if line.get("kind") == CuratedSource.kind]
    for folder in folders:
        if check_dataset(as_path(folder), deep=False, workers=workers, quiet=quiet).damages:
            raise UserError(
                f"{folder}, from which it was made, is damaged; first run `aligncurate verify {shlex.quote(folder)} "
                "--repair`"
            )


def _other_content(before: Checked, after: Checked) -> list[str]:
    """A note on each part that was made again with other bytes than it had."""
    old, new = ({p["name"]: p["sha256"] for p in (c.manifest or {}).get("parts", [])} for c in (before, after))
    return [
        f"{before.folder / name}: made again, but with other content than before; verify what it was made from"
        for name, sha256 in new.items()
        if old.get(name, sha256) != sha256
    ]
