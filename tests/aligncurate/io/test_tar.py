"""Our tar writer gives the same bytes as `tarfile`, for every kind of name."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligncurate.io.tar import TarWriter, header

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
