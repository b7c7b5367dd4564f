"""The verb `bucket`: find thresholds for a dataset's scores, or take frozen ones, and label every pair."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.manifest import THRESHOLDS
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import COLUMNS, Status, usable_scores
from aligncurate.errors import UserError
from aligncurate.levels import MAX_LEVELS, Counts, Floats, Method, Thresholds, WrongCounts, find_thresholds
from aligncurate.progress import notice
from aligncurate.verbs.rewrite import rewrite

_READERS = min(4, os.cpu_count() or 1)


def bucket(
    dataset: str | Path | Dataset,
    out: str | Path,
    *,
    levels: int | None = None,
    method: Method | None = None,
    thresholds: str | Path | None = None,
    score_column: str = "score",
    quiet: bool = False,
) -> Dataset:
    """Give every scored pair its alignment level, 1..N, N best.

    Args:
        dataset: what to label.
        out: folder of the new dataset; `thresholds.json` in it can be applied to other data.
        levels: N, by default 8 as in the AlignGPT paper.
        method: `quantile` (default) for levels of equal size, `uniform` for levels of equal width.
        thresholds: a `thresholds.json`; then `levels` and `method` are its own.
        score_column: `score`, or that of a further encoder.

    Raises UserError when there are no scores, or the options do not fit together.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    check_score_column(opened, score_column)
    if thresholds is not None and method is not None:
        raise UserError(f"--method {method}: --thresholds brings thresholds that are found already; leave one out.")
    if thresholds is not None:
        found = _frozen(Path(thresholds), opened, score_column, levels, quiet=quiet)
    else:
        found = fit(opened, 8 if levels is None else levels, method or "quantile", score_column)
    options = {"levels": found.levels, "method": found.method, "score_column": score_column}
    options["thresholds"] = "frozen" if thresholds is not None else "fitted"
    head = opened.derived("bucket", options, thresholds=found.to_json())

    def label(_: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            yield table.set_column(table.schema.get_field_index("level"), "level", _levels(table, found))

    return rewrite(opened, out, head, label, quiet=quiet)


def check_score_column(dataset: Dataset, name: str) -> None:
    """Raises UserError unless `name` is a column of scores."""
    names = [f.name for f in dataset.schema if pa.types.is_floating(f.type)]
    if name not in names:
        raise UserError(f"{dataset.path}: no column {name} with scores; it has {', '.join(names) or 'none'}.")


def iter_scores(dataset: Dataset, column: str) -> Iterator[Floats]:
    """All usable scores of a column, an array per part, in order; a few parts are read ahead."""

    def read(index: int) -> Floats:
        table = dataset.read(index, ["status", column], encoded=["status"])
        status = table["status"].unify_dictionaries().combine_chunks()
        # The strings themselves are never made: a code says which of them a row has.
        ok = pc.equal(status.indices, status.dictionary.index(Status.OK.value))
        values = table[column].filter(pc.and_(ok, pc.is_valid(table[column])))
        scores: Floats = values.cast(pa.float32()).to_numpy()
        finite = np.isfinite(scores)
        return scores if finite.all() else scores[finite]

    waiting: deque[Future[Floats]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as pool:
        for index in range(len(dataset.parts)):
            waiting.append(pool.submit(read, index))
            if len(waiting) > _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fit(dataset: Dataset, levels: int, method: Method, score_column: str = "score") -> Thresholds:
    """Thresholds of a dataset's usable scores: exact, in two passes over them, or one where `score` left counts.

    Raises UserError when there are no scores, or `levels` and `method` are none.
    """
    if not 2 <= levels <= MAX_LEVELS:
        raise UserError(f"--levels {levels}: use a number from 2 to {MAX_LEVELS}.")
    if method not in get_args(Method):
        raise UserError(f"--method {method}: use quantile or uniform.")

    def scan() -> Iterator[Floats]:
        return iter_scores(dataset, score_column)

    counts = dataset.score_counts(score_column) or Counts.of(scan())
    if not counts.total:
        raise UserError(
            f"{dataset.path}: no pair has a {score_column}, so there is nothing to bucket; run `aligncurate score` "
            "on it, or see with `aligncurate inspect` why its rows failed."
        )
    try:
        values, count, low, high = find_thresholds(scan, levels, method, counts)
    except WrongCounts:  # parts that something else has rewritten since
        values, count, low, high = find_thresholds(scan, levels, method)
    numbers = tuple(float(v) for v in values)
    return Thresholds(method, numbers, score_column, count, low, high, _encoder(dataset, score_column))


def _frozen(file: Path, dataset: Dataset, score_column: str, levels: int | None, *, quiet: bool) -> Thresholds:
    if file.is_dir():
        file = file / THRESHOLDS
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"--thresholds {file}: there is no such file.") from None
    except ValueError as error:
        raise UserError(f"--thresholds {file}: not a JSON file ({error}).") from None
    found = Thresholds.from_json(data, f"--thresholds {file}")
    if levels is not None and levels != found.levels:
        raise UserError(f"--thresholds {file}: they make {found.levels} levels, not {levels}; leave --levels out.")
    if found.score_column != score_column:
        raise UserError(f"--thresholds {file}: they are for column {found.score_column}, not {score_column}.")
    mine, theirs = _encoder(dataset, score_column), found.encoder
    if mine is not None and theirs is not None and mine != theirs:
        notice(
            f"the thresholds come from scores of encoder {theirs.get('model')}, these from {mine.get('model')}: "
            "their scales differ, and so will the levels' sizes.",
            quiet=quiet,
        )
    return found


def _encoder(dataset: Dataset, score_column: str) -> dict[str, Any] | None:
    encoder = dataset.encoder_of(score_column)
    return {k: encoder[k] for k in ("model", "pretrained", "weights_sha256")} if encoder else None


def _levels(table: pa.Table, thresholds: Thresholds) -> pa.Array:
    """Levels of a table's rows, null where there is no usable score."""
    scores = usable_scores(table, thresholds.score_column)
    missing = np.isnan(scores)
    return pa.array(thresholds.assign(np.where(missing, np.float32(0), scores)), COLUMNS["level"], mask=missing)
