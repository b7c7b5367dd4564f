"""Export as DataComp: the sorted uids of all pairs in one `uids.npy`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import PAIRS
from aligncurate.io.files import atomic_file
from aligncurate.progress import Meter
from aligncurate.verbs.export.result import Exported
from aligncurate.verbs.uids import UID, UID_COLUMNS, row_uids


def write_datacomp(dataset: Dataset, done: Exported, progress: Meter) -> None:
    """Write the uids of all pairs, also of those that are not downloaded; 16 bytes of memory for each."""
    columns = ["status", *(name for name in UID_COLUMNS if name in dataset.schema.names)]
    found = [np.empty(0, UID)]
    for index in range(len(dataset.parts)):
        for table in dataset.groups(index, columns):
            uids, known = row_uids(table.filter(pc.is_in(table["status"], pa.array(sorted(PAIRS)))))
            found.append(uids[known])
            progress.add(len(found[-1]), len(found[-1]), 0)
    uids = np.sort(np.concatenate(found))
    with atomic_file(done.path / "uids.npy") as temporary, temporary.open("wb") as file:
        # Given a real file, numpy writes past Python and does not notice a disk that is full at the end.
        np.save(SimpleNamespace(write=file.write), uids)
    done.rows, done.skipped = len(uids), dataset.rows - len(uids)
    done.files.append("uids.npy")
