"""The verb `bucket`: computes thresholds from a dataset's scores, or reads them from a file, and sets every level."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from aligncurate.dataset.joined import Datasets, open_datasets
from aligncurate.dataset.manifest import THRESHOLDS
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import COLUMNS, usable_scores
from aligncurate.errors import UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath
from aligncurate.levels import MAX_LEVELS, Counts, Floats, Method, Thresholds, WrongCounts, find_thresholds
from aligncurate.progress import notice
from aligncurate.verbs.rewrite import rewrite
from aligncurate.verbs.scores import check_score_column, iter_scores


def bucket(
    dataset: Datasets,
    out: str | AnyPath,
    *,
    levels: int | None = None,
    method: Method | None = None,
    thresholds: str | AnyPath | None = None,
    score_column: str = "score",
    quiet: bool = False,
) -> Dataset:
    """Give every scored pair its alignment level, from 1 to N (best).

    Args:
        dataset: the dataset whose pairs get levels; several folders are read as one.
        out: folder of the new dataset; its `thresholds.json` can be applied to other data.
        levels: N; the default is 8, as in the AlignGPT paper.
        method: `quantile` (default) for levels with equal numbers of pairs, `uniform` for intervals of equal width.
        thresholds: a `thresholds.json` to apply; it determines `levels` and `method`.
        score_column: `score`, or the column of another encoder or signal.
        quiet: show no progress and no notices.

    Raises:
        UserError: there are no scores, or the options contradict each other.
    """
    opened = open_datasets(dataset, new_levels=True)
    check_score_column(opened, score_column)
    if thresholds is not None and method is not None:
        raise UserError(f"--method {method}: the --thresholds file has its own method; drop one of the two options.")
    if thresholds is not None:
        applied = _read_thresholds(as_path(thresholds), opened, score_column, levels, quiet=quiet)
    else:
        applied = fit_thresholds(opened, 8 if levels is None else levels, method or "quantile", score_column)
        used = 1 + len({value for value in applied.values if value > applied.minimum})
        if used < applied.levels:
            notice(
                f"{opened.name}: many scores are equal, so only {used} of the {applied.levels} levels get pairs; "
                f"use --levels {max(used, 2)} or fewer.",
                quiet=quiet,
            )
    options = {"levels": applied.levels, "method": applied.method, "score_column": score_column}
    options["thresholds"] = "frozen" if thresholds is not None else "fitted"
    head = opened.derived("bucket", options, thresholds=applied.to_json())

    def label(_: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            yield table.set_column(table.schema.get_field_index("level"), "level", _levels(table, applied))

    return rewrite(opened, out, head, label, quiet=quiet)


def fit_thresholds(dataset: Dataset, levels: int, method: Method, score_column: str = "score") -> Thresholds:
    """Compute exact thresholds of a dataset's usable scores in two passes, or in one if `score` saved their counts.

    Raises:
        UserError: there are no scores, or `levels` or `method` is invalid.
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
            f"{dataset.name}: no pair has a {score_column}, so there is nothing to bucket; run `aligncurate score` "
            "first, or see with `aligncurate inspect` why rows failed."
        )
    try:
        values, count, low, high = find_thresholds(scan, levels, method, counts)
    except WrongCounts:  # a part was changed after `score` counted
        values, count, low, high = find_thresholds(scan, levels, method)
    numbers = tuple(float(v) for v in values)
    return Thresholds(method, numbers, score_column, count, low, high, _encoder(dataset, score_column))


def _read_thresholds(
    file: AnyPath, dataset: Dataset, score_column: str, levels: int | None, *, quiet: bool
) -> Thresholds:
    if file.is_dir():
        file = file / THRESHOLDS
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"--thresholds {file}: there is no such file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--thresholds {file}: not a JSON file ({error}).") from None
    thresholds = Thresholds.from_json(data, f"--thresholds {file}")
    if levels is not None and levels != thresholds.levels:
        raise UserError(f"--thresholds {file}: it makes {thresholds.levels} levels, not {levels}; drop --levels.")
    if thresholds.score_column != score_column:
        raise UserError(f"--thresholds {file}: it is for column {thresholds.score_column}, not {score_column}.")
    mine, theirs = _encoder(dataset, score_column), thresholds.encoder
    if mine is not None and theirs is not None and mine != theirs:
        notice(
            f"the thresholds are for scores of {theirs.get('model')} ({theirs.get('pretrained')}), but these are from "
            f"{mine.get('model')} ({mine.get('pretrained')}); expect levels of different sizes.",
            quiet=quiet,
        )
    return thresholds


def _encoder(dataset: Dataset, score_column: str) -> dict[str, Any] | None:
    encoder = dataset.encoder_of(score_column)
    return {k: encoder[k] for k in ("model", "pretrained", "weights_sha256")} if encoder else None


def _levels(table: pa.Table, thresholds: Thresholds) -> pa.Array:
    """The level of each row of a table, null without a usable score."""
    scores = usable_scores(table, thresholds.score_column)
    missing = np.isnan(scores)
    return pa.array(thresholds.assign(np.where(missing, np.float32(0), scores)), COLUMNS["level"], mask=missing)
