"""Several datasets opened as one, for the verbs that take more than one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from operator import add
from typing import Any

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import SCORE_COUNTS
from aligncurate.errors import UserError
from aligncurate.io.paths import AnyPath, identity

Datasets = Dataset | str | AnyPath | Sequence[str | AnyPath]
"""What a verb takes: a dataset, its folder, or the folders of several that are read as one."""


def open_datasets(paths: Datasets, *, new_levels: bool = False) -> Dataset:
    """Open one or more datasets as one, whose parts are those of the first, then of the second, and so on.

    Args:
        paths: the folders; a dataset that is open already is returned as it is.
        new_levels: the caller replaces the levels, so the datasets may have different thresholds.

    Raises:
        UserError: one of them is not a finished dataset, is given twice, was scored by another encoder or cut by other
            thresholds than the first, or has a column of the same name and another type.
    """
    if isinstance(paths, Dataset):
        return paths
    folders = [paths] if isinstance(paths, str | AnyPath) else list(paths)
    if not folders:
        raise UserError("no dataset given; name at least one dataset folder.")
    datasets = [Dataset(folder) for folder in folders]
    return datasets[0] if len(datasets) == 1 else JoinedDataset(datasets, new_levels=new_levels)


class JoinedDataset(Dataset):
    """Several datasets with the interface of one. `path` is the first one's; `name` has all."""

    def __init__(self, datasets: Sequence[Dataset], *, new_levels: bool = False) -> None:
        self.datasets = list(datasets)
        self.path = datasets[0].path
        _check_alike(self.datasets, new_levels=new_levels)
        self.parts = [part for dataset in self.datasets for part in dataset.parts]
        first = self.datasets[0].manifest
        kept: dict[str, Any] = {name: first[name] for name in ("schema_version", "encoders") if name in first}
        kept |= {"encoder": first.get("encoder"), "thresholds": None if new_levels else first.get("thresholds")}
        self.manifest = {
            **kept,
            "verb": "merge",
            "options": {},
            "inputs": [dataset.fingerprint() for dataset in self.datasets],
            "computed_with": _distinct(e for d in self.datasets for e in d.manifest.get("computed_with", [])),
            "history": _distinct(step for d in self.datasets for step in d.provenance()["history"]),
            "complete": True,
            SCORE_COUNTS: self._summed_counts(),
        }

    def _summed_counts(self) -> dict[str, Any]:
        """Sums of score counts, for the columns that all datasets counted."""
        total = {}
        for column in self.datasets[0].manifest.get(SCORE_COUNTS, {}):
            counts = [found for d in self.datasets if (found := d.score_counts(column)) is not None]
            if len(counts) == len(self.datasets):
                total[column] = reduce(add, counts).to_json()
        return total

    @property
    def folders(self) -> list[AnyPath]:
        return [dataset.path for dataset in self.datasets]

    @cached_property
    def files(self) -> list[AnyPath]:
        return [file for dataset in self.datasets for file in dataset.files]

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of all datasets; parts without a column have nulls in it."""
        found: dict[str, pa.Field] = {}
        home: dict[str, Dataset] = {}
        for dataset in self.datasets:
            for field in dataset.schema:
                known = found.setdefault(field.name, field)
                first = home.setdefault(field.name, dataset)
                if known.type != field.type:
                    raise UserError(
                        f"{dataset.path}: column {field.name} is {field.type}, but {known.type} in {first.path}; "
                        "these datasets cannot be used as one."
                    )
        return pa.schema(list(found.values()))

    @property
    def levels(self) -> int:
        return max(dataset.levels for dataset in self.datasets)

    def read(self, index: int, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()) -> pa.Table:
        dataset, own = self.home(index)
        names = self.schema.names if columns is None else columns
        return self._completed(dataset.read(own, [n for n in names if n in dataset.schema.names], encoded), names)

    def groups(
        self,
        index: int,
        columns: Sequence[str] | None = None,
        *,
        only: Sequence[int] | None = None,
        use_threads: bool = False,
    ) -> Iterator[pa.Table]:
        dataset, own = self.home(index)
        names = self.schema.names if columns is None else columns
        stored = [name for name in names if name in dataset.schema.names]
        for table in dataset.groups(own, stored, only=only, use_threads=use_threads):
            yield self._completed(table, names)

    def home(self, index: int) -> tuple[Dataset, int]:
        """The dataset that has part `index`, and the part's number there."""
        for dataset in self.datasets:
            if index < len(dataset.parts):
                return dataset, index
            index -= len(dataset.parts)
        raise IndexError(index)

    def _completed(self, table: pa.Table, names: Sequence[str]) -> pa.Table:
        """The table with the columns `names`, nulls where it lacks one."""
        if table.column_names == list(names):
            return table
        columns = [
            table[name] if name in table.column_names else pa.nulls(table.num_rows, self.schema.field(name).type)
            for name in names
        ]
        return pa.table(columns, names=list(names))

    def fingerprint(self) -> dict[str, str]:
        prints = [dataset.fingerprint() for dataset in self.datasets]
        digest = hashlib.sha256("".join(p["manifest_sha256"] for p in prints).encode()).hexdigest()
        return {"kind": "datasets", "uri": os.pathsep.join(p["uri"] for p in prints), "manifest_sha256": digest}

    def fingerprints(self) -> list[dict[str, str]]:
        return [dataset.fingerprint() for dataset in self.datasets]

    def provenance(self) -> dict[str, Any]:
        names = ("encoder", "encoders", "computed_with", "thresholds", "history")
        return {name: self.manifest[name] for name in names if name in self.manifest}


def _check_alike(datasets: Sequence[Dataset], *, new_levels: bool) -> None:
    """Raises UserError for datasets whose scores or levels must not be mixed, or the same one twice."""
    first, seen = datasets[0], {identity(datasets[0].path)}
    for dataset in datasets[1:]:
        if identity(dataset.path) in seen:
            raise UserError(f"{dataset.path}: this dataset is given twice.")
        seen.add(identity(dataset.path))
        if _encoders(dataset) != _encoders(first):
            raise UserError(
                f"{dataset.path}: scored by {_names(dataset)}, but {first.path} by {_names(first)}; their scores "
                "cannot be compared. Score both with the same encoder first."
            )
        if not new_levels and _cuts(dataset) != _cuts(first):
            if _cuts(dataset) is None or _cuts(first) is None:
                without, other = (dataset, first) if _cuts(dataset) is None else (first, dataset)
                raise UserError(
                    f"{without.path}: it has no levels, but {other.path} has; run `aligncurate bucket` on all of them "
                    "together first."
                )
            raise UserError(
                f"{dataset.path}: its levels were cut by other thresholds than those of {first.path}; run "
                "`aligncurate bucket` on all of them together first."
            )


def _encoders(dataset: Dataset) -> dict[str, Any]:
    """The encoders by score column; without the device, which earlier versions recorded here."""
    encoders = dataset.manifest.get("encoders") or {"score": dataset.manifest.get("encoder")}
    return {column: {k: v for k, v in e.items() if k != "device"} for column, e in encoders.items() if e}


def _names(dataset: Dataset) -> str:
    names = [f"{e['model']} ({e.get('pretrained')}, {e.get('precision')})" for e in _encoders(dataset).values()]
    return " and ".join(names) or "no encoder"


def _cuts(dataset: Dataset) -> tuple[Any, ...] | None:
    thresholds = dataset.manifest.get("thresholds")
    return (thresholds["score_column"], *thresholds["values"]) if thresholds else None


def _distinct(items: Any) -> list[Any]:
    """The items in order, each once."""
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
