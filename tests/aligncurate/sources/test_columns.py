"""Input columns with the names of our own: nothing of them is lost, and none breaks the dataset."""

from __future__ import annotations

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from tests.support.inputs import ingested, jpeg, statuses

OURS = {"status": "success", "error": "none", "source": "web", "row": 7, "width": 640, "WIDTH": 641, "sha256": "0" * 64,
        "image_path": "x/0.png", "level": "high", "score": "good", "__index_level_0__": 5, "extra": "their own",
        "key": "k"}  # fmt: skip


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_columns_named_like_ours_are_kept(tmp_path, name) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    row = {"image": "0.jpg", "caption": "c", **OURS}
    frame = pl.DataFrame([row, row])
    if name == "a.csv":
        frame.write_csv(tmp_path / name)
    elif name == "a.parquet":
        frame.write_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps([row, row]) if name == "a.json" else f"{json.dumps(row)}\n" * 2)
    found = ingested(tmp_path / name, tmp_path / "out")
    assert statuses(found) == ["ok", "ok"] and found["key"].to_list() == ["k", "k-1"]
    assert found["width"].to_list() == [48, 48] and found["row"].to_list() == [0, 1]
    for column, value in OURS.items():
        if column not in ("extra", "key"):
            kept = column if column.startswith("__") else f"input_{column}"
            assert found[kept].to_list() == [value, value], column
    assert "their own" in found["extra"][0]
    assert ingested(tmp_path / "out", tmp_path / "again").equals(found)
    aligncurate.export(tmp_path / "out", tmp_path / "tars", quiet=True)
    assert statuses(ingested(tmp_path / "tars", tmp_path / "back")) == ["ok", "ok"]


def test_levels_and_scores_that_are_none_are_kept_too(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    levels, scores = [3, 1000, -1], [0.5, 1e300, 0.25]
    rows = [{"image": "0.jpg", "caption": "c", "level": a, "score": b} for a, b in zip(levels, scores, strict=True)]
    pl.DataFrame(rows).write_csv(tmp_path / "a.csv")
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.csv", "a.json", "a.parquet"):
        found = ingested(tmp_path / name, tmp_path / f"out-{name}")
        assert found["level"].to_list() == [3, None, None] and found["score"].to_list() == [0.5, None, 0.25]
        kept = [json.loads(text) if text else {} for text in found["extra"]]
        if "input_level" in found.columns:  # of the first rows of JSON
            assert found["input_level"].to_list() == [None, 1000, -1]
        else:
            assert kept[1:] == [{"input_level": 1000, "input_score": 1e300}, {"input_level": -1}], name


def test_images_that_are_not_chosen_are_not_copied(tmp_path) -> None:
    table = pa.table({"photo": [jpeg(3)], "caption": ["mine"], "image": [jpeg(4)]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = ingested(tmp_path / "a.parquet", tmp_path / "out", image_column="photo")
    assert statuses(found) == ["ok"] and "input_image" not in found.columns


def test_rows_with_names_of_their_own(tmp_path) -> None:
    """A file with an id as the name of each row's field makes no dataset of a million columns."""
    (tmp_path / "0.jpg").write_bytes(jpeg())
    rows = [{"image": "0.jpg", "caption": "c", **{f"n{i}-{j}": j for j in range(30)}} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = ingested(tmp_path / "a.json", tmp_path / "out")
    assert found.width < 1_100
    assert json.loads(found["extra"][99]) == {f"n99-{j}": j for j in range(30)}


def test_the_usual_spelling_is_preferred_to_another_case(tmp_path) -> None:
    """One row with `Id` must not take the keys from all the others."""
    (tmp_path / "0.jpg").write_bytes(jpeg())
    names = [("Id", "Image", "CAPTION"), *[("id", "image", "caption")] * 3]
    rows = [dict(zip(keys, (f"k{n}", "0.jpg", f"c{n}"), strict=True)) for n, keys in enumerate(names)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out")
    assert frame.select("key", "caption", "status").rows()[1:] == [(f"k{n}", f"c{n}", "ok") for n in (1, 2, 3)]
