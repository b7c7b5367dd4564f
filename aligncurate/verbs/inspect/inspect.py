"""The verb `inspect`: measures a dataset. `aligncurate.cli.render` draws the result."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from aligncurate.dataset.joined import Datasets, JoinedDataset, open_datasets
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import FINE
from aligncurate.errors import UserError
from aligncurate.verbs.inspect.measure import measure
from aligncurate.verbs.inspect.mismatched import from_embeddings, from_encoder
from aligncurate.verbs.inspect.result import Inspection, Mismatched
from aligncurate.verbs.scores import check_score_column

_EXAMPLE_PARTS = 16  # examples come from at most this many parts, spread over the dataset


def inspect(
    dataset: Datasets,
    *,
    examples: int = 0,
    mismatched: bool = False,
    pretrained: str | Path | None = None,
    score_column: str = "score",
) -> Inspection:
    """Count and measure a dataset.

    Reads the scores and levels once, and a few other rows.

    Args:
        dataset: the dataset, or its folder; several folders are read as one.
        examples: number of captions to show for each level.
        mismatched: score mismatched captions with the dataset's encoder where it has no embeddings.
        pretrained: weights file for `mismatched`, where the encoder cannot be loaded by its name.
        score_column: the scores to measure.

    Raises UserError when there is no such dataset or column, or `mismatched` cannot load the encoder.
    """
    opened = open_datasets(dataset)
    if examples < 0:
        raise UserError(f"--examples {examples}: must be at least 0.")
    if pretrained is not None and not mismatched:
        raise UserError(f"--pretrained {pretrained} is for --mismatched; add it.")
    check_score_column(opened, score_column)
    thresholds = opened.manifest.get("thresholds") or {}
    mine = thresholds.get("score_column") == score_column
    values = np.asarray(thresholds["values"] if mine else [], np.float32)
    others = from_embeddings(opened, score_column)
    if mismatched and not len(others):
        others = from_encoder(opened, score_column, pretrained)
    measured = measure(opened, score_column, values, others)
    examples_of = _examples(opened, score_column, examples) if examples and opened.levels else {}
    encoder = opened.encoder_of(score_column)
    return Inspection(
        path=opened.name,
        folders=[str(folder) for folder in opened.folders],
        rows=opened.rows,
        parts=len(opened.parts),
        made_by=_made_by(opened),
        encoder=f"{encoder['model']} ({encoder['pretrained']}), {encoder['precision']}" if encoder else None,
        score_column=score_column,
        scored=measured.scored,
        mean=measured.mean,
        statuses=opened.statuses,
        errors=_errors(opened),
        quantiles=measured.quantiles,
        histogram=measured.histogram,
        mismatched=Mismatched(len(others), float(others.mean(dtype=np.float64))) if len(others) else None,
        method=thresholds.get("method"),
        frozen=_frozen(opened),
        cuts=measured.cuts,
        levels=[replace(each, examples=examples_of.get(each.level, [])) for each in measured.levels],
    )


def _made_by(dataset: Dataset) -> str:
    """The verb that made the dataset; those of several that are read as one."""
    datasets = dataset.datasets if isinstance(dataset, JoinedDataset) else [dataset]
    return ", ".join(dict.fromkeys(each.manifest["verb"] for each in datasets))


def _frozen(dataset: Dataset) -> bool:
    """Whether the last `bucket` took its thresholds from a file."""
    steps = [dataset.manifest, *reversed(dataset.manifest.get("history", []))]
    return next((step["options"]["thresholds"] == "frozen" for step in steps if step["verb"] == "bucket"), False)


def _errors(dataset: Dataset) -> list[dict[str, Any]]:
    """The first row of each kind of failure, most frequent kind first; reads one part for each kind."""
    found = []
    for status, rows in sorted(dataset.statuses.items(), key=lambda item: (-item[1], item[0])):
        if status not in FINE:
            index = next(number for number, part in enumerate(dataset.parts) if part.statuses.get(status))
            for table in dataset.groups(index, ["status", "key", "source", "error"]):
                first = table.filter(pc.equal(table["status"], status)).slice(0, 1).to_pylist()
                if first:
                    found.append({"rows": rows, **first[0]})
                    break
    return found


def _examples(dataset: Dataset, column: str, count: int) -> dict[int | None, list[dict[str, Any]]]:
    """A few pairs of each level, the same ones every time, from parts spread over the dataset."""
    step = max(1, len(dataset.parts) // _EXAMPLE_PARTS)
    chosen: dict[int | None, list[dict[str, Any]]] = {}
    columns = ["key", "level", column, "caption", "conversations"]
    for index in range(0, len(dataset.parts), step):
        for row in dataset.read(index, columns).to_pylist():
            if row["level"] is not None:
                chosen.setdefault(row["level"], []).append(row)
        for level, rows in chosen.items():
            rows.sort(key=lambda row: hashlib.blake2b((row["key"] or "").encode(), digest_size=8).digest())
            chosen[level] = rows[:count]
    for rows in chosen.values():
        rows.sort(key=lambda row: -np.inf if row[column] is None else row[column], reverse=True)
    return {
        level: [{"key": row["key"], "score": row[column], "text": _text(row)} for row in rows]
        for level, rows in chosen.items()
    }


def _text(row: dict[str, Any]) -> str:
    if row["caption"] is not None:
        return str(row["caption"])
    return " ".join(f"{turn['role']}: {turn['text']}" for turn in row["conversations"] or [])
