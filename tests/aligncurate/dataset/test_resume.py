"""Resuming: what a killed run leaves is never taken for finished work, and stale rows are never kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import aligncurate
from aligncurate.dataset.receipt import read_receipt
from aligncurate.dataset.record import Pair, schema, to_table
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.encoders import device
from aligncurate.errors import UserError
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, encoded, jpeg, picture, write_tar

HEAD = {"verb": "test", "options": {"a": 1}, "inputs": []}
SCHEMA = schema({})


class Killed(BaseException):
    """As if the process ended here."""


def write(folder: Path, parts: list[str], **changes: Any) -> aligncurate.Dataset:
    writer = DatasetWriter(folder, HEAD | changes, SCHEMA, [{"keys": keys} for keys in parts])
    with writer.open():
        done = writer.committed(len(parts))
        todo = [n for n in range(len(parts)) if n not in done]
        if todo:
            writer.reopen()
        for number in todo:
            with writer.part(number) as part:
                part.write(to_table([Pair(key, "somewhere", caption=key) for key in parts[number]], SCHEMA))
        return writer.finish(len(parts))


def keys(dataset: aligncurate.Dataset) -> str:
    return "".join(dataset.scan().collect()["key"])


def test_receipts_say_what_parts_hold(tmp_path) -> None:
    dataset = write(tmp_path, ["ab", "c"])
    for number, (file, info) in enumerate(zip(dataset.files, dataset.parts, strict=True)):
        receipt = read_receipt(tmp_path, number)
        assert receipt is not None and receipt.part == info
        assert receipt.part.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert receipt.shard == {"keys": ["ab", "c"][number]} and len(receipt.options) == 64
        stored = json.loads((tmp_path / f".receipts/part-0000{number}.json").read_text())
        assert (stored["rows"], stored["ok"], stored["failed"]) == (info.rows, info.rows, 0)


def test_a_part_of_another_shard_or_other_options_is_made_again(tmp_path) -> None:
    write(tmp_path, ["ab", "c", "de"])
    assert keys(write(tmp_path, ["ab", "x", "de"])) == "abxde"
    receipt = tmp_path / ".receipts/part-00001.json"
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"options": "0" * 64}))
    writer = DatasetWriter(tmp_path, HEAD, SCHEMA, [{"keys": k} for k in ("ab", "x", "de")])
    with writer.open():
        assert list(writer.committed(3)) == [0, 2]
    (tmp_path / ".receipts/part-00002.json").unlink()
    (tmp_path / "data/part-00000.parquet").write_bytes(b"cut")
    with writer.open():
        assert list(writer.committed(3)) == []
    assert keys(write(tmp_path, ["ab", "x"])) == "abx"
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]


def test_resuming_hashes_nothing(tmp_path, monkeypatch) -> None:
    write(tmp_path, ["ab", "c"])
    (tmp_path / "data/part-00001.parquet").unlink()
    hashed = []

    def part_only(data: Any = b"", **options: Any) -> Any:
        found = hashlib.new("sha256", data)
        hashed.append(found)
        return found

    monkeypatch.setattr("aligncurate.dataset.part.hashlib.sha256", part_only)
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self.name), real(self, *a, **k))[1])
    write(tmp_path, ["ab", "c"])
    assert "part-00000.parquet" not in opened


def killer(calls: int) -> Any:
    """Wraps functions: the process is killed at the call after the first `calls`, counted over all of them."""
    left = [calls]

    def die(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*arguments, **options)

        return call

    return die


@pytest.mark.parametrize("parts", [["ab", "x"], ["ab"], ["x", "y", "z"]])
def test_a_killed_run_leaves_no_finished_manifest_over_other_parts(tmp_path, monkeypatch, parts) -> None:
    """Kill before each deletion, rename and write in turn: a manifest that says complete must be true."""
    for step in range(40):
        folder = tmp_path / str(step)
        write(folder, ["ab", "c", "de"])
        die = killer(step)
        with monkeypatch.context() as patch:
            for name in ("unlink", "replace"):
                patch.setattr(Path, name, die(getattr(Path, name)))
            try:
                write(folder, parts)
                survived = True
            except Killed:
                survived = False
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["complete"]:
            dataset = aligncurate.open_dataset(folder)
            assert keys(dataset) in ("abcde", "".join(parts))
            for file, part in zip(dataset.files, dataset.parts, strict=True):
                assert hashlib.sha256(file.read_bytes()).hexdigest() == part.sha256
        assert keys(write(folder, parts)) == "".join(parts)
        if survived:
            return
    raise AssertionError("never ran to the end")


def test_a_receipt_never_replaces_another_before_its_part_is_on_disk(tmp_path, monkeypatch) -> None:
    write(tmp_path, ["ab"])
    calls: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def spy(kind: str, real: Any) -> Any:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            calls.append((kind, str(arguments[0] if kind == "publish" else path)))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "replace", spy("publish", replace))
    monkeypatch.setattr(Path, "unlink", spy("delete", unlink))

    def spy_fsync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    write(tmp_path, ["xy"])
    part, receipt = str(tmp_path / "data/part-00000.parquet"), str(tmp_path / ".receipts/part-00000.json")
    order = [
        ("publish", str(tmp_path / "manifest.json")), ("delete", receipt), ("sync", str(tmp_path / ".receipts")),
        ("publish", part), ("sync", str(tmp_path / "data")), ("publish", receipt),
    ]  # fmt: skip
    places = [calls.index(call) for call in order]
    assert places == sorted(places)


def test_a_new_part_waits_for_the_disk_once(tmp_path, monkeypatch) -> None:
    """Its own bytes; receipts are synced after the last part and before the manifest says complete."""
    synced: list[str] = []
    fsync = os.fsync

    def spy_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append(re.sub(r"^\.tmp-[0-9a-f]{8}-", ".tmp-", name))  # each process has names of its own
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    write(tmp_path / "few", ["a"])
    few = len(synced)
    synced.clear()
    write(tmp_path / "many", list("abcdefghijk"))
    assert len(synced) - few == 10 + 10
    parts = [f".tmp-part-{n:05}.parquet" for n in range(11)]
    receipts = [f"part-{n:05}.json" for n in range(11)]
    first, last = synced.index(parts[0]), synced.index(parts[-1])
    assert synced[first : last + 1] == parts
    assert sorted(name for name in synced[last:] if name in receipts) == receipts
    assert {"data", ".receipts"} < set(synced[last:]) and synced[-2:] == [".tmp-manifest.json", "many"]


@pytest.mark.parametrize("left", [b"", None, b"{", bytes(100)])
def test_a_part_whose_receipt_a_power_cut_took_is_made_again(tmp_path, left, capsys) -> None:
    write(tmp_path, ["ab", "c"])
    file, manifest = tmp_path / ".receipts/part-00001.json", tmp_path / "manifest.json"
    whole, receipt = manifest.read_bytes(), file.read_bytes()
    file.unlink() if left is None else file.write_bytes(left)
    manifest.write_text(json.dumps({**json.loads(whole), "complete": False, "parts": []}))
    writer = DatasetWriter(tmp_path, HEAD, SCHEMA, [{"keys": k} for k in ("ab", "c")])
    with writer.open():
        assert list(writer.committed(2)) == [0]
    assert ("made again" in capsys.readouterr().err) == bool(left)
    assert keys(write(tmp_path, ["ab", "c"])) == "abc"
    assert json.loads(manifest.read_bytes()) == json.loads(whole) and file.read_bytes() == receipt


def same_rows(one: aligncurate.Dataset, other: aligncurate.Dataset) -> bool:
    """Whether all is equal, and scores to what another batch may round differently."""
    frames = [dataset.scan().with_columns(pl.col("score").round(5)).collect() for dataset in (one, other)]
    return frames[0].equals(frames[1])


def test_a_tar_mended_to_the_same_size_keeps_no_stale_row(tmp_path, mini) -> None:
    tar = tmp_path / "a.tar"
    old, new = encoded(picture(1, 40, 40), "BMP"), encoded(picture(2, 40, 40), "BMP")
    assert len(old) == len(new)
    samples = {name: {"bmp": old, "txt": b"a square"} for name in "abc"}
    size = write_tar(tar, samples | {"d": {"bmp": old[:100], "txt": b"x"}}).stat().st_size
    first = aligncurate.score(tar, tmp_path / "out", **mini, quiet=True).dataset
    assert first.statuses == {"ok": 3, "decode_error": 1}
    write_tar(tar, samples | {"b": {"bmp": new, "txt": b"a square"}, "d": {"bmp": old[:100], "txt": b"x"}})
    assert tar.stat().st_size == size
    retried = aligncurate.score(tar, tmp_path / "out", **mini, retry_errors=True, quiet=True).dataset
    fresh = aligncurate.score(tar, tmp_path / "fresh", **mini, quiet=True).dataset
    assert same_rows(retried, fresh)
    assert retried.scan().collect()["sha256"][1] == hashlib.sha256(new).digest()


def test_a_retry_encodes_only_images_whose_bytes_have_changed(tmp_path, mini, monkeypatch) -> None:
    """Also where the images have moved inside the tar."""
    tar = tmp_path / "a.tar"
    samples = {f"{n}": {"jpg": jpeg(n), "txt": b"a square"} for n in range(4)}
    write_tar(tar, samples | {"1": {"jpg": b"half", "txt": b"a square"}})
    aligncurate.score(tar, tmp_path / "out", **mini, quiet=True)
    write_tar(tar, samples)
    run = aligncurate.score(tar, tmp_path / "out", **mini, retry_errors=True, quiet=True)
    assert run.rows == 1
    fresh = aligncurate.score(tar, tmp_path / "fresh", **mini, quiet=True).dataset
    assert same_rows(run.dataset, fresh)


def test_ingest_goes_on_with_another_polars_but_score_not_with_another_torch(tmp_path, mini, monkeypatch) -> None:
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(), "txt": b"a"}})
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True)
    aligncurate.score(tmp_path / "a.tar", tmp_path / "out", **mini, quiet=True)
    for folder, name, library in (("in", "written_with", "polars"), ("out", "computed_with", "torch")):
        file = tmp_path / folder / "manifest.json"
        manifest = json.loads(file.read_text())
        versions = manifest[name] if folder == "in" else manifest[name][0]["versions"]
        versions[library] = "0.1"
        file.write_text(json.dumps(manifest | {"complete": False}))
    assert aligncurate.ingest(tmp_path / "a.tar", tmp_path / "in", quiet=True).dataset.rows == 1
    with pytest.raises(UserError, match=r"\(made with torch 0\.1, now"):
        aligncurate.score(tmp_path / "a.tar", tmp_path / "out", **mini, quiet=True)


def test_another_kind_of_device_is_refused_unless_devices_may_be_mixed(tmp_path, mini, monkeypatch) -> None:
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", {f"{n}": {"jpg": jpeg(n), "txt": b"a"}})
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    aligncurate.score(tars, tmp_path / "out", **mini, quiet=True)
    (tmp_path / "out/data/part-00001.parquet").unlink()
    here = device.scoring_environment(torch.device("cpu"))["device"]
    assert here["kind"] == "cpu" and here["instructions"]
    other = {"kind": "cuda", "name": "NVIDIA H100", "capability": "9.0"}
    with monkeypatch.context() as patch:
        patch.setattr(device, "kind_of", lambda _: other)
        with pytest.raises(UserError, match=r"scored on cpu, .*, now cuda, NVIDIA H100, capability 9\.0; --mixed-dev"):
            aligncurate.score(tars, tmp_path / "out", **mini, quiet=True)
        mixed = aligncurate.score(tars, tmp_path / "out", **mini, mixed_devices=True, quiet=True)
    assert mixed.resumed == 1 and mixed.rows == 1
    assert [e["device"] for e in mixed.dataset.manifest["computed_with"]] == [here, other]


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to write below `folder`, as a disk that is mounted read-only does (root may write anywhere else)."""
    real = Path.open

    def refuse(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if folder in (self, *self.parents) and set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system", str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_finished_dataset_on_a_read_only_disk_has_nothing_to_do(tmp_path, mini, monkeypatch) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(1), "txt": b"a"}, "b": {"jpg": jpeg(2), "txt": b"b"}})
    out = tmp_path / "disk"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in mini.items()]
    cli("ingest", tar, "--out", out / "in")
    cli("score", tar, "--out", out / "scored", *flags)
    cli("bucket", out / "scored", "--levels", 2, "--out", out / "levelled")
    cli("export", out / "levelled", "--out", out / "tars")
    read_only(monkeypatch, out)
    assert "nothing to do" in cli("ingest", tar, "--out", out / "in").stdout
    assert "nothing to do" in cli("score", tar, "--out", out / "scored", *flags).stdout
    for folder in ("in", "scored", "levelled"):
        assert cli("inspect", out / folder).exit_code == 0
        assert cli("filter", out / folder, "--sample", 1, "--out", tmp_path / f"f-{folder}").exit_code == 0
        assert cli("export", out / folder, "--out", tmp_path / f"e-{folder}").exit_code == 0
    assert cli("bucket", out / "scored", "--levels", 2, "--out", out / "levelled").exit_code == 0
    assert "nothing to do" in cli("export", out / "levelled", "--out", out / "tars").stdout
    assert "Read-only" in complaint(
        cli(
            "ingest",
            tar,
            "--out",
            out / "new",
        ),
        1,
    )


def test_a_rerun_of_a_finished_dataset_loads_no_encoder(tmp_path, mini, monkeypatch) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(1), "txt": b"a"}})
    done = aligncurate.score(tar, tmp_path / "out", **mini, quiet=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an encoder is loaded")

    weights = shutil.copy(mini["pretrained"], tmp_path / "other.safetensors")
    monkeypatch.setattr("aligncurate.encoders.load.load", refuse)
    again = aligncurate.score(tar, tmp_path / "out", **mini, quiet=True)
    assert (again.rows, again.resumed) == (0, 1) and again.dataset.manifest == done.dataset.manifest
    for changes in (
        {"pretrained": weights}, {"decode": "fast"}, {"precision": "bf16"}, {"embeddings": "fp16"}, {"limit": 1},
        {"model": "tiny", "model_config": None, "pretrained": None}, {"source": SourceOptions(rows_per_shard=3)},
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="an encoder is loaded"):
            aligncurate.score(tar, tmp_path / "out", **{**mini, **changes}, quiet=True)
    with mini["pretrained"].open("ab") as file:
        file.write(b" ")
    with pytest.raises(AssertionError, match="an encoder is loaded"):
        aligncurate.score(tar, tmp_path / "out", **mini, quiet=True)
    os.truncate(mini["pretrained"], mini["pretrained"].stat().st_size - 1)
