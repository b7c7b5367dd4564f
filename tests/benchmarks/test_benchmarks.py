"""The benchmarks run on little data, their variants agree, and what they save can be read."""

import argparse
import json
import tarfile

import numpy as np
import pytest

from benchmarks import common, export, feed, levels, start


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--rounds", "1", "--save"])
    module.main()


def saved(results) -> dict:
    (file,) = results.glob("*.json")
    return read(file)


def read(file) -> dict:
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


def test_feed(results, monkeypatch, data_root) -> None:
    images = data_root / "coco"
    run(monkeypatch, feed, "--images", str(images), "--edges", "160", "--pairs", "8", "--workers", "1", "--tries", "1")
    records = {record["benchmark"]: record["rows"] for file in results.glob("*.json") for record in [read(file)]}
    rates, stages, cores = (records[name] for name in ("feed", "feed-stages", "feed-cores"))
    assert [row["variant"] for row in rates] == ["ours, exact", "ours, fast", "DataLoader, open_clip"]
    assert {"open", "tokenize", "decode and resize, fast, to 224"} <= {row["stage"] for row in stages}
    by_name = {row["encoder"]: row for row in cores}
    assert by_name["ViT-L/14"]["assumed pairs/s"] == 2_400 and len(by_name) == len(feed.ENCODERS)


def test_cores_are_the_pairs_per_second_times_their_cpu_time() -> None:
    cpu = common.Spread(500.0, 400.0, 600.0, 3)
    slow = common.Spread(900.0, 900.0, 900.0, 3)
    rates = [
        {"photos": 256, "variant": "ours, fast", "workers": 1, "CPU µs per pair": slow},
        {"photos": 256, "variant": "ours, fast", "workers": 2, "CPU µs per pair": cpu},
        {"photos": 256, "variant": "DataLoader, open_clip", "workers": 2, "CPU µs per pair": slow},
    ]
    decoding = {"to 224": 300.0, "to 336": 400.0, "to 224 (squash)": 1_300.0}
    stages = [{"photos": 256, "stage": f"decode and resize, fast, {to}", "µs": µs} for to, µs in decoding.items()]
    cores = {row["encoder"]: row["256 px, fast"] for row in feed.cores_needed(rates, stages)}
    assert cores["ViT-B/32"] == 12_000 * 500 / 1e6
    assert cores["ViT-L/14"] == 2_400 * 500 / 1e6
    assert cores["ViT-L/14-336"] == pytest.approx(2_400 * 175.33 / 395.22 * (500 - 300 + 400) / 1e6, abs=0.1)
    assert cores["SigLIP SO400M/14"] == pytest.approx(2_400 * 175.33 / 233.54 * (500 - 300 + 1_300) / 1e6, abs=0.1)
