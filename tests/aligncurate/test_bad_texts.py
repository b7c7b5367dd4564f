"""Captions and other texts that are missing or not UTF-8, in every format."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.inputs import ingested, jpeg, statuses, write_tar


def test_captions_that_are_not_utf8(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    bad = b"caf\xe9 time"
    utf8 = "0.jpg,é".encode()  # so that the other lines are not taken for another encoding
    (tmp_path / "a.csv").write_bytes(b"image,caption\n0.jpg," + bad + b"\n0.jpg,fine\n" + utf8)
    (tmp_path / "a.tsv").write_bytes(b"0.jpg\t" + bad + b"\n0.jpg\tfine\n" + utf8.replace(b",", b"\t"))
    line = b'{"image": "0.jpg", "caption": "%s"}\n'
    (tmp_path / "a.jsonl").write_bytes(line % bad + line % b"fine" + line % rb"half \ud800")
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([line % bad, line % b"fine", line % b"fine"]) + b"]")
    strings = pa.array([bad, b"fine", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"image": ["0.jpg"] * 3, "caption": strings}), tmp_path / "a.parquet")
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), strings)
    pq.write_table(pa.table({"image": ["0.jpg"] * 3, "caption": lists}), tmp_path / "lists.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "lists.parquet"):
        frame = ingested(tmp_path / name, tmp_path / f"out-{name}")
        assert statuses(frame)[:2] == ["invalid_caption", "ok"], name
        assert len(frame) == 3 and "UTF-8" in frame["error"][0] and frame["caption"][0].startswith("caf")
        assert (statuses(frame)[2] == "invalid_caption") == (name == "a.jsonl"), name


def test_other_fields_that_are_not_utf8_cost_nothing(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    line = b'{"id": "k\xe9", "image": "0.jpg", "caption": "fine", "place": "caf\xe9", "more": {"a": "\xe9"}}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    strings = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"image": ["0.jpg"], "caption": ["fine"], "place": strings}), tmp_path / "a.parquet")
    member = {"jpg": jpeg(), "txt": b"fine", "json": b'{"place": "caf\\ud800"}'}
    write_tar(tmp_path / "a.tar", {"a": member})
    for name in ("a.jsonl", "a.parquet", "a.tar"):
        frame = ingested(tmp_path / name, tmp_path / f"out-{name}")
        assert statuses(frame) == ["ok"] and frame["place"][0].startswith("caf"), name


def test_member_names_that_are_not_utf8(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for ending, data in (("jpg", jpeg()), ("txt", b"fine")):
            info = tarfile.TarInfo(f"café.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["ok"] and frame["key"][0].startswith("caf")


def test_conversations_that_are_not_utf8(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    turns = b'[{"from": "human", "value": "<image> caf\xe9?"}, {"from": "gpt", "value": "yes"}]'
    (tmp_path / "a.jsonl").write_bytes(b'{"image": "0.jpg", "conversations": ' + turns + b"}\n")
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out")
    assert statuses(frame) == ["invalid_caption"] and len(frame["conversations"][0]) == 2


def test_missing_captions_in_rows(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    captions = [None, float("nan"), "", "  ", "nan", 5, [], ["first", "second"]]
    rows = [{"image": "0.jpg", "caption": c} for c in captions] + [{"image": "0.jpg"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    frame = ingested(tmp_path / "a.json", tmp_path / "json")
    assert statuses(frame) == ["missing_caption"] * 4 + ["ok", "ok", "missing_caption", "ok", "ok", "missing_caption"]
    assert frame["caption"].to_list()[4:9] == ["nan", "5", None, "first", "second"]
    (tmp_path / "a.csv").write_text('image,caption\n0.jpg,\n0.jpg,""\n0.jpg,x\n0.jpg\n')
    assert statuses(ingested(tmp_path / "a.csv", tmp_path / "csv")) == ["missing_caption"] * 2 + [
        "ok",
        "missing_caption",
    ]
    table = pa.table({"image": [jpeg()] * 3, "caption": pa.array([None, float("nan"), 1.5])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert statuses(ingested(tmp_path / "a.parquet", tmp_path / "pq")) == ["missing_caption"] * 2 + ["ok"]
