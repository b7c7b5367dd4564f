"""The verb `finish`: the manifest of a dataset whose parts were made by several runs (`--partition`)."""

from __future__ import annotations

from pathlib import PurePosixPath

from aligncurate.dataset.manifest import MANIFEST, SEAL, SHARDS, arrow_schema, read_manifest
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import RECEIPTS, receipt_name
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.errors import UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath, names

_NAMED = 5


def finish(dataset: str | AnyPath) -> Dataset:
    """Write the manifest of a dataset from the receipts of its parts, which must all be there.

    The run that makes the last part does this by itself; this is for runs that ended in another way.

    Args:
        dataset: folder of the dataset.

    Raises:
        UserError: parts are missing, or the folder holds no dataset.
    """
    folder = as_path(dataset)
    try:
        before = read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: there is no dataset; its runs have not begun.") from None
    if before["complete"]:
        return Dataset(folder)
    count, schema = before.get(SHARDS), arrow_schema(before)
    if not isinstance(count, int) or schema is None:
        raise UserError(f"{folder / MANIFEST}: it does not say how many parts there will be; rerun the command.")
    there = set(names(folder / RECEIPTS))
    missing = [i for i in range(count) if PurePosixPath(receipt_name(i)).name not in there]
    if missing:
        listed = ", ".join(str(i) for i in missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
        raise UserError(
            f"{folder}: {len(missing):,} of {count:,} parts are missing (numbers {listed}); run their partitions again."
        )
    head = {name: value for name, value in before.items() if name not in ("complete", "parts", SHARDS, SEAL)}
    writer = DatasetWriter(folder, head, schema, [{}] * count)
    with writer.open():
        return writer.finish(count)
