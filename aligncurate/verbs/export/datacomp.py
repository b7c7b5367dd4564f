"""Export as DataComp: the sorted uids of all pairs in one `uids.npy`."""

from __future__ import annotations

import hashlib
import re
from array import array
from typing import Any

import numpy as np

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import Status
from aligncurate.io.files import atomic_file
from aligncurate.progress import Meter
from aligncurate.verbs.export.plan import exportable_rows
from aligncurate.verbs.export.result import Exported


def write_datacomp(dataset: Dataset, done: Exported, progress: Meter) -> None:
    """Write the uids of the `ok` rows; one uid is two u8, its first and its last 16 hex digits."""
    columns = ["status", "sha256", "caption", *(["uid"] if "uid" in dataset.schema.names else [])]
    halves = array("Q")
    for row in exportable_rows(dataset, columns):
        if row["status"] != Status.OK:
            continue
        uid = datacomp_uid(row)
        halves.extend((int(uid[:16], 16), int(uid[16:], 16)))
        progress.add(1, 1, 0)
    uids = np.array(halves, np.uint64).view(np.dtype("u8,u8"))
    uids.sort()
    with atomic_file(done.path / "uids.npy") as temporary, temporary.open("wb") as file:
        np.save(file, uids)
    done.rows = len(uids)
    done.files.append("uids.npy")


def datacomp_uid(row: dict[str, Any]) -> str:
    """The 32 hex digits in the row's `uid` column, or else the first half of sha256(image sha256 + caption)."""
    own = row.get("uid")
    if isinstance(own, str) and re.fullmatch(r"[0-9a-fA-F]{32}", own):
        return own.lower()
    return hashlib.sha256(row["sha256"] + (row["caption"] or "").encode()).hexdigest()[:32]
