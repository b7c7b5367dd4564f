"""Folders: what is read of them, what is skipped, and what the user is told."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aligncurate
from aligncurate.errors import UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, ingested, jpeg, pairs, read_all, statuses, tar_bytes, write_tar

ROWS = [{"image": "0.jpg", "caption": "a"}, {"image": "0.jpg", "caption": "b"}]


def images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names or ("0", "1", "2")):
        (folder / f"{name}.jpg").write_bytes(jpeg(seed))
    return folder


def texts(folder: Path, ending: str = "txt", *names: str) -> Path:
    for name in names or ("0", "1", "2"):
        (folder / f"{name}.{ending}").write_text(f"caption {name}")
    return folder


def parquet(path: Path, first: int = 0, count: int = 2, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    table = {"image": [jpeg(i) for i in numbers], "text": [f"shape {i}" for i in numbers]}
    pq.write_table(pa.table(columns or table), path)
    return path


def told(source, **options) -> str:
    return "\n".join(open_source(str(source), SourceOptions(**options)).notices)


# --- files that are not what their name says -------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html><html><title>404</title></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("0.jpg", jpeg())
    return buffer.getvalue()


STRAYS = {
    "page": (PAGE, "an HTML page"),
    "gzip": (gzip.compress(tar_bytes([("a.jpg", jpeg())])), "a gzip-compressed tar"),
    "zip": (zipped(), "a zip archive"),
    "pointer": (POINTER, "a Git LFS pointer"),
    "image": (jpeg(), "an image (JPEG)"),
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("ending", ["tar", "parquet", "json", "jsonl", "csv"])
def test_a_file_of_another_kind_is_named_and_makes_no_row(tmp_path, stray, ending) -> None:
    data, what = STRAYS[stray]
    (tmp_path / f"0.{ending}").write_bytes(data)
    for source in (tmp_path / f"0.{ending}", tmp_path, f"{tmp_path}/*.{ending}"):
        found = complaint(cli("ingest", source, "--out", tmp_path / "out"))
        assert f"0.{ending}: this is {what}" in found and not (tmp_path / "out").exists()
    write_tar(tmp_path / "1.tar", pairs(2))
    if ending == "tar":  # among tars it is a shard that fails, as pairs are missing
        run = aligncurate.ingest(tmp_path, tmp_path / "in", quiet=True)
        assert run.rows == 2 and [f"0.tar: this is {what}" in failure.error for failure in run.failures] == [True]
        write_tar(tmp_path / "0.tar", pairs(1, first=7))
        mended = aligncurate.ingest(tmp_path, tmp_path / "in", retry_errors=True, quiet=True).dataset
        assert mended.scan().collect()["key"].to_list() == ["s7", "s0", "s1"]
        (tmp_path / "0.tar").write_bytes(data)
    else:
        assert f"skipped {tmp_path}/0.{ending}: this is {what}" in told(tmp_path)
        assert [pair.key for pair in read_all(tmp_path)] == ["s0", "s1"]
    with pytest.raises(UserError, match="this is"):  # given by name, it is not skipped
        open_source([str(tmp_path / "1.tar"), str(tmp_path / f"0.{ending}")])


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.json", "a.csv", "a", "a.bin"])
@pytest.mark.parametrize("kind", ["webdataset", "parquet", "annotations"])
def test_a_file_is_read_as_what_it_is(tmp_path, name, kind) -> None:
    images(tmp_path)
    if kind == "webdataset":
        write_tar(tmp_path / name, pairs(2))
    elif kind == "parquet":
        parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(ROWS))
    source = open_source(str(tmp_path / name))
    assert source.kind == kind and len(read_all(tmp_path / name)) == 2
    own = {"a.tar": "webdataset", "a.parquet": "parquet", "a.json": "annotations"}
    assert bool(source.notices) == (own.get(name) != kind)


def test_a_file_of_another_kind_that_is_not_read_is_only_ignored(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(1))
    parquet(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(b"")
    notices = told(tmp_path)
    assert "ignoring b.csv" in notices and "read by content" not in notices
    os.remove(tmp_path / "a.tar")
    assert "b.csv is a Parquet file" in told(tmp_path) and len(read_all(tmp_path)) == 2


def test_a_pipe_named_tar_does_not_hang(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "pipe" in complaint(cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "out"))


# --- folders of images with texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "caption", "TXT", "json"])
@pytest.mark.parametrize("below", ["", "00000", "10_box/more"])
def test_images_with_texts_beside_them(tmp_path, ending, below) -> None:
    folder = images(tmp_path / "in" / below)
    texts(folder, ending)
    if ending == "json":
        for name in "012":
            (folder / f"{name}.json").write_text(json.dumps({"caption": f"caption {name}", "url": f"u{name}"}))
    (tmp_path / "in/README.md").write_text("x")
    frame = ingested(tmp_path / "in", tmp_path / "out")
    prefix = f"{below}/" if below else ""
    assert frame.select("key", "caption", "status").rows() == [(f"{prefix}{n}", f"caption {n}", "ok") for n in range(3)]
    assert frame["image_path"].to_list() == [str(folder / f"{n}.jpg") for n in range(3)]
    if ending == "json":
        assert frame["url"].to_list() == ["u0", "u1", "u2"]


def test_rows_of_an_image_folder_that_cannot_be_used(tmp_path) -> None:
    folder = images(tmp_path / "in", "a", "b.1")
    texts(folder, "txt", "a", "b.1", "lost", "README", "classes")
    images(folder, "alone", "two")
    (folder / "two.png").write_bytes(jpeg())
    (folder / "two.txt").write_text("x")
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    frame = ingested(folder, tmp_path / "out")
    assert dict(_ for _ in frame.select("key", "status").iter_rows()) == {
        "a": "ok", "alone": "missing_caption", "b.1": "ok", "bad": "invalid_caption", "lost": "missing_image",
        "two": "multi_image",
    }  # fmt: skip
    errors = dict(frame.select("key", "error").iter_rows())
    assert "alone.jpg" in errors["alone"] and "lost.txt" in errors["lost"] and "two.jpg, two.png" in errors["two"]


def test_endings_and_shards_of_an_image_folder(tmp_path) -> None:
    folder = images(tmp_path / "in")
    for name in "012":
        (folder / f"{name}.jpg").rename(folder / f"{name}.img")
    texts(folder, "prompt")
    options = {"image_column": "img", "caption_column": "prompt", "rows_per_shard": 2}
    run = aligncurate.ingest(folder, tmp_path / "out", source=SourceOptions(**options), quiet=True)
    assert [part.rows for part in run.dataset.parts] == [2, 1]
    assert run.dataset.scan().collect()["caption"].to_list() == [f"caption {n}" for n in range(3)]
    assert aligncurate.ingest(folder, tmp_path / "one", limit=1, source=SourceOptions(**options), quiet=True).rows == 1


def test_several_captions_of_one_image(tmp_path) -> None:
    folder = images(tmp_path / "in", "a", "b")
    (folder / "a.json").write_text(json.dumps({"caption": ["one", "two"]}))
    texts(folder, "txt", "b")
    members = [(f"{n}{e}", (folder / f"{n}{e}").read_bytes()) for n, e in (("a", ".jpg"), ("a", ".json"), ("b", ".jpg"),
                                                                           ("b", ".txt"))]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    for source in (folder, tmp_path / "a.tar"):
        rows = [(pair.key, pair.caption) for pair in read_all(source)]
        assert rows == [("a-0", "one"), ("a-1", "two"), ("b", "caption b")]
        assert [pair.caption for pair in read_all(source, captions="first")] == ["one", "caption b"]
        result = cli("ingest", source, "--out", tmp_path / f"out-{source.name}")
        assert "1 row had several captions" in " ".join(result.stderr.split())


def test_img2dataset_files(tmp_path) -> None:
    """Its output_format `files`: a folder for each shard, and a table beside it."""
    keys = [f"00000{i:04d}" for i in range(3)]
    folder = images(tmp_path / "in/00000", *keys[:2])
    texts(folder, "txt", *keys[:2])
    for key in keys[:2]:
        (folder / f"{key}.json").write_text(json.dumps({"caption": f"caption {key}", "key": key, "status": "success"}))
    status = ["success", "success", "failed_to_download"]
    table = {"key": keys, "url": [f"http://x/{k}" for k in keys], "caption": ["c"] * 3, "status": status}
    pq.write_table(pa.table(table), tmp_path / "in/00000.parquet")
    (tmp_path / "in/00000_stats.json").write_text('{"count": 3}')
    frame = ingested(tmp_path / "in", tmp_path / "out")
    assert frame.select("key", "caption", "status", "url").rows() == [
        (k, f"caption {k}", "ok", f"http://x/{k}") for k in keys[:2]
    ]
    assert "1 of 3 images was not downloaded" in told(tmp_path / "in") and "skipped" not in told(tmp_path / "in")


def test_images_without_texts_are_refused_with_the_cause(tmp_path) -> None:
    images(tmp_path / "in/cat")
    images(tmp_path / "in/dog")
    found = complaint(cli("ingest", tmp_path / "in", "--out", tmp_path / "out"))
    assert "contains only images" in found and "0.txt" in found


def test_an_image_folder_at_a_uri() -> None:
    filesystem = fsspec.filesystem("memory")
    for number in range(2):
        filesystem.pipe(f"/pics/a/{number}.jpg", jpeg(number))
        filesystem.pipe(f"/pics/a/{number}.txt", f"caption {number}".encode())
    try:
        found = read_all("memory://pics")
        assert [(pair.key, pair.caption) for pair in found] == [("a/0", "caption 0"), ("a/1", "caption 1")]
        assert found[1].load() == jpeg(1)
    finally:
        filesystem.store.clear()


# --- Hugging Face and other layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("below", ["", "train", "data/train"])
def test_hugging_faces_imagefolder(tmp_path, metadata, below) -> None:
    folder = images(tmp_path / "in" / below)
    names, captions = [f"{n}.jpg" for n in range(3)], [f"shape {n}" for n in range(3)]
    if metadata == "csv":
        lines = [f'{n},"{c}"' for n, c in zip(names, captions, strict=True)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    elif metadata == "jsonl":
        rows = [json.dumps({"file_name": n, "text": c}) for n, c in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    else:
        pq.write_table(pa.table({"file_name": names, "text": captions}), folder / "metadata.parquet")
    (tmp_path / "in/README.md").write_text("# own")
    frame = ingested(tmp_path / "in", tmp_path / "out")
    assert frame.select("caption", "status").rows() == [(caption, "ok") for caption in captions]


def test_a_snapshot_of_hugging_face(tmp_path) -> None:
    for number in range(2):
        parquet(tmp_path / f"in/data/train-0000{number}-of-00002-0a1b.parquet", 2 * number)
    for name in ("README.md", ".gitattributes", "_SUCCESS"):
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in/dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}))
    assert [pair.caption for pair in read_all(tmp_path / "in")] == [f"shape {n}" for n in range(4)]
    notices = told(tmp_path / "in")
    assert "reading 2 inputs with 4 rows" in notices and "skipped" in notices and "dataset_infos.json" in notices


def test_files_without_pairs_are_skipped(tmp_path) -> None:
    images(tmp_path / "in", "0")
    (tmp_path / "in/dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.json"}}))
    (tmp_path / "in/instances_val.json").write_text(json.dumps({"images": [], "annotations": [{"id": 1}]}))
    (tmp_path / "in/own.json").write_text(json.dumps(ROWS))
    assert [pair.caption for pair in read_all(tmp_path / "in")] == ["a", "b"]
    notices = told(tmp_path / "in")
    assert "dataset_info.json: this JSON is neither" in notices and "instances_val.json: " in notices
    parquet(tmp_path / "two/a.parquet")
    parquet(tmp_path / "two/stats.parquet", size=[1])
    assert len(read_all(tmp_path / "two")) == 2 and "stats.parquet: no column with captions" in told(tmp_path / "two")
    os.remove(tmp_path / "two/a.parquet")
    assert "stats.parquet: no column" in complaint(cli("ingest", tmp_path / "two", "--out", tmp_path / "out"))


def test_many_skipped_files_are_counted(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(1))
    for number in range(20):
        (tmp_path / f"{number}.parquet").write_bytes(PAGE)
    notices = open_source(str(tmp_path)).notices
    assert len(notices) <= 5 and any("17 more files" in text for text in notices)


def test_a_damaged_parquet_file_in_a_folder_is_not_skipped(tmp_path) -> None:
    parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.parquet: damaged"):
        open_source(str(tmp_path))


def test_what_lies_beside_the_data_is_told(tmp_path) -> None:
    images(tmp_path, "0")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "images.zip").write_bytes(zipped())
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.jsonl").write_text(json.dumps(ROWS[0]))
    texts(images(tmp_path / "pictures"), "json")
    notices = told(tmp_path)
    assert "images.zip" in notices and "unpack" in notices and "not read: more;" in notices


def test_folders_that_link_to_themselves_end(tmp_path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    write_tar(tmp_path / "in/a/0.tar", pairs(1))
    assert [pair.key for pair in read_all(tmp_path / "in")] == ["s0"]


def test_our_datasets_are_known_by_their_manifest(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "runs/one", quiet=True)
    assert open_source(str(tmp_path / "runs/one")).kind == "dataset"
    found = complaint(cli("ingest", tmp_path / "runs", "--out", tmp_path / "out"))
    assert "contains datasets" in found and "runs/one" in found
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text(json.dumps([{"image": "0.jpg", "caption": "x"}]))
    assert open_source(str(tmp_path / "other")).kind == "annotations"
    (tmp_path / "runs/one/manifest.json").write_bytes(b"\0damaged")
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_source(str(tmp_path / "runs/one"))


# --- splits, files given twice, --limit ------------------------------------------------------------------------------


def test_splits_are_named(tmp_path) -> None:
    images(tmp_path, "0")
    for name, count in {"train": 2, "test": 1, "val": 1}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(ROWS[:count]))
    notices = told(tmp_path)
    assert "reading 3 inputs with 4 rows: test.json (1 row), train.json (2 rows), val.json (1 row)" in notices
    assert "the splits test (1 row), train (2 rows), val (1 row) become one dataset" in notices
    assert not told(tmp_path / "train.json")
    for split in ("train", "validation"):
        (tmp_path / "tars" / split).mkdir(parents=True)
        write_tar(tmp_path / "tars" / split / "00000.tar", pairs(1))
    assert "the splits train (1 file), validation (1 file)" in told(tmp_path / "tars")
    (tmp_path / "no").mkdir()
    for name in ("trainer-0", "latest", "contest", "devices"):
        write_tar(tmp_path / "no" / f"{name}.tar", pairs(1))
    assert "splits" not in told(tmp_path / "no")


def test_the_same_file_is_read_once(tmp_path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(1, first=number))
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "z-link.tar").symlink_to(tmp_path / "1.tar")
    os.link(tmp_path / "2.tar", tmp_path / "z-hard.tar")
    first = str(tmp_path / "0.tar")
    for more in (first, f"file://{first}", f"{tmp_path}/./0.tar", f"{tmp_path}/link/0.tar", f"{tmp_path}/{{0,1}}.tar"):
        source = open_source([first, more])
        assert [shard.uri for shard in source.shards][:1] == [first] and len(source.shards) <= 2
        assert any("more than once" in text and "0.tar" in text for text in source.notices), more
    source = open_source([f"{tmp_path}/*.tar", str(tmp_path)])
    assert [pair.key for shard in source.shards for pair in source.read(shard)] == ["s0", "s1", "s2"]
    texts(images(tmp_path / "pics/a"))
    assert len(read_all([str(tmp_path / "pics"), str(tmp_path / "pics/a")])) == 3


def test_limit_says_what_it_took(tmp_path) -> None:
    images(tmp_path / "in", "0")
    for name in ("a", "b", "c"):
        (tmp_path / f"in/{name}.json").write_text(json.dumps(ROWS))
    result = cli("ingest", tmp_path / "in", "--out", tmp_path / "out", "--limit", 3)
    assert "--limit 3 takes the first pairs, from 2 of 3 files (a.json, b.json)" in " ".join(result.stderr.split())


def test_statuses_of_an_image_folder_survive_a_second_ingest(tmp_path) -> None:
    texts(images(tmp_path / "in"), "txt", "0", "1")
    first = ingested(tmp_path / "in", tmp_path / "first")
    assert statuses(first) == ["ok", "ok", "missing_caption"]
    assert ingested(tmp_path / "first", tmp_path / "second").equals(first)


def test_captions_in_a_folder_beside_the_images(tmp_path) -> None:
    images(tmp_path / "in/images")
    (tmp_path / "in/captions").mkdir()
    texts(tmp_path / "in/captions", "txt", "0", "1")
    frame = ingested(tmp_path / "in", tmp_path / "out")
    assert frame.select("key", "caption", "status").rows() == [
        ("images/0", "caption 0", "ok"), ("images/1", "caption 1", "ok"), ("images/2", None, "missing_caption"),
    ]  # fmt: skip
    images(tmp_path / "yolo/images")
    (tmp_path / "yolo/labels").mkdir()
    texts(tmp_path / "yolo/labels")
    with pytest.raises(UserError, match="only images"):
        open_source(str(tmp_path / "yolo"))


def test_captions_that_are_not_taken_are_kept(tmp_path) -> None:
    folder = images(tmp_path / "in", "a", "b")
    files = {"a.txt": "tags", "a.caption": "a sentence", "b.txt": "same", "b.json": '{"caption": "same "}'}
    for name, data in files.items():
        (folder / name).write_text(data)
    frame = ingested(folder, tmp_path / "out")
    assert frame["caption"].to_list() == ["tags", "same"]
    assert "a sentence" in frame["extra"][0] and frame["extra"][1] is None


def test_a_dataset_saved_to_disk_by_datasets_is_named(tmp_path) -> None:
    table = pa.table({"text": ["x"]})
    name = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    assert "an Arrow stream" in complaint(cli("ingest", tmp_path, "--out", tmp_path / "out"))


def test_file_names_that_are_not_utf8(tmp_path) -> None:
    """A dataset keeps names as text, so it could not lead back to such a file."""
    folder = images(tmp_path / "in", "a")
    texts(folder, "txt", "a")
    for ending, data in (("jpg", jpeg()), ("txt", b"x")):
        (folder / os.fsdecode(b"caf\xe9." + ending.encode())).write_bytes(data)
    frame = ingested(folder, tmp_path / "out")
    assert statuses(frame) == ["ok", "read_error"] and "not UTF-8; rename" in frame["error"][1]
    tar = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar")
    Path(tar).write_bytes(tar_bytes([("a.jpg", jpeg())]))
    with pytest.raises(UserError, match="not UTF-8; rename"):
        open_source(tar)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.sampled_from(["jpg", "txt", "json", "tar", "csv", ""])), max_size=6))
def test_folders_of_any_file_names(tmp_path_factory, names) -> None:
    """Whatever the names are, nothing but a sentence is raised, and every image that is read was written."""
    folder = tmp_path_factory.mktemp("in")
    for name, ending in names:
        with suppress(OSError, ValueError):
            (folder / f"{name}.{ending}".replace("/", "_")).write_bytes(jpeg() if ending == "jpg" else b"a caption")
    try:
        rows = read_all(folder)
    except UserError as error:
        assert str(folder) in str(error)
    else:
        images = {os.path.basename(row.image_path) for row in rows if row.image_path and row.load}
        assert images <= set(os.listdir(folder))
        assert all(row.load() == jpeg() for row in rows if row.load)


def test_the_data_folder_of_a_dataset_is_the_dataset(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "one", quiet=True)
    data = tmp_path / "one/data"
    assert open_source(str(data)).kind == "dataset" and [pair.key for pair in read_all(data)] == ["s0", "s1"]
    assert any("more than once" in text for text in open_source([str(tmp_path / "one"), str(data)]).notices)


# --- folders that have grown -----------------------------------------------------------------------------------------


def test_new_files_after_the_others_become_further_parts(tmp_path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"{number}.tar", pairs(2, first=2 * number))
    assert cli("ingest", folder, "--out", out).exit_code == 0
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (out / "data").iterdir()}
    write_tar(folder / "2.tar", pairs(1, first=4))
    assert cli("ingest", folder, "--out", out).exit_code == 0
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (out / "data").iterdir()}
    assert before.items() <= after.items() and len(after) == 3  # the old parts are not touched
    frame = aligncurate.open_dataset(out).scan().collect()
    assert frame["key"].to_list() == [f"s{n}" for n in range(5)]
    again = ingested(folder, tmp_path / "at once")
    assert again.equals(frame)
    write_tar(folder / "0a.tar", pairs(1))
    assert "0a.tar has been added, but not after the others" in complaint(cli("ingest", folder, "--out", out))
    os.remove(folder / "0a.tar")
    write_tar(folder / "1.tar", pairs(30))
    assert "1.tar has changed since" in complaint(cli("ingest", folder, "--out", out))


def test_new_files_of_rows_and_images_become_further_parts(tmp_path) -> None:
    images(tmp_path / "rows", "0")
    (tmp_path / "rows/a.json").write_text(json.dumps(ROWS))
    texts(images(tmp_path / "pics/00000"))
    for name in ("rows", "pics"):
        assert cli("ingest", tmp_path / name, "--out", tmp_path / f"{name}-out").exit_code == 0
    (tmp_path / "rows/b.json").write_text(json.dumps(ROWS[:1]))
    texts(images(tmp_path / "pics/00001"))
    for name, count in {"rows": 3, "pics": 6}.items():
        assert cli("ingest", tmp_path / name, "--out", tmp_path / f"{name}-out").exit_code == 0
        assert aligncurate.open_dataset(tmp_path / f"{name}-out").rows == count
    texts(images(tmp_path / "pics/00001", "new"), "txt", "new")  # a folder that has itself grown
    assert "pics/00001 has changed since" in complaint(cli("ingest", tmp_path / "pics", "--out", tmp_path / "pics-out"))
