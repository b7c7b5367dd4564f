"""Parquet footers and the replacing of a column, against pyarrow's own writing and read back by two readers."""

import io
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligncurate.dataset import footer

TURNS = pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))


def rows(count: int, seed: int = 0) -> pa.Table:
    """Columns of every kind that parts have, some rows null."""
    rng = np.random.default_rng(seed)
    words = [f"word {i} é" * (i % 5) for i in range(count)]
    there = rng.random(count) < 0.8
    columns = {
        "key": pa.array(words),
        "source": pa.array(["/a.tar"] * count),
        "offset": pa.array(rng.integers(-(2**62), 2**62, count), mask=~there),
        "sha256": pa.array([rng.bytes(32) for _ in range(count)], pa.binary(32)),
        "turns": pa.array([[{"role": "user", "text": w}] * (i % 3) for i, w in enumerate(words)], TURNS),
        "score": pa.array(rng.normal(size=count).astype(np.float32), mask=~there),
        "level": pa.nulls(count, pa.int8()),
        "status": pa.array(np.where(there, "ok", "decode_error")),
        "flag": pa.array(there),
        "double": pa.array(rng.normal(size=count)),
        "when": pa.array(rng.integers(0, 10**9, count), pa.timestamp("us", "UTC")),
        "embedding": pa.array(rng.normal(size=(count, 3)).astype(np.float16).tolist(), pa.list_(pa.float16(), 3)),
        **{f"more{i}": pa.array([i] * count, pa.int32()) for i in range(9)},
    }
    return pa.table(columns, metadata={"a": "b"})


def stored(table: pa.Table, group: int, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=group, compression="zstd", **options)
    return out.getvalue()


def raw_footer(data: bytes) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    return data[-8 - length :]


def replaced(folder: Path, data: bytes, replacement: bytes, column: str = "level", metadata=None) -> bytes:
    source = folder / "source.parquet"
    source.write_bytes(data)
    out = io.BytesIO()
    footer.replace_column(source, column, replacement, metadata or {}, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write_statistics": False, "use_dictionary": False},
        {"write_page_index": True, "write_page_checksum": True},
        {"version": "1.0", "data_page_version": "2.0", "store_schema": False},
    ],
)
@pytest.mark.parametrize(("count", "group"), [(0, 1), (1, 1), (1000, 7), (1000, 1000)])
def test_a_footer_read_and_written_is_the_same_bytes(count, group, options) -> None:
    data = stored(rows(count), group, **options)
    assert footer.write_footer(footer.read_footer(io.BytesIO(data))) == raw_footer(data)


@given(
    st.recursive(
        st.sampled_from([(1, True), (2, False), (3, 255), (7, b"12345678")])
        | st.tuples(st.sampled_from([4, 5, 6]), st.integers(-(2**63), 2**63 - 1))
        | st.tuples(st.just(8), st.binary(max_size=300))
        | st.tuples(st.just(9), st.tuples(st.just(6), st.lists(st.integers(-9, 9), max_size=40)))
        | st.tuples(st.just(9), st.tuples(st.just(1), st.lists(st.sampled_from([1, 2]), max_size=20))),
        lambda inner: st.tuples(st.just(12), st.dictionaries(st.integers(1, 300), inner, max_size=5)),
        max_leaves=8,
    )
)
def test_any_struct_survives(field) -> None:
    fields = {3: field, 30: field}
    assert footer.read_footer(io.BytesIO(b"PAR1" + footer.write_footer(fields))) == fields


@pytest.mark.parametrize(("count", "group"), [(0, 1), (1, 1), (1000, 7), (1000, 999), (40_000, 10_000)])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_only_the_column_changes(tmp_path, count, group, options) -> None:
    table = rows(count)
    levels = pa.array(np.arange(count) % 9, pa.int8(), mask=np.arange(count) % 5 == 0)
    place = table.schema.get_field_index("level")
    expected = table.set_column(place, table.schema.field(place), levels)
    alone = stored(expected.select(["level"]), group, **options)
    new = replaced(tmp_path, stored(table, group, **options), alone)

    read = pq.read_table(io.BytesIO(new))
    read.validate(full=True)
    assert read.equals(expected)
    assert read.schema.metadata == table.schema.metadata
    assert pl.read_parquet(io.BytesIO(new)).equals(pl.from_arrow(expected))
    # All that the footer says, offsets included, is what Arrow says of the same rows written in its own way.
    own = stored(expected, group, **options)
    assert pq.read_metadata(io.BytesIO(new)).to_dict() == pq.read_metadata(io.BytesIO(own)).to_dict()
    assert new == own


def test_metadata_is_set_beside_what_is_there(tmp_path) -> None:
    table = rows(10)
    new = replaced(tmp_path, stored(table, 4), stored(table.select(["level"]), 4), metadata={b"a": b"c", b"d": b"e"})
    found = pq.read_metadata(io.BytesIO(new)).metadata
    assert (found[b"a"], found[b"d"]) == (b"c", b"e")
    assert b"ARROW:schema" in found
    assert pq.read_table(io.BytesIO(new)).equals(table)


def test_a_nested_field_of_the_same_name_is_not_the_column(tmp_path) -> None:
    inner = pa.array([{"other": "a", "level": 5.0}, {"other": "b", "level": 6.0}])
    table = pa.table({"before": inner, "level": pa.array([1, 2], pa.int64()), "inner": inner})
    changed = pa.table({"level": pa.array([3, 4], pa.int64())})
    new = pq.read_table(io.BytesIO(replaced(tmp_path, stored(table, 2), stored(changed, 2))))
    assert new.to_pydict() == {"before": inner.to_pylist(), "level": [3, 4], "inner": inner.to_pylist()}


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
    table = rows(20)
    data, alone = stored(table, 5), table.select(["level"])
    for bad, sentence in [
        (stored(alone, 4), "row groups"),
        (stored(alone.slice(0, 10), 5), "row groups"),
        (stored(pa.table({"level": pa.nulls(20, pa.int32())}), 5), "another type"),
        (stored(pa.table({"grade": pa.nulls(20, pa.int8())}), 5), "another type"),
        (b"PAR1", "not a Parquet file"),
        (b"", "not a Parquet file"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            replaced(tmp_path, data, bad)
    with pytest.raises(ValueError, match="no column nothing"):
        replaced(tmp_path, data, stored(alone, 5), column="nothing")
    with pytest.raises(ValueError, match="page indexes"):
        replaced(tmp_path, stored(table, 5, write_page_index=True), stored(alone, 5))
    whole = raw_footer(data)
    for cut in (b"PAR1" + whole[60:], data[:-1], b"PAR1" + b"\xff" * 40 + (40).to_bytes(4, "little") + b"PAR1"):
        with pytest.raises(ValueError, match="Parquet"):
            replaced(tmp_path, cut, stored(alone, 5))


def test_a_file_that_ends_early_is_an_error(tmp_path) -> None:
    table = rows(1000)
    data = stored(table, 1000)
    with pytest.raises(ValueError, match="ends before"):
        replaced(tmp_path, b"PAR1" + raw_footer(data), stored(table.select(["level"]), 1000))
