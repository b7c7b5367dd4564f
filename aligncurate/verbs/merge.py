"""The verb `merge`: one dataset of several; their parts are taken over as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aligncurate.dataset.joined import JoinedDataset, open_datasets
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import SCORE_COUNTS, PartInfo, read_receipt
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.engines import threads
from aligncurate.errors import UserError
from aligncurate.io.paths import AnyPath
from aligncurate.verbs.rewrite import check_not_in_place, missing_parts

_THREADS = 8  # they wait for the disk


def merge(datasets: Sequence[str | AnyPath], out: str | AnyPath, *, quiet: bool = False) -> Dataset:
    """Make one dataset of several. Images are not read and nothing is scored.

    Parts are hard links to those of the inputs, or copies on another disk. Where the inputs have different columns, the
    parts are written again, with nulls in the columns that they lack.

    Args:
        datasets: folders of at least two datasets, of the same encoder and thresholds.
        out: folder of the new dataset.
        quiet: show no progress.

    Raises:
        UserError: the datasets cannot be used as one (see `open_datasets`), or `out` cannot be used.
    """
    if isinstance(datasets, str | AnyPath) or len(datasets) < 2:
        raise UserError("merge needs at least two datasets.")
    joined = open_datasets(datasets)
    assert isinstance(joined, JoinedDataset)
    check_not_in_place(joined, out)
    shards = [{"part": part.name, "sha256": part.sha256} for part in joined.parts]
    writer = DatasetWriter(out, joined.derived("merge", {}), joined.schema, shards)
    if finished := writer.finished():
        return finished

    def make(index: int, check: Callable[[], None]) -> None:
        check()
        dataset, own = joined.home(index)
        info = _with_counts(dataset, own)
        if dataset.schema.equals(joined.schema):
            writer.take_over(index, dataset.files[own], info)
        else:
            with writer.part(index) as part:
                part.facts.update(info.facts)
                for table in joined.groups(index):
                    check()
                    part.write(table)
        progress.add(info.rows, info.rows, 0)

    with missing_parts(writer, [part.rows for part in joined.parts], quiet=quiet) as (progress, todo):
        for _ in threads.run(make, todo, workers=_THREADS):
            pass
        return writer.finish(len(shards), **{SCORE_COUNTS: joined.manifest[SCORE_COUNTS]})


def _with_counts(dataset: Dataset, index: int) -> PartInfo:
    """What a part holds, with the counts of its scores if its receipt has them."""
    part, receipt = dataset.parts[index], read_receipt(dataset.path, index)
    return receipt.part if receipt is not None and receipt.part.sha256 == part.sha256 else part
