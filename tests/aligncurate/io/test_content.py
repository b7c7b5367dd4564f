"""What a file is, by its content: real files of each kind, whatever they are called."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.orc
import pytest

from aligncurate.io.content import what_is
from tests.support.inputs import encoded, jpeg, parquet_bytes, picture, tar_bytes

TAR = tar_bytes([("a.jpg", b"x"), ("a.txt", b"y")])


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", b"x")
    return buffer.getvalue()


def tar_of(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        info = tarfile.TarInfo("ü" * 200 if form != tarfile.USTAR_FORMAT else "ü")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    return buffer.getvalue()


def arrow_bytes(write) -> bytes:
    sink = pa.BufferOutputStream()
    write(pa.table({"a": [1]}), sink)
    return sink.getvalue().to_pybytes()


def write_stream(table: pa.Table, sink: pa.BufferOutputStream) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def numpy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


FILES = {
    "tar": (TAR, "a tar"),
    "ustar": (tar_of(tarfile.USTAR_FORMAT), "a tar"),
    "gnu": (tar_of(tarfile.GNU_FORMAT), "a tar"),
    "pax": (tar_of(tarfile.PAX_FORMAT), "a tar"),
    "a tar without members": (tar_bytes([]), "a tar"),
    "parquet": (parquet_bytes(a=[1]), "a Parquet file"),
    "tar.gz": (gzip.compress(TAR), "a gzip-compressed tar"),
    "tar.bz2": (bz2.compress(TAR), "a bzip2-compressed tar"),
    "tar.xz": (lzma.compress(TAR), "a xz-compressed tar"),
    "parquet.gz": (gzip.compress(parquet_bytes(a=[1])), "a gzip-compressed Parquet file"),
    "jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 1000), "a gzip-compressed JSON file"),
    "cut gz": (gzip.compress(os.urandom(100))[:5], "a gzip-compressed file"),
    "zst": (b"\x28\xb5\x2f\xfd" + bytes(99), "a zstd-compressed file"),
    "zip": (zip_bytes(), "a zip archive"),
    "html": (b"\n <!DOCTYPE html><html><title>404</title>", "an HTML page"),
    "HTML": (b"<HTML><body>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer"),
    "empty": (b"", "an empty file (0 bytes)"),
    "jpeg": (jpeg(), "an image (JPEG)"),
    "png": (encoded(picture(), "PNG"), "an image (PNG)"),
    "webp": (encoded(picture(), "WEBP"), "an image (WebP)"),
    "gif": (encoded(picture(), "GIF"), "an image (GIF)"),
    "bmp": (encoded(picture(), "BMP"), "an image (BMP)"),
    "tiff": (encoded(picture(), "TIFF"), "an image (TIFF)"),
    "avif": (encoded(picture(), "AVIF"), "an image (AVIF)"),
    "feather": (arrow_bytes(pa.feather.write_feather), "an Arrow (Feather) file"),
    "arrow stream": (arrow_bytes(write_stream), "an Arrow stream"),
    "orc": (arrow_bytes(pa.orc.write_table), "an ORC file"),
    "npy": (numpy_bytes(), "a NumPy array"),
    "json": (b' [{"a": 1}]', "JSON"),
    "json with mark": (b'\xef\xbb\xbf{"a": 1}', "JSON"),
    "pretty json": (b"[\n  {", "JSON"),
    "jsonl": (b'{"a": 1}\n{"a": 2}\n', "JSON"),
    "csv": ("image,caption\nü.jpg,größe\n".encode(), "text"),
    "latin-1 csv": ("image,caption\nü.jpg,größe\n".encode("latin-1"), "text"),
    "utf-16 csv": ("image,caption\n".encode("utf-16"), "text"),
    "a caption in brackets": (b"[a red box] on the floor", "text"),
    "random": (b"\0\1\2" + bytes(range(256)), "of no known format"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a"])
def test_a_file_is_known_by_its_content(tmp_path, kind, name) -> None:
    data, expected = FILES[kind]
    (tmp_path / name).write_bytes(data)
    assert what_is(str(tmp_path / name)).name.startswith(expected)


def test_a_large_file_of_zeros_is_no_empty_tar(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1 << 21))
    assert what_is(str(tmp_path / "a.tar")).kind == "damaged"


def test_a_pipe_is_not_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "pipe" in what_is(str(tmp_path / "a.tar")).name


def test_a_tar_is_not_taken_for_what_its_first_member_is_called(tmp_path) -> None:
    for name in ("PAR1.jpg", "<html>.jpg", "GIF89a.jpg", '{"a"}.txt'):
        (tmp_path / "a").write_bytes(tar_bytes([(name, jpeg())]))
        assert what_is(str(tmp_path / "a")).kind == "tar"


def test_text_is_not_taken_for_an_image_or_an_archive(tmp_path) -> None:
    for text in ("BM is a company\n", "Rar! a lion\n", "ORC and elf\n", "PK means player killer\n", "BZh\n"):
        (tmp_path / "a").write_text(text)
        assert what_is(str(tmp_path / "a")).kind == "text", text
