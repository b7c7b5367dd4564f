"""Every form of source: hand-made small ones with known rows, and the real data where it is there."""

import csv
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.dataset.record import COLUMNS, Status
from aligncurate.errors import UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, ingested, jpeg, pairs, read_all, tar_bytes, write_tar


def facts(frame, *columns):
    """The named columns of a dataset's rows, as tuples."""
    return frame.select(columns).rows()


def digests(*seeds: int) -> list[bytes]:
    return [hashlib.sha256(jpeg(seed)).digest() for seed in seeds]


def folder_of_images(folder: Path, *seeds: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    return folder


# --- tars ------------------------------------------------------------------------------------------------------------


def test_webdataset_tar(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(3))
    frame = ingested(tar, tmp_path / "out")
    assert facts(frame, "key", "caption", "status") == [(f"s{i}", f"caption {i}", "ok") for i in range(3)]
    assert frame["sha256"].to_list() == digests(0, 1, 2)
    assert facts(frame, "image_path", "width", "height")[1] == ("s1.jpg", 48, 40)
    assert frame["source"].unique().to_list() == [str(tar)]
    offset, length = frame.row(2, named=True)["image_offset"], frame.row(2, named=True)["image_length"]
    assert tar.read_bytes()[offset : offset + length] == jpeg(2)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_member_names(tmp_path, form) -> None:
    names = ["deep/" * 40 + "x", "deep/ünïcode-图片", "with space", "dotted.folder/key", "UPPER", "./dotslash"]
    if form != tarfile.USTAR_FORMAT:
        names.append("k" * 300)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for seed, name in enumerate(names):
            for ending, data in ((("JPG" if name == "UPPER" else "jpg"), jpeg(seed)), ("txt", b"text")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert facts(frame, "key", "status") == [(name, "ok") for name in names]
    assert frame["sha256"].to_list() == digests(*range(len(names)))


def test_only_webdatasets_own_metadata_members_are_skipped(tmp_path) -> None:
    members = [("__meta.info__", b"x"), ("__init.jpg", jpeg(0)), ("__init.txt", b"a"), ("d/__x.jpg", jpeg(1)),
               ("d/__x.txt", b"b"), ("d/", b""), ("no-ending", b"x"), (".hidden", b"x"),
               ("d/._x.jpg", b"x")]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    assert [(p.key, p.caption) for p in read_all(tmp_path / "a.tar")] == [("__init", "a"), ("d/__x", "b")]


def test_captions_in_json_members(tmp_path) -> None:
    samples = {
        "a": {"jpg": jpeg(0), "json": json.dumps({"caption": "in json", "url": "http://x/a.jpg", "n": 3}).encode()},
        "b": {"jpg": jpeg(1), "txt": b"in txt", "json": b'{"caption": "not this", "n": 4}'},
        "c": {"jpg": jpeg(2), "json": b'{"my_text": "other", "caption": "usual"}'},
    }
    tar = write_tar(tmp_path / "a.tar", samples)
    frame = ingested(tar, tmp_path / "out")
    assert frame["caption"].to_list() == ["in json", "in txt", "usual"]
    assert facts(frame, "url", "n") == [("http://x/a.jpg", 3), (None, 4), (None, None)]
    chosen = ingested(tar, tmp_path / "chosen", caption_column="my_text")
    assert facts(chosen, "caption", "status")[2] == ("other", "ok")
    assert chosen["status"].to_list()[:2] == ["missing_caption"] * 2


def test_conversations_in_tars(tmp_path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Because."},
    ]
    tar = write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "json": json.dumps({"conversations": turns}).encode()}})
    (row,) = ingested(tar, tmp_path / "out").iter_rows(named=True)
    assert [(t["role"], t["text"]) for t in row["conversations"]] == [
        ("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "Why?"), ("assistant", "Because."),
    ]  # fmt: skip
    assert row["status"] == "ok" and row["caption"] is None


def test_two_images_in_one_sample(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a": {"1.jpg": jpeg(0), "2.png": jpeg(1), "txt": b"two"}, **pairs(1)})
    frame = ingested(tar, tmp_path / "out")
    assert frame["status"].to_list() == ["multi_image", "ok"]
    assert "2 images" in frame["error"][0]


def test_img2datasets_parquet_beside_the_tar(tmp_path) -> None:
    samples = {f"{i:09d}": {"jpg": jpeg(i), "txt": f"caption {i}".encode(), "json": b"{}"} for i in range(3)}
    write_tar(tmp_path / "00000.tar", samples)
    table = {
        "key": list(samples),
        "url": [f"http://x/{i}.jpg" for i in range(3)],
        "caption": ["-"] * 3,
        "sha256": ["0" * 64] * 3,
        "original_width": [640, 641, 642],
        "pwatermark": [0.5, None, 0.25],
        "status": ["success"] * 3,
        "error_message": [None] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    frame = ingested(tmp_path, tmp_path / "out")
    assert facts(frame, "key", "caption", "url", "original_width", "pwatermark")[2] == (
        "000000002", "caption 2", "http://x/2.jpg", 642, 0.25,
    )  # fmt: skip
    assert frame["status"].to_list() == ["ok"] * 3
    assert frame["sha256"].to_list() == digests(0, 1, 2)  # of the bytes that are there, not what the list says


def test_brace_patterns_wildcards_and_folders(tmp_path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:05d}.tar", pairs(1, first=number))
    expected = [f"s{n}" for n in range(12)]
    for pattern in (f"{tmp_path}/{{00000..00011}}.tar", f"{tmp_path}/*.tar", f"{tmp_path}/0000?.tar", str(tmp_path)):
        keys = [pair.key for pair in read_all(pattern)]
        assert keys == expected[: 10 if "?" in pattern else 12], pattern
    assert [p.key for p in read_all(f"{tmp_path}/{{00003,00001}}.tar")] == ["s3", "s1"]
    with pytest.raises(UserError, match=r"00012\.tar.*no such file"):
        open_source(f"{tmp_path}/{{00010..00012}}.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_source(f"{tmp_path}/*.parquet")


def test_a_file_whose_name_has_pattern_characters(tmp_path) -> None:
    for name in ("a{1}.tar", "b*.tar", "c{.tar"):
        write_tar(tmp_path / name, pairs(1))
        assert len(read_all(tmp_path / name)) == 1
    with pytest.raises(UserError):
        open_source(f"{tmp_path}/d{{.tar")


def test_each_tar_is_a_shard_and_becomes_a_part(tmp_path) -> None:
    for number, count in enumerate((2, 0, 3)):
        write_tar(tmp_path / f"{number}.tar", pairs(count))
    run = aligncurate.ingest(tmp_path / "{0,1,2}.tar", tmp_path / "out", quiet=True)
    assert [(p.name, p.rows) for p in run.dataset.parts] == [
        ("data/part-00000.parquet", 2), ("data/part-00001.parquet", 0), ("data/part-00002.parquet", 3),
    ]  # fmt: skip


# --- any fsspec URI --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """An empty folder of fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def test_tars_at_a_uri(memory, tmp_path) -> None:
    for number in range(3):
        memory.pipe(f"/data/{number}.tar", write_tar(tmp_path / "x.tar", pairs(2, first=2 * number)).read_bytes())
    expected = [(f"s{i}", f"caption {i}", "ok") for i in range(6)]
    for number, uri in enumerate(("memory://data", "memory://data/{0..2}.tar", "memory://data/*.tar")):
        frame = ingested(uri, tmp_path / f"out{number}")
        assert facts(frame, "key", "caption", "status") == expected
        assert frame["sha256"].to_list() == digests(*range(6))
        assert all(s.startswith("memory://") for s in frame["source"])


def test_tables_and_parquet_at_a_uri(memory, tmp_path) -> None:
    memory.pipe("/d/images/1.jpg", jpeg(1))
    memory.pipe("/d/t.csv", b"image,caption\nimages/1.jpg,one\nimages/2.jpg,two\n")
    frame = ingested("memory://d/t.csv", tmp_path / "csv")
    assert facts(frame, "caption", "status") == [("one", "ok"), ("two", "missing_image")]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [jpeg(5)], "caption": ["five"]}), buffer)
    memory.pipe("/d/p.parquet", buffer.getvalue())
    assert ingested("memory://d/p.parquet", tmp_path / "parquet")["sha256"].to_list() == digests(5)


def test_uris_that_cannot_be_opened() -> None:
    with pytest.raises(UserError, match="nosuch"):
        open_source("nosuch://bucket/a.tar")
    with pytest.raises(UserError, match="no such file"):
        open_source("memory://bucket/not-there.tar")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def image_columns(folder: Path) -> dict[str, pa.Array]:
    folder_of_images(folder, 0, 1)
    data = [jpeg(0), jpeg(1)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return {
        "binary": pa.array(data),
        "large_binary": pa.array(data, pa.large_binary()),
        "struct": pa.array([{"bytes": d, "path": "x.jpg"} for d in data], struct),
        "struct with paths": pa.array([{"bytes": None, "path": f"{i}.jpg"} for i in range(2)], struct),
        "list": pa.array([[d] for d in data]),
        "list of structs": pa.array([[{"bytes": d, "path": None}] for d in data], pa.list_(struct)),
        "path": pa.array(["0.jpg", "1.jpg"]),
        "path in images/": pa.array(["0.jpg", "1.jpg"]).dictionary_encode(),
        "absolute path": pa.array([str(folder / f"{i}.jpg") for i in range(2)]),
    }


FORMS = ["binary", "large_binary", "struct", "struct with paths", "list", "list of structs", "path",
         "path in images/", "absolute path"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_parquet(tmp_path, form) -> None:
    column = image_columns(tmp_path / ("images" if form == "path in images/" else ""))[form]
    table = pa.table({"image": column, "text": ["zero", "one"], "id": [7, 8], "aesthetic": [1.5, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    assert facts(frame, "key", "caption", "status", "aesthetic") == [("7", "zero", "ok", 1.5), ("8", "one", "ok", None)]
    assert frame["sha256"].to_list() == digests(0, 1)
    assert frame["row"].to_list() == [0, 1]


def test_columns_named_by_the_user(tmp_path) -> None:
    table = pa.table({"photo": [jpeg(3)], "alt": ["mine"], "caption": ["usual"], "image": [jpeg(4)]})
    pq.write_table(table, tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out", caption_column="alt", image_column="photo")
    assert frame["caption"].to_list() == ["mine"] and frame["sha256"].to_list() == digests(3)


# --- annotations -----------------------------------------------------------------------------------------------------

CAPTION = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a pair"}]
CHAT = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A boat."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "At sea."},
]
LLAVA = [
    {"id": "pair", "image": "0.jpg", "conversations": CAPTION},
    {"id": "chat", "image": "1.jpg", "conversations": CHAT, "similarity": 5},
    {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"id": "two", "image": ["0.jpg", "1.jpg"], "conversations": CHAT},
    {"id": "one of a list", "image": ["1.jpg"], "conversations": CAPTION},
    {"id": "gone", "image": "9.jpg", "conversations": CAPTION},
    {"id": "broken", "image": "0.jpg", "conversations": [{"from": "human"}]},
]
LLAVA_STATUSES = ["ok", "ok", "text_only", "multi_image", "ok", "missing_image", "invalid_row"]


def as_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "wrapped.json"])
@pytest.mark.parametrize("rows_per_shard", [10_000, 2])
def test_llava(tmp_path, name, rows_per_shard) -> None:
    folder_of_images(tmp_path, 0, 1)
    rows = {"data": LLAVA, "version": 1} if name == "wrapped.json" else LLAVA
    (tmp_path / name).write_text(json.dumps(rows) if name.endswith(".json") else as_lines(LLAVA))
    frame = ingested(tmp_path / name, tmp_path / "out", rows_per_shard=rows_per_shard)
    assert frame["key"].to_list() == [row["id"] for row in LLAVA]
    assert frame["status"].to_list() == LLAVA_STATUSES
    assert frame["row"].to_list() == list(range(7))
    assert frame["caption"].to_list()[0] == "a pair" and frame["caption"].to_list()[1] is None
    assert frame["conversations"].to_list()[1] == [
        {"role": "user", "text": "<image>\nWhat is it?"},
        {"role": "assistant", "text": "A boat."},
        {"role": "user", "text": "Where?"},
        {"role": "assistant", "text": "At sea."},
    ]
    assert frame["conversations"].to_list()[2] is not None and frame["image_path"].to_list()[2] is None
    assert frame["similarity"].to_list()[1] == 5
    errors = frame["error"].to_list()
    assert errors[:3] == [None] * 3 and "2 images" in errors[3] and "9.jpg" in errors[5] and "row 6" in errors[6]


def test_jsonl_with_blank_lines_windows_endings_and_a_mark(tmp_path) -> None:
    folder_of_images(tmp_path, 0, 1)
    lines = [json.dumps({"image": f"{i}.jpg", "caption": f"c{i} ünï"}, ensure_ascii=False) for i in range(2)]
    text = f"\ufeff{lines[0]}\r\n\r\n   \n{lines[1]}"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert facts(ingested(tmp_path / "a.jsonl", tmp_path / "out"), "caption", "status") == [
        ("c0 ünï", "ok"), ("c1 ünï", "ok"),
    ]  # fmt: skip
    (tmp_path / "b.json").write_bytes(f"\ufeff[{lines[0]}]".encode())
    assert ingested(tmp_path / "b.json", tmp_path / "json")["status"].to_list() == ["ok"]


def test_openai_style_messages(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    parts = [{"type": "image_url", "image_url": {"url": "0.jpg"}}, {"type": "text", "text": "<IMG_CONTEXT>\nWhat?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "a.jsonl").write_text(as_lines([{"messages": messages}]))
    (row,) = ingested(tmp_path / "a.jsonl", tmp_path / "out").iter_rows(named=True)
    assert row["status"] == "ok" and row["image_path"] == str(tmp_path / "0.jpg")
    assert [t["text"] for t in row["conversations"]] == ["<image>\nWhat?", "A dog."]


def test_extra_fields_of_every_kind_are_kept(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    extras = [
        {"n": 1, "mixed": 1, "list": ["a"], "extra": "their own", "deep": {"a": [1]}},
        {"n": 2.5, "mixed": "x", "list": [], "big": 2**70, "late": None},
    ]
    rows = [{"image": "0.jpg", "caption": "c", **extra} for extra in extras]
    (tmp_path / "a.jsonl").write_text(as_lines(rows))
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out")
    assert facts(frame, "n", "list") == [(1.0, ["a"]), (2.5, [])]
    kept = [json.loads(text) for text in frame["extra"]]
    assert kept[0]["mixed"] == 1 and kept[0]["deep"] == {"a": [1]} and "their own" in kept[0].values()
    assert kept[1] == {"mixed": "x", "big": 2**70}


def coco_file(folder: Path) -> Path:
    data = {
        "info": {},
        "images": [{"id": 10, "file_name": "0.jpg", "license": 4}, {"id": 11, "file_name": "1.jpg", "license": 5}],
        "annotations": [
            {"image_id": 11, "id": 100, "caption": "one"},
            {"image_id": 10, "id": 101, "caption": "zero"},
            {"image_id": 11, "id": 102, "caption": "one again"},
            {"image_id": 99, "id": 103, "caption": "of no image"},
        ],
    }
    (folder / "captions_val.json").write_text(json.dumps(data))
    return folder / "captions_val.json"


@pytest.mark.parametrize("images", ["images", "val2017", "../val2017", "."])
def test_coco_captions(tmp_path, images) -> None:
    base = tmp_path / "annotations"
    folder_of_images(base, 0, 1) if images == "." else folder_of_images(base / images, 0, 1)
    base.mkdir(exist_ok=True)
    frame = ingested(coco_file(base), tmp_path / "out")
    assert facts(frame, "key", "caption", "status", "license") == [
        ("1-100", "one", "ok", 5), ("0-101", "zero", "ok", 4), ("1-102", "one again", "ok", 5),
        ("99-103", "of no image", "missing_image", None),
    ]  # fmt: skip
    assert frame["sha256"].to_list() == [*digests(1, 0, 1), None]


def test_the_first_caption_of_each_coco_image(tmp_path) -> None:
    folder_of_images(tmp_path / "images", 0, 1)
    run = cli("ingest", coco_file(tmp_path), "--captions", "first", "--out", tmp_path / "out")
    assert "1 further caption of its images left out (--captions first)" in run.stderr
    frame = aligncurate.open_dataset(tmp_path / "out").scan().collect()
    assert facts(frame, "key", "caption") == [("1-100", "one"), ("0-101", "zero"), ("99-103", "of no image")]


# --- tables ----------------------------------------------------------------------------------------------------------

ROWS = [
    ("0.jpg", "plain"),
    ("1.jpg", 'with "quotes", commas\nand lines'),
    ("0.jpg", "  ünïcode 图片 "),
    ("9.jpg", "gone"),
]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_with_and_without_a_header(tmp_path, name, header) -> None:
    folder_of_images(tmp_path, 0, 1)
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerows([("filename", "caption"), *ROWS] if header else ROWS)
    frame = ingested(tmp_path / name, tmp_path / "out")
    assert frame["caption"].to_list() == [caption.strip() for _, caption in ROWS]
    assert frame["status"].to_list() == ["ok", "ok", "ok", "missing_image"]
    assert frame["sha256"].to_list() == [*digests(0, 1, 0), None]


def test_tables_from_windows(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    for number, text in enumerate(("\ufeffimage,caption\r\n0.jpg,one\r\n", "\ufeff0.jpg ,one\r\n", "one, 0.jpg\r\n")):
        (tmp_path / f"{number}.csv").write_bytes(text.encode())
        frame = ingested(tmp_path / f"{number}.csv", tmp_path / f"out{number}")
        assert facts(frame, "caption", "status") == [("one", "ok")], text


def test_cells_stay_as_they_are_written(tmp_path) -> None:
    folder_of_images(tmp_path, 0, 1)
    text = "id,image,caption,likes,share,zip,big\n007,0.jpg,0010,5,0.5,0123,12345678901234567890\n"
    text += "008,1.jpg,1.50,6,,9999,2\n"
    (tmp_path / "a.csv").write_text(text)
    frame = ingested(tmp_path / "a.csv", tmp_path / "out")
    assert facts(frame, "key", "caption", "likes", "share", "zip", "big") == [
        ("007", "0010", 5, 0.5, "0123", "12345678901234567890"), ("008", "1.50", 6, None, "9999", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize("more", [[], ['a 5" pipe', '"quoted"', 'open "']])
def test_a_lone_quotation_mark_swallows_no_lines_of_a_tsv(tmp_path, more) -> None:
    folder_of_images(tmp_path, 0)
    captions = ['"To be', "or not", 'to be"', *more]
    (tmp_path / "a.tsv").write_text("image\tcaption\n" + "".join(f"0.jpg\t{c}\n" for c in captions))
    frame = ingested(tmp_path / "a.tsv", tmp_path / "out")
    assert len(frame) == len(captions)
    assert frame["caption"].to_list()[:3] == captions[:3]


def test_images_of_a_table_inside_tars(tmp_path) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    for number in range(2):
        write_tar(root / f"{number}.tar", pairs(2, first=2 * number))
    (tmp_path / "a.csv").write_text("image,caption\ns3.jpg,three\ns0.jpg,zero\ns3.jpg,again\ns7.jpg,gone\n")
    frame = ingested(tmp_path / "a.csv", tmp_path / "out", image_root=str(root))
    assert facts(frame, "caption", "status") == [
        ("three", "ok"), ("zero", "ok"), ("again", "ok"), ("gone", "missing_image"),
    ]  # fmt: skip
    assert frame["sha256"].to_list() == [*digests(3, 0, 3), None]
    assert [Path(s).name for s in frame["source"]] == ["1.tar", "0.tar", "1.tar", "a.csv"]
    single = ingested(tmp_path / "a.csv", tmp_path / "single", image_root=str(root / "1.tar"))
    assert single["status"].to_list() == ["ok", "missing_image", "ok", "missing_image"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_images_from_a_tar_that_nobody_named_are_told(tmp_path, kind) -> None:
    folder_of_images(tmp_path, 0)
    for name, first in (("old.tar", 1), ("other.tar", 3)):
        write_tar(tmp_path / name, pairs(2, first=first))
    images = ["0.jpg", "s1.jpg", "s2.jpg", "s4.jpg", "gone.jpg"]
    rows = [{"image": image, "caption": "c"} for image in images]
    lines = [json.dumps(row) for row in rows] if kind == "jsonl" else ["image,caption", *(f"{i},c" for i in images)]
    (tmp_path / f"a.{kind}").write_text("\n".join(lines) + "\n")
    told = cli("ingest", tmp_path / f"a.{kind}", "--out", tmp_path / "out").stderr
    tars = f"{tmp_path / 'old.tar'}, {tmp_path / 'other.tar'}"
    assert f"a.{kind}: 3 images not found as files, taken from {tars}; pass --image-root" in told
    named = cli("ingest", tmp_path / f"a.{kind}", "--image-root", tmp_path, "--out", tmp_path / "named").stderr
    assert "taken from" not in named


def test_an_image_root_that_is_not_there(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n0.jpg,one\n")
    with pytest.raises(UserError, match=r"--image-root .*nowhere.*no such folder"):
        open_source(str(tmp_path / "a.csv"), SourceOptions(image_root=str(tmp_path / "nowhere")))


def test_keys_are_unique_within_a_shard(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    keys = ["a", "a-2", "a", "a", "a-3-3"]
    (tmp_path / "a.jsonl").write_text(as_lines({"id": k, "image": "0.jpg", "caption": "c"} for k in keys))
    found = [pair.key for pair in read_all(tmp_path / "a.jsonl")]
    assert len(set(found)) == 5 and found[:2] == ["a", "a-2"]


def test_columns_come_in_the_contracts_order(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("zzz,image,caption,aaa\n1,0.jpg,one,2\n")
    frame = ingested(tmp_path / "a.csv", tmp_path / "out")
    assert frame.columns == [*(c for c in COLUMNS if c != "image"), "zzz", "aaa"]
    embedded = aligncurate.ingest(tmp_path / "a.csv", tmp_path / "embedded", embed_images=True, quiet=True)
    assert embedded.dataset.schema.names == [*COLUMNS, "zzz", "aaa"]


# --- several sources, and our own ------------------------------------------------------------------------------------


def test_several_sources_of_different_kinds(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    write_tar(tmp_path / "a.tar", pairs(2))
    (tmp_path / "b.csv").write_text("image,caption,likes\n0.jpg,table,3\n")
    pq.write_table(pa.table({"image": [jpeg(4)], "caption": ["parquet"], "likes": ["many"]}), tmp_path / "c.parquet")
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "d", quiet=True)
    sources = [tmp_path / name for name in ("a.tar", "b.csv", "c.parquet", "d")]
    frame = ingested(sources, tmp_path / "out")
    assert frame["caption"].to_list() == ["caption 0", "caption 1", "table", "parquet", "caption 0", "caption 1"]
    assert frame["status"].to_list() == ["ok"] * 6
    extra = [json.loads(e) if e else None for e in frame["extra"]]
    assert extra[2:4] == [{"likes": 3}, {"likes": "many"}]  # one column cannot hold both
    assert [p.caption for p in read_all([str(s) for s in sources])] == frame["caption"].to_list()


def test_an_ingested_dataset_is_a_source_with_the_same_rows(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(as_lines(LLAVA))
    folder_of_images(tmp_path, 0, 1)
    first = ingested(tmp_path / "a.jsonl", tmp_path / "first")
    assert ingested(tmp_path / "first", tmp_path / "second").equals(first)
    limited = aligncurate.ingest([tmp_path / "a.jsonl", tmp_path / "first"], tmp_path / "both", limit=9, quiet=True)
    assert [p.rows for p in limited.dataset.parts] == [7, 2]


def test_input_scores_are_kept_by_ingest(tmp_path) -> None:
    table = pa.table(
        {"image": [jpeg(0), jpeg(1)], "caption": ["a", "b"], "score": [0.25, float("nan")], "level": [3, 0]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert facts(ingested(tmp_path / "a.parquet", tmp_path / "out"), "score", "level") == [(0.25, 3), (None, None)]


def test_a_folder_of_several_kinds_says_what_it_leaves_out(tmp_path) -> None:
    folder_of_images(tmp_path, 0)
    write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "notes.csv").write_text("image,caption\n0.jpg,x\n")
    source = open_source(str(tmp_path))
    assert source.kind == "webdataset" and any("ignoring notes.csv" in n for n in source.notices)
    assert open_source(str(tmp_path), SourceOptions(format="table")).kind == "table"
    assert not open_source(str(tmp_path / "a.tar")).notices


def test_the_format_can_be_forced(tmp_path) -> None:
    write_tar(tmp_path / "a.data", pairs(1))
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(UserError, match="--format"):
        open_source(str(tmp_path / "a.txt"))
    assert [p.key for p in read_all(tmp_path / "a.data", format="webdataset")] == ["s0"]
    with pytest.raises(UserError, match="--format zip"):
        open_source(str(tmp_path / "a.data"), SourceOptions(format="zip"))
    with pytest.raises(UserError, match="this is a tar, not a Parquet file; leave out --format parquet"):
        open_source(str(tmp_path / "a.data"), SourceOptions(format="parquet"))


# --- the real data ---------------------------------------------------------------------------------------------------


def tar_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


@pytest.fixture(scope="module")
def dev(data_root) -> dict[str, bytes]:
    return tar_members(data_root / "flickr8k/dev-00000.tar")


def test_flickr8k_tars(data_root, dev, tmp_path) -> None:
    frame = ingested(data_root / "flickr8k/dev-00000.tar", tmp_path / "out")
    keys = [n[:-4] for n in dev if n.endswith(".jpg")]
    assert len(keys) == 1_000 and frame["key"].to_list() == keys
    assert frame["caption"].to_list() == [dev[f"{k}.txt"].decode().strip() for k in keys]
    assert frame["sha256"].to_list() == [hashlib.sha256(dev[f"{k}.jpg"]).digest() for k in keys]
    assert set(frame["status"]) == {"ok"}


def test_flickr8k_folder_takes_the_tars(data_root) -> None:
    source = open_source(str(data_root / "flickr8k"))
    assert source.kind == "webdataset" and len(source.shards) == 8
    assert sum(source.count(shard) for shard in source.shards) == 8_000
    assert any("captions.csv" in notice for notice in source.notices)


def test_all_five_captions_of_each_image(data_root, dev) -> None:
    path = data_root / "flickr8k/captions.csv"
    with path.open(newline="", encoding="utf-8") as file:
        expected = [(row["image"], row["caption"].strip()) for row in csv.DictReader(file)]
    source = open_source(str(path), SourceOptions(image_root=str(path.parent)))
    assert [source.count(shard) for shard in source.shards] == [10_000] * 4 + [455]
    found = [pair for shard in source.shards for pair in source.read(shard)]
    assert [pair.caption for pair in found] == [caption for _, caption in expected]
    in_tars = [(p, name) for p, (name, _) in zip(found, expected, strict=True) if p.source.endswith(".tar")]
    assert all(p.image_path == name and p.image_length > 0 for p, name in in_tars)
    # All 8,000 photos of the split have five captions each; the few others are in no tar.
    counts = Counter(name for _, name in in_tars)
    assert len(counts) == 8_000 and set(counts.values()) == {5}
    of_dev = [(p, name) for p, name in in_tars if p.source.endswith("dev-00000.tar")]
    assert len(of_dev) == 5_000
    assert all(p.load() == dev[name] for p, name in of_dev[::50])


def test_match_nomatch_lists(data_root, tmp_path) -> None:
    path = data_root / "flickr8k/match_nomatch.Dev.tsv"
    expected = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    frame = ingested(path, tmp_path / "out", image_root=str(path.parent))
    assert len(frame) == len(expected)
    label = next(c for c in frame.columns if set(frame[c].drop_nulls()) == {"match", "no-match"})
    assert facts(frame, "caption", label) == [(caption.strip(), which) for _, caption, which in expected]
    assert frame["image_path"].str.ends_with(".jpg").all()
    assert set(frame["status"]) <= {"ok", "missing_image"} and (frame["status"] == "ok").mean() > 0.98


def test_coco(data_root, tmp_path) -> None:
    data = json.loads((data_root / "coco/captions.json").read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    frame = ingested(data_root / "coco", tmp_path / "out")
    assert facts(frame, "caption", "image_id") == [(a["caption"].strip(), a["image_id"]) for a in data["annotations"]]
    assert set(frame["status"]) == {"ok"} and frame["key"].n_unique() == 710
    assert [Path(p).name for p in frame["image_path"]] == [names[a["image_id"]] for a in data["annotations"]]
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    assert facts(frame, "width", "height") == [sizes[a["image_id"]] for a in data["annotations"]]


def test_daquar(data_root, tmp_path) -> None:
    rows = json.loads((data_root / "daquar/llava_test.json").read_text())
    frame = ingested(data_root / "daquar/llava_test.json", tmp_path / "out")
    assert frame["key"].to_list() == [row["id"] for row in rows]
    assert set(frame["status"]) == {"ok"}
    names = {"human": "user", "gpt": "assistant"}
    assert frame["conversations"].to_list() == [
        [{"role": names[t["from"]], "text": t["value"]} for t in row["conversations"]] for row in rows
    ]


def test_fixture_of_clip_retrieval(data_root, tmp_path) -> None:
    frame = ingested(data_root / "fixtures/clip_retrieval", tmp_path / "out")
    assert len(frame) == 4 + 3 + 2 + 2
    assert set(frame["status"]) == {"missing_caption"}  # images only
    assert frame["sha256"].null_count() == 0 and frame["width"].null_count() == 0


def test_fixtures_of_data_juicer(data_root, tmp_path) -> None:
    folder = data_root / "fixtures/data_juicer"
    expected = ["A comfortable bed.", "A bus.", "Black and white photograph of a woman holding an umbrella."]
    frame = ingested(folder / "demo-dataset-images-bytes.parquet", tmp_path / "bytes")
    assert facts(frame, "caption", "status") == [(caption, "ok") for caption in expected]
    files = [hashlib.sha256((folder / n).read_bytes()).digest() for n in ("img1.png", "img2.jpg", "img3.jpg")]
    assert frame["sha256"].to_list() == files
    frame = ingested(folder / "demo-dataset-images.jsonl", tmp_path / "paths")
    assert facts(frame, "caption", "status") == [(caption, "unsafe_path") for caption in expected]
    assert all("'..'" in error for error in frame["error"])


def test_fixture_of_llama_factory(data_root, tmp_path) -> None:
    rows = json.loads((data_root / "fixtures/llama_factory/mllm_demo.json").read_text())
    frame = ingested(data_root / "fixtures/llama_factory/mllm_demo.json", tmp_path / "out")
    assert frame["status"].to_list() == ["ok" if len(row["images"]) == 1 else "multi_image" for row in rows]
    assert [[t["text"] for t in turns] for turns in frame["conversations"]] == [
        [t["content"] for t in row["messages"]] for row in rows
    ]


@pytest.mark.parametrize("name", ["pretrain", "sft_single", "sft_multi"])
def test_fixtures_of_xtuner(data_root, tmp_path, name) -> None:
    (path,) = (data_root / "fixtures/xtuner").glob(f"mllm_{name}_image*.jsonl")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    frame = ingested(path, tmp_path / "out")
    assert frame["key"].n_unique() == len(frame) == len(rows)
    for row, status, turns in zip(rows, frame["status"], frame["conversations"], strict=True):
        parts = [p for t in row["messages"] if isinstance(t["content"], list) for p in t["content"]]
        images = sum(part["type"] == "image_url" for part in parts)
        expected = {0: Status.TEXT_ONLY, 1: Status.MISSING_IMAGE}.get(images, Status.MULTI_IMAGE)
        assert status == expected  # their images are named below a folder that is not there
        assert len(turns) == len(row["messages"])
