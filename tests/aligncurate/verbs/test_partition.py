"""Several runs that share one output: `--partition`, `--devices`, `finish`, and shards that cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import aligncurate
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import Pair
from aligncurate.encoders.load import Encoder, load_all
from aligncurate.errors import ShardError, UserError
from aligncurate.io.files import LOCK, claim
from aligncurate.sources.base import Shard
from aligncurate.sources.webdataset import WebDatasetSource
from tests.support.inputs import cli, complaint, pairs, write_tar


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tars")
    return [str(write_tar(folder / f"{n}.tar", pairs(3, first=3 * n))) for n in range(5)]


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ingest(tars: list[str], out: Path, **options: Any) -> Any:
    return aligncurate.ingest(tars, out, quiet=True, **options)


def test_partitions_in_any_order_give_the_bytes_of_one_run(tmp_path, tars) -> None:
    ingest(tars, tmp_path / "one")
    missing = [ingest(tars, tmp_path / "out", partition=part).missing for part in ("3/3", "1/3", "2/3")]
    assert missing == [4, 2, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    again = ingest(tars, tmp_path / "out", partition="2/3")
    assert again.rows == 0 and again.dataset.rows == 15


def test_what_is_left_can_be_dealt_anew(tmp_path, tars) -> None:
    ingest(tars, tmp_path / "one")
    ingest(tars, tmp_path / "out", partition="1/2")
    assert ingest(tars, tmp_path / "out", partition="4/4").rows == 3
    assert ingest(tars, tmp_path / "out").rows == 3  # one run does the rest
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_finish_says_what_is_missing_and_gives_the_same_manifest(tmp_path, tars, monkeypatch) -> None:
    ingest(tars, tmp_path / "one")
    monkeypatch.setattr("aligncurate.dataset.writer.DatasetWriter.has_all", lambda writer, count: False)
    ingest(tars, tmp_path / "out", partition="1/2")
    said = complaint(cli("finish", tmp_path / "out"))
    assert "2 of 5 parts are missing (numbers 1, 3); run their partitions again" in said
    ingest(tars, tmp_path / "out", partition="2/2")
    with pytest.raises(UserError, match="not finished"):
        Dataset(tmp_path / "out")
    said = cli("finish", tmp_path / "out")
    assert said.exit_code == 0 and "5 parts, 15 rows" in said.output
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert aligncurate.finish(tmp_path / "out").rows == 15  # nothing to do
    assert "there is no dataset" in complaint(cli("finish", tmp_path))


@pytest.mark.parametrize("partition", ["0/3", "4/3", "1", "a/b", "1/0", "1/3/5", "-1/3"])
def test_a_partition_that_is_none(tmp_path, tars, partition) -> None:
    with pytest.raises(UserError, match="use I/N with I from 1 to N"):
        ingest(tars, tmp_path / "out", partition=partition)


def test_runs_of_partitions_share_the_folder_and_others_do_not(tmp_path) -> None:
    out = tmp_path / "out"
    with claim(out, ["manifest.json"], shared=True):
        with claim(out, ["manifest.json"], shared=True):
            (out / ".tmp-of-another").touch()
        with claim(out, ["manifest.json"], shared=True):
            assert (out / ".tmp-of-another").exists()  # it may be in use
        with pytest.raises(UserError, match="another run is writing"), claim(out, ["manifest.json"]):
            pass
    assert not (out / LOCK).exists()
    with claim(out, ["manifest.json"]):
        assert not (out / ".tmp-of-another").exists()
        with pytest.raises(UserError, match="another run"), claim(out, ["manifest.json"], shared=True):
            pass


def test_shards_that_cannot_be_read_become_rows_if_so_many_may_be_missing(tmp_path, tars, monkeypatch) -> None:
    real, bad = WebDatasetSource.read, tars[1]

    def read(source: WebDatasetSource, shard: Shard) -> Iterator[Pair]:
        if shard.uri == bad:
            raise ShardError(f"{bad}: the disk is broken")
        return real(source, shard)

    monkeypatch.setattr(WebDatasetSource, "read", read)
    for allowed in (None, 0):
        refused = ingest(tars, tmp_path / "out", allow_missing=allowed)
        assert refused.dataset is None and [failure.shard for failure in refused.failures] == [bad]
    dataset = ingest(tars, tmp_path / "out", allow_missing=1).dataset
    assert dataset.statuses == {"ok": 12, "read_error": 1}
    row = dataset.scan().filter(status="read_error").collect().row(0, named=True)
    assert (row["key"], row["source"], row["error"]) == (bad, bad, f"{bad}: the disk is broken")
    monkeypatch.setattr(WebDatasetSource, "read", real)
    ingest(tars, tmp_path / "one")
    ingest(tars, tmp_path / "out", retry_errors=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_several_devices_give_the_bytes_of_one(tmp_path, tars, monkeypatch) -> None:
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # on processors, sums are rounded in an order that depends on the threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = {"model": "tiny", "batch_size": 2, "quiet": True}
    aligncurate.score(tars, tmp_path / "one", **options)
    torch.set_num_threads(threads)
    result = aligncurate.score(tars, tmp_path / "two", devices="cpu,cpu", **options)
    assert result.rows == 15 and not result.failures
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_device_with_other_weights_is_refused(tmp_path, tars, monkeypatch) -> None:
    real = load_all

    def other(*arguments: Any, **options: Any) -> dict[str, Encoder]:
        encoders = real(*arguments, **options)
        encoders["score"].identity["weights_sha256"] = "0" * 64  # of the driver, not of the device's process
        return encoders

    monkeypatch.setattr("aligncurate.encoders.load.load_all", other)
    with pytest.raises(UserError, match="a worker has other weights"):
        aligncurate.score(tars, tmp_path / "out", model="tiny", devices="cpu,cpu", batch_size=2, quiet=True)


@pytest.mark.parametrize("devices", ["0,99", "all", "tpu", ""])
def test_devices_that_are_not_there(tmp_path, tars, devices, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=f"--devices {devices}"):
        aligncurate.score(tars, tmp_path / "out", model="tiny", devices=devices, quiet=True)
