"""Arrow columns of any type: the type that a part keeps them as, and their values as Python objects."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_DEEPEST = 32  # levels of lists and structs in one column; deeper ones are kept as JSON


def storable(kind: pa.DataType, depth: int = 0) -> pa.DataType | None:
    """The type as which a Parquet part keeps a column of type `kind`, so that every reader can open it.

    None if no column can hold it; its values then go to the `extra` column. Python has no times in nanoseconds, as
    pandas writes them by default, so these become microseconds.
    """
    if depth > _DEEPEST:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return storable(kind.storage_type, depth)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return storable(kind.value_type, depth)
    if _is_text(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", _zone(kind.tz))
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_duration(kind):
        return pa.duration("us")
    if pa.types.is_time(kind):
        return pa.time64("us")
    if pa.types.is_decimal(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= 38 and kind.scale >= 0 else None
    if pa.types.is_map(kind):
        key, item = storable(kind.key_type, depth + 1), storable(kind.item_type, depth + 1)
        return None if key is None or item is None else pa.map_(key, item)
    if pa.types.is_fixed_size_list(kind):
        inner = storable(kind.value_type, depth + 1)
        return None if inner is None else pa.list_(inner, kind.list_size)
    if _is_list(kind):
        inner = storable(kind.value_type, depth + 1)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(kind):
        members = {f.name: storable(f.type, depth + 1) for f in kind}
        if not members or len(members) < kind.num_fields or None in members.values():
            return None
        return pa.struct(list(members.items()))
    if pa.types.is_boolean(kind) or pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind):
        return None if pa.types.is_interval(kind) else kind
    return kind if pa.types.is_binary(kind) else None


def to_python(column: pa.Array) -> list[Any]:
    """The values as Python objects; bytes in strings that are not UTF-8 become lone surrogates.

    What Python cannot express is given as text.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    kind = storable(column.type)
    if kind is not None and kind != column.type and not pa.types.is_null(column.type):
        with suppress(pa.ArrowException):  # without the cast, values are converted one by one below
            column = column.cast(options=pc.CastOptions(kind, allow_time_truncate=True))
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(_as_bytes(column.type)).to_pylist()
        return [_decoded(value, column.type) for value in raw]
    except Exception:  # the kinds that Arrow raises for values without a Python twin are many
        return [_value(scalar) for scalar in column]


def _zone(name: str | None) -> str | None:
    """A time zone, or UTC where this machine does not know it: the instants are the same."""
    if name is None:
        return None
    try:
        pa.scalar(0, pa.timestamp("us", name)).as_py()
    except Exception:
        return "UTC"
    return name


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _value(scalar: pa.Scalar) -> Any:
    """One value, or what comes closest to it."""
    if not scalar.is_valid:
        return None
    try:
        return scalar.as_py()
    except Exception:
        if isinstance(scalar, pa.StructScalar):
            return [[name, _value(value)] for name, value in scalar.items()]
        if isinstance(scalar, pa.ListScalar):
            return [_value(value) for value in scalar.values]
    try:
        text = scalar.cast(pa.string()).as_py()
    except Exception:
        text = "<"
    # Arrow writes "<value out of range: 123>"
    return str(getattr(scalar, "value", "")) if text.startswith("<") else text


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """`kind` with all strings, including those in lists, maps and structs, as bytes."""
    if _is_text(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_as_bytes(kind.value_type), kind.list_size)
    if _is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _as_bytes(f.type)) for f in kind])
    return kind


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value of `_as_bytes(kind)` with its strings decoded; invalid bytes become lone surrogates."""
    if value is None or _as_bytes(kind) == kind:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Mapping):
        return {f.name: _decoded(value[f.name], f.type) for f in kind}
    if pa.types.is_map(kind):
        return [(_decoded(key, kind.key_type), _decoded(item, kind.item_type)) for key, item in value]
    return [_decoded(item, kind.value_type) for item in value]
