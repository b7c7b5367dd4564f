"""Worker processes make the same bytes as one process, also when some of them are killed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.engines.shared_memory import SharedMemory
from aligncurate.scoring import run as runs
from aligncurate.scoring.packet import Packet, Scores
from aligncurate.scoring.run import DeviceRun, WorkerPlan
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import pairs, write_tar


@pytest.fixture(autouse=True)
def workers_for_few_rows(monkeypatch) -> None:
    monkeypatch.setattr(runs, "_MANY_ROWS", 0)


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[str]:
    """Four tars; in some samples the image, the caption or the JSON cannot be used."""
    folder = tmp_path_factory.mktemp("tars")
    files = []
    for number in range(4):
        samples = pairs(12, first=12 * number)
        keys = list(samples)
        samples[keys[1]]["jpg"] = b"not a picture"
        del samples[keys[3]]["txt"]
        del samples[keys[5]]["jpg"]
        samples[keys[7]]["json"] = b'{"url": "u", "n": 3}'
        files.append(str(write_tar(folder / f"{number}.tar", samples)))
    return files


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def plans(monkeypatch) -> list[WorkerPlan]:
    """The plans that runs choose from now on."""
    seen: list[WorkerPlan] = []
    real = DeviceRun._choose_plan

    def choose(run: DeviceRun, shards: int) -> WorkerPlan:
        seen.append(real(run, shards))
        return seen[-1]

    monkeypatch.setattr(DeviceRun, "_choose_plan", choose)
    return seen


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tars, monkeypatch, decode) -> None:
    chosen = plans(monkeypatch)
    options = {"model": "tiny", "decode": decode, "embeddings": "fp16", "batch_size": 2, "quiet": True}
    for workers in (1, 2):
        aligncurate.score(tars, tmp_path / str(workers), workers=workers, **options)
    assert chosen == [WorkerPlan(0, 1), WorkerPlan(2, 1)]
    one = contents(tmp_path / "1")
    assert len(one) == 9  # 4 parts, their receipts, the manifest
    assert contents(tmp_path / "2") == one


def test_ingest_with_workers(tmp_path, tars, monkeypatch, capsys) -> None:
    chosen = plans(monkeypatch)
    rows = [{"image": "no.jpg", "caption": ["one", "two"], "id": i // 2} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for workers in (1, 2, 5):
        source = SourceOptions(rows_per_shard=5)
        aligncurate.ingest(
            [*tars, str(tmp_path / "rows.json")], tmp_path / str(workers), source=source, workers=workers
        )
    assert chosen == [WorkerPlan(0, 1), WorkerPlan(2, 1), WorkerPlan(4, 1)]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")
    told = capsys.readouterr().err
    remarks = [line for line in told.splitlines() if "occurred before" in line or "captions" in line]
    assert len(remarks) == 6 and remarks[:2] == remarks[2:4] == remarks[4:]  # what workers counted is told as well


def test_workers_that_are_killed_are_replaced(tmp_path, tars, monkeypatch) -> None:
    options = {"model": "tiny", "batch_size": 2, "quiet": True}
    aligncurate.score(tars, tmp_path / "whole", workers=1, **options)
    real, killed = DeviceRun._encode, []

    def kill_and_encode(run: DeviceRun, packet: Packet) -> Future[Scores]:
        if not killed:
            for file in Path("/proc/self/task").glob("*/children"):
                for child in file.read_text().split():
                    if b"engines.processes" in Path(f"/proc/{child}/cmdline").read_bytes():
                        killed.append(int(child))
                        os.kill(killed[-1], signal.SIGKILL)
        return real(run, packet)

    monkeypatch.setattr(DeviceRun, "_encode", kill_and_encode)
    result = aligncurate.score(tars, tmp_path / "killed", workers=2, **options)
    assert killed and not result.failures
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_transform_that_cannot_travel_is_used_in_this_process(tmp_path, tars, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runs, "_is_picklable", lambda job: False)
    aligncurate.score(tars, tmp_path / "out", model="tiny", workers=2)
    assert "so one process reads" in capsys.readouterr().err


def test_sources_that_were_sent_give_the_same_pairs(tmp_path, tars) -> None:
    (tmp_path / "rows.csv").write_text("image,caption\nkey0.jpg,a\nkey1.jpg,b\nno.jpg,c\n")
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": ["a", "b"]}), tmp_path / "rows.parquet")
    files = [tars[0], str(tmp_path / "rows.csv"), str(tmp_path / "rows.parquet")]
    source = open_source(files, SourceOptions(image_root=str(Path(tars[0]).parent)))
    first = list(source.read(source.shards[0]))  # it is being used
    sent = pickle.loads(pickle.dumps(source))
    for shard in source.shards:
        ours, theirs = (
            [(p.key, p.caption, p.status, p.image_path, p.image_offset) for p in s.read(shard)] for s in (source, sent)
        )
        assert ours == theirs
    assert len(first) == 12


def test_shared_memory_grows_and_is_the_same_in_both_processes() -> None:
    memory = SharedMemory()
    other = SharedMemory(os.dup(memory.descriptor))
    for size in (3, 200_000, 5):
        specs = [((size, 2), "uint8"), ((7,), "<f4")]
        ours, theirs = memory.arrays(specs), other.arrays(specs)
        ours[0][:], ours[1][:] = size % 251, np.arange(7)
        assert (theirs[0] == size % 251).all() and theirs[1].tolist() == list(range(7))
    memory.close()
    other.close()
