"""The benchmarks run on little data, their variants agree, and what they save can be read."""

import argparse
import json
import tarfile

import numpy as np
import pytest

from benchmarks import common, export, levels, start


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--rounds", "1", "--save"])
    module.main()


def saved(results) -> dict:
    (file,) = results.glob("*.json")
    record = json.loads(file.read_text())
    assert {"benchmark", "date", "settings", "machine", "rows"} <= record.keys()
    return record


def test_levels(results, monkeypatch, tmp_path) -> None:
    # Exits with an error unless ours, polars and numpy find the same thresholds.
    run(monkeypatch, levels, "--scores", "30000", "--label", "200000", "--tries", "1", "--folder", str(tmp_path))
    rows = saved(results)["rows"]
    assert [row["variant"] for row in rows if row["what"] == "thresholds"] == [
        "ours, two passes",
        "ours, counts left by score",
        "polars, sort",
        "numpy.sort",
    ]
    assert all(row["peak MiB"] > 10 for row in rows[:4])
    assert {row["what"] for row in rows[4:]} == {"labels, parts of 10,000", "labels, parts of 200,000"}


def test_variants_that_disagree_are_an_error() -> None:
    options = argparse.Namespace(rounds=1, tries=1)
    variants = {n: lambda n=n: {"seconds": 1.0, "worked": 1.0, "values": [n]} for n in ("a", "b")}
    with pytest.raises(SystemExit, match="do not agree"):
        levels.measure("thresholds", 1, variants, options)


def test_export(results, monkeypatch, tmp_path) -> None:
    run(monkeypatch, export, "--pairs", "30", "--kib", "5", "--folder", str(tmp_path))
    rows = saved(results)["rows"]
    assert [row["variant"] for row in rows] == ["cp and sync", "cp", "export"]
    assert all(row["MB/s"]["median"] > 0 for row in rows)


def test_its_pairs_are_tars_of_the_wanted_size(tmp_path) -> None:
    size = export.write_pairs(tmp_path / "tars", 200, 10)
    with tarfile.open(tmp_path / "tars/00000.tar") as tar:
        images = [member.size for member in tar if member.name.endswith(".jpg")]
    assert (len(images), sum(images)) == (200, size)
    assert 7 * 1024 < np.mean(images) < 13 * 1024


def test_start(results, monkeypatch) -> None:
    monkeypatch.setattr(start, "COMMANDS", {k: start.COMMANDS[k] for k in ("python, nothing", "import aligncurate")})
    run(monkeypatch, start)
    assert [row["command"] for row in saved(results)["rows"]] == ["python, nothing", "import aligncurate"]
