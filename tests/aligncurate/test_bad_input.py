"""Bad input: each kind has its own status or its own sentence, and no row is lost."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import aligncurate
from aligncurate.dataset.record import FINE
from aligncurate.errors import ShardError, UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, encoded, ingested, jpeg, pairs, picture, read_all, tar_bytes, write_tar


def claiming(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says it has so many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(9), exif=exif)


DEEP = np.linspace(0, 65_535, 48 * 40).reshape(40, 48).astype(np.uint16)
ANIMATED = {"save_all": True, "append_images": [picture(1)]}

# name: (ending, bytes, status, part of the error)
IMAGES = {
    "good": ("jpg", jpeg(), "ok", None),
    "empty": ("jpg", b"", "decode_error", "empty"),
    "truncated": ("jpg", jpeg(1, width=300, height=300)[:3_000], "decode_error", "damaged"),
    "only-its-head": ("jpg", jpeg()[:10], "decode_error", "not an image"),
    "web-page": ("jpg", b"<!DOCTYPE html><title>403 Forbidden</title>", "decode_error", "web page"),
    "text": ("jpg", b"Not Found", "decode_error", "text"),
    "garbage": ("jpg", bytes(range(256)) * 8, "decode_error", "not an image"),
    "alpha": ("png", encoded(picture(2, mode="RGBA"), "PNG"), "ok", None),
    "palette": ("png", encoded(picture(3).quantize(16), "PNG"), "ok", None),
    "palette-alpha": ("png", encoded(picture(3).quantize(16), "PNG", transparency=bytes(range(16))), "ok", None),
    "sixteen-bit": ("png", encoded(Image.fromarray(DEEP), "PNG"), "ok", None),
    "cmyk": ("jpg", encoded(picture(4, mode="CMYK")), "ok", None),
    "grey": ("jpg", encoded(picture(5, mode="L")), "ok", None),
    "webp": ("webp", encoded(picture(6), "WEBP"), "ok", None),
    "gif": ("gif", encoded(picture(7), "GIF"), "ok", None),
    "animated": ("gif", encoded(picture(8), "GIF", **ANIMATED), "ok", None),
    "sideways": ("jpg", sideways(), "ok", None),
    "broken-exif": ("jpg", encoded(picture(9), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff??"), "ok", None),
    "wrong-ending": ("png", jpeg(10), "ok", None),
    "one-pixel": ("png", encoded(picture(1, 1, 1), "PNG"), "ok", None),
    "hair": ("png", encoded(picture(1, 20_000, 1), "PNG"), "too_large", "20000x1.*narrow"),
    "bomb": ("png", claiming(60_000, 60_000), "too_large", "89,478,485"),
    "small-bomb": ("png", claiming(9_460, 9_460), "too_large", "9460x9460.*89,478,485"),
}
SIZES = {"sideways": (40, 48), "one-pixel": (1, 1), "hair": (20_000, 1), "sixteen-bit": (48, 40), "animated": (48, 40)}

WORDS = "a dog runs over green grass and " * 3_125  # 100,000 characters
# name: (bytes or None, status, part of the error)
CAPTIONS = {
    "fine": (b"a dog", "ok", None),
    "none": (None, "missing_caption", "no caption"),
    "nothing": (b"", "missing_caption", "empty"),
    "blank": (b" \n\t ", "missing_caption", "empty"),
    "placeholder": (b"<image>", "missing_caption", "empty"),
    "latin-1": ("café".encode("latin-1"), "invalid_caption", "UTF-8.*character 3"),
    "utf-16": ("dog".encode("utf-16"), "invalid_caption", "UTF-8"),
    "long": (WORDS.encode(), "ok", None),
    "endless": (b"woof" * 25_000, "ok", None),
    "nul": (b"a\0b", "ok", None),
    "emoji": ("🐕 犬 كلب".encode(), "ok", None),
    "markup": (b"[bold]<b>&amp; \x1b[31m{} %s", "ok", None),
}


def samples() -> dict[str, dict[str, bytes]]:
    found = {name: {ending: data, "txt": b"a picture"} for name, (ending, data, _, _) in IMAGES.items()}
    for name, (caption, _, _) in CAPTIONS.items():
        found[name] = {"jpg": jpeg()} | ({} if caption is None else {"txt": caption})
    return found


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, mini) -> pl.DataFrame:
    """All of these in one tar, scored."""
    folder = tmp_path_factory.mktemp("zoo")
    tar = write_tar(folder / "zoo.tar", samples())
    run = aligncurate.score(tar, folder / "out", **mini, embeddings="fp16", quiet=True)
    return run.dataset.scan().collect()


def row_of(frame: pl.DataFrame, key: str) -> dict:
    return frame.row(by_predicate=pl.col("key") == key, named=True)


def test_nothing_is_lost(zoo) -> None:
    assert zoo["key"].to_list() == [*IMAGES, *CAPTIONS]
    statuses = [v[-2] for v in (*IMAGES.values(), *CAPTIONS.values())]
    assert Counter(zoo["status"]) == Counter(statuses)
    assert zoo["sha256"].null_count() == 0


@pytest.mark.parametrize("name", [*IMAGES, *CAPTIONS])
def test_each_has_its_status_and_sentence(zoo, name) -> None:
    status, sentence = (IMAGES | CAPTIONS)[name][-2:]
    row = row_of(zoo, name)
    assert row["status"] == status, row["error"]
    assert (row["score"] is not None) == (row["image_embedding"] is not None) == (status == "ok")
    if sentence is None:
        assert row["error"] is None
    else:
        assert pl.Series([row["error"]]).str.contains(sentence).all(), row["error"]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_upright_image(zoo, name) -> None:
    row = row_of(zoo, name)
    assert (row["width"], row["height"]) == SIZES[name]


def test_captions_are_kept_whole(zoo) -> None:
    assert row_of(zoo, "long")["caption"] == WORDS.strip()
    assert row_of(zoo, "endless")["caption"] == "woof" * 25_000
    assert row_of(zoo, "markup")["caption"] == CAPTIONS["markup"][0].decode()
    assert row_of(zoo, "nul")["caption"] == "a\0b"


def test_what_is_ok_has_the_score_of_a_plain_loop(zoo, mini) -> None:
    open_clip.add_model_config(str(mini["model_config"]))
    model, _, preprocess = open_clip.create_model_and_transforms("mini-clip", pretrained=str(mini["pretrained"]))
    tokenizer, unit = open_clip.get_tokenizer("mini-clip"), torch.nn.functional.normalize
    model.eval()
    for name in ("good", "alpha", "palette", "cmyk", "grey", "webp", "gif", "one-pixel", "long", "endless", "emoji"):
        sample = samples()[name]
        data = next(v for k, v in sample.items() if k != "txt")
        with torch.no_grad():
            image = unit(model.encode_image(preprocess(Image.open(io.BytesIO(data)))[None]), dim=-1)
            text = unit(model.encode_text(tokenizer([sample["txt"].decode()])), dim=-1)
        assert row_of(zoo, name)["score"] == pytest.approx(float(image @ text.T), abs=1e-5), name


def test_the_form_of_the_source_changes_no_status(zoo, mini, tmp_path) -> None:
    facts = ["key", "status", "error", "width"]
    expected = zoo.head(len(IMAGES)).select(*facts, "score")
    rows = [{"id": n, "caption": "a picture", "image": f"{n}.{ending}"} for n, (ending, *_) in IMAGES.items()]
    for row, (_, data, _, _) in zip(rows, IMAGES.values(), strict=True):
        (tmp_path / row["image"]).write_bytes(data)
    pl.DataFrame(rows).write_csv(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pl.DataFrame(rows).with_columns(image=pl.Series([d for _, d, _, _ in IMAGES.values()])).write_parquet(
        tmp_path / "a.parquet"
    )
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        run = aligncurate.score(tmp_path / name, tmp_path / f"out-{name}", **mini, quiet=True)
        found = run.dataset.scan().collect()
        assert found.select(facts).rows() == expected.select(facts).rows(), name
        # Other neighbours in a batch may change a score's last bits.
        scores = (frame["score"].fill_null(9).to_numpy() for frame in (found, expected))
        np.testing.assert_allclose(*scores, atol=1e-6, rtol=0, err_msg=name)


def test_a_score_run_with_bad_rows_ends_well_and_counts_them(tmp_path, mini) -> None:
    tar = write_tar(tmp_path / "a.tar", samples())
    options = [v for name in mini for v in (f"--{name.replace('_', '-')}", mini[name])]
    result = cli("score", tar, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0
    for status, count in Counter(v[-2] for v in (*IMAGES.values(), *CAPTIONS.values())).items():
        assert f"{status} {count}" in result.stdout
    again = cli("score", tar, "--out", tmp_path / "out", *options)
    assert again.exit_code == 0 and "earlier run" in again.stdout


# --- captions and rows in every form ---------------------------------------------------------------------------------


def statuses(frame: pl.DataFrame) -> list[str]:
    return frame["status"].to_list()


def test_captions_that_are_not_utf8(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    bad = b"caf\xe9 time"
    (tmp_path / "a.csv").write_bytes(b"image,caption\n0.jpg," + bad + b"\n0.jpg,fine\n0.jpg,fine\n")
    (tmp_path / "a.tsv").write_bytes(b"0.jpg\t" + bad + b"\n0.jpg\tfine\n0.jpg\tfine\n")
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
    assert statuses(frame) == ["missing_caption"] * 4 + ["ok", "ok", "missing_caption", "ok", "missing_caption"]
    assert frame["caption"].to_list()[4:8] == ["nan", "5", None, "first"]
    (tmp_path / "a.csv").write_text('image,caption\n0.jpg,\n0.jpg,""\n0.jpg,x\n0.jpg\n')
    assert statuses(ingested(tmp_path / "a.csv", tmp_path / "csv")) == ["missing_caption"] * 2 + [
        "ok",
        "missing_caption",
    ]
    table = pa.table({"image": [jpeg()] * 3, "caption": pa.array([None, float("nan"), 1.5])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert statuses(ingested(tmp_path / "a.parquet", tmp_path / "pq")) == ["missing_caption"] * 2 + ["ok"]


def test_missing_images_in_rows(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "folder.jpg").mkdir()
    images = {
        "gone.jpg": "missing_image", "0.jpg/inside": "missing_image", "": "missing_image", "  ": "missing_image",
        "folder.jpg": "read_error", "x" * 300 + ".jpg": "read_error", "a\0b.jpg": "read_error",
        "half\ud800.jpg": "read_error", " 0.jpg ": "ok",
    }  # fmt: skip
    rows = [{"image": name, "caption": "c"} for name in images]
    rows += [
        {"image": None, "caption": "c"},
        {"caption": "c"},
        {"image": [], "caption": "c"},
        {"image": {}, "caption": "c"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    frame = ingested(tmp_path / "a.json", tmp_path / "out")
    assert statuses(frame) == [*images.values(), *["missing_image"] * 4]
    assert frame["error"].null_count() == 1 and "gone.jpg" in frame["error"][0]
    table = pa.table({"image": pa.array([None, b"", jpeg()]), "caption": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert statuses(ingested(tmp_path / "a.parquet", tmp_path / "pq")) == ["missing_image", "decode_error", "ok"]


def test_samples_without_an_image(tmp_path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    members = {
        "a": {"txt": b"alone"},
        "b": {"json": json.dumps({"conversations": turns}).encode()},
        "README": {"md": b"x"},
    }
    write_tar(tmp_path / "a.tar", members | pairs(1))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame)[:2] == ["missing_image", "text_only"] and statuses(frame)[3] == "ok"
    assert statuses(frame)[2] in ("missing_image", "missing_caption")


def test_unsafe_paths(tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for folder in (root, tmp_path):
        (folder / "0.jpg").write_bytes(jpeg())
    unsafe = ["../0.jpg", "a/../../0.jpg", "./../root/0.jpg", "..", str(tmp_path / "0.jpg"), "/etc/passwd",
              f"{root}x/0.jpg", f"{root}/../0.jpg"]  # fmt: skip
    addresses = ["http://x/0.jpg", "file:///etc/passwd", "s3://bucket/0.jpg", "memory://0.jpg"]
    safe = ["0.jpg", "./0.jpg", str(root / "0.jpg")]
    rows = [{"image": image, "caption": "c"} for image in (*unsafe, *addresses, *safe)]
    (root / "a.json").write_text(json.dumps(rows))
    frame = ingested(root / "a.json", tmp_path / "out", image_root=str(root))
    assert statuses(frame) == ["unsafe_path"] * 8 + ["missing_image"] * 4 + ["ok"] * 3
    # Addresses are not even kept, so that no later verb follows them.
    assert frame["image_path"].to_list()[:12] == [*unsafe, *[None] * 4]
    assert frame["sha256"].null_count() == 12
    assert all("download" in error for error in frame["error"][8:12])


def test_unsafe_paths_stay_unread_when_a_dataset_is_scored_later(tmp_path, mini) -> None:
    (tmp_path / "a.json").write_text('[{"image": "/etc/hostname", "caption": "c"}]')
    ingested(tmp_path / "a.json", tmp_path / "out")
    scored = aligncurate.score(tmp_path / "out", tmp_path / "scored", **mini, quiet=True).dataset
    (row,) = scored.scan().collect().iter_rows(named=True)
    assert row["status"] == "unsafe_path" and row["sha256"] is None


def test_links_in_tars_are_not_followed(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("b.jpg", tarfile.LNKTYPE, "a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
            text = tarfile.TarInfo(name.replace("jpg", "txt"))
            text.size = 4
            tar.addfile(text, io.BytesIO(b"text"))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["read_error"] * 2 and frame["sha256"].null_count() == 2
    assert "a.jpg is a link" in frame["error"][0]


def test_rows_that_cannot_be_parsed(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    good = '{"image": "0.jpg", "caption": "c"}'
    turns = ['"text"', "[1]", '[{"from": "human"}]', '[{"role": 1, "content": "x"}]',
             '[{"role": "user", "content": ["x"]}]', '[{"role": "user", "content": {"a": 1}}]']  # fmt: skip
    broken = ["{", "[1, 2]", "7", "null", '"text"', '{"image": "0.jpg", "caption": "cut o', "[" * 100_000, "{'a': 1}",
              *(f'{{"image": "0.jpg", "conversations": {t}}}' for t in turns)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join([good, *broken, good]))
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out")
    assert statuses(frame) == ["ok", *["invalid_row"] * len(broken), "ok"]
    assert frame["error"].null_count() == 2 and frame["row"].to_list() == list(range(len(broken) + 2))
    assert frame["key"].n_unique() == len(frame)
    again = ingested(tmp_path / "out", tmp_path / "again")
    assert again.equals(frame)


def test_json_members_that_cannot_be_parsed(tmp_path) -> None:
    broken = [b"{", b"[1]", b"", b"null", b"\xff\xfe", b"[" * 100_000]
    members = {f"b{i}": {"jpg": jpeg(), "txt": b"x", "json": data} for i, data in enumerate(broken)}
    write_tar(tmp_path / "a.tar", members | pairs(2))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["invalid_row"] * 2 + ["ok"] + ["invalid_row"] * 3 + ["ok"] * 2
    assert ".json" in frame["error"][0]


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_same_key_twice_in_a_tar(tmp_path) -> None:
    members = [("a.jpg", jpeg(0)), ("a.txt", b"one"), ("b.jpg", jpeg(1)), ("b.txt", b"two"), ("a.jpg", jpeg(2)),
               ("a.txt", b"three"), ("c.jpg", jpeg(3)), ("c.txt", b"x"), ("c.jpg", jpeg(4)),
               ("c.txt", b"y")]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"].to_list() == ["a", "b", "a", "c", "c"]
    assert statuses(frame) == ["ok", "ok", "duplicate_key", "ok", "duplicate_key"]
    assert frame["caption"].to_list() == ["one", "two", "three", "x", "y"]
    assert "next to each other" in frame["error"][2]


def test_files_of_a_sample_that_lie_apart(tmp_path) -> None:
    images, texts = ([(f"{i}.{e}", d) for i in range(3)] for e, d in (("jpg", jpeg()), ("txt", b"text")))
    (tmp_path / "a.tar").write_bytes(tar_bytes([*images, *texts]))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["missing_caption"] * 3 + ["duplicate_key"] * 3


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


# --- damaged tars ----------------------------------------------------------------------------------------------------


def cut_points(data: bytes) -> dict[str, int]:
    """Where to cut a tar of three pairs: around the third member, which is the second image."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmembers()[2]
    return {
        "at a member": member.offset,
        "inside a header": member.offset + 200,
        "after a header": member.offset_data,
        "inside an image": member.offset_data + 300,
        "inside the padding": member.offset_data + member.size + 1,
    }


@pytest.mark.parametrize("where", cut_points(tar_bytes([("a", b"")] * 3)))
def test_a_tar_cut_in_the_middle(tmp_path, where) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(3)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: cut_points(whole)[where]])
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"][0] == "s0" and statuses(frame)[0] == "ok"
    assert frame["status"][-1] == "read_error" and frame["key"][-1] == "a.tar"
    assert "copy it again" in frame["error"][-1]
    between = frame[1:-1]
    if where in ("after a header", "inside an image"):
        assert between.select("key", "status").rows() == [("s1", "read_error")]
        assert "middle of s1.jpg" in between["error"][0]
    elif where == "inside the padding":
        assert between["key"].to_list() == ["s1"]  # its image is whole, its text is gone
    else:
        assert len(between) == 0
    again = ingested(tmp_path / "out", tmp_path / "again")
    assert statuses(again)[-1] == "read_error"


def test_a_member_that_claims_a_negative_size(tmp_path) -> None:
    data = bytearray(tar_bytes([("a.jpg", jpeg()), ("a.txt", b"x")]))
    data[124:136] = b"\xff" * 10 + struct.pack(">h", -1_024)  # base 256, as GNU tar writes large sizes
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert read_error_or_refused(tmp_path / "a.tar")


def read_error_or_refused(path: Path) -> bool:
    try:
        frame = ingested(path, path.with_suffix(".out"))
    except AssertionError as error:
        return "not a tar" in str(error)
    return "read_error" in statuses(frame)


def test_empty_tars(tmp_path) -> None:
    (tmp_path / "zero.tar").write_bytes(b"")
    frame = ingested(tmp_path / "zero.tar", tmp_path / "zero")
    assert frame.select("key", "status").rows() == [("zero.tar", "read_error")] and "0 bytes" in frame["error"][0]
    (tmp_path / "empty.tar").write_bytes(tar_bytes([]))
    result = cli("ingest", tmp_path / "empty.tar", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "no pairs" in result.stdout
    assert aligncurate.open_dataset(tmp_path / "out").rows == 0


def test_a_dataset_of_no_rows_goes_through_every_verb(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([]))
    assert cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "out").exit_code == 0
    assert cli("inspect", tmp_path / "out").exit_code == 0
    assert json.loads(cli("inspect", tmp_path / "out", "--json").stdout)["rows"] == 0
    assert cli("ingest", tmp_path / "out", "--out", tmp_path / "again").exit_code == 0
    assert cli("filter", tmp_path / "out", "--out", tmp_path / "some", "--sample", 3).exit_code == 0
    assert "score" in complaint(cli("bucket", tmp_path / "out", "--out", tmp_path / "levels"))
    for form in ("webdataset", "llava-json", "datacomp-uids"):
        assert cli("export", tmp_path / "out", "--out", tmp_path / form, "--format", form).exit_code == 0


def test_garbage_named_tar_is_a_row_and_does_not_stop_the_others(tmp_path) -> None:
    write_tar(tmp_path / "1.tar", pairs(2))
    for name, data in {"2.tar": b"garbage" * 300, "3.tar": b"PK\3\4" + bytes(600), "4.tar": jpeg()}.items():
        (tmp_path / name).write_bytes(data)
    frame = ingested(tmp_path, tmp_path / "out")
    assert statuses(frame) == ["ok", "ok", "read_error", "read_error", "read_error"]
    assert all("no tar" in error for error in frame["error"][2:])
    assert frame["key"].to_list()[2:] == ["2.tar", "3.tar", "4.tar"]


def test_a_damaged_tar_in_the_image_root(tmp_path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.tar").write_bytes(b"garbage" * 300)
    (tmp_path / "a.csv").write_text("image,caption\n0.jpg,x\n")
    result = cli("ingest", tmp_path / "a.csv", "--out", tmp_path / "out", "--image-root", tmp_path / "root")
    assert "a.tar: the file is no tar; copy it again" in complaint(result)


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


@pytest.mark.parametrize("kind", ["tar", "parquet", "json", "jsonl", "csv", "tsv", "sidecar"])
def test_random_damage_gives_only_plain_errors(tmp_path, kind) -> None:
    """Whatever bytes are wrong, reading ends with rows or with one of our own errors."""
    (tmp_path / "0.jpg").write_bytes(jpeg(width=8, height=8))
    rows = [{"id": i, "image": "0.jpg", "caption": f"c {i}", "n": i / 2, "tags": ["a", "b"]} for i in range(4)]
    flat = pl.DataFrame([{k: v for k, v in row.items() if k != "tags"} for row in rows])
    buffer = io.BytesIO()
    tar = tar_bytes(
        (f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", b"image"), ("txt", b"c"), ("json", b'{"a":1}'))
    )
    pl.DataFrame([{"key": str(i), "url": "u"} for i in range(3)]).write_parquet(buffer)
    sidecar = buffer.getvalue()
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    good = {
        "tar": tar,
        "parquet": buffer.getvalue(),
        "json": json.dumps(rows).encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "csv": flat.write_csv().encode(),
        "tsv": flat.write_csv(separator="\t").encode(),
        "sidecar": sidecar,
    }[kind]
    path = tmp_path / ("a.parquet" if kind == "sidecar" else f"a.{kind}")
    source = tmp_path / "a.tar" if kind == "sidecar" else path
    if kind == "sidecar":
        source.write_bytes(tar)
    rng = np.random.default_rng(0)
    for _ in range(120):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(len(data), size=rng.integers(1, 6))] = rng.choice([0, 10, 34, 44, 93, 125, 255, *range(5)])
        path.write_bytes(data.tobytes()[: rng.choice([len(data), rng.integers(len(data))])])
        try:
            opened = open_source(str(source))
            for shard in opened.shards:
                for pair in opened.read(shard):
                    assert pair.key and pair.source
                    assert (pair.status in FINE) == (pair.error is None)
        except (UserError, ShardError, OSError):
            continue


# --- mistakes about a whole input ------------------------------------------------------------------------------------


def parquet_bytes(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


# file name, content, what the sentence says
REFUSED = [
    ("a.parquet", parquet_bytes(size=[1], colour=["red"]), "no column with captions .*it has size, colour"),
    ("a.parquet", parquet_bytes(url=["http://x"], text=["c"]), "no column with images .*addresses.*img2dataset"),
    ("a.parquet", parquet_bytes(image=pa.array([], pa.binary()), caption=pa.array([], pa.string())), "no rows at all"),
    ("a.parquet", b"", "not a Parquet file"),
    ("a.parquet", b"PAR1 but nothing else PAR1", "not a Parquet file"),
    ("a.parquet", b'{"image": "0.jpg"}', "not a Parquet file"),
    ("a.json", b"", "not a JSON file"),
    ("a.json", b"this is no JSON", "not a JSON file"),
    ("a.json", b'[{"image": "0.jpg", "caption": "cut', "not a JSON file"),
    ("a.json", b'{"image": "0.jpg"}\n{"image": "1.jpg"}\n', "not a JSON file"),
    ("a.json", b"[" * 100_000, "not a JSON file.*deep"),
    ("a.json", b"[]", "no rows at all"),
    ("a.json", b"7", "neither a list of rows nor COCO"),
    ("a.json", b'{"a": 1}', "neither a list of rows nor COCO"),
    ("a.json", b"[1, 2]", "no objects"),
    ("a.json", b'[{"size": 1}]', "no column with captions.*it has size"),
    ("a.json", b'{"images": [], "annotations": []}', "no rows at all"),
    (
        "a.json",
        b'{"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}',
        "captions_",
    ),
    ("a.json", b"\x89PNG\r\n\x1a\n\0\0", "not a JSON file"),
    ("a.jsonl", b"", "no rows at all"),
    ("a.jsonl", b"\n\n", "no rows at all"),
    ("a.jsonl", b"not json\nat all\n", "not a JSONL file"),
    ("a.csv", b"", "no rows at all"),
    ("a.csv", b"\n \n", "no rows at all"),
    ("a.csv", b"image,caption\n", "no rows at all"),
    ("a.csv", b"size,colour\n1,red\n", "no column with captions.*it has size, colour"),
    ("a.csv", b"image,caption\na.jpg,b,c,d\n", "not a table that can be read"),
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pears.tar"], "there is no such file or folder; did you mean .*pairs.tar"),
        (["pairs-{0..1}.tar"], "pairs-0.tar.*no such file"),
        (["pairs{.tar"], "no such file"),
        (["*.jsonl"], "no file matches"),
        (["nowhere/pairs.tar"], "no such file"),
        (["x" * 300], "no such file"),
        (["empty"], "the folder is empty"),
        (["images"], "only images"),
        (["notes"], "no tars, Parquet"),
        (["pairs.tar", "--format", "dataset"], "not a dataset"),
        (["images", "--format", "table"], "no files for --format table"),
        (["t.csv", "--caption-column", "captoin"], "--caption-column captoin.*it has image, caption"),
        (["t.csv", "--image-column", "picture"], "--image-column picture.*it has image, caption"),
        (["t.csv", "--image-root", "nowhere"], "--image-root .*no such folder"),
        (["t.csv", "--image-root", "notes/x.md"], "--image-root .*neither a folder nor a tar"),
        (["pairs.tar", "--limit", "0"], "--limit 0.*at least 1"),
        (["pairs.tar", "--workers", "-2"], "--workers -2.*at least 1"),
        (["t.csv", "--rows-per-shard", "0"], "--rows-per-shard 0.*at least 1"),
        (["nosuch://bucket/a.tar"], "nosuch"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_mistakes_in_arguments(tmp_path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("pairs.tar"), pairs(1))
    for folder in ("empty", "images", "notes"):
        Path(folder).mkdir()
    Path("images/0.jpg").write_bytes(jpeg())
    Path("notes/x.md").write_text("x")
    Path("t.csv").write_text("image,caption\nimages/0.jpg,c\n")
    found = complaint(cli("ingest", *arguments, "--out", "out"))
    assert pl.Series([found]).str.contains(sentence).all(), found
    assert not Path("out").exists()


def test_an_output_folder_that_is_taken(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(3))
    other = write_tar(tmp_path / "b.tar", pairs(3))
    out = tmp_path / "out"
    assert cli("ingest", tar, "--out", out).exit_code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for arguments in (
        (tar, "--limit", 2),
        (tar, "--embed-images"),
        (other,),
        (tar, other),
        (tar, "--caption-column", "x"),
    ):
        found = complaint(cli("ingest", *arguments, "--out", out))
        assert "made with other options" in found and "before" in found and "now" in found
    assert "embed_images: false before, true now" in complaint(cli("ingest", tar, "--embed-images", "--out", out))
    assert "nothing is changed in place" in complaint(cli("filter", out, "--sample", 1, "--out", out))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert cli("ingest", tar, "--out", out).exit_code == 0


def test_an_output_that_is_a_file_or_a_strangers_folder(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    assert "this is a file" in complaint(cli("ingest", tar, "--out", tar))
    assert complaint(cli("ingest", tar, "--out", tar / "below"))
    assert "holds other files (a.tar)" in complaint(cli("ingest", tar, "--out", tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/manifest.json").write_text("{")
    assert "not a JSON file" in complaint(cli("ingest", tar, "--out", tmp_path / "bad"))
    for text in ("[]", "{}", "7"):
        (tmp_path / "bad/manifest.json").write_text(text)
        complaint(cli("ingest", tar, "--out", tmp_path / "bad"))
        complaint(cli("inspect", tmp_path / "bad"))


@pytest.fixture
def little_space():
    """Lets files grow to so many bytes only, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def allow(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 3_000, 30_000])
def test_no_space_left(tmp_path, little_space, size) -> None:
    samples = {f"s{i}": {"jpg": jpeg(i, width=200, height=200), "txt": b"x"} for i in range(30)}
    tar, out = write_tar(tmp_path / "a.tar", samples), tmp_path / "out"
    little_space(size)
    result = cli("ingest", tar, "--out", out, "--embed-images", "--quiet")
    little_space(resource.RLIM_INFINITY)
    assert "File too large" in complaint(result, code=1)
    assert not list(out.glob("part-*"))
    assert not list(out.glob(".tmp-*"))
    assert cli("ingest", tar, "--out", out, "--embed-images").exit_code == 0
    fresh = aligncurate.ingest(tar, tmp_path / "fresh", embed_images=True, quiet=True).dataset
    assert (out / "part-00000.parquet").read_bytes() == fresh.files[0].read_bytes()


# Root may write everywhere, unless it gives up the two capabilities that let it. The bounding set is applied by exec.
_WITHOUT_ROOT = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
for capability in (1, 2): libc.prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "aligncurate.cli.app", *sys.argv[1:]])
"""


def as_nobody_special(*arguments: object) -> subprocess.CompletedProcess:
    code = _WITHOUT_ROOT.replace('"-m", "aligncurate.cli.app"', '"-c", "from aligncurate.cli.app import main; main()"')
    command = [sys.executable, "-c", code, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="drops capabilities with prctl")
def test_no_permission(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "closed").mkdir(mode=0o555)
    result = as_nobody_special("ingest", tar, "--out", tmp_path / "closed/out")
    assert (result.returncode, result.stderr) == (2, f"error: {tmp_path}/closed/out: Permission denied.\n")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "1.jpg").chmod(0)
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,closed\n2.jpg,open\n")
    result = as_nobody_special("ingest", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    frame = aligncurate.open_dataset(tmp_path / "out").scan().collect()
    assert statuses(frame) == ["read_error", "ok"] and "Permission denied" in frame["error"][0]
    tar.chmod(0)
    result = as_nobody_special("ingest", tar, "--out", tmp_path / "closed-tar")
    assert result.returncode in (1, 2) and "Permission denied" in result.stderr and "Traceback" not in result.stderr


def test_a_source_that_vanishes_between_listing_and_reading(tmp_path) -> None:
    tars = [write_tar(tmp_path / f"{i}.tar", pairs(1)) for i in range(2)]
    source = open_source([str(t) for t in tars])
    os.remove(tars[1])
    assert [p.key for p in source.read(source.shards[0])] == ["s0"]
    with pytest.raises(OSError, match=r"1\.tar"):
        list(source.read(source.shards[1]))


def test_sidecars_that_cannot_be_used_are_left_alone(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    for data in (b"", b"garbage", parquet_bytes(nothing=["like it"]), parquet_bytes(key=["other"], url=["u"])):
        (tmp_path / "a.parquet").write_bytes(data)
        assert [p.caption for p in read_all(tmp_path / "a.tar")] == ["caption 0", "caption 1"]


def test_a_table_option_for_a_missing_field_of_later_rows(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "a.jsonl").write_text('{"image": "0.jpg", "alt": "x"}\n{"image": "0.jpg"}\n{"alt": "y"}\n')
    frame = ingested(tmp_path / "a.jsonl", tmp_path / "out", caption_column="alt")
    assert statuses(frame) == ["ok", "missing_caption", "missing_image"]
    assert SourceOptions().rows_per_shard == 10_000
