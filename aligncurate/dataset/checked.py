"""Reading fields of JSON that may be damaged or written by somebody else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST = 2**53
"""Larger numbers are not exact in every reader of JSON."""

_DEEPEST = 50


def take(record: Any, name: str, kind: type) -> Any:
    """`record[name]`. Raises ValueError unless `record` is an object and the field is of type `kind`."""
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of an object")
    if name not in record:
        raise ValueError(f"{name} is missing")
    value = record[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def take_objects(record: Any, name: str) -> list[dict[str, Any]]:
    """`record[name]`. Raises ValueError unless it is a list of objects."""
    values: list[dict[str, Any]] = take(record, name, list)
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not a list of objects")
    return values


def count(record: Any, name: str) -> int:
    """`record[name]`. Raises ValueError unless it is a whole number from 0 to 2**53."""
    value: int = take(record, name, int)
    if not 0 <= value <= MOST:
        raise ValueError(f"{name} is out of range")
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError when lists and objects are nested so deeply that writing them again would fail."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for item in level for inner in _inside(item) if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _inside(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item
