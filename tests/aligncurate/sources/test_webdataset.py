"""Samples of tars: the same as webdataset's own reader finds, and what it has no answer to."""

from __future__ import annotations

import io
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligncurate.sources import img2dataset, samples
from aligncurate.sources.detect import open_source
from tests.support.inputs import (
    cli,
    complaint,
    encoded,
    ingested,
    jpeg,
    pairs,
    picture,
    read_all,
    statuses,
    tar_bytes,
    write_tar,
)

KEYS = st.text("abcdefg012_- ü图", min_size=1, max_size=9).filter(lambda key: key.strip())
FOLDERS = st.sampled_from(["", "./", "a/", "v1.0/", "a b/c.d/", "/"])
OTHERS = st.dictionaries(st.sampled_from(["cls", "npy", "seg.txt", "JSON", "Txt"]), st.binary(max_size=600))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(FOLDERS, KEYS, OTHERS), min_size=1, max_size=8, unique_by=lambda s: s[0] + s[1]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_samples_are_those_of_webdataset(tmp_path_factory, found, form) -> None:
    wds = pytest.importorskip("webdataset.tariterators")
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, (folder, key, others) in enumerate(found):
            files = {"jpg": jpeg(number), "txt": f"caption {number}".encode()}
            files |= {e: b"{}" if e == "JSON" else d for e, d in others.items() if e.lower() not in files}
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{folder}{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with path.open("rb") as file:
        files = wds.tar_file_expander([{"url": str(path), "stream": file}])
        expected = list(wds.group_by_keys(files))
    pairs_read = read_all(path)
    assert [pair.key for pair in pairs_read] == [sample["__key__"] for sample in expected]
    assert [pair.load() for pair in pairs_read] == [sample["jpg"] for sample in expected]
    assert [pair.caption for pair in pairs_read] == [sample["txt"].decode() for sample in expected]


# --- dots in keys ----------------------------------------------------------------------------------------------------


def members(*names: str) -> list[tuple[str, bytes]]:
    return [(name, jpeg(i) if name.endswith(("jpg", "png")) else name.encode()) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["22.05.jpg", "22.05.txt", "22.07.jpg", "22.07.txt"], ["22.05", "22.07"]),
        (["22.05.jpg", "22.07.jpg", "22.05.txt", "22.07.txt"], ["22.05", "22.07"]),
        (["Track 2.0 (clean).jpg", "Track 2.0 (clean).txt"], ["Track 2.0 (clean)"]),
        (["a/IMG.2024.01.png", "a/IMG.2024.01.caption", "b.jpg", "b.txt"], ["a/IMG.2024.01", "b"]),
        (["v.1.jpg", "v.1.txt", "v.jpg", "v.txt"], ["v.1", "v"]),
        (["a.input.jpg", "a.txt"], ["a"]),
        (["a.jpg", "a.txt", "a.cls.txt"], ["a"]),
    ],
)
def test_names_with_dots_are_pairs(tmp_path, names, keys) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members(*names)))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"].to_list() == keys and set(frame["status"]) == {"ok"}
    for key, caption in frame.select("key", "caption").iter_rows():
        assert caption.startswith(key)
    assert len(read_all(tmp_path / "a.tar")) == len(keys)  # and `count` agrees


def test_names_with_dots_that_make_no_pairs_are_named(tmp_path) -> None:
    """An image with its mask, or two images and one text: one sample, as webdataset says."""
    names = ["a.1.jpg", "a.2.jpg", "a.txt", "b.jpg", "b.seg.png", "b.txt", "c.in.jpg", "c.out.jpg", "c.prompt.txt"]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members(*names)))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame.select("key", "status").rows() == [(key, "multi_image") for key in "abc"]
    assert "a.1.jpg, a.2.jpg, a.txt" in frame["error"][0] and "first dot" in frame["error"][0]
    assert frame["caption"].to_list() == ["a.txt", "b.txt", None]
    assert frame["prompt.txt"].to_list() == [None, None, "c.prompt.txt"]  # no text is lost


# --- endings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["img", ".img", "IMG"])
def test_endings_that_the_user_names(tmp_path, option) -> None:
    write_tar(tmp_path / "a.tar", {k: {"img": jpeg(i), "Cap": b"a red box"} for i, k in enumerate("ab")})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out", image_column=option, caption_column="cap")
    assert frame.select("key", "caption", "status").rows() == [(key, "a red box", "ok") for key in "ab"]
    bare = ingested(tmp_path / "a.tar", tmp_path / "bare")
    assert statuses(bare) == ["missing_caption"] * 2
    assert "a.img, a.Cap" in bare["error"][0] and "--caption-column" in bare["error"][0]


@pytest.mark.parametrize("ending", ["img", "image", "jpg_large", "1", "jpg:large", "input"])
def test_images_with_unusual_endings_are_known_by_their_content(tmp_path, ending) -> None:
    files = {ending: jpeg(1), "txt": b"x"}
    with_mask = {"jpg": jpeg(2), "mask": encoded(picture(), "PNG"), "txt": b"y"}
    write_tar(tmp_path / "a.tar", {"a": files, "b": with_mask, "c": {"dat": b"\0\1data" * 9, "txt": b"z"}})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["ok", "ok", "missing_image"]
    assert frame["image_path"].to_list() == [f"a.{ending}", "b.jpg", None]
    assert "c.dat, c.txt" in frame["error"][2] and "--image-column" in frame["error"][2]


def test_a_named_image_ending_is_the_only_image(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(0), "mask.png": jpeg(1), "txt": b"x"}, "b": {"png": jpeg(2)}})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out", image_column="jpg")
    assert statuses(frame) == ["ok", "missing_image"] and "b.png" in frame["error"][1]


def test_a_sample_without_a_caption_lists_its_members(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "prompt": b"a box"}, "b": {"jpg": jpeg()}})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["missing_caption"] * 2
    assert "a.jpg, a.prompt (--caption-column)" in frame["error"][0]
    assert "only b.jpg" in frame["error"][1]
    assert frame["prompt"].to_list() == ["a box", None]
    assert ingested(tmp_path / "a.tar", tmp_path / "p", caption_column="prompt")["caption"][0] == "a box"


# --- hostile members -------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A member's header that claims any size, with a valid checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(text: bytes) -> bytes:
    """An extended header with one record, before a picture and its text."""
    record = next(b"%d %s\n" % (n, text) for n in range(4, 99) if len(b"%d %s\n" % (n, text)) == n)
    picture = header("b.jpg", len(jpeg(2))) + padded(jpeg(2)) + header("b.txt", 1) + padded(b"x")
    return header("pax", len(record), b"x") + padded(record) + picture


BEFORE = tar_bytes([("g.jpg", jpeg()), ("g.txt", b"good")]).rstrip(b"\0")
BEFORE = padded(BEFORE)
AFTER = {
    "a member of 10 GB": header("big.jpg", 10 << 30) + bytes(3000),
    "a member of more bytes than 64 bits count": header("big.jpg", 1 << 80) + bytes(3000),
    "a long name of 5 GB": header("././@LongLink", 5 << 30, b"L") + bytes(3000),
    "an extended header of 5 GB": header("pax", 5 << 30, b"x") + bytes(3000),
    "3,000 long names": (header("././@LongLink", 4, b"L") + padded(b"name")) * 3000,
    "3,000 extended headers": header("pax", 0, b"x") * 3000,
    "a size that is too large": pax(b"size=99999999999999999999"),
    "a negative size": pax(b"size=-99999"),
    "a sparse map of words": pax(b"GNU.sparse.map=0,x,9,nan"),
    "a sparse size of letters": pax(b"GNU.sparse.size=abc"),
    "another tar": bytes(1024) + BEFORE + bytes(1024),
}


@pytest.mark.parametrize("after", AFTER)
def test_what_comes_before_the_damage_is_kept(tmp_path, after) -> None:
    (tmp_path / "a.tar").write_bytes(BEFORE + AFTER[after])
    tracemalloc.start()
    try:
        frame = ingested(tmp_path / "a.tar", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
    assert frame.select("key", "caption", "status").row(0) == ("g", "good", "ok")
    assert frame["key"][-1] == "a.tar" and frame["status"][-1] == "read_error" and len(frame) <= 3
    assert set(frame["status"][1:]) == {"read_error"}


def test_an_encoding_that_is_not_text_is_damage_where_tarfile_stops_at_it(tmp_path) -> None:
    """Newer versions of Python read on: 3.11.10, 3.12.6, 3.13."""
    (tmp_path / "a.tar").write_bytes(BEFORE + pax(b"hdrcharset=\xff") + bytes(1024))
    try:
        with tarfile.open(tmp_path / "a.tar") as tar:
            expected = ["ok", "ok"] if tar.getnames() == ["g.jpg", "g.txt", "b.jpg", "b.txt"] else None
    except UnicodeDecodeError:
        expected = ["ok", "read_error"]
    assert statuses(ingested(tmp_path / "a.tar", tmp_path / "out")) == expected


def test_extended_headers_that_say_odd_things_do_no_harm(tmp_path) -> None:
    for text in (b"mtime=nan", b"mtime=1e999", b"uid=xx", b"hdrcharset=BINARY", b"comment=\xff"):
        (tmp_path / "a.tar").write_bytes(BEFORE + pax(text) + bytes(1024))
        assert [pair.key for pair in read_all(tmp_path / "a.tar")] == ["g", "b"], text


def test_large_members_are_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(samples, "MAX_TEXT_BYTES", 1 << 20)
    big = b"x" * (2 << 20)
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "txt": big}, "b": {"jpg": jpeg(), "npy": big, "txt": b"fine"}})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["too_large", "ok"] and "a.txt has 2,097,152 bytes" in frame["error"][0]


@pytest.mark.parametrize("size", [40_000, 1_500_000])
def test_memory_does_not_grow_with_the_images_that_were_read(tmp_path, size) -> None:
    images = [jpeg(i).ljust(size, bytes([i % 256])) for i in range(30_000_000 // size)]
    write_tar(tmp_path / "a.tar", {f"{i}": {"jpg": data, "txt": b"x"} for i, data in enumerate(images)})
    source = open_source(str(tmp_path / "a.tar"))
    tracemalloc.start()
    try:
        for number, pair in enumerate(source.read(source.shards[0])):
            assert pair.load() == images[number]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert number + 1 == len(images)


def test_members_that_hold_no_bytes_of_their_own(tmp_path) -> None:
    """Links, and sparse files, whose bytes do not lie where the header says."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, kind in {"a": tarfile.SYMTYPE, "b": tarfile.LNKTYPE, "c": tarfile.FIFOTYPE}.items():
            info = tarfile.TarInfo(f"{key}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("d.jpg")
        info.size = len(jpeg())
        info.pax_headers = {"GNU.sparse.map": f"0,{info.size}", "GNU.sparse.size": str(info.size)}
        tar.addfile(info, io.BytesIO(jpeg()))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame.select("key", "status").rows() == [(key, "read_error") for key in "abcd"]
    assert "link" in frame["error"][0] and "--sparse" in frame["error"][3]


JSON = {
    "deep": b'{"a":' * 900 + b"1" + b"}" * 900,
    "long number": b'{"n":' + b"9" * 5_000 + b"}",
    "number": b'{"caption": "c", "n": ' + b"9" * 400 + b"}",
    "surrogates": b'{"caption": "c", "\\ud800": "x", "k": "\\udfff"}',
    "no name": b'{"caption": "c", "": 1}',
    "infinite": b'{"caption": "c", "n": 1e999, "m": NaN}',
    "our own columns": b'{"caption": "c", "status": 5, "row": "x", "width": [], "source": {}, "score": "high"}',
    "a number as key": b'{"caption": "c", "key": 7}',
    "embedding": b'{"caption": "c", "image_embedding": [1], "sha256": "zz", "extra": [1]}',
    "turns": b'{"conversations": [{"from": "human", "value": {"a": 1}}]}',
    "text": b'{"conversations": "text"}',
    "utf-16": '{"caption": "c"}'.encode("utf-16"),
}


@pytest.mark.parametrize("first", JSON)
def test_json_of_any_shape_is_the_fault_of_its_row_only(tmp_path, first) -> None:
    """Also in the first sample, which decides the columns."""
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "json": JSON[first]}, **pairs(1)})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"].to_list() == ["7" if "key" in first else "a", "s0"] and statuses(frame)[1] == "ok"
    assert statuses(frame)[0] in ("ok", "invalid_row", "missing_caption", "invalid_caption")


def test_an_error_in_one_sample_is_the_status_of_its_row(tmp_path, monkeypatch) -> None:
    def breaks(value: object) -> None:
        raise KeyError("a bug")

    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "json": b'{"caption": "x", "score": 1}'}})
    monkeypatch.setattr(samples, "as_score", breaks)
    (pair,) = read_all(tmp_path / "a.tar")
    assert pair.status == "invalid_row" and "a: the sample cannot be used (KeyError: 'a bug')" in pair.error


def test_names_that_are_not_utf8(tmp_path) -> None:
    blocks = b""
    for name, data in ((b"caf\xe9.jpg", jpeg()), (b"caf\xe9.txt", b"x")):
        block = bytearray(header("?", len(data)))
        block[:100] = name.ljust(100, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        blocks += bytes(block) + padded(data)
    (tmp_path / "a.tar").write_bytes(blocks + bytes(1024))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame.select("key", "caption", "status").rows() == [("caf?", "x", "ok")]


def test_a_tar_of_files_without_endings_is_not_silently_empty(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("0001", jpeg()), ("0002", jpeg())]))
    assert "no file in the tar has a name with an ending" in complaint(
        cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "out")
    )


# --- img2dataset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "./", "00000/"])
def test_images_that_were_not_downloaded_are_told(tmp_path, prefix) -> None:
    keys = [f"00000{i:04d}" for i in range(4)]
    write_tar(tmp_path / "00000.tar", {f"{prefix}{k}": {"jpg": jpeg(), "txt": b"x"} for k in keys[:2]})
    status = ["success", "success", "failed_to_download", "failed_to_resize"]
    table = pa.table({"key": keys, "url": [f"http://x/{k}" for k in keys], "status": status})
    pq.write_table(table, tmp_path / "00000.parquet")
    (notice,) = open_source(str(tmp_path)).notices
    assert "2 of 4 images were not downloaded (failed_to_download 1, failed_to_resize 1)" in notice
    frame = ingested(tmp_path, tmp_path / "out")
    assert frame["url"].to_list() == [f"http://x/{k}" for k in keys[:2]]


def test_our_own_export_has_nothing_that_was_not_downloaded(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    assert cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "in").exit_code == 0
    assert cli("export", tmp_path / "in", "--out", tmp_path / "tars").exit_code == 0
    assert not open_source(str(tmp_path / "tars")).notices


def test_a_table_beside_a_tar_that_cannot_be_read_fails_the_shard(tmp_path, monkeypatch) -> None:
    """A fault of the disk must not look like a table that is not there."""
    write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        pq.write_table(pa.table({"key": ["s0"], "url": ["u"]}), folder / "a.parquet")
    source = open_source(str(tmp_path / "a.tar"))

    def breaks(uri: str) -> bool:
        raise OSError(5, "Input/output error", uri)

    monkeypatch.setattr(img2dataset.storage, "exists", breaks)
    with pytest.raises(OSError, match="Input/output"):
        list(source.read(source.shards[0]))
