"""Exports that run again, and parts with types and sizes that Arrow or memory cannot take whole."""

from __future__ import annotations

from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.dataset.pointers import Pointer, read_images
from aligncurate.errors import UserError
from aligncurate.verbs.export import plan
from tests.support.inputs import cli, jpeg, pairs, write_tar


@pytest.fixture
def dataset(tmp_path):
    return aligncurate.ingest(write_tar(tmp_path / "a.tar", pairs(6)), tmp_path / "data", quiet=True).dataset


def test_an_export_that_is_done_says_so(dataset, tmp_path) -> None:
    command = ("export", dataset.path, "--out", tmp_path / "out")
    assert "exported 6 rows" in cli(*command).output
    assert "nothing to do: 6 rows" in cli(*command).output
    (tmp_path / "out/00000.tar").unlink()
    assert "exported 6 rows" in cli(*command).output and (tmp_path / "out/00000.tar").is_file()


def test_an_export_that_lacks_one_tar_says_what_it_wrote(dataset, tmp_path) -> None:
    command = ("export", dataset.path, "--out", tmp_path / "out", "--shard-size", 4)
    assert "exported 6 rows" in cli(*command).output
    before = (tmp_path / "out/00000.tar").stat().st_mtime_ns
    (tmp_path / "out/00001.tar").unlink()
    told = cli(*command).output
    assert f"exported 2 rows to {tmp_path / 'out'}: 00001.tar\n4 rows in 1 file kept from an earlier run" in told
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == before
    assert "nothing to do: 6 rows" in cli(*command).output


def test_a_llava_export_that_is_done_says_so(dataset, tmp_path) -> None:
    command = ("export", dataset.path, "--out", tmp_path / "out", "--format", "llava-json", "-q")
    assert cli(*command).exit_code == 0
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "out").rglob("*.jp*g")}
    assert len(before) == 6
    assert "nothing to do: 6 rows" in cli(*command[:-1]).output
    for file in list(before)[:1]:
        file.write_bytes(b"shorter")
        assert "exported 6 rows" in cli(*command[:-1]).output and file.read_bytes() == before[file][1]
        file.unlink()
        assert "exported 6 rows" in cli(*command[:-1]).output and file.read_bytes() == before[file][1]
    assert "nothing to do: 6 rows" in cli(*command[:-1]).output
    (tmp_path / "out/annotations.json").unlink()
    assert "exported 6 rows" in cli(*command[:-1]).output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard_size": 3}, "--shard-size was 10000, now 3"),
        ({"format": "llava-json"}, "--format was webdataset, now llava-json"),
    ],
)
def test_the_option_that_differs_is_named(options, sentence, dataset, tmp_path) -> None:
    aligncurate.export(dataset, tmp_path / "out", quiet=True)
    with pytest.raises(UserError, match=sentence):
        aligncurate.export(dataset, tmp_path / "out", quiet=True, **options)


def test_views_in_parts_are_exported(dataset, tmp_path) -> None:
    part = dataset.files[0]
    table = pq.read_table(part)
    keys = table["key"].cast(pa.string_view())
    metadata = table.schema.metadata
    table = table.set_column(table.schema.get_field_index("key"), "key", keys).append_column(
        "tags", pa.array([["a"]] * 6, pa.list_(pa.string_view()))
    )
    pq.write_table(table.replace_schema_metadata(metadata), part)
    for format in ("webdataset", "llava-json", "datacomp-uids"):
        done = aligncurate.export(dataset.path, tmp_path / format, format=format, quiet=True)
        assert done.rows == 6
    beside = pq.read_table(tmp_path / "webdataset/00000.parquet")
    assert beside["key"].to_pylist() == keys.to_pylist() and beside["tags"].to_pylist() == [["a"]] * 6


def test_embeddings_are_not_read_where_they_are_not_written(tmp_path, monkeypatch) -> None:
    scored = aligncurate.score(
        write_tar(tmp_path / "a.tar", pairs(6)), tmp_path / "data", model="tiny", embeddings="fp16", quiet=True
    ).dataset
    read = []
    batches = pq.ParquetFile.iter_batches
    spy = lambda self, *args, **options: read.extend(options["columns"]) or batches(self, *args, **options)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    aligncurate.export(scored, tmp_path / "out", format="llava-json", quiet=True)
    assert "image_path" in read and not any("embedding" in name for name in read)


def test_batches_are_bounded_in_bytes(dataset, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_BATCH_BYTES", 1)
    with pq.ParquetFile(dataset.files[0]) as file:
        mask = pa.chunked_array([[True, False, True, True, True, True]])
        found = list(plan.group_batches(file, 0, mask, ["key"]))
    assert [batch.num_rows for batch in found] == [1] * 5
    assert [batch["key"][0].as_py() for batch in found] == ["s0", "s2", "s3", "s4", "s5"]


@pytest.mark.parametrize("order", [range(20), range(19, -1, -1), [5, 5, 19, 0, 7]])
def test_images_of_one_row_group_are_read_in_any_order(order, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("aligncurate.io.parquet._BATCH_BYTES", 3_000)
    images = [jpeg(number) for number in range(20)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=10)
    rows = [
        Pointer(str(tmp_path / "a.parquet"), "image", -1, 0, row, sha256(images[row]).digest(), None) for row in order
    ]
    assert [pointer.read() for pointer in rows] == [images[row] for row in order]
    beyond = {"source": str(tmp_path / "a.parquet"), "image_path": "image", "image_offset": None, "row": 20}
    assert isinstance(next(read_images([beyond])), OSError)
