"""Sources on a web server that fails now and then: the same dataset, or exit 1 and the same after a rerun."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.inputs import cli, jpeg, pairs, tar_bytes
from tests.support.web import Server, serving


@pytest.fixture
def web():
    with serving() as server:
        yield server


def tar(count: int, first: int = 0) -> bytes:
    samples = pairs(count, first)
    return tar_bytes((f"{key}.{ending}", data) for key, files in samples.items() for ending, data in files.items())


def table(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("part-*.parquet"))}


def fill(server: Server) -> list[str]:
    """Two tars, of which the first has a table beside it with an extra column; a table of image names."""
    server.files = {
        "/a.tar": tar(2),
        "/a.parquet": table(key=["s0", "s1"], url=["u0", "u1"]),
        "/b.tar": tar(2, 2),
        "/c.csv": b"image,caption\nx.jpg,one\nnone.jpg,two\n",
        "/x.jpg": jpeg(7),
    }
    return [f"web://{server.address}/{name}" for name in ("{a,b}.tar", "c.csv")]


@pytest.mark.parametrize("fault", [503, 429, "short", "reset"])
def test_a_fault_at_any_request_changes_nothing(web, tmp_path, fault) -> None:
    sources = fill(web)
    assert cli("ingest", *sources, "--out", tmp_path / "right").exit_code == 0
    right = parts(tmp_path / "right")
    count = len(web.requests)
    rows = pl.read_parquet(sorted((tmp_path / "right").rglob("part-*.parquet")), missing_columns="insert")
    assert rows["status"].to_list() == ["ok"] * 5 + ["missing_image"] and rows["url"][:2].to_list() == ["u0", "u1"]
    for number in range(count if fault == 503 else min(count, 12)):
        web.begin({number: fault})
        out = tmp_path / f"{number}"
        result = cli("ingest", *sources, "--out", out)
        if result.exit_code:
            assert result.exit_code == 1, result.output
            web.begin()
            assert cli("ingest", *sources, "--out", out).exit_code == 0
        assert parts(out) == right, f"fault {fault} at request {number}"


@pytest.mark.parametrize("fault", [503, "reset"])
def test_steady_faults_are_not_taken_for_missing_files(web, tmp_path, fault) -> None:
    sources = fill(web)
    assert cli("ingest", *sources, "--out", tmp_path / "right").exit_code == 0
    for number in range(0, len(web.requests), 3):
        web.begin()
        web.faults = dict.fromkeys(range(number, 10_000), fault)
        out = tmp_path / f"{number}"
        result = cli("ingest", *sources, "--out", out)
        assert result.exit_code == 1 and "no such file" not in result.output, (number, result.output)
        web.begin()
        assert cli("ingest", *sources, "--out", out).exit_code == 0
        assert parts(out) == parts(tmp_path / "right")


def test_an_absent_image_is_a_row_and_an_absent_tar_fails_its_shard(web, tmp_path) -> None:
    fill(web)
    result = cli("ingest", f"web://{web.address}/{{a,nothing}}.tar", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "nothing.tar" in result.output
    assert list(parts(tmp_path / "out")) == ["part-00000.parquet"]  # the other shard went on


def test_a_file_that_cannot_be_opened_leaves_no_complaint_of_python_itself() -> None:
    """From Python 3.13 on, and in development mode before, errors of a file that is thrown away are printed."""
    opening = """
from contextlib import suppress
from aligncurate.io import storage
with suppress(FileNotFoundError):
    storage.open_file("memory://absent")
"""
    run = subprocess.run([sys.executable, "-X", "dev", "-c", opening], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_a_replaced_object_is_refused_by_name(web, tmp_path) -> None:
    fill(web)
    uris = f"web://{web.address}/{{a,nothing}}.tar"
    assert cli("ingest", uris, "--out", tmp_path / "out").exit_code == 1
    old = web.files["/a.tar"]
    web.files["/a.tar"] = old.replace(b"caption 0", b"caption X")  # of the same size
    web.files["/nothing.tar"] = tar(1)
    result = cli("ingest", uris, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "a.tar has changed since" in result.output.replace("\n", " "), result.output
    web.files["/a.tar"] = old
    assert cli("ingest", uris, "--out", tmp_path / "out").exit_code == 0


def test_many_remote_shards_cost_no_requests_before_the_run(monkeypatch) -> None:
    import fsspec
    from fsspec.spec import AbstractFileSystem

    from aligncurate.sources.detect import open_source

    asked: list[str] = []
    first = tar(1)

    class Bucket(AbstractFileSystem):
        protocol = "bucket"
        cachable = False

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            asked.append(path)
            if path.endswith(".parquet"):
                raise FileNotFoundError(path)
            return {"name": path, "size": len(first), "type": "file", "ETag": "1"}

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
            asked.append(path)
            names = [f"{path}/{i:05}.tar" for i in range(10_000)]
            return [{"name": name, "size": len(first), "type": "file", "ETag": "1"} for name in names]

        def _open(self, path: str, *_: Any, **__: Any) -> io.BytesIO:
            asked.append(path)
            return io.BytesIO(first)

        def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
            return first[start:end]

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    source = open_source("bucket://b/{00000..09999}.tar")
    described = source.describe()[0]["files"]
    assert len(source.shards) == len(described) == 10_000
    assert {(file["bytes"], file["etag"]) for file in described} == {(len(first), "1")}
    assert len(asked) < 200
