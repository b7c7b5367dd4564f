"""From loosely typed input values to our columns: scores, levels, and the types of extra columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from aligncurate.dataset.record import COLUMNS, EXTRA

_OURS = frozenset(COLUMNS)
_MOST_COLUMNS = 1_000  # fields beyond these, for example ids as names, go to the `extra` column
_LARGEST_SCORE = 3e38  # of float32


def as_score(value: Any) -> float | None:
    """The score that came with an input row, if it is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= _LARGEST_SCORE else None  # false for NaN


def as_level(value: Any) -> int | None:
    """The level that came with an input row, if it is an integer from 1 to 127."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 127 else None


def unique_names(names: Iterable[str]) -> list[str]:
    """Names of a file's columns, so that none is there twice: a second `a` is called `a_2`."""
    given = list(names)
    known, used, unique = set(given), set[str](), []
    for name in given:
        new, number = name, 1
        while new in used or (new != name and new in known):
            number += 1
            new = f"{name}_{number}"
        used.add(new)
        unique.append(new)
    return unique


def extra_name(name: str) -> str:
    """The column that keeps an input field: one with the name of a column of ours is called `input_<name>`.

    Upper and lower case count as the same, as they do in DuckDB and Spark.
    """
    return f"input_{name}" if name.lower() in _OURS else name


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
    columns = {n: t for n, t in types.items() if n not in mixed and n not in COLUMNS and n != EXTRA and is_name(n)}
    return dict(islice(columns.items(), _MOST_COLUMNS)) | {EXTRA: pa.string()}


def is_name(text: str) -> bool:
    """Whether a column can be called so."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, from a JSON escape
        return False
    return text != "" and "\0" not in text


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
