"""Parquet files: how they are cut and read, columns of every Arrow type, damage of every kind."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import ingested, jpeg, read_all, statuses


def captions(count: int) -> pa.Table:
    return pa.table({"image": [jpeg(i % 4) for i in range(count)], "caption": [f"c{i}" for i in range(count)]})


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_end_with_row_groups_where_these_are_near(tmp_path) -> None:
    table = captions(100)
    for size, sizes in (
        (10, [40, 40, 20]),
        (16, [32, 32, 36]),  # 32 and 64 are near 40 and 72, the end is near 104
        (45, [45, 45, 10]),
        (1_000, [40, 40, 20]),
    ):
        path = tmp_path / f"{size}.parquet"
        pq.write_table(table, path, row_group_size=size)
        source = open_source(str(path), SourceOptions(rows_per_shard=40))
        assert [s.stop - s.start for s in source.shards] == sizes
        frame = ingested(path, tmp_path / f"out{size}", rows_per_shard=40)
        assert frame["caption"].to_list() == table["caption"].to_pylist()
        assert frame["row"].to_list() == list(range(100))


def test_a_row_group_is_read_once_for_all_its_shards(tmp_path, monkeypatch) -> None:
    """Parquet cannot skip rows: were each shard to begin with its row group, this would be 50 times the rows."""
    pq.write_table(pa.table({"image": ["x.jpg"] * 10_000, "caption": ["c"] * 10_000}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), SourceOptions(rows_per_shard=100))
    batches = []
    iterate = pq.ParquetFile.iter_batches

    def counted(self, *args, **options):
        for batch in iterate(self, *args, **options):
            batches.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert sum(1 for shard in source.shards for _ in source.read(shard)) == 10_000
    assert sum(batches) <= 2 * 10_000
    batches.clear()
    last = [pair.row for shard in reversed(source.shards) for pair in source.read(shard)]  # in any order
    assert sorted(last) == list(range(10_000))
    first = open_source(str(tmp_path / "a.parquet"), SourceOptions(rows_per_shard=100))
    batches.clear()
    assert [pair.row for pair in first.read(first.shards[0])] == list(range(100))
    assert sum(batches) <= 256  # not the row group to its end


_LARGE = """
import resource, sys
from aligncurate.sources.detect import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1])
total = sum(len(pair.load()) for shard in source.shards for pair in source.read(shard))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_large_row_group_is_read_in_small_memory(tmp_path) -> None:
    images = pa.array([{"bytes": jpeg(i) + bytes(4 << 20), "path": f"{i}.jpg"} for i in range(150)])
    table = pa.table({"image": images, "caption": ["c"] * 150})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_batch_size=8)
    command = [sys.executable, "-c", _LARGE, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, peak = map(int, done.stdout.split())
    assert total > 600 << 20 and peak < 300


def test_a_batch_that_arrow_cannot_hold_is_read_row_by_row(tmp_path, monkeypatch) -> None:
    """Arrow raises this for more than 2 GB of bytes in a struct."""
    pq.write_table(captions(20), tmp_path / "a.parquet")
    iterate = pq.ParquetFile.iter_batches

    def limited(self, batch_size, **options):
        for number, batch in enumerate(iterate(self, batch_size=min(batch_size, 5), **options)):
            if batch_size > 1 and number == 2:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    frame = read_all(tmp_path / "a.parquet")
    assert [(p.row, p.caption, p.status) for p in frame] == [(i, f"c{i}", "ok") for i in range(20)]


# --- types -----------------------------------------------------------------------------------------------------------

STRING = pa.string()
WHEN = dt.datetime(2023, 11, 14, 22, 13, 20, 123456)
# name, the column, its type in the dataset, its values there
KEPT = [
    ("i8", pa.array([1, None], pa.int8()), pa.int8(), [1, None]),
    ("u64", pa.array([2**64 - 1, 0], pa.uint64()), pa.uint64(), [2**64 - 1, 0]),
    ("half", pa.array([1.5, None], pa.float16()), pa.float32(), [1.5, None]),
    ("flag", pa.array([True, None]), pa.bool_(), [True, None]),
    ("none", pa.nulls(2), STRING, [None, None]),
    ("large", pa.array(["a", None], pa.large_string()), STRING, ["a", None]),
    ("view", pa.array(["a", None], pa.string_view()), STRING, ["a", None]),
    ("raw view", pa.array([b"\xff", None], pa.binary_view()), pa.binary(), [b"\xff", None]),
    ("fixed", pa.array([b"ab", None], pa.binary(2)), pa.binary(2), [b"ab", None]),
    ("kind", pa.array(["k", None]).dictionary_encode(), STRING, ["k", None]),
    ("tags", pa.array([["a"], None], pa.list_(pa.dictionary(pa.int8(), STRING))), pa.list_(STRING), [["a"], None]),
    ("list view", pa.array([[1], None], pa.list_view(pa.int64())), pa.list_(pa.int64()), [[1], None]),
    ("vector", pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)), pa.list_(pa.float32(), 2), [[1.0, 2.0], None]),
    ("box", pa.array([{"x": 1, "l": "z"}, None]), pa.struct([("x", pa.int64()), ("l", STRING)]),
     [{"x": 1, "l": "z"}, None]),
    ("map", pa.array([[("a", 1)], None], pa.map_(STRING, pa.int64())), pa.map_(STRING, pa.int64()), [[("a", 1)], None]),
    ("price", pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)), pa.decimal128(10, 2), [Decimal("1.50"), None]),
    ("day", pa.array([19_000, None], pa.date32()), pa.date32(), [dt.date(2022, 1, 8), None]),
    ("day64", pa.array([86_400_000, None], pa.date64()), pa.date32(), [dt.date(1970, 1, 2), None]),
    ("time", pa.array([1001, None], pa.time64("ns")), pa.time64("us"), [dt.time(0, 0, 0, 1), None]),
    ("when", pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns")), pa.timestamp("us"), [WHEN, None]),
    ("whens", pa.array([[1_700_000_000_123_456_789], None], pa.list_(pa.timestamp("ns"))),
     pa.list_(pa.timestamp("us")), [[WHEN], None]),
    ("took", pa.array([1_500, None], pa.duration("ms")), pa.duration("us"), [dt.timedelta(seconds=1.5), None]),
]  # fmt: skip


def test_columns_of_every_type_ride_along(tmp_path) -> None:
    columns = {name: column for name, column, _, _ in KEPT}
    pq.write_table(pa.table({"image": [jpeg()] * 2, "caption": ["a", "b"], **columns}), tmp_path / "a.parquet")
    run = aligncurate.ingest(tmp_path / "a.parquet", tmp_path / "out", quiet=True)
    table = run.dataset.read(0)
    for name, _, kind, values in KEPT:
        assert table.schema.field(name).type == kind, name
        assert table[name].to_pylist() == values, name
    again = ingested(tmp_path / "out", tmp_path / "again")  # polars reads them too
    assert again.equals(run.dataset.scan().collect()) and statuses(again) == ["ok", "ok"]


def test_values_that_no_column_can_hold_go_to_extra(tmp_path) -> None:
    far = pa.array([2**60, 0], pa.timestamp("us"))
    columns = {
        "far": far,
        "day": pa.array([2**30, 0], pa.date32()),
        "long": pa.array([2**62, 1], pa.duration("s")),
        "wide": pa.array([Decimal("1.5"), Decimal("2.5")], pa.decimal256(50, 1)),
        "mars": pa.array([0, 0], pa.timestamp("us", "Mars/Olympus")),
        "bad": pa.MapArray.from_arrays(pa.array([0, 1, 1]).cast(pa.int32()), pa.array([b"\xff"]).view(STRING), ["v"]),
    }
    pq.write_table(pa.table({"image": [jpeg()] * 2, "caption": ["a", "b"], **columns}), tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    first, second = (json.loads(text) for text in frame["extra"])
    assert first.pop("bad") == [[r"\udcff", "v"]]
    assert first == {"far": str(2**60), "day": str(2**30), "long": str(2**62), "wide": "1.5"}
    assert second == {"wide": "2.5"}
    assert frame["far"].to_list() == [None, dt.datetime(1970, 1, 1)]
    assert frame["day"].to_list() == [None, dt.date(1970, 1, 1)]
    assert frame["long"].to_list() == [None, dt.timedelta(seconds=1)]
    assert frame["mars"].to_list() == [dt.datetime(1970, 1, 1, tzinfo=dt.UTC)] * 2


IMAGES = {
    "binary_view": pa.array([jpeg(0), jpeg(1)], pa.binary_view()),
    "large_binary": pa.array([jpeg(0), jpeg(1)], pa.large_binary()),
    "struct": pa.array(
        [{"bytes": jpeg(i), "path": None} for i in range(2)],
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
    ),
    "list_view": pa.array([[jpeg(0)], [jpeg(1)]], pa.list_view(pa.large_binary())),
    "dictionary": pa.array([jpeg(0), jpeg(1)]).dictionary_encode(),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_and_captions_of_every_type(tmp_path, form) -> None:
    captions = pa.array(["a", "b"], pa.large_string() if form == "large_binary" else pa.string_view())
    pq.write_table(pa.table({"image": IMAGES[form], "caption": captions}), tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    assert statuses(frame) == ["ok", "ok"] and frame["caption"].to_list() == ["a", "b"]


def test_columns_of_the_same_name(tmp_path) -> None:
    table = pa.Table.from_arrays(
        [pa.array([jpeg()]), pa.array(["first"]), pa.array(["second"]), pa.array(["third"]), pa.array([1])],
        names=["image", "caption", "caption", "caption_2", "caption"],
    )
    pq.write_table(table, tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    assert frame["caption"].to_list() == ["first"] and statuses(frame) == ["ok"]
    assert frame.select("caption_3", "caption_2", "caption_4").rows() == [("second", "third", 1)]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_rows_before_a_damaged_page_are_kept(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(captions(60), path, compression="none", use_dictionary=False, data_page_size=1, write_batch_size=10)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3_000] = b"\xff" * 3_000
    path.write_bytes(data)
    found = read_all(path)
    kept = [p.status for p in found].index("read_error")
    assert len(found) == 60 and 10 <= kept <= 50
    assert [p.row for p in found] == list(range(60)) and "damaged" in found[59].error
    assert [p.load() for p in found[:10]] == [jpeg(i % 4) for i in range(10)]


def test_a_footer_that_claims_too_many_rows(tmp_path) -> None:
    metadata = []
    pq.write_table(captions(3), tmp_path / "a.parquet", metadata_collector=metadata)
    data = (tmp_path / "a.parquet").read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    # Thrift's compact form of num_rows = 3, of the file (field 3, i64) and of the row group, is 0x16 0x06.
    for rows, varint in ((40, b"\x50"), (2**40, b"\x80\x80\x80\x80\x80\x40")):
        forged = footer.replace(b"\x16\x06", b"\x16" + varint)
        assert forged != footer
        tail = forged + len(forged).to_bytes(4, "little") + b"PAR1"
        (tmp_path / "b.parquet").write_bytes(data[: -8 - length] + tail)
        try:
            claimed = pq.read_metadata(tmp_path / "b.parquet").num_rows
        except OSError:
            claimed = None  # another number was hit; then it is plainly damaged
        if rows == 40 and claimed == 40:
            found = read_all(tmp_path / "b.parquet")
            assert [p.status for p in found] == ["ok"] * 3 + ["read_error"] * 37
        else:
            with pytest.raises(UserError, match="damaged"):
                read_all(tmp_path / "b.parquet")


def test_encrypted_files_are_named(tmp_path) -> None:
    (tmp_path / "e.parquet").write_bytes(b"PARE" + bytes(100) + b"\x10\0\0\0PARE")
    with pytest.raises(UserError, match=r"e\.parquet: .* encrypted"):
        open_source(str(tmp_path / "e.parquet"))
