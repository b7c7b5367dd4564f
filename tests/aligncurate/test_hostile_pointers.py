"""Datasets and tables from elsewhere: no pointer without its sha256, no link out of the folder, only regular files."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.dataset.pointers import Pointer, read_images
from aligncurate.io import storage
from tests.support.inputs import cli, complaint, jpeg, pairs, tar_bytes, write_tar


def ingested(folder: Path, *sources: Path) -> pl.DataFrame:
    assert cli("ingest", *sources, "--out", folder).exit_code == 0
    return pl.read_parquet(sorted(folder.rglob("part-*.parquet")))


@pytest.mark.parametrize("path", ["/proc/self/environ", "/etc/hostname", "secret"])
def test_a_pointer_without_sha256_is_not_followed(tmp_path, path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(jpeg(3))
    target = str(secret) if path == "secret" else path
    row = {"source": "x.csv", "image_path": target, "image_offset": None, "image_length": None, "row": 0}
    for sha256 in (None, bytes(32)):
        with pytest.raises(OSError, match="no sha256" if sha256 is None else "not the one that was scored"):
            Pointer.of(row | {"sha256": sha256}).read()
        assert isinstance(next(iter(read_images([row | {"sha256": sha256}]))), OSError)
    in_tar = row | {"source": str(secret), "image_path": "a.jpg", "image_offset": 0, "image_length": 100}
    neighbour = in_tar | {"image_offset": 100}
    assert all(isinstance(data, OSError) for data in read_images([in_tar | {"sha256": None}] * 2))
    assert all(isinstance(data, OSError) for data in read_images([r | {"sha256": None} for r in (in_tar, neighbour)]))


def test_a_foreign_row_without_sha256_is_neither_scored_nor_exported(tmp_path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(3))
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("image,caption\nx.jpg,one\nx.jpg,two\n")
    ingested(tmp_path / "foreign", tmp_path / "c.csv")
    part = next((tmp_path / "foreign").rglob("part-*.parquet"))

    table = pq.read_table(part)
    rows = table.to_pylist()
    rows[1] |= {"image_path": str(secret), "sha256": None}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    for file in (tmp_path / "foreign").rglob("*.json"):  # the forger fits the digests
        text = json.loads(file.read_text())
        assert isinstance(text, dict)
    exported = cli("export", tmp_path / "foreign", "--out", tmp_path / "tars", "--workers", 1)
    assert jpeg(3) not in b"".join(f.read_bytes() for f in (tmp_path / "tars").rglob("*.tar")), exported.output
    cli("ingest", tmp_path / "foreign", "--out", tmp_path / "again", "--embed-images")
    again = b"".join(f.read_bytes() for f in (tmp_path / "again").rglob("part-*.parquet"))
    assert jpeg(3) not in again


def test_links_out_of_the_image_folder_are_not_followed(tmp_path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "o.jpg").write_bytes(jpeg(1))
    (inside / "a.jpg").write_bytes(jpeg(2))
    (inside / "link.jpg").symlink_to("a.jpg")
    (inside / "leads.jpg").symlink_to(outside / "o.jpg")
    (inside / "sub").symlink_to(outside)
    (inside / "c.csv").write_text("image,caption\na.jpg,1\nlink.jpg,2\nleads.jpg,3\nsub/o.jpg,4\n")
    rows = ingested(tmp_path / "data", inside / "c.csv")
    assert rows["status"].to_list() == ["ok", "ok", "unsafe_path", "unsafe_path"]
    assert "is a link to" in rows["error"][2] and f"--image-root {inside}" in rows["error"][2]
    cli("ingest", inside / "c.csv", "--image-root", inside, "--out", tmp_path / "followed")
    assert aligncurate.open_dataset(tmp_path / "followed").statuses == {"ok": 4}


def test_links_within_a_hub_cache_are_followed(tmp_path) -> None:
    repository = tmp_path / "datasets--me--cats"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/0123").write_bytes(jpeg(1))
    folder = repository / "snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "a.jpg").symlink_to("../../blobs/0123")
    (folder / "b.jpg").symlink_to("/etc/hostname")
    (folder / "c.csv").write_text("image,caption\na.jpg,1\nb.jpg,2\n")
    assert ingested(tmp_path / "data", folder / "c.csv")["status"].to_list() == ["ok", "unsafe_path"]


def test_only_regular_files_are_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for path in (*tmp_path.iterdir(), Path("/dev/zero"), Path("/dev/null")):
        for read in (storage.read, storage.open_file, lambda uri: storage.read_range(uri, 0, 10)):
            with pytest.raises(OSError) as found:
                read(str(path))
            assert found.value.errno in (errno.EINVAL, errno.EISDIR)
    (tmp_path / "c.csv").write_text("image,caption\nfifo.jpg,1\nsocket.jpg,2\nfolder.jpg,3\n")
    rows = ingested(tmp_path / "data", tmp_path / "c.csv")
    assert len(rows) == 3 and not set(rows["status"]) & {"ok"}
    listening.close()


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "MAX_IMAGE_BYTES", 10_000)
    with (tmp_path / "big.jpg").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would end in MemoryError
    (tmp_path / "c.csv").write_text("image,caption\nbig.jpg,1\n")
    rows = ingested(tmp_path / "data", tmp_path / "c.csv")
    assert rows["status"].to_list() == ["too_large"]
    with pytest.raises(OSError, match="ends after"):  # a pointer that claims more than there is takes no memory
        storage.read_range(str(tmp_path / "c.csv"), 0, 1 << 50)


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ENODEV", "ENOMEM", "EKEYEXPIRED", None])
@pytest.mark.parametrize("call", ["open", "read"])
def test_a_failing_disk_fails_the_shard_and_a_rerun_reads_it(tmp_path, monkeypatch, name, call) -> None:
    """`None`: a time-out without a number, as Python's own."""
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("image,caption\nx.jpg,one\nnone.jpg,two\n")
    number = getattr(errno, name or "EIO")
    fault = OSError(number, os.strerror(number), "x.jpg") if name else TimeoutError("no answer")
    failing = [True]

    def break_(where: object, function: str) -> None:
        real = getattr(where, function)

        def fails(*arguments, **options):
            file = arguments[0] if isinstance(arguments[0], str) else getattr(arguments[0], "name", "")
            if failing[0] and str(file).endswith("x.jpg"):
                raise fault
            return real(*arguments, **options)

        monkeypatch.setattr(where, function, fails)

    if call == "open":
        break_(os, "open")
    else:
        break_(storage._LocalFile, "readinto")
        break_(storage._LocalFile, "readall")
    result = cli("ingest", tmp_path / "c.csv", "--out", tmp_path / "data")
    assert result.exit_code == 1 and "x.jpg: cannot be read" in result.output
    failing[0] = False
    assert ingested(tmp_path / "data", tmp_path / "c.csv")["status"].to_list() == ["ok", "missing_image"]


@pytest.mark.parametrize("how", ["vanishes", "is replaced", "is touched"])
def test_a_tar_that_changes_while_it_is_scored_fails_its_shard(tmp_path, monkeypatch, how) -> None:
    tar, other = write_tar(tmp_path / "a.tar", pairs(20)), write_tar(tmp_path / "b.tar", pairs(3, 20))
    from aligncurate.scoring import prepare

    real, seen = prepare.Preparer.prepare, []

    def meddle(self, pair, *arguments):
        if pair.key == "s5" and not seen:
            seen.append(pair.key)
            if how == "vanishes":
                tar.unlink()
            elif how == "is replaced":
                write_tar(tmp_path / "new", pairs(20, 1)).replace(tar)
            else:
                os.utime(tar, ns=(1, 1))
        return real(self, pair, *arguments)

    monkeypatch.setattr(prepare.Preparer, "prepare", meddle)
    run = aligncurate.ingest([tar, other], tmp_path / "data", quiet=True)
    assert run.dataset is None and [Path(failure.shard).name for failure in run.failures] == ["a.tar"]
    assert [p.name for p in sorted((tmp_path / "data").rglob("part-*.parquet"))] == ["part-00001.parquet"]


def test_a_local_file_that_changed_between_runs_is_refused_by_name(tmp_path) -> None:
    a, b = write_tar(tmp_path / "a.tar", pairs(3)), tmp_path / "b.tar"
    b.write_bytes(tar_bytes([("noending", b"x")]))
    uris = [a, b, write_tar(tmp_path / "c.tar", pairs(1, 9))]
    assert cli("ingest", *uris, "--format", "webdataset", "--out", tmp_path / "data").exit_code == 1
    data = a.read_bytes().replace(b"caption 1", b"caption X")  # same size
    a.write_bytes(data)
    result = cli("ingest", *uris, "--format", "webdataset", "--out", tmp_path / "data")
    assert result.exit_code == 2 and "a.tar has changed since" in result.output, result.output


def test_a_bug_in_a_source_fails_its_shard_and_names_its_place(tmp_path, monkeypatch) -> None:
    from aligncurate.sources.webdataset import WebDatasetSource

    tars = [write_tar(tmp_path / f"{i}.tar", pairs(2, 2 * i)) for i in range(2)]
    real = WebDatasetSource.read

    def broken(self, shard):
        yield from real(self, shard)
        if shard.index == 0:
            raise KeyError("surprise")

    monkeypatch.setattr(WebDatasetSource, "read", broken, raising=False)
    run = aligncurate.ingest(tars, tmp_path / "data", quiet=True)
    assert [Path(failure.shard).name for failure in run.failures] == ["0.tar"]
    assert "KeyError: 'surprise', at test_hostile_pointers.py:" in run.failures[0].error


FORGED = {
    "null length": {"image_offset": 0, "image_length": None},
    "negative length": {"image_offset": 0, "image_length": -5},
    "negative offset": {"image_offset": -5, "image_length": 5},
    "null row": {"image_path": "image", "row": None},
    "negative row": {"image_path": "image", "row": -1},
    "null source": {"image_path": "image", "source": None, "row": 0},
    "null source of a tar": {"source": None, "image_offset": 0, "image_length": 5},
    "scheme": {"image_path": "foo://x"},
    "source's scheme": {"source": "foo://x", "image_offset": 0, "image_length": 5},
    "zero byte": {"image_path": "/tmp/a\0b"},
    "source's zero byte": {"source": "/tmp/a\0b", "image_offset": 0, "image_length": 5},
    "not a Parquet file": {"image_path": "image", "source": "/etc/hostname", "row": 0},
    "long name": {"image_path": "/" + "a" * 5000},
}
VICTIM = {"image_offset": None, "image_length": None, "row": None, "sha256": bytes(32)}


def rewritten(folder: Path, change) -> Path:
    """The dataset's only part with its rows changed, by somebody who fits the sizes too."""
    part = next(folder.rglob("part-*.parquet"))
    table = pq.read_table(part)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    return part


@pytest.mark.parametrize("name", FORGED)
def test_a_pointer_that_makes_no_sense_is_an_error_of_its_row(tmp_path, name) -> None:
    row = {"source": "x.csv", "image_path": "a.jpg"} | VICTIM | FORGED[name]
    with pytest.raises(OSError, match=r".{10}"):
        Pointer.of(row).read()
    found = list(read_images([row, row, {**row, "image": jpeg(1), "sha256": None}, {"image_path": None}]))
    assert [isinstance(data, OSError) for data in found] == [True] * 3 + [False] and found[3] is None


@pytest.mark.parametrize("layout", ["webdataset", "llava-json"])
def test_forged_rows_fail_alone_in_export_and_ingest(tmp_path, layout) -> None:
    captions = [f"caption {number}" for number in range(len(FORGED) + 3)]
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"x.jpg,{text}\n" for text in captions))
    ingested(tmp_path / "foreign", tmp_path / "c.csv")

    def forge(rows: list[dict]) -> None:
        for row, change in zip(rows, FORGED.values(), strict=False):
            row |= VICTIM | change
        rows[-1]["key"] = rows[0]["key"] = None

    rewritten(tmp_path / "foreign", forge)
    exported = cli("export", tmp_path / "foreign", "--format", layout, "--out", tmp_path / "out", "--workers", 1)
    failed = (tmp_path / "out/failed.jsonl").read_text().splitlines()
    assert len(failed) == len(FORGED), exported.output
    assert "Traceback" not in exported.output and exported.exit_code in (0, 1)
    again = ingested(tmp_path / "again", tmp_path / "foreign")
    assert set(again["status"][: len(FORGED)]) == {"read_error"} and set(again["status"][len(FORGED) :]) == {"ok"}
    assert again["key"].null_count() == 0
    assert "Traceback" not in cli("inspect", tmp_path / "foreign").output


def test_a_status_that_does_not_exist_fails_its_row(tmp_path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("image,caption\nx.jpg,a\nx.jpg,b\nx.jpg,c\n")
    ingested(tmp_path / "foreign", tmp_path / "c.csv")
    rewritten(tmp_path / "foreign", lambda rows: (rows[0].update(status="fine"), rows[1].update(status=None)))
    assert ingested(tmp_path / "again", tmp_path / "foreign")["status"].to_list() == ["invalid_row"] * 2 + ["ok"]


def test_links_out_of_a_folder_of_samples_are_not_followed(tmp_path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "o.jpg").write_bytes(jpeg(1))
    (outside / "secret").write_text("the secret")
    for name in "abcd":
        (inside / f"{name}.jpg").write_bytes(jpeg(2))
        (inside / f"{name}.txt").write_text("a caption")
    (inside / "a.txt").unlink()
    (inside / "a.txt").symlink_to(outside / "secret")
    (inside / "b.jpg").unlink()
    (inside / "b.jpg").symlink_to(outside / "o.jpg")
    (inside / "c.json").symlink_to(outside / "secret")
    (inside / "d.txt").unlink()
    (inside / "d.txt").symlink_to("c.txt")
    rows = ingested(tmp_path / "data", inside)
    assert dict(zip(rows["key"], rows["status"], strict=True)) == dict.fromkeys("abc", "unsafe_path") | {"d": "ok"}
    assert all("is a link to" in error for error in rows["error"].drop_nulls())
    assert b"the secret" not in next((tmp_path / "data").rglob("part-*.parquet")).read_bytes()


VERBS = {
    "ingest": ("ingest", "DATA", "--out", "OUT"),
    "export": ("export", "DATA", "--out", "OUT", "--workers", 1),
    "llava": ("export", "DATA", "--format", "llava-json", "--out", "OUT"),
    "inspect": ("inspect", "DATA"),
    "filter": ("filter", "DATA", "--out", "OUT", "--min-score", "0.1"),
    "bucket": ("bucket", "DATA", "--out", "OUT", "--levels", 3),
    "merge": ("merge", "DATA", "DATA2", "--out", "OUT"),
}


@pytest.mark.parametrize("column", ["key", "status", "level", "conversations"])
@pytest.mark.parametrize("wrong", ["missing", "type"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_part_without_a_column_is_one_sentence(tmp_path, column, wrong, verb) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("image,caption\nx.jpg,one\n")
    for name in ("data", "data2"):
        ingested(tmp_path / name, tmp_path / "c.csv")
        part = next((tmp_path / name).rglob("part-*.parquet"))
        table = pq.read_table(part)
        at = table.schema.names.index(column)
        other = pa.array([True])
        table = table.drop([column]) if wrong == "missing" else table.set_column(at, column, other)
        pq.write_table(table, part)
    places = {"DATA": tmp_path / "data", "DATA2": tmp_path / "data2", "OUT": tmp_path / "out"}
    result = cli(*(places.get(word, word) for word in VERBS[verb]))
    assert f"column {column}" in complaint(result) and "part-00000.parquet" in complaint(result)
