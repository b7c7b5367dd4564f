"""Ctrl-C: what hangs ends, a shard that is nearly done is finished, and the message tells what is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from tests.support.inputs import cli, pairs, write_tar
from tests.support.web import serving

_COMMAND = """
import sys, time
import fsspec
from tests.support.web import Web
fsspec.register_implementation("web", Web, clobber=True)
{setup}
from aligncurate.cli.app import main
main()
"""


class Run:
    """The command line in another process."""

    def __init__(self, *arguments: object, setup: str = "") -> None:
        command = [sys.executable, "-c", _COMMAND.format(setup=setup), *map(str, arguments)]
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def interrupt(self) -> float:
        """Press Ctrl-C; the seconds until the run has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.said = self.process.communicate(timeout=300)[1]
        return time.monotonic() - began


def until(condition) -> None:
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in two minutes")


@pytest.mark.parametrize("hangs_at", [0, 12], ids=["before the run", "in a shard"])
def test_a_server_that_never_answers_does_not_keep_an_interrupted_run(tmp_path, hangs_at) -> None:
    with serving() as server:
        server.files = {f"/{i}.tar": write_tar(tmp_path / f"{i}.tar", pairs(2)).read_bytes() for i in range(6)}
        server.faults = dict.fromkeys(range(hangs_at, 1_000), "hang")
        run = Run("ingest", f"web://{server.address}/{{0..5}}.tar", "--out", tmp_path / "out", "--timeout", 300)
        until(lambda: len(server.requests) > hangs_at)
        time.sleep(0.5)
        assert run.interrupt() < 60  # two seconds on an idle machine; the time-out is 300
        assert run.process.returncode == 130
        said = run.said
        assert "Interrupted" in said and "error" not in said and "Traceback" not in said


def test_a_server_that_never_answers_fails_its_shards_after_the_tries(tmp_path) -> None:
    with serving() as server:
        server.files = {f"/{i}.tar": write_tar(tmp_path / f"{i}.tar", pairs(2)).read_bytes() for i in range(2)}
        server.always = "hang"
        found = cli("ingest", f"web://{server.address}/{{0..1}}.tar", "--out", tmp_path / "out", "--timeout", 0.2)
        assert found.exit_code == 1 and "no answer within 0.2 s" in found.output


_SLOW = """
from aligncurate.scoring import prepare
real = prepare.Preparer.prepare
def slow(*arguments, **options):
    time.sleep({seconds})
    return real(*arguments, **options)
prepare.Preparer.prepare = slow
"""
_ENCODING = ("--model", "tiny", "--device", "cpu", "--workers", 1, "--batch-size", 8)


def test_a_shard_that_is_nearly_done_is_finished(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(200))
    log = tmp_path / "done"
    setup = _SLOW.format(seconds=0.02) + (
        "from aligncurate.progress import Meter\nadd = Meter.add\n"
        f"def count(*a):\n    add(*a)\n    open({str(log)!r}, 'w').write('x')\nMeter.add = count\n"
    )
    run = Run("score", tar, "--out", tmp_path / "out", *_ENCODING, setup=setup)
    until(log.exists)
    run.interrupt()
    said = run.said
    assert run.process.returncode == 130, said
    assert "finishing 1 shard in hand" in said and "200 of 200 pairs saved" in said and "error" not in said
    assert cli("score", tar, "--out", tmp_path / "out", *_ENCODING).exit_code == 0
    assert pl.read_parquet(sorted((tmp_path / "out").rglob("part-*.parquet")))["status"].to_list() == ["ok"] * 200


def test_a_shard_that_takes_long_is_not_finished(tmp_path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(40))
    log = tmp_path / "begun"
    setup = _SLOW.format(seconds=2) + f"prepare.Preparer.prepare = lambda *a: (open({str(log)!r}, 'w'), slow(*a))[1]\n"
    run = Run("ingest", tar, "--out", tmp_path / "out", "--workers", 1, setup=setup)
    until(log.exists)
    run.interrupt()
    said = run.said
    assert run.process.returncode == 130 and "0 of 40 pairs saved" in said and "error" not in said, said
    assert cli("ingest", tar, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("out", ["s3://bucket/data", "gs://b", "memory://x/y"])
def test_a_remote_folder_for_a_model_is_refused(tmp_path, monkeypatch, out) -> None:
    monkeypatch.chdir(tmp_path)
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    result = cli("train", "pretrain", tar, "--out", out)
    assert result.exit_code == 2, result.output
    assert f"--out {out}: models are written to local folders only" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
