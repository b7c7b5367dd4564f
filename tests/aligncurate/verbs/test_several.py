"""Verbs on several datasets do what they do on the merged one."""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import aligncurate
from tests.support.inputs import cli, complaint, jpeg


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Datasets `a` and `b c`, the second with a column more, and `merged`, which has all their rows."""
    path = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(5)
    for name, rows in (("a", 40), ("b c", 60)):
        frame = pl.DataFrame(
            {
                "key": [f"{name[0]}{i}" for i in range(rows)],
                "image": [jpeg(i % 30, width=16, height=16) for i in range(rows)],
                "caption": [f"caption {i}" for i in range(rows)],
                "score": rng.normal(0.2, 0.1, rows).astype(np.float32),
            }
        )
        if name == "b c":
            frame = frame.with_columns(licence=pl.lit("cc0"))
        frame.write_parquet(path / f"{name}.parquet")
        aligncurate.ingest(path / f"{name}.parquet", path / name, quiet=True)
    aligncurate.merge([path / "a", path / "b c"], path / "merged", quiet=True)
    return path


def both(folder: Path) -> list[Path]:
    return [folder / "a", folder / "b c"]


def test_bucket(tmp_path, folder) -> None:
    found = aligncurate.bucket(both(folder), tmp_path / "found", levels=4, quiet=True)
    expected = aligncurate.bucket(folder / "merged", tmp_path / "expected", levels=4, quiet=True)
    assert found.scan().collect().equals(expected.scan().collect())
    assert found.manifest["thresholds"] == expected.manifest["thresholds"]
    assert found.manifest["score_counts"] == expected.manifest["score_counts"]


def test_datasets_with_other_levels_are_bucketed_together_only(tmp_path, folder) -> None:
    parts = [aligncurate.bucket(each, tmp_path / each.name, levels=4, quiet=True).path for each in both(folder)]
    found = aligncurate.bucket(parts, tmp_path / "found", levels=4, quiet=True)
    expected = aligncurate.bucket(folder / "merged", tmp_path / "expected", levels=4, quiet=True)
    assert found.scan().collect().equals(expected.scan().collect())
    for words in (("filter", "--levels", "2"), ("export",)):
        told = complaint(cli(words[0], *parts, *words[1:], "--out", tmp_path / "x"))
        assert "cut by other thresholds" in told
    assert "cut by other thresholds" in complaint(cli("inspect", *parts))


@pytest.mark.parametrize(
    "options",
    [
        {"where": "licence = 'cc0' or key like 'a1%'"},
        {"min_score": 0.2, "sample": 17},
        {"top_fraction": 0.3, "rows_per_part": 9},
        {"one_per_image": "best"},
    ],
)
def test_filter(tmp_path, folder, options) -> None:
    found = aligncurate.filter(both(folder), tmp_path / "found", quiet=True, **options)
    expected = aligncurate.filter(folder / "merged", tmp_path / "expected", quiet=True, **options)
    assert 0 < found.rows < 100
    assert found.scan().collect().equals(expected.scan().collect())


def test_inspect(folder) -> None:
    found = aligncurate.inspect(both(folder), examples=2).to_json()
    expected = aligncurate.inspect(folder / "merged", examples=2).to_json()
    assert found["folders"] == [str(each) for each in both(folder)]
    assert (found["made_by"], expected["made_by"]) == ("ingest", "merge")  # of several, by what made them
    own = dict.fromkeys(("path", "folders", "made_by"))
    assert {**found, **own} == {**expected, **own}
    printed = cli("inspect", *both(folder)).stdout
    assert f"next: aligncurate bucket {folder / 'a'} {shlex.quote(str(folder / 'b c'))} --out LEVELLED" in printed


@pytest.mark.parametrize("form", ["webdataset", "llava-json", "datacomp-uids"])
def test_export(tmp_path, folder, form) -> None:
    found = aligncurate.export(both(folder), tmp_path / "found", format=form, shard_size=30, quiet=True)
    expected = aligncurate.export(folder / "merged", tmp_path / "expected", format=form, shard_size=30, quiet=True)
    assert (found.rows, found.files) == (expected.rows, expected.files)
    if form == "webdataset":
        for name in found.files:
            tars = [tmp_path / each / name for each in ("found", "expected")]
            one, other = map(_texts, tars)
            assert one == other
            tables = [pq.read_table(tar.with_suffix(".parquet")) for tar in tars]
            assert tables[0].equals(tables[1])
    elif form == "datacomp-uids":
        assert (tmp_path / "found/uids.npy").read_bytes() == (tmp_path / "expected/uids.npy").read_bytes()


def _texts(tar: Path) -> dict[str, bytes]:
    """The captions and images of a tar; its JSON files name columns that only one of the datasets has."""
    with tarfile.open(tar) as file:
        members = {m.name: file.extractfile(m).read() for m in file}
    return {name: data for name, data in members.items() if not name.endswith(".json")}


def test_join(tmp_path, folder) -> None:
    pl.DataFrame({"key": ["a3", "b5", "b7"], "n": [1, 2, 3]}).write_parquet(tmp_path / "t.parquet")
    found = aligncurate.join(both(folder), tmp_path / "t.parquet", tmp_path / "found", quiet=True)
    expected = aligncurate.join(folder / "merged", tmp_path / "t.parquet", tmp_path / "expected", quiet=True)
    assert (found.matched, expected.matched) == (3, 3)
    assert found.dataset.scan().collect().equals(expected.dataset.scan().collect())


def test_never_into_one_of_them(folder) -> None:
    for verb in (("bucket",), ("filter", "--sample", 1)):
        assert "nothing is changed in place" in complaint(cli(*verb, *both(folder), "--out", folder / "b c"))
