"""A part gives back the values and types that were written, whatever columns it has, and its checksum is the file's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligncurate.dataset.part import PartWriter
from aligncurate.dataset.receipt import Receipt, read_receipt
from aligncurate.dataset.record import schema

EXTRAS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "int64": (pa.int64(), [-(2**63), 2**63 - 1, None, 0]),
    "uint64": (pa.uint64(), [0, 2**64 - 1, 1, None]),
    "int8": (pa.int8(), [-128, 127, None, 0]),
    "bool": (pa.bool_(), [True, None, False, True]),
    "double": (pa.float64(), [float("inf"), None, -0.0, 1e300]),
    "text": (pa.string(), ["", None, "a" * 5000, "é"]),
    "bytes": (pa.binary(), [b"", None, b"\0" * 9, b"x"]),
    "integers": (pa.list_(pa.int64()), [[], None, [1, None, 3], [2**62]]),
    "nested": (pa.list_(pa.struct([("count", pa.int32()), ("name", pa.string())])), [[], None, [{"count": 7}], [None]]),
    "day": (pa.date32(), [0, None, -1, 20_000]),
    "time": (pa.timestamp("us", "UTC"), [0, None, -1, 2**50]),
}


def rows(count: int) -> pa.Table:
    """Rows with every kind of column; values of EXTRAS in turn."""
    kinds = {name: kind for name, (kind, _) in EXTRAS.items()}
    full = schema(kinds, embed_images=True, embedding=3)
    values: dict[str, list[Any]] = {
        "key": [f"key {n}" for n in range(count)],
        "image_offset": [n * 7919 for n in range(count)],
        "width": [None if n % 3 else n for n in range(count)],
        "image": [bytes([n % 256]) * n for n in range(count)],
        "score": [None if n % 5 == 0 else n / 100 for n in range(count)],
        "level": [None if n % 5 == 0 else 1 + n % 8 for n in range(count)],
        "status": ["ok" if n % 5 else "decode_error" for n in range(count)],
        "conversations": [None if n % 2 else [{"role": "user", "text": str(n)}] for n in range(count)],
        "image_embedding": [[0.5, n % 100, -1.0] for n in range(count)],
    }
    values |= {name: [given[n % len(given)] for n in range(count)] for name, (_, given) in EXTRAS.items()}
    return pa.table([pa.array(values.get(f.name, [None] * count), f.type) for f in full], full)


def folder(path: Path) -> Path:
    for name in ("data", ".receipts"):
        (path / name).mkdir()
    return path


@pytest.mark.parametrize("sizes", [[], [1], [1, 700, 3]], ids=str)
def test_values_types_and_checksum(tmp_path: Path, sizes: list[int]) -> None:
    table = rows(sum(sizes))
    path = folder(tmp_path) / "data/part-00000.parquet"
    with PartWriter(tmp_path, 0, table.schema, {"uri": "a.tar"}, "digest") as part:
        start = 0
        for size in sizes:
            part.write(table.slice(start, size))
            start += size
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["part-00000.json", path.name]
    assert pq.read_schema(path).equals(table.schema)
    assert pq.read_table(path).equals(table)
    assert pl.read_parquet(path, columns=["key", "int64", "uint64", "integers", "level"]).to_dicts() == (
        table.select(["key", "int64", "uint64", "integers", "level"]).to_pylist()
    )
    assert part.info is not None
    assert read_receipt(tmp_path, 0) == Receipt(part.info, {"uri": "a.tar"}, "digest")
    assert (part.info.bytes, part.info.rows) == (path.stat().st_size, len(table))
    assert part.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_part_larger_than_the_buffers(tmp_path: Path) -> None:
    path = folder(tmp_path) / "data/part-00000.parquet"
    table = rows(4000)
    with PartWriter(tmp_path, 0, table.schema) as part:
        part.write(table)
    assert path.stat().st_size > 3 << 20
    assert pq.read_table(path).equals(table)
    assert part.info is not None
    assert part.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
