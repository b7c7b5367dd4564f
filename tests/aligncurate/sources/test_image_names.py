"""Images named by rows: every spelling that means the same file, folders that are guessed, tars, and hints."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

import aligncurate
from aligncurate.dataset.record import Pair
from aligncurate.io import storage
from aligncurate.sources.image_root import ImageRoot
from tests.support.inputs import cli, ingested, jpeg, pairs, statuses, tar_bytes, write_tar

NFC, NFD = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images" / "sub dir").mkdir(parents=True)
    for name in ("0.jpg", "sub dir/a b.jpg", "UPPER.JPG", "book.gif", "two.png", "two.webp", "100%.jpg"):
        (tmp_path / "images" / name).write_bytes(jpeg(3))
    return tmp_path


def rows_of(folder: Path, names: list[Any], **options: Any) -> list[dict[str, Any]]:
    """The rows of a file that names these images, `0.jpg` before them."""
    rows = [{"image": name, "caption": "c"} for name in ["0.jpg", *names]]
    number = len(list(folder.iterdir()))
    (folder / f"{number}.json").write_text(json.dumps(rows))
    return ingested(folder / f"{number}.json", folder / f"out-{number}", **options).to_dicts()[1:]


SAME = ["./0.jpg", "images/0.jpg", "images\\0.jpg", "sub dir\\a b.jpg", "sub%20dir/a%20b.jpg", "sub dir//a b.jpg",
        "sub dir/../0.jpg", "/0.jpg", " 0.jpg ", "0", "sub dir/a b", "file://images/0.jpg", "100%.jpg", ["0.jpg"],
        {"path": "0.jpg"}, {"url": "./0.jpg"}, {"file_name": "0.jpg", "height": 3}, ".\\sub dir\\a b.jpg", "UPPER",
        "/images/0.jpg"]  # fmt: skip


def test_spellings_of_the_same_file(folder) -> None:
    rows = rows_of(folder, SAME)
    assert [(name, row["status"]) for name, row in zip(SAME, rows, strict=True)] == [(name, "ok") for name in SAME]
    there = rows_of(folder, [str(folder / "images" / "0.jpg"), f"file://{folder}/images/sub%20dir/a%20b.jpg"])
    assert [row["status"] for row in there] == ["ok", "ok"]


HINTS = {
    "upper.jpg": "there is UPPER.JPG", "book.jpg": "there is book.gif", "Book.PNG": "there is book.gif",
    "two": "there are two.png and two.webp", "C:\\Users\\me\\images\\0.jpg": "there is .*/images/0.jpg",
    "train/0.jpg": "there is .*/images/0.jpg", "nothing.jpg": "there is no image .*/images/nothing.jpg$",
    "there/0.jpg": "there is .*/images/0.jpg",
}  # fmt: skip


def test_hints_at_files_that_are_there(folder) -> None:
    for name, row in zip(HINTS, rows_of(folder, list(HINTS)), strict=True):
        assert row["status"] == "missing_image", name
        assert re.search(HINTS[name], row["error"]), row["error"]


def test_hints_name_an_image_root(folder, monkeypatch) -> None:
    (folder / "work" / "pictures").mkdir(parents=True)
    (folder / "work" / "pictures" / "1.jpg").write_bytes(jpeg(1))
    monkeypatch.chdir(folder / "work")
    elsewhere = folder / "work" / "pictures" / "1.jpg"
    (from_here,) = rows_of(folder, ["pictures/1.jpg"])
    assert from_here["status"] == "missing_image" and f"--image-root {folder}/work" in from_here["error"]
    (outside,) = rows_of(folder / "images", [str(elsewhere)])
    assert (
        outside["status"] == "unsafe_path"
        and f"--image-root to a folder above it, such as {elsewhere.parent}" in (outside["error"])
    )
    (folder / "b.csv").write_text("image,caption\n1.jpg,c\n")
    (folder / "beside").mkdir()
    (folder / "beside" / "1.jpg").write_bytes(jpeg(1))
    (beside,) = ingested(folder / "b.csv", folder / "out-b").to_dicts()
    assert beside["status"] == "missing_image" and f"--image-root {folder}/beside" in beside["error"]
    os.symlink("/nowhere.jpg", folder / "images" / "link.jpg")
    (dangling,) = rows_of(folder, ["link.jpg"])
    assert "a link to /nowhere.jpg" in dangling["error"]


@pytest.mark.parametrize(("table", "disk"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_names_in_either_unicode_form(tmp_path, table, disk, place) -> None:
    if place == "tar":
        (tmp_path / "a.tar").write_bytes(tar_bytes([(f"./{disk}", jpeg(1))]))
    else:
        (tmp_path / disk).write_bytes(jpeg(1))
    (tmp_path / "a.csv").write_text(f"image,caption\n{table},c\n", encoding="utf-8")
    assert statuses(ingested(tmp_path / "a.csv", tmp_path / "out")) == ["ok"]


@pytest.mark.parametrize("lost", [0, 25, 990])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_the_folder_is_guessed_from_rows_throughout_the_file(tmp_path, lost, kind) -> None:
    (tmp_path / "images").mkdir()
    for i in range(lost, 1000):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(1))
    rows = [{"image": f"{i}.jpg", "caption": f"c{i}"} for i in range(1000)]
    file = tmp_path / f"a.{kind}"
    if kind in ("csv", "parquet"):
        getattr(pl.DataFrame(rows), f"write_{kind}")(file, **({"row_group_size": 50} if kind == "parquet" else {}))
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    frame = ingested(file, tmp_path / "out", rows_per_shard=100)
    assert statuses(frame) == ["missing_image"] * lost + ["ok"] * (1000 - lost)


def test_images_in_two_usual_folders_are_both_found(tmp_path) -> None:
    for number, name in enumerate(("train2014", "val2014", "val2014")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "3.jpg").write_bytes(jpeg(3))
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,c\n" for i in range(4)))
    assert statuses(ingested(tmp_path / "a.csv", tmp_path / "out")) == ["ok"] * 4


# --- tars -------------------------------------------------------------------------------------------------------------


def test_tars_are_read_only_as_far_as_needed(tmp_path, monkeypatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(2, first=2 * number))
    opened = []
    real = storage.open_file
    monkeypatch.setattr(storage, "open_file", lambda uri: opened.append(Path(uri).name) or real(uri))
    root = ImageRoot([str(tmp_path)])

    def found(name: str) -> Any:
        pair = Pair("k", "a.csv")
        root.attach(pair, name)
        return pair.load and pair.load()

    assert found("s1.jpg") == jpeg(1) and found(".\\s0.jpg") == jpeg(0) and opened == ["0.tar"]
    assert found("s2") == jpeg(2) and found("gone.jpg") is None
    assert found("s5.jpg") == jpeg(5) and found("gone too.jpg") is None and opened == ["0.tar", "1.tar", "2.tar"]


def test_a_damaged_tar_beside_a_table_costs_only_what_is_in_it(tmp_path) -> None:
    whole = write_tar(tmp_path / "b.tar", pairs(2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "c.tar").write_bytes(whole[:1000])
    (tmp_path / "a.csv").write_text("image,caption\ns0.jpg,a\ns1.jpg,b\ngone.jpg,c\n")
    result = cli("ingest", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = aligncurate.open_dataset(tmp_path / "out").scan().collect().to_dicts()
    assert [row["status"] for row in rows] == ["ok", "ok", "missing_image"]
    assert "a.tar" in rows[2]["error"] and "c.tar" in rows[2]["error"]


def test_a_folder_that_cannot_be_read_now_fails_the_shard(tmp_path, monkeypatch) -> None:
    write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "a.csv").write_text("image,caption\ns0.jpg,a\n")
    real = storage.open_file

    def failing(uri: str) -> Any:
        if uri.endswith("a.tar"):
            raise OSError(5, "Input/output error", uri)
        return real(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", failing)
        run = aligncurate.ingest(tmp_path / "a.csv", tmp_path / "out", quiet=True)
        assert run.dataset is None and "Input/output" in run.failures[0].error
    again = aligncurate.ingest(tmp_path / "a.csv", tmp_path / "out", quiet=True)
    assert statuses(again.dataset.scan().collect()) == ["ok"]


def test_spellings_at_a_uri(tmp_path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/spelled/images/a b.jpg", jpeg(1))
    names = ["images/a b.jpg", "images\\a b.jpg", "images/a%20b.jpg", "./images//a b.jpg", "images/gone%20.jpg"]
    rows = "".join(json.dumps({"image": name, "caption": "c"}) + "\n" for name in names)
    memory.pipe("/spelled/a.jsonl", rows.encode())
    frame = ingested("memory://spelled/a.jsonl", tmp_path / "out")
    assert statuses(frame) == ["ok"] * 4 + ["missing_image"]
    assert frame["image_path"].to_list()[:4] == ["memory://spelled/images/a b.jpg"] * 4


def test_a_folder_with_the_name_of_an_image(folder) -> None:
    (folder / "images" / "two words").mkdir()
    (folder / "images" / "two words.png").write_bytes(jpeg(1))
    assert [row["status"] for row in rows_of(folder, ["two words", "sub dir"])] == ["ok", "read_error"]


def test_a_hint_at_a_member_of_a_tar(tmp_path) -> None:
    write_tar(tmp_path / "images.tar", pairs(1))
    (tmp_path / "a.csv").write_text("image,caption\nimages/s0.jpg,a\nC:\\data\\s0.jpg,b\nimages/s1.jpg,c\n")
    frame = ingested(tmp_path / "a.csv", tmp_path / "out")
    hint = f"there is s0.jpg in {tmp_path}/images.tar"
    assert statuses(frame) == ["missing_image"] * 3
    assert [hint in error for error in frame["error"]] == [True, True, False]
