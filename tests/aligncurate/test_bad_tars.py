"""Damaged tars, and tars whose samples are incomplete or repeated."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile

import pytest

import aligncurate
from aligncurate.sources.detect import open_source
from tests.support.inputs import (
    cli,
    complaint,
    ingested,
    jpeg,
    pairs,
    parquet_bytes,
    read_all,
    statuses,
    tar_bytes,
    write_tar,
)


def extended_header(record: bytes) -> bytes:
    """An extended header with one record, and a member and the end marker after it."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf(tarfile.GNU_FORMAT) + record.ljust(512, b"\0") + tar_bytes([("b.txt", b"x")])


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


def test_json_members_that_cannot_be_parsed(tmp_path) -> None:
    broken = [b"{", b"[1]", b"", b"null", b"\xff\xfe", b"[" * 100_000]
    members = {f"b{i}": {"jpg": jpeg(), "txt": b"x", "json": data} for i, data in enumerate(broken)}
    write_tar(tmp_path / "a.tar", members | pairs(2))
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["invalid_row"] * 2 + ["ok"] + ["invalid_row"] * 3 + ["ok"] * 2
    assert "JSON" in frame["error"][0]


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


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (b"", "the tar has no end marker, so it is truncated; copy it again"),
        (bytes(300), "the tar has no end marker, so it is truncated; copy it again"),
        (b"x" * 512 + bytes(1024), "the tar is damaged (there is no valid header at byte 2,048); copy it again"),
        # Python 3.13 says so of every extended header with a record of a wrong length; earlier versions pass over most.
        (extended_header(b"0 path=x\n"), "the tar is damaged (there is no valid header at byte 2,048); copy it again"),
    ],
    ids=["nothing", "half a block", "no header", "a record without a length"],
)
def test_what_follows_the_last_whole_member(tmp_path, after, sentence) -> None:
    text, picture = tar_bytes([("a.txt", b"x")])[:1024], tar_bytes([("a.jpg", b"no picture")])[:1024]
    (tmp_path / "a.tar").write_bytes(text + picture + after)
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"].to_list()[1:] == ["a.tar"] and frame["error"][-1] == sentence


def test_a_member_that_claims_a_negative_size(tmp_path) -> None:
    data = bytearray(tar_bytes([("a.jpg", jpeg()), ("a.txt", b"x")]))
    data[124:136] = b"\xff" * 10 + struct.pack(">h", -1_024)  # base 256, as GNU tar writes large sizes
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    found = complaint(cli("ingest", tmp_path / "a.tar", "--out", tmp_path / "out"))
    assert found.endswith("a.tar: the tar is damaged (a.jpg has a negative size); copy it again.")


def test_empty_tars(tmp_path) -> None:
    (tmp_path / "zero.tar").write_bytes(b"")
    assert "0 bytes" in complaint(cli("ingest", tmp_path / "zero.tar", "--out", tmp_path / "zero"))
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


def test_a_damaged_tar_fails_as_a_shard_and_does_not_stop_the_others(tmp_path) -> None:
    write_tar(tmp_path / "1.tar", pairs(2))
    (tmp_path / "2.tar").write_bytes(b"\1garbage\0" * 300)
    (tmp_path / "3.tar").write_bytes(b"")
    run = aligncurate.ingest(tmp_path, tmp_path / "out", quiet=True)
    assert run.dataset is None and run.rows == 2
    assert [failure.error.partition(": ")[2] for failure in run.failures] == [
        "not a tar; copy or download it again",
        "this is an empty file (0 bytes), not a tar; copy or download it again",
    ]
    for number in (2, 3):
        write_tar(tmp_path / f"{number}.tar", pairs(1, first=number))
    frame = ingested(tmp_path, tmp_path / "again")
    assert frame["key"].to_list() == ["s0", "s1", "s2", "s3"]


def test_a_damaged_tar_in_the_image_root(tmp_path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.tar").write_bytes(b"garbage" * 300)
    (tmp_path / "a.csv").write_text("image,caption\n0.jpg,x\n")
    frame = ingested(tmp_path / "a.csv", tmp_path / "out", image_root=str(tmp_path / "root"))
    assert statuses(frame) == ["missing_image"] and "a.tar: this is text, not a tar" in frame["error"][0]


def test_sidecars_that_cannot_be_used_are_left_alone(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    for data in (b"", b"garbage", parquet_bytes(nothing=["like it"]), parquet_bytes(key=["other"], url=["u"])):
        (tmp_path / "a.parquet").write_bytes(data)
        assert [p.caption for p in read_all(tmp_path / "a.tar")] == ["caption 0", "caption 1"]


def test_a_source_that_vanishes_between_listing_and_reading(tmp_path) -> None:
    tars = [write_tar(tmp_path / f"{i}.tar", pairs(1)) for i in range(2)]
    source = open_source([str(t) for t in tars])
    os.remove(tars[1])
    assert [p.key for p in source.read(source.shards[0])] == ["s0"]
    with pytest.raises(OSError, match=r"1\.tar"):
        list(source.read(source.shards[1]))
