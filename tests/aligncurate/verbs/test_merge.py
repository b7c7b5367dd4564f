"""`merge`: parts, receipts and provenance of all datasets, no image read, nothing scored."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

import aligncurate
from aligncurate.dataset.joined import open_datasets
from aligncurate.errors import UserError
from aligncurate.levels import Counts
from aligncurate.verbs.merge import merge
from tests.aligncurate.dataset.test_joined import scored, tar  # noqa: F401
from tests.support.inputs import cli, complaint


def test_parts_are_taken_over_without_reading_an_image(scored, tmp_path) -> None:  # noqa: F811
    for folder in scored.values():
        shutil.copy(folder.with_suffix(".tar"), tmp_path)
        folder.with_suffix(".tar").write_bytes(b"gone")
    a, b = scored["a"], scored["b"]
    merged = merge([a, b], tmp_path / "out", quiet=True)
    for folder in scored.values():
        shutil.copy(tmp_path / f"{folder.name}.tar", folder.with_suffix(".tar"))
    before = [aligncurate.open_dataset(folder) for folder in (a, b)]
    assert [f.read_bytes() for f in merged.files] == [f.read_bytes() for d in before for f in d.files]
    assert all(os.path.samefile(new, old) for new, old in zip(merged.files, [d.files[0] for d in before], strict=True))
    assert merged.encoder_of("score") == before[0].encoder_of("score")
    scores = merged.scan().collect()["score"].to_numpy()
    assert merged.score_counts("score").to_json() == Counts.of([scores]).to_json()
    assert [Path(line["uri"]) for line in merged.manifest["inputs"]] == [a, b]
    assert [step["verb"] for step in merged.manifest["history"]] == ["score", "score"]
    manifest = (merged.path / "manifest.json").read_bytes()
    (merged.path / "data/part-00001.parquet").unlink()
    assert merge([a, b], tmp_path / "out", quiet=True).rows == 8
    assert (merged.path / "manifest.json").read_bytes() == manifest


def test_parts_of_other_columns_get_nulls(scored, tmp_path) -> None:  # noqa: F811
    merged = merge(list(scored.values()), tmp_path / "out", quiet=True)
    joined = open_datasets(list(scored.values()))
    assert merged.scan().collect().equals(joined.scan().collect())
    assert pl.read_parquet(merged.files).equals(merged.scan().collect())
    assert merged.score_counts("score").total == 10
    levelled = aligncurate.bucket(merged, tmp_path / "levelled", levels=2, quiet=True)
    assert levelled.manifest["history"][-1]["verb"] == "merge"


def test_another_disk_gets_copies(scored, tmp_path, monkeypatch) -> None:  # noqa: F811
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merged = merge([scored["a"], scored["b"]], tmp_path / "out", quiet=True)
    assert merged.rows == 8 and not os.path.samefile(merged.files[0], scored["a"] / "data/part-00000.parquet")


def test_ingesting_datasets_keeps_their_provenance_and_points_to_merge(scored, tmp_path, capsys) -> None:  # noqa: F811
    a, b = scored["a"], scored["b"]
    ingested = aligncurate.ingest([a, b], tmp_path / "in").dataset
    merged = merge([a, b], tmp_path / "merged", quiet=True)
    assert "`aligncurate merge` joins them without reading images" in " ".join(capsys.readouterr().err.split())
    assert ingested.provenance()["history"][:-1] == merged.provenance()["history"][:-1]
    for name in ("encoder", "computed_with", "score_counts", "thresholds"):
        assert ingested.manifest[name] == merged.manifest[name]
    assert ingested.scan().collect().equals(merged.scan().collect())
    assert aligncurate.ingest(a, tmp_path / "one", quiet=True).dataset.encoder_of("score") == merged.encoder_of("score")
    aligncurate.bucket(a, tmp_path / "cut", levels=2, quiet=True)
    with pytest.raises(UserError, match="it has no levels, but"):
        aligncurate.ingest([tmp_path / "cut", b], tmp_path / "mixed", quiet=True)


def test_usage(scored, tmp_path) -> None:  # noqa: F811
    a, b = scored["a"], scored["b"]
    with pytest.raises(UserError, match="at least two"):
        merge([a], tmp_path / "out")
    with pytest.raises(UserError, match="nothing is changed in place"):
        merge([a, b], b)
    done = cli("merge", a, b, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "merged 8 rows in 2 parts into" in done.stdout
    assert "holds a different dataset" in complaint(cli("merge", b, a, "--out", tmp_path / "out"))
    assert json.loads((tmp_path / "out/manifest.json").read_text())["complete"]


@pytest.mark.parametrize("verb", ["ingest", "score"])
def test_a_dataset_that_is_added_to_the_inputs_becomes_further_parts(scored, tmp_path, mini, verb) -> None:  # noqa: F811
    options = mini if verb == "score" else {}
    run = getattr(aligncurate, verb)
    a, b = scored["a"], scored["b"]
    first = run([a], tmp_path / "out", **options, quiet=True).dataset
    parts = [file.stat().st_ino for file in first.files]
    grown = run([a, b], tmp_path / "out", **options, quiet=True)
    assert grown.resumed == len(parts) and [f.stat().st_ino for f in grown.dataset.files[: len(parts)]] == parts
    fresh = run([a, b], tmp_path / "fresh", **options, quiet=True).dataset
    assert grown.dataset.scan().collect().equals(fresh.scan().collect())
    assert grown.dataset.manifest == fresh.manifest
    with pytest.raises(UserError, match="has been removed"):
        run([b], tmp_path / "out", **options, quiet=True)


def test_a_part_that_a_killed_run_linked_leaves_no_temporary_file(scored, tmp_path) -> None:  # noqa: F811
    folders = [scored["a"], scored["b"]]
    merged = merge(folders, tmp_path / "out", quiet=True).path
    (merged / ".receipts/part-00001.json").unlink()  # the run was killed before it wrote it
    (merged / "data/part-00000.parquet").unlink()  # so that there is something to do
    merge(folders, merged, quiet=True)
    assert not list(merged.rglob(".tmp-*"))
