"""From loosely typed input values to our columns: scores, levels, and the types of extra columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from aligncurate.dataset.record import COLUMNS, EXTRA


def as_score(value: Any) -> float | None:
    """The score that came with an input row, if it is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def as_level(value: Any) -> int | None:
    """The level that came with an input row, if it is an integer from 1 to 127."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 127 else None


def infer_extras(rows: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Column types for untyped input fields, inferred from some of their rows.

    Strings, booleans, integers, floats and flat lists of these become columns. Other values, and values in later rows
    that do not have their column's type, go to the `extra` column.
    """
    types: dict[str, pa.DataType] = {}
    mixed: set[str] = set()
    for row in rows:
        for name, value in row.items():
            kind = _type_of(value)
            if kind is None:
                if value is not None and value != []:
                    mixed.add(name)
                continue
            before = types.setdefault(name, kind)
            if before != kind:
                if {before, kind} == {pa.int64(), pa.float64()}:
                    types[name] = pa.float64()
                else:
                    mixed.add(name)
    columns = {n: t for n, t in types.items() if n not in mixed and n not in COLUMNS and n != EXTRA}
    return columns | {EXTRA: pa.string()}


def _type_of(value: Any) -> pa.DataType | None:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, list) and value:
        inner = {_type_of(v) for v in value}
        if len(inner) == 1 and (only := inner.pop()) is not None and not pa.types.is_list(only):
            return pa.list_(only)
    return None
