"""Bad images and captions in tars, tables, JSON and Parquet: each row keeps its own status and error."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter

import numpy as np
import open_clip
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import aligncurate
from tests.support.inputs import cli, encoded, ingested, jpeg, picture, statuses, write_tar


def claiming(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header claims this size."""

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
    "only-its-head": ("jpg", jpeg()[:10], "decode_error", "JPEG file that is damaged"),
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
    "utf-16": ("dog".encode("utf-16"), "ok", None),
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


def test_missing_images_in_rows(tmp_path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "folder.jpg").mkdir()
    images = {
        "gone.jpg": "missing_image", "0.jpg/inside": "missing_image", "": "missing_image", "  ": "missing_image",
        "folder.jpg": "read_error", "x" * 300 + ".jpg": "missing_image", "a\0b.jpg": "missing_image",
        "half\ud800.jpg": "missing_image", " 0.jpg ": "ok",
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


def test_unsafe_paths(tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for folder in (root, tmp_path):
        (folder / "0.jpg").write_bytes(jpeg())
    unsafe = ["../0.jpg", "a/../../0.jpg", "./../root/0.jpg", "..", str(tmp_path / "0.jpg"), "/etc/passwd",
              f"{root}x/0.jpg", "file:///etc/passwd"]  # fmt: skip
    addresses = ["http://x/0.jpg", "s3://bucket/0.jpg", "memory://0.jpg"]
    safe = ["0.jpg", "./0.jpg", str(root / "0.jpg")]
    rows = [{"image": image, "caption": "c"} for image in (*unsafe, *addresses, *safe)]
    (root / "a.json").write_text(json.dumps(rows))
    frame = ingested(root / "a.json", tmp_path / "out", image_root=str(root))
    assert statuses(frame) == ["unsafe_path"] * 8 + ["missing_image"] * 3 + ["ok"] * 3
    # Addresses are not even kept, so that no later verb follows them.
    assert frame["image_path"].to_list()[:11] == [*unsafe, *[None] * 3]
    assert frame["sha256"].null_count() == 11
    assert all("download" in error for error in frame["error"][8:11])


def test_unsafe_paths_stay_unread_when_a_dataset_is_scored_later(tmp_path, mini) -> None:
    (tmp_path / "a.json").write_text('[{"image": "/etc/hostname", "caption": "c"}]')
    ingested(tmp_path / "a.json", tmp_path / "out")
    scored = aligncurate.score(tmp_path / "out", tmp_path / "scored", **mini, quiet=True).dataset
    (row,) = scored.scan().collect().iter_rows(named=True)
    assert row["status"] == "unsafe_path" and row["sha256"] is None
