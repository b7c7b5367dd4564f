"""The Parquet files that img2dataset writes beside its tars or folders: what they say of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.io import storage
from aligncurate.io.parquet import PARQUET_ERRORS, is_damage
from aligncurate.sources.coerce import infer_extras
from aligncurate.sources.samples import OWN

_TABLES = 256  # in which the images that were not downloaded are counted


def beside(uri: str) -> str:
    """Where the table beside a tar or folder would be."""
    return uri.removesuffix(".tar") + ".parquet"


def rows_beside(uri: str) -> dict[str, dict[str, Any]]:
    """What the table beside a tar or folder says of its samples, by their keys. Raises OSError."""
    table = _table_beside(uri)
    if table is None:
        return {}
    keep = [n for n in table.column_names if n == "key" or n not in OWN or n in ("score", "level")]
    rows = table.select(keep).to_pylist()
    return {str(row["key"]): {k: v for k, v in row.items() if v is not None} for row in rows}


def extras_beside(uri: str) -> dict[str, pa.DataType]:
    """Types of the extra columns that the table beside a tar or folder has. Raises OSError."""
    table = _table_beside(uri)
    if table is None:
        return {}
    fields = {f.name: f.type for f in table.schema if f.name not in OWN}
    return infer_extras([{n: _example(t) for n, t in fields.items()}])


def _table_beside(uri: str, columns: list[str] | None = None) -> pa.Table | None:
    """The table beside a tar or folder; None if there is none, it is damaged, or it has no keys.

    Raises OSError if it is there and cannot be read.
    """
    table_file = beside(uri)
    if not storage.exists(table_file):
        return None
    try:
        with storage.open_file(table_file) as file:
            table = pq.read_table(file, columns=columns, partitioning=None)
    except PARQUET_ERRORS as error:
        if not is_damage(error):
            raise
        return None
    return table if "key" in table.column_names else None


def not_downloaded(uris: Sequence[str]) -> list[str]:
    """A notice of the images that img2dataset could not download, which are only in the tables beside the others."""
    causes: Counter[str] = Counter()
    rows = 0
    for uri in uris[:_TABLES]:
        table = None if storage.is_remote(uri) else _table_beside(uri, ["key", "status"])
        if table is not None and "status" in table.column_names:
            rows += len(table)
            causes.update(str(status) for status in table["status"].to_pylist() if str(status).startswith("failed"))
    if not causes:
        return []
    more = f" in the first {_TABLES:,} shards" if len(uris) > _TABLES else ""
    listed = ", ".join(f"{cause} {count:,}" for cause, count in causes.most_common(3))
    were, get = ("was", "gets no row") if causes.total() == 1 else ("were", "get no rows")
    return [
        f"{storage.parent(uris[0])}: {causes.total():,} of {rows:,} images{more} {were} not downloaded ({listed}) and "
        f"{get}; the Parquet files beside the images list them all."
    ]


def _example(kind: pa.DataType) -> Any:
    """A value of the Python type that JSON has for an Arrow type."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ""
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    if pa.types.is_floating(kind):
        return 0.0
    return [_example(kind.value_type)] if pa.types.is_list(kind) else None
