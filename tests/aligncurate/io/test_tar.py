"""Our tar writer gives the same bytes as `tarfile`, and our reader finds the same members, damaged or not."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from aligncurate.errors import ShardError
from aligncurate.io.tar import Member, TarWriter, header, tar_members
from tests.support.naive_tar import members_by_tarfile

NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=300)


def written(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    writer = TarWriter(out)
    for name, data in members:
        writer.add(name, data)
    writer.end()
    return out.getvalue()


def by_tarfile(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=25))
def test_the_bytes_are_those_of_tarfile(members) -> None:
    assert written(members) == by_tarfile(members)


@pytest.mark.parametrize("size", [0, 1, 512, 8**11 - 1, 8**11, 10**12])
@pytest.mark.parametrize("name", ["a.jpg", "x" * 100, "x" * 101, "folder/" * 30 + "a.jpg", "größe.jpg", "folder/"])
def test_headers_of_large_files(name, size) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# --- reading ---------------------------------------------------------------------------------------------------------

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.REGTYPE,) * 9 + (
    tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, b"Z",
)  # fmt: skip
PATHS = st.one_of(
    st.builds("{}{}.{}".format, st.sampled_from(["", "./", "a/", "/", "a b/c.d/"]), st.text("abc.ü图", max_size=9),
              st.sampled_from(["jpg", "txt", "json", "cls"])),
    st.text("ab/ü.", min_size=1, max_size=150),
    st.text(min_size=1, max_size=20).map(lambda name: name.replace("\0", "") or "x"),
)  # fmt: skip
PAX = st.dictionaries(
    st.sampled_from(["mtime", "atime", "ctime", "path", "size", "comment", "uid", "linkpath", "hdrcharset"]),
    st.sampled_from(["1.5", "12", "", "x", "1e9", "ü", "-7", "BINARY", "a/b.jpg", "1\n2", "1.2.3"]),
    max_size=3,
)


@st.composite
def members(draw) -> tuple[tarfile.TarInfo, bytes, int]:
    info = tarfile.TarInfo(draw(PATHS))
    info.type = draw(st.sampled_from(KINDS))
    info.mtime = draw(st.sampled_from([0, 1700000000, 1700000000.25, 8**11, 1.0]))
    info.mode, info.uid = draw(st.sampled_from([0o644, 0])), draw(st.sampled_from([0, 1000, 8**7]))
    info.uname = draw(st.sampled_from(["", "bigdata", "ü"]))
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        info.linkname = draw(st.sampled_from(["a.jpg", "x" * 120]))
    data = draw(st.binary(max_size=9).flatmap(lambda some: st.sampled_from([b"", some, some * 100, bytes(1024)])))
    info.size = len(data) if info.isfile() else 0
    info.pax_headers = draw(st.one_of(st.just({}), st.just({}), PAX))
    return info, data[: info.size], draw(st.sampled_from(FORMATS))


def archive(found: list[tuple[tarfile.TarInfo, bytes, int]], first: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=first) as tar:
        for info, data, form in found:
            tar.format = form
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # not every format has a place for every name and time
                continue
    return out.getvalue()


def damaged(data: bytes, draw) -> bytes:
    """A tar cut off, with bytes of its headers changed, or with more behind its end."""
    changed = bytearray(data)
    headers = [member[1] - 512 for member in members_by_tarfile(data) if not isinstance(member, str)] or [0]
    for _ in range(draw(st.integers(0, 2))):
        block = draw(st.sampled_from(headers)) - draw(st.sampled_from([0, 0, 512, 1024]))
        block = max(block, 0)
        place = block + draw(
            st.one_of(st.integers(0, 511), st.sampled_from([99, 102, 124, 134, 135, 140, 150, 156, 257]))
        )
        changed[place] = draw(st.sampled_from(b"\0 018/x\x80\xff"))
        if draw(st.booleans()):  # so that the change is in a header that is sound
            total = sum(changed[block : block + 512]) - sum(changed[block + 148 : block + 156]) + 256
            changed[block + 148 : block + 156] = b"%06o\0 " % total
    end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return bytes(changed[:end]) + draw(st.sampled_from([b"", b"", bytes(700), b"x" * 600]))


def check_members(path: Path, data: bytes, ahead: int) -> None:
    path.write_bytes(data)
    expected = members_by_tarfile(data)
    with path.open("rb") as file:
        try:
            found = list(tar_members(file, str(path), ahead))
        except ShardError:
            assert "damaged" in str(expected[0]) or not data
            return
    assert [member if isinstance(member, str) else member[:4] for member in found] == expected
    for member in found:
        if isinstance(member, Member) and member.data is not None:
            assert member.data == data[member.offset :][: member.size] and len(member.data) == member.size


@settings(max_examples=100, deadline=None)
@given(
    st.lists(members(), max_size=12),
    st.sampled_from([{}, {}, {"comment": "x"}, {"path": "p"}]),
    st.sampled_from([512, 1536, 2048, 5000, 1 << 20]),
    st.data(),
)
def test_members_are_those_of_tarfile(tmp_path_factory, found, first, ahead, data) -> None:
    tar = archive(found, first)
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    check_members(path, tar, ahead)
    check_members(path, damaged(tar, data.draw), ahead)


def test_members_as_webdataset_writes_them_are_read_with_their_data(tmp_path) -> None:
    """Its headers have fractions of seconds, so each has an extended header before it."""
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for number in range(50):
            tar.write({"__key__": f"{number:09}", "jpg": bytes(3000), "json": b"{}", "txt": b"text"})
    data = (tmp_path / "a.tar").read_bytes()
    assert data.count(b"mtime=") == 150
    check_members(tmp_path / "a.tar", data, 1 << 20)
    with (tmp_path / "a.tar").open("rb") as file:
        assert [m.data is not None for m in tar_members(file, str(tmp_path / "a.tar"), 1 << 20)] == [True] * 150


def test_only_what_is_asked_for_is_read_of_large_members(tmp_path) -> None:
    """The bytes of large members are neither read nor kept."""
    path = tmp_path / "a.tar"
    path.write_bytes(written([(f"{i}.jpg", bytes(3 << 20)) for i in range(9)]))
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            assert [m.size for m in tar_members(file, str(path), 1 << 20) if m.data is None] == [3 << 20] * 9
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
