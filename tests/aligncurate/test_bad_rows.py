"""Rows of JSON, tables and Parquet that cannot be used, and files of rows that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, ingested, jpeg, parquet_bytes, statuses


def test_rows_that_cannot_be_parsed(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    good = '{"image": "0.jpg", "caption": "c"}'
    turns = ['"text"', "[1]", '[{"from": "human"}]', '[{"role": 1, "content": "x"}]',
             '[{"role": "user", "content": [7]}]', '[{"role": "user", "content": {"a": 1}}]']  # fmt: skip
    broken = ["{", "[1, 2]", "7", "null", '"text"', '{"image": "0.jpg", "caption": "cut o', "[" * 100_000, "{'a': 1}",
              *(f'{{"image": "0.jpg", "conversations": {t}}}' for t in turns)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join([good, *broken, good]))
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out")
    assert statuses(frame) == ["ok", *["invalid_row"] * len(broken), "ok"]
    assert frame["error"].null_count() == 2 and frame["row"].to_list() == list(range(len(broken) + 2))
    assert frame["key"].n_unique() == len(frame)
    again = ingested(tmp_path / "out", tmp_path / "again")
    assert again.equals(frame)


WEIRD = ["dots.in.key", "slash/es/../in", "/absolute", "ünï图🐕", "k" * 300, " spaced ", "tab\tnew\nline", "..", "-rf",
         'quote"\'`$(x)', "CON", "a%2Fb"]  # fmt: skip


def test_weird_keys_are_kept_through_export_and_back(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    rows = [{"id": key, "image": "0.jpg", "caption": f"c{i}"} for i, key in enumerate(WEIRD)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    frame = ingested(tmp_path / "a.json", tmp_path / "out")
    assert frame["key"].to_list() == WEIRD and statuses(frame) == ["ok"] * len(WEIRD)
    for form in ("webdataset", "llava-json"):
        before = set(tmp_path.rglob("*"))
        aligncurate.export(tmp_path / "out", tmp_path / form, format=form, quiet=True)
        new = set(tmp_path.rglob("*")) - before - {tmp_path / form}
        assert new and all(tmp_path / form in path.resolve().parents for path in new)
        back = ingested(tmp_path / form, tmp_path / f"back-{form}")
        assert back.select("key", "caption", "status", "sha256").equals(
            frame.select("key", "caption", "status", "sha256")
        ), form


def test_a_parquet_file_damaged_inside_keeps_its_other_row_groups(tmp_path) -> None:
    table = pa.table({"image": [jpeg(i) for i in range(30)], "caption": ["c"] * 30})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", row_group_size=10)
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).dictionary_page_offset or 0
    start = start or pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[start : start + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(data)
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    assert statuses(frame) == ["ok"] * 10 + ["read_error"] * 10 + ["ok"] * 10
    assert "damaged" in frame["error"][12] and frame["row"][12] == 12


def test_a_table_option_for_a_missing_field_of_later_rows(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "a.jsonl").write_text('{"image": "0.jpg", "alt": "x"}\n{"image": "0.jpg"}\n{"alt": "y"}\n')
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out", caption_column="alt")
    assert statuses(frame) == ["ok", "missing_caption", "missing_image"]
    assert SourceOptions().rows_per_shard == 10_000


def test_metadata_with_only_urls_is_kept_but_nothing_failed(tmp_path) -> None:
    """DataComp's metadata before the download."""
    columns = {"uid": ["a" * 32, "b" * 32], "url": ["https://x/1.jpg", None], "text": ["one", "two"],
               "clip_l14_similarity_score": [0.25, 0.5]}  # fmt: skip
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(**columns))
    pl.DataFrame(columns).write_csv(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text(pl.DataFrame(columns).write_ndjson())
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        run = aligncurate.ingest(tmp_path / name, tmp_path / f"out-{name}", quiet=True)
        frame = run.dataset.scan().collect()
        assert statuses(frame) == ["url_only", "missing_image"], name
        assert "download" in frame["error"][0] and frame["image_path"].null_count() == 2
        assert frame.select("key", "uid", "url", "clip_l14_similarity_score").rows() == [
            (uid, uid, url, score) for uid, url, _, score in zip(*columns.values(), strict=True)
        ]
        assert [part.failed for part in run.dataset.parts] == [1]
        again = ingested(tmp_path / f"out-{name}", tmp_path / f"again-{name}")
        assert again.equals(frame)


# file name, content, what the sentence says
REFUSED = [
    ("a.parquet", parquet_bytes(size=[1], colour=["red"]), "no column with captions .*it has size, colour"),
    ("a.parquet", parquet_bytes(image=pa.array([], pa.binary()), caption=pa.array([], pa.string())), "no rows"),
    ("a.parquet", b"", "not a Parquet file"),
    ("a.parquet", b"PAR1 but nothing else PAR1", "not a Parquet file"),
    ("a.parquet", b'{"image": "0.jpg"}', "not a Parquet file"),
    ("a.json", b"", "not a JSON file"),
    ("a.json", b"this is no JSON", "not a JSON file"),
    ("a.json", b'[{"image": "0.jpg", "caption": "cut', "not a JSON file"),
    ("a.json", b'{"image": "0.jpg"}\n{"image": "1.jpg"}\n', "no column with captions"),
    ("a.json", b"[" * 100_000, "not a JSON file.*deep"),
    ("a.json", b"[]", "no rows"),
    ("a.json", b"7", "neither a list of rows nor COCO"),
    ("a.json", b'{"a": 1}', "neither a list of rows nor COCO"),
    ("a.json", b"[1, 2]", "not objects"),
    ("a.json", b'[{"size": 1}]', "no column with captions.*it has size"),
    ("a.json", b'{"images": [], "annotations": []}', "no rows"),
    (
        "a.json",
        b'{"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}',
        "captions_",
    ),
    ("a.json", b"\x89PNG\r\n\x1a\n\0\0", "not a JSON file"),
    ("a.jsonl", b"", "no rows"),
    ("a.jsonl", b"\n\n", "no rows"),
    ("a.jsonl", b"not json\nat all\n", "not a JSON file"),
    ("a.csv", b"", "no rows"),
    ("a.csv", b"\n \n", "no rows"),
    ("a.csv", b"image,caption\n", "no rows"),
    ("a.csv", b"size,colour\n1,red\n", "no column with captions.*it has size, colour"),
    ("a.csv", b"image,caption\na.jpg,b,c,d\n", "cannot be parsed as a table"),
    ("a.csv", bytes(range(256)) * 4, "a.csv"),
    ("a.tar.gz", b"\x1f\x8b", "compressed.*gunzip"),
    ("a.xyz", b"x", "--format"),
    ("image.jpg", b"x", "--format"),
]


@pytest.mark.parametrize(("name", "data", "sentence"), REFUSED, ids=lambda v: v if isinstance(v, str) else repr(v[:12]))
def test_an_input_that_cannot_be_used(tmp_path, name, data, sentence) -> None:
    (tmp_path / name).write_bytes(data)
    found = complaint(cli("ingest", tmp_path / name, "--out", tmp_path / "out"))
    assert found.startswith(str(tmp_path / name)) and pl.Series([found]).str.contains(sentence).all(), found
    assert not (tmp_path / "out").exists()


def test_names_of_fields_with_half_characters_stay_apart(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    fields = r'"\ud800": "x", "\ud801": "y", "k": {"\udfff": 1, "\udffe": 2}'
    (tmp_path / "a.json").write_text(f'[{{"image": "0.jpg", "caption": "c", {fields}}}]')
    frame = ingested(tmp_path / "a.json", tmp_path / "out")
    kept = json.loads(frame["extra"][0])
    assert kept == {r"\ud800": "x", r"\ud801": "y", "k": {r"\udfff": 1, r"\udffe": 2}} and statuses(frame) == ["ok"]
    assert ingested(tmp_path / "out", tmp_path / "again").equals(frame)


_MOST_MEMORY = """
import sys, pyarrow, aligncurate
aligncurate.ingest(sys.argv[1], sys.argv[2], quiet=True)
aligncurate.export(sys.argv[2], sys.argv[3], quiet=True)
print(pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("kind", [9, 0])  # a page of an unknown kind is skipped, one of data is read
def test_a_damaged_page_that_claims_gigabytes_takes_no_memory(tmp_path, kind) -> None:
    table = pa.table({"image": [jpeg(i) for i in range(9)], "caption": [f"c{i}" for i in range(9)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    begin = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).dictionary_page_offset
    claim = b"\x15\xfe\xff\xff\xff\x0f"  # 2 GiB - 1, in Thrift
    header = bytes([0x15, 2 * kind]) + claim + claim + b"\0"
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[begin : begin + len(header)] = header
    (tmp_path / "a.parquet").write_bytes(data)
    places = [tmp_path / name for name in ("a.parquet", "out", "tars")]
    most = subprocess.run([sys.executable, "-c", _MOST_MEMORY, *places], capture_output=True, text=True, check=True)
    assert int(most.stdout) < 1 << 28
    assert (
        statuses(aligncurate.open_dataset(places[1]).scan().collect()) == ["ok"] * 3 + ["read_error"] * 3 + ["ok"] * 3
    )
