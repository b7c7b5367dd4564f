"""The scores of a dataset, read part by part."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import PAIRS
from aligncurate.errors import UserError
from aligncurate.levels import Floats

Value = TypeVar("Value")

_READERS = min(4, os.cpu_count() or 1)


def check_score_column(dataset: Dataset, name: str) -> None:
    """Raise UserError unless `name` is a column that can hold scores."""
    names = [f.name for f in dataset.schema if pa.types.is_floating(f.type)]
    if name not in names:
        raise UserError(f"{dataset.name}: there is no score column {name}; the dataset has {', '.join(names)}.")


def iter_scores(dataset: Dataset, column: str) -> Iterator[Floats]:
    """The usable scores of a column, one array per part, in order; a few parts are read ahead."""

    def read(index: int) -> Floats:
        table = dataset.read(index, ["status", column], encoded=["status"])
        status = table["status"].unify_dictionaries().combine_chunks()
        # Statuses are compared as dictionary codes, which is faster than as strings.
        codes = [status.dictionary.index(name).as_py() for name in PAIRS]
        ok = pc.is_in(status.indices, pa.array(codes, status.indices.type))
        values = table[column].filter(pc.and_(ok, pc.is_valid(table[column])))
        scores: Floats = values.cast(pa.float32()).to_numpy()
        finite = np.isfinite(scores)
        return scores if finite.all() else scores[finite]

    return ahead(read, len(dataset.parts))


def ahead(read: Callable[[int], Value], count: int) -> Iterator[Value]:
    """read(0), read(1), … read(count - 1), in order; a few are called ahead, in threads."""
    waiting: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as pool:
        for index in range(count):
            waiting.append(pool.submit(read, index))
            if len(waiting) > _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
